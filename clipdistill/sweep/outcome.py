"""What a trial came to: one JSON file in its folder, whole or absent, which the storage and the report follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.core import files

NAME = "trial.json"
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One training of a trial.

    Attributes:
        seed: Its seed.
        objective: The best validation score; None where none was reached.
        best_step: The step that it was reached at.
        curve: The validation score over the steps: (step, score), rising.
        seconds: Of training, over all its resumed parts, without the evaluations.
        parameters: Of the student.
        rows: Of training.
        picture_ms: Milliseconds a picture, end to end in batches; None where there are no pictures.
        text_ms: Milliseconds a text, in the same way.
        sets: For each evaluation set its text-to-image measures by name, exact search, cut-off 10.
    """

    seed: int
    objective: float | None = None
    best_step: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    parameters: int | None = None
    rows: int | None = None
    picture_ms: float | None = None
    text_ms: float | None = None
    sets: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished trial.

    Attributes:
        number: Counted from 0.
        state: ``complete``, ``pruned`` or ``failed``.
        params: Its values by the axes' keys.
        seeds: Its trainings, as far as they came.
        reason: Why it failed, or when it was stopped; empty for a complete one.
        repeats: The earlier trial with the same values, whose results these are; None where it was trained.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    seeds: tuple[SeedResult, ...]
    reason: str = ""
    repeats: int | None = None

    @property
    def objective(self) -> float | None:
        """The mean over the seeds of a complete trial; of a stopped one what it had reached; None for a failed one."""
        reached = [seed.objective for seed in self.seeds if seed.objective is not None]
        if self.state == FAILED or not reached:
            return None
        return sum(reached) / len(reached)

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        """The outcome of plain values."""
        seeds = tuple(
            SeedResult(**{**seed, "curve": tuple((int(step), float(score)) for step, score in seed["curve"])})
            for seed in values["seeds"]
        )
        return Outcome(**{**values, "seeds": seeds})


def trial_folder(out: Path, number: int) -> Path:
    """A trial's folder below the sweep's."""
    return out / "trials" / f"{number:04d}"


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Write a trial's outcome into its folder."""
    files.write_json(trial_folder(out, outcome.number) / NAME, outcome.to_json())


def read_outcome(out: Path, number: int) -> Outcome | None:
    """A trial's outcome; None where it is not finished."""
    path = trial_folder(out, number) / NAME
    return Outcome.from_json(files.read_json(path)) if path.exists() else None


def read_outcomes(out: Path) -> list[Outcome]:
    """The outcomes of all finished trials of a sweep, by number."""
    paths = sorted((out / "trials").glob(f"*/{NAME}"))
    return sorted((Outcome.from_json(files.read_json(path)) for path in paths), key=lambda outcome: outcome.number)
