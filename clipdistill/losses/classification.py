"""The classification losses: the student's class probabilities should be the teacher's, and its top class the label.

A class is a vector in the teacher's space: the mean of the teacher's embeddings of its prompts, made unit again (CLIP's
zero-shot classifier, Radford et al. 2021, arXiv 2103.00020). The logits of a picture are its scaled cosines with them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_logits(images: Tensor, classes: Tensor, scale: Tensor | float) -> Tensor:
    """The logits ``s p C^T`` of pictures over classes.

    A SigLIP teacher's bias has no argument: it is added to every class's logit, and a softmax over the classes does not
    change by that. Its probabilities here are the softmax of the scaled logits, as in zero-shot classification, not the
    sigmoids that it was trained with, which are no distribution over the classes.

    Args:
        images: p, unit rows [images, D].
        classes: C, unit rows [classes, D].
        scale: s, the inverse temperature.

    Returns:
        float [images, classes].
    """
    return scale * (images @ classes.T)


def class_distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the student's class probabilities from the teacher's.

    ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))``, averaged over pictures (Hinton et al. 2015, arXiv 1503.02531): T^2
    keeps the gradient's size while T softens both sides. No label takes part.

    Args:
        student: z_s, the student's logits [images, classes].
        teacher: z_t, the teacher's.
        temperature: T.

    Returns:
        A scalar, 0 for a perfect student. No gradient reaches the teacher's side.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()


def class_label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the student's class probabilities with the labels, averaged over the labelled pictures.

    Args:
        student: The student's logits [images, classes].
        labels: int64 [images], the number of each picture's class; below 0 where none is known.

    Returns:
        A scalar; 0, attached to the logits, where no picture is labelled.
    """
    known = labels >= 0
    total = F.cross_entropy(student, torch.where(known, labels, -100), ignore_index=-100, reduction="sum")
    return total / known.sum().clamp(min=1)
