"""The queue loss: a student's row among many of the teacher's stored rows of the other modality."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.batch import Member
from clipdistill.losses.distributions import divergence, log_mixture, teacher_logits


def queue_loss(
    projected: Tensor,
    teacher: Tensor,
    queue: Tensor,
    scale: float,
    temperature: float = 1.0,
    members: Sequence[Member] = (),
) -> Tensor:
    """Divergence of the student's similarities to stored rows from the teacher's similarities to them.

    ``T^2 KL(P(t p Q^T / T) || P(t u Q^T / T))``, averaged over rows, P the softmax of a row: similarity distillation
    against a queue of the teacher's embeddings (SEED, Fang et al. 2021, arXiv 2101.04731), here of the other modality,
    as a search compares them. The stored rows cost the teacher nothing, so that the contrast set can be far larger than
    the batch; the batch's rows need no partners.

    Args:
        projected: u, the student's unit rows of one modality in the teacher's width [n, D].
        teacher: p, unit rows [n, D].
        queue: Q, the teacher's unit rows of the other modality [queued, D].
        scale: t, the teacher's inverse temperature, of both sides: the student's rows lie in the teacher's space.
        temperature: T.
        members: The teachers of an ensemble whose probabilities are averaged; the student's side keeps ``scale``.

    Returns:
        A scalar; without members 0 for a perfect student. No gradient reaches the teacher's side.
    """
    target = log_mixture(teacher_logits(teacher, queue, scale, temperature, members), members)
    student = (scale / temperature) * (projected @ queue.detach().T)
    return divergence(target, F.log_softmax(student, dim=1)) * temperature**2
