"""The training stage: the student is built, distilled from the cache, and the best one kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.cache import AnyCache, EnsembleCache
from clipdistill.config import LossConfig, RunConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError
from clipdistill.evaluation import Judged, judged
from clipdistill.losses.batch import Member
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale
from clipdistill.losses.presets import PRESETS
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.measures import overlap_at_k
from clipdistill.stages.blocks import distilled_blocks
from clipdistill.stages.classify import ClassTask, check_trained, class_task, class_validation, save_classifier
from clipdistill.stages.inherit import Phase, calibration, cut_again, inherits, phases, prepared_pictures, scheduled
from clipdistill.stages.inputs import RunData
from clipdistill.stages.mutual import mutual_inputs, new_mutual
from clipdistill.stages.query import combine, new_query_student, query_scores
from clipdistill.stages.teachers import drawn_views, first_teacher, whole_teacher
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.blueprint import INHERIT, TEACHER
from clipdistill.towers.build import build_student
from clipdistill.towers.ensemble import EnsembleTeacher
from clipdistill.towers.inheritance.trunk import plan_trunk
from clipdistill.towers.live import LiveTeacher
from clipdistill.towers.matryoshka import principal_axes
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher
from clipdistill.towers.teacher_folder import save_teacher
from clipdistill.training.batches import TrainingData
from clipdistill.training.live import Live, LiveEnsemble, LiveRows
from clipdistill.training.loop import distill
from clipdistill.training.run import OnLog

_log = logging.getLogger("clipdistill")
_TOP = 10
_AXES_ROWS = 20_000  # of each modality: the axes of more rows are no other ones


def loss_weights(config: LossConfig) -> LossWeights:
    """The preset's weights with the configuration's own values in their places."""
    known = {field.name for field in dataclasses.fields(LossWeights)}
    changed = {key: value for key, value in config.model_dump(include=known).items() if value is not None}
    return dataclasses.replace(PRESETS[config.preset], **changed)


def check_losses(config: RunConfig) -> None:
    """Refuse a loss that cannot be trained on such batches, before a teacher has run for it.

    Raises:
        ConfigError: Naming the weights and what they need.
    """
    train, further = config.train, config.task.kind == "classification"
    images, texts = train.batch + train.batch_images > 0, train.batch + train.batch_texts > 0
    scale = TeacherScale(1.0, None)  # any does
    objective = Objective(loss_weights(config.loss), scale, dim=1, teacher_dim=1, further=further)
    objective.check(train.batch > 0, images=images, texts=texts)
    if further:
        check_trained(objective, train, config.task.distil, config.task.labels)


def new_objective(config: LossConfig, student: DualEncoder, cache: AnyCache, *, further: bool = False) -> Objective:
    """What a student of a teacher's stored embeddings is trained to minimise, ``further`` terms aside."""
    return Objective(
        loss_weights(config),
        teacher_scale(cache),
        dim=student.dim if student.searches is None else student.teacher_dim,  # there its texts meet the pictures
        teacher_dim=student.teacher_dim,
        further=further,
    )


def teacher_scale(cache: AnyCache) -> TeacherScale:
    """How a teacher turns cosines into logits: an ensemble as one teacher, or each of its members for itself."""
    members: tuple[Member, ...] = ()
    if isinstance(cache, EnsembleCache) and cache.ensemble.form == "probabilities":
        parts = zip(cache.ensemble.columns, cache.ensemble.members, strict=True)
        members = tuple(Member(columns, facts.scale, facts.weight) for columns, facts in parts)
    return TeacherScale(cache.scale, cache.bias, members)


def new_student(config: RunConfig, data: RunData, cache: AnyCache, teacher: Teacher | None) -> DualEncoder:
    """Build the untrained student of a configuration."""
    student, rows = config.student, None
    if student.image == TEACHER:
        return new_query_student(config, cache, teacher, vocabulary_texts(data))
    if teacher is not None and inherits(config):
        if student.image == INHERIT:
            plan_trunk(teacher.model.visual, student.inherit)  # a CNN with a schedule is refused before anything trains
        rows = calibration(config, data, teacher.transform, teacher.tokenizer)
    dim = student.dim or (student.dims[0] if student.dims else cache.widest)
    return build_student(
        image=student.image,
        text=student.text,
        dim=dim,
        teacher_dim=cache.dim,
        image_init=student.image_init,
        text_init=student.text_init,
        pretrained=student.pretrained,
        image_weights=Path(student.image_weights) if student.image_weights else None,
        image_size=student.image_size,
        texts=vocabulary_texts(data),
        vocab_size=student.vocab_size,
        teacher=teacher,
        seed=config.seed,
        dims=student.dims,
        axes=_axes(data, cache, dim) if len(student.dims) > 1 or (inherits(config) and dim != cache.dim) else None,
        max_pixels=config.data.max_pixels,
        inherit=scheduled(student.inherit),
        calibration=rows,
        share=student.prune,
        pictures=lambda preprocess: prepared_pictures(config, data, preprocess),
    )


def _axes(data: RunData, cache: AnyCache, dim: int) -> Any:
    """The teacher's principal axes, for embeddings that can be cut: [D, up to dim].

    Over the training rows, or ``val``'s where those alone are stored (live teachers); None where neither are.
    """
    for name in ("train", "val"):
        pairs = data.sets[name].pairs if name in data.sets else ()
        keys = _spread([pair.key for pair in pairs if cache.has_image(pair.key)])
        texts = _spread([text for text in dict.fromkeys(t for p in pairs for t in p.captions) if cache.has_text(text)])
        if keys or texts:
            rows = np.concatenate([cache.image_rows(keys), cache.text_rows(texts)])
            return principal_axes(rows, min(dim, cache.dim))
    return None


def _spread(names: list[str]) -> list[str]:
    return names[:: max(1, len(names) // _AXES_ROWS)]


def vocabulary_texts(data: RunData) -> list[str]:
    """The texts that decide the student's vocabulary: training captions and unpaired texts, not the other sets."""
    source = data.sets.get("train")
    return [*(text for pair in source.pairs for text in pair.captions), *data.texts] if source else list(data.texts)


def train(
    workspace: Workspace,
    data: RunData,
    cache: AnyCache,
    teachers: Sequence[Teacher | None],
    *,
    force: bool = False,
    on_log: OnLog | None = None,
) -> DualEncoder:
    """Distil the student of a run, going on from its last checkpoint.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The teacher's embeddings of them.
        teachers: The live teacher, or the ensemble's: the first one's tokenizer and token table are where ``inherit``
            begins, and all of them embed each batch unless ``train.mode`` is ``cached``.
        force: Train again from the start.
        on_log: Called with each line of the metrics; what it raises ends the training.

    Returns:
        The student that agrees best with the teacher's ranking (of a classification, with its classes) on ``val``, as
        saved in the run's ``student`` folder.

    Raises:
        MismatchError: If a student or checkpoint of other inputs lies in the run's folder.
    """
    config = workspace.config
    made_from = {
        "seed": config.seed,
        "student": fingerprint.of_value(config.student.model_dump(mode="json")),
        # Resolved, as another version may give a preset other weights.
        "loss": fingerprint.of_value(dataclasses.asdict(loss_weights(config.loss))),
        "features": fingerprint.of_value(config.features.model_dump(mode="json")),
        "train": fingerprint.of_value(config.train.model_dump(mode="json", exclude={"workers", "log_every"})),
        "data": data.fingerprint,
        "teacher cache": cache.fingerprint,
        **_live_inputs(config, teachers),
        **({"task": fingerprint.of_value(config.task.model_dump(mode="json"))} if data.classes else {}),
        **mutual_inputs(config),
    }
    done = workspace.is_done("train", made_from, workspace.student, force=force)
    if done and (config.train.mode != "mutual" or workspace.mutual.exists()):
        return DualEncoder.load(workspace.student)
    if force:
        _restart(workspace)
    student = new_student(config, data, cache, first_teacher(teachers))
    # What is trained is a copy: the teacher as it was stays the reference, and is asked for its speed later.
    running = [one and one.copy() for one in teachers] if config.train.mode == "mutual" else teachers
    task = class_task(config, data, cache)
    for phase in phases(config, workspace.training, fingerprint.of_value(made_from)):
        source = first_teacher(teachers)
        if phase.number > 1 and source is not None:
            student = cut_again(config, data, student, source, phase.rule)
        student = _distilled(workspace, data, cache, student, running, task, phase, on_log)
    if config.train.mode == "mutual" and running[0] is not None:
        save_teacher(running[0], workspace.mutual, extra={"made_from": made_from})
    student.save(workspace.student)
    if student.searches is not None:
        combine(workspace, student, first_teacher(teachers))
    if task is not None:
        save_classifier(workspace, task, student)
    workspace.mark_done("train", made_from)
    return student


def _distilled(
    workspace: Workspace,
    data: RunData,
    cache: AnyCache,
    student: DualEncoder,
    running: Sequence[Teacher | None],
    task: ClassTask | None,
    phase: Phase,
    on_log: OnLog | None,
) -> DualEncoder:
    """Train a student for one phase, going on from the phase's last checkpoint."""
    config = workspace.config
    blocks = distilled_blocks(workspace, data, cache, student, first_teacher(running))
    objective = new_objective(config.loss, student, cache, further=task is not None)
    objective.check(has_pairs=config.train.batch > 0)
    return distill(
        student,
        cache,
        training_data(config, data),
        objective=objective,
        train=phase.train,
        seed=phase.seed,
        folder=phase.folder,
        on_eval=validation(data, cache) if task is None else class_validation(task, data, cache),
        fingerprint=phase.fingerprint,
        on_log=on_log and (lambda line: on_log({**line, "step": line["step"] + phase.first_step})),
        extras=(*blocks.extras, *(() if task is None else (task.loss,))),
        facts=(*blocks.facts, *(() if task is None else (task.labels,))),
        live=live_teacher(config, running, wanted=blocks.live),
        mutual=new_mutual(config, running),
    )


def live_teacher(config: RunConfig, teachers: Sequence[Teacher | None], *, wanted: bool = False) -> LiveRows | None:
    """The teachers as the loop runs them on each batch; None where the student learns from stored embeddings.

    Args:
        config: The run's configuration.
        teachers: The live teacher, or the ensemble's.
        wanted: Whether it has to run even in mode ``cached``, for its inner blocks.
    """
    if config.train.mode == "cached" and not wanted:
        return None
    whole = whole_teacher(config, teachers)
    if whole is None:
        raise ConfigError(f'train.mode = "{config.train.mode}" runs the teacher: teacher.model is needed')
    if isinstance(whole, EnsembleTeacher):
        return LiveEnsemble(list(map(LiveTeacher, whole.teachers)), whole.ensemble, drawn_views(config))
    return Live(LiveTeacher(whole), drawn_views(config))


def _live_inputs(config: RunConfig, teachers: Sequence[Teacher | None]) -> dict[str, Any]:
    """What decides a training with a live teacher beside the rest: the teacher, and the views that both are shown."""
    teacher = whole_teacher(config, teachers)
    if config.train.mode == "cached" or teacher is None:
        return {}
    return {"teacher": teacher.fingerprint, "views": fingerprint.of_value(drawn_views(config).to_json())}


def training_data(config: RunConfig, data: RunData) -> TrainingData:
    """The rows that the loop draws from."""
    source = data.sets.get("train")
    if source is None:
        return TrainingData((), (), data.images, data.texts, data.image_weights, data.text_weights)
    if config.train.batch and not len(source):
        raise ConfigError("data.train: no rows are left to train on")
    return TrainingData(source.pairs, source.weights, data.images, data.texts, data.image_weights, data.text_weights)


def validation(data: RunData, cache: AnyCache) -> Callable[[Any, int], Mapping[str, float]] | None:
    """A function that scores a student on ``val`` by its agreement with the teacher's ranking; None without a val set.

    The score is overlap@10, the mean of both directions: recall of the teacher's own ten first hits. Of a student that
    is a text tower alone it is that of its texts against the teacher's pictures.
    """
    source = data.sets.get("val")
    if source is None or not len(source):
        _log.warning("no validation set (data.val or data.hold_out.val): the last step's student is kept, not the best")
        return None
    rows = judged("val", source.pairs)
    teacher_images, teacher_texts = cache.image_rows(rows.keys), cache.text_rows(rows.texts)
    wanted = {
        "text_to_image": exact_top_k(teacher_texts, teacher_images, _TOP).ids,
        "image_to_text": exact_top_k(teacher_images, teacher_texts, _TOP).ids,
    }

    def on_eval(student: DualEncoder, step: int) -> Mapping[str, float]:
        if student.searches is not None:
            return query_scores(rows, student, teacher_images, wanted["text_to_image"])
        images, texts = student.encode_images(rows.pictures), student.encode_texts(rows.texts)
        values = {
            "overlap10_text_to_image": _overlap(exact_top_k(texts, images, _TOP).ids, wanted["text_to_image"]),
            "overlap10_image_to_text": _overlap(exact_top_k(images, texts, _TOP).ids, wanted["image_to_text"]),
            **_success(rows, texts, images),
        }
        score = (values["overlap10_text_to_image"] + values["overlap10_image_to_text"]) / 2
        return {**values, "score": score}

    return on_eval


def _overlap(student: Any, teacher: Any) -> float:
    return float(np.mean(overlap_at_k(student, teacher, _TOP)))


def _success(rows: Judged, texts: Any, images: Any) -> dict[str, float]:
    from clipdistill.retrieval.measures import success_at_k

    ids = exact_top_k(texts, images, _TOP).ids
    return {"success10_text_to_image": float(np.mean(success_at_k(ids, rows.relevant_pictures, _TOP)))}


def _restart(workspace: Workspace) -> None:
    import shutil

    for path in (workspace.training, workspace.mutual):
        shutil.rmtree(path, ignore_errors=True)
