"""The forms of a student that a compression tries: its shares of channels, each in the precisions of its graphs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from clipdistill.compression import Cut, Sides, Variant, cuts, halves, pruned
from clipdistill.compression.truncation import WHOLE
from clipdistill.config import CompressConfig, RunConfig, TrainConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, ParityError
from clipdistill.evaluation import judged
from clipdistill.formats import Probe
from clipdistill.formats import export as export_student
from clipdistill.formats.graphs import towers_of
from clipdistill.formats.layouts import check_packages
from clipdistill.formats.onnx import graph_path
from clipdistill.retrieval.exact import Vectors
from clipdistill.runtime import RuntimeEncoder
from clipdistill.runtime.alone import OneByOne
from clipdistill.runtime.encoder import Precision
from clipdistill.runtime.folder import TOKENIZER
from clipdistill.stages.compress_rows import VAL, Rows, asking
from clipdistill.stages.export import card_facts, spread
from clipdistill.stages.inherit import prepared_pictures
from clipdistill.stages.train import loss_weights, new_objective, training_data, validation
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.inheritance.convolutional import Importance, pruning_faults, torch_pruning
from clipdistill.towers.student import DualEncoder
from clipdistill.training.loop import distill
from clipdistill.training.sampler import seed_of

ONNX = ("onnx",)
WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_TEXTS_STAND_STILL = "text."
_CHECKPOINTS = 4  # of a recovery
_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """The student with a share of its channels.

    Attributes:
        share: The share.
        student: It, in PyTorch.
        sides: Its embeddings by the set's name.
        cuts: The ways to narrow it.
        variants: Its forms by their precision.
        exports: For each precision an export of it, uncut.
    """

    share: float
    student: DualEncoder
    sides: Mapping[str, Sides]
    cuts: tuple[Cut, ...]
    variants: Mapping[str, Variant]
    exports: Mapping[str, Path]


def check_forms(config: RunConfig, student: DualEncoder) -> None:
    """Refuse what could not be finished, before anything is embedded or trained.

    Raises:
        ConfigError: If the picture tower is to be pruned and is of a kind that cannot be.
        MissingExtraError: If a library is missing that writes graphs, or prunes.
    """
    check_packages(ONNX)
    if all(share == 1 for share in config.compress.prune):
        return
    torch_pruning()
    faults = list(pruning_faults(student.model.visual))
    if faults:
        raise ConfigError(f"compress.prune: this picture tower cannot be pruned: {'; '.join(faults)}. Leave it out")


def forms(workspace: Workspace, rows: Rows, student: DualEncoder, scratch: Path) -> tuple[list[Form], list[str]]:
    """The forms of ``compress.prune`` and ``compress.precisions``, and a sentence for each that cannot be made.

    Args:
        workspace: The run.
        rows: What they embed.
        student: The finished student.
        scratch: A folder for their exports.
    """
    made: list[Form] = []
    left_out: list[str] = []
    for share in workspace.config.compress.prune or (1.0,):
        model = student if share == 1 else recovered(workspace, rows, student, share)
        made.append(_form(workspace.config, rows, model, share, scratch / f"{share:g}", left_out))
    return made, left_out


def recovered(workspace: Workspace, rows: Rows, student: DualEncoder, share: float) -> DualEncoder:
    """The student with a share of its channels, trained for ``compress.recovery_steps`` from the stored embeddings.

    The picture tower alone is trained: texts, and the maps to the teacher's space, are what its pictures have to meet.
    The training lies in ``recovery/`` of the run, goes on after a kill, and is not made again for the same inputs.
    """
    config, data = workspace.config, rows.data
    preprocess, rule = student.preprocess, config.student.inherit
    importance: Importance = "taylor" if rule.importance == "taylor" else "magnitude"
    if preprocess is None:
        raise ConfigError("compress.prune: this student has no picture tower; leave it out")
    pixels = prepared_pictures(config, data, lambda picture: torch.from_numpy(preprocess(picture)))
    smaller = pruned(student, share, pixels, importance=importance, seed=config.seed)
    train, made_from = recovery_settings(config), _recovery_inputs(config, rows, student, share)
    _log.info("pruned to %s of its channels: recovering for %d steps", f"{share:g}", train.steps)
    maps = () if smaller.projection is None else tuple(smaller.projection.parameters())
    for weight in maps:
        weight.requires_grad_(False)
    found = distill(
        smaller,
        rows.cache,
        training_data(config, data),
        objective=new_objective(config.loss, smaller, rows.cache),
        train=train,
        seed=seed_of(config.seed, "recovery"),
        folder=workspace.recovery / f"{share:g}-{made_from[:12]}",
        on_eval=validation(data, rows.cache),
        fingerprint=made_from,
    )
    for weight in maps:
        weight.requires_grad_(True)
    return found


def recovery_settings(config: RunConfig) -> TrainConfig:
    """The run's settings for a recovery: its steps, every layer of the picture tower, no unpaired texts."""
    steps = config.compress.recovery_steps
    changes = {
        "steps": steps,
        "budget_minutes": None,
        "batch_texts": 0,
        "warmup": min(config.train.warmup, steps // 5),
        "freeze": (_TEXTS_STAND_STILL,),
        "eval_every": steps,
        "save_every": max(1, steps // _CHECKPOINTS),
    }
    return config.train.model_copy(update=changes)


def _recovery_inputs(config: RunConfig, rows: Rows, student: DualEncoder, share: float) -> str:
    return fingerprint.of_value(
        {
            "student": student.fingerprint,
            "share": share,
            "inherit": config.student.inherit.model_dump(mode="json", include={"importance", "calibration"}),
            "loss": dataclasses.asdict(loss_weights(config.loss)),
            "train": recovery_settings(config).model_dump(mode="json", exclude={"workers", "log_every"}),
            "seed": config.seed,
            "data": rows.data.fingerprint,
            "teacher cache": rows.cache.fingerprint,
        }
    )


def _form(
    config: RunConfig, rows: Rows, student: DualEncoder, share: float, scratch: Path, left_out: list[str]
) -> Form:
    encoder = asking(student)
    pictures = rows.pictures(encoder)
    sides, gallery = rows.embedded(encoder, pictures)
    ways = _ways(config.compress, student, gallery, lambda: rows.fitted(encoder, pictures))
    exports = dict(_exports(config, rows, student, share, scratch, left_out))
    variants = {
        precision: _variant(rows, student, share, precision, folder, ways, (sides, gallery))
        for precision, folder in exports.items()
    }
    return Form(share, student, sides, ways, variants, exports)


def _ways(
    config: CompressConfig, student: DualEncoder, gallery: Vectors, fitted: Callable[[], Vectors]
) -> tuple[Cut, ...]:
    """The ways to narrow a student; a text tower alone asks in the teacher's space, which stays as wide as it is."""
    if student.searches is not None:
        return (Cut(gallery.shape[1], WHOLE),)
    dims = config.dims or halves(student.dim)
    return tuple(cuts(dims, config.rotations, fitted() if any(dim < student.dim for dim in dims) else gallery))


def _exports(
    config: RunConfig, rows: Rows, student: DualEncoder, share: float, scratch: Path, left_out: list[str]
) -> Iterator[tuple[str, Path]]:
    """A proved export for each precision; one together where all of them embed as the student does.

    Raises:
        ParityError: If none of them does.
    """
    precisions = config.compress.precisions
    try:
        exported(config, rows, student, precisions, scratch / "all")
    except ParityError as fault:
        if len(precisions) == 1:
            raise
        _log.warning("one by one: %s", fault)
    else:
        yield from ((precision, scratch / "all") for precision in precisions)
        return
    refused: list[ParityError] = []
    for precision in precisions:
        try:
            exported(config, rows, student, (precision,), scratch / precision)
        except ParityError as fault:
            left_out.append(f"{precision} of {share:.0%} of the channels, {fault}")
            refused.append(fault)
        else:
            yield precision, scratch / precision
    if len(refused) == len(precisions):
        raise refused[0]


def exported(config: RunConfig, rows: Rows, student: DualEncoder, precisions: Sequence[str], folder: Path) -> None:
    """Write a student's graphs, proved with rows of ``val``.

    Raises:
        ParityError: If ONNX Runtime embeds otherwise than the student with one of them; no export is left then.
    """
    whole = [pair for pair in rows.pairs[VAL] if pair.picture is not None and pair.captions]
    shown = judged(VAL, spread(whole, config.export.probes))
    gallery = rows.cache.image_rows(shown.keys) if rows.stored else None
    probe = Probe.of(student, shown.texts, shown.pictures, relevant=shown.relevant_pictures, gallery=gallery)
    export_student(student, folder, ONNX, precisions, probe=probe, facts=card_facts(config))


def runtime(folder: Path, precision: str) -> RuntimeEncoder:
    """An export's encoder on one thread, so that its embeddings are the same on any number of cores."""
    return RuntimeEncoder.load(folder, precision=cast("Precision", precision), threads=1)


def served(encoder: RuntimeEncoder) -> Encoder:
    """An export's encoder as a service asks it: an int8 graph, whose rows depend on their neighbours, one by one."""
    return OneByOne(encoder) if encoder.precision == "int8" else encoder


def shipped_megabytes(folder: Path, precision: str, student: DualEncoder) -> float:
    """What the runtime loads of an export, in 10^6 bytes on disk: the graphs of one precision, and the tokenizer."""
    names = [TOKENIZER, *(graph_path(tower, precision) for tower in towers_of(student))]
    return sum((folder / name).stat().st_size for name in names) / 1e6


def _variant(
    rows: Rows,
    student: DualEncoder,
    share: float,
    precision: str,
    folder: Path,
    ways: tuple[Cut, ...],
    plain: tuple[dict[str, Sides], Vectors],
) -> Variant:
    """A precision's embeddings through its graphs, whole; those of float32 graphs are PyTorch's, as the export proved.

    A cut of them stands for the graphs of the cut student, which are made of the chosen combination alone: the bytes of
    its last layers' entries are then subtracted from the whole graphs'.
    """
    sides, gallery = plain if precision == "fp32" else rows.embedded(served(runtime(folder, precision)))
    whole, weights = shipped_megabytes(folder, precision, student), _weights(student)
    saved = {id(cut): (weights - _weights(cut.student(student))) * WEIGHT_BYTES[precision] / 1e6 for cut in ways}
    return Variant(share, precision, ways, sides, gallery, lambda cut: whole - saved[id(cut)])


def _weights(student: DualEncoder) -> int:
    """How many weights the graphs have; those of the maps to the teacher's space are in none that can be cut."""
    return sum(value.numel() for value in student.model.parameters())
