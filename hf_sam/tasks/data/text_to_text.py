"""Text-to-text data: sources with a prefix; targets that are texts, class words or numbers; GLUE in the form of T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..command_line.errors import UserError
from .loading import Split, Splits, column_names
from .texts import GLUE, GLUE_HUB_ID

CLASSIFICATION, REGRESSION = "classification", "regression"
SUMMARIZATION, TRANSLATION, TEXT = "summarization", "translation", "text"
SUPERGLUE_HUB_ID = "aps/super_glue"
SOURCE, TARGET, LABEL = "source", "target", "label"  # columns returned by `as_text`


@dataclass(frozen=True)
class NamedTask:
    """
    A GLUE or SuperGLUE task as text, in the form of T5 (Raffel et al. 2020, appendix D): its name, then each column's
    name and text. The words for the classes are in the order of their indices.
    """

    hub_id: str
    columns: tuple[str, ...]
    words: tuple[str, ...]
    test_split: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")
_TRUTH = ("False", "True")
_WORDS = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": _ENTAILMENT,
    "qqp": ("not_duplicate", "duplicate"),
    "rte": _ENTAILMENT,
    "sst2": ("negative", "positive"),
    "stsb": (),  # a number
    "wnli": ("not_entailment", "entailment"),
}
NAMED_TASKS = {
    **{
        name: NamedTask(GLUE_HUB_ID, tuple(sorted(GLUE[name].texts)), words, GLUE[name].test_split)
        for name, words in _WORDS.items()
    },
    # ReCoRD and WSC are left out because T5 writes an entity, not a class; AX has no training split.
    "boolq": NamedTask(SUPERGLUE_HUB_ID, ("passage", "question"), _TRUTH),
    "cb": NamedTask(SUPERGLUE_HUB_ID, ("hypothesis", "premise"), ("entailment", "contradiction", "neutral")),
    "copa": NamedTask(SUPERGLUE_HUB_ID, ("choice1", "choice2", "premise", "question"), ("choice1", "choice2")),
    "multirc": NamedTask(SUPERGLUE_HUB_ID, ("question", "answer", "paragraph"), _TRUTH),
    "wic": NamedTask(SUPERGLUE_HUB_ID, ("sentence1", "sentence2", "word"), _TRUTH),
}


def as_text(
    splits: Splits,
    columns: Sequence[str],
    prefix: str,
    is_labelled: bool,
    target: Callable[[dict[str, Any]], str],
    label_column: str | None = None,
) -> Splits:
    """
    Convert the splits to columns `source` and `target`, and for classes `label` (and its `clean_...` under noise).

    Args:
        splits (`dict`): The splits.
        columns (`Sequence[str]`): The columns of the texts, in order.
        prefix (`str`): Put before each source.
        is_labelled (`bool`): Whether to put the column's name before each text, as T5 does.
        target (`Callable`): Maps a row to its target.
        label_column (`str`, *optional*): The column of the class indices.
    """  # fmt: skip

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        texts = [f"{name}: {row[name] or ''}" if is_labelled else (row[name] or "") for name in columns]
        label = {} if label_column is None else {LABEL: row[label_column]}
        return {SOURCE: prefix + " ".join(texts), TARGET: target(row), **label}

    return {split: _map(dataset, convert) for split, dataset in splits.items()}


def _map(dataset: Split, convert: Callable) -> Split:
    options = {"desc": "converting to text"} if isinstance(dataset, Dataset) else {}
    dropped = [name for name in column_names(dataset) if not name.startswith("clean_")]
    return dataset.map(convert, remove_columns=dropped, **options)


def rounded_number(value: float) -> str:
    """Round a score to the nearest 0.2, as T5 does for STS-B."""
    return f"{round(5 * value) / 5:.1f}"


def language_pair(splits: Splits, name: str, source: str | None, target: str | None) -> tuple[str, str]:
    """
    Return the keys of source and target in a column of translations.

    Raises:
        UserError: If they are not given, or the column does not have these languages.
    """
    first = next(iter(splits["train"]))[name]
    known = list(first) if isinstance(first, dict) else []
    for argument, language in (("source_lang", source), ("target_lang", target)):
        if language not in known:
            given = f"{argument}={language} is not one of the languages in {name}" if language else f"Give --{argument}"
            raise UserError(f"{given}: {', '.join(known)}.")
    if source == target:
        raise UserError(f"source_lang and target_lang are both {source}; name two languages.")
    return source, target


def split_translations(splits: Splits, name: str, languages: tuple[str, str]) -> Splits:
    """Split a column of translations into the columns `text` and `target`."""

    def divide(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row[name][languages[0]], "target": row[name][languages[1]]}

    return {split: dataset.map(divide, remove_columns=column_names(dataset)) for split, dataset in splits.items()}


def tokenize_pairs(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, max_target_length: int
) -> dict[str, Any]:
    """Tokenize sources and targets (`labels`), cut at the given lengths; each target ends in EOS."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows[SOURCE], truncation=True, max_length=max_length)
        targets = tokenizer(text_target=rows[TARGET], truncation=True, max_length=max_target_length)["input_ids"]
        return {**encoded, "labels": [with_end(tokens, tokenizer, max_target_length) for tokens in targets]}

    found = {}
    for split, dataset in splits.items():
        options = {"desc": "tokenizing"} if isinstance(dataset, Dataset) else {}
        found[split] = dataset.map(encode, batched=True, remove_columns=column_names(dataset), **options)
    return found


def with_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Append the end-of-sequence token, unless the tokenizer has already added it."""
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        return tokens
    return [*tokens[: max_length - 1], tokenizer.eos_token_id]
