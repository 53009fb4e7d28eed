"""The pseudo-relation loss: a student's row among the teacher's rows of its own modality, which needs no pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.distributions import divergence, log_mixture, teacher_logits

TEMPERATURE = 3.0
"""As published."""


def pseudo_relation_loss(projected: Tensor, teacher: Tensor, scale: float, temperature: float = TEMPERATURE) -> Tensor:
    """Divergence of the student's similarities to the teacher's rows from those rows' similarities to one another.

    ``T^2 KL(P(t p p^T / T) || P(t u p^T / T))``, averaged over rows, P the softmax of a row: DIME-FM's pseudo-VL score
    distillation (Sun et al. 2023, arXiv 2303.18232), in which pictures stand in for the texts that unpaired pictures
    lack. T^2 keeps the gradient's size while T softens both sides.

    Args:
        projected: u, the student's unit rows of one modality in the teacher's width [n, D].
        teacher: p, unit rows [n, D].
        scale: t, the teacher's inverse temperature, of both sides: the student's rows lie in the teacher's space.
        temperature: T.

    Returns:
        A scalar; 0 for a perfect student. No gradient reaches the teacher's side.
    """
    target = log_mixture(teacher_logits(teacher, teacher, scale, temperature))
    student = (scale / temperature) * (projected @ teacher.detach().T)
    return divergence(target, F.log_softmax(student, dim=1)) * temperature**2
