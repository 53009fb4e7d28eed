"""Distributions over a batch's rows: what the losses that compare a student's softmax with its teacher's share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.batch import Member


def divergence(log_target: Tensor, log_student: Tensor) -> Tensor:
    """Mean over rows of KL(target || student), from logarithms of probabilities [rows, columns]."""
    return (log_target.exp() * (log_target - log_student)).sum(dim=1).mean()


def cross_entropy(log_target: Tensor, log_student: Tensor) -> Tensor:
    """Mean over rows of the cross entropy H(target, student), from logarithms of probabilities [rows, columns]."""
    return (log_target.exp() * -log_student).sum(dim=1).mean()


def teacher_logits(
    left: Tensor, right: Tensor, scale: float, temperature: float = 1.0, members: Sequence[Member] = ()
) -> list[Tensor]:
    """The logits of each teacher, without gradients.

    Args:
        left: The teacher's unit rows [rows, D].
        right: The teacher's unit rows [columns, D].
        scale: Its inverse temperature; not used where there are members.
        temperature: By which the logits are divided.
        members: The teachers of an ensemble, whose rows lie side by side; each one's part is made unit again.

    Returns:
        [rows, columns] for each member, or one where there are none.
    """
    left, right = left.detach(), right.detach()
    if not members:
        return [(scale / temperature) * (left @ right.T)]
    parts = [[F.normalize(side[:, member.columns], dim=1) for side in (left, right)] for member in members]
    scales = [member.scale / temperature for member in members]
    return [own * (rows @ columns.T) for own, (rows, columns) in zip(scales, parts, strict=True)]


def log_mixture(logits: Sequence[Tensor], members: Sequence[Member] = ()) -> Tensor:
    """The logarithm of the weighted mean of the teachers' row softmaxes: ``ln sum_m w_m P(Z_m)``, the weights' sum 1.

    A student's cross entropy to this mixture is the weighted mean of its cross entropies to the members, as MobileCLIP
    (Vasu et al. 2024, arXiv 2311.17049) trains it.

    Args:
        logits: [rows, columns] of each teacher.
        members: Their weights; not needed for one teacher.
    """
    rows = [F.log_softmax(each, dim=1) for each in logits]
    if len(rows) == 1:
        return rows[0]
    whole = sum(member.weight for member in members)
    shares = [math.log(member.weight / whole) for member in members]
    return torch.logsumexp(torch.stack([row + share for row, share in zip(rows, shares, strict=True)]), dim=0)
