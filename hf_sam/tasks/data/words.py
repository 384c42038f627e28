"""Sentences split into words with one tag per word, and their alignment with the tokenizer's tokens."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedTokenizerBase

from ..command_line.errors import UserError
from ..command_line.options import DataArguments
from .labels import MAX_CLASSES_FOUND, column_of_lists
from .loading import Splits, replace_column
from .summary import MAX_LISTED, MAX_MEASURED, rows_in_words, tell


def check_sentences(splits: Splits, words: str, tags: str, drop_empty: bool) -> Splits:
    """
    Check that every example has words, and as many tags as words.

    Raises:
        UserError: If a column does not contain lists, or an example has no words or a different number of tags.
    """
    checked = {}
    for split, dataset in splits.items():
        for argument, name in (("words_column", words), ("label_column", tags)):
            if (
                not isinstance(dataset.features[name], (List, list))
                and "List" not in type(dataset.features[name]).__name__
            ):
                raise UserError(
                    f"{argument}={name} of the {split} split contains {dataset.features[name]}, not lists with one entry per word."
                )
        sentences, labels = column_of_lists(dataset, words), column_of_lists(dataset, tags)
        if not all(isinstance(word, str) for word in itertools.islice(itertools.chain(*map(_or_empty, sentences)), 1)):
            raise UserError(f"words_column={words} of the {split} split contains {dataset.features[words]}, not words.")
        empty = [
            row for row, sentence in enumerate(sentences) if not any((word or "").strip() for word in sentence or [])
        ]
        if empty and not drop_empty:
            raise UserError(
                f"The {split} split has {len(empty)} examples without words in {words}: {rows_in_words(empty)}. Remove them, or "
                "give --drop_empty true."
            )
        pairs = enumerate(zip(sentences, labels, strict=True))
        uneven = [row for row, (a, b) in pairs if len(_or_empty(a)) != len(_or_empty(b)) or None in _or_empty(b)]
        uneven = sorted(set(uneven) - set(empty))
        if uneven:
            raise UserError(
                f"The {split} split has {len(uneven)} examples with a different number of {tags} and {words}: "
                f"{rows_in_words(uneven)}. Correct or remove these rows."
            )
        if empty:
            tell([f"{len(empty)} examples of {split} without words are dropped: {rows_in_words(empty)}"])
            dataset = dataset.select(sorted(set(range(len(dataset))) - set(empty)))
        checked[split] = dataset
    return checked


def tag_labels(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    """
    Convert the tags of every split to indices, and return their names.

    Raises:
        UserError: If tags are not classes, or do not occur in the training split.
    """
    inner = getattr(splits["train"].features[name], "feature", None)
    if isinstance(inner, ClassLabel):
        if args.class_names and len(args.class_names) != inner.num_classes:
            raise UserError(
                f"class_names has {len(args.class_names)} names, but {name} has {inner.num_classes} tags; give one for each."
            )
        names = args.class_names or list(inner.names)
        for split, dataset in splits.items():
            values = np.fromiter(itertools.chain(*column_of_lists(dataset, name)), dtype=int)
            if len(values) and (values.min() < 0 or values.max() >= len(names)):
                raise UserError(
                    f"The {split} split has words without a tag in {name} (outside 0 to {len(names) - 1}); choose a split "
                    f"with tags with --{split}_split."
                )
        return splits, names
    found = sorted(
        set(itertools.chain(*column_of_lists(splits["train"], name))), key=lambda tag: (isinstance(tag, str), tag)
    )
    if any(isinstance(tag, float) for tag in found) or len(found) > MAX_CLASSES_FOUND:
        raise UserError(
            f"{name} has {len(found)} different values such as {found[0]!r}, which are not tags; name another column."
        )
    names = args.class_names or [str(tag) for tag in found]
    number = {tag: index for index, tag in enumerate(names)}
    if args.class_names and not set(map(str, found)) <= set(names):  # indices into class_names
        if not all(isinstance(tag, int) and 0 <= tag < len(names) for tag in found):
            missing = next(str(tag) for tag in found if str(tag) not in number)
            raise UserError(f"{name} has the tag {missing!r}, which is not one of class_names: {', '.join(names)}.")
        number = {str(index): index for index in range(len(names))}
    encoded = {}
    for split, dataset in splits.items():
        rows = column_of_lists(dataset, name)
        unknown = sorted({str(tag) for tag in itertools.chain(*rows)} - set(number))
        if unknown:
            raise UserError(f"The {split} split has {unknown[0]!r} in {name}, which is not a tag of the train split.")
        values = [[number[str(tag)] for tag in row] for row in rows]
        encoded[split] = replace_column(dataset, name, values, List(ClassLabel(names=names)))
    return encoded, names


def tags(splits: Splits, name: str, names: Sequence[str]) -> list[str]:
    """Describe how often each tag occurs in the training split; a warning (starting with `!`) for those that never do."""
    counts = Counter(itertools.chain(*column_of_lists(splits["train"], name)))
    total, most = sum(counts.values()), counts.most_common(MAX_LISTED)
    listed = ", ".join(f"{names[tag]} {count:,}" for tag, count in most)
    more = f" and {len(counts) - len(most)} more down to {min(counts.values()):,}" if len(counts) > len(most) else ""
    lines = [f"{len(names)} tags of {total:,} words in train: {listed}{more}; always predicting {names[most[0][0]]} gives "
             f"{100 * most[0][1] / total:.1f} % accuracy"]  # fmt: skip
    absent = [names[tag] for tag in range(len(names)) if tag not in counts]
    if absent:
        lines.append(
            f"!Tags without a training example: {', '.join(absent[:MAX_LISTED])}. The model cannot learn them."
        )
    return lines


def cut_sentences(splits: Splits, words: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Describe how many sentences `max_length` cuts; the words cut off are neither trained on nor evaluated."""
    lines = []
    for split in ("train", "test"):
        dataset = splits[split]
        rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_MEASURED)).astype(int))
        sentences = dataset.select(rows)[words]
        encoded = tokenizer(list(sentences), is_split_into_words=True, truncation=False, verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        cut = lengths > max_length
        if cut.any():
            line = f"max_length={max_length} cuts {100 * cut.mean():.1f} % of the {split} sentences; the longest has "
            lines.append(
                f"!{line}{lengths.max()} tokens. Words beyond it are neither trained on nor evaluated: give a larger --max_length."
            )
        elif split == "train":
            lines.append(f"no sentence is longer than max_length={max_length}; the longest has {lengths.max()} tokens")
    return lines


def continuing_tags(names: Sequence[str]) -> list[int]:
    """Map each tag to that of a word's later tokens: I-X if the word begins an entity X, otherwise the same."""
    number = {name: index for index, name in enumerate(names)}
    return [number.get(f"I-{name[2:]}", index) if name.startswith("B-") else index for name, index in number.items()]


def align(word_ids: Sequence[int | None], labels: Sequence[int], continuing: Sequence[int] | None = None) -> list[int]:
    """
    Assign a label to each token: the first token of a word gets the word's label, special tokens get -100. Later tokens
    of a word get -100 too, or the entry of `continuing` for the word's label if it is given.
    """
    found, before = [], None
    for word in word_ids:
        if word is None:
            found.append(-100)
        elif word != before:
            found.append(labels[word])
        else:
            found.append(-100 if continuing is None else continuing[labels[word]])
        before = word
    return found


def tokenize_words(
    dataset: Dataset,
    words: str,
    tags: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    continuing: Sequence[int] | None = None,
) -> Any:
    """
    Tokenize a split and add `labels`, see `align`.

    Raises:
        UserError: If no token is left of a sentence.
    """

    def encode(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        encoded = tokenizer(rows[words], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = [align(encoded.word_ids(row), rows[tags][row], continuing) for row in range(len(indices))]
        lost = [index for index, row in zip(indices, labels, strict=True) if all(label == -100 for label in row)]
        if lost:
            raise UserError(
                f"The tokenizer yields no token for the words of {rows_in_words(lost)} within max_length={max_length}: remove "
                "these rows, or give a larger --max_length."
            )
        return {**encoded, "labels": labels}

    return dataset.map(encode, batched=True, with_indices=True, remove_columns=dataset.column_names, desc="tokenizing")


def _or_empty(values: list | None) -> list:
    return values or []
