"""The compression stage: the smallest width and index that keep a target, chosen on ``val`` and measured elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from clipdistill.cache import AnyCache
from clipdistill.compression import (
    Asked,
    Candidate,
    Cut,
    Sides,
    Step,
    budget_rows,
    choose,
    cuts,
    exact_step,
    front,
    halves,
    index_step,
    nearest,
    try_all,
)
from clipdistill.compression.truncation import WHOLE
from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError, DataError, ParityError
from clipdistill.data.records import Pair
from clipdistill.evaluation import judged
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import QuerySide
from clipdistill.stages.index import indexed_pairs
from clipdistill.stages.inputs import RunData
from clipdistill.stages.teachers import WholeTeacher
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher

SCHEMA = "clipdistill.recall-budget/1"
VAL = "val"
LEAST_COSINE = 0.9999
_FITTED = 4096
_PROBED = 64
_log = logging.getLogger("clipdistill")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """What every combination is made from.

    Attributes:
        asked: The sets by name, ``val`` first.
        sides: The whole student's embeddings of them.
        keys: The names of the rows of the shipped index.
        gallery: The whole embeddings of these rows.
        cuts: The ways to narrow.
        encoder: The fingerprint that an index of uncut vectors carries.
        probe: Rows of ``val`` that a narrower student is compared on.
    """

    asked: Mapping[str, Asked]
    sides: Mapping[str, Sides]
    keys: tuple[str, ...]
    gallery: Vectors
    cuts: tuple[Cut, ...]
    encoder: str
    probe: tuple[Pair, ...]


def compress(
    workspace: Workspace,
    data: RunData,
    cache: AnyCache,
    student: DualEncoder,
    teacher: WholeTeacher | None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Search the smallest combination that keeps ``compress.target``, and write ``compressed/`` with its recall budget.

    Where the target is kept, the folder holds the narrower ``student`` and its ``index``; ``budget.json`` in any case.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The teacher's embeddings of the sets.
        student: The finished student.
        teacher: The live teacher, for its size; None where its embeddings alone are given.
        force: Do it again.

    Returns:
        The budget as plain values: schema ``clipdistill.recall-budget/1``.

    Raises:
        ConfigError: If there is nothing to choose on or to compress.
        DataError: If a set has no texts to ask with, or nothing of ``val`` is found even uncompressed.
        ParityError: If the narrower student does not make the vectors that were measured.
    """
    config = workspace.config
    _check(config, data)
    made_from = {
        "student": student.fingerprint,
        "teacher cache": cache.fingerprint,
        "data": data.fingerprint,
        "compress": fingerprint.of_value(
            [config.compress.model_dump(mode="json"), list(config.index.sets), list(evaluation_sets(config))]
        ),
    }
    if workspace.is_done("compress", made_from, workspace.compressed, force=force):
        return dict(files.read_json(workspace.budget_json))
    found = _material(workspace, data, cache, student)
    budget = _search(config, found, student, teacher)
    _save(workspace, budget, found, student)
    workspace.mark_done("compress", made_from)
    return budget


def _check(config: RunConfig, data: RunData) -> None:
    if config.task.kind != "retrieval":
        raise ConfigError(f"task.kind: compress measures retrieval, not {config.task.kind!r}")
    if VAL not in data.sets or not len(data.sets[VAL]):
        raise ConfigError("compress: the choice is made on val, which has no rows; give data.val or data.hold_out.val")
    for name in evaluation_sets(config):
        if name not in data.sets or not len(data.sets[name]):
            raise ConfigError(f"evaluate.sets: the set {name!r} has no rows; give data.test or data.hold_out.test")


def _material(workspace: Workspace, data: RunData, cache: AnyCache, student: DualEncoder) -> _Material:
    config = workspace.config
    names = dict.fromkeys((VAL, *evaluation_sets(config)))
    pairs = indexed_pairs(workspace, data)
    keys = tuple(pair.key for pair in pairs)
    asked = {name: _asked(name, data.sets[name].pairs, cache) for name in names}
    images = _Images(student, cache)
    sides = {name: Sides(_texts(student, data.sets[name].pairs), images.of(data.sets[name].pairs)) for name in names}
    gallery = images.of(pairs)
    ways: tuple[Cut, ...]
    if student.searches is not None:
        encoder, ways = student.searches.fingerprint, (Cut(gallery.shape[1], WHOLE),)
    else:
        dims = config.compress.dims or halves(student.dim)
        fitted = _fitted(student, data, images) if any(dim < student.dim for dim in dims) else gallery
        encoder, ways = student.fingerprint, tuple(cuts(dims, config.compress.rotations, fitted))
    return _Material(asked, sides, keys, gallery, ways, encoder, data.sets[VAL].pairs[:_PROBED])


class _Images:
    """The embeddings of pictures, each embedded once."""

    def __init__(self, student: DualEncoder, cache: AnyCache) -> None:
        self._student, self._cache = student, cache
        self._rows: dict[str, Vectors] = {}

    def of(self, pairs: Sequence[Pair]) -> Vectors:
        """Those of the pairs that have a picture: unit rows in the pairs' order."""
        shown = [pair for pair in pairs if pair.picture is not None]
        missing = [pair for pair in shown if pair.key not in self._rows]
        if self._student.searches is not None:
            vectors = self._cache.image_rows([pair.key for pair in missing])
        else:
            vectors = self._student.encode_images([pair.picture for pair in missing if pair.picture is not None])
        self._rows |= {pair.key: row for pair, row in zip(missing, vectors, strict=True)}
        if not shown:
            raise DataError("index.sets: hold no pictures to index")
        return np.stack([self._rows[pair.key] for pair in shown]).astype(np.float32, copy=False)


def _asked(name: str, pairs: tuple[Pair, ...], cache: AnyCache) -> Asked:
    """A set's texts that have an answer asking for its pictures."""
    rows = judged(name, pairs)
    places = _places(pairs)
    if not places or not rows.keys:
        raise DataError(f"{name}: no picture has a caption; the recall budget is measured from texts to pictures")
    texts = [rows.texts[place] for place in places]
    teacher = Sides(cache.text_rows(texts), cache.image_rows(rows.keys))
    return Asked(name, rows.keys, tuple(rows.relevant_pictures[place] for place in places), teacher)


def _places(pairs: tuple[Pair, ...]) -> list[int]:
    return [place for place, answers in enumerate(judged("", pairs).relevant_pictures) if answers]


def _texts(student: DualEncoder, pairs: tuple[Pair, ...]) -> Vectors:
    rows = judged("", pairs)
    encoder = student if student.searches is None else QuerySide(student)
    return encoder.encode_texts([rows.texts[place] for place in _places(pairs)])


def _fitted(student: DualEncoder, data: RunData, images: _Images) -> Vectors:
    """The embeddings whose principal axes are taken: of training pictures and of their texts, evenly spread."""
    pairs = data.sets["train"].pairs if "train" in data.sets else ()
    rows = [*(pair for pair in pairs if pair.picture is not None), *data.images]
    if not rows:
        raise DataError('compress.rotations: "pca" needs training pictures; give data.train, or set ["leading"]')
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions)) or list(data.texts)
    return np.concatenate([images.of(_spread(rows)), student.encode_texts(_spread(texts))])


def _spread(rows: Sequence[Row]) -> list[Row]:
    step = max(1, -(-len(rows) // _FITTED))
    return list(rows[::step])


def _search(config: RunConfig, found: _Material, student: DualEncoder, teacher: WholeTeacher | None) -> dict[str, Any]:
    """Try all on ``val``, choose, and measure the choice and the front on every set."""
    rules, val = config.compress, found.asked[VAL]
    sizes = {id(cut): _megabytes(cut.student(student)) for cut in found.cuts}
    candidates, left_out = try_all(
        found.cuts,
        rules.factories,
        val,
        found.sides[VAL],
        found.gallery,
        k=rules.k,
        of=rules.target.of,
        megabytes=lambda cut: sizes[id(cut)],
    )
    chosen = choose(candidates, rules.target)
    miss = None if chosen else nearest(candidates, rules.target)
    shown = chosen or (miss.candidate if miss else candidates[0])
    for reason in left_out:
        _log.warning("left out: %s", reason)
    steps = _steps(found, shown, student, teacher)
    return {
        "schema": SCHEMA,
        "student_fingerprint": student.fingerprint,
        "k": rules.k,
        "target": rules.target.model_dump(mode="json"),
        "met": chosen is not None,
        "chosen": asdict(shown),
        "missed": None if miss is None else {**asdict(miss), "says": str(miss)},
        "candidates": [asdict(one) for one in candidates],
        "left_out": left_out,
        "rows": [asdict(row) for one in found.asked.values() for row in budget_rows(steps, one, rules.k)],
        "curve": _curve(found, candidates, rules.k),
        "vectors": len(found.keys),
        "libraries": manifest.libraries(),
    }


def _megabytes(model: DualEncoder) -> float:
    return model.parameters * 4 / 1e6


def _steps(found: _Material, shown: Candidate, student: DualEncoder, teacher: WholeTeacher | None) -> list[Step]:
    """From the teacher's exact search to the combination's index."""
    whole, cut = _megabytes(student), _cut_of(found, shown)
    steps = [
        exact_step(
            "teacher, exact search", {name: one.teacher for name, one in found.asked.items()}, _size(teacher, student)
        ),
        exact_step("student, exact search", found.sides, whole),
    ]
    short = _shortened(found, cut)
    if cut.rotation != WHOLE:
        steps.append(exact_step(f"cut to {cut.dim} ({cut.rotation})", short, shown.megabytes))
    index = _index(found, shown, "candidate")
    return [*steps, index_step(f"index {index.factory}", short, index, shown.megabytes)]


def _size(teacher: WholeTeacher | None, student: DualEncoder) -> float | None:
    """The teacher's megabytes: of its text tower alone where the student has no other."""
    if teacher is None:
        return None
    spared = teacher.picture_parameters if student.searches is not None and isinstance(teacher, Teacher) else 0
    return (teacher.parameters - spared) * 4 / 1e6


def _cut_of(found: _Material, one: Candidate) -> Cut:
    return next(cut for cut in found.cuts if (cut.dim, cut.rotation) == (one.dim, one.rotation))


def _shortened(found: _Material, cut: Cut) -> dict[str, Sides]:
    return {name: Sides(cut.rows(side.queries), cut.rows(side.gallery)) for name, side in found.sides.items()}


def _index(found: _Material, one: Candidate, encoder: str) -> VectorIndex:
    rows = _cut_of(found, one).rows(found.gallery)
    return VectorIndex.build(rows, found.keys, factory=one.factory, encoder=encoder)


def _curve(found: _Material, candidates: Sequence[Candidate], k: int) -> list[dict[str, Any]]:
    """Retention of the teacher's success against bytes a vector, of the combinations that none beats on ``val``."""
    points = []
    for one in front(candidates):
        short, index = _shortened(found, _cut_of(found, one)), _index(found, one, "candidate")
        for name, asked in found.asked.items():
            first = exact_step("teacher", {name: asked.teacher}, None)
            row = budget_rows([first, index_step(one.factory, short, index, one.megabytes)], asked, k)[1]
            ends = {key: getattr(row, key) for key in ("success", "retention", "retention_low", "retention_high")}
            points.append({**asdict(one), "set": name, "overlap": row.overlap, **ends})
    return points


def _save(workspace: Workspace, budget: dict[str, Any], found: _Material, student: DualEncoder) -> None:
    with files.replaced_folder(workspace.compressed) as aside:
        if budget["met"]:
            chosen = Candidate(**budget["chosen"])
            small = _cut_of(found, chosen).student(student)
            _check_parity(small, found, _cut_of(found, chosen))
            encoder = found.encoder if small is student else small.fingerprint
            small.save(aside / "student", {"compressed_from": student.fingerprint})
            _index(found, chosen, encoder).save(aside / "index")
        files.write_json(aside / workspace.budget_json.name, budget)


def _check_parity(small: DualEncoder, found: _Material, cut: Cut) -> None:
    """The saved student has to make the vectors that were measured: its last layers may not be what was assumed."""
    if cut.rotation == WHOLE:
        return
    rows, whole = judged(VAL, found.probe), found.gallery.shape[1]
    made = {
        "text": (small.encode_texts([rows.texts[place] for place in _places(found.probe)]), found.sides[VAL].queries),
        "picture": (small.encode_images(rows.pictures), found.sides[VAL].gallery),
    }
    for side, (own, measured) in made.items():
        worst = float(np.einsum("nd,nd->n", own, cut.rows(measured[: len(own)])).min())
        if worst < LEAST_COSINE:
            raise ParityError(
                f"compressed student: the worst {side} embedding has a cosine of {worst:.6f} with the one that was "
                f"measured, needed {LEAST_COSINE}: its last layers cannot be cut. Set compress.dims=[{whole}]"
            )
