"""The files that baselines keep in the Trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at the current step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def file_to_resume(args: TrainingArguments, state: TrainerState, name: str) -> Path | None:
    """The file `name` of the checkpoint from which training resumes; None at the start of a run, or if there is none.

    A callback does not see the argument of `trainer.train(resume_from_checkpoint=...)`, so without
    `args.resume_from_checkpoint` the file is looked for in the output directory.
    """
    if not state.global_step:
        return None
    for folder in (Path(str(args.resume_from_checkpoint)), checkpoint_folder(args, state)):
        if (folder / name).exists():
            return folder / name
    logger.warning(
        f"Training resumes at step {state.global_step}, but {name} is not in the checkpoint: it starts anew. If the checkpoint is "
        "not in output_dir, set resume_from_checkpoint also in TrainingArguments."
    )
    return None
