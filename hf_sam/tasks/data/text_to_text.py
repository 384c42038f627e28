"""Everything as text: sources with a prefix, targets that are texts, words for classes, or numbers; GLUE as T5 reads it."""

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
SOURCE, TARGET, LABEL = "source", "target", "label"  # columns of what `as_text` returns


@dataclass(frozen=True)
class NamedTask:
    """
    A task of GLUE or SuperGLUE as text, in the form of T5 (Raffel et al. 2020, appendix D): its name, then each column's
    name and text; the words of the classes in the order of their numbers.
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
    # ReCoRD and WSC, in which T5 writes an entity, are not classes and left out; AX has no training split.
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
    The splits as columns `source` and `target`, and for classes `label`, beside their `clean_...` under noise.

    Args:
        splits (`dict`): With the columns.
        columns (`Sequence[str]`): Of the texts, in order.
        prefix (`str`): What a source begins with.
        is_labelled (`bool`): Whether each text follows its column's name, as T5 has it.
        target (`Callable`): From a row to its target.
        label_column (`str`, *optional*): Of the class numbers.
    """  # fmt: skip

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        texts = [f"{name}: {row[name] or ''}" if is_labelled else (row[name] or "") for name in columns]
        label = {} if label_column is None else {LABEL: row[label_column]}
        return {SOURCE: prefix + " ".join(texts), TARGET: target(row), **label}

    return {split: _map(dataset, convert) for split, dataset in splits.items()}


def _map(dataset: Split, convert: Callable) -> Split:
    options = {"desc": "writing as text"} if isinstance(dataset, Dataset) else {}
    dropped = [name for name in column_names(dataset) if not name.startswith("clean_")]
    return dataset.map(convert, remove_columns=dropped, **options)


def rounded_number(value: float) -> str:
    """A score to the nearest 0.2, as T5 writes those of STS-B."""
    return f"{round(5 * value) / 5:.1f}"


def language_pair(splits: Splits, name: str, source: str | None, target: str | None) -> tuple[str, str]:
    """
    The keys of a column of translations for source and target.

    Raises:
        UserError: They are not given, or the column has no such languages.
    """
    first = next(iter(splits["train"]))[name]
    known = list(first) if isinstance(first, dict) else []
    for argument, language in (("source_lang", source), ("target_lang", target)):
        if language not in known:
            given = f"{argument}={language} is none of the languages in {name}" if language else f"Give --{argument}"
            raise UserError(f"{given}: {', '.join(known)}.")
    if source == target:
        raise UserError(f"source_lang and target_lang are both {source}; name two languages.")
    return source, target


def split_translations(splits: Splits, name: str, languages: tuple[str, str]) -> Splits:
    """The splits with the two languages of a column of translations as columns of their own, `text` and `target`."""

    def divide(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row[name][languages[0]], "target": row[name][languages[1]]}

    return {split: dataset.map(divide, remove_columns=column_names(dataset)) for split, dataset in splits.items()}


def tokenize_pairs(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, max_target_length: int
) -> dict[str, Any]:
    """The splits as the tokenizer's columns and `labels`, each target with its end, cut at so many tokens."""

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
    """The tokens with the end-of-sequence token, which some tokenizers add themselves."""
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        return tokens
    return [*tokens[: max_length - 1], tokenizer.eos_token_id]
