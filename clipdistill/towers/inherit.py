"""What a student's text tower begins with from its teacher's: the token table, by principal components.

A token table's rows carry meaning by their inner products, which survive a projection on the directions of the largest
variance (PCA; Pearson, 1901; Hotelling, 1933).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipdistill.core.errors import DataError


def teacher_token_table(model: Any) -> Tensor | None:
    """A teacher's token table, or None where its text tower has none.

    Args:
        model: An open_clip model: CLIP, CustomTextCLIP with its own or a Hugging Face text tower.

    Returns:
        A detached float32 copy of shape [tokens, width], on the CPU.
    """
    text = getattr(model, "text", model)
    table = getattr(text, "token_embedding", None)
    find = getattr(getattr(text, "transformer", None), "get_input_embeddings", None)
    if table is None and find is not None:
        table = find()
    weight: Tensor | None = getattr(table, "weight", None)
    return None if weight is None else weight.detach().float().cpu().clone()


def token_table(
    teacher_table: Tensor,
    teacher_ids: Sequence[int | None],
    width: int,
    *,
    generator: torch.Generator,
    std: float = 0.02,
) -> Tensor:
    """A student's token table from its teacher's.

    The rows of the kept tokens are centred, turned onto their principal axes, cut to the student's width, and scaled as
    a whole so that their entries' root mean square is ``std``, which is what a random table would have. With
    ``width`` equal to the teacher's, inner products of centred rows are the teacher's times one factor. Each axis
    points to where its largest loading is positive, which makes the table a function of its arguments.

    Args:
        teacher_table: [teacher tokens, teacher width].
        teacher_ids: For each of the student's tokens the teacher's row, or None for a token that the teacher lacks.
        width: The student's width. What exceeds the rank of the teacher's rows is filled with noise of a tenth of
            ``std``, so that no column starts dead.
        generator: Draws the noise and the rows without a teacher, on the CPU.
        std: The scale; open_clip draws a text tower's table from a normal of 0.02.

    Returns:
        float32 of shape [len(teacher_ids), width].

    Raises:
        DataError: If an id is outside the teacher's table.
    """
    known = [number for number, teacher in enumerate(teacher_ids) if teacher is not None]
    rows = [teacher for teacher in teacher_ids if teacher is not None]
    if rows and not 0 <= min(rows) <= max(rows) < len(teacher_table):
        raise DataError(
            f"teacher's token table has {len(teacher_table)} rows, but its tokenizer gives ids from {min(rows)} to "
            f"{max(rows)}: tokenizer and model do not belong together"
        )
    table = torch.randn(len(teacher_ids), width, generator=generator) * std
    if not rows:
        return table
    scores = _principal(teacher_table[rows].double().cpu(), width)
    scores *= std / scores.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    kept = table[known] * 0.1
    kept[:, : scores.shape[1]] = scores.float()
    table[known] = kept
    return table


def _principal(rows: Tensor, width: int) -> Tensor:
    """Centred rows on their principal axes, the largest variance first: [rows, min(width, rank)]."""
    centred = rows - rows.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)  # rising, so the last are the largest
    rank = int((variances > variances[-1] * 1e-12).sum())
    axes = axes.flip(1)[:, : min(width, rank)]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    scores: Tensor = centred @ (axes * signs)
    return scores
