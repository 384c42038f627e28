"""The runs of a search for rho: which runs the results so far call for, their jobs, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import SAMConfig
from ..evaluation.metrics import metric_of
from ..experiments.execution import remove_checkpoints
from ..experiments.plan import TUNING, command_line
from ..experiments.records import RECORD_NAME, RunRecord, read_record
from ..experiments.workshop import Workshop
from ..update.schedule import Schedule
from .halving import SearchPlan, looks, survivors
from .rule import Gain, is_settled, paired_gain
from .scores import ExampleScores, constant_scores, example_scores

PREDICTIONS_NAME = "test_predictions.parquet"  # trials are scored on the validation split in place of the test split
UNTRAINED = "untrained"  # folder of the run that stops before its first step
PROBE = "probe"  # folder of the run that measures sharpness
# Settings of every run of a search, which override the user's command line.
SETTINGS = {
    "budget": f"{TUNING} steps",
    "save_strategy": "no",
    "save_only_model": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "evaluate_train": False,
    "score_split": "validation",
    "overwrite_output_dir": False,
    "disable_tqdm": True,
    "report_to": "none",
}


@dataclass(frozen=True)
class Phase:
    """
    A segment of a run with one rho and one seed, between two pauses.

    Args:
        stage (`int`): Rung of the search, counted from 0; the confirmation is the last stage.
        rho (`float`): The run's rho.
        seed (`int`): The run's seed.
        begin, end (`int`): First and last step of the segment; a segment with `begin = 0` starts from scratch.
    """

    stage: int
    rho: float
    seed: int
    begin: int
    end: int

    @property
    def folder(self) -> Path:
        """The phase's folder, relative to the folder of the search."""
        return self._folder(self.end)

    @property
    def source(self) -> Path | None:
        """The checkpoint that the phase resumes from, relative to the folder of the search."""
        return self._folder(self.begin) / f"checkpoint-{self.begin}" if self.begin else None

    @property
    def control(self) -> Phase:
        """The same phase without SAM."""
        return replace(self, rho=0.0)

    def _folder(self, step: int) -> Path:
        return Path("runs", f"rho-{self.rho:g}", f"seed-{self.seed}", f"to-{step}")


@dataclass(frozen=True)
class Search:
    """
    A search, with everything that its runs need.

    Args:
        output_dir (`Path`): Folder for all outputs.
        launcher (`list[str]`): Command that starts each run; empty for this Python.
        recipe (`str`): A script in `recipes/`.
        words (`tuple[str, ...]`): The user's command line of the recipe.
        settings (`dict`): Arguments of every run, which override those of `words`.
        rhos (`tuple[float, ...]`): The values above 0.
        seed (`int`): Seed of the search; the confirmation uses the following ones.
        metric (`str` or `None`): The metric to compare; by default the first of `METRICS_KEPT` that the task has.
        plan (`SearchPlan`): Lengths and numbers of the runs.
    """

    output_dir: Path
    launcher: list[str]
    recipe: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    rhos: tuple[float, ...]
    seed: int
    metric: str | None
    plan: SearchPlan

    def job(self, folder: Path, arm: str, settings: dict[str, Any], pause_at: int, **names: Any) -> dict[str, Any]:
        """
        The content of `run.json` for a run of the search.

        Args:
            folder (`Path`): The run's folder.
            arm (`str`): The run's arm.
            settings (`dict`): The run's own settings.
            pause_at (`int`): The step after which it stops.
            names: Further names in its record.
        """
        return {
            "recipe": self.recipe,
            "argv": [*self.words, *command_line(None, {**SETTINGS, **self.settings, **settings}, folder)],
            "names": {"task": self.recipe, "arm": arm, "budget": SETTINGS["budget"], **names},
            "average": {},
            "is_trial": True,
            "sharpness": None,
            "keep_model": False,
            "pause_at": pause_at,
        }


class RhoWorkshop(Workshop):
    """
    A search and the state of its runs.

    The runs follow from the records alone, so a search that is killed and resumed, or that runs in parallel, takes the
    same decisions.
    """

    def __init__(self, search: Search):
        super().__init__(search, [], lambda run: {})  # a driver uses only a plan's folder and launcher
        self.search = search
        self._scores: dict[Path, dict[str, ExampleScores]] = {}
        self._floors: dict[Path, dict[str, ExampleScores]] = {}

    def stages(self) -> list[list[Phase]]:
        """The phases of every stage that the results so far determine."""
        search, plan = self.search, self.search.plan
        found, rhos, begin = [], list(search.rhos), 0
        for stage, rung in enumerate(plan.rungs):
            phases = [Phase(stage, rho, search.seed, begin, rung.step) for rho in (0.0, *rhos)]
            found.append(phases)
            if not all(map(self.has_ended, phases)) or self.score(phases[0]) is None:
                return found
            following = plan.rungs[stage + 1].rhos if stage + 1 < len(plan.rungs) else 1
            rhos = survivors({phase.rho: self.gain(phase) for phase in phases[1:]}, following)
            if not rhos:
                return found
            begin = rung.step
        return [*found, self._confirmation(rhos[0])]

    def _confirmation(self, rho: float) -> list[Phase]:
        """The runs of the confirmation, without the last ones if those before settle the question."""
        search, stage, horizon = self.search, len(self.search.plan.rungs), self.search.plan.horizon
        seeds = range(search.seed + 1, search.seed + 1 + search.plan.seeds)
        treated = [Phase(stage, rho, seed, 0, horizon) for seed in seeds]
        pairs = [(run, run.control) for run in treated]
        made = next((k for k in looks(len(pairs)) if not self._goes_on_after(pairs[:k])), len(pairs))
        return [phase for run, control in pairs[:made] for phase in (control, run)]

    def _goes_on_after(self, pairs: Sequence[tuple[Phase, Phase]]) -> bool:
        """Whether all runs of the pairs have ended, those with rho above 0 well, and the question is not settled."""
        if not all(self.has_ended(run) for pair in pairs for run in pair):
            return False
        if any(self.score(treated) is None for treated, _ in pairs):
            return False
        scored = self._scored(pairs)
        return not scored or not is_settled(
            *scored, self._higher_is_better, len(self.search.rhos), self.search.plan.seeds
        )

    @property
    def ended_early(self) -> bool:
        """Whether the search ended before all pairs of the confirmation were made."""
        stages, plan = self.stages(), self.search.plan
        return len(stages) > len(plan.rungs) and len(stages[-1]) < 2 * plan.seeds and not any(self.open_runs())

    def all_runs(self) -> list[Phase]:
        return [phase for stage in self.stages() for phase in stage]

    def is_ready(self, run: Phase) -> bool:
        return True

    def job(self, run: Phase) -> dict[str, Any]:
        search = self.search
        arm = f"rho {run.rho:g}"
        source = str(search.output_dir / run.source) if run.source else "auto"
        settings = {"sam_rho": run.rho, "seed": run.seed, "arm": arm, "resume_from_checkpoint": source}
        return search.job(self.folder(run), arm, settings, run.end, seed=run.seed)

    # --- disk --------------------------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Remove every checkpoint that no run will resume from."""
        stages, waiting = self.stages(), list(self.open_runs())
        wanted = {self.search.output_dir / phase.source for phase in waiting if phase.source}
        going_on = stages[-1] if waiting and len(stages) < len(self.search.plan.rungs) else []
        for phase in (phase for stage in stages for phase in stage):
            checkpoint = self.folder(phase) / f"checkpoint-{phase.end}"
            if self.has_ended(phase) and phase not in going_on and checkpoint not in wanted:
                remove_checkpoints(self.folder(phase))

    @property
    def probe_passes(self) -> float:
        """Gradient passes of the probe; 0 if there was none."""
        return (
            passes_spent(read_record(self.search.output_dir / PROBE / RECORD_NAME)) if self.search.plan.probe else 0.0
        )

    # --- scores ------------------------------------------------------------------------------------------------------

    def scores(self, run: Phase) -> dict[str, ExampleScores]:
        """Per-example scores of a finished phase, by metric; empty if it failed or diverged."""
        folder = self.folder(run)
        if folder not in self._scores:
            record = self.record(run)
            if record is None or record.status != "finished":
                return {}
            kept = pd.read_parquet(folder / PREDICTIONS_NAME)
            self._scores[folder] = example_scores(kept)
            self._floors[folder] = constant_scores(kept) or self._untrained_scores
        return self._scores[folder]

    @cached_property
    def _untrained_scores(self) -> dict[str, ExampleScores]:
        """Scores of the model before its first step, which is what a language model has to beat."""
        path = self.search.output_dir / UNTRAINED / PREDICTIONS_NAME
        return example_scores(pd.read_parquet(path)) if path.exists() else {}

    def score(self, run: Phase) -> ExampleScores | None:
        """Per-example scores of a finished phase in the metric to compare.

        Raises:
            ValueError: The task does not have this metric.
        """
        scores = self.scores(run)
        if not scores:
            return None
        if self.metric not in scores:
            raise ValueError(f"metric={self.metric!r} is not a metric of this task. Allowed: {', '.join(scores)}.")
        return scores[self.metric]

    def floor(self, runs: Sequence[Phase]) -> float | None:
        """
        The score that any model that has learned something exceeds, on the examples of the first of `runs` with scores.

        It is the score of always giving the same answer, or for language models, that of the model before its first
        step.
        """
        found = [floors for run in runs if self.scores(run) and (floors := self._floors[self.folder(run)])]
        return found[0][self.metric].value if found and self.metric in found[0] else None

    def has_learnt(self, runs: Sequence[Phase]) -> bool:
        """
        Whether any of `runs` is significantly better than the floor, and for language models by at least 1 %.

        True if there is no floor.
        """
        if self.floor(runs) is None:
            return True
        sign = 1 if self._higher_is_better else -1
        for run in runs:
            scores = self.score(run)
            if scores is None:
                continue
            constant = self._floors[self.folder(run)][self.metric]
            moved = scores.influence() - constant.influence()
            # Models from scratch start at slightly different losses with other seeds.
            margin = 0.01 * constant.value if self._floor_is_untrained else 0.0
            if sign * (scores.value - constant.value) > margin + 1.645 * moved.std() / len(moved) ** 0.5:
                return True
        return False

    def gain(self, run: Phase) -> float | None:
        """The gain over 0 in the same stage, by which the search ranks values; `None` without scores."""
        gain = self.gain_over([(run, run.control)])
        return gain.value if gain else None

    def gain_over(self, pairs: Sequence[tuple[Phase, Phase]]) -> Gain | None:
        """The gain over the pairs in which both runs have a score; `None` if there are none."""
        scored = self._scored(pairs)
        return paired_gain(*scored, self._higher_is_better, len(self.search.rhos)) if scored else None

    def _scored(self, pairs: Sequence[tuple[Phase, Phase]]) -> tuple[list[ExampleScores], ...]:
        """The scores of the treated runs and of their controls, of pairs in which both have one; empty if there are none."""
        scores = [(self.score(treated), self.score(control)) for treated, control in pairs]
        return tuple(map(list, zip(*(pair for pair in scores if None not in pair), strict=True)))

    @property
    def _higher_is_better(self) -> bool:
        return metric_of(self.metric).higher_is_better

    @property
    def floor_in_words(self) -> str:
        """A description of the floor."""
        return "the model before its first step" if self._floor_is_untrained else "always giving the same answer"

    @property
    def _floor_is_untrained(self) -> bool:
        return self.metric == "nll_per_token"

    @property
    def metric(self) -> str:
        """The metric to compare; the default depends on the scores read so far."""
        kept = next(filter(None, self._scores.values()), {"accuracy": None})
        return self.search.metric or next(iter(kept))


# --- passes ----------------------------------------------------------------------------------------------------------


def pass_counter(config: SAMConfig, warmup_steps: Callable[[int], int]):
    """
    The `PassCount` of runs under `config`: one pass in a plain step, and as many as the method takes in a perturbed
    step.

    Args:
        config (`SAMConfig`): A configuration with rho above 0.
        warmup_steps (`Callable[[int], int]`): Warm-up steps of a schedule of the given length.
    """

    def count(length: int, begin: int, end: int) -> float:
        try:
            schedule = Schedule.resolve(config, length, warmup_steps(length))
        except ValueError:  # too short for a perturbed step
            return end - begin
        first, last = max(begin, schedule.start), min(end, schedule.end)
        interval = config.interval or 1
        # the perturbed steps are schedule.start, schedule.start + interval, ...
        perturbed = max(0, -((schedule.start - last) // interval) + (schedule.start - first) // interval)
        return end - begin + (config.passes_per_step - 1) * perturbed

    return count


def passes_spent(record: RunRecord) -> float:
    """Gradient passes of one phase, as counted by its trainer."""
    return record.segments[-1]["passes"] if record.segments else 0.0
