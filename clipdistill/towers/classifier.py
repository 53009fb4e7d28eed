"""A student as a classifier of pictures: its picture tower and one vector for each class, saved beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.student import DualEncoder

FOLDER = "classifier"
"""Where it lies in the student's folder."""
_CLASSES, _VECTORS = "classes.json", "classes.safetensors"
_KIND, _VERSION = "classifier", 1
_REMEDY = "Train the student again, or copy its folder again from where it was made."


class Guess(NamedTuple):
    """The class that a picture most likely belongs to.

    Attributes:
        name: As it is read in prompts.
        probability: The classifier's own, 0 to 1.
    """

    name: str
    probability: float


@dataclass(frozen=True)
class ClassHead:
    """What makes an encoder a classifier.

    Attributes:
        labels: The classes as the data name them.
        names: The same as they are read.
        templates: The prompts that the vectors were made from.
        vectors: float32 [classes, D], unit rows in the teacher's space.
        scale: What the cosines are multiplied with before the softmax.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Vectors
    scale: float

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides a probability, beside the encoder."""
        vectors = fingerprint.of_tensors({"vectors": torch.from_numpy(self.vectors)})
        return fingerprint.of_value([self.labels, self.names, self.templates, vectors, self.scale])


@final
class Classifier:
    """Classifies pictures: ``softmax(s p C^T)``, p the picture's embedding in the teacher's space and C the classes'.

    Args:
        encoder: The student.
        head: Its classes.
    """

    def __init__(self, encoder: DualEncoder, head: ClassHead) -> None:
        self.encoder, self.head = encoder, head

    @property
    def names(self) -> tuple[str, ...]:
        """The classes as they are read, in the order of the probabilities' columns."""
        return self.head.names

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides a probability."""
        return fingerprint.of_value([self.encoder.fingerprint, self.head.fingerprint])

    def classify(self, pictures: Sequence[str | Path | Picture]) -> list[Guess]:
        """The likeliest class of each picture; of equally likely ones the first.

        Args:
            pictures: Paths, or pictures as the data readers give them.

        Raises:
            DataError: If a picture cannot be read or decoded, naming it.
        """
        rows = self.probabilities(pictures)
        best = rows.argmax(axis=1)
        return [Guess(self.names[place], float(row[place])) for place, row in zip(best, rows, strict=True)]

    def probabilities(self, pictures: Sequence[str | Path | Picture]) -> npt.NDArray[np.float64]:
        """The probability of every class: float64 [pictures, classes], each row's sum 1.

        Args:
            pictures: Paths, or pictures as the data readers give them.

        Raises:
            DataError: If a picture cannot be read or decoded, naming it.
        """
        embedded = self.encoder.encode_images([_picture(one) for one in pictures])
        logits = self.head.scale * (self.embed_in_teacher(embedded) @ self.head.vectors.T).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)

    def embed_in_teacher(self, vectors: Vectors) -> Vectors:
        """The encoder's picture embeddings in the space of the classes: float32 [pictures, D], unit rows."""
        return self.encoder.to_teacher_vectors(vectors, "image")

    def save(self, folder: str | Path) -> None:
        """Write the classes into the student's folder, which is there already.

        ``classifier/classes.safetensors`` holds ``vectors`` [classes, D] in the teacher's space and, for use without
        this package, ``student_vectors`` [classes, dim]: the inner product with the student's own picture embedding
        orders the classes exactly as the classifier does, and where the student has no projection they are the same.

        Args:
            folder: The student's.
        """
        with files.replaced_folder(Path(folder) / FOLDER) as aside:
            head = self.head
            plain = {"labels": head.labels, "names": head.names, "templates": head.templates, "scale": head.scale}
            files.write_json(aside / _CLASSES, plain)
            vectors = torch.from_numpy(head.vectors)
            save_file({"vectors": vectors, "student_vectors": self._in_student(vectors)}, aside / _VECTORS)
            values = {"encoder": self.encoder.fingerprint, "fingerprint": self.fingerprint}
            manifest.write(aside, _KIND, _VERSION, values)

    @staticmethod
    def load(folder: str | Path) -> Classifier:
        """Read a student with its classes, after comparing every file with its SHA-256.

        Args:
            folder: The student's folder, as a run with ``task.kind = "classification"`` leaves it.

        Raises:
            DataError: If it is not a student's folder, or the student has no classes.
            MismatchError: If a file differs, or the classes belong to another student.
        """
        encoder, place = DualEncoder.load(folder), Path(folder) / FOLDER
        values = manifest.read(place, _KIND, _VERSION, _REMEDY)
        manifest.verify_files(place, values.get("files", {}), _REMEDY)
        if values["encoder"] != encoder.fingerprint:
            raise MismatchError(str(place), "encoder", encoder.fingerprint, values["encoder"], _REMEDY)
        plain: dict[str, Any] = files.read_json(place / _CLASSES)
        head = ClassHead(
            labels=tuple(plain["labels"]),
            names=tuple(plain["names"]),
            templates=tuple(plain["templates"]),
            vectors=np.asarray(load_file(place / _VECTORS)["vectors"].numpy(), np.float32),
            scale=float(plain["scale"]),
        )
        return Classifier(encoder, head)

    def _in_student(self, vectors: torch.Tensor) -> torch.Tensor:
        projection = self.encoder.projection
        if projection is None:
            return vectors.clone()
        # u W^T c / |W u|: the norm is the same for all classes, so W^T c orders them as the cosines do.
        return (vectors @ projection.get_parameter("image.weight").detach().cpu()).contiguous()


def class_vectors(prompts: npt.NDArray[np.float32]) -> Vectors:
    """The vector of each class: the mean of its prompts' embeddings, made unit again.

    CLIP's zero-shot classifier (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).

    Args:
        prompts: float32 [classes, templates, D], unit rows.

    Returns:
        float32 [classes, D], unit rows.
    """
    means = prompts.mean(axis=1, dtype=np.float64)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


def _picture(given: str | Path | Picture) -> Picture:
    return given if isinstance(given, Picture) else Picture(origin=str(given), path=Path(given))
