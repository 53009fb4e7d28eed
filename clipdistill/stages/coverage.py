"""The diversity of the data: how well the training rows cover each set, in the teacher's space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar, final

from clipdistill.config import evaluation_sets
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Pair, Picture
from clipdistill.evaluation.coverage import MAX_QUERIES, MAX_ROWS, Coverage, cover
from clipdistill.retrieval.exact import Vectors
from clipdistill.stages.inputs import RunData
from clipdistill.stages.teachers import WholeTeacher, stored_rows, whole_teacher
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.teacher import Teacher

SAMPLE_ROWS, SAMPLE_QUERIES = 256, 128
"""So many training rows, and so many of each set, are embedded where no cache is at hand."""
PATIENCE_S = 60.0
"""A sample that takes the teacher longer than this, at its measured rate, is left for the cache to answer."""
Item = TypeVar("Item")


class Embeddings(Protocol):
    """What coverage needs: a teacher cache, or :class:`_Live`."""

    def image_rows(self, keys: Sequence[str]) -> Vectors:
        """Unit rows [keys, dim] of whole pictures."""
        ...

    def text_rows(self, texts: Sequence[str]) -> Vectors:
        """Unit rows [texts, dim]."""
        ...


def coverage(
    workspace: Workspace, data: RunData, teachers: Sequence[Teacher | None], pictures_per_s: float, texts_per_s: float
) -> dict[str, Any]:
    """Measure how well ``train`` (with the unpaired rows) covers ``val`` and each evaluation set.

    Args:
        workspace: The run.
        data: Its rows.
        teachers: The live teacher, or the ensemble's; None for each whose embeddings are adopted.
        pictures_per_s: The live teacher's rate; 0 where it was not measured.
        texts_per_s: The same.

    Returns:
        ``from``: ``cache``, ``embeddings`` or ``sample``, or None where nothing was measured; ``note``: why it was not,
        or only on a sample; ``sets``: by set name, by ``pictures`` and ``texts``, the values of
        :class:`~clipdistill.evaluation.coverage.Coverage` with its ``faults``.
    """
    names = dict.fromkeys(("val", *evaluation_sets(workspace.config)))
    asked = {name: list(data.sets[name].pairs) for name in names if data.sets.get(name)}
    if not asked or not data.sets.get("train"):
        return _result(None, "a training set and a set to cover are needed")
    try:
        cache, note = stored_rows(workspace, data.pairs, data.texts, teachers), "there is no teacher cache yet"
    except (DataError, MismatchError) as fault:
        cache, note = None, f"the stored embeddings do not fit: {fault}"
    if cache is not None:
        refused = {row.key for row in cache.rejected}
        asked = {name: [pair for pair in pairs if pair.key not in refused] for name, pairs in asked.items()}
        measured = _measured(data.without(refused), asked, cache, MAX_ROWS, MAX_QUERIES)
        return _result("embeddings" if cache.facts.get("adopted") else "cache", None, measured)
    teacher = whole_teacher(workspace.config, teachers)
    if teacher is None:
        return _result(None, note)
    rows = SAMPLE_ROWS + SAMPLE_QUERIES * len(asked)
    seconds = sum(rows / rate for rate in (pictures_per_s, texts_per_s) if rate)
    if seconds > PATIENCE_S:
        return _result(None, f"{note}, and a sample would take the teacher {seconds:.0f} s; inspect again after cache")
    live = _Live(teacher, data)
    return _result("sample", note, _measured(data, asked, live, SAMPLE_ROWS, SAMPLE_QUERIES))


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spread over them."""
    taken = min(len(items), most)
    return [items[number * len(items) // taken] for number in range(taken)]


@final
class _Live:
    """A live teacher asked by key: pictures that cannot be read are left out, as the cache would refuse them."""

    def __init__(self, teacher: WholeTeacher, data: RunData) -> None:
        self._teacher = teacher
        self._pictures = {pair.key: pair.picture for pair in data.pairs}

    def image_rows(self, keys: Sequence[str]) -> Vectors:
        return self._teacher.encode_images(readable(self._teacher, [self._pictures[key] for key in keys]))

    def text_rows(self, texts: Sequence[str]) -> Vectors:
        return self._teacher.encode_texts(texts)


def readable(teacher: WholeTeacher, pictures: Sequence[Picture | None]) -> list[Picture]:
    """The pictures that decode: one bad row must not spoil an estimate; it is refused, with its reason, when cached."""
    good = []
    for picture in pictures:
        try:
            if picture is not None:
                decode(picture.read(), teacher.max_pixels, picture.origin)
                good.append(picture)
        except (DataError, OSError):
            continue
    return good


def _measured(
    data: RunData, asked: Mapping[str, Sequence[Pair]], known: Embeddings, rows: int, queries: int
) -> dict[str, Any]:
    """The coverage of each set by at most so many of the training rows, for at most so many of its own."""
    train = (*data.sets["train"].pairs, *data.images)
    sets: dict[str, Any] = {name: {} for name in asked}
    for kind, names_of, rows_of, more in (
        ("pictures", _keys, known.image_rows, ()),
        ("texts", _texts, known.text_rows, data.texts),
    ):
        taught = evenly(list(dict.fromkeys([*names_of(train), *more])), rows)
        vectors = rows_of(taught)
        for name, pairs in asked.items():
            found = rows_of(evenly(names_of(pairs), queries))
            if len(found) and len(vectors) > 1:
                sets[name][kind] = _plain(cover(found, vectors))
    return sets


def _result(origin: str | None, note: str | None, sets: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"from": origin, "note": note, "sets": dict(sets or {})}


def _plain(found: Coverage) -> dict[str, Any]:
    return {**asdict(found), "faults": list(found.faults)}


def _keys(pairs: Sequence[Pair]) -> list[str]:
    return [pair.key for pair in pairs if pair.picture is not None]


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in pair.captions))
