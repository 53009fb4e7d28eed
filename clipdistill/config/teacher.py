"""The configuration of the teacher and of its stored embeddings."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clipdistill.config.base import Above0, Count, Positive, Section, Share


class MemberConfig(Section):
    """One teacher of an ensemble: an open_clip model, or a folder of a model's embeddings."""

    model: str | None = None
    pretrained: str | None = None
    embeddings: str | None = None
    """A clip-retrieval embeddings folder, or a cache that was filled before; then this teacher is not run."""
    logit_scale: Above0 | None = None
    """The model's own exp(logit_scale); only to be given with ``embeddings`` that no manifest of ours describes."""
    logit_bias: Annotated[float, Field(allow_inf_nan=False)] | None = None
    cache: str | None = None
    """Where this member's embeddings are stored; none = a folder of its own in the run's cache."""
    weight: Above0 = 1.0
    """How much it counts, against the other members' weights."""
    scale: Above0 | None = None
    """The inverse temperature that its cosines get in the ensemble; none = its own exp(logit_scale)."""
    batch: Positive | None = None
    """None = ``teacher.batch``, and so for the next two."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    device: str | None = None

    @property
    def name(self) -> str:
        """What it is called: ``ViT-B-32:openai``, or the last part of its path."""
        if self.embeddings is not None:
            return PurePath(self.embeddings).name
        model = self.model or ""
        if model.startswith("local-dir:"):
            return PurePath(model.removeprefix("local-dir:")).name
        return f"{model}:{PurePath(self.pretrained).name}" if self.pretrained else model

    @property
    def folder(self) -> str:
        """The name of its own folder in the run's cache."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.name.removeprefix("hf-hub:")).strip(".") or "member"

    @model_validator(mode="after")
    def _one_origin(self) -> MemberConfig:
        if (self.model is None) == (self.embeddings is None):
            raise ValueError("give each member either model or embeddings")
        idle = ("logit_scale", "logit_bias") if self.model else ("pretrained", "cache", "batch", "precision", "device")
        given = [name for name in idle if getattr(self, name) is not None]
        if given and self.model:
            raise ValueError(f"a model brings its own {' and '.join(given)}; to sharpen or soften it, give scale")
        if given:
            raise ValueError(f"embeddings are there already, so {', '.join(given)} would do nothing: leave it out")
        return self


class TeacherConfig(Section):
    """The large model: any open_clip model, or a folder of its embeddings."""

    model: str | None = None
    """An open_clip name, ``hf-hub:org/repo`` or ``local-dir:folder``."""
    pretrained: str | None = None
    """An open_clip tag, or a file of weights; only with a plain name."""
    embeddings: str | None = None
    """A clip-retrieval embeddings folder to adopt, or a cache that was filled before; then no teacher is run."""
    logit_scale: Above0 | None = None
    """The teacher's exp(logit_scale); only to be given with ``embeddings`` that no manifest of ours describes."""
    logit_bias: Annotated[float, Field(allow_inf_nan=False)] | None = None
    members: tuple[MemberConfig, ...] = ()
    """Several teachers, an ensemble; then neither ``model`` nor ``embeddings`` is given."""
    combine: Literal["logits", "probabilities", "embeddings"] = "logits"
    """How an ensemble speaks: its members' logits are averaged before the softmax, their probabilities after it, or
    their embeddings themselves. For the feature loss the members' embeddings are concatenated, or averaged."""
    batch: Positive = 64
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if self.members:
            return self._ensemble()
        if self.combine != "logits":
            raise ValueError("teacher.combine says how teacher.members are combined, and there are none")
        if (self.model is None) == (self.embeddings is None):
            raise ValueError("give either teacher.model or teacher.embeddings")
        return self

    def _ensemble(self) -> TeacherConfig:
        faults = [*_alone_faults(self), *_pair_faults(self.members)]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def _alone_faults(teacher: TeacherConfig) -> Iterator[str]:
    """What is said of one teacher, and does not go with several."""
    if teacher.model is not None or teacher.embeddings is not None:
        yield "teacher.members makes an ensemble: teacher.model and teacher.embeddings do not go with it"
    if len(teacher.members) < 2:
        yield "teacher.members needs two teachers or more; for one give teacher.model"
    for name in ("pretrained", "logit_scale", "logit_bias"):
        if getattr(teacher, name) is not None:
            yield f"teacher.{name}: give each of teacher.members its own"


def _pair_faults(members: tuple[MemberConfig, ...]) -> Iterator[str]:
    """Members that are the same teacher twice, or that would store their embeddings in one place."""
    for (i, one), (j, other) in combinations(enumerate(members), 2):
        if _origin(one) == _origin(other):
            yield f"teacher.members.{j}: the same teacher as teacher.members.{i}; name it once, with its weight"
        elif one.model and other.model and _overlap(one, other):
            yield (
                f"teacher.members.{j}.cache: {other.name} would store its embeddings in the same place as "
                f"teacher.members.{i} ({other.cache or other.folder}); give it a cache folder of its own"
            )


def _origin(member: MemberConfig) -> tuple[str | None, ...]:
    paths = [os.path.normpath(path) if path else None for path in (member.embeddings, member.model)]
    return (*paths, member.pretrained)


def _overlap(one: MemberConfig, other: MemberConfig) -> bool:
    if one.cache is None or other.cache is None:
        return one.cache is None and other.cache is None and one.folder == other.folder
    mine, theirs = (PurePath(os.path.normpath(path)) for path in (one.cache, other.cache))
    return mine.is_relative_to(theirs) or theirs.is_relative_to(mine)


class CacheConfig(Section):
    """The teacher's stored embeddings."""

    folder: str | None = None
    """Where it lies; none = ``cache`` in the run's folder. Give one folder to share it between runs."""
    views: Positive = 1
    """Crops a picture: view 0 is the whole picture, the others are drawn from (seed, key, number). With a live teacher
    (``train.mode``) nothing is stored and the views have no end: 1 shows the whole picture always, more than 1 shows a
    new crop each time a picture is drawn."""
    view_seed: int = 0
    view_scale: tuple[float, float] = (0.6, 1.0)
    """The least and largest share of the picture that a crop keeps."""
    shard_rows: Positive = 4096
    dtype: Literal["float16", "float32"] = "float16"
    """The precision of the stored rows: float16 halves the bytes and costs a cosine of about 1e-7."""
    probe_rows: Count = 8
    """How many rows are encoded again by the live teacher before a stored cache is used; 0 = none."""
    probe_cosine: Share = 0.999
    """The probe refuses the cache when any row's cosine is below this (float16 rows of one model: above 0.9999)."""
