"""The configuration of ``clipdistill compress``: what has to be kept, and what is tried."""

from __future__ import annotations

from typing import Literal

from clipdistill.config.base import Above0, Positive, Section
from clipdistill.config.student import Ratio


class TargetConfig(Section):
    """What a compressed student has to keep, and how large it may be."""

    retention: Ratio = 0.97
    """The least share of success@k on ``val`` that is kept."""
    of: Literal["teacher", "student"] = "teacher"
    """Whose success@k is the whole: the teacher's, or the uncompressed student's."""
    megabytes: Above0 | None = None
    """The most that the towers may take, in 10^6 bytes of float32 weights; none = any."""
    bytes_per_vector: Above0 | None = None
    """The most whole bytes that a vector of the index may take, with what is stored for rescoring; none = any."""


class CompressConfig(Section):
    """Which combinations of a width and an index are tried."""

    target: TargetConfig = TargetConfig()
    k: Positive = 10
    """The cut-off of success@k and overlap@k."""
    dims: tuple[Positive, ...] = ()
    """The widths, falling; empty = the student's own, and its halves down to 32."""
    rotations: tuple[Literal["leading", "pca"], ...] = ("leading", "pca")
    """How a width is cut: the leading entries, or the leading principal axes of the student's training embeddings."""
    factories: tuple[str, ...] = (
        "Flat",
        "SQfp16",
        "SQ8",
        "SQ4",
        "PQ{parts}x4fs",
        "PQ{parts}x4fs,Refine(SQ8)",
        "RaBitQ",
        "RaBitQ,Refine(SQ4)",
        "Binary,Refine(SQ4)",
        "Binary,Refine(SQ8)",
    )
    """FAISS factories, or ``Binary,Refine(...)``; ``{parts}`` stands for half of the width."""
