"""Which settings a trial tries and which have won. Every worker comes to the same ones, from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import metric_of
from .records import RunRecord

if TYPE_CHECKING:  # only a study that tunes needs optuna
    from optuna.distributions import BaseDistribution


def next_settings(space: Mapping[str, Any], seed: int, metric: str, done: Sequence[RunRecord]) -> dict[str, Any]:
    """
    What the next trial tries, given those that are done, by optuna's tree-structured Parzen estimator.

    The search is replayed from its seed: asked and told, trial by trial. So it needs no storage beside the records, and
    goes the same way whoever runs the trials, and again when it is run again.

    Args:
        space (`Mapping`): Setting to `{low, high, log, int}` or a list of choices.
        seed (`int`): Of the search.
        metric (`str`): What is optimised, in the direction that `METRICS` gives.
        done (`Sequence[RunRecord]`): The trials that ended, in order; failed and diverged ones count as such.
    """
    import optuna
    from optuna.trial import TrialState

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="maximize" if metric_of(metric).higher_is_better else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5),
        )
        distributions = {name: _distribution(entry) for name, entry in space.items()}
        for record in done:
            trial, value = study.ask(distributions), record.metrics.get(metric)
            study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
        return study.ask(distributions).params
    finally:
        optuna.logging.set_verbosity(level)


def best_trial(metric: str, done: Sequence[RunRecord]) -> int | None:
    """The index of the trial that scored best, the first among equals; `None` where none has a score."""
    sign = 1 if metric_of(metric).higher_is_better else -1
    scores = {
        index: sign * run.metrics[metric] for index, run in enumerate(done) if run.metrics.get(metric) is not None
    }
    return max(scores, key=scores.get) if scores else None


def _distribution(entry: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(entry, list):
        return CategoricalDistribution(entry)
    kind = IntDistribution if entry.get("int") else FloatDistribution
    return kind(entry["low"], entry["high"], log=bool(entry.get("log")))
