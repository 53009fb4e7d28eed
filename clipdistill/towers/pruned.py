"""Networks whose layers have fewer channels than their name says: rebuilt from the shapes of their weights.

open_clip makes a picture tower from its configuration alone, and timm's from their names: both give the whole network.
timm's own ``*_pruned`` models keep a list of shapes for each of a few EfficientNets; the shapes of the saved weights
are such a list for any network of convolutions, batch norms and linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clipdistill.core.errors import DataError

Shapes = Mapping[str, Sequence[int]]

NOTE = (
    "The picture tower has fewer channels than the network that model_cfg names (structured pruning). clipdistill "
    "rebuilds it from the shapes of its weights; open_clip.create_model refuses this folder with 'size mismatch for "
    "visual.trunk...'. Load it with DualEncoder.load; its .model is then an ordinary module with encode_image and "
    "encode_text."
)
"""What a pruned student's manifest says to whoever meets open_clip's refusal."""

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each of a network's weights and buffers, by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def reshape(module: nn.Module, shapes: Shapes) -> None:
    """Give a network's layers the widths that some weights have; layers that change are left at zero.

    A pure function of the network and the shapes. A depthwise convolution keeps one group a channel.

    Args:
        module: The whole network, changed in place.
        shapes: The shape of each weight and buffer, by name; names that are left out keep their shapes.

    Raises:
        DataError: If a weight has another shape that is not a convolution's, a batch norm's or a linear layer's.
    """
    for prefix, layer in module.named_modules():
        parts = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        names = {key: f"{prefix}.{key}" if prefix else key for key, _ in parts}
        changed = [key for key, value in parts if tuple(shapes.get(names[key], value.shape)) != tuple(value.shape)]
        if not changed:
            continue
        if not isinstance(layer, nn.Conv2d | nn.Linear | _BATCH_NORM):
            raise DataError(
                f"{names[changed[0]]}: has the shape {list(shapes[names[changed[0]]])}, and a {type(layer).__name__} "
                "cannot be given another one"
            )
        for key in changed:
            _resize(layer, key, shapes[names[key]])
        _declare(layer)


def narrowed(own: Shapes, whole: Shapes, narrow: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of a pruned network with a narrower last layer.

    Args:
        own: The pruned network's.
        whole: Those of the unpruned one with the pruned one's last layer.
        narrow: Those of the unpruned one with the narrower last layer: where they differ from ``whole``, they hold.
    """
    return {
        name: tuple(
            new if new != old else kept for kept, old, new in zip(shape, whole[name], narrow[name], strict=True)
        )
        for name, shape in own.items()
    }


def _resize(layer: nn.Module, key: str, shape: Sequence[int]) -> None:
    value: torch.Tensor = getattr(layer, key)
    zeros = value.new_zeros(tuple(shape))
    learnt = isinstance(value, nn.Parameter)
    setattr(layer, key, nn.Parameter(zeros, requires_grad=value.requires_grad) if learnt else zeros)


def _declare(layer: Any) -> None:
    """Make the widths that a layer says it has those of its weights."""
    if isinstance(layer, _BATCH_NORM):
        layer.num_features = len(layer.running_mean if layer.running_mean is not None else layer.weight)
        return
    width, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = width, inputs
        return
    if layer.groups > 1 and layer.groups == layer.in_channels:
        layer.groups = width * layer.groups // layer.out_channels
    layer.out_channels, layer.in_channels = width, inputs * layer.groups
