"""The configuration of ``clipdistill compress``: what has to be kept, and what is tried."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from clipdistill.config.base import Above0, Positive, Section, as_names
from clipdistill.config.export import Precision
from clipdistill.config.student import Ratio


class TargetConfig(Section):
    """What a compressed student has to keep, and how large it may be."""

    retention: Ratio = 0.97
    """The least share of success@k on ``val`` that is kept."""
    of: Literal["teacher", "student"] = "teacher"
    """Whose success@k is the whole: the teacher's, or the uncompressed student's."""
    megabytes: Above0 | None = None
    """The most that the towers may take, in 10^6 bytes: their ONNX graphs and the tokenizer on disk; none = any."""
    bytes_per_vector: Above0 | None = None
    """The most whole bytes that a vector of the index may take, with what is stored for rescoring; none = any."""


class CompressConfig(Section):
    """Which combinations of a share of channels, a width, a precision and an index are tried."""

    target: TargetConfig = TargetConfig()
    k: Positive = 10
    """The cut-off of success@k and overlap@k."""
    prune: tuple[Ratio, ...] = ()
    """The shares of its channels that a convolutional picture tower keeps, such as [1.0, 0.7]: each below 1 is pruned
    and then trained for ``recovery_steps``, which takes minutes. Empty = it is not pruned."""
    recovery_steps: Positive = 100
    """How many steps a pruned picture tower is trained from the teacher's stored embeddings, with the run's own losses
    and rates; the texts' tower stands still."""
    precisions: Annotated[tuple[Precision, ...], BeforeValidator(as_names)] = ("fp32", "int8")
    """Of the ONNX graphs that are shipped."""
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
    speeds: bool = True
    """Whether pictures and texts a second are measured at each step, in some seconds."""
