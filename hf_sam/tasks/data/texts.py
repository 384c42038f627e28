"""Tokenize texts, and define the GLUE tasks by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..command_line.errors import UserError
from .loading import Split, Splits, column, column_names
from .summary import how_many, rows_in_words, tell


@dataclass(frozen=True)
class GlueTask:
    """Columns and splits of a GLUE task; GLUE's own test splits have no labels."""

    texts: tuple[str, ...]
    test_split: str = "validation"


GLUE = {
    "cola": GlueTask(("sentence",)),
    "mnli": GlueTask(("premise", "hypothesis"), "validation_matched"),
    "mrpc": GlueTask(("sentence1", "sentence2")),
    "qnli": GlueTask(("question", "sentence")),
    "qqp": GlueTask(("question1", "question2")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "sst2": GlueTask(("sentence",)),
    "stsb": GlueTask(("sentence1", "sentence2")),
    "wnli": GlueTask(("sentence1", "sentence2")),
}
GLUE_HUB_ID = "nyu-mll/glue"


def check_texts(splits: Splits, names: Sequence[str], drop_empty: bool) -> Splits:
    """
    Check that every example has a text in at least one of the columns `names`.

    Args:
        splits (`dict`): The splits; for a streamed one only the type of the column is checked.
        names (`Sequence[str]`): One column, or two for text pairs.
        drop_empty (`bool`): Drop examples without a text instead of raising.

    Raises:
        UserError: If a column is not text, or an example has no text.
    """
    checked = {}
    for split, dataset in splits.items():
        for name in names:
            feature = (dataset.features or {}).get(name)
            if type(feature).__name__ == "Json":  # what `datasets` makes of values of several types
                raise UserError(
                    f"text_column={name} of the {split} split contains values of several types, such as texts and numbers; "
                    f'write all of them as texts in the file, 1984 as "1984", or name another column.'
                )
            if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
                raise UserError(
                    f"text_column={name} of the {split} split contains {feature}, not text; name another column."
                )
        if isinstance(dataset, Dataset):
            rows = zip(*(column(dataset, name).tolist() for name in names), strict=True)
            empty = [index for index, texts in enumerate(rows) if not any((text or "").strip() for text in texts)]
            dataset = _without(empty, dataset, f"text in {', '.join(names)}", split, drop_empty)
        checked[split] = dataset
    return checked


def check_labelled(splits: Splits, name: str, drop_empty: bool) -> Splits:
    """
    Check that every example has a label in the column `name`.

    Args:
        splits (`dict`): The splits; a streamed one is not checked.
        name (`str`): The label column.
        drop_empty (`bool`): Drop examples without a label instead of raising.

    Raises:
        UserError: If an example has no label.
    """
    checked = dict(splits)
    for split, dataset in splits.items():
        if isinstance(dataset, Dataset):
            values = dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist()
            empty = [
                index for index, value in enumerate(values) if value is None or value != value
            ]  # NaN is not itself
            checked[split] = _without(empty, dataset, f"a label in {name}", split, drop_empty)
    return checked


def _without(rows: list[int], dataset: Dataset, missing: str, split: str, drop_empty: bool) -> Dataset:
    if not rows:
        return dataset
    if not drop_empty:
        raise UserError(
            f"The {split} split has {how_many(rows, 'example')} without {missing}: {rows_in_words(rows)}. Remove them, or "
            "give --drop_empty true."
        )
    tell([f"{how_many(rows, 'example')} without {missing} dropped from {split}: {rows_in_words(rows)}"])
    return dataset.select(sorted(set(range(len(dataset))).difference(rows)))


def tokenize(
    splits: Splits, names: Sequence[str], label_column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Tokenize the splits and add `labels`; texts, or text pairs, are cut at `max_length` tokens."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [[text or "" for text in rows[name]] for name in names]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": rows[label_column]}

    return {split: _map(dataset, encode) for split, dataset in splits.items()}


def _map(dataset: Split, encode) -> Split:
    options = {"desc": "tokenizing"} if isinstance(dataset, Dataset) else {}
    return dataset.map(encode, batched=True, remove_columns=column_names(dataset), **options)
