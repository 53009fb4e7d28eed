"""Mutual (online) distillation: the teacher trains beside its student, each with its own task and each other's rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from clipdistill.config import MutualConfig
from clipdistill.core.errors import ConfigError
from clipdistill.losses.affinity import affinity_loss
from clipdistill.losses.contrastive import clip_loss, siglip_loss
from clipdistill.losses.objective import MAX_SCALE, Embeddings, LossTerms
from clipdistill.towers.teacher import Teacher
from clipdistill.training.batch import Batch
from clipdistill.training.optimizer import frozen


@final
class Mutual:
    """A teacher that is trained, and what it minimises.

    ``task + weight KL(P(s u v^T) || P(t p q^T))`` (deep mutual learning, Zhang et al. 2018, arXiv 1706.00384): its own
    task loss on the pairs, CLIP's or, where it has a bias, SigLIP's; and the divergence of its image/text softmax from
    the student's, over rows and over columns. No gradient of it reaches the student, as none of the student's
    objective reaches the teacher. Its own scale t and bias are trained with it; t is held at 100 or where it began.

    Args:
        teacher: The teacher, whose network is trained in place.
        config: Its learning rate, what stays frozen, and the weight.
    """

    def __init__(self, teacher: Teacher, config: MutualConfig) -> None:
        self.config = config
        self.module: nn.Module = teacher.model
        self._most = max(MAX_SCALE, teacher.scale)

    @contextmanager
    def training(self) -> Iterator[None]:
        """A block in which the teacher's parameters ask for gradients; it is frozen and in eval mode after it.

        Raises:
            ConfigError: If ``mutual.freeze`` names no parameter, with the nearest; or leaves none.
        """
        self.module.requires_grad_(True)
        try:
            with frozen(self.module, self.config.freeze, "mutual.freeze"):
                if not any("logit_" not in name for name in self.parameters()):
                    raise ConfigError("mutual.freeze: nothing of the teacher is left to train")
                yield
        finally:
            self.module.requires_grad_(False).eval()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What of it is trained, by name, ``teacher.`` before each."""
        return {f"teacher.{name}": value for name, value in self.module.named_parameters() if value.requires_grad}

    def set_training(self) -> None:
        """Training mode, but for the parts that are frozen whole: their dropout and their statistics stand still."""
        _set_training(self.module)

    def losses(self, teacher: Embeddings, student: Embeddings, student_scale: float, batch: Batch) -> LossTerms:
        """Measure one batch.

        Args:
            teacher: p and q, the teacher's unit rows, attached to it.
            student: u and v, the student's own unit rows.
            student_scale: s, the student's inverse temperature.
            batch: Its pairs and their positives.

        Returns:
            The total, and the parts ``teacher_loss``, ``teacher_task`` and ``teacher_kl``, detached.
        """
        with torch.autocast(teacher.images.device.type, enabled=False):
            rows, scale = teacher.at_full_precision(), self._scale().to(teacher.images.device)
            task = self._task(rows.first(batch.pairs), scale, batch.positives)
            mutual = affinity_loss(
                rows.images,
                rows.texts,
                student.images.detach().to(rows.images),
                student.texts.detach().to(rows.texts),
                scale,
                student_scale,
            )
            total = task + self.config.weight * mutual
        parts = {"teacher_loss": total, "teacher_task": task, "teacher_kl": mutual}
        return LossTerms(total, {name: value.detach() for name, value in parts.items()})

    def _task(self, pairs: Embeddings, scale: Tensor, positives: Tensor) -> Tensor:
        bias = getattr(self.module, "logit_bias", None)
        if bias is None:
            return clip_loss(pairs.images, pairs.texts, scale, positives)
        return siglip_loss(pairs.images, pairs.texts, scale, bias.to(scale), positives)

    def _scale(self) -> Tensor:
        log_scale = self.module.get_parameter("logit_scale")
        with torch.no_grad():
            log_scale.clamp_(max=math.log(self._most))
        return log_scale.float().exp()


def _set_training(module: nn.Module) -> None:
    own = list(module.parameters())
    if own and not any(value.requires_grad for value in own):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _set_training(child)
