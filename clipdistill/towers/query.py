"""A text tower without a picture tower: its texts are embedded into the space of the teacher's existing index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class TextModel(nn.Module):
    """open_clip's CustomTextCLIP without ``visual``: the same names, so that a whole model can take its weights.

    Args:
        embed_dim: The width of the embeddings.
        text_cfg: open_clip's ``text_cfg``.
        quick_gelu: Whether the tower uses QuickGELU.
        init_logit_scale: The logarithm of what cosines are multiplied with.
        init_logit_bias: SigLIP's bias; None for a model without one.
    """

    def __init__(
        self,
        embed_dim: int,
        text_cfg: Mapping[str, Any],
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        from open_clip.model import _build_text_tower  # the very function that CustomTextCLIP builds its tower with

        self.text = _build_text_tower(embed_dim, dict(text_cfg), quick_gelu)
        self.context_length, self.vocab_size = self.text.context_length, self.text.vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))


def with_pictures(text_cfg: Mapping[str, Any], vision_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of a whole open_clip model: a text tower's ``model_cfg`` with a picture tower's ``vision_cfg``.

    Args:
        text_cfg: The ``model_cfg`` of a :class:`TextModel`.
        vision_cfg: open_clip's ``vision_cfg`` of the picture tower.
    """
    picture = deepcopy(dict(vision_cfg))
    if picture.get("timm_model_name"):
        picture["timm_model_pretrained"] = False  # its weights come with the model, not from a hub
    return {**deepcopy(dict(text_cfg)), "custom_text": True, "vision_cfg": picture}


def folded(weights: Mapping[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
    """A text tower's weights with the map to the teacher's space as a part of its own last layer.

    Between the two lies only a normalisation, which changes no direction, so that the two linear maps are one.

    Args:
        weights: Of a :class:`TextModel`; ``text.text_projection`` is [width, dim].
        projection: The map to the teacher's space [teacher_dim, dim]; None leaves the weights as they are.
    """
    kept = dict(weights)
    if projection is not None:
        last = kept["text.text_projection"]
        kept["text.text_projection"] = (last.double() @ projection.double().T).to(last)
    return kept
