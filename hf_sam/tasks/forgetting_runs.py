"""The runs of a study of forgetting: what each trains, where it lies, and whether it has ended."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.execution import JOB_NAME, WEIGHTS
from ..experiments.json_files import read_json
from ..experiments.plan import changed_settings, command_line, slug
from ..experiments.records import RECORD_NAME
from ..experiments.workshop import Workshop
from .checkpoints import TASKS
from .command_line.errors import UserError, as_user_error
from .models import adapter_base

if TYPE_CHECKING:
    from .forgetting import ForgettingArguments

RESULT_NAME = "forgetting.json"
EVALUATION = ("first", "max_examples")  # arguments that the scores on the first task depend on
SEEDS = 100_000  # a replicate is a checkpoint of a name and a seed below this


@dataclass(frozen=True)
class SecondRun:
    """One fine-tuning on the second task."""

    start: str
    index: int  # which checkpoint of the name
    checkpoint: str
    learning_rate: float
    seed: int

    trial = None  # for a workshop: no run tunes another one, and all cost the same
    cost = 1.0

    @property
    def folder(self) -> Path:
        """Relative to the output folder."""
        names = slug(self.start), f"checkpoint-{self.index}", f"lr-{self.learning_rate:g}", f"seed-{self.seed}"
        return Path("runs", *names)

    @property
    def replicate(self) -> int:
        return SEEDS * self.index + self.seed


@dataclass(frozen=True)
class Place:
    """What a driver asks of a plan."""

    output_dir: Path
    launcher: list[str]


class ForgettingWorkshop(Workshop):
    """The runs of a grid and where they stand; a run has ended when it has failed or is evaluated on the first task."""

    def __init__(self, args: ForgettingArguments):
        runs = [
            SecondRun(name, index, path, rate, seed)
            for seed in args.seeds
            for name, paths in args.starts.items()
            for index, path in enumerate(paths)
            for rate in args.learning_rates
        ]
        super().__init__(Place(Path(args.output_dir), args.launcher), runs, lambda run: {})
        self.args = args
        self._evaluated: set[SecondRun] = set()

    def all_runs(self) -> list[SecondRun]:
        return self.runs

    def is_ready(self, run: SecondRun) -> bool:
        return True

    def has_ended(self, run: SecondRun) -> bool:
        record = self.record(run)
        if record is None or record.status not in ("finished", "failed"):
            return False
        if record.status == "finished" and run not in self._evaluated:
            if result_of(run, self.plan.output_dir) is None:
                return False
            self._evaluated.add(run)
        return True

    def job(self, run: SecondRun) -> dict[str, Any]:
        """Return the job of the process that makes the run: a recipe, its command line, and what is evaluated then."""
        args = self.args
        settings = {
            **args.settings,
            "model_name_or_path": whole_model(args, run, self.plan.output_dir),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "arm": run.start,
            "evaluate_train": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "resume_from_checkpoint": "auto",
        }
        return {
            "recipe": args.recipe,
            "argv": command_line(args.config, settings, self.folder(run)),
            "names": {"task": str(args.settings.get("dataset", args.config)), "arm": run.start, "seed": run.seed},
            "average": {},
            "sharpness": None,
            "keep_model": True,
            "afterwards": {"task": "forgetting", "arguments": asdict(args), "run": asdict(run)},
        }

    def check_unchanged(self) -> None:
        """
        Check that evaluated runs have the current settings, and discard what other runs left behind that cannot be used.

        Raises:
            UserError: If a run was made with other settings.
        """
        for run in self.runs:
            place, record = self.folder(run), self.record(run)
            made = read_json(place / JOB_NAME)
            if record is None or record.status != "finished" or made is None:
                continue
            changed = changed_settings(made, self.job(run))
            if not self.has_ended(run):
                if changed or not weights_in(place):
                    (place / RECORD_NAME).unlink()
                    self.forget(run)
                continue
            asked = made["afterwards"]["arguments"]
            changed += [name for name in EVALUATION if asked.get(name) != getattr(self.args, name)]
            if changed:
                raise UserError(
                    f"{place} was run with other settings ({', '.join(changed[:4])}). Give another output_dir, or "
                    f"delete that folder."
                )


def whole_model(args: ForgettingArguments, run: SecondRun, folder: Path) -> str:
    """Return the path of the start as a full model; an adapter is merged into its base, once."""
    base = adapter_base(run.checkpoint)
    if base is None:
        return run.checkpoint
    merged = folder / "starts" / f"{slug(run.start)}-{run.index}"
    if not (merged / "config.json").is_file():
        from peft import PeftModel

        task = next(task for task in TASKS.values() if task.recipe == args.recipe)
        with as_user_error(OSError, ValueError, prefix=f"{run.checkpoint} cannot be merged: "):
            model = task.auto_class.from_pretrained(base, dtype="float32", trust_remote_code=args.trust_remote_code)
            PeftModel.from_pretrained(model, run.checkpoint).merge_and_unload().save_pretrained(merged)
        for source in (Path(base), Path(run.checkpoint)):
            for pattern in (
                "tokenizer*",
                "special_tokens_map.json",
                "vocab*",
                "merges.txt",
                "preprocessor_config.json",
            ):
                for file in source.glob(pattern):
                    shutil.copy(file, merged)
    return str(merged)


def result_of(run: SecondRun, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run that is finished and evaluated, otherwise `None`."""
    with suppress(OSError, json.JSONDecodeError):
        return json.loads((folder / run.folder / RESULT_NAME).read_text(encoding="utf-8"))
    return None


def weights_in(place: Path) -> list[Path]:
    return [file for pattern in WEIGHTS for file in place.glob(pattern)]
