"""The training loop: a student is made to embed as its teacher does, whose rows are stored or made on each batch.

Whatever happens at a step is a function of the inputs, the seed and the step alone, so a run that is killed at any
moment and started again ends with the same bits as one that was not (on a CPU, with the same number of threads).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipdistill.config import TrainConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.core.progress import duration, progress
from clipdistill.losses.objective import Embeddings, ExtraTerm, LossTerms, LossWeights, Objective, Targets
from clipdistill.towers.matryoshka import cut
from clipdistill.towers.student import DualEncoder
from clipdistill.training import numerics
from clipdistill.training.batch import Batch, RowFacts
from clipdistill.training.batches import KEPT_BYTES, BatchMaker, TeacherRows, TrainingData
from clipdistill.training.budget import CALIBRATION_STEPS, Cost, Plan, in_words, measure, plan_steps
from clipdistill.training.folder import TrainingFolder
from clipdistill.training.live import LiveRows
from clipdistill.training.masking import mask_patches, statistics_at_rest
from clipdistill.training.metrics import Clock, Metrics
from clipdistill.training.mutual import Mutual
from clipdistill.training.optimizer import (
    align_gradients,
    build_optimizer,
    frozen,
    part_of,
    set_rates,
    trained_parameters,
)
from clipdistill.training.sampler import seed_of
from clipdistill.training.schedule import rate
from clipdistill.training.state import Average, Best, TrainingState, copy_of

MAX_REJECTED = 0.05
"""The share of a batch's pictures that may be unreadable, though one always may. All of them could be read when the
cache was made, so more means that the data are going away."""

OnEval = Callable[[DualEncoder, int], Mapping[str, float]]
OnLog = Callable[[Mapping[str, Any]], None]
_log = logging.getLogger("clipdistill")


class ExtraLoss(Protocol):
    """A loss of its own beside the objective, of inner blocks or of a task."""

    @property
    def learned(self) -> nn.Module:
        """What it trains with the student and leaves behind: its parameters are optimised and checkpointed."""
        ...

    def watching(self, student: DualEncoder) -> AbstractContextManager[object]:
        """A block in which the student trains: hooks are set at its beginning, and gone at its end."""
        ...

    def terms(self, student: DualEncoder, batch: Batch, embedded: Embeddings) -> Iterator[ExtraTerm]:
        """The terms of a batch, right after the student embedded it.

        Args:
            student: The student.
            batch: On the student's device; what else is known of its rows is in its facts.
            embedded: The student's unit rows of the batch.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    """The live objects of one call of :func:`distill`."""

    student: DualEncoder
    objective: Objective
    train: TrainConfig
    seed: int
    maker: BatchMaker
    state: TrainingState
    folder: TrainingFolder
    on_eval: OnEval | None
    extras: tuple[ExtraLoss, ...]
    live: LiveRows | None
    mutual: Mutual | None
    frozen_norms: list[nn.Module]
    statistics: list[Tensor]
    device: torch.device
    precision: numerics.Precision
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one step gave: the losses of its parts, and the numbers that decide whether it counts."""

    terms: list[LossTerms]
    loss: float
    grad_norm: float
    teacher_loss: float
    teacher_norm: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.grad_norm, self.teacher_loss, self.teacher_norm)))


def distill(
    student: DualEncoder,
    cache: TeacherRows,
    data: TrainingData,
    *,
    objective: Objective,
    train: TrainConfig,
    seed: int,
    folder: str | Path | None = None,
    on_eval: OnEval | None = None,
    resume: bool = True,
    fingerprint: str = "",
    on_log: OnLog | None = None,
    extras: Sequence[ExtraLoss] = (),
    facts: Sequence[RowFacts] = (),
    live: LiveRows | None = None,
    mutual: Mutual | None = None,
) -> DualEncoder:
    """Train a student from a teacher's embeddings: stored, or made on each batch.

    Args:
        student: The student to train, in place.
        cache: The teacher's rows of all pictures and texts in ``data``; beside live teachers none of them is used.
        data: What to train on.
        objective: What to minimise; what it learns is trained with the student.
        train: The loop's settings.
        seed: Decides batches, captions, views and dropout.
        folder: Where checkpoints, metrics and the best student are written; None writes nothing.
        on_eval: Called with the student and the number of steps done, every ``train.eval_every`` steps and at the end;
            gives ``score`` (higher is better) and any other numbers to record. With ``train.budget_minutes`` it is also
            called once with step 0, to see how long it takes.
        resume: Go on from the folder's newest checkpoint; otherwise what an earlier training left there is removed.
        fingerprint: Of everything that decides the run; a checkpoint with another one is refused.
        on_log: Called with each line of the metrics.
        extras: Further losses; what they learn is trained too.
        facts: What the batches tell those of their rows.
        live: Teachers that embed each batch, in the views that they and the student are shown of it.
        mutual: The live teacher, to be trained beside the student; ``live`` embeds with its network.

    Returns:
        The student with its best weights by ``score`` (of equal ones the earliest), or its last without ``on_eval``. A
        teacher that was trained has its weights of the same step then.

    Raises:
        ConfigError: If the settings do not fit the data, the student or the device, or the budget is too small.
        DataError: If too many pictures cannot be read, or too many steps have no finite loss or gradient.
        MismatchError: If a checkpoint is of another run, or a picture not the one that the cache was made from.
    """
    folder = None if folder is None else Path(folder)
    device = numerics.choose_device(train.device)
    with ExitStack() as stack:
        stack.enter_context(numerics.reproducible(device, train.threads))
        norms = stack.enter_context(frozen(student.model, train.freeze))
        if mutual is not None:
            stack.enter_context(mutual.training())
        state = _new_state(student, objective, extras, train, device, mutual)
        for one in extras:
            stack.enter_context(one.watching(student))
        run = _Run(
            student=student,
            objective=objective,
            train=train,
            seed=seed,
            maker=_new_maker(student, cache, data, train, seed, facts, live, objective.weights),
            state=state,
            folder=TrainingFolder(folder, fingerprint),
            on_eval=on_eval,
            extras=tuple(extras),
            live=live,
            mutual=mutual,
            frozen_norms=norms,
            statistics=[*_statistics(student.module), *_statistics(state.teacher)],
            device=device,
            precision=numerics.choose_precision(train.precision, device),
        )
        _check(run)
        if not resume:
            run.folder.clear()
        run = _planned(run)
        run.folder.resume(state, run.train.steps)
        if state.step < run.train.steps:
            with Metrics(folder, state.step, on_log) as metrics:
                _train(run, metrics)
        _take_best(run)
    return student


def _planned(run: _Run) -> _Run:
    """The run with as many steps as fit its time, as it was planned once or is by a measurement now."""
    if run.train.budget_minutes is None:
        return run
    plan = run.folder.planned()
    if plan is None:
        plan = plan_steps(run.train, _cost(run))
        run.folder.keep_plan(plan)
    _log.info("%s", in_words(plan))
    return replace(run, train=plan.settings(run.train), plan=plan)


def _cost(run: _Run) -> Cost:
    """Time a few first steps and an evaluation; the state is the same, bit for bit, afterwards."""
    state, before = run.state, run.state.to_checkpoint().copy()

    def evaluate() -> None:
        state.module.eval()
        if run.on_eval is not None:
            run.on_eval(run.student, 0)
        run.folder.rehearse(run.student, state)

    _set_training(run)
    set_rates(state.optimizer, rate(0, run.train.steps, run.train.warmup, run.train.final_lr))
    batches = run.maker.batches(0, CALIBRATION_STEPS, run.train.workers)
    try:
        return measure(batches, lambda batch: _step(run, batch), evaluate, 60 * (run.train.budget_minutes or 0.0))
    finally:
        state.restore(before, "the state before the measurement")


def _train(run: _Run, metrics: Metrics) -> None:
    train, state, clock, began = run.train, run.state, Clock(), time.monotonic()
    _set_training(run)
    batches = run.maker.batches(state.step, train.steps, train.workers)
    with progress("training", train.steps - state.step, "steps") as advance:
        for batch in clock.timed(batches):
            with clock.measure("compute", batch.samples):
                _note_rejected(run, batch)
                share = rate(batch.step, train.steps, train.warmup, train.final_lr)
                set_rates(state.optimizer, share)
                outcome = _step(run, batch)
            state.step = batch.step + 1
            last = state.step == train.steps
            if not outcome.finite:
                metrics.write(_skipped(run, batch, outcome))
            elif last or state.step % train.log_every == 0:
                metrics.write(_line(run, outcome, share) | clock.read())
            evaluated = last or (run.on_eval is not None and state.step % train.eval_every == 0)
            if evaluated:
                _evaluate(run, metrics)
            if evaluated or state.step % train.save_every == 0:
                metrics.sync()
                run.folder.save(state)
                _note_time(run, time.monotonic() - began)
            advance(1)


def _note_time(run: _Run, seconds: float) -> None:
    """Add this process's time to the plan's, and say at the end how far it was met."""
    if run.plan is None:
        return
    plan = replace(run.plan, taken_seconds=run.plan.taken_seconds + seconds)
    run.folder.keep_plan(plan)
    if run.state.step == plan.steps:
        _log.info("planned: %s, taken: %s", duration(plan.planned_seconds), duration(plan.taken_seconds))


def _step(run: _Run, batch: Batch) -> _Outcome:
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


def _outcome(run: _Run, terms: list[LossTerms], theirs: list[LossTerms]) -> _Outcome:
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
    return _Outcome(joined, numbers[2], numbers[0], numbers[3] if theirs else 0.0, numbers[1])


def _losses(run: _Run, batch: Batch) -> tuple[LossTerms, LossTerms | None]:
    """The student's losses on a part of a batch; and the teacher's, where it is trained too."""
    rows = _teacher_rows(run, batch)
    batch = replace(batch, teacher_images=rows.images.detach(), teacher_texts=rows.texts.detach())
    own, terms = _student_losses(run, batch)
    if run.mutual is None:
        return terms, None
    return terms, run.mutual.losses(rows, own, run.objective.scale(), batch)


def _teacher_rows(run: _Run, batch: Batch) -> Embeddings:
    """The teacher's rows: stored ones, or a live teacher's, at its own precision unless it is trained."""
    if run.live is None:
        return Embeddings(batch.teacher_images, batch.teacher_texts)
    if run.mutual is None:
        with torch.no_grad():
            return run.live.rows(batch)
    with numerics.autocast(run.precision, run.device):
        return run.live.rows(batch)


def _student_losses(run: _Run, batch: Batch) -> tuple[Embeddings, LossTerms]:
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


def _masked(run: _Run, batch: Batch) -> Tensor:
    """The student's embeddings, in the teacher's width, of the batch's pictures with most patches masked."""
    student, ratio = run.student, run.objective.weights.mask_ratio
    pixels = mask_patches(batch.pixels, batch.keys, ratio, run.seed, batch.step)
    with statistics_at_rest(student.module), numerics.autocast(run.precision, run.device):
        return student.to_teacher(student.embed_pixels(pixels), "image")


def _narrower(student: DualEncoder, own: Embeddings, dim: int) -> tuple[Embeddings, Embeddings]:
    """The embeddings cut to a width, and the same in the teacher's space."""
    short = Embeddings(cut(own.images, dim), cut(own.texts, dim))
    return short, Embeddings(student.to_teacher(short.images, "image"), student.to_teacher(short.texts, "text"))


def _evaluate(run: _Run, metrics: Metrics) -> None:
    """Score the student as it would be kept, and keep it if it is the best so far; unscored, the last one is."""
    state = run.state
    with state.average.applied() if state.average is not None else nullcontext():
        run.student.set_scale(run.objective.scale(), run.objective.bias())
        state.module.eval()
        score = None
        if run.on_eval is not None:
            values = dict(run.on_eval(run.student, state.step))
            score = _score(values)
            metrics.write({"step": state.step} | values)
            _log.info("step %d: score %.4f", state.step, score)
        if score is None or state.best is None or state.best.score is None or score > state.best.score:
            theirs = None if state.teacher is None else copy_of(state.teacher, "cpu")
            state.best = Best(state.step, score, copy_of(state.module, "cpu"), theirs)
            run.folder.keep_best(run.student, state.best)
    _set_training(run)


def _score(values: Mapping[str, float]) -> float:
    score = float(values.get("score", math.nan))
    if not math.isfinite(score):
        raise DataError(f"the evaluation must give a finite 'score'; it gave {dict(values)}")
    return score


def _take_best(run: _Run) -> None:
    """Give the student its best weights, which also lie in the folder whatever a kill left there."""
    best = run.state.best
    run.state.module.eval()
    if best is not None:
        run.state.module.load_state_dict(best.weights)
        if run.state.teacher is not None and best.teacher is not None:
            run.state.teacher.load_state_dict(best.teacher)
        if not run.folder.has_best(best):
            run.folder.keep_best(run.student, best)


def _line(run: _Run, outcome: _Outcome, share: float) -> dict[str, Any]:
    """A step's own values; a term is the mean of the parts that have it."""
    train, state = run.train, run.state
    names = dict.fromkeys(name for terms in outcome.terms for name in terms.parts)
    found = {name: [terms.parts[name] for terms in outcome.terms if name in terms.parts] for name in names}
    return {
        "step": state.step,
        "epoch": round(run.maker.epoch(state.step), 4),
        "loss": outcome.loss,
        **{name: float(torch.stack(values).mean()) for name, values in found.items()},
        "lr": share * train.lr,
        "lr_image": share * (train.lr_image or train.lr),
        "lr_head": share * (train.lr_head or train.lr_image or train.lr),
        "lr_text": share * (train.lr_text or train.lr),
        "grad_norm": outcome.grad_norm,
        **_teacher_line(run, outcome, share),
        "rejected": len(state.rejected),
    }


def _teacher_line(run: _Run, outcome: _Outcome, share: float) -> dict[str, float]:
    if run.mutual is None:
        return {}
    return {"lr_teacher": share * run.mutual.config.lr, "teacher_grad_norm": outcome.teacher_norm}


def _skipped(run: _Run, batch: Batch, outcome: _Outcome) -> dict[str, Any]:
    """The record of a step that is not taken.

    Raises:
        DataError: If there are more of them than allowed.
    """
    state, allowed = run.state, run.train.max_skipped
    # fp16's scaler finds its scale by overflowing now and then; only at the lowest scale that is the model's fault.
    if not (state.scaler.is_enabled() and math.isfinite(outcome.loss) and state.scaler.get_scale() >= 1):
        state.skipped += 1
    what = f"step {state.step}: loss {outcome.loss}, norm of the gradient {outcome.grad_norm}"
    if run.mutual is not None:
        what += f", the teacher's {outcome.teacher_loss} and {outcome.teacher_norm}"
    _log.warning("%s: skipped (%d so far, %d allowed)", what, state.skipped, allowed)
    if state.skipped > allowed:
        raise DataError(
            f"{what}: {state.skipped} steps were not finite, and train.max_skipped = {allowed}; "
            f"{run.folder.last_checkpoint()}. The last batch's rows: {', '.join(batch.keys[:8] or batch.texts[:8])}. "
            'Lower train.lr, lengthen train.warmup, or use train.precision = "fp32"'
        )
    return {
        "step": state.step,
        "skipped": state.skipped,
        "skipped_loss": outcome.loss,
        "skipped_grad_norm": outcome.grad_norm,
        "keys": list(batch.keys),
    }


def _note_rejected(run: _Run, batch: Batch) -> None:
    """Record pictures that could not be read.

    Raises:
        DataError: If they are more than :data:`MAX_REJECTED` of the batch and more than one, or all of it.
    """
    if not batch.rejected:
        return
    state = run.state
    new = {rejection.key: rejection for rejection in batch.rejected if rejection.key not in state.rejected}
    for rejection in new.values():
        _log.warning("picture %s cannot be read and is left out: %s", rejection.key, rejection.reason)
    state.rejected.update(new)
    run.folder.reject(new.values())
    bad, asked = len(batch.rejected), len(batch.rejected) + len(batch.keys)
    if bad > max(1, MAX_REJECTED * asked) or not batch.keys:
        first = batch.rejected[0]
        before = "They could when the cache was made: see" if run.live is None else "See"
        raise DataError(
            f"step {batch.step + 1}: {bad} of {asked} pictures cannot be read, the first {first.key} ({first.origin}): "
            f"{first.reason}. {before} that the data are still there"
        )


def _set_training(run: _Run) -> None:
    run.state.module.train()
    for norm in run.frozen_norms:
        norm.eval()
    if run.mutual is not None:
        run.mutual.set_training()


def _statistics(module: nn.Module | None) -> list[Tensor]:
    """What a forward pass in training changes: the running statistics of the batch norms."""
    norms = [part for part in module.modules() if hasattr(part, "running_mean")] if module is not None else []
    return [value for norm in norms for value in norm.buffers(recurse=False)]


def _put_back(values: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for value, old in zip(values, before, strict=True):
        value.copy_(old)


def _check(run: _Run) -> None:
    train = run.train
    images, texts = train.batch + train.batch_images > 0, train.batch + train.batch_texts > 0
    run.objective.check(train.batch > 0, images=images, texts=texts)
    fed = [part for part, rows in (("image", images), ("text", texts)) if rows]
    if not any(part_of(name) in fed for name in run.state.names.values()):
        raise ConfigError(f"train.freeze: nothing is left to train in what gets rows ({' and '.join(fed)})")


def _new_maker(
    student: DualEncoder,
    cache: TeacherRows,
    data: TrainingData,
    train: TrainConfig,
    seed: int,
    facts: Sequence[RowFacts],
    live: LiveRows | None,
    weights: LossWeights,
) -> BatchMaker:
    return BatchMaker(
        student.preprocess,
        student.tokenizer,
        cache,
        data,
        train,
        seed,
        max_pixels=student.max_pixels,
        keep_bytes=0 if train.workers else KEPT_BYTES,
        facts=facts,
        live=live,
        queue_rows=weights.queue_rows if weights.queue else 0,
    )


def _new_state(
    student: DualEncoder,
    objective: Objective,
    extras: Sequence[ExtraLoss],
    train: TrainConfig,
    device: torch.device,
    mutual: Mutual | None,
) -> TrainingState:
    module = student.to(device).module
    student.set_scale(objective.scale(), objective.bias())  # now, as it may add a bias to the student's tensors
    learned = nn.ModuleList([objective, *(one.learned for one in extras)]) if extras else objective
    parameters = trained_parameters(module, learned.to(device)) | (mutual.parameters() if mutual is not None else {})
    precision = numerics.choose_precision(train.precision, device)
    return TrainingState(
        module=module,
        objective=learned,
        optimizer=build_optimizer(parameters, train, mutual.config.lr if mutual is not None else None),
        names={value: name for name, value in parameters.items()},
        scaler=numerics.gradient_scaler(precision, device),
        average=Average(module, train.ema) if train.ema else None,
        teacher=mutual.module if mutual is not None else None,
    )
