"""Which settings a trial tries and which have won: a study of optuna's for each arm, asked and told trial by trial."""

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

# A trial that was begun: what it tries, and its record once it has ended.
Trial = tuple[Mapping[str, Any], RunRecord | None]


def open_storage(folder: Path, url: str | None = None) -> optuna.storages.BaseStorage:
    """
    Where optuna keeps the trials.

    Args:
        folder (`Path`): Of the comparison; a journal in it is used where no `url` is given.
        url (`str`, *optional*): Of a relational database, such as `postgresql://...` or `sqlite:///trials.db`.
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
    What the trial after the `earlier` ones tries, by optuna's tree-structured Parzen estimator.

    Each trial has a sampler of its own, seeded by `seed` and its number: what it tries depends on the results that were
    known when it was asked for, and on nothing else. A storage that lags behind the records, or was lost, is completed
    from them.

    Args:
        space (`Mapping`): Setting to `{low, high, log, int}` or a list of choices.
        seed (`int`): Of the search.
        metric (`str`): What is optimised, in the direction that `METRICS` gives.
        earlier (`Sequence[Trial]`): In order; failed and diverged ones count as such, others may still be under way.
        storage (`optuna.storages.BaseStorage`, *optional*): Where the trials are kept; in memory when left out.
        name (`str`, *optional*, defaults to `"trials"`): Of the study in `storage`.
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
        if len(known) > number:  # asked for before, by a driver that died before the trial began
            return dict(known[number].params)
        return study.ask(distributions).params


def best_trial(metric: str, done: Sequence[RunRecord]) -> int | None:
    """The index of the trial that scored best, the first among equals; `None` where none has a score."""
    sign = 1 if metric_of(metric).higher_is_better else -1
    scores = {
        index: sign * run.metrics[metric] for index, run in enumerate(done) if run.metrics.get(metric) is not None
    }
    return max(scores, key=scores.get) if scores else None


def is_possible(space: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a search of `space` can have come to `settings`."""
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
