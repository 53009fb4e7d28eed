"""A run's folder: where each artefact lies, and whether what lies there was made from the present inputs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import MemberConfig, RunConfig, TeacherConfig
from clipdistill.core import files
from clipdistill.core.errors import MismatchError

_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True)
class Workspace:
    """The paths of one run.

    Attributes:
        config: The run's configuration.
        folder: The run's folder.
    """

    config: RunConfig
    folder: Path

    @staticmethod
    def of(config: RunConfig, out: Path | None = None) -> Workspace:
        """The workspace of a run: ``out``, or ``runs/NAME`` in the present folder."""
        return Workspace(config, out or Path("runs") / config.name)

    @property
    def cache(self) -> Path:
        """The teacher cache's folder; it may be shared between runs."""
        return Path(self.config.cache.folder) if self.config.cache.folder else self.folder / "cache"

    def cache_of(self, teacher: TeacherConfig | MemberConfig) -> Path:
        """Where a teacher's embeddings lie: the whole cache's folder, or a member's own."""
        if isinstance(teacher, MemberConfig):
            return Path(teacher.cache) if teacher.cache else self.cache / teacher.folder
        return self.cache

    @property
    def training(self) -> Path:
        """Checkpoints, the best student so far, metrics and TensorBoard events."""
        return self.folder / "training"

    @property
    def student(self) -> Path:
        """The finished student: an open_clip ``local-dir:`` folder."""
        return self.folder / "student"

    @property
    def combined(self) -> Path:
        """The teacher's picture tower with a student that is a text tower alone: an open_clip ``local-dir:`` folder."""
        return self.folder / "combined"

    @property
    def mutual(self) -> Path:
        """The teacher that was trained with the student in mutual mode: an open_clip ``local-dir:`` folder."""
        return self.folder / "mutual_teacher"

    @property
    def index(self) -> Path:
        """The FAISS index over the student's picture embeddings, or the teacher's where the student has none."""
        return self.folder / "index"

    @property
    def compressed(self) -> Path:
        """The smallest student, its export and its index that keep the target, with the recall budget."""
        return self.folder / "compressed"

    @property
    def recovery(self) -> Path:
        """The trainings of pruned students that compression tries, each in a folder of its own."""
        return self.folder / "recovery"

    @property
    def budget_json(self) -> Path:
        """What each step from the teacher to the compressed index costs."""
        return self.compressed / "budget.json"

    @property
    def export(self) -> Path:
        """The student in the layouts that its consumers read, where no other folder is asked for."""
        return self.folder / "export"

    @property
    def report_json(self) -> Path:
        """All measured figures."""
        return self.folder / "report.json"

    @property
    def report_html(self) -> Path:
        """The page that is made from them."""
        return self.folder / "report.html"

    @property
    def rejected(self) -> Path:
        """The rows that were refused, with reasons."""
        return self.folder / "rejected.jsonl"

    def begin(self) -> None:
        """Make the folder, and note the resolved configuration in a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "run.toml").exists():
            self._note_config()

    def note(self, stage: str) -> Path:
        """The note that says from which inputs a stage's artefact was made."""
        return self.folder / "stages" / f"{stage}.json"

    def is_done(self, stage: str, made_from: dict[str, Any], artefact: Path, *, force: bool) -> bool:
        """Whether a stage's artefact is there and was made from these inputs.

        Args:
            stage: The stage's name.
            made_from: Fingerprints of all that decides the artefact, by name.
            artefact: The file or folder that the stage makes.
            force: Remove what is there and say no.

        Raises:
            MismatchError: If it was made from other inputs, naming the first that differs and both values.
        """
        note = self.note(stage)
        if force:
            note.unlink(missing_ok=True)
            _remove(artefact)
            return False
        if not note.exists() or not artefact.exists():
            return False
        found = files.read_json(note)
        for field, value in made_from.items():
            if found.get(field) != value:
                remedy = f"Give another --out, or make it again with: clipdistill {stage} ... --force"
                raise MismatchError(str(artefact), field, value, found.get(field), remedy)
        _log.info("%s: already done, kept (%s)", stage, artefact)
        return True

    def mark_done(self, stage: str, made_from: dict[str, Any]) -> None:
        """Note from which inputs a stage's artefact was made, after it is whole, and the configuration that made it."""
        files.write_json(self.note(stage), made_from)
        self._note_config()

    def _note_config(self) -> None:
        files.write_text(self.folder / "run.toml", self.config.to_toml())


def read_metrics(workspace: Workspace) -> list[Mapping[str, Any]]:
    """The training's metrics, one mapping a logged step; none where there was no training yet.

    Of a training in phases, those of all of them: the steps are counted through, and each line has its ``phase``.
    """
    shares = workspace.config.student.inherit.schedule
    if not shares:
        return _lines(workspace.training)
    steps = workspace.config.train.steps // len(shares)
    return [
        {**line, "step": line["step"] + place * steps, "phase": place + 1}
        for place in range(len(shares))
        for line in _lines(workspace.training / f"phase-{place + 1}")
    ]


def _lines(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
