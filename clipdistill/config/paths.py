"""The files and folders that a configuration names: whether they are there, and their absolute paths."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from clipdistill.config.data import LISTS, DataConfig, Sources
from clipdistill.config.export import ExportConfig
from clipdistill.config.student import StudentConfig
from clipdistill.config.teacher import CacheConfig, MemberConfig, TeacherConfig

MANIFEST = "manifest.json"
_FOLDER = "local-dir:"


class Sections(Protocol):
    """The sections that name files."""

    data: DataConfig
    teacher: TeacherConfig
    cache: CacheConfig
    student: StudentConfig
    export: ExportConfig


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
    student = raw.get("student")
    if isinstance(student, Mapping) and isinstance(student.get("image_weights"), str):
        yield "student.image_weights", student["image_weights"]
    for dotted, teacher in raw_teachers(raw):
        if isinstance(teacher.get("embeddings"), str):
            yield f"{dotted}.embeddings", teacher["embeddings"]
        if str(teacher.get("model", "")).startswith(_FOLDER):
            yield f"{dotted}.model", str(teacher["model"]).removeprefix(_FOLDER)


def raw_teachers(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The raw configuration's teachers, one or the members of an ensemble, each with its dotted path."""
    teacher = raw.get("teacher")
    if not isinstance(teacher, Mapping):
        return
    yield "teacher", teacher
    members = teacher.get("members")
    for number, member in enumerate(members if isinstance(members, list | tuple) else ()):
        if isinstance(member, Mapping):
            yield f"teacher.members.{number}", member


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


def missing_scales(raw: Mapping[str, Any], base: Path) -> Iterator[str]:
    """Every folder of embeddings whose model's scale is neither given nor in a manifest beside them."""
    for dotted, teacher in raw_teachers(raw):
        folder = teacher.get("embeddings")
        if isinstance(folder, str) and teacher.get("logit_scale") is None and not (base / folder / MANIFEST).is_file():
            yield (
                f"{dotted}.logit_scale: missing: embeddings without a {MANIFEST} of ours need the exp(logit_scale) of "
                "the model that made them (100.0 for most CLIP models)"
            )


def anchored(config: Sections, base: Path) -> dict[str, Any]:
    """The sections with absolute paths, so that a run may be resumed from any folder."""

    def anchor(text: str | None) -> str | None:
        return None if text is None else str(base / text)

    def sources(items: Sources) -> Sources:
        return tuple(item.model_copy(update={"path": anchor(item.path), "root": anchor(item.root)}) for item in items)

    def model(text: str | None) -> str | None:
        return _FOLDER + str(base / text.removeprefix(_FOLDER)) if text and text.startswith(_FOLDER) else text

    def weights(text: str | None) -> str | None:
        return anchor(text) if text and (base / text).is_file() else text

    def named(teacher: TeacherConfig | MemberConfig) -> dict[str, str | None]:
        return {
            "model": model(teacher.model),
            "pretrained": weights(teacher.pretrained),
            "embeddings": anchor(teacher.embeddings),
        }

    data, teacher, student = config.data, config.teacher, config.student
    members = tuple(
        member.model_copy(update={**named(member), "cache": anchor(member.cache)}) for member in teacher.members
    )
    lists = {name: sources(getattr(data, name)) for name in LISTS}
    tests = {name: sources(items) for name, items in data.test.items()}
    return {
        "data": data.model_copy(update={**lists, "test": tests}),
        "teacher": teacher.model_copy(update={**named(teacher), "members": members}),
        "cache": config.cache.model_copy(update={"folder": anchor(config.cache.folder)}),
        "export": config.export.model_copy(update={"web_vendor": anchor(config.export.web_vendor)}),
        "student": student.model_copy(
            update={"image_weights": anchor(student.image_weights), "pretrained": weights(student.pretrained)}
        ),
    }
