"""The feature losses: a student's embedding should be the teacher's embedding of the same picture or text.

They need neither pairs nor a second modality, and they alone make a student whose vectors can be searched in the
teacher's own index. On unit rows the two are one loss under two scales: ``mse = 2 (1 - cos) / D``.
"""

from __future__ import annotations

from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between a student's and the teacher's embeddings of the same rows.

    ``(1/n) sum_i (1 - u_i . p_i)``. Unlike the squared error its value does not depend on the width, so a weight means
    the same with any teacher. Used alone on stored text embeddings by NanoVDR (2026).

    Args:
        student: Unit rows [n, D] of one modality, in the teacher's width.
        teacher: Unit rows [n, D].

    Returns:
        A scalar in [0, 2]; exactly 0, with a zero gradient, where n is 0.
    """
    # The sum over no rows is 0, where a mean would be NaN.
    return (1 - (student * teacher.detach()).sum(dim=1)).sum() / max(1, len(student))


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between a student's and the teacher's embeddings of the same rows.

    ``(1/(n D)) sum_i ||u_i - p_i||^2``: CLIP-KD's FD (Yang et al. 2024, arXiv 2307.12732), one modality of it. As the
    mean runs over the width too, ``w mse = (2 w / D) (1 - cos)``: their 2000 is 7.8 (1 - cos) at D = 512.

    Args:
        student: Unit rows [n, D] of one modality, in the teacher's width.
        teacher: Unit rows [n, D].

    Returns:
        A scalar; exactly 0, with a zero gradient, where n is 0.
    """
    return (student - teacher.detach()).square().sum() / max(1, student.numel())
