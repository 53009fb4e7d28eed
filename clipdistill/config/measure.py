"""The configuration of the index, the measures and the report."""

from __future__ import annotations

from clipdistill.config.base import Count, Positive, Section


class IndexConfig(Section):
    """The FAISS index over the picture embeddings: the student's, or the teacher's where it has a text tower alone."""

    factory: str = "auto"
    """A FAISS factory string, or ``auto``: chosen by the number of vectors."""
    sets: tuple[str, ...] = ()
    """Whose pictures: of ``train``, ``val`` and the evaluation sets' names; empty = all of them."""


class EvaluateConfig(Section):
    """The measures."""

    ks: tuple[Positive, ...] = (1, 5, 10)
    sets: tuple[str, ...] = ()
    """Which evaluation sets; empty = all of ``data.test``, or ``val`` where there is none."""


class ReportConfig(Section):
    """The report page."""

    strips: Count = 6
    """How many of the best and of the worst queries are shown with their pictures."""
