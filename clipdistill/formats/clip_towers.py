"""open_clip's plain transformers under the names, and in the shapes, of transformers' CLIP.

Both are the network of Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision":
blocks that normalise before attention and before the MLP, a class token for pictures, causal attention pooled at the
end token for texts. open_clip can build more than that; :func:`image_gaps` and :func:`text_gaps` name what CLIP lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from clipdistill.towers import context

Weights = dict[str, Tensor]
Json = dict[str, Any]

_GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


def image_gaps(visual: nn.Module) -> Iterator[str]:
    """What a picture tower has that CLIP's has not, one phrase each.

    Args:
        visual: ``model.visual`` of a student.
    """
    tower: Any = visual
    if type(tower) is not VisionTransformer:
        kind = "one of timm's networks" if hasattr(tower, "trunk") else f"a {type(tower).__name__}"
        yield f"its picture tower is {kind}, and CLIP's is open_clip's own ViT"
        return
    if isinstance(tower.ln_pre, nn.Identity):
        yield "its picture tower does not normalise the patches before the first block"
    if tower.attn_pool is not None or tower.pool_type != "tok":
        kind = "an attention pooler" if tower.attn_pool is not None else repr(tower.pool_type)
        yield f"its picture tower is pooled by {kind}, and CLIP's at the class token"
    for name, sides in (("input", tower.image_size), ("patches", tower.patch_size)):
        if sides[0] != sides[1]:
            yield f"its picture tower's {name} of {sides[0]} x {sides[1]} px are not square"
    yield from _block_gaps(tower, "picture")


def text_gaps(text: nn.Module) -> Iterator[str]:
    """What a text tower has that CLIP's has not, one phrase each.

    Args:
        text: ``model.text`` of a student.
    """
    tower: Any = text
    if type(tower) is not TextTransformer:
        yield f"its text tower is a {type(tower).__name__}, and CLIP's is open_clip's own transformer"
        return
    if not context.can_cut(tower):
        yield f"its text tower is not causal and pooled at the end token (pool_type {tower.pool_type!r})"
    if isinstance(tower.text_projection, nn.Linear):
        yield "its text tower's projection has a bias"
    yield from _block_gaps(tower, "text")


def image_config(visual: nn.Module) -> Json:
    """The ``vision_config`` of a picture tower without :func:`image_gaps`."""
    tower: Any = visual
    return {**_shape(tower), "image_size": tower.image_size[0], "patch_size": tower.patch_size[0], "num_channels": 3}


def text_config(text: nn.Module) -> Json:
    """The ``text_config`` of a text tower without :func:`text_gaps`, but for the special tokens' ids."""
    tower: Any = text
    vocabulary, _ = tower.token_embedding.weight.shape
    return {**_shape(tower), "vocab_size": vocabulary, "max_position_embeddings": len(tower.positional_embedding)}


def image_weights(visual: nn.Module) -> Weights:
    """A picture tower's weights as CLIP's ``vision_model``, without that prefix and the projection."""
    tower: Any = visual
    return _plain(
        {
            "embeddings.class_embedding": tower.class_embedding,
            "embeddings.patch_embedding.weight": tower.conv1.weight,
            "embeddings.position_embedding.weight": tower.positional_embedding,
            **_affine("pre_layrnorm", tower.ln_pre),
            **_blocks(tower),
            **_affine("post_layernorm", tower.ln_post),
        }
    )


def text_weights(text: nn.Module) -> Weights:
    """A text tower's weights as CLIP's ``text_model``, without that prefix and the projection."""
    tower: Any = text
    return _plain(
        {
            "embeddings.token_embedding.weight": tower.token_embedding.weight,
            "embeddings.position_embedding.weight": tower.positional_embedding,
            **_blocks(tower),
            **_affine("final_layer_norm", tower.ln_final),
        }
    )


def image_projection(visual: nn.Module) -> Tensor:
    """What follows CLIP's picture tower: float32 [dim, width]."""
    tower: Any = visual
    return _plain({"projection": tower.proj.T})["projection"]


def text_projection(text: nn.Module, to_teacher: Tensor | None = None) -> Tensor:
    """What follows CLIP's text tower: float32 [dim, width].

    Args:
        text: A text tower without :func:`text_gaps`.
        to_teacher: A further map [teacher_dim, dim] that becomes a part of it; between the two lies only a
            normalisation, which changes no direction.
    """
    tower: Any = text
    own = torch.eye(tower.width) if tower.text_projection is None else tower.text_projection.detach().cpu().T
    whole = own if to_teacher is None else to_teacher.detach().cpu().double() @ own.double()
    return _plain({"projection": whole})["projection"]


def _block_gaps(tower: Any, side: str) -> Iterator[str]:
    blocks = list(tower.transformer.resblocks)
    if not blocks or any(type(block) is not ResidualAttentionBlock for block in blocks):
        yield f"its {side} tower's blocks are not CLIP's, but {type(tower.transformer).__name__}'s own (block_type)"
        return
    if len({(block.attn.num_heads, len(block.mlp.c_fc.weight)) for block in blocks}) > 1:
        yield f"its {side} tower's blocks differ in their widths"
    acts = {str(_activation(block.mlp.gelu)) for block in blocks}
    if len(acts) > 1 or "None" in acts:
        yield f"its {side} tower's activation is neither GELU nor QuickGELU: {blocks[0].mlp.gelu}"
    if len({part.eps for part in tower.modules() if isinstance(part, nn.LayerNorm)}) > 1:
        yield f"its {side} tower's normalisations differ in their epsilon"


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    return _GELUS.get(module.approximate) if isinstance(module, nn.GELU) else None


def _shape(tower: Any) -> Json:
    """What both kinds of tower have in common, read from the layers themselves."""
    first = tower.transformer.resblocks[0]
    return {
        "hidden_size": first.attn.embed_dim,
        "intermediate_size": len(first.mlp.c_fc.weight),
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first.mlp.gelu),
        "layer_norm_eps": first.ln_1.eps,
        "attention_dropout": 0.0,
    }


def _blocks(tower: Any) -> Weights:
    found: Weights = {}
    for number, block in enumerate(tower.transformer.resblocks):
        for name, value in _block(block).items():
            found[f"encoder.layers.{number}.{name}"] = value
    return found


def _block(block: Any) -> Weights:
    """One block: the three parts of its attention's input apart, and a layer scale as a part of what it scales."""
    weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
    found = {f"self_attn.{name}_proj.weight": value for name, value in zip("qkv", weights, strict=True)}
    found |= {f"self_attn.{name}_proj.bias": value for name, value in zip("qkv", biases, strict=True)}
    return {
        **found,
        **_affine("self_attn.out_proj", block.attn.out_proj, block.ls_1),
        **_affine("layer_norm1", block.ln_1),
        **_affine("mlp.fc1", block.mlp.c_fc),
        **_affine("mlp.fc2", block.mlp.c_proj, block.ls_2),
        **_affine("layer_norm2", block.ln_2),
    }


def _affine(name: str, layer: Any, scale: Any = None) -> Weights:
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {f"{name}.weight": gamma[:, None] * layer.weight, f"{name}.bias": gamma * layer.bias}


def _plain(weights: Weights) -> Weights:
    """Copies in float32 and the plain memory order, one storage each, as safetensors needs them."""
    return {name: value.detach().cpu().float().contiguous().clone() for name, value in weights.items()}
