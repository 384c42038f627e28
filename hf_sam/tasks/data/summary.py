"""Summarize the data before training: class counts, truncation, and likely problems."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..command_line.errors import UserError
from .images import open_image, undecoded
from .loading import Splits, column

RARE = 5  # classes with fewer training examples get a warning
MAX_LISTED = 10
MAX_MEASURED = 2000  # texts to tokenize for the length statistics
IMAGES_CHECKED = 32  # per split, unless all are checked


def tell(lines: Sequence[str]) -> None:
    """Print the lines of a summary."""
    for line in lines:
        print(f"warning: {line[1:]}" if line.startswith("!") else f"data: {line}", flush=True)


def sizes(splits: Splits) -> list[str]:
    """Describe the size of each split."""
    counts = [f"{name} {len(split):,}" for name, split in splits.items() if isinstance(split, Dataset)]
    return [f"{', '.join(counts)} examples"] if counts else []


def classes(splits: Splits, label_column: str, names: Sequence[str]) -> list[str]:
    """Describe the class counts of the training split; warnings (starting with `!`) for rare and look-alike classes."""
    train = splits["train"]
    if not isinstance(train, Dataset):
        return []
    counts = np.bincount(column(train, label_column), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    listed = ", ".join(f"{names[i]} {counts[i]:,}" for i in order[:MAX_LISTED])
    more = f" and {len(names) - MAX_LISTED} more down to {counts[order[-1]]:,}" if len(names) > MAX_LISTED else ""
    lines = [f"{len(names)} classes in train: {listed}{more}; always predicting {names[order[0]]} gives "
             f"{100 * counts.max() / counts.sum():.1f} % accuracy"]  # fmt: skip
    rare = [f"{names[i]} ({counts[i]})" for i in order[::-1] if counts[i] < RARE]
    if rare:
        lines.append(
            f"!{'One class has' if len(rare) == 1 else f'{len(rare)} classes have'} fewer than {RARE} training examples: "
            f"{_some(rare)}. The model can learn little about {'it' if len(rare) == 1 else 'them'}; add examples, or remove "
            f"{'the class' if len(rare) == 1 else 'the classes'}."
        )
    alike = look_alikes(names)
    if alike:
        pairs = [f"{a!r} and {b!r}" for a, b in alike]
        lines.append(
            f"!Class names that may mean the same: {_some(pairs)}. Correct the labels, unless this is intended."
        )
    return lines


def look_alikes(names: Sequence[str]) -> list[tuple[str, str]]:
    """Find names that differ only in case, spaces or punctuation, or by a letter in a long word; numbers do not count."""
    by_key = defaultdict(list)
    for name in names:
        by_key[re.sub(r"[\W_]+", "", name).casefold() or name].append(name)
    found = [(group[0], other) for group in by_key.values() for other in group[1:]]
    keys = [key for key in by_key if len(key) >= 5]
    for index, key in enumerate(keys):
        for other in difflib.get_close_matches(key, keys[index + 1 :], n=3, cutoff=0.88):
            if re.findall(r"\d+", key) == re.findall(r"\d+", other):
                found.append((by_key[key][0], by_key[other][0]))
    return found


def truncation(
    splits: Splits,
    text_columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    argument: str = "max_length",
) -> list[str]:
    """
    Describe how many texts, and how many of their tokens, `max_length` cuts, on at most `MAX_MEASURED` training texts.
    `argument` is the name of the option for `max_length`.
    """
    train = splits["train"]
    if not isinstance(train, Dataset) or any("string" not in train.features[name].dtype for name in text_columns):
        return []
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), MAX_MEASURED)).astype(int))
    part = train.select(rows)
    texts = [[text or "" for text in part[name]] for name in text_columns]
    lengths = np.array([len(ids) for ids in tokenizer(*texts, truncation=False, verbose=False)["input_ids"]])
    cut = lengths > max_length
    if not cut.any():
        return [f"no text is longer than {argument}={max_length}; the longest has {lengths.max()} tokens"]
    lost = np.maximum(lengths - max_length, 0).sum() / lengths.sum()
    line = (
        f"{argument}={max_length} cuts {100 * cut.mean():.1f} % of the texts and {100 * lost:.1f} % of the tokens; half the "
        f"texts have more than {int(np.median(lengths))} tokens, the longest {lengths.max()}"
    )
    return [f"!{line}. Give a larger --{argument} if the end of the texts matters." if cut.mean() > 0.1 else line]


def check_images(splits: Splits, image_column: str, how: str) -> list[str]:
    """
    Open images before the first step: `"all"`, a `"sample"` of each split, or `"none"`.

    Raises:
        UserError: If images cannot be opened; the message names the first few.
    """
    broken, opened = [], 0
    for name, split in splits.items():
        if how == "none" or not isinstance(split, Dataset):
            continue
        images = undecoded(split, image_column)
        count = len(images) if how == "all" else min(len(images), IMAGES_CHECKED)
        for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist():
            opened += 1
            try:
                open_image(images[index][image_column], f"{name} image {index}")
            except UserError as error:
                broken.append(str(error).removesuffix("; remove its row from the data."))
    if broken:
        hint = "" if how == "all" else " --check_images all checks every image."
        raise UserError(f"{len(broken)} of {opened} checked images are broken: {'; '.join(broken[:MAX_LISTED])}. "
                        f"Remove these rows from the data.{hint}")  # fmt: skip
    return [f"{opened:,} images checked"] if opened else []


def rows_in_words(rows: Sequence[Any]) -> str:
    """List the first few row numbers."""
    return f"row{'s' if len(rows) > 1 else ''} {_some([str(row) for row in rows])} (counting from 0)"


def how_many(items: Sequence[Any], noun: str) -> str:
    """Return `1 example`, `2 examples`."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _some(items: Sequence[str]) -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
