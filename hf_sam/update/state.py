"""SAM's part of the Trainer's checkpoints: the configuration of the run and the state of its method."""

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
    """Check that a checkpoint has this configuration; return False if a stock Trainer wrote it, which is allowed.

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
                values[name] = getattr(config, name)  # a class defined in a function cannot be found by its path
        before = SAMConfig.from_dict(values).to_dict()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid SAM configuration ({error}). Restore it, or delete it to resume the checkpoint as if a "
            "stock Trainer had written it."
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
    """Write `sam_state_{rank}.safetensors` unless the method has no state.

    Every rank writes a file because ranks with perturbations of their own have different states.
    """
    tensors = {name: tensor.contiguous() for name, tensor in update.state_dict().items()}
    if tensors:
        Path(folder).mkdir(parents=True, exist_ok=True)  # this rank may arrive before rank 0 has created it
        save_file(tensors, Path(folder) / STATE_NAME.format(rank=rank))


def load_state(folder: str, update: SharpnessAwareUpdate, rank: int) -> None:
    """Load the state written by `save_state`; extra ranks reuse the states of the first ones.

    If any rank finds no state, no rank loads one.
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
    """Load the weights that `Trainer` did not find in the checkpoint, if any.

    `save_pretrained` writes some architectures (such as ViT and DINOv2) under the parameter names of their original
    release. `Trainer` reads checkpoints by the current names and leaves other weights at their initial values with a
    warning, while `from_pretrained` knows both names.
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
