"""The first task of a study of forgetting: its test examples, and the evaluation of models on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from ..evaluation.merging import check_same_shapes, mergeable_state
from ..evaluation.weights import replaced
from ..experiments.plan import command_line
from ..reporting.survival import scores_of
from . import report
from .checkpoints import TASKS, find_task, fixed_rows, load_checkpoint, recorded_data
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments
from .models import device
from .survival import body_of, check_data

if TYPE_CHECKING:
    from .forgetting import ForgettingArguments


class FirstTask:
    """The test examples of the first task, and the evaluation of models on them."""

    def __init__(self, args: ForgettingArguments):
        self.args = args
        argv = ["--checkpoints", args.checkpoints[0], *command_line(None, args.first, Path("-"))[:-1]]
        self.task = TASKS[find_task(argv)]
        words = [*argv[2:], *recorded_data(argv)]
        if not any(word.startswith(("--dataset", "--glue_task")) for word in words):
            raise UserError(
                f"{args.checkpoints[0]} has no run record with its data set: give --first '{{\"dataset\": ...}}'."
            )
        self.data_args, self.task_args = parse_arguments([DataArguments, self.task.arguments], words)
        splits, *self.columns = self.task.read_data(self.data_args, self.task_args)
        check_data(splits, self.columns, "test")
        self.rows = fixed_rows(splits["test"], args.max_examples or len(splits["test"]), 0)

    def scores(self, start_path: str, tuned_path: Path | None = None) -> dict[str, float]:
        """Evaluate a starting checkpoint, or the fine-tuned model with the starting head (for classifiers)."""
        model_args = ModelArguments(model_name_or_path=start_path, trust_remote_code=self.args.trust_remote_code)
        model, processor_args = load_checkpoint(self.task.auto_class, model_args, self.columns, "merged")
        model.to(device()).eval()
        examples, collator = self.task.prepare({"test": self.rows}, self.columns, processor_args, self.task_args, model)
        loader = DataLoader(examples["test"], self.args.batch_size, collate_fn=collator)
        body = {}
        if tuned_path is not None:
            body = body_of(self.task, str(tuned_path), self.args)
            with as_user_error(ValueError):
                check_same_shapes(mergeable_state(model), body, str(tuned_path))
        with replaced(model, body):
            scores = scores_of(report.predictions_of(model, loader))
        return {"loss": scores["nll"], **scores} if "nll" in scores else scores
