"""The compression stage: the smallest combination that keeps a target, chosen on ``val`` and measured elsewhere too."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipdistill.cache import AnyCache
from clipdistill.compression import (
    BudgetRow,
    Candidate,
    Cut,
    Judge,
    Sides,
    Step,
    Variant,
    budget_rows,
    exact_step,
    front,
    index_step,
    most_lost,
    nearest,
    try_all,
)
from clipdistill.compression.truncation import WHOLE
from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError
from clipdistill.retrieval.index import VectorIndex
from clipdistill.stages.compress_forms import Form, check_forms, forms, runtime
from clipdistill.stages.compress_rows import VAL, Rows, asking
from clipdistill.stages.compress_shipped import Attempt, Shipped, Shipping, attempts, shown, timed
from clipdistill.stages.inputs import RunData
from clipdistill.stages.teachers import WholeTeacher
from clipdistill.stages.train import loss_weights
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher

SCHEMA = "clipdistill.recall-budget/2"
_CARD = {"probes", "licence", "teacher_licence", "data_licence"}
_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """What a search found.

    Attributes:
        rows: What is embedded.
        student: The uncompressed student.
        teacher: The live teacher; None where its embeddings alone are given.
        whole: The uncompressed student's embeddings by the set's name.
        candidates: All combinations.
        left_out: A sentence for each that cannot be made.
        attempts: The combinations that were exported.
        one: The one that is told.
        form: The form of the student that it is of.
        cut: How it is narrowed.
        shipped: It, as it is shipped.
        index: Its index.
    """

    rows: Rows
    student: DualEncoder
    teacher: WholeTeacher | None
    whole: Mapping[str, Sides]
    candidates: Sequence[Candidate]
    left_out: Sequence[str]
    attempts: Sequence[Attempt]
    one: Candidate
    form: Form
    cut: Cut
    shipped: Shipped
    index: VectorIndex

    @property
    def met(self) -> bool:
        """Whether the target is kept."""
        return self.attempts[-1].met


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

    A combination is a share of the picture tower's channels, a width, a precision of the graphs and an index. All are
    measured on ``val``; the smallest that keeps the target is then really exported, and has to keep it once more as the
    runtime embeds it. Where one does, the folder holds that ``export``, its ``index`` (of what the runtime embeds) and
    the ``student`` that it was made from in PyTorch; ``budget.json`` in any case.

    Megabytes are of the towers: what the runtime loads of an export, as it lies on disk (the graphs of one precision
    and the tokenizer). Of the teacher, and of the steps that PyTorch embeds, they are the weights in float32.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The teacher's embeddings of the sets.
        student: The finished student.
        teacher: The live teacher, for its size and speed; None where its embeddings alone are given.
        force: Do it again; what pruned students learnt is kept where it is of the same inputs.

    Returns:
        The budget as plain values: schema ``clipdistill.recall-budget/2``.

    Raises:
        ConfigError: If there is nothing to choose on or to compress, or the picture tower cannot be pruned.
        DataError: If a set has no texts to ask with, or nothing of ``val`` is found even uncompressed.
        MissingExtraError: If a library is missing that writes graphs, or prunes.
        ParityError: If no combination can be exported.
    """
    config = workspace.config
    _check(config, data)
    check_forms(config, student)
    made_from = _made_from(config, data, cache, student)
    if workspace.is_done("compress", made_from, workspace.compressed, force=force):
        return dict(files.read_json(workspace.budget_json))
    with tempfile.TemporaryDirectory(prefix="clipdistill-") as scratch:
        rows = Rows.of(workspace, data, cache, student)
        made, refused = forms(workspace, rows, student, Path(scratch))
        found = _search(config, rows, made, refused, student, teacher, Path(scratch))
        budget = _budget(config, found, made)
        _save(workspace, budget, found)
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


def _made_from(config: RunConfig, data: RunData, cache: AnyCache, student: DualEncoder) -> dict[str, Any]:
    rules = config.compress
    recovery = [dataclasses.asdict(loss_weights(config.loss)), config.train.model_dump(mode="json"), config.seed]
    parts = [rules.model_dump(mode="json"), list(config.index.sets), list(evaluation_sets(config))]
    return {
        "student": student.fingerprint,
        "teacher cache": cache.fingerprint,
        "data": data.fingerprint,
        "compress": fingerprint.of_value(parts),
        "export": fingerprint.of_value(config.export.model_dump(mode="json", include=_CARD)),
        **({"recovery": fingerprint.of_value(recovery)} if any(share < 1 for share in rules.prune) else {}),
    }


def _search(
    config: RunConfig,
    rows: Rows,
    made: Sequence[Form],
    refused: Sequence[str],
    student: DualEncoder,
    teacher: WholeTeacher | None,
    scratch: Path,
) -> _Search:
    """Try all on ``val``, and export what seems smallest."""
    rules = config.compress
    whole = next((form.sides for form in made if form.share == 1), None) or rows.embedded(asking(student))[0]
    judge = Judge.of(rows.asked[VAL], rows.asked[VAL].teacher if rules.target.of == "teacher" else whole[VAL], rules.k)
    variants = [variant for form in made for variant in form.variants.values()]
    candidates, left_out = try_all(variants, rules.factories, judge)
    for reason in left_out:
        _log.warning("left out: %s", reason)
    shipping = Shipping(config, rows, made, scratch)
    tried = attempts(shipping, candidates, judge, rules.target)
    one = shown(tried, rules.target)
    shipped = shipping.ship(one)
    return _Search(
        rows=rows,
        student=student,
        teacher=teacher,
        whole=whole,
        candidates=candidates,
        left_out=[*refused, *left_out],
        attempts=tried,
        one=one,
        form=shipping.form(one),
        cut=shipping.cut(one),
        shipped=shipped,
        index=shipped.index(rows.keys, one.factory),
    )


def _budget(config: RunConfig, found: _Search, made: Sequence[Form]) -> dict[str, Any]:
    rules = config.compress
    steps = _steps(found)
    if rules.speeds:
        steps = _timed(found, steps)
    sets = {name: budget_rows(steps, asked, rules.k) for name, asked in found.rows.asked.items()}
    return {
        "schema": SCHEMA,
        "student_fingerprint": found.student.fingerprint,
        "k": rules.k,
        "target": rules.target.model_dump(mode="json"),
        "met": found.met,
        "chosen": asdict(found.one),
        "missed": None if found.met else _missed(found, config),
        "attempts": [asdict(one) for one in found.attempts],
        "candidates": [asdict(one) for one in found.candidates],
        "left_out": list(found.left_out),
        "rows": [asdict(row) for rows in sets.values() for row in rows],
        "most_lost": {name: _loss(most_lost(rows)) for name, rows in sets.items()},
        "curve": _curve(found, made, rules.k),
        "vectors": len(found.rows.keys),
        "libraries": manifest.libraries(),
    }


def _missed(found: _Search, config: RunConfig) -> dict[str, Any]:
    miss = nearest([found.one], config.compress.target)
    return {**asdict(miss), "says": str(miss)}


def _loss(row: BudgetRow | None) -> dict[str, Any] | None:
    return None if row is None else {"kind": row.kind, "step": row.step, "lost": row.lost}


def _steps(found: _Search) -> list[Step]:
    """From the teacher's exact search to the exported runtime; a step that changes nothing is left out."""
    one, form, cut, names = found.one, found.form, found.cut, found.rows.asked
    variant, size = form.variants[one.precision], found.shipped.megabytes
    teacher = {name: asked.teacher for name, asked in names.items()}
    steps = [
        exact_step("teacher", "teacher, exact search", teacher, _teacher_megabytes(found.teacher, found.student)),
        exact_step("student", "student, exact search", found.whole, _megabytes(found.student)),
    ]
    if form.share < 1:
        name = f"pruned to {form.share:.0%} of the channels"
        steps.append(exact_step("pruned", name, form.sides, _megabytes(form.student)))
    if cut.rotation != WHOLE:
        short = _cut(form.sides, cut)
        steps.append(exact_step("truncated", _width(cut), short, _megabytes(found.shipped.student)))
    short = _cut(variant.sides, cut)
    if one.precision != "fp32":
        steps.append(exact_step("quantised", f"{one.precision} graphs", short, size))
    index = _index(found.rows, variant, cut, one.factory)
    return [*steps, index_step("index", f"index {index.factory}", short, index, size), found.shipped.step(found.index)]


def _width(cut: Cut) -> str:
    return f"cut to {cut.dim} ({cut.rotation})"


def _cut(sides: Mapping[str, Sides], cut: Cut) -> dict[str, Sides]:
    return {name: cut.sides(side) for name, side in sides.items()}


def _index(rows: Rows, variant: Variant, cut: Cut, factory: str) -> VectorIndex:
    return VectorIndex.build(cut.rows(variant.gallery), rows.keys, factory=factory, encoder="candidate")


def _megabytes(model: DualEncoder) -> float:
    return model.parameters * 4 / 1e6


def _teacher_megabytes(teacher: WholeTeacher | None, student: DualEncoder) -> float | None:
    """The teacher's float32 weights: of its text tower alone where the student has no other."""
    if teacher is None:
        return None
    spared = teacher.picture_parameters if student.searches is not None and isinstance(teacher, Teacher) else 0
    return (teacher.parameters - spared) * 4 / 1e6


def _timed(found: _Search, steps: Sequence[Step]) -> list[Step]:
    """The steps with their towers' speeds; a search in an index is no tower's work."""
    encoders: dict[str, Encoder] = {} if found.teacher is None else {"teacher": found.teacher}
    encoders |= {"student": asking(found.student), "pruned": asking(found.form.student)}
    encoders |= {"truncated": asking(found.shipped.student), "runtime": found.shipped.encoder}
    kinds = {step.kind for step in steps}
    if "quantised" in kinds:
        encoders["quantised"] = runtime(found.form.exports[found.one.precision], found.one.precision)
    rates = timed(found.rows, {kind: encoder for kind, encoder in encoders.items() if kind in kinds})
    return [
        replace(
            step,
            images_per_s=None if found.rows.stored else round(rates[step.kind].images_per_s, 1),
            texts_per_s=round(rates[step.kind].texts_per_s, 1),
        )
        if step.kind in rates
        else step
        for step in steps
    ]


def _curve(found: _Search, made: Sequence[Form], k: int) -> list[dict[str, Any]]:
    """Retention of the teacher's success against bytes a vector, on every set, for each precision.

    Of each precision those combinations are taken that no other of it beats on ``val``.
    """
    points = []
    by_share = {form.share: form for form in made}
    for precision in dict.fromkeys(one.precision for one in found.candidates):
        for one in front([one for one in found.candidates if one.precision == precision]):
            variant = by_share[one.share].variants[precision]
            cut = next(cut for cut in variant.cuts if (cut.dim, cut.rotation) == (one.dim, one.rotation))
            sides, index = _cut(variant.sides, cut), _index(found.rows, variant, cut, one.factory)
            step = index_step("index", one.factory, sides, index, one.megabytes)
            points += [_point(one, step, name, found, k) for name in found.rows.asked]
    return points


def _point(one: Candidate, step: Step, name: str, found: _Search, k: int) -> dict[str, Any]:
    asked = found.rows.asked[name]
    row = budget_rows([exact_step("teacher", "teacher", {name: asked.teacher}, None), step], asked, k)[1]
    ends = {key: getattr(row, key) for key in ("success", "retention", "retention_low", "retention_high")}
    return {**asdict(one), "set": name, "overlap": row.overlap, **ends}


def _save(workspace: Workspace, budget: Mapping[str, Any], found: _Search) -> None:
    with files.replaced_folder(workspace.compressed) as aside:
        if found.met:
            made_from = {"compressed_from": found.student.fingerprint}
            found.shipped.student.save(aside / "student", made_from)
            found.index.save(aside / "index")
            shutil.copytree(found.shipped.folder, aside / "export")
        files.write_json(aside / workspace.budget_json.name, budget)
