"""The sweep's trials in an Optuna storage that several workers share, each of which may be killed at any moment.

Every access happens under one lock on a file of the sweep's folder. A worker holds a second lock, in the trial's own
folder, for as long as it works on the trial. The operating system frees both when the worker dies, so a trial that the
storage calls running and whose lock is free is an orphan, and the next worker takes it up again.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from clipdistill.config import RunConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError
from clipdistill.core.locks import FileLock, locked
from clipdistill.sweep.axes import Axis
from clipdistill.sweep.outcome import COMPLETE, FAILED, PRUNED, Outcome, read_outcome, trial_folder
from clipdistill.training.sampler import seed_of

if TYPE_CHECKING:
    import optuna

_LISTED = 100_000
"""Of at most so many combinations ``random`` draws without putting back."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A trial that this worker has taken.

    Attributes:
        number: Counted from 0.
        params: Its values by the axes' keys.
        lock: Held until the trial is finished.
    """

    number: int
    params: Mapping[str, Any]
    lock: FileLock


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sweep is.

    Attributes:
        finished: The trials that are complete, pruned or failed.
        running: The trials that a worker has.
        budget: How many are to be finished.
    """

    finished: int
    running: int
    budget: int


@final
class Study:
    """The trials of one sweep.

    Args:
        config: The sweep's configuration.
        axes: Its axes.
        out: Its folder.
        base: Where a relative storage file starts.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ConfigError: If the storage's form is not known, or a grid has more points than ``sweep.trials``.
        MismatchError: If the storage holds a sweep of another configuration.
    """

    def __init__(self, config: RunConfig, axes: Sequence[Axis], out: Path, base: Path) -> None:
        self._optuna = _optuna()
        self._config, self._axes, self._out = config, tuple(axes), out
        self._lock = out / "sweep.lock"
        self.budget = _budget(config, axes)
        with self._alone():
            self._storage = _open_storage(self._optuna, config.sweep.storage, out, base)
            self._study = self._optuna.create_study(
                storage=self._storage, study_name=config.name, direction="maximize", load_if_exists=True
            )
            self._check_origin()

    def take(self) -> Taken | None:
        """The next trial to work on: one that a killed worker left, or a new one; None where neither is left.

        Raises:
            DataError: If the storage has finished trials whose results are not in the sweep's folder.
        """
        with self._alone():
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if not trial.state.is_finished():
                    lock = self._trial_lock(trial.number)
                    if lock.acquire(wait=False):
                        return Taken(trial.number, self._values(self._open(trial.number)), lock)
                elif read_outcome(self._out, trial.number) is None:
                    raise DataError(
                        f"{trial_folder(self._out, trial.number)}: the storage says that this trial is finished, but "
                        "its results are not there. Give the --out that the sweep was begun with"
                    )
            if len(trials) >= self.budget:
                return None
            lock = self._trial_lock(len(trials))
            lock.acquire(wait=True)
            return Taken(len(trials), self._values(self._study.ask()), lock)

    def report(self, number: int, step: int, score: float) -> None:
        """Record a trial's validation score; one that it had already reported before it was killed stays."""
        with self._alone():
            trial = self._open(number)
            if step not in self._study.get_trials(deepcopy=False)[number].intermediate_values:
                trial.report(score, step)

    def curves(self) -> dict[int, dict[int, float]]:
        """The reported scores by step, of each trial by number."""
        with self._alone():
            return {trial.number: dict(trial.intermediate_values) for trial in self._study.get_trials(deepcopy=False)}

    def finish(self, outcome: Outcome) -> None:
        """Tell the storage of a trial's outcome, which is in the trial's folder already."""
        states = self._optuna.trial.TrialState
        state = {COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}[outcome.state]
        with self._alone():
            trial = self._open(outcome.number)
            if outcome.reason:
                trial.set_user_attr("reason", outcome.reason)
            values = outcome.objective if outcome.state == COMPLETE else None
            self._study.tell(outcome.number, values, state=state)

    def progress(self) -> Progress:
        """How many trials are finished, running, and to be done."""
        with self._alone():
            done = [trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False)]
        return Progress(sum(done), len(done) - sum(done), self.budget)

    def _alone(self) -> Any:
        return locked(self._lock)

    def _trial_lock(self, number: int) -> FileLock:
        return FileLock(trial_folder(self._out, number) / "lock")

    def _open(self, number: int) -> optuna.Trial:
        study = self._storage.get_study_id_from_name(self._config.name)
        identity = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        trial: optuna.Trial = self._optuna.Trial(self._study, identity)
        return trial

    def _values(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's values: those that the storage has, and the others drawn.

        A value is a function of the seed, the trial's number and the axis (for TPE also of the trials before it), so
        that a sweep that is killed and started again goes on with the values that it would have had.
        """
        given = _point(self._config, self._axes, trial.number)
        return {axis.key: self._suggest(trial, axis, given) for axis in self._axes}

    def _suggest(self, trial: optuna.Trial, axis: Axis, given: Mapping[str, str] | None) -> Any:
        self._study.sampler = self._sampler(trial.number, axis, given)
        if axis.values:
            return axis.values[axis.labels.index(trial.suggest_categorical(axis.key, axis.labels))]
        if axis.whole:
            return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
        return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)

    def _sampler(self, number: int, axis: Axis, given: Mapping[str, str] | None) -> optuna.samplers.BaseSampler:
        samplers, sweep = self._optuna.samplers, self._config.sweep
        sampler: optuna.samplers.BaseSampler
        seed = seed_of(self._config.seed, "sweep", number, axis.key) % (1 << 32)
        if given is not None:
            sampler = samplers.PartialFixedSampler(dict(given), samplers.RandomSampler(seed))
        elif sweep.sampler == "tpe":
            sampler = samplers.TPESampler(n_startup_trials=sweep.startup, seed=seed)
        else:
            sampler = samplers.RandomSampler(seed)
        return sampler

    def _check_origin(self) -> None:
        """Refuse to go on with a sweep of another configuration; only ``sweep.trials`` may grow."""
        origin = _origin(self._config)
        if "origin" not in self._study.user_attrs:
            self._study.set_user_attr("origin", origin)
        for field, value in origin.items():
            found = self._study.user_attrs["origin"].get(field)
            if found != value:
                remedy = "Give another --out, or go back to the configuration that the sweep was begun with."
                raise MismatchError(f"{self._out}: sweep {self._config.name!r}", field, value, found, remedy)


def _optuna() -> Any:
    try:
        import optuna
        import sqlalchemy  # noqa: F401 - the storage needs it; optuna itself loads it late
    except ImportError as fault:
        raise MissingExtraError(fault.name or "optuna", "sweep") from fault
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def _open_storage(optuna: Any, storage: str | None, out: Path, base: Path) -> Any:
    kind, _, name = (storage or f"sqlite:///{out.resolve() / 'sweep.db'}").partition(":")
    if kind == "sqlite" and name.startswith("///"):
        return optuna.storages.RDBStorage(f"sqlite:///{_file(base, name[3:])}")
    if kind == "journal" and name:
        backend = optuna.storages.journal.JournalFileBackend(str(_file(base, name)))
        return optuna.storages.journal.JournalStorage(backend)
    raise ConfigError(f"sweep.storage: {storage!r} is neither sqlite:///FILE nor journal:FILE")


def _file(base: Path, name: str) -> Path:
    path = (base / name).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _origin(config: RunConfig) -> dict[str, str]:
    values = config.model_dump(mode="json")
    for section, name in (("sweep", "trials"), ("sweep", "storage"), ("train", "workers"), ("train", "log_every")):
        del values[section][name]
    return {section: fingerprint.of_value(value) for section, value in values.items() if section != "report"}


def _budget(config: RunConfig, axes: Sequence[Axis]) -> int:
    """How many trials are to be finished: ``sweep.trials``, or all combinations where they are fewer."""
    sweep, points = config.sweep, _combinations(axes)
    if sweep.sampler == "grid" and points is not None and points > sweep.trials:
        raise ConfigError(
            f"sweep.trials: the grid has {points} points, but sweep.trials = {sweep.trials}: raise it to {points}, "
            'or use sweep.sampler = "random"'
        )
    without_replacement = points is not None and (sweep.sampler == "grid" or _is_listed(config, axes))
    return min(sweep.trials, points) if without_replacement and points is not None else sweep.trials


def _combinations(axes: Sequence[Axis]) -> int | None:
    return math.prod(len(axis.values) for axis in axes) if all(axis.values for axis in axes) else None


def _is_listed(config: RunConfig, axes: Sequence[Axis]) -> bool:
    points = _combinations(axes)
    return config.sweep.sampler == "random" and points is not None and points <= _LISTED


def _point(config: RunConfig, axes: Sequence[Axis], number: int) -> dict[str, str] | None:
    """The values' labels where a trial's number alone decides them; None where a sampler draws.

    A grid counts with the last axis fastest. ``random`` over lists is the same grid, shuffled by the seed.
    """
    if config.sweep.sampler != "grid" and not _is_listed(config, axes):
        return None
    place = number
    if config.sweep.sampler == "random":
        order = list(range(_combinations(axes) or 0))
        random.Random(seed_of(config.seed, "sweep")).shuffle(order)
        place = order[number]
    point = next(itertools.islice(itertools.product(*(axis.labels for axis in axes)), place, None))
    return dict(zip((axis.key for axis in axes), point, strict=True))
