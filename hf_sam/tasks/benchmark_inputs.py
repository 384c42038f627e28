"""The model and the data of a benchmark: real data as in the other recipes, or synthetic data in the model's shapes."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from .command_line.options import DataArguments, ModelArguments, option
from .models import check_image_size, check_max_length, load_config, load_image_processor, load_model, load_tokenizer

if TYPE_CHECKING:  # needed for real data only
    from .data.loading import Splits

CLASSES = [str(number) for number in range(10)]  # of synthetic data

# Sizes of models from scratch: hidden size, layers, heads; the feed-forward part is four times as wide.
SIZES: dict[str, tuple[int, int, int]] = {
    "2M": (192, 4, 3),
    "7M": (384, 4, 6),
    "22M": (384, 12, 6),
    "85M": (768, 12, 12),
    "135M": (896, 14, 14),
}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a trainer: a model, a training set and a data collator."""

    model: PreTrainedModel
    dataset: Any
    collator: Callable


@dataclass
class MadeUpArguments:
    """The shape of synthetic examples."""

    image_size: int | None = option(None, "Side in pixels; default: that of the model.")
    max_length: int | None = option(None, "Tokens per example; default: 128, or 1024 for language models.")


@dataclass(frozen=True)
class Task:
    """
    Inputs of one kind of model.

    Args:
        auto_class (`type`): The auto class that loads it.
        model_type (`str`): The default architecture of a model from scratch.
        recipe (`str`): The script that trains it, whose data arguments are used.
        arguments_name (`str`): The dataclass of these arguments.
        example (`Callable`): Makes a synthetic example from a configuration, the task's arguments and a random generator.
        tokens (`int`, *optional*, defaults to 128): Default length of a synthetic example.
    """

    auto_class: type
    model_type: str
    recipe: str
    arguments_name: str
    example: Callable[[PretrainedConfig, Any, torch.Generator], dict[str, Tensor]]
    tokens: int = 128

    @property
    def arguments(self) -> type:
        return getattr(importlib.import_module(f"hf_sam.tasks.{self.recipe}"), self.arguments_name)

    @property
    def is_classification(self) -> bool:
        return self.auto_class is not AutoModelForCausalLM


class MadeUpDataset(Dataset):
    """A data set of `length` examples, each drawn from its own seed when it is read."""

    def __init__(self, length: int, example: Callable[[torch.Generator], dict[str, Tensor]]):
        self.length, self.example = length, example

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.example(torch.Generator().manual_seed(index))


def made_up_inputs(task: Task, model_args: ModelArguments, task_args: Any, length: int) -> Inputs:
    """Make a model, and `length` random examples of its input shape: `image_size` pixels, or `max_length` tokens."""
    labels = {"labels": CLASSES, "problem_type": "single_label_classification"} if task.is_classification else {}
    config = load_config(model_args, **labels)
    if task.recipe == "image_classification":
        task_args.image_size = task_args.image_size or getattr(config, "image_size", 224)
    else:
        longest = getattr(config, "max_position_embeddings", 2**20)
        task_args.max_length = min(task_args.max_length or task.tokens, longest)
        if config.pad_token_id is None:
            config.pad_token_id = 0
    model = load_model(task.auto_class, model_args, config)
    if task.recipe == "image_classification":
        check_image_size(model, task_args.image_size)
    dataset = MadeUpDataset(length, lambda generator: task.example(config, task_args, generator))
    return Inputs(model, dataset, default_data_collator)


def real_inputs(
    task: Task, model_args: ModelArguments, data_args: DataArguments, task_args: Any, args: TrainingArguments
) -> Inputs:
    """Load the model and the training split as the recipe of the task does."""
    recipe = importlib.import_module(f"hf_sam.tasks.{task.recipe}")
    with args.main_process_first(desc="reading the data"):
        splits, *columns = recipe.read_data(data_args, task_args)
    return _REAL[task.recipe](task, model_args, data_args, task_args, args, splits, columns)


def _images(task, model_args, data_args, task_args, args, splits: Splits, columns) -> Inputs:
    recipe = importlib.import_module(f"hf_sam.tasks.{task.recipe}")
    image_column, label_column, names = columns
    config = load_config(model_args, labels=names, problem_type="single_label_classification")
    processor = load_image_processor(model_args, config, task_args.image_size)
    model = load_model(task.auto_class, model_args, config)
    images = recipe.prepare_images(splits, image_column, label_column, processor, data_args, task_args, args.seed)
    return Inputs(model, images["train"], default_data_collator)


def _texts(task, model_args, data_args, task_args, args, splits: Splits, columns) -> Inputs:
    texts, label_column, problem_type, names = columns
    tokenizer = load_tokenizer(model_args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"vocab_size": len(tokenizer)} if model_args.model_type else {}
    config = load_config(model_args, labels=names, problem_type=problem_type, **sizes)
    check_max_length(task_args.max_length, config)
    from .data.texts import tokenize

    config.pad_token_id = tokenizer.pad_token_id
    model = load_model(task.auto_class, model_args, config)
    tokens = tokenize({"train": splits["train"]}, texts, label_column, tokenizer, task_args.max_length)
    return Inputs(model, tokens["train"], DataCollatorWithPadding(tokenizer))


def _language(task, model_args, data_args, task_args, args, splits: Splits, columns) -> Inputs:
    tokenizer = load_tokenizer(model_args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = load_config(model_args, **({"vocab_size": len(tokenizer)} if model_args.model_type else {}))
    check_max_length(task_args.max_length, config)
    model = load_model(task.auto_class, model_args, config)
    from .data.language import tokenize_texts

    ((text_column,),) = columns
    tokens = tokenize_texts({"train": splits["train"]}, text_column, tokenizer, task_args.max_length)
    return Inputs(model, tokens["train"], DataCollatorForSeq2Seq(tokenizer))


_REAL = {"image_classification": _images, "text_classification": _texts, "causal_lm": _language}


def of_size(task: Task, model_args: ModelArguments, size: str | None) -> ModelArguments:
    """Return the arguments for a model from scratch of a given size, a row of `SIZES`."""
    if size is None:
        return model_args
    hidden, layers, heads = SIZES[size]
    overrides: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    if task.model_type == "llama":
        overrides |= {
            "num_key_value_heads": heads,
            "intermediate_size": 8 * hidden // 3,
        }  # three matrices instead of two
    return dataclasses.replace(model_args, config_overrides={**overrides, **model_args.config_overrides})


def _image(config: PretrainedConfig, args: Any, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (getattr(config, "num_channels", 3), args.image_size, args.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator), "labels": _class(generator)}


def _text(config: PretrainedConfig, args: Any, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(config, args, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _class(generator)}


def _sequence(config: PretrainedConfig, args: Any, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(config, args, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _tokens(config: PretrainedConfig, args: Any, generator: torch.Generator) -> Tensor:
    return torch.randint(1, config.vocab_size, (args.max_length,), generator=generator)


def _class(generator: torch.Generator) -> Tensor:
    return torch.randint(len(CLASSES), (), generator=generator)


TASKS = {
    "image-classification": Task(
        AutoModelForImageClassification, "vit", "image_classification", "ImageArguments", _image
    ),
    "text-classification": Task(
        AutoModelForSequenceClassification, "bert", "text_classification", "TextArguments", _text
    ),
    "causal-lm": Task(AutoModelForCausalLM, "llama", "causal_lm", "LanguageArguments", _sequence, tokens=1024),
}
