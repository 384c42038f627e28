"""Tuning: the settings of each trial, and the best ones, from one optuna study per arm (ask-and-tell)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import metric_of
from .records import RunRecord

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STORAGE_NAME = "tuning.journal"  # in the folder of the comparison

# A started trial: its settings, and its record once it has ended.
Trial = tuple[Mapping[str, Any], RunRecord | None]


def open_storage(folder: Path, url: str | None = None) -> optuna.storages.BaseStorage:
    """
    Open the storage of optuna's trials.

    Args:
        folder (`Path`): Folder of the comparison, for a journal file if there is no `url`.
        url (`str`, *optional*): URL of a relational database, such as `postgresql://...` or `sqlite:///trials.db`.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    with _quietly():
        if url:
            return optuna.storages.RDBStorage(url)
        folder.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / STORAGE_NAME)))


def next_settings(
    space: Mapping[str, Any],
    seed: int,
    metric: str,
    earlier: Sequence[Trial],
    storage: optuna.storages.BaseStorage | None = None,
    name: str = "trials",
) -> dict[str, Any]:
    """
    The settings of the trial after the `earlier` ones, from optuna's tree-structured Parzen estimator.

    Each trial has its own sampler, seeded by `seed` and the trial's number, so its settings depend only on the results
    known when it starts. A storage that is lost or out of date is completed from the records.

    Args:
        space (`Mapping`): Setting to `{low, high, log, int}` or a list of choices.
        seed (`int`): Seed of the search.
        metric (`str`): The metric to optimize, in the direction given by `METRICS`.
        earlier (`Sequence[Trial]`): The earlier trials, in order. Those without a score count as failed; some may still
            be running.
        storage (`optuna.storages.BaseStorage`, *optional*): Storage of the trials; in memory by default.
        name (`str`, *optional*, defaults to `"trials"`): Name of the study in `storage`.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    number = len(earlier)
    with _quietly():
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            direction="maximize" if metric_of(metric).higher_is_better else "minimize",
            sampler=optuna.samplers.TPESampler(seed=_seed_of(seed, number), n_startup_trials=5, constant_liar=True),
        )
        distributions = {name: _distribution(entry) for name, entry in space.items()}
        known = study.get_trials(deepcopy=False)
        for index, (settings, record) in enumerate(earlier):
            if index >= len(known):
                study.add_trial(
                    create_trial(state=TrialState.RUNNING, params=dict(settings), distributions=distributions)
                )
            if record is not None and (index >= len(known) or not known[index].state.is_finished()):
                value = record.metrics.get(metric)
                study.tell(index, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
        if len(known) > number:  # drawn before, by a driver that died before the trial started
            return dict(known[number].params)
        return study.ask(distributions).params


def best_trial(metric: str, done: Sequence[RunRecord]) -> int | None:
    """Index of the best trial, the first one on ties; `None` if no trial has a score."""
    sign = 1 if metric_of(metric).higher_is_better else -1
    scores = {
        index: sign * run.metrics[metric] for index, run in enumerate(done) if run.metrics.get(metric) is not None
    }
    return max(scores, key=scores.get) if scores else None


def in_space(space: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether `settings` lie in the search space `space`."""
    if space.keys() != settings.keys():
        return False
    return all(
        settings[name] in entry if isinstance(entry, list) else entry["low"] <= settings[name] <= entry["high"]
        for name, entry in space.items()
    )


def _seed_of(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")


def _distribution(entry: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(entry, list):
        return CategoricalDistribution(entry)
    kind = IntDistribution if entry.get("int") else FloatDistribution
    return kind(entry["low"], entry["high"], log=bool(entry.get("log")))


@contextmanager
def _quietly() -> Iterator[None]:
    import warnings

    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
