"""A run's own teacher beside the student: live for the queries, its stored embeddings for the pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Searcher
from clipdistill.stages.inputs import load_data, name_checks
from clipdistill.stages.teachers import WholeTeacher, open_teachers, stored_rows, whole_teacher
from clipdistill.stages.workspace import Workspace


def open_beside(run: Path, keys: tuple[str, ...], index: Path | None, threads: int) -> tuple[str, Searcher]:
    """The teacher of a run, with an exact index of its embeddings of some pictures, or with an index that is given.

    Args:
        run: The run's folder, with its ``run.toml``.
        keys: The pictures that are searched.
        index: An index that the teacher's embeddings were built into; None takes those that the run stored.
        threads: For PyTorch; 0 = its own choice.

    Returns:
        The teacher's name, without the folders that it lies in, and the teacher with the index.

    Raises:
        ConfigError: If this is no run's folder, or the run has no live teacher.
        DataError: If the run has not stored the teacher's embeddings of these pictures.
        MismatchError: If stored embeddings or the index are of another teacher.
    """
    workspace = open_run(run)
    if threads:
        torch.set_num_threads(threads)
    teachers = open_teachers(workspace.config)
    whole = whole_teacher(workspace.config, teachers)
    if whole is None:
        raise ConfigError(
            f"--teacher: {run} has no more than a teacher's embeddings, and queries must be embedded too. Name the "
            "teacher itself: teacher.model"
        )
    if index is not None:
        return _shown(whole), Searcher(whole, VectorIndex.load(index, encoder=whole.fingerprint))
    data = load_data(workspace, note=False)
    cache = stored_rows(workspace, *data.stored(workspace.config), teachers)
    missing = [key for key in keys if cache is None or not cache.has_image(key)]
    if cache is None or missing:
        raise DataError(
            f"--teacher: {run} has no stored embeddings of {len(missing)} of the {len(keys)} indexed pictures (the "
            f"first: {missing[0]}). Make them with: clipdistill cache RUN.toml, or give --teacher-index"
        )
    return _shown(whole), Searcher(whole, VectorIndex.build(cache.image_rows(keys), keys, encoder=whole.fingerprint))


def open_run(folder: Path) -> Workspace:
    """A run by its folder.

    Raises:
        ConfigError: If it is none, or its configuration is no longer valid.
    """
    if not (folder / "run.toml").is_file():
        raise ConfigError(f"{folder}: no run's folder, as it has no run.toml. Give runs/NAME")
    return Workspace(RunConfig.load(folder / "run.toml", checks=[name_checks]), folder)


def _shown(teacher: WholeTeacher) -> str:
    return " + ".join(name.rpartition("/")[2] for name in teacher.name.split(" + "))
