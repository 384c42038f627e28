"""Simple corruptions of test inputs at three levels, identical for every checkpoint: a first check of robustness."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

LEVELS = (1, 2, 3)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def noise(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise per channel, with sd 0.08, 0.12 or 0.18 of the range (Hendrycks 2019, severity 1 to 3)."""
    pixels = np.asarray(image, dtype=float) / 255
    pixels = pixels + rng.normal(0, (0.08, 0.12, 0.18)[level - 1], pixels.shape)
    return Image.fromarray(np.uint8(np.round(np.clip(pixels, 0, 1) * 255)))


def blur(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur with a radius of 1, 2 or 4 % of the image's shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * (0.01, 0.02, 0.04)[level - 1]))


def contrast(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """Contrast reduced to 60, 40 or 20 %."""
    return ImageEnhance.Contrast(image).enhance((0.6, 0.4, 0.2)[level - 1])


def characters(text: str, level: int, rng: np.random.Generator) -> str:
    """Typos: 3, 6 or 12 % of the letters are dropped, doubled, replaced, or swapped with the previous character."""
    out: list[str] = []
    rate = (0.03, 0.06, 0.12)[level - 1]
    for character in text:
        if not character.isalpha() or rng.random() >= rate:
            out.append(character)
            continue
        kind = rng.integers(4)
        if kind == 1:
            out.append(character * 2)
        elif kind == 2:
            out.append(ALPHABET[rng.integers(len(ALPHABET))])
        elif kind == 3:
            out.insert(max(len(out) - 1, 0), character)  # swapped with the character before
    return "".join(out)


IMAGE_CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
}
TEXT_CORRUPTIONS: dict[str, Callable[[str, int, np.random.Generator], str]] = {"characters": characters}
