"""SAM's own part of the Trainer's checkpoints: the configuration a run was made with."""

from __future__ import annotations

from pathlib import Path

from .config import SAMConfig

CONFIG_NAME = "sam_config.json"


def save_config(folder: str, config: SAMConfig) -> None:
    """Write `sam_config.json` into a checkpoint or model folder."""
    path = Path(folder) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_json(), encoding="utf-8")


def check_config(folder: str, config: SAMConfig) -> bool:
    """Whether the checkpoint was made by a SAM trainer; one by a stock Trainer is a fine start and returns False.

    Raises:
        ValueError: It was made under another configuration; the message names every difference and the remedy.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return False
    before = SAMConfig.from_json(path.read_text(encoding="utf-8")).to_dict()
    now = config.to_dict()
    differences = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in SAMConfig.fields()
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"The checkpoint {folder} was made under another SAM configuration: {'; '.join(differences)}. Resume with the "
            f"same configuration; to go on under the new one on purpose, delete {CONFIG_NAME} from the checkpoint."
        )
    return True
