"""The relational losses: how the student relates to its teacher should be the same from either modality."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.contrastive import matching_loss
from clipdistill.losses.distributions import divergence


def vertical_loss(
    projected_images: Tensor,
    projected_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    image_scale: Tensor | float,
    text_scale: Tensor | float,
    same_images: Tensor,
    same_texts: Tensor,
) -> Tensor:
    """Within each modality the student finds its teacher, and as surely among the pictures as among their texts.

    CLIP-RD's VRD (Chung et al. 2026, arXiv 2603.25383), P the softmax of a row, sg without gradient::

        1/2 [KL(sg P(b q v^T) || P(a p u^T)) + KL(sg P(b v q^T) || P(a u p^T))]
            + 1/2 [CE(a p u^T) + CE(a u p^T)] + 1/2 [CE(b q v^T) + CE(b v q^T)]

    Row i and column j mean pair i and pair j on either side, so the relations among texts can be the target of those
    among pictures. The cross entropies have sets of positives as in
    :func:`clipdistill.losses.contrastive.clip_loss`; they also keep the learned scales from falling to where every
    divergence is 0.

    Args:
        projected_images: u, the student's unit rows in the teacher's width [pairs, D].
        projected_texts: v, the same for texts [pairs, D]; row i is paired with image i.
        teacher_images: p, unit rows [pairs, D].
        teacher_texts: q, unit rows [pairs, D].
        image_scale: a, the inverse temperature among pictures.
        text_scale: b, the inverse temperature among texts.
        same_images: bool [pairs, pairs]; [i, j] where pictures i and j are the same, the diagonal always.
        same_texts: bool [pairs, pairs]; the same of texts.

    Returns:
        A scalar. No gradient reaches the teacher's side.
    """
    images = image_scale * (teacher_images.detach() @ projected_images.T)
    texts = text_scale * (teacher_texts.detach() @ projected_texts.T)
    relation = _one_way(texts, images) + _one_way(texts.T, images.T)
    within = matching_loss(images, same_images) + matching_loss(images.T, same_images.T)
    within = within + matching_loss(texts, same_texts) + matching_loss(texts.T, same_texts.T)
    return (relation + within) / 2


def cross_loss(
    projected_images: Tensor,
    projected_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """The teacher's pictures relate to the student's texts as the teacher's texts do to the student's pictures.

    CLIP-RD's XRD (Chung et al. 2026, arXiv 2603.25383)::

        1/4 [KL(sg B || A) + KL(sg A || B) + KL(sg D || C) + KL(sg C || D)]
        A = P(c p v^T)   B = P(c q u^T)   C = P(c v p^T)   D = P(c u q^T)

    Args:
        projected_images: u, the student's unit rows in the teacher's width [pairs, D].
        projected_texts: v, the same for texts [pairs, D]; row i is paired with image i.
        teacher_images: p, unit rows [pairs, D].
        teacher_texts: q, unit rows [pairs, D].
        scale: c, the inverse temperature. This loss alone would drive a learned one to 0.

    Returns:
        A scalar; 0 for a student that equals a teacher whose two embeddings of each pair are equal. No gradient
        reaches the teacher's side.
    """
    by_image = scale * (teacher_images.detach() @ projected_texts.T)
    by_text = scale * (teacher_texts.detach() @ projected_images.T)
    there_and_back = _one_way(by_text, by_image) + _one_way(by_image, by_text)
    turned = _one_way(by_text.T, by_image.T) + _one_way(by_image.T, by_text.T)
    return (there_and_back + turned) / 4


def _one_way(target: Tensor, student: Tensor) -> Tensor:
    """Mean over rows of KL(sg P(target) || P(student)), from logits [rows, columns]."""
    return divergence(F.log_softmax(target.detach(), dim=1), F.log_softmax(student, dim=1))
