"""Train a finished checkpoint with SAM for a short phase before quantization, merging or more fine-tuning.

    hf-sam flatten outputs/minilm                                  # data from its run record
    hf-sam flatten some/hub-id --dataset imdb --sam_rho 0.05       # any option of the training recipes
    hf-sam flatten outputs/lora --task causal-lm --output_dir outputs/lora-flat

The checkpoint is a local folder or a hub id with a trained head, or a PEFT adapter, whose factors are then trained. It
is trained on its own task, with the defaults of `configs/flatten`; any option, such as `--learning_rate` or
`--sam_rho`, overrides them. Run record and model card say that this was a flatten phase. `hf-sam survival BEFORE AFTER`
measures whether it helped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..experiments.execution import load_task
from ..experiments.plan import command_line
from .checkpoints import TASKS, find_task, recorded_data
from .command_line.arguments import wants_help
from .command_line.config_files import CONFIGS
from .command_line.errors import UserError
from .models import adapter_base

DEFAULTS = CONFIGS / "flatten"


def main(argv: Sequence[str] | None = None, callbacks: Sequence[Any] = ()) -> Any:
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        return None  # described above; all other options are those of the training task
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--task")
    known, rest = parser.parse_known_args(words)
    if known.checkpoint is None:
        raise UserError("Give the checkpoint first: a folder or a hub id.")
    path = known.checkpoint
    named = ["--checkpoints", path, *rest]
    name = find_task([*named, *(["--task", known.task] if known.task else [])])
    recipe = TASKS[name].recipe
    files = [DEFAULTS / f"{recipe}.yaml", *([DEFAULTS / "lora.yaml"] if adapter_base(path) else [])]
    folder = (
        Path(f"{path.rstrip('/')}-flat") if Path(path).exists() else Path("outputs") / f"{path.split('/')[-1]}-flat"
    )
    data = recorded_data(named)
    if not data and not any(word.split("=")[0] in ("--dataset", "--glue_task") for word in rest):
        raise UserError(f"{path} has no run record with its data set: give --dataset, the data it was trained on.")
    words = command_line(None, {"model_name_or_path": path}, folder)
    return load_task(recipe).main([*map(str, files), *words, *data, *rest], callbacks)
