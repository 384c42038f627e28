"""SAM's part of the Trainer's checkpoints: the configuration of the run, and the state of its method."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import SAMConfig
from .step import SharpnessAwareUpdate

CONFIG_NAME = "sam_config.json"
STATE_NAME = "sam_state_{rank}.safetensors"

logger = logging.get_logger(__name__)


def save_config(folder: str, config: SAMConfig) -> None:
    """Write `sam_config.json` into a checkpoint or model folder."""
    path = Path(folder) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_json(), encoding="utf-8")


def check_config(folder: str, config: SAMConfig) -> bool:
    """Whether a SAM trainer wrote the checkpoint; one of a stock Trainer is a valid start and returns False.

    Raises:
        ValueError: The configuration differs (the message names every difference and the fix), or the file is damaged.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, own in json.loads(config.to_json()).items():
            if name in ("ascent", "descent") and values.get(name) == own:
                values[name] = getattr(config, name)  # a class defined in a function cannot be found by a path
        before = SAMConfig.from_dict(values).to_dict()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as a SAM configuration ({error}). Restore it, or delete it to resume the checkpoint as if "
            "a stock Trainer had written it."
        ) from error
    now = config.to_dict()
    differences = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in SAMConfig.fields()
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"The checkpoint {folder} was written under another SAM configuration: {'; '.join(differences)}. Resume with the "
            f"same configuration; to switch to the new one on purpose, delete {CONFIG_NAME} from the checkpoint."
        )
    return True


def save_state(folder: str, update: SharpnessAwareUpdate, rank: int) -> None:
    """Write this rank's `sam_state_{rank}.safetensors`; nothing for a method without state.

    If every rank perturbs on its own, ranks have different states, so each writes a file.
    """
    tensors = {name: tensor.contiguous() for name, tensor in update.state_dict().items()}
    if tensors:
        Path(folder).mkdir(parents=True, exist_ok=True)  # this rank may arrive before rank 0 has created it
        save_file(tensors, Path(folder) / STATE_NAME.format(rank=rank))


def load_state(folder: str, update: SharpnessAwareUpdate, rank: int) -> None:
    """The inverse of `save_state`. With more ranks than the checkpoint has, the states of the first ones are reused.

    All ranks proceed alike: if one finds no state, none loads any.
    """
    files = sorted(Path(folder).glob(STATE_NAME.format(rank="*")))
    if not update.engine.agree(bool(files)):
        return
    own = Path(folder) / STATE_NAME.format(rank=rank)
    if own not in files:
        own = files[rank % len(files)]
        logger.warning(
            f"{folder} holds the SAM state of {len(files)} processes: process {rank} continues with {own.name}."
        )
    update.load_state_dict(load_file(own, device=str(update.device)))


def reload_renamed_weights(model: nn.Module, folder: str) -> None:
    """Load the weights that `Trainer` has missed, if any.

    `save_pretrained` writes some architectures (ViT and DINOv2 among them) under the names of their original release,
    and `Trainer` reads checkpoints by the model's current names, leaving the rest at their initial values with a
    warning. `from_pretrained` knows both names.
    """
    if not isinstance(model, PreTrainedModel) or (Path(folder) / "adapter_config.json").exists():
        return
    saved = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved.update(file.keys())
    if saved <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, config=model.config, dtype="auto").state_dict())
