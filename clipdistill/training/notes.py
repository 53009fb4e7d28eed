"""What a training writes down of its steps: the losses, the steps not taken, the pictures that could not be read."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from clipdistill.core.errors import DataError
from clipdistill.training.batch import Batch
from clipdistill.training.run import Outcome, Run

MAX_REJECTED = 0.05
"""The share of a batch's pictures that may be unreadable, though one always may. All of them could be read when the
cache was made, so more means that the data are going away."""
_log = logging.getLogger("clipdistill")


def line(run: Run, outcome: Outcome, share: float) -> dict[str, Any]:
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


def _teacher_line(run: Run, outcome: Outcome, share: float) -> dict[str, float]:
    if run.mutual is None:
        return {}
    return {"lr_teacher": share * run.mutual.config.lr, "teacher_grad_norm": outcome.teacher_norm}


def skipped(run: Run, batch: Batch, outcome: Outcome) -> dict[str, Any]:
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


def note_rejected(run: Run, batch: Batch) -> None:
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
