"""Embeddings that can be cut: the first entries of a row are an embedding by themselves (Kusupati et al. 2022, MRL).

Whichever width is asked for, the cut row is made unit again. The map to the teacher's space is cut with it: its first
columns. Begun with the teacher's principal axes, the first columns hold the most of what the teacher tells apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from clipdistill.core.errors import ConfigError


def cut(rows: Tensor, dim: int) -> Tensor:
    """The first entries of rows, made unit again: float [rows, dim] of float [rows, more]."""
    return F.normalize(rows[:, :dim], dim=-1)


def cut_vectors(rows: npt.NDArray[np.float32], dim: int) -> npt.NDArray[np.float32]:
    """:func:`cut` of stored embeddings: float32 [rows, dim], unit rows."""
    short = rows[:, :dim]
    return np.asarray(short / np.linalg.norm(short, axis=1, keepdims=True).clip(min=1e-12), np.float32)


def principal_axes(rows: npt.NDArray[np.float32], dim: int) -> Tensor:
    """The directions in which a teacher's rows differ most, from the largest on (PCA about the origin).

    About the origin and not about the mean, because rows are compared by their inner products as they are.

    Args:
        rows: The teacher's unit rows [rows, D].
        dim: How many directions; at most D.

    Returns:
        float32 [D, dim], orthonormal columns; each points to where its largest entry is positive.
    """
    wide = torch.from_numpy(np.asarray(rows, np.float64))
    _, axes = torch.linalg.eigh(wide.T @ wide)  # rising, so the last are the largest
    axes = axes.flip(1)[:, :dim]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    pointed: Tensor = (axes * signs).float()
    return pointed


def sliced(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network with a narrower last layer, from those of the wider one: its first entries.

    Args:
        weights: The wider network's.
        wanted: The narrower network's own, which say the shapes.

    Raises:
        ConfigError: If the two differ in more than one axis of some tensor: then the last layer is not one linear map.
    """
    return _narrowed(weights, wanted, lambda value, axis, size: value.narrow(axis, 0, size))


def rotated(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], axes: Tensor) -> dict[str, Tensor]:
    """The weights of a network whose outputs are the wider one's, projected on some axes.

    Args:
        weights: The wider network's.
        wanted: The narrower network's own, which say the shapes.
        axes: The axes [dim, narrower], orthonormal columns, of the space of the outputs.

    Raises:
        ConfigError: If the last layer is not one linear map from or to a space of this width.
    """

    def project(value: Tensor, axis: int, size: int) -> Tensor:
        if (value.shape[axis], size) != axes.shape:
            raise ConfigError(
                f"student: a layer of {list(value.shape)} cannot be projected by axes of {list(axes.shape)}: its last "
                "layer is not one linear map. Choose a tower with a linear projection"
            )
        moved = torch.tensordot(value.double(), axes.double().to(value.device), dims=([axis], [0]))
        projected: Tensor = moved.movedim(-1, axis).to(value.dtype)
        return projected

    return _narrowed(weights, wanted, project)


def _narrowed(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], narrow: Callable[[Tensor, int, int], Tensor]
) -> dict[str, Tensor]:
    """Each tensor as it is where the shapes agree, and else narrowed along the one axis in which they differ."""
    found: dict[str, Tensor] = {}
    for name, like in wanted.items():
        value = weights[name]
        differing = [axis for axis, (old, new) in enumerate(zip(value.shape, like.shape, strict=True)) if old != new]
        if len(differing) > 1:
            raise ConfigError(
                f"student: {name} is {list(value.shape)} and would be {list(like.shape)} in the narrower student: its "
                "last layer is not one linear map, so it cannot be cut. Choose a tower with a linear projection"
            )
        found[name] = (narrow(value, differing[0], like.shape[differing[0]]) if differing else value).contiguous()
    return found
