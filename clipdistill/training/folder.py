"""A training's folder: checkpoints, the best student, the rejected pictures. Any of it may be cut short by a kill.

A checkpoint holds the best student's weights too, so that whatever a kill left of ``best/`` can be written again.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, final

from clipdistill.core import files, manifest
from clipdistill.core import fingerprint as fingerprints
from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Rejection
from clipdistill.training import checkpoint as checkpoints
from clipdistill.training import metrics as records
from clipdistill.training.budget import Plan
from clipdistill.training.state import Best, TrainingState

CHECKPOINTS, BEST, BEST_MANIFEST, REJECTED = "checkpoints", "best", "best.json", "rejected.jsonl"
PLAN = "plan.json"
_log = logging.getLogger("clipdistill")


class Saved(Protocol):
    """What the folder needs from a student."""

    def save(self, folder: Path) -> None:
        """Write the student to a folder, whole or not at all."""
        ...


@final
class TrainingFolder:
    """What a training leaves on disk.

    Args:
        path: The folder; None keeps nothing.
        fingerprint: Of everything that decides the run.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint

    def clear(self) -> None:
        """Remove everything that a training writes, and nothing else."""
        if self.path is not None:
            for name in (CHECKPOINTS, BEST, BEST_MANIFEST, REJECTED, PLAN, records.FILE, records.EVENTS):
                _remove(self.path / name)

    def resume(self, state: TrainingState, steps: int) -> None:
        """Bring a fresh state to the newest checkpoint, if there is one.

        Args:
            state: The state to change.
            steps: How many steps the run is to have.

        Raises:
            MismatchError: If the checkpoint is of another run, or further than ``steps``.
        """
        if self.path is None:
            return
        found = checkpoints.newest(self.path / CHECKPOINTS, self._fingerprint)
        if found is not None and found.step > steps:
            remedy = "Ask for as many steps or more, or train in another folder."
            raise MismatchError(str(self.path), "steps done", f"at most {steps}", found.step, remedy)
        if found is not None:
            state.restore(found, str(self.path / CHECKPOINTS))
            _log.info("going on after step %d of %d", state.step, steps)
        files.write_text(self.path / REJECTED, _lines(state.rejected.values()))

    def planned(self) -> Plan | None:
        """The plan that a run with a budget began with; None where there is none yet.

        Raises:
            MismatchError: If it is of another run.
        """
        if self.path is None or not (self.path / PLAN).exists():
            return None
        values = files.read_json(self.path / PLAN)
        found = values.pop("fingerprint", None)
        if found != self._fingerprint:
            remedy = "Train in another folder, or from the start with --force."
            raise MismatchError(str(self.path / PLAN), "fingerprint", self._fingerprint, found, remedy)
        return Plan(**values)

    def keep_plan(self, plan: Plan) -> None:
        """Write the plan, whole or not at all."""
        if self.path is not None:
            files.write_json(self.path / PLAN, asdict(plan) | {"fingerprint": self._fingerprint})

    def rehearse(self, student: Saved, state: TrainingState) -> None:
        """Write once, aside, what an evaluation leads to, to see what that takes."""
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=self.path) as aside:
            student.save(Path(aside) / BEST)
            checkpoints.save(Path(aside), state.to_checkpoint(), self._fingerprint)

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint."""
        if self.path is not None:
            checkpoints.save(self.path / CHECKPOINTS, state.to_checkpoint(), self._fingerprint)

    def keep_best(self, student: Saved, best: Best) -> None:
        """Save the student as the best, and then the manifest that says which it is."""
        if self.path is None:
            return
        student.save(self.path / BEST)
        digests = fingerprints.of_folder(self.path / BEST, skip=())
        files.write_json(self.path / BEST_MANIFEST, {"step": best.step, "score": best.score, "files": digests})

    def has_best(self, best: Best) -> bool:
        """Whether the folder holds this best student, whole."""
        if self.path is None:
            return True
        try:
            values = files.read_json(self.path / BEST_MANIFEST)
            manifest.verify_files(self.path / BEST, values["files"], "")
            return (values["step"], values["score"]) == (best.step, best.score)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def reject(self, rejections: Iterable[Rejection]) -> None:
        """Add pictures to the list of those that could not be read."""
        if self.path is not None:
            with (self.path / REJECTED).open("a", encoding="utf-8") as handle:
                handle.write(_lines(rejections))

    def last_checkpoint(self) -> str:
        """Where the newest checkpoint is, for a message."""
        found = checkpoints.folders(self.path / CHECKPOINTS) if self.path is not None else []
        return f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint"


def _lines(rejections: Iterable[Rejection]) -> str:
    return "".join(json.dumps(asdict(rejection)) + "\n" for rejection in rejections)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
