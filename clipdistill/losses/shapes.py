"""Which shapes belong together: broadcasting would turn some mismatches into a plausible loss."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from clipdistill.core.errors import MismatchError
from clipdistill.losses.batch import Embeddings, Targets, TeacherScale

_REMEDY = "The teacher's rows, the student's rows and the pairs of a batch come from the same samples."
Fact = tuple[str, object, object]


def refuse_mismatch(student: Embeddings, projected: Embeddings, targets: Targets) -> None:
    """Compare the student's rows of one width with the teacher's.

    Raises:
        MismatchError: If they, or the pairs, do not belong together.
    """
    teacher, pairs = targets.teacher, targets.pairs
    rows = (len(teacher.images), len(teacher.texts))
    shared = min(*rows, len(student.images), len(student.texts))
    _compare(
        ("the student's images and texts", rows, (len(student.images), len(student.texts))),
        ("the shape of the projected images", tuple(teacher.images.shape), tuple(projected.images.shape)),
        ("the shape of the projected texts", tuple(teacher.texts.shape), tuple(projected.texts.shape)),
        ("the shape of positives", (pairs, pairs), tuple(targets.positives.shape)),
        ("the number of pairs", min(max(pairs, 0), shared), pairs),
    )


def refuse_mismatched_teacher(targets: Targets, masked: Tensor | None, speaker: TeacherScale) -> None:
    """Compare what else comes with a batch with the teacher's rows.

    Raises:
        MismatchError: If the queue, the masked pictures or an ensemble's columns do not belong to them.
    """
    _compare(*_teachers_facts(targets, masked, speaker))


def _teachers_facts(targets: Targets, masked: Tensor | None, speaker: TeacherScale) -> Iterator[Fact]:
    images, queue = targets.teacher.images, targets.queue
    width = images.shape[1]
    if queue is not None:
        yield "the widths of the queue", (width, width), (queue.images.shape[1], queue.texts.shape[1])
    if masked is not None:
        yield "the shape of the masked images", tuple(images.shape), tuple(masked.shape)
    if speaker.members:
        last = max(member.columns.stop for member in speaker.members)
        yield "the columns of the teacher's members", f"at most {width}", f"at most {max(last, width)}"


def _compare(*facts: Fact) -> None:
    for field, expected, found in facts:
        if expected != found:
            raise MismatchError("the batch", field, expected, found, _REMEDY)
