"""Fine-tune a causal language model, fully or with LoRA, with sharpness-aware minimization.

    hf-sam causal-lm smollm2_lora --dataset DATA --sam_rho 0.05

Texts, prompts with completions and conversations are trained on with TRL's `SFTTrainer` (packing, completion-only loss,
chat templates); `--trainer plain` uses transformers' Trainer, for texts only. `--sam_rho 0` is the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sam import SAMTrainer, SAMTrainerMixin

from .command_line.arguments import SAMArguments, parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments, RunArguments, option
from .data.language import COMPLETION, CONVERSATION, TokenWeightedEvaluation, pick_format, tokenize_texts
from .data.loading import Splits, load_splits, make_splits, public_name
from .data.summary import sizes, tell, truncation
from .metrics import LANGUAGE, hub_metrics, perplexity_metrics
from .models import check_max_length, load_config, load_model, load_tokenizer
from .running import check_training_arguments, finish, perplexity_table, prepare, recorded, save, train, write_card

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:  # the plain Trainer does not need TRL
    SFTConfig, SFTTrainer = TrainingArguments, None

METRICS = LANGUAGE  # of the test split
TRAINERS = ("sft", "plain")


@dataclass
class LanguageArguments:
    """The texts, and the trainer."""

    trainer: str = option("sft", "sft (TRL's SFTTrainer) or plain (transformers' Trainer).")
    text_column: str | None = option(None, "Column of the texts; default: messages, prompt + completion, or text.")
    max_length: int = option(1024, "Tokens at which examples are cut, or to which they are packed.")
    drop_empty: bool = option(False, "Drop empty examples instead of reporting an error.")

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer={self.trainer} is unknown. Allowed: {', '.join(TRAINERS)}.")
        if self.trainer == "sft" and SFTTrainer is None:
            raise ValueError("trainer=sft needs TRL: pip install 'hf-sam[trl]', or give --trainer plain.")


class PlainTrainer(TokenWeightedEvaluation, SAMTrainer):
    """transformers' own Trainer."""


if SFTTrainer is not None:

    class SAMSFTTrainer(TokenWeightedEvaluation, SAMTrainerMixin, SFTTrainer):
        """TRL's trainer with the sharpness-aware update."""


ARGUMENTS = (ModelArguments, DataArguments, LanguageArguments, RunArguments, SAMArguments, SFTConfig)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """
    Train, evaluate and save.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer.
    """
    model_args, data_args, lm_args, run_args, sam_args, args = parse_arguments(ARGUMENTS, argv)
    sam_config = prepare(args, run_args, sam_args, model_args)

    with args.main_process_first(desc="reading the data"):
        splits, columns = read_data(data_args, lm_args)
    check_training_arguments(args, data_args, run_args, "validation" in splits, METRICS)

    tokenizer = load_tokenizer(model_args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    vocabulary = {"vocab_size": len(tokenizer)} if model_args.model_type else {}
    config = load_config(model_args, **vocabulary)
    check_max_length(lm_args.max_length, config)
    model = load_model(AutoModelForCausalLM, model_args, config)
    if args.process_index == 0:
        is_cut = columns != CONVERSATION and not getattr(args, "packing", False)
        measured = truncation(splits, columns, tokenizer, lm_args.max_length) if is_cut else []
        tell([*sizes(splits), *measured])

    common = {
        "model": model,
        "args": args,
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
        "compute_metrics": partial(perplexity_metrics, hub=hub_metrics(run_args.hub_metrics)),
        "sam_config": sam_config,
    }
    if lm_args.trainer == "plain":
        trainer, tokens = plain_trainer(common, splits, columns[0], lm_args.max_length, data_args)
    else:
        trainer, tokens = sft_trainer(common, splits, columns, data_args, run_args)
    with recorded(trainer, splits, data_args, run_args, model=model_args, texts=lm_args) as record:
        train(trainer)
        finish(trainer, record, tokens, run_args, perplexity_table)
    save(trainer)
    name = "dataset" if lm_args.trainer == "plain" else "dataset_name"
    write_card(trainer, **{name: public_name(data_args)})
    return trainer


def read_data(data_args: DataArguments, lm_args: LanguageArguments) -> tuple[Splits, tuple[str, ...]]:
    """Read the splits, and find the columns that make up an example."""
    for name in ("label_noise", "train_samples_per_class", "label_column", "class_names"):
        if getattr(data_args, name):
            raise UserError(f"{name} needs labels, which the data of a language model do not have; leave it out.")
    splits, columns = pick_format(load_splits(data_args), lm_args.text_column, lm_args.drop_empty)
    if lm_args.trainer == "plain" and columns in (CONVERSATION, COMPLETION):
        raise UserError(f"trainer=plain takes texts, not {' + '.join(columns)}: give --trainer sft.")
    return make_splits(splits, data_args, strata=None), columns


def plain_trainer(
    common: dict[str, Any], splits: Splits, text_column: str, max_length: int, data_args: DataArguments
) -> tuple[Trainer, Splits]:
    """Make transformers' Trainer and tokenize the splits; `common` are the arguments of both trainers."""
    args, tokenizer = common["args"], common["processing_class"]
    with args.main_process_first(desc="tokenizing"):
        tokens = tokenize_texts(splits, text_column, tokenizer, max_length, getattr(args, "packing", False))
    tokens["train_split"] = tokens["train"]
    if data_args.streaming:
        tokens["train"] = tokens["train"].shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
    trainer = PlainTrainer(
        **common,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return trainer, tokens


def sft_trainer(
    common: dict[str, Any], splits: Splits, columns: tuple[str, ...], data_args: DataArguments, run_args: RunArguments
) -> tuple[Trainer, Splits]:
    """Make TRL's trainer; also return the splits as it tokenized them. Evaluation data are never packed."""
    args, tokenizer = common["args"], common["processing_class"]
    if columns == CONVERSATION and tokenizer.chat_template is None and args.chat_template_path is None:
        raise UserError(
            "Conversations need a chat template, which this tokenizer does not have: give --chat_template_path."
        )
    if columns not in (CONVERSATION, COMPLETION):
        args.dataset_text_field = columns[0]
    args.eval_packing = False
    train_split = splits["train"]
    if data_args.streaming:
        train_split = train_split.shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
    held_out = {name: split for name, split in splits.items() if name != "train"}
    if run_args.evaluate_train:
        held_out["train_split"] = splits["train"]
    with as_user_error(ValueError):
        trainer = SAMSFTTrainer(**common, train_dataset=train_split, eval_dataset=held_out)
    tokens = trainer.eval_dataset
    trainer.eval_dataset = tokens.get("validation")
    return trainer, tokens
