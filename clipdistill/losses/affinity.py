"""The affinity loss: the student's image/text softmax should be the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from clipdistill.losses.batch import Member
from clipdistill.losses.distributions import cross_entropy, divergence, log_mixture, teacher_logits

AffinityForm = Literal["kl", "cross_entropy"]


def affinity_loss(
    student_images: Tensor,
    student_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    student_scale: Tensor | float,
    teacher_scale: float,
    temperature: float = 1.0,
    form: AffinityForm = "kl",
    members: Sequence[Member] = (),
) -> Tensor:
    """Divergence of the student's image/text affinities from the teacher's, over rows and over columns.

    ``1/2 T^2 [D(P(t p q^T / T), P(s u v^T / T)) + D(P(t q p^T / T), P(s v u^T / T))]``, P the softmax of a row and D
    the divergence, averaged over rows. With D = KL this is CLIP-KD's CRD (Yang et al. 2024, arXiv 2307.12732) and
    MobileCLIP's distillation loss (Vasu et al. 2024, arXiv 2311.17049); with D = cross entropy, TinyCLIP's affinity
    mimicking (Wu et al. 2023, arXiv 2309.12314) and open_clip's distillation loss. The two differ by the teacher's own
    entropy, so their gradients are equal. T^2 keeps the gradient's size while T softens both sides (Hinton et al. 2015,
    arXiv 1503.02531).

    No labels take part: the teacher scores any image against any text, so the images and the texts need not be paired,
    nor as many. There is no argument for a SigLIP teacher's bias because a softmax does not change when the same
    number is added to every logit.

    Args:
        student_images: u, unit rows [images, d].
        student_texts: v, unit rows [texts, d].
        teacher_images: p, unit rows [images, D].
        teacher_texts: q, unit rows [texts, D].
        student_scale: s, the student's inverse temperature.
        teacher_scale: t, the teacher's inverse temperature.
        temperature: T, by which both sides' logits are divided.
        form: ``kl`` (zero for a perfect student) or ``cross_entropy`` (the published value of TinyCLIP and open_clip).
        members: The teachers of an ensemble; P of the teacher's side is then the weighted mean of theirs, each of its
            own rows and at its own scale, and ``teacher_scale`` is not used.

    Returns:
        A scalar. No gradient reaches the teacher's side.
    """
    student = (student_scale / temperature) * (student_images @ student_texts.T)
    teacher = teacher_logits(teacher_images, teacher_texts, teacher_scale, temperature, members)
    compare = divergence if form == "kl" else cross_entropy
    by_image = compare(log_mixture(teacher, members), F.log_softmax(student, dim=1))
    by_text = compare(log_mixture([each.T for each in teacher], members), F.log_softmax(student.T, dim=1))
    return (by_image + by_text) * (temperature**2 / 2)
