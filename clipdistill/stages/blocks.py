"""The inner blocks of a run: which ones, what storing the teacher's takes, and the loss that trains on them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from clipdistill.cache import AnyCache, TeacherCache
from clipdistill.cache.blocks import BlockPlan, StoredBlocks, fill_blocks, open_blocks
from clipdistill.config import FeaturesConfig, RunConfig
from clipdistill.core.errors import ConfigError
from clipdistill.core.locks import locked
from clipdistill.data.records import Pair, Picture
from clipdistill.stages.inputs import RunData
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.blocks import find_block, tower_of
from clipdistill.towers.blueprint import image_tower, text_tower
from clipdistill.towers.student import DualEncoder, Side, assemble
from clipdistill.towers.tap import Tap
from clipdistill.towers.teacher import Teacher
from clipdistill.training.batch import RowFacts
from clipdistill.training.blocks import SIDES, BlockLoss, BlockPair, LiveCells, StoredCells
from clipdistill.training.run import ExtraLoss

Who = Literal["student", "teacher"]
Widths = Mapping[Side, Mapping[str, int]]
_FROM_TEACHER = ("inherit", "teacher")  # towers that are cut out of the teacher: there is none to look at before
_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the training loop gets for the distillation of blocks.

    Attributes:
        extras: The loss.
        facts: The teacher's stored blocks; none where it runs.
        live: Whether the teacher has to run on each batch.
    """

    extras: tuple[ExtraLoss, ...] = ()
    facts: tuple[RowFacts, ...] = ()
    live: bool = False


def check_blocks(config: RunConfig, teacher: Teacher | None) -> None:
    """Refuse names of blocks that do not exist, before anything expensive runs.

    Args:
        config: The run's configuration.
        teacher: The live teacher.

    Raises:
        ConfigError: With every fault, each with its dotted path and the nearest name.
    """
    if not asked(config.features) or teacher is None:
        return
    skeleton, faults = _skeleton(config), []
    for side in SIDES:
        faults += list(_faults(config, teacher.model, "teacher", side))
        if getattr(config.student, side) not in _FROM_TEACHER:
            faults += list(_faults(config, skeleton, "student", side))
    if faults:
        raise ConfigError(faults)


def asked(features: FeaturesConfig) -> bool:
    """Whether any blocks are to be distilled."""
    return bool(features.image or features.text)


def preview(
    config: RunConfig, data: RunData, teacher: Teacher | None, pictures_per_s: float, texts_per_s: float
) -> dict[str, Any] | None:
    """What the teacher's blocks will take: their number and bytes, whether and how long they are stored; or None.

    Args:
        config: The run's configuration.
        data: Its rows.
        teacher: The live teacher.
        pictures_per_s: Its measured rate.
        texts_per_s: The same.

    Raises:
        ConfigError: If a block does not exist.
    """
    if not asked(config.features) or teacher is None:
        return None
    plan = _plan(config, data, teacher, "")
    size = plan.bytes(_widths(config, teacher), config.cache.views)
    passes = ((len(plan.pictures) * config.cache.views, pictures_per_s), (len(plan.texts), texts_per_s))
    store = _store(config, size)
    return {
        "blocks": len(plan.image) + len(plan.text),
        "bytes": size,
        "store": store,
        "max_bytes": config.features.max_bytes,
        "estimated_seconds": sum(rows / rate for rows, rate in passes if rate) if store == "cache" else 0.0,
    }


def distilled_blocks(
    workspace: Workspace, data: RunData, cache: AnyCache, student: DualEncoder, teacher: Teacher | None
) -> Blocks:
    """The loss on the blocks of a configuration, with the teacher's blocks stored where that is cheap enough.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The teacher's embeddings of them.
        student: The student.
        teacher: The live teacher.

    Raises:
        ConfigError: If a block does not exist, or there is no teacher to take blocks from.
    """
    config = workspace.config
    if not asked(config.features):
        return Blocks()
    if teacher is None or not isinstance(cache, TeacherCache):
        raise ConfigError("features: blocks are taken from one teacher that runs; teacher.model is needed")
    pairs = _pairs(config, student, teacher)
    plan = _plan(config, data, teacher, cache.fingerprint)
    size = plan.bytes(_widths(config, teacher), cache.views)
    if _store(config, size) == "live":
        _log.info("inner blocks: %.1f MB would be stored: the teacher runs on each batch instead", size / 1e6)
        return Blocks((_loss(config, student, pairs, LiveCells(_taps(config, teacher))),), (), live=True)
    with locked(cache.folder / "blocks" / ".lock"):  # another run on this cache may want the same
        stored = open_blocks(cache.folder, plan) or _filled(workspace, plan, cache, teacher, _pictures(data))
    return Blocks((_loss(config, student, pairs, StoredCells()),), (stored,))


def cells_of(features: FeaturesConfig) -> int:
    """Parts of a picture along each axis, and spans of a text: 1 for the mean."""
    return features.cells if features.pool == "grid" else 1


def _loss(config: RunConfig, student: DualEncoder, pairs: Sequence[BlockPair], teacher: Any) -> BlockLoss:
    features = config.features
    return BlockLoss(
        student,
        pairs,
        teacher,
        weight=features.weight,
        form=features.form,
        cells=cells_of(features),
        seed=config.seed,
    )


def _filled(
    workspace: Workspace, plan: BlockPlan, cache: TeacherCache, teacher: Teacher, pictures: Mapping[str, Pair]
) -> StoredBlocks:
    config = workspace.config
    return fill_blocks(
        cache.folder,
        plan,
        teacher,
        _taps(config, teacher),
        [pictures[key] for key in plan.pictures],
        views=cache.drawn,
        shard_rows=config.cache.shard_rows,
        batch=config.teacher.batch,
    )


def _store(config: RunConfig, size: int) -> Literal["cache", "live"]:
    """Where the teacher's blocks come from: it is asked for, it runs anyway, or the bytes decide."""
    features = config.features
    if config.train.mode != "cached" or features.store == "live":
        return "live"
    return "cache" if features.store == "cache" or size <= features.max_bytes else "live"


def _plan(config: RunConfig, data: RunData, teacher: Teacher, cache: str) -> BlockPlan:
    """The teacher's blocks of every row that may be drawn in training."""
    train = data.sets["train"].pairs if "train" in data.sets else ()
    image, text = (tuple(_taps(config, teacher)[side].names) if _wanted(config, side) else () for side in SIDES)
    words = dict.fromkeys([*(caption for pair in train for caption in pair.captions), *data.texts])
    pictures, texts = tuple(_pictures(data)) if image else (), tuple(words) if text else ()
    cells = cells_of(config.features)
    return BlockPlan(cache, image if pictures else (), text if texts else (), cells, pictures, texts)


def _pictures(data: RunData) -> dict[str, Pair]:
    train = data.sets["train"].pairs if "train" in data.sets else ()
    return {pair.key: pair for pair in (*train, *data.images) if pair.picture is not None}


def _wanted(config: RunConfig, side: Side) -> Sequence[Any]:
    return config.features.image if side == "image" else config.features.text


def _names(config: RunConfig, model: Any, who: Who, side: Side) -> list[str]:
    """The modules that the configuration asks for of one tower, in its order."""
    tower = tower_of(model, side)
    return [
        find_block(tower, side, getattr(pair, who), f"features.{side}.{number}.{who}")
        for number, pair in enumerate(_wanted(config, side))
    ]


def _taps(config: RunConfig, teacher: Teacher) -> dict[Side, Tap]:
    return {
        side: Tap(teacher.model, side, _names(config, teacher.model, "teacher", side), cells_of(config.features))
        for side in SIDES
        if _wanted(config, side)
    }


def _widths(config: RunConfig, teacher: Teacher) -> Widths:
    taps = _taps(config, teacher)
    blank = Image.new("RGB", (32, 32))
    runs = {"image": lambda: teacher.encode_decoded([blank]), "text": lambda: teacher.encode_texts(["a"])}
    return {side: taps[side].widths(runs[side]) if side in taps else {} for side in SIDES}


def _pairs(config: RunConfig, student: DualEncoder, teacher: Teacher) -> list[BlockPair]:
    theirs, blank = _widths(config, teacher), _blank()
    runs = {"image": lambda: student.encode_images([blank]), "text": lambda: student.encode_texts(["a"])}
    pairs: list[BlockPair] = []
    for side in SIDES:
        if not _wanted(config, side):
            continue
        own, other = (_names(config, model, who, side) for model, who in _models(student, teacher))
        widths = Tap(student.model, side, own, cells_of(config.features)).widths(runs[side])
        pairs += [
            BlockPair(side, mine, its, widths[mine], theirs[side][its]) for mine, its in zip(own, other, strict=True)
        ]
    return pairs


def _models(student: DualEncoder, teacher: Teacher) -> Iterator[tuple[Any, Who]]:
    yield student.model, "student"
    yield teacher.model, "teacher"


def _blank() -> Picture:
    data = io.BytesIO()
    Image.new("RGB", (32, 32)).save(data, "PNG")
    return Picture("a blank picture", data=data.getvalue())


def _faults(config: RunConfig, model: Any, who: Who, side: Side) -> Iterator[str]:
    tower = tower_of(model, side)
    for number, pair in enumerate(_wanted(config, side)):
        try:
            find_block(tower, side, getattr(pair, who), f"features.{side}.{number}.{who}")
        except ConfigError as fault:
            yield from fault.faults


def _skeleton(config: RunConfig) -> Any:
    """The student's towers without weights: only their modules' names are asked for."""
    student, dim = config.student, config.student.dim or 64
    image = "nano" if student.image in _FROM_TEACHER else student.image
    text = "nano" if student.text in _FROM_TEACHER else student.text
    cfg = {
        "embed_dim": dim,
        "custom_text": True,
        "vision_cfg": image_tower(image, dim, student.image_size).vision_cfg,
        "text_cfg": {**text_tower(text).text_cfg, "vocab_size": 8},
    }
    with torch.device("meta"):
        return assemble(cfg)
