"""The training loop: a student is made to embed as its teacher does, whose rows are stored or made on each batch.

Whatever happens at a step is a function of the inputs, the seed and the step alone, so a run that is killed at any
moment and started again ends with the same bits as one that was not (on a CPU, with the same number of threads).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clipdistill.config import TrainConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.core.progress import duration, progress
from clipdistill.losses.objective import LossWeights, Objective
from clipdistill.towers.student import DualEncoder
from clipdistill.training import numerics
from clipdistill.training.batch import RowFacts
from clipdistill.training.batches import KEPT_BYTES, BatchMaker, TeacherRows, TrainingData
from clipdistill.training.budget import CALIBRATION_STEPS, Cost, in_words, measure, plan_steps
from clipdistill.training.folder import TrainingFolder
from clipdistill.training.live import LiveRows
from clipdistill.training.metrics import Clock, Metrics
from clipdistill.training.mutual import Mutual
from clipdistill.training.notes import line, note_rejected, skipped
from clipdistill.training.optimizer import build_optimizer, frozen, part_of, set_rates, trained_parameters
from clipdistill.training.run import ExtraLoss, OnEval, OnLog, Run
from clipdistill.training.schedule import rate
from clipdistill.training.state import Average, Best, TrainingState, copy_of
from clipdistill.training.step import set_training, statistics, take_step

_log = logging.getLogger("clipdistill")


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
        run = Run(
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
            statistics=[*statistics(student.module), *statistics(state.teacher)],
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


def _planned(run: Run) -> Run:
    """The run with as many steps as fit its time, as it was planned once or is by a measurement now."""
    if run.train.budget_minutes is None:
        return run
    plan = run.folder.planned()
    if plan is None:
        plan = plan_steps(run.train, _cost(run))
        run.folder.keep_plan(plan)
    _log.info("%s", in_words(plan))
    return replace(run, train=plan.settings(run.train), plan=plan)


def _cost(run: Run) -> Cost:
    """Time a few first steps and an evaluation; the state is the same, bit for bit, afterwards."""
    state, before = run.state, run.state.to_checkpoint().copy()

    def evaluate() -> None:
        state.module.eval()
        if run.on_eval is not None:
            run.on_eval(run.student, 0)
        run.folder.rehearse(run.student, state)

    set_training(run)
    set_rates(state.optimizer, rate(0, run.train.steps, run.train.warmup, run.train.final_lr))
    batches = run.maker.batches(0, CALIBRATION_STEPS, run.train.workers)
    try:
        return measure(batches, lambda batch: take_step(run, batch), evaluate, 60 * (run.train.budget_minutes or 0.0))
    finally:
        state.restore(before, "the state before the measurement")


def _train(run: Run, metrics: Metrics) -> None:
    train, state, clock, began = run.train, run.state, Clock(), time.monotonic()
    set_training(run)
    batches = run.maker.batches(state.step, train.steps, train.workers)
    with progress("training", train.steps - state.step, "steps") as advance:
        for batch in clock.timed(batches):
            with clock.measure("compute", batch.samples):
                note_rejected(run, batch)
                share = rate(batch.step, train.steps, train.warmup, train.final_lr)
                set_rates(state.optimizer, share)
                outcome = take_step(run, batch)
            state.step = batch.step + 1
            last = state.step == train.steps
            if not outcome.finite:
                metrics.write(skipped(run, batch, outcome))
            elif last or state.step % train.log_every == 0:
                metrics.write(line(run, outcome, share) | clock.read())
            evaluated = last or (run.on_eval is not None and state.step % train.eval_every == 0)
            if evaluated:
                _evaluate(run, metrics)
            if evaluated or state.step % train.save_every == 0:
                metrics.sync()
                run.folder.save(state)
                _note_time(run, time.monotonic() - began)
            advance(1)


def _note_time(run: Run, seconds: float) -> None:
    """Add this process's time to the plan's, and say at the end how far it was met."""
    if run.plan is None:
        return
    plan = replace(run.plan, taken_seconds=run.plan.taken_seconds + seconds)
    run.folder.keep_plan(plan)
    if run.state.step == plan.steps:
        _log.info("planned: %s, taken: %s", duration(plan.planned_seconds), duration(plan.taken_seconds))


def _evaluate(run: Run, metrics: Metrics) -> None:
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
    set_training(run)


def _score(values: Mapping[str, float]) -> float:
    score = float(values.get("score", math.nan))
    if not math.isfinite(score):
        raise DataError(f"the evaluation must give a finite 'score'; it gave {dict(values)}")
    return score


def _take_best(run: Run) -> None:
    """Give the student its best weights, which also lie in the folder whatever a kill left there."""
    best = run.state.best
    run.state.module.eval()
    if best is not None:
        run.state.module.load_state_dict(best.weights)
        if run.state.teacher is not None and best.teacher is not None:
            run.state.teacher.load_state_dict(best.teacher)
        if not run.folder.has_best(best):
            run.folder.keep_best(run.student, best)


def _check(run: Run) -> None:
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
