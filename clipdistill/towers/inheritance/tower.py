"""A transformer tower of an open_clip model, seen in one way for pictures and for texts.

The forward pass is written out here, since open_clip's fused attention shows nothing of what is inside: a tap sees,
and may change, the inner values that inheritance measures. Nothing but measuring runs through it.

======== ============================= =====================================================
kind     shape                         what it is
======== ============================= =====================================================
stream   [rows, tokens, width]         the residual stream before a block
width    [rows, tokens, width]         the stream after a layer norm, as the layer behind reads it
heads    [rows, tokens, heads, width]  what the heads give to the output projection
hidden   [rows, tokens, hidden]        the MLP's hidden units after the activation
block    [rows, tokens, width]         what the attention or the MLP of a block adds to the stream
======== ============================= =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.core.errors import ConfigError
from clipdistill.towers.context import text_module
from clipdistill.towers.inheritance.shape import Shape

Side = Literal["image", "text"]
Tap = Callable[[str, int, Tensor], Tensor]
_INSTEAD = "name a tower (such as nano) instead"


def unseen(kind: str, layer: int, values: Tensor) -> Tensor:
    """The tap that neither looks nor changes anything."""
    return values


@final
@dataclass(frozen=True)
class Tower:
    """One tower.

    Attributes:
        side: Which tower it is.
        module: open_clip's VisionTransformer or TextTransformer, or a plain CLIP for its text tower.
    """

    side: Side
    module: Any

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks, the first first."""
        return list(self.module.transformer.resblocks)

    @property
    def shape(self) -> Shape:
        """Its measures."""
        first = self.blocks[0]
        heads: int = first.attn.num_heads
        return Shape(len(self.blocks), heads, first.attn.embed_dim // heads, first.mlp.c_fc.out_features)

    @property
    def first_norm(self) -> nn.LayerNorm | None:
        """The layer norm before the first block, which picture towers may have."""
        norm = getattr(self.module, "ln_pre", None)
        return norm if isinstance(norm, nn.LayerNorm) else None

    @property
    def last_norm(self) -> nn.LayerNorm:
        """The layer norm after the last block."""
        norm: nn.LayerNorm = self.module.ln_post if self.side == "image" else self.module.ln_final
        return norm

    @property
    def quick_gelu(self) -> bool:
        """Whether its MLPs use QuickGELU."""
        return isinstance(self.blocks[0].mlp.gelu, QuickGELU)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it; the text towers that a student can have all are."""
        return self.side == "text"

    @property
    def pool(self) -> str:
        """How its tokens become one row: open_clip's ``pool_type``."""
        return str(getattr(self.module, "pool_type", None) or self.module.text_pool_type)

    @property
    def projection(self) -> Tensor:
        """The last projection as a matrix [width, dim]; the identity where it has none."""
        last = self.module.proj if self.side == "image" else self.module.text_projection
        if last is None:
            return torch.eye(self.shape.width)
        matrix: Tensor = last.weight.T if isinstance(last, nn.Linear) else last
        return matrix.detach()

    @property
    def projection_bias(self) -> Tensor | None:
        """The last projection's bias [dim], or None."""
        last = None if self.side == "image" else self.module.text_projection
        return last.bias.detach() if isinstance(last, nn.Linear) else None

    def embedded(self, inputs: Tensor) -> Tensor:
        """What goes into the first layer norm or, where there is none, the first block: [rows, tokens, width].

        Args:
            inputs: Pixels [rows, 3, height, width], or token ids [rows, length].
        """
        module = self.module
        if self.side == "text":
            stream: Tensor = module.token_embedding(inputs) + module.positional_embedding[: inputs.shape[1]]
            return stream
        patches = module.conv1(inputs).flatten(2).transpose(1, 2)
        first = module.class_embedding.expand(len(inputs), 1, -1)
        tokens: Tensor = torch.cat([first, patches], dim=1) + module.positional_embedding
        return tokens

    def run(self, stream: Tensor, tap: Tap = unseen) -> Tensor:
        """From :meth:`embedded` to the stream behind the last block."""
        if self.first_norm is not None:
            stream = self.first_norm(stream)
        for number, block in enumerate(self.blocks):
            stream = block_step(block, tap("stream", number, stream), self.causal, number, tap)
        return tap("stream", len(self.blocks), stream)

    def finish(self, stream: Tensor, inputs: Tensor, tap: Tap = unseen) -> Tensor:
        """From the stream behind the last block to the embeddings [rows, dim], not normalised."""
        read = tap("width", 2 * len(self.blocks), self.last_norm(self.before_last_norm(stream, inputs)))
        bias = self.projection_bias
        rows = self.after_last_norm(read, inputs) @ self.projection.to(read)
        return rows if bias is None else rows + bias

    def before_last_norm(self, stream: Tensor, inputs: Tensor) -> Tensor:
        """What the last layer norm takes: the stream, or its pooled rows where the norm comes after the pooling."""
        after = self.side == "image" and self.module.final_ln_after_pool
        return self._pooled(stream, inputs) if after else stream

    def after_last_norm(self, read: Tensor, inputs: Tensor) -> Tensor:
        """What the projection takes [rows, width], from what the last layer norm gave."""
        return self._pooled(read, inputs) if read.ndim == 3 else read

    def counted(self, inputs: Tensor) -> Tensor:
        """Which tokens can reach an embedding: bool [rows, tokens]; what follows a text's end cannot."""
        if self.side == "image":
            tokens = len(self.module.positional_embedding)
            return torch.ones(len(inputs), tokens, dtype=torch.bool, device=inputs.device)
        return torch.arange(inputs.shape[1], device=inputs.device) <= self.ends(inputs)[:, None]

    def ends(self, inputs: Tensor) -> Tensor:
        """Where each text ends: the number of the token that is pooled, int64 [rows]."""
        if self.pool == "eos":
            return (inputs == self.eos).int().argmax(dim=-1)
        return inputs.argmax(dim=-1)

    @property
    def eos(self) -> int:
        """The id of the token that ``pool_type = "eos"`` pools at."""
        own = getattr(self.module, "eos_id", None)
        return int(self.module.text_eos_id if own is None else own)

    def _pooled(self, values: Tensor, inputs: Tensor) -> Tensor:
        if self.side == "image":
            return values[:, 1:].mean(dim=1) if self.pool == "avg" else values[:, 0]
        return torch.as_tensor(text_global_pool(values, inputs, self.pool, eos_token_id=self.eos))


def tower_of(model: Any, side: Side) -> Tower:
    """The tower of an open_clip model.

    Raises:
        ConfigError: If it is not a transformer of open_clip's own that a student can be cut out of.
    """
    module = model.visual if side == "image" else text_module(model)
    reasons = list(_image_reasons(module) if side == "image" else _text_reasons(module))
    if reasons:
        raise ConfigError(f'student.{side}: "inherit" cannot cut this teacher\'s {side} tower: {reasons[0]}')
    return Tower(side, module)


def still(tower: Tower) -> Tower:
    """A copy in float32 on the CPU, in eval mode and without gradients, to measure on."""
    module = tower.module
    if isinstance(getattr(module, "visual", None), nn.Module):
        module = _text_alone(module)
    return Tower(tower.side, deepcopy(module).float().cpu().eval().requires_grad_(False))


def block_step(block: Any, stream: Tensor, causal: bool, number: int = 0, tap: Tap = unseen) -> Tensor:
    """One block: the stream before it to the stream behind it, both [rows, tokens, width]."""
    read = tap("width", 2 * number, block.ln_1(stream))
    heads = tap("heads", number, attended(block, projected(block, read), causal))
    stream = stream + tap("block", number, block.ls_1(block.attn.out_proj(heads.flatten(2))))
    read = tap("width", 2 * number + 1, block.ln_2(stream))
    hidden = tap("hidden", number, block.mlp.gelu(block.mlp.c_fc(read)))
    return stream + tap("block", number, block.ls_2(block.mlp.c_proj(hidden)))


def projected(block: Any, read: Tensor) -> Tensor:
    """Queries, keys and values side by side, [rows, tokens, 3 * width], from what the first layer norm gave."""
    return F.linear(read, block.attn.in_proj_weight, block.attn.in_proj_bias)


def attended(block: Any, values: Tensor, causal: bool) -> Tensor:
    """What each head gathers from :func:`projected`: [rows, tokens, heads, head width]."""
    rows, tokens, _ = values.shape
    query, key, value = values.view(rows, tokens, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def _text_alone(model: Any) -> nn.Module:
    """The text tower of a plain CLIP, which lies among the model's own parts."""
    alone: Any = nn.Module()
    for name in ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"):
        setattr(alone, name, getattr(model, name))
    alone.text_pool_type, alone.text_eos_id = model.text_pool_type, model.text_eos_id
    return cast(nn.Module, alone)


def _image_reasons(module: Any) -> Iterator[str]:
    """Why a picture tower cannot be cut."""
    if isinstance(module, TimmModel):
        kind = type(module.trunk).__name__
        yield f"timm's {kind} is no ViT of open_clip's own; name a smaller tower and train it instead"
    elif not isinstance(module, VisionTransformer):
        yield f"open_clip's {type(module).__name__} is not supported; only its VisionTransformer is; {_INSTEAD}"
    else:
        if module.attn_pool is not None:
            yield f"attention pooling (attentional_pool) is not supported, only a token or the mean; {_INSTEAD}"
        if module.pool_type == "none":
            yield f'pool_type = "none" is not supported, only "tok" and "avg"; {_INSTEAD}'
        yield from _block_reasons(module)


def _text_reasons(module: Any) -> Iterator[str]:
    """Why a text tower cannot be cut, or could not be a student's."""
    if isinstance(module, HFTextEncoder):
        yield (
            "it is a Hugging Face model, which a student cannot have; name a text tower (such as nano) and set "
            'student.text_init = "inherit", which takes the token table from it'
        )
        return
    if not isinstance(module, TextTransformer) and not hasattr(module, "token_embedding"):
        yield f"{type(module).__name__} is not supported; only open_clip's TextTransformer is; {_INSTEAD}"
        return
    if getattr(module, "use_pad_mask", False):
        yield f"a mask of its padding (use_pad_mask) is not supported; {_INSTEAD}"
    if getattr(module, "cls_emb", None) is not None:
        yield f"a class token behind the text (embed_cls) is not supported; {_INSTEAD}"
    pool = getattr(module, "pool_type", None) or module.text_pool_type
    if module.attn_mask is None or pool not in ("argmax", "eos"):
        yield (
            f'it is bidirectional or pooled at "{pool}", where a student\'s is causal and pooled at the end token; '
            'name a text tower (such as nano) and set student.text_init = "inherit"'
        )
    yield from _block_reasons(module)


def _block_reasons(module: Any) -> Iterator[str]:
    for block in module.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            yield f"its blocks are of a kind that is not supported ({type(block).__name__}); {_INSTEAD}"
            return
