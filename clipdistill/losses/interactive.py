"""The interactive loss: the student's pictures against the teacher's texts, and the reverse."""

from __future__ import annotations

from torch import Tensor

from clipdistill.losses.contrastive import matching_loss


def interactive_loss(
    projected_images: Tensor,
    projected_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    scale: Tensor | float,
    positives: Tensor,
) -> Tensor:
    """Contrast each student embedding with the teacher's embeddings of the other modality.

    ``ICL = 1/2 [CE(c u q^T) + CE(c v p^T)]`` (CLIP-KD, Yang et al. 2024, arXiv 2307.12732), with sets of positives as
    in :func:`clipdistill.losses.contrastive.clip_loss`. The teacher's rows are anchors that do not move, so each
    student tower learns to search the teacher's index.

    Args:
        projected_images: u, the student's unit rows in the teacher's width [pairs, D].
        projected_texts: v, the same for texts [pairs, D]; row i is paired with image i.
        teacher_images: p, unit rows [pairs, D].
        teacher_texts: q, unit rows [pairs, D].
        scale: c, the inverse temperature itself, not its logarithm.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.

    Returns:
        A scalar. No gradient reaches the teacher's side.
    """
    by_image = scale * (projected_images @ teacher_texts.detach().T)
    by_text = scale * (projected_texts @ teacher_images.detach().T)
    return (matching_loss(by_image, positives) + matching_loss(by_text, positives.T)) / 2
