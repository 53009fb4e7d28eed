"""What the stages add to weight inheritance: the calibration rows, and the phases of progressive inheritance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipdistill.config import InheritConfig, RunConfig, TrainConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError
from clipdistill.data.pictures import decode
from clipdistill.stages.inputs import RunData
from clipdistill.towers.blueprint import INHERIT
from clipdistill.towers.inheritance.narrower import narrower
from clipdistill.towers.inheritance.plan import Calibration
from clipdistill.towers.inheritance.tower import Side, tower_of
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher
from clipdistill.training.sampler import seed_of

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """One part of a training: the whole of it, or the steps at one share of the schedule.

    Attributes:
        number: From 1.
        rule: How the student of this phase is cut.
        train: The settings, with this phase's steps.
        seed: Decides its batches and whatever else is random in it.
        folder: Where its checkpoints and metrics lie.
        fingerprint: Of everything that decides it.
        first_step: How many steps the phases before it took.
    """

    number: int
    rule: InheritConfig
    train: TrainConfig
    seed: int
    folder: Path
    fingerprint: str
    first_step: int = 0


def phases(config: RunConfig, training: Path, made_from: str) -> list[Phase]:
    """The phases of a training, the first first; what is left of an even division goes to the last.

    Args:
        config: The run's configuration.
        training: The folder of the whole training.
        made_from: The fingerprint of everything that decides it.
    """
    train, shares = config.train, config.student.inherit.schedule
    if not shares:
        return [Phase(1, config.student.inherit, train, config.seed, training, made_from)]
    steps = train.steps // len(shares)
    found = []
    for place, share in enumerate(shares):
        own = train.steps - place * steps if place + 1 == len(shares) else steps
        found.append(
            Phase(
                place + 1,
                scheduled(config.student.inherit, share),
                train.model_copy(update={"steps": own}),
                config.seed if place == 0 else seed_of(config.seed, "phase", place + 1),
                training / f"phase-{place + 1}",
                fingerprint.of_value([made_from, "phase", place + 1]),
                place * steps,
            )
        )
    return found


def scheduled(rule: InheritConfig, share: float | None = None) -> InheritConfig:
    """A rule with one of its schedule's shares, by default the first, in the places of depth and width."""
    if not rule.schedule:
        return rule
    share = rule.schedule[0] if share is None else share
    return rule.model_copy(update={"depth": share, "width": share, "schedule": ()})


def cut_again(
    config: RunConfig, data: RunData, student: DualEncoder, teacher: Teacher, rule: InheritConfig
) -> DualEncoder:
    """The student of the phase before, cut to shares of the teacher's measures.

    Args:
        config: The run's configuration.
        data: Its rows: the student is measured on the calibration rows as it takes them itself.
        student: What was trained.
        teacher: What the shares are of.
        rule: The shares, and how they are chosen.
    """
    own = student.preprocess
    if own is None:
        raise ConfigError('student.image: "teacher" has no picture tower to cut again')
    rows = calibration(
        config,
        data,
        lambda picture: torch.from_numpy(own(picture)),
        lambda texts: torch.from_numpy(student.tokenizer.encode(texts)),
    )
    sides: list[Side] = ["image", "text"]
    shapes = {side: tower_of(teacher.model, side).shape for side in sides if getattr(config.student, side) == INHERIT}
    return narrower(student, shapes, rule, rows, config.seed)


def inherits(config: RunConfig) -> bool:
    """Whether a tower of the student is cut out of the teacher's."""
    return INHERIT in (config.student.image, config.student.text)


def calibration(
    config: RunConfig,
    data: RunData,
    transform: Callable[[Any], Any],
    tokenize: Callable[[list[str]], Any],
) -> Calibration:
    """Rows of ``data.train`` as a source takes them, ``student.inherit.calibration`` of each kind.

    Which rows are taken depends on the rows alone, not on their order: those whose key or text has the least hash.

    Args:
        config: The run's configuration.
        data: Its rows; unpaired pictures and texts stand in where ``data.train`` has none.
        transform: The source's own preprocessing, from a decoded RGB picture to float32 [3, height, width].
        tokenize: The source's own tokenizer, from texts to int64 [texts, length].
    """
    source, count = data.sets.get("train"), config.student.inherit.calibration
    pairs = source.pairs if source is not None else ()
    pictured = [pair for pair in (*pairs, *data.images) if pair.picture is not None]
    texts = dict.fromkeys([*(text for pair in pairs for text in pair.captions), *data.texts])
    chosen = [pair.picture for pair in _least(pictured, count, lambda pair: pair.key) if pair.picture is not None]
    pixels = [
        torch.as_tensor(transform(decode(picture.read(), config.data.max_pixels, picture.origin))) for picture in chosen
    ]
    words = _least(texts, count, str)
    tokens = torch.as_tensor(tokenize(words)) if words else torch.zeros(0, 1, dtype=torch.long)
    return Calibration(_stacked(pixels), tokens)


def prepared_pictures(config: RunConfig, data: RunData, transform: Callable[[Any], Any]) -> Tensor:
    """The pictures of :func:`calibration` alone: float32 [pictures, 3, height, width]."""
    return calibration(config, data, transform, lambda _: torch.zeros(0, 1, dtype=torch.long)).pixels


def _stacked(pixels: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, 1, 1)


def _least(items: Iterable[Item], count: int, name: Callable[[Item], str]) -> list[Item]:
    return sorted(items, key=lambda item: hashlib.sha256(name(item).encode("utf-8", "surrogatepass")).digest())[:count]
