"""The gradient loss: the student's embeddings should be pulled as the teacher's would be."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.contrastive import matching_target


def gradient_loss(
    projected_images: Tensor,
    projected_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    student_scale: Tensor | float,
    teacher_scale: float,
    positives: Tensor,
) -> Tensor:
    """Squared distance between the gradients of the student's and of the teacher's CLIP loss.

    ``mse(dI/du, dI/dp) + mse(dI/dv, dI/dq) + mse(dT/du, dT/dp) + mse(dT/dv, dT/dq)``, I and T the picture-to-text and
    the text-to-picture half of the CLIP loss: CLIP-KD's GD (Yang et al. 2024, arXiv 2307.12732). The released code
    divides the cosines by the scale where this one, as the formula has it, multiplies: gradients are then larger by
    the scale's square, and the published weight of 1e8 belongs to the other. At a scale of 100 the like of it is 1.

    Args:
        projected_images: u, the student's unit rows in the teacher's width [pairs, D].
        projected_texts: v, the same for texts [pairs, D]; row i is paired with image i.
        teacher_images: p, unit rows [pairs, D].
        teacher_texts: q, unit rows [pairs, D].
        student_scale: s, the student's inverse temperature.
        teacher_scale: t, the teacher's inverse temperature.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.

    Returns:
        A scalar; 0 for a perfect student at the teacher's scale. No gradient reaches the teacher's side.
    """
    student = clip_gradients(projected_images, projected_texts, student_scale, positives)
    teacher = clip_gradients(teacher_images.detach(), teacher_texts.detach(), teacher_scale, positives)
    distances = [F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    return distances[0] + distances[1] + distances[2] + distances[3]


def clip_gradients(
    images: Tensor, texts: Tensor, scale: Tensor | float, positives: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of both halves of the CLIP loss by the embeddings, in closed form and themselves differentiable.

    With ``G = (P(s u v^T) - Y) s / n``, Y each row's uniform target over its positives, the gradient of
    ``CE(s u v^T)`` by u is ``G v`` and by v is ``G^T u``; the other half is the same with the sides exchanged.

    Args:
        images: u, unit rows [pairs, D].
        texts: v, unit rows [pairs, D].
        scale: s.
        positives: bool [pairs, pairs].

    Returns:
        The picture-to-text half's by u and by v, and the text-to-picture half's by u and by v, each [pairs, D].
    """
    logits = scale * (images @ texts.T)
    by_image = (F.softmax(logits, dim=1) - matching_target(positives, logits)) * (scale / len(images))
    by_text = (F.softmax(logits.T, dim=1) - matching_target(positives.T, logits)) * (scale / len(images))
    return by_image @ texts, by_image.T @ images, by_text.T @ texts, by_text @ images
