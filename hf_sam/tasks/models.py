"""Models, tokenizers and image processors: from a checkpoint, or from scratch from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    ByT5Tokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_torchvision_available

from ..suggestions import did_you_mean
from .command_line.errors import UserError, as_user_error, one_line
from .command_line.options import ModelArguments

BYTES = "bytes"  # a tokenizer's name
IMAGE_BACKEND = "torchvision" if is_torchvision_available() else "pil"


def device() -> torch.device:
    """Return the accelerator to evaluate on, or the CPU if there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def load_config(args: ModelArguments, labels: Sequence[str] | None = None, **values: Any) -> PretrainedConfig:
    """
    Load the model's configuration with `config_overrides`, and with a head for `labels` if given.

    Raises:
        UserError: If the model or model type does not exist, or an override is not a field of its configuration.
    """
    if labels is not None:
        values |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if args.model_type is None:
        config = _from_hub(AutoConfig, adapter_base(args.model_name_or_path) or args.model_name_or_path, args)
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        raise UserError(f"model_type={args.model_type} is unknown.{did_you_mean(args.model_type, CONFIG_MAPPING)}")
    values |= args.config_overrides
    for name in values:
        if not hasattr(config, name):
            kind = type(config).__name__
            raise UserError(f"config_overrides: {name!r} is not a field of {kind}.{did_you_mean(name, vars(config))}")
    if args.model_type is not None:  # other fields are derived from these, such as head_dim from hidden_size
        with as_user_error(ValueError, TypeError, StrictDataclassError, prefix="config_overrides: "):
            return type(config)(**values)
    for name, value in values.items():
        with as_user_error(ValueError, TypeError, prefix=f"config_overrides: {name}: "):
            setattr(config, name, value)
    return config


def load_model(auto_class: type, args: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """
    Load the model, with new adapters if LoRA is requested.

    A head whose size differs from that of the checkpoint is initialized anew. If the checkpoint is a PEFT adapter, its
    factors are trained further.

    Raises:
        UserError: If the checkpoint cannot be read, has no such model class, or LoRA finds no such module.
    """
    base = adapter_base(args.model_name_or_path)
    if base is not None and args.lora_r:
        raise UserError(
            f"{args.model_name_or_path} is already an adapter: leave out lora_r to train it further, or merge it first."
        )
    kwargs = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    if type(config) not in auto_class._model_mapping and not args.trust_remote_code:
        raise UserError(f"{config.model_type} has no {auto_class.__name__}; choose another model, or another recipe.")
    with as_user_error(ValueError, KeyError, ImportError, prefix="The model cannot be created: "):
        if args.model_type is not None:
            model = auto_class.from_config(config, **kwargs)
        else:
            model = _from_hub(
                auto_class,
                base or args.model_name_or_path,
                args,
                config=config,
                ignore_mismatched_sizes=True,
                dtype="float32",
                **kwargs,
            )
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.model_name_or_path, is_trainable=True)
    return add_lora(model, args) if args.lora_r else model


def adapter_base(path: str | None) -> str | None:
    """Return the base model of a PEFT adapter, `None` for anything else."""
    if path is None or not (Path(path) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(path).base_model_name_or_path


def add_lora(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """Add LoRA to a frozen model; a classification head is trained fully."""
    import peft

    with as_user_error(ValueError, prefix="lora_target_modules: "):
        return peft.get_peft_model(model, lora_config(model, args))


def lora_config(model: PreTrainedModel, args: ModelArguments):
    """Build the `peft.LoraConfig` for this model from the arguments."""
    import peft

    if model.__class__.__name__.endswith("ForCausalLM"):
        task, head = "CAUSAL_LM", None
    elif model.__class__.__name__.endswith("ForSequenceClassification"):
        task, head = "SEQ_CLS", None  # PEFT adds the head itself
    elif model.__class__.__name__.endswith("ForTokenClassification"):
        task, head = "TOKEN_CLS", None
    elif model.__class__.__name__.endswith("ForConditionalGeneration"):
        task, head = "SEQ_2_SEQ_LM", None
    else:
        task, head = None, [name for name, _ in model.named_children() if name in ("classifier", "head", "score")]
    targets = args.lora_target_modules
    if targets is None and task is None:
        targets = ["query", "key", "value", "q_proj", "k_proj", "v_proj"]
        targets = sorted({name.split(".")[-1] for name, _ in model.named_modules()} & set(targets))
    return peft.LoraConfig(
        task_type=task,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=head,
    )


def load_image_processor(args: ModelArguments, config: PretrainedConfig, image_size: int | None) -> BaseImageProcessor:
    """
    Load the model's processor, or ViT's for a model from scratch, adapted to the input size of the model.

    Args:
        args (`ModelArguments`): The model.
        config (`PretrainedConfig`): Its configuration.
        image_size (`int`, *optional*): The side in pixels; defaults to that of the processor.

    Raises:
        UserError: If the model does not accept images of this size.
    """
    if args.model_type is not None:
        from transformers import ViTImageProcessorPil

        side = image_size or getattr(config, "image_size", 224)
        processor = ViTImageProcessorPil(size={"height": side, "width": side}, do_convert_rgb=True)
    else:
        with as_user_error(ImportError):  # in transformers 5.4 to 5.17 processors need torchvision
            processor = _from_hub(AutoImageProcessor, args.model_name_or_path, args, backend=IMAGE_BACKEND)
        if image_size is not None:
            from .data.images import set_output_size

            set_output_size(processor, image_size)
    return processor


def check_image_size(model: PreTrainedModel, side: int) -> None:
    """
    Check that the model accepts images of this size.

    Raises:
        UserError: If the position embeddings are for another size and the model does not interpolate them itself.
    """
    expected = getattr(model.config, "image_size", side)
    patch = getattr(model.config, "patch_size", 1)
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters and expected != side:
        raise UserError(f"image_size={side} must be {expected}, the input size of this {model.config.model_type}.")
    if isinstance(patch, int) and side % patch:
        raise UserError(f"image_size={side} must be a multiple of the model's patch size, {patch}.")


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """
    Load the model's tokenizer; `bytes` stands for the 256 bytes of UTF-8 and needs no file (Xue et al. 2022, ByT5).

    Raises:
        UserError: If there is none, or none is named for a model from scratch.
    """
    name = args.tokenizer_name or args.model_name_or_path
    if name is None:
        raise UserError(
            "A model from scratch needs a tokenizer: give --tokenizer_name, a hub id, a local folder, or bytes."
        )
    if name == BYTES:
        return ByT5Tokenizer(extra_ids=0)
    return _from_hub(AutoTokenizer, name, args)


def check_max_length(max_length: int, config: PretrainedConfig, argument: str = "max_length") -> None:
    """
    Check a maximum length against the model.

    Raises:
        UserError: If the model has no positions for sequences of this length.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if max_length < 1:
        raise UserError(f"{argument}={max_length} must be at least 1.")
    if limit and max_length > limit:
        raise UserError(f"{argument}={max_length} is too long for the model: give at most {limit}.")


def _from_hub(auto_class: type, name: str, args: ModelArguments, **kwargs: Any) -> Any:
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{name} does not exist; give a hub id, or a folder that contains a model.")
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    try:
        return auto_class.from_pretrained(str(path) if path.exists() else name, revision=args.model_revision, **kwargs)
    except (OSError, ValueError) as error:
        reason = one_line(error).split(". ")[0]
        if path.exists():
            raise UserError(f"{name} cannot be loaded as {auto_class.__name__}: {reason}.") from error
        raise UserError(
            f"{name} is not a local folder and cannot be loaded from the hub as {auto_class.__name__} "
            f"(is this machine offline?): {reason}."
        ) from error


def model_class_names(auto_class: type) -> set[str]:
    """Return the names of the classes that an auto class loads."""
    names = auto_class._model_mapping._model_mapping.values()
    return {name for entry in names for name in (entry if isinstance(entry, tuple) else (entry,))}
