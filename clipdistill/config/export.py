"""The configuration of the export."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from clipdistill.config.base import Count, Positive, Section, as_names

LayoutName = Literal["open_clip", "clip_model", "sentence_transformers", "onnx", "immich", "triton", "vectors", "web"]
Precision = Literal["fp32", "fp16", "int8"]


class ExportConfig(Section):
    """What the student is written as, and what its model card says."""

    layouts: Annotated[tuple[LayoutName, ...], BeforeValidator(as_names)] = ()
    """The layouts; empty = all that this student can be written in, without those that are written by name alone:
    ``immich``, ``triton``, ``vectors``, ``web``."""
    precisions: Annotated[tuple[Precision, ...], BeforeValidator(as_names)] = ("fp32", "int8")
    """Of the ONNX graphs."""
    probes: Positive = 256
    """With how many pictures of the evaluation set, and texts, the layouts are proved, at most."""
    index: bool = True
    """Whether the run's index travels along, where there is one; it must have been built with this very student."""
    web_vectors: Positive = 50_000
    """How many pictures a web bundle searches at most: a visitor's browser loads and compares all of them."""
    web_thumbnails: Count = 128
    """The longer side of its thumbnails in pixels; 0 = none."""
    web_vendor: str | None = None
    """The folder with npm's tarballs for it; without one npm fetches them into the user's cache."""
    licence: str | None = None
    """The SPDX identifier of the student's licence, for the model card."""
    teacher_licence: str | None = None
    """The teacher's."""
    data_licence: str | None = None
    """The training data's."""
