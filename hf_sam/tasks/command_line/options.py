"""The arguments that every recipe has beside `TrainingArguments` and the SAM fields."""
# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

import json
from dataclasses import dataclass, field


def option(default, help: str):
    """A dataclass field with its `--help` text."""
    return field(default=default, metadata={"help": help})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class ModelArguments:
    """Which model: a checkpoint (`model_name_or_path`), or one from scratch (`model_type` and `config_overrides`)."""

    model_name_or_path: str | None = option(None, "Hub id or local folder of the model to fine-tune.")
    model_type: str | None = option(None, "From scratch instead: the architecture, such as vit or gpt2.")
    config_overrides: dict | str | None = option(None, "JSON object of model configuration values to set.")
    tokenizer_name: str | None = option(None, "Hub id or local folder of the tokenizer, where it is not the model's.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Only for sources you trust.")
    attn_implementation: str | None = option(None, "Attention kernel: eager, sdpa, flash_attention_2, ...")
    lora_r: int = option(0, "Rank of LoRA adapters; 0 trains the whole model.")
    lora_alpha: int = option(16, "Scale of LoRA: its output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before LoRA's first matrix.")
    lora_target_modules: list[str] | None = option(None, "Modules that get LoRA; PEFT's own choice when left out.")

    def __post_init__(self):
        _check(
            (self.model_name_or_path is None) != (self.model_type is None),
            "Give exactly one of model_name_or_path (fine-tune) and model_type (from scratch).",
        )
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except json.JSONDecodeError as error:
                raise ValueError(f"config_overrides={self.config_overrides!r} is no JSON: {error}.") from None
        self.config_overrides = self.config_overrides or {}
        _check(
            isinstance(self.config_overrides, dict),
            f'config_overrides={self.config_overrides!r} must be a JSON object such as {{"hidden_size": 64}}.',
        )
        _check(self.lora_r >= 0, f"lora_r={self.lora_r} must be at least 0 (0 trains the whole model).")
        _check(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} must be in [0, 1).")


@dataclass
class DataArguments:
    """Which data, which columns and splits, and what is done to the training labels."""

    dataset: str | None = option(None, "Hub id; local csv, json or parquet file; local folder; or digits (embedded).")
    dataset_config: str | None = option(None, "Configuration of the data set on the hub.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the data set on the hub.")
    train_split: str = option("train", "Name of the training split.")
    validation_split: str | None = option(None, "Split for evaluation during training; none when left out.")
    test_split: str | None = option(None, "Split that is read once, at the end. Found when left out, else made.")
    test_size: float = option(0.25, "Where there is no test split: the share that is split off, by class.")
    validation_size: float = option(0.0, "Share of the training split that becomes the validation split.")
    split_seed: int = option(0, "Seed of the splits made here, apart from the training seed.")
    streaming: bool = option(False, "Read the data while training, without a copy on disk; needs max_steps.")
    shuffle_buffer: int = option(1000, "Examples that streaming shuffles among.")
    label_column: str | None = option(None, "Column of the labels. Found when left out.")
    class_names: list[str] | None = option(None, "Names of the classes in order, where the data do not say.")
    csv_encoding: str | None = option(None, "Encoding of csv and tsv files; found when left out.")
    csv_delimiter: str | None = option(None, "Between two values of a csv or tsv file; found when left out.")
    train_samples: int | None = option(None, "Keep this many training examples, drawn by class.")
    train_samples_per_class: int | None = option(None, "Keep this many training examples of every class.")
    validation_samples: int | None = option(None, "Evaluate on this many validation examples, drawn by class.")
    test_samples: int | None = option(None, "Evaluate on this many test examples, drawn by class.")
    subset_seed: int = option(0, "Seed of what is kept, apart from the training seed.")
    label_noise: float = option(0.0, "Share of the training labels replaced by another class, drawn uniformly.")
    noise_seed: int = option(0, "Seed of the label noise, apart from the training seed.")

    def __post_init__(self):
        for name in ("test_size", "validation_size", "label_noise"):
            low = "(0" if name == "test_size" else "[0"
            value = getattr(self, name)
            inside = 0 < value < 1 if name == "test_size" else 0 <= value < 1
            _check(inside, f"{name}={value} must be a share in {low}, 1).")
        for name in ("train_samples", "train_samples_per_class", "validation_samples", "test_samples"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name}={value} must be at least 1.")
        _check(
            self.train_samples is None or self.train_samples_per_class is None,
            "Give train_samples or train_samples_per_class, not both.",
        )
        _check(
            not (self.validation_size and self.validation_split),
            "Give validation_split or validation_size, not both.",
        )
        _check(
            not self.validation_samples or bool(self.validation_size or self.validation_split),
            f"validation_samples={self.validation_samples} needs a validation split: give --validation_size 0.1, or "
            f"--validation_split.",
        )
        if self.csv_delimiter is not None:
            self.csv_delimiter = {"\\t": "\t", "tab": "\t"}.get(self.csv_delimiter, self.csv_delimiter)
            _check(len(self.csv_delimiter) == 1, f"csv_delimiter={self.csv_delimiter!r} must be one character, or tab.")
        if self.streaming:
            for name in (
                *("train_samples", "train_samples_per_class", "validation_samples", "test_samples"),
                *("label_noise", "validation_size"),
            ):
                _check(
                    not getattr(self, name), f"{name} needs the whole split at hand: leave it out, or streaming off."
                )


@dataclass
class RunArguments:
    """What is done beside training."""

    overwrite_output_dir: bool = option(False, "Remove earlier checkpoints in output_dir and start anew.")
    task: str | None = option(None, "What the run record calls the task; the data set's name when left out.")
    arm: str | None = option(None, "What the run record calls the treatment; method and optimizer when left out.")
    condition: str | None = option(None, "What the run record calls the state of the data, such as clean.")
    budget: str = option("steps", "What the run record says is equal between arms: steps or passes.")
    phase: str | None = option(None, "What record and card call this training, where it is no ordinary one: flatten.")
    score_split: str = option("test", "Split that the record is about: test, or validation while settings are chosen.")
    evaluate_train: bool = option(False, "Evaluate on the training split too, unaugmented, for the train-test gap.")
    hub_metrics: list[str] | None = option(None, "More metrics of the hub by name, such as accuracy; needs network.")

    def __post_init__(self):
        _check(
            self.score_split in ("test", "validation"),
            f"score_split={self.score_split} is unknown. Allowed: test, validation.",
        )
