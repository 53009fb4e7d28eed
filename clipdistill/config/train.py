"""The configuration of the training loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipdistill.config.base import Above0, Count, Positive, Section, Share, Weight


class TrainConfig(Section):
    """The training loop."""

    mode: Literal["cached", "live", "mutual"] = "cached"
    """``cached``: from the teacher's stored embeddings; ``live``: the teacher runs on each augmented batch; ``mutual``:
    teacher and student train together. But in ``cached`` only the measured sets' embeddings are stored. Validation is
    against the teacher's own ranking in all three, in ``mutual`` that of the teacher before it was trained."""
    steps: Positive = 1000
    budget_minutes: Above0 | None = None
    """A time instead of steps: as many as fit it, evaluations included, by a short measurement before the first one.
    ``steps`` is then no bound, but what ``warmup``, ``eval_every`` and ``save_every`` are in proportion to. A resumed
    run keeps the number that it began with."""
    batch: Count = 64
    """Pairs a step."""
    batch_images: Count = 0
    """Pictures without a text a step, drawn from ``data.images`` and ``data.train``."""
    batch_texts: Count = 0
    """Texts without a picture a step, drawn from ``data.texts`` and the captions of ``data.train``."""
    accumulation: Positive = 1
    """The batch is cut into so many parts, whose gradients are averaged; each part contrasts within itself."""
    lr: Above0 = 5e-4
    lr_image: Above0 | None = None
    """The picture tower's learning rate; none = ``lr``."""
    lr_head: Above0 | None = None
    """The learning rate of the picture tower's last layer, which is new on a pretrained tower; none = ``lr_image``."""
    lr_text: Above0 | None = None
    """The text tower's learning rate; none = ``lr``."""
    weight_decay: Weight = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: Count = 50
    """Steps of linear warm-up, before the cosine."""
    final_lr: Share = 0.0
    """The share of the learning rate that is left at the last step."""
    grad_clip: Weight = 1.0
    """The largest norm of the gradient; 0 = not clipped."""
    freeze: tuple[str, ...] = ()
    """Beginnings of parameter names that are not trained: ``visual.trunk.conv_stem``."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The decay of an exponential moving average of the weights, which is then evaluated and kept; 0 = none."""
    eval_every: Positive = 200
    save_every: Positive = 200
    log_every: Positive = 10
    workers: Count = 0
    """Processes that decode pictures ahead; never changes a result."""
    max_skipped: Count = 10
    """Steps with a loss or gradient that is not finite are skipped; more than this and the run stops."""
    threads: Positive | None = None
    """Computing threads; none = torch's own choice. Weights are bit-identical only at equal threads."""
    device: str = "auto"


class MutualConfig(Section):
    """The teacher's part of mutual (online) distillation."""

    lr: Above0 = 1e-5
    """The teacher's learning rate."""
    freeze: tuple[str, ...] = ()
    """Beginnings of the teacher's parameter names that are not trained."""
    weight: Weight = 1.0
    """Of the teacher's KL to the student's similarities, beside its own task loss."""
