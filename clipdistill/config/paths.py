"""The files and folders that a configuration names: whether they are there, and their absolute paths."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from clipdistill.config.data import LISTS, DataConfig, Sources
from clipdistill.config.student import StudentConfig
from clipdistill.config.teacher import CacheConfig, TeacherConfig


class Sections(Protocol):
    """The sections that name files."""

    data: DataConfig
    teacher: TeacherConfig
    cache: CacheConfig
    student: StudentConfig


def _paths(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file or folder that the raw configuration names, with its dotted path."""
    data = raw.get("data")
    if isinstance(data, Mapping):
        named: list[tuple[str, Any]] = [(f"data.{part}", data.get(part)) for part in LISTS]
        sets = data.get("test")
        tests = sets if isinstance(sets, Mapping) else {"": sets}
        named += [(f"data.test.{name}".rstrip("."), value) for name, value in tests.items()]
        for dotted, value in named:
            for item in value if isinstance(value, list) else [value]:
                path = item.get("path") if isinstance(item, Mapping) else item
                if isinstance(path, str):
                    yield dotted, path
    for section, key in (("teacher", "embeddings"), ("student", "image_weights")):
        value = raw.get(section)
        if isinstance(value, Mapping) and isinstance(value.get(key), str):
            yield f"{section}.{key}", value[key]
    teacher = raw.get("teacher")
    if isinstance(teacher, Mapping) and str(teacher.get("model", "")).startswith("local-dir:"):
        yield "teacher.model", str(teacher["model"]).removeprefix("local-dir:")


def missing_files(raw: Mapping[str, Any], base: Path) -> Iterator[str]:
    """Every named file or folder that is not there: one sentence each, with where it was looked for."""
    for dotted, text in _paths(raw):
        path = base / text
        if "{" in text:
            continue  # a range of shards: the reader names the shard that is missing
        if glob.has_magic(text):
            if not glob.glob(str(path)):  # noqa: PTH207 - an absolute pattern, which Path.glob refuses
                yield f"{dotted}: nothing matches {text} (looked in {base})"
        elif not path.exists():
            yield f"{dotted}: no such file or folder: {text} (looked for {path})"


def anchored(config: Sections, base: Path) -> dict[str, Any]:
    """The sections with absolute paths, so that a run may be resumed from any folder."""

    def anchor(text: str | None) -> str | None:
        return None if text is None else str(base / text)

    def sources(items: Sources) -> Sources:
        return tuple(item.model_copy(update={"path": anchor(item.path), "root": anchor(item.root)}) for item in items)

    data, teacher, student = config.data, config.teacher, config.student
    model = teacher.model
    if model and model.startswith("local-dir:"):
        model = "local-dir:" + str(base / model.removeprefix("local-dir:"))
    lists = {name: sources(getattr(data, name)) for name in LISTS}
    tests = {name: sources(items) for name, items in data.test.items()}
    weights = teacher.pretrained
    if weights and (base / weights).is_file():
        weights = str(base / weights)
    own = student.pretrained
    if own and (base / own).is_file():
        own = str(base / own)
    return {
        "data": data.model_copy(update={**lists, "test": tests}),
        "teacher": teacher.model_copy(
            update={"model": model, "pretrained": weights, "embeddings": anchor(teacher.embeddings)}
        ),
        "cache": config.cache.model_copy(update={"folder": anchor(config.cache.folder)}),
        "student": student.model_copy(update={"image_weights": anchor(student.image_weights), "pretrained": own}),
    }
