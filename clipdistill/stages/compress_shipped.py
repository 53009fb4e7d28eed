"""The combination that is shipped: really exported, embedded by the runtime, indexed, measured and timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from clipdistill.compression import Candidate, Cut, Judge, Sides, Step, choose, index_step, keeping, nearest
from clipdistill.compression.truncation import WHOLE
from clipdistill.config import RunConfig, TargetConfig
from clipdistill.core.errors import ParityError
from clipdistill.data.records import Pair
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.speed import Speed, compare_speed
from clipdistill.stages.compress_forms import Form, exported, runtime, served, shipped_megabytes
from clipdistill.stages.compress_rows import VAL, Rows, asking
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.student import DualEncoder

LEAST_COSINE = 0.9999
_PROBED = 64
_SMALLEST = 3  # how many of the smallest are exported before the best one is
_PICTURES, _TEXTS, _BATCH = 16, 64, 32


@dataclass(frozen=True, slots=True, eq=False)
class Shipped:
    """One form of the student at one width and precision, as it would be shipped.

    Attributes:
        student: It, in PyTorch.
        folder: Its export.
        encoder: The runtime on that export.
        sides: What the runtime embeds, by the set's name.
        gallery: What it embeds of the index's rows.
        megabytes: What the runtime loads, in 10^6 bytes on disk.
    """

    student: DualEncoder
    folder: Path
    encoder: RuntimeEncoder
    sides: Mapping[str, Sides]
    gallery: Vectors
    megabytes: float

    def index(self, keys: Sequence[str], factory: str) -> VectorIndex:
        """Its index."""
        return VectorIndex.build(self.gallery, keys, factory=factory, encoder=self.encoder.fingerprint)

    def step(self, index: VectorIndex) -> Step:
        """The last step of the budget."""
        name = f"exported runtime, {self.encoder.precision}"
        return index_step("runtime", name, self.sides, index, self.megabytes)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A combination that was exported to see whether it keeps the target.

    Attributes:
        searched: As the search measured it, where graphs were cut and not made.
        measured: As it is; None where its export does not embed as the student does.
        refused: Why it could not be exported; None where it could.
        met: Whether it keeps the target.
    """

    searched: Candidate
    measured: Candidate | None
    refused: str | None
    met: bool


@final
class Shipping:
    """Exports of combinations, each made once.

    Args:
        config: The run's configuration.
        rows: What is embedded.
        forms: The forms of the student.
        scratch: A folder for the exports.
    """

    def __init__(self, config: RunConfig, rows: Rows, forms: Sequence[Form], scratch: Path) -> None:
        self._config, self._rows, self._scratch = config, rows, scratch
        self._forms = {form.share: form for form in forms}
        self._made: dict[tuple[Any, ...], Shipped] = {}

    def form(self, one: Candidate) -> Form:
        """The form of the student that a combination is of."""
        return self._forms[one.share]

    def cut(self, one: Candidate) -> Cut:
        """The cut of a combination."""
        return next(cut for cut in self.form(one).cuts if (cut.dim, cut.rotation) == (one.dim, one.rotation))

    def ship(self, one: Candidate) -> Shipped:
        """Export a combination's towers and embed all rows through the runtime.

        Raises:
            ParityError: If the cut student does not make the vectors that were measured, or its graphs do not embed as
                it does.
        """
        key = (one.share, one.dim, one.rotation, one.precision)
        if key not in self._made:
            form, cut = self.form(one), self.cut(one)
            student, folder = cut.student(form.student), self._scratch / f"shipped-{len(self._made)}"
            _check_cut(student, self._rows, form, cut)
            exported(self._config, self._rows, student, (one.precision,), folder)
            encoder = runtime(folder, one.precision)
            sides, gallery = self._rows.embedded(served(encoder))
            size = shipped_megabytes(folder, one.precision, student)
            self._made[key] = Shipped(student, folder, encoder, sides, gallery, size)
        return self._made[key]

    def attempt(self, one: Candidate, judge: Judge, target: TargetConfig) -> Attempt:
        """Measure a combination as it is shipped, and hold it against the target."""
        try:
            shipped = self.ship(one)
        except ParityError as fault:
            return Attempt(one, None, str(fault), met=False)
        step = shipped.step(shipped.index(self._rows.keys, one.factory))
        measured = replace(one, **judge.measure(step))  # type: ignore[arg-type]
        return Attempt(one, measured, None, met=choose([measured], target) is not None)


def attempts(shipping: Shipping, candidates: Sequence[Candidate], judge: Judge, target: TargetConfig) -> list[Attempt]:
    """Export the smallest combinations that kept the target in the search, until one keeps it as it is shipped.

    After the three smallest the one with the highest retention is the last. Where none kept the target in the search,
    the one that came nearest is exported.

    Args:
        shipping: Makes the exports.
        candidates: As the search measured them.
        judge: The set, and what is kept of it.
        target: What is to be kept.

    Returns:
        All that were exported; the last one keeps the target, or none does.
    """
    found = keeping(candidates, target) or [nearest(candidates, target).candidate]
    best = max(found, key=lambda one: one.retention)
    made: list[Attempt] = []
    for one in dict.fromkeys((*found[:_SMALLEST], best)):
        made.append(shipping.attempt(one, judge, target))
        if made[-1].met:
            break
    return made


def shown(made: Sequence[Attempt], target: TargetConfig) -> Candidate:
    """The combination that is told: the one that keeps the target, or of those that were exported the nearest to it.

    Raises:
        ParityError: If none could be exported.
    """
    if made[-1].measured is not None and made[-1].met:
        return made[-1].measured
    measured = [one.measured for one in made if one.measured is not None]
    if not measured:
        raise ParityError(f"compress: none of the combinations that were tried can be exported. {made[-1].refused}")
    return nearest(measured, target).candidate


def timed(rows: Rows, encoders: Mapping[str, Encoder]) -> dict[str, Speed]:
    """Rates of some encoders on a few rows of ``val``, one after the other in turn, on one thread, 32 at once.

    Args:
        rows: The run's.
        encoders: By the kind of their step.
    """
    pictures = [pair.picture for pair in rows.pairs[VAL] if pair.picture is not None]
    with _one_thread():
        return compare_speed(
            encoders, () if rows.stored else pictures[:_PICTURES], rows.texts[VAL][:_TEXTS], batch=_BATCH
        )


def _check_cut(small: DualEncoder, rows: Rows, form: Form, cut: Cut) -> None:
    """The cut student has to make the vectors that were measured: its last layers may not be what was assumed."""
    if cut.rotation == WHOLE:
        return
    pairs: tuple[Pair, ...] = rows.pairs[VAL]
    pictures = [pair.picture for pair in pairs if pair.picture is not None][:_PROBED]
    sides, whole = cut.sides(form.sides[VAL]), len(cut.axes) if cut.axes is not None else cut.dim
    made = {
        "text": (asking(small).encode_texts(rows.texts[VAL][:_PROBED]), sides.queries),
        "picture": (small.encode_images(pictures), sides.gallery),
    }
    for side, (own, measured) in made.items():
        worst = float(np.einsum("nd,nd->n", own, measured[: len(own)]).min())
        if worst < LEAST_COSINE:
            raise ParityError(
                f"compressed student: the worst {side} embedding has a cosine of {worst:.6f} with the one that was "
                f"measured, needed {LEAST_COSINE}: its last layers cannot be cut. Set compress.dims=[{whole}]"
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
