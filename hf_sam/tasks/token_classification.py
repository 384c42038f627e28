"""Fine-tune a token classifier with sharpness-aware minimization: named entities or parts of speech.

    hf-sam token-classification conll2003 --sam_rho 0.01

The data are sentences, split into words with one tag each. `--sam_rho 0` is the baseline with the same configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from hf_sam import SAMTrainer

from . import text_metrics
from .command_line.arguments import SAMArguments, parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments, RunArguments, option
from .data.loading import Splits, load_splits, make_splits, pick_column, public_name
from .data.summary import sizes, tell
from .data.words import check_sentences, continuing_tags, cut_sentences, tag_labels, tags, tokenize_words
from .metrics import hub_metrics
from .models import check_max_length, load_config, load_model, load_tokenizer
from .per_token import LossPerToken
from .running import check_training_arguments, finish, prepare, recorded, save, train, write_card

METRICS = (*text_metrics.ENTITIES, *text_metrics.TAGS)  # on the test split


@dataclass
class WordArguments:
    """The words, and which of their tokens are labelled."""

    words_column: str | None = option(None, "Column of the words, one list per sentence; default: detected.")
    label_all_tokens: bool = option(False, "Train on every token of a word; otherwise only on its first.")
    max_length: int = option(256, "Maximum number of tokens of a sentence; the rest is cut off.")
    drop_empty: bool = option(False, "Drop examples without words; otherwise they are an error.")


ARGUMENTS = (ModelArguments, DataArguments, WordArguments, RunArguments, SAMArguments, TrainingArguments)


class TokenTrainer(LossPerToken, SAMTrainer):
    """`SAMTrainer` with a loss that weights all labelled tokens of an optimizer step equally."""


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> TokenTrainer:
    """
    Train, evaluate and save.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer.
    """
    model_args, data_args, word_args, run_args, sam_args, args = parse_arguments(ARGUMENTS, argv)
    sam_config = prepare(args, run_args, sam_args, model_args)

    with args.main_process_first(desc="reading the data"):
        splits, words, label_column, names = read_data(data_args, word_args)
    check_training_arguments(args, data_args, run_args, "validation" in splits, METRICS)

    tokenizer = load_word_tokenizer(model_args)
    vocabulary = {"vocab_size": len(tokenizer)} if model_args.model_type else {}
    config = load_config(model_args, labels=names, pad_token_id=tokenizer.pad_token_id, **vocabulary)
    check_max_length(word_args.max_length, config)
    if args.process_index == 0:
        cut = cut_sentences(splits, words, tokenizer, word_args.max_length)
        tell([*sizes(splits), *tags(splits, label_column, names), *cut])
    model = load_model(AutoModelForTokenClassification, model_args, config)

    with args.main_process_first(desc="tokenizing"):
        tokens = tokenize_splits(splits, words, label_column, tokenizer, word_args.max_length)
        if word_args.label_all_tokens:
            continuing = continuing_tags(names)
            tokens["train"] = tokenize_words(
                splits["train"], words, label_column, tokenizer, word_args.max_length, continuing
            )
    trainer = TokenTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=partial(text_metrics.tag_metrics, names=names, hub=hub_metrics(run_args.hub_metrics)),
        sam_config=sam_config,
    )
    with recorded(trainer, splits, data_args, run_args, model=model_args, words=word_args) as record:
        train(trainer)
        finish(trainer, record, tokens, run_args, text_metrics.tag_table)
    save(trainer)
    write_card(trainer, dataset=[public_name(data_args)], tasks=["token-classification"])
    return trainer


def read_data(data_args: DataArguments, word_args: WordArguments) -> tuple[Splits, str, str, list[str]]:
    """Read the splits, the columns of words and tags, and the names of the tags."""
    for name in ("label_noise", "train_samples_per_class"):
        if getattr(data_args, name):
            raise UserError(f"{name} needs one class per example, but here every word has a tag; leave it out.")
    if data_args.streaming:
        raise UserError(
            "streaming does not work with tagged words, whose tags are counted and checked first; leave it out."
        )
    splits = load_splits(data_args)
    words = pick_column(splits, word_args.words_column, ("tokens", "words"), "words_column")
    usual = ("ner_tags", "pos_tags", "tags", "labels", "ner", "upos")
    label_column = pick_column(splits, data_args.label_column, usual, "label_column", taken=[words])
    splits = check_sentences(splits, words, label_column, word_args.drop_empty)
    splits, names = tag_labels(splits, label_column, data_args)
    if len(names) < 2:
        raise UserError(f"{label_column} has only the tag {names[0]}; a classifier needs at least two.")
    return make_splits(splits, data_args, strata=None), words, label_column, names


def load_word_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """
    Load the model's tokenizer, and check that it accepts words.

    Raises:
        UserError: If it cannot align tokens with words.
    """
    tokenizer = load_tokenizer(model_args)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"{kind} does not align tokens with words; choose a model with a fast tokenizer.")
    with as_user_error(ValueError, AssertionError, prefix=f"{type(tokenizer).__name__} does not accept words: "):
        tokenizer(["a", "b"], is_split_into_words=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def tokenize_splits(
    splits: Splits, words: str, label_column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Splits:
    """Tokenize all splits, each word's label at its first token; `train_split` is the training data for evaluation."""
    found = {name: tokenize_words(split, words, label_column, tokenizer, max_length) for name, split in splits.items()}
    return {**found, "train_split": found["train"]}
