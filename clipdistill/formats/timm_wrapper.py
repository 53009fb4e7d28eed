"""timm's picture towers as transformers' TimmWrapperModel: the network up to its pooled output, and what follows it.

The wrapper makes the network by its name with no classifier. Whether that is the student's own network is decided by
letting a picture of noise through both: open_clip changes some networks' heads in ways that no configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder

Json = dict[str, Any]
_LEAST, _PICTURES = 0.99999, 2
_GELU = "torch.nn.modules.activation.GELU"
_CROPS = {"shortest": "center", "squash": "squash"}


@dataclass(frozen=True)
class Linear:
    """A linear map, and what follows it.

    Attributes:
        weight: float32 [outputs, inputs].
        bias: float32 [outputs], or None.
        activation: The class that is applied to its output, as Python imports it.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class TimmTower:
    """A picture tower that TimmWrapperModel can be.

    Attributes:
        config: Its ``config.json``, image processor included.
        weights: Those of the network without a classifier, under timm's names.
        head: What follows its pooled output, in this order.
    """

    config: Json
    weights: Mapping[str, Tensor]
    head: tuple[Linear, ...]


def timm_tower(student: DualEncoder) -> TimmTower | str:
    """A student's picture tower as TimmWrapperModel's, or the reason why it cannot be, in a phrase.

    Args:
        student: One with a picture tower; it is left as it is.
    """
    vision, preprocess = student.model_cfg.get("vision_cfg", {}), student.preprocess
    name, visual = vision.get("timm_model_name"), deepcopy(student.model.visual).cpu().float().eval()
    if preprocess is None or not name:
        return f"its picture tower is open_clip's {type(visual).__name__}, which transformers has no like of"
    if student.pruned:
        return f"its picture tower has fewer channels than {name}, which the wrapper makes by its name"
    if preprocess.resize_mode not in _CROPS:
        return "its preprocessing pads around whole pictures (resize_mode longest), which timm's does in another colour"
    head = _head(visual)
    if isinstance(head, str):
        return head
    given = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
    try:
        network = _network(name, given, visual.trunk)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        return f"timm's {name} without a classifier is another network: {' '.join(str(fault).split())[:200]}"
    worst = _worst(network, head, visual, preprocess.size)
    if not worst >= _LEAST:
        return f"timm's {name} without a classifier does not embed as its tower does (cosine {worst:.6f})"
    weights = {key: value.detach().contiguous().clone() for key, value in network.state_dict().items()}
    return TimmTower(_config(name, given, preprocess, network.num_features), weights, head)


@torch.no_grad()
def _worst(network: Any, head: tuple[Linear, ...], visual: nn.Module, size: tuple[int, int]) -> float:
    """The least cosine of noise through the network and its head with the tower's own rows; nan where shapes differ."""
    noise = torch.randn(_PICTURES, 3, *size, generator=torch.Generator().manual_seed(0))
    rows, own = network.forward_head(network.forward_features(noise)), visual(noise)
    for part in head:
        if rows.shape[-1] != part.weight.shape[1]:
            return float("nan")
        rows = F.linear(rows, part.weight, part.bias)
        rows = F.gelu(rows) if part.activation == _GELU else rows
    return float(F.cosine_similarity(rows, own).min()) if rows.shape == own.shape else float("nan")


def _head(visual: Any) -> tuple[Linear, ...] | str:
    """What follows the pooled output: the network's own classifier, or open_clip's projection."""
    parts = dict(visual.head.named_children())
    if "pool" in parts:
        return f"its picture tower ends in open_clip's own {type(parts['pool']).__name__}"
    if "mlp" in parts:
        mlp = parts["mlp"]
        if type(mlp.act) is not nn.GELU or mlp.act.approximate != "none" or not isinstance(mlp.norm, nn.Identity):
            return "its picture tower's projection is neither a linear map nor two with GELU between"
        return (_linear(mlp.fc1, _GELU), _linear(mlp.fc2))
    if "proj" in parts:
        return (_linear(parts["proj"]),)
    last = visual.trunk.get_classifier()
    if isinstance(last, nn.Identity):
        return ()
    return (_linear(last),) if isinstance(last, nn.Linear) else f"its picture tower ends in a {type(last).__name__}"


def _linear(layer: Any, activation: str = Linear.activation) -> Linear:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return Linear(layer.weight.detach().contiguous().clone(), bias, activation)


def _network(name: str, given: Json, trunk: Any) -> Any:
    """A network of timm without a classifier, with a tower's weights.

    Raises:
        RuntimeError: If it has other weights than the tower.
    """
    import timm

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(name, pretrained=False, num_classes=0, **given).eval()
    last = trunk.get_classifier()
    prefix = next((f"{key}." for key, part in trunk.named_modules() if part is last and key), None)
    weights = trunk.state_dict()
    network.load_state_dict({key: value for key, value in weights.items() if not prefix or not key.startswith(prefix)})
    return network


def _config(name: str, given: Json, preprocess: Preprocess, width: int) -> Json:
    height, across = preprocess.size
    filled = preprocess.resize_mode == "shortest" and height != across  # open_clip: bicubic, whatever is said
    return {
        "architecture": name,
        "architectures": ["TimmWrapperModel"],
        "model_type": "timm_wrapper",
        "dtype": "float32",
        "num_classes": 0,
        "num_features": width,
        "label_names": [],  # left out, transformers takes ImageNet's
        "model_args": given,
        "pretrained_cfg": {
            "input_size": [3, height, across],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": "bicubic" if filled else preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": _CROPS[preprocess.resize_mode],
        },
    }
