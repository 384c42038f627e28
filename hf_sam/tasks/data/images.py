"""Turn images into tensors: random augmentation of the training split, then the model's own processor."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, TrainerCallback

from ..command_line.errors import UserError

KEPT_BYTES = 2**28
Augment = Callable[[Image.Image, int, np.random.Generator], Image.Image]


class ImageDataset(torch.utils.data.Dataset):
    """
    A split as `{"pixel_values": (channels, height, width), "labels": int}`.

    The augmentation of an example depends only on the seed, the epoch and the example, not on the random state of the
    process. It is therefore the same for all arms of a comparison, for any number of workers, and after a resume.
    Without augmentation, the tensors of a small split are kept in memory instead of being recomputed in every epoch.

    Args:
        dataset (`datasets.Dataset`): Has an image column and a column of class indices.
        image_column, label_column (`str`): Names of these columns.
        transform (`ImageTransform`): How an image becomes a tensor.
        split (`str`): Name of the split, for error messages.
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        transform: ImageTransform,
        split: str,
        seed: int = 0,
    ):
        self.dataset = undecoded(dataset, image_column)
        self.labels = list(self.dataset[label_column])
        self.image_column = image_column
        self.transform = transform
        self.split = split
        self.seed = seed
        self.epoch = torch.zeros(
            1, dtype=torch.long
        ).share_memory_()  # shared, so that persistent workers see it change
        size_in_bytes = len(dataset) * 3 * transform.size**2 * 4
        self.kept: dict[int, torch.Tensor] | None = (
            {} if transform.augment is None and size_in_bytes < KEPT_BYTES else None
        )

    def start_epoch(self, epoch: int) -> None:
        """Start a new epoch with new draws. (Not `set_epoch`: Accelerate calls that in resumed epochs only.)"""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.kept is None:
            return {"pixel_values": self._pixels(index), "labels": self.labels[index]}
        if index not in self.kept:
            self.kept[index] = self._pixels(index)
        return {"pixel_values": self.kept[index], "labels": self.labels[index]}

    def _pixels(self, index: int) -> torch.Tensor:
        image = open_image(self.dataset[index][self.image_column], f"{self.split} image {index}")
        return self.transform(image, np.random.default_rng((self.seed, self.epoch.item(), index)))


class NewDrawEachEpoch(TrainerCallback):
    """Tell an `ImageDataset` which epoch starts, or continues after a resume."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.start_epoch(int(state.epoch))


def stream_images(
    dataset: IterableDataset, image_column: str, label_column: str, transform: ImageTransform, split: str, seed: int
) -> IterableDataset:
    """Do what `ImageDataset` does for a streamed split; augmentation depends on the seed and the position in the stream."""

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        image = open_image(row[image_column], f"{split} image {index}")
        rng = np.random.default_rng((seed, index))
        return {"pixel_values": transform(image, rng).numpy(), "labels": int(row[label_column])}

    stream = undecoded(dataset, image_column)
    return stream.map(prepare, with_indices=True, remove_columns=stream.column_names)


def undecoded(dataset: Dataset | IterableDataset, image_column: str) -> Dataset | IterableDataset:
    """
    Return the data set with its images as bytes or paths, so that an unreadable image can be identified.

    Raises:
        UserError: If the column does not contain images.
    """
    feature = (dataset.features or {}).get(image_column)
    if isinstance(feature, datasets.Value) and feature.dtype == "string":
        return dataset  # paths
    if feature is not None and not isinstance(feature, datasets.Image):
        raise UserError(
            f"image_column={image_column} contains {feature}, not images or paths of image files; name another column."
        )
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def open_image(value: Any, name: str) -> Image.Image:
    """
    Open an image as RGB, with its EXIF orientation applied.

    Args:
        value (`dict` or `str`): Bytes and path as `datasets.Image(decode=False)` gives them, or a path.
        name (`str`): Name of the image in error messages.

    Raises:
        UserError: If the image cannot be opened; the message names it.
    """
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    if isinstance(value, Image.Image):
        return _rgb(value)
    if not value or (value.get("bytes") is None and not value.get("path")):
        raise UserError(f"{name} is empty; remove its row from the data.")
    try:
        source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
        with Image.open(source) as image:
            return _rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL, on broken files
        where = f" ({value['path']})" if value.get("path") else ""
        reason = str(error) if value.get("path") and not isinstance(error, Image.UnidentifiedImageError) else "no image"
        raise UserError(f"{name}{where} cannot be opened: {reason}; remove its row from the data.") from error


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about direct conversion
    return image.convert("RGB")


class ImageTransform:
    """
    `(image, generator) -> pixel_values`, `(channels, height, width)`.

    Args:
        processor (`BaseImageProcessor`): The model's image processor, which resizes, crops and normalises.
        augmentation (`str`): A key of [`AUGMENTATIONS`].
    """

    def __init__(self, processor: BaseImageProcessor, augmentation: str = "none"):
        self.processor = processor
        self.augment = AUGMENTATIONS[augmentation]
        self.size = output_size(processor)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        if self.augment is None:
            return self.processor(image, return_tensors="pt")["pixel_values"][0]
        image = self.augment(image, self.size, rng)
        return self.processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]


def output_size(processor: BaseImageProcessor) -> int:
    """Return the side in pixels of the processor's output."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or processor.size
    return size["height"] if "height" in size else size["shortest_edge"]


def set_output_size(processor: BaseImageProcessor, side: int) -> None:
    """Make the processor return `side` x `side` pixels, by whichever resizing or cropping it uses."""
    if "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": side}
    else:
        processor.size = {"height": side, "width": side}
    if getattr(processor, "do_center_crop", False) or "shortest_edge" in processor.size:
        processor.do_center_crop = True
        processor.crop_size = {"height": side, "width": side}


# --- augmentation: with PIL, so that results are the same on every machine -----------------------------------------


def _crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Pad by an eighth of the side and cut out a random square: the CIFAR recipe."""
    pad = max(1, size // 8)
    image = ImageOps.expand(image.resize((size, size), Image.Resampling.BICUBIC), border=pad)
    left, top = rng.integers(0, 2 * pad + 1, size=2).tolist()
    return image.crop((left, top, left + size, top + size))


def _flip(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _crop_flip(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return _flip(_crop(image, size, rng), size, rng)


def _resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of 8 to 100 % of the area, aspect 3/4 to 4/3, flipped at random: the ImageNet recipe."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:  # an extreme aspect: the largest central square
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return _flip(image.resize((size, size), Image.Resampling.BICUBIC, box=box), size, rng)


def _cutout(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop and flip, then grey out a square of half the side (DeVries and Taylor 2017), as in the SAM paper."""
    image = _crop_flip(image, size, rng)
    x, y = rng.integers(0, size, size=2).tolist()
    half = size // 4
    image.paste((128, 128, 128), (max(0, x - half), max(0, y - half), min(size, x + half), min(size, y + half)))
    return image


AUGMENTATIONS: dict[str, Augment | None] = {
    "none": None,
    "crop": _crop,
    "crop_flip": _crop_flip,
    "resized_crop": _resized_crop,
    "cutout": _cutout,
}
