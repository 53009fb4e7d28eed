"""Narrower embeddings of a finished student: its leading entries, or its leading principal axes, made unit again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipdistill.compression.budget import Sides
from clipdistill.core.errors import ConfigError
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.matryoshka import principal_axes
from clipdistill.towers.student import DualEncoder

WHOLE, LEADING, PCA = "whole", "leading", "pca"
NARROWEST = 32


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One way to narrow embeddings.

    Attributes:
        dim: The width that is left.
        rotation: ``whole`` (nothing is cut), ``leading`` entries, or the leading axes of a ``pca``.
        axes: float32 [whole width, dim], orthonormal columns; None where nothing is cut.
    """

    dim: int
    rotation: str
    axes: Tensor | None = None

    def rows(self, vectors: Vectors) -> Vectors:
        """Stored embeddings, cut: float32 [rows, dim], unit rows."""
        if self.axes is None:
            return vectors
        short = np.asarray(vectors, np.float64) @ self.axes.double().numpy()
        return np.asarray(short / np.linalg.norm(short, axis=1, keepdims=True).clip(min=1e-12), np.float32)

    def sides(self, whole: Sides) -> Sides:
        """The embeddings of a set, cut."""
        return Sides(self.rows(whole.queries), self.rows(whole.gallery))

    def student(self, student: DualEncoder) -> DualEncoder:
        """A student that makes the cut embeddings itself; the student itself where nothing is cut.

        Raises:
            ConfigError: If its last layers are not linear maps.
        """
        if self.axes is None:
            return student
        if self.rotation == LEADING and self.dim in student.dims:
            return student.truncate(self.dim)
        return student.rotate(self.axes)


def halves(dim: int) -> tuple[int, ...]:
    """A width and its halves, down to 32: ``512, 256, 128, 64, 32``."""
    found = [dim]
    while found[-1] // 2 >= NARROWEST:
        found.append(found[-1] // 2)
    return tuple(found)


def cuts(dims: Sequence[int], rotations: Sequence[str], fitted: Vectors) -> list[Cut]:
    """Every way to narrow a student's embeddings to some widths.

    Args:
        dims: The widths; the whole width is the student itself.
        rotations: ``leading`` and ``pca``.
        fitted: The student's embeddings of training rows [rows, whole width], whose principal axes about the origin
            are taken.

    Raises:
        ConfigError: If a width is larger than the student's.
    """
    whole = fitted.shape[1]
    wider = [dim for dim in dims if dim > whole]
    if wider:
        raise ConfigError(f"compress.dims: {wider[0]} is wider than the student's embeddings ({whole}); leave it out")
    principal = principal_axes(fitted, whole) if PCA in rotations and any(dim < whole for dim in dims) else None
    found: list[Cut] = []
    for dim in dims:
        if dim == whole:
            found.append(Cut(dim, WHOLE))
            continue
        for rotation in dict.fromkeys(rotations):
            axes = torch.eye(whole) if principal is None or rotation == LEADING else principal
            found.append(Cut(dim, rotation, axes[:, :dim].contiguous()))
    return found
