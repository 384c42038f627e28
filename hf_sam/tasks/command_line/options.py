"""The arguments that all recipes share besides `TrainingArguments` and the SAM fields."""
# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

import json
from dataclasses import dataclass, field


def option(default, help: str):
    """Return a dataclass field with its `--help` text."""
    return field(default=default, metadata={"help": help})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class ModelArguments:
    """The model: a checkpoint (`model_name_or_path`), or one from scratch (`model_type` and `config_overrides`)."""

    model_name_or_path: str | None = option(None, "Hub id or local folder of the model to fine-tune.")
    model_type: str | None = option(None, "Architecture to train from scratch instead, such as vit or gpt2.")
    config_overrides: dict | str | None = option(None, "JSON object of model configuration values to override.")
    tokenizer_name: str | None = option(
        None, "Hub id or local folder of the tokenizer, or bytes (UTF-8 bytes); default: that of the model."
    )
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run Python code shipped with the model. Only for sources you trust.")
    attn_implementation: str | None = option(None, "Attention implementation: eager, sdpa, flash_attention_2, ...")
    lora_r: int = option(0, "Rank of LoRA adapters; 0 trains the whole model.")
    lora_alpha: int = option(16, "Scale of LoRA: its output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before LoRA's first matrix.")
    lora_target_modules: list[str] | None = option(None, "Modules that get LoRA; default: chosen by PEFT.")

    def __post_init__(self):
        _check(
            (self.model_name_or_path is None) != (self.model_type is None),
            "Give exactly one of model_name_or_path (fine-tune) and model_type (from scratch).",
        )
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except json.JSONDecodeError as error:
                raise ValueError(f"config_overrides={self.config_overrides!r} is not valid JSON: {error}.") from None
        self.config_overrides = self.config_overrides or {}
        _check(
            isinstance(self.config_overrides, dict),
            f'config_overrides={self.config_overrides!r} must be a JSON object such as {{"hidden_size": 64}}.',
        )
        _check(self.lora_r >= 0, f"lora_r={self.lora_r} must be at least 0 (0 trains the whole model).")
        _check(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} must be in [0, 1).")


@dataclass
class DataArguments:
    """The data set, its columns and splits, and label noise."""

    dataset: str | None = option(None, "Hub id; local csv, json or parquet file; local folder; or digits (embedded).")
    dataset_config: str | None = option(None, "Configuration of the data set on the hub.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the data set on the hub.")
    train_split: str = option("train", "Name of the training split.")
    validation_split: str | None = option(None, "Split for evaluation during training; default: none.")
    test_split: str | None = option(None, "Split evaluated once, at the end; default: detected, or split off.")
    test_size: float = option(0.25, "Fraction split off, by class, if the data have no test split.")
    validation_size: float = option(0.0, "Fraction of the training split to use as the validation split.")
    split_seed: int = option(0, "Seed for splitting the data, independent of the training seed.")
    streaming: bool = option(False, "Stream the data during training, without a copy on disk; needs max_steps.")
    shuffle_buffer: int = option(1000, "Size of the shuffle buffer when streaming, in examples.")
    label_column: str | None = option(None, "Column of the labels; default: detected.")
    class_names: list[str] | None = option(None, "Names of the classes in order, if the data do not contain them.")
    csv_encoding: str | None = option(None, "Encoding of csv and tsv files; default: detected.")
    csv_delimiter: str | None = option(None, "Delimiter of csv and tsv files; default: detected.")
    train_samples: int | None = option(None, "Keep this many training examples, drawn by class.")
    train_samples_per_class: int | None = option(None, "Keep this many training examples per class.")
    validation_samples: int | None = option(None, "Evaluate on this many validation examples, drawn by class.")
    test_samples: int | None = option(None, "Evaluate on this many test examples, drawn by class.")
    subset_seed: int = option(0, "Seed for drawing these subsets, independent of the training seed.")
    label_noise: float = option(0.0, "Fraction of the training labels replaced by a random other class.")
    noise_seed: int = option(0, "Seed of the label noise, independent of the training seed.")

    def __post_init__(self):
        for name in ("test_size", "validation_size", "label_noise"):
            low = "(0" if name == "test_size" else "[0"
            value = getattr(self, name)
            inside = 0 < value < 1 if name == "test_size" else 0 <= value < 1
            _check(inside, f"{name}={value} must be a fraction in {low}, 1).")
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
        if self.csv_delimiter is not None:
            self.csv_delimiter = {"\\t": "\t", "tab": "\t"}.get(self.csv_delimiter, self.csv_delimiter)
            _check(len(self.csv_delimiter) == 1, f"csv_delimiter={self.csv_delimiter!r} must be one character, or tab.")
        if self.streaming:
            for name in (
                *("train_samples", "train_samples_per_class", "validation_samples", "test_samples"),
                *("label_noise", "validation_size"),
            ):
                _check(
                    not getattr(self, name),
                    f"{name} needs the whole split and does not work with streaming: leave out one of them.",
                )

    def check_validation_samples(self) -> None:
        """
        Check that there is a validation split to draw samples from. Not a check of `__init__`, because a search adds
        the split later.

        Raises:
            ValueError: If there is none.
        """
        _check(
            not self.validation_samples or bool(self.validation_size or self.validation_split),
            f"validation_samples={self.validation_samples} needs a validation split: give --validation_size 0.1, or "
            f"--validation_split.",
        )


@dataclass
class RunArguments:
    """Output folder, run record and evaluation."""

    overwrite_output_dir: bool = option(False, "Remove earlier checkpoints in output_dir and start again.")
    task: str | None = option(None, "Name of the task in the run record; default: the data set's name.")
    arm: str | None = option(None, "Name of the treatment in the run record; default: method and optimizer.")
    condition: str | None = option(None, "Name of the data condition in the run record, such as clean.")
    budget: str = option("steps", "What is equal between arms, for the run record: steps or passes.")
    phase: str | None = option(None, "Kind of training in run record and model card, if not ordinary: flatten.")
    score_split: str = option("test", "Split that is scored: test, or validation while choosing settings.")
    evaluate_train: bool = option(False, "Also evaluate on the training split, unaugmented, for the train-test gap.")
    hub_metrics: list[str] | None = option(
        None, "Additional metrics from the hub by name, such as accuracy; needs network."
    )

    def __post_init__(self):
        _check(
            self.score_split in ("test", "validation"),
            f"score_split={self.score_split} is unknown. Allowed: test, validation.",
        )
