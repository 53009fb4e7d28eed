"""One step of the training: the losses of a batch, their gradients, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipdistill.losses.objective import Embeddings, LossTerms, Targets
from clipdistill.towers.matryoshka import cut
from clipdistill.towers.student import DualEncoder
from clipdistill.training import numerics
from clipdistill.training.batch import Batch
from clipdistill.training.masking import mask_patches, statistics_at_rest
from clipdistill.training.optimizer import align_gradients, part_of
from clipdistill.training.run import Outcome, Run
from clipdistill.training.sampler import seed_of


def take_step(run: Run, batch: Batch) -> Outcome:
    """One update of the weights; where a loss or a gradient is not finite, nothing changes at all."""
    state = run.state
    torch.manual_seed(seed_of(run.seed, "step", batch.step))  # for dropout and drop path
    before = [value.clone() for value in run.statistics]
    state.optimizer.zero_grad(set_to_none=True)
    terms, theirs = [], []
    parts = list(batch.parts(run.train.accumulation))
    for part in parts:
        own, teacher = _losses(run, part.to(run.device))
        terms.append(own)
        theirs += [] if teacher is None else [teacher]
        total = own.total if teacher is None else own.total + teacher.total
        state.scaler.scale(total / len(parts)).backward()  # type: ignore[no-untyped-call]
    outcome = _outcome(run, terms, theirs)
    if outcome.finite:
        align_gradients(state.names)
        state.scaler.step(state.optimizer)
        if state.average is not None:
            state.average.update(batch.step)
    else:
        _put_back(run.statistics, before)
    state.scaler.update()
    return outcome


def _outcome(run: Run, terms: list[LossTerms], theirs: list[LossTerms]) -> Outcome:
    """Clip the gradients, the teacher's apart from the student's, and read what decides whether the step counts."""
    state, bound = run.state, run.train.grad_clip or math.inf
    state.scaler.unscale_(state.optimizer)
    teacher = [value for value, name in state.names.items() if part_of(name) == "teacher"]
    student = [value for value, name in state.names.items() if part_of(name) != "teacher"]
    norms = [nn.utils.clip_grad_norm_(student, bound), nn.utils.clip_grad_norm_(teacher, bound)]
    losses = [torch.stack([one.total.detach() for one in each]).mean() for each in (terms, theirs) if each]
    # The step's only wait for the device, but for mutual training's look at the student's scale.
    numbers = torch.stack([value.to(losses[0]) for value in (*norms, *losses)]).tolist()
    joined = [LossTerms(own.total, own.parts | their.parts) for own, their in zip(terms, theirs, strict=False)] or terms
    return Outcome(joined, numbers[2], numbers[0], numbers[3] if theirs else 0.0, numbers[1])


def _losses(run: Run, batch: Batch) -> tuple[LossTerms, LossTerms | None]:
    """The student's losses on a part of a batch; and the teacher's, where it is trained too."""
    rows = _teacher_rows(run, batch)
    batch = replace(batch, teacher_images=rows.images.detach(), teacher_texts=rows.texts.detach())
    own, terms = _student_losses(run, batch)
    if run.mutual is None:
        return terms, None
    return terms, run.mutual.losses(rows, own, run.objective.scale(), batch)


def _teacher_rows(run: Run, batch: Batch) -> Embeddings:
    """The teacher's rows: stored ones, or a live teacher's, at its own precision unless it is trained."""
    if run.live is None:
        return Embeddings(batch.teacher_images, batch.teacher_texts)
    if run.mutual is None:
        with torch.no_grad():
            return run.live.rows(batch)
    with numerics.autocast(run.precision, run.device):
        return run.live.rows(batch)


def _student_losses(run: Run, batch: Batch) -> tuple[Embeddings, LossTerms]:
    student, query_side = run.student, run.student.searches is not None
    with numerics.autocast(run.precision, run.device):
        # A tower without rows is not run: not every network takes an empty batch.
        none = batch.pixels.new_zeros(0, student.dim)
        images = student.embed_pixels(batch.pixels) if len(batch.pixels) and not query_side else none
        texts = student.embed_tokens(batch.tokens) if len(batch.tokens) else none
    own = Embeddings(batch.teacher_images if query_side else images, texts)
    projected = Embeddings(student.to_teacher(own.images, "image"), student.to_teacher(own.texts, "text"))
    own = projected if query_side else own  # its texts meet the teacher's pictures, in the teacher's space
    teacher = Embeddings(batch.teacher_images, batch.teacher_texts)
    narrower = [_narrower(student, own, dim) for dim in student.dims[1:]]
    extra = [term for one in run.extras for term in one.terms(student, batch, own)]
    targets = Targets(teacher, batch.positives, batch.pairs, batch.queue, own_images=not query_side)
    share = batch.step / run.train.steps
    # Behind the further losses, which watch what the student does with the whole pictures.
    masked = _masked(run, batch) if len(batch.pixels) and not query_side and run.objective.wants_masked(share) else None
    terms: LossTerms = run.objective(
        own, projected, targets, masked=masked, narrower=narrower, extra=extra, share=share
    )
    return own, terms


def _masked(run: Run, batch: Batch) -> Tensor:
    """The student's embeddings, in the teacher's width, of the batch's pictures with most patches masked."""
    student, ratio = run.student, run.objective.weights.mask_ratio
    pixels = mask_patches(batch.pixels, batch.keys, ratio, run.seed, batch.step)
    with statistics_at_rest(student.module), numerics.autocast(run.precision, run.device):
        return student.to_teacher(student.embed_pixels(pixels), "image")


def _narrower(student: DualEncoder, own: Embeddings, dim: int) -> tuple[Embeddings, Embeddings]:
    """The embeddings cut to a width, and the same in the teacher's space."""
    short = Embeddings(cut(own.images, dim), cut(own.texts, dim))
    return short, Embeddings(student.to_teacher(short.images, "image"), student.to_teacher(short.texts, "text"))


def set_training(run: Run) -> None:
    """Put the networks into training mode, the batch norms of frozen parts left at rest."""
    run.state.module.train()
    for norm in run.frozen_norms:
        norm.eval()
    if run.mutual is not None:
        run.mutual.set_training()


def statistics(module: nn.Module | None) -> list[Tensor]:
    """What a forward pass in training changes: the running statistics of the batch norms."""
    norms = [part for part in module.modules() if hasattr(part, "running_mean")] if module is not None else []
    return [value for norm in norms for value in norm.buffers(recurse=False)]


def _put_back(values: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for value, old in zip(values, before, strict=True):
        value.copy_(old)
