"""The configuration of the data: where pictures and texts are, and which are held out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipdistill.config.base import Above0, Positive, Section, Share, Weight, as_names


class SourceConfig(Section):
    """Where some of the pictures and texts are, and how to read them."""

    path: str
    """A folder, a file, a glob or a brace range: ``shards/{0000..0127}.tar``."""
    format: Literal["auto", "folder", "classes", "csv", "tsv", "jsonl", "parquet", "tar", "karpathy", "coco"] = "auto"
    image: str | None = None
    """The column of the picture (a path, bytes, or HF's {bytes, path}); none = detected."""
    captions: Annotated[tuple[str, ...], BeforeValidator(as_names)] = ()
    """The columns of the captions; empty = detected. A column may hold one text or a list."""
    label: str | None = None
    """The column of the class (of ``task.kind = "classification"``); none = detected."""
    key: str | None = None
    root: str | None = None
    """The folder that relative picture paths start from; none = the table's own."""
    separator: str | None = None
    split: str | None = None
    weight: Above0 = 1.0
    """How often this source's rows are drawn in training, against the other sources' 1.0."""


def _as_sources(value: Any) -> Any:
    """Let ``"file.csv"``, ``["a", "b"]`` and ``{path = ...}`` all stand for a list of sources."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _as_sets(value: Any) -> Any:
    return {"test": value} if isinstance(value, str | list) else value


LISTS = ("train", "val", "images", "texts")
Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class HoldOut(Section):
    """Rows of ``data.train`` that are set aside by the SHA-256 of a field, the same for everyone."""

    val: Share = 0.0
    test: Share = 0.0
    by: Literal["key", "caption", "picture"] = "key"


class DataConfig(Section):
    """The user's pictures and texts."""

    train: Sources = ()
    val: Sources = ()
    test: Annotated[dict[str, Sources], BeforeValidator(_as_sets)] = Field(default_factory=dict)
    """Evaluation sets by name: ``{test = "a.csv", unseen = "b.csv"}``, or one source, named ``test``."""
    images: Sources = ()
    """Unpaired pictures: they train the picture tower through the feature loss."""
    texts: Sources = ()
    """Unpaired texts: they train the text tower through the feature loss."""
    hold_out: HoldOut = HoldOut()
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of ``train``'s rows that is used, chosen by the SHA-256 of the key: a smaller share is a part of a
    larger one, so that a learning curve grows by adding rows."""
    max_pixels: Positive = 100_000_000
    """A picture whose header says more is refused before it is decoded."""
    max_rejected: Weight = 0.01
    """The run fails when more rows than this are refused: below 1 a share of the rows, from 1 on a count."""
