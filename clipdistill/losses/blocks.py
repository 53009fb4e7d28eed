"""The losses of inner blocks: what a student's block gives in a part of a picture should be what the teacher's gives.

Hints (Romero et al. 2015, arXiv 1412.6550) over cells, so that towers of other shapes compare.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Form = Literal["cosine", "mse"]


def block_loss(student: Tensor, teacher: Tensor, form: Form) -> Tensor:
    """The mean over rows and cells of how far a student's cell is from the teacher's.

    ``cosine``: 1 - cos. ``mse``: the mean squared difference to the teacher's cell whitened over its width, that is at
    mean 0 and variance 1 (Wei et al. 2022, arXiv 2205.14141): a few of a transformer's channels are hundreds of times
    larger than the others and would be all that counts. Neither depends on the scale of the teacher's cells.

    Args:
        student: [rows, cells, D], mapped to the teacher's width.
        teacher: [rows, cells, D].
        form: ``cosine`` or ``mse``.

    Returns:
        A scalar; exactly 0, with a zero gradient, without rows.
    """
    teacher = teacher.detach()
    if form == "cosine":
        apart = 1 - F.cosine_similarity(student, teacher, dim=-1)
    else:
        apart = (student - F.layer_norm(teacher, teacher.shape[-1:])).square()
    return apart.sum() / max(1, apart.numel())
