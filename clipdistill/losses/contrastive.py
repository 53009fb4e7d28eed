"""The task losses: the student's own pictures against its own texts, with the data's pairs as labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def matching_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy of each row against the uniform distribution over that row's positives.

    ``-(1/rows) sum_i (1/|P_i|) sum_{j in P_i} log softmax(logits_i)_j``, with P_i the positives of row i: plain cross
    entropy where every row has one. A caption that describes two pictures of the batch is then a label of both, where
    the usual diagonal target would push one of them away.

    Args:
        logits: [rows, columns].
        positives: bool [rows, columns]; every row has at least one true (the paired row itself).

    Returns:
        A scalar.
    """
    return -(matching_target(positives, logits) * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def matching_target(positives: Tensor, like: Tensor) -> Tensor:
    """The uniform distribution over each row's positives, [rows, columns], as precise as another tensor."""
    target = positives.to(like.dtype)
    return target / target.sum(dim=1, keepdim=True)


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor | float, positives: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss, with sets of positives.

    ``1/2 [CE(s u v^T) + CE(s v u^T)]`` (Radford et al. 2021, arXiv 2103.00020); the target of a row is uniform over
    its positives, as in supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362, their L_out).

    Args:
        images: u, unit rows [pairs, dim].
        texts: v, unit rows [pairs, dim]; row i is paired with image i.
        scale: s, the inverse temperature.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.

    Returns:
        A scalar: the mean of both directions.
    """
    logits = scale * (images @ texts.T)
    return (matching_loss(logits, positives) + matching_loss(logits.T, positives.T)) / 2


def siglip_loss(
    images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float, positives: Tensor
) -> Tensor:
    """SigLIP's pairwise sigmoid loss.

    ``-(1/b) sum_ij log sigmoid(z_ij (s u_i . v_j + beta))``, z = +1 where text j describes image i and -1 elsewhere
    (Zhai et al. 2023, arXiv 2303.15343).

    Args:
        images: u, unit rows [pairs, dim].
        texts: v, unit rows [pairs, dim]; row i is paired with image i.
        scale: s, the inverse temperature.
        bias: beta, added to every logit.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.

    Returns:
        A scalar: the sum over all image/text couples, divided by the number of images.
    """
    logits = scale * (images @ texts.T) + bias
    signs = positives.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)
