"""From the configuration to live objects: the data's sets, and the teacher's embeddings of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipdistill.cache import AnyCache
from clipdistill.config import RunConfig, Sources, evaluation_sets
from clipdistill.config.paths import raw_teachers
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError
from clipdistill.data.classes import Classes, check_sets, classes_of, prompted
from clipdistill.data.records import Pair, Rejection
from clipdistill.data.sources import Source, SourceSpec, check_rejections, load_source, write_rejections
from clipdistill.data.splits import share_of_source, split_source
from clipdistill.stages.teachers import open_rows
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.teacher import Teacher, name_faults

_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True)
class RunData:
    """All rows of a run.

    Attributes:
        sets: The sets of pairs by name: ``train``, ``val`` and the evaluation sets.
        images: Unpaired pictures.
        texts: Unpaired texts.
        rejected: The rows that were refused, with reasons.
        image_weights: How often each unpaired picture is drawn, by its source; empty = equally often.
        text_weights: The same of the unpaired texts.
        unused: How many rows of ``train`` are left out by ``data.fraction``.
        classes: The classes of a classification, whose prompts are the sets' captions; None of any other task.
    """

    sets: Mapping[str, Source]
    images: tuple[Pair, ...]
    texts: tuple[str, ...]
    rejected: tuple[Rejection, ...]
    image_weights: tuple[float, ...] = ()
    text_weights: tuple[float, ...] = ()
    unused: int = 0
    classes: Classes | None = None

    @property
    def pairs(self) -> list[Pair]:
        """Every row that has a picture, in a stable order: the sets', then the unpaired ones."""
        return [*(pair for source in self.sets.values() for pair in source.pairs), *self.images]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, and of how often those of training are drawn where that is not equally often."""
        parts = {name: source.fingerprint for name, source in self.sets.items()}
        extra = fingerprint.of_lines([*(pair.key for pair in self.images), "", *self.texts])
        drawn = [self.sets["train"].weights if "train" in self.sets else (), self.image_weights, self.text_weights]
        weights = [list(values) for values in drawn] if len({value for part in drawn for value in part}) > 1 else []
        return fingerprint.of_value([parts, extra, *weights])

    def stored(self, config: RunConfig) -> tuple[list[Pair], tuple[str, ...]]:
        """The pairs and unpaired texts whose embeddings by the teacher are stored.

        All of them, where the student learns from the stored ones; else those of the sets that are measured: a live
        teacher embeds what the student is trained on anew at each step. A classification needs its prompts in any case.
        """
        if config.train.mode == "cached":
            return self.pairs, self.texts
        names = [name for name in self.sets if name != "train" or name in evaluation_sets(config)]
        prompts = () if self.classes is None else self.classes.every_prompt
        return [pair for name in names for pair in self.sets[name].pairs], prompts

    def without(self, refused: set[str]) -> RunData:
        """The same data without the rows of these keys.

        Raises:
            DataError: If a class loses all its training pictures.
        """
        if not refused:
            return self
        kept = {name: _without(source, refused) for name, source in self.sets.items()}
        if self.classes is not None:
            check_sets(self.classes, kept)
        left = [row for row, pair in enumerate(self.images) if pair.key not in refused]
        images = tuple(self.images[row] for row in left)
        weights = tuple(self.image_weights[row] for row in left) if self.image_weights else ()
        return replace(self, sets=kept, images=images, image_weights=weights)


def name_checks(raw: Mapping[str, Any], base: Path) -> Iterator[str]:
    """Faults in the names of models, for :meth:`RunConfig.load`; nothing is loaded."""
    from clipdistill.towers.blueprint import INHERIT, TEACHER
    from clipdistill.towers.build import prune_faults, student_faults

    for section, teacher in raw_teachers(raw):
        model, tag = teacher.get("model"), teacher.get("pretrained")
        if not isinstance(model, str) or model.startswith("local-dir:"):
            continue  # the missing-file check has looked at the folder already
        if isinstance(tag, str) and (base / tag).is_file():
            tag = str(base / tag)
        yield from name_faults(model, tag if isinstance(tag, str) else None, section)
    student = raw.get("student")
    names = student if isinstance(student, Mapping) else {}
    image, text = names.get("image", "nano"), names.get("text", "nano")
    if isinstance(image, str) and isinstance(text, str):
        faults = list(student_faults(image, text))
        yield from faults
        if names.get("prune") is not None and not faults and image not in (INHERIT, TEACHER):
            yield from prune_faults(image)


def load_data(workspace: Workspace, *, limit: bool = True, note: bool = True) -> RunData:
    """Read every source of the configuration, refuse bad rows, and stop when there are too many of them.

    Args:
        workspace: The run.
        limit: Whether too many refused rows are a fault here.
        note: Whether to list the refused rows in the run's folder; without, nothing is written there.

    Raises:
        ConfigError: If there are no classes for a classification, or not the ones that are named.
        DataError: If more rows are refused than ``data.max_rejected`` allows, or a source cannot be read, or a class
            has no training picture left.
    """
    config, taken = workspace.config, set[str]()
    sets, unused = _load_sets(config, taken)
    images = _load(config, config.data.images, "images", taken) if config.data.images else None
    texts = _load(config, config.data.texts, "texts", taken) if config.data.texts else None
    sources = [*sets.values(), *(source for source in (images, texts) if source is not None)]
    rejected = tuple(row for source in sources for row in source.rejected)
    if note:
        write_rejections(workspace.rejected, rejected)
    words = _weighted_texts(texts) if texts else {}
    classes = _classes(config, sets) if config.task.kind == "classification" else None
    if classes is not None:
        sets = {name: prompted(classes, source) for name, source in sets.items()}
    data = RunData(
        sets,
        images.pairs if images else (),
        tuple(words),
        rejected,
        images.weights if images else (),
        tuple(words.values()),
        unused,
        classes,
    )
    if limit:
        check_limit(workspace, data, rejected)
    return data


def check_limit(workspace: Workspace, data: RunData, rejected: tuple[Rejection, ...]) -> None:
    """Say how many rows were refused, and stop when they are too many.

    Raises:
        DataError: If they are more than ``data.max_rejected`` allows.
    """
    read = sum(len(source) for source in data.sets.values()) + data.unused
    total = read + len(data.images) + len(data.texts) + len(rejected)
    if rejected:
        _log.warning("%d of %d rows were refused: see %s", len(rejected), total, workspace.rejected)
    check_rejections(len(rejected), total, workspace.config.data.max_rejected, str(workspace.rejected), rejected)


def open_cache(
    workspace: Workspace, data: RunData, teachers: Sequence[Teacher | None], *, force: bool = False
) -> tuple[AnyCache, RunData]:
    """The teacher's stored embeddings: adopted, reused after a check and a live probe, or filled.

    They are of all data, or of the measured sets alone where the teacher runs while the student trains.

    Args:
        workspace: The run.
        data: Its rows.
        teachers: The live teacher, or the ensemble's members; None for each whose embeddings are adopted.
        force: Build it again.

    Returns:
        The cache, and the data without the pictures that could not be decoded while it was filled.

    Raises:
        MismatchError: If the stored cache does not match.
    """
    pairs, texts = data.stored(workspace.config)
    cache = open_rows(workspace, pairs, texts, teachers, force=force)
    refused = {row.key for row in cache.rejected}
    kept = data.without(refused)
    mine = tuple(row for row in cache.rejected if row.key in {pair.key for pair in data.pairs})
    if mine:
        write_rejections(workspace.rejected, (*data.rejected, *mine))
        check_limit(workspace, kept, (*data.rejected, *mine))
    return cache, kept


def _load(config: RunConfig, sources: Sources, kind: Any, taken: set[str]) -> Source:
    specs = [SourceSpec(**source.model_dump()) for source in sources]
    return load_source(specs, base=Path(), max_pixels=config.data.max_pixels, kind=kind, taken=taken)


def _classes(config: RunConfig, sets: Mapping[str, Source]) -> Classes:
    classes = classes_of(sets["train"].labels, config.task.templates, config.task.names)
    check_sets(classes, sets)
    return classes


def _weighted_texts(source: Source) -> dict[str, float]:
    """Each text once with its weight: the largest, where several rows hold it."""
    weights: dict[str, float] = {}
    for pair, weight in zip(source.pairs, source.weights, strict=True):
        for text in pair.captions:
            weights[text] = max(weight, weights.get(text, 0.0))
    return weights


def _load_sets(config: RunConfig, taken: set[str]) -> tuple[dict[str, Source], int]:
    """The sets by name, and how many rows of ``train`` its fraction leaves out.

    Raises:
        ConfigError: If ``data.fraction`` leaves no row at all.
    """
    data, held = config.data, config.data.hold_out
    kind = "classes" if config.task.kind == "classification" else "pairs"
    sets = {"train": _load(config, data.train, kind, taken)} if data.train else {}
    if data.train and held.val + held.test > 0:
        parts = split_source(sets["train"], {"val": held.val, "test": held.test}, held.by, str(config.seed))
        sets |= {name: part for name, part in parts.items() if name == "train" or len(part)}
    whole = len(sets.get("train", ()))
    if whole:
        sets["train"] = share_of_source(sets["train"], data.fraction)
        if not len(sets["train"]):
            raise ConfigError(f"data.fraction: {data.fraction:g} of {whole} training rows leaves none; give more")
    unused = whole - len(sets.get("train", ()))
    if data.val:
        sets["val"] = _load(config, data.val, kind, taken)
    for name, sources in data.test.items():
        sets[name] = _load(config, sources, kind, taken)
    return sets, unused


def _without(source: Source, refused: set[str]) -> Source:
    kept = [row for row, pair in enumerate(source.pairs) if pair.key not in refused]
    pairs, weights = tuple(source.pairs[row] for row in kept), tuple(source.weights[row] for row in kept)
    return replace(source, pairs=pairs, weights=weights)
