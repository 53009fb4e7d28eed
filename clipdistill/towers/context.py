"""A text tower run on no more tokens than the longest text of the batch has.

A causal tower that is pooled at the end-of-text token gives the same embedding whatever follows that token, so the
padding can be cut away. That is also exact for encoders that mask their padding. It is wrong for bidirectional towers
that attend to padding, SigLIP's among them.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from torch import Tensor

_LEAST_GROUP = 16
_MASKED_POOLERS = ("MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler")


def text_module(model: Any) -> Any:
    """The part of an open_clip model that embeds texts: ``model.text``, or a plain CLIP itself."""
    return getattr(model, "text", model)


def can_cut(model: Any) -> bool:
    """Whether the text tower's embeddings do not depend on the padding, by its construction."""
    text = text_module(model)
    if isinstance(text, HFTextEncoder):
        return type(text.pooler).__name__ in _MASKED_POOLERS
    pool = _pool_type(text)
    causal = getattr(text, "attn_mask", None) is not None
    plain = getattr(text, "cls_emb", None) is None and not getattr(text, "use_pad_mask", False)
    return causal and plain and pool in ("argmax", "eos")


def cut(model: Any, tokens: Tensor) -> Tensor:
    """The token table without the columns that are padding in every row.

    Args:
        model: The open_clip model that the tokens are for.
        tokens: int64 [texts, context].
    """
    text = text_module(model)
    if isinstance(text, HFTextEncoder):
        used = (tokens != text.config.pad_token_id).any(dim=0)
        return tokens[:, : int(used.nonzero().max()) + 1] if bool(used.any()) else tokens[:, :1]
    return tokens[:, : int(_ends(text, tokens).max()) + 1]


def encode(model: Any, tokens: Tensor) -> Tensor:
    """Embed tokens of any length up to the context, not normalised.

    Args:
        model: An open_clip model for which :func:`can_cut` is true.
        tokens: int64 [texts, length].

    Returns:
        float [texts, dim].
    """
    text = text_module(model)
    if isinstance(text, HFTextEncoder):
        return torch.as_tensor(text(tokens))
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    x = text.ln_final(x)
    pool = _pool_type(text)
    pooled: Tensor = text_global_pool(x, tokens, pool, eos_token_id=_eos(text))
    projection = text.text_projection
    if projection is None:
        return pooled
    return torch.as_tensor(projection(pooled) if isinstance(projection, torch.nn.Module) else pooled @ projection)


def encode_by_length(model: Any, tokens: Tensor, groups: int = 4) -> Tensor:
    """:func:`encode`, with the rows sorted by length into groups that are each cut to their own longest row.

    A batch of captions is mostly padding when one of them is long: groups of equal size cost about half.

    Args:
        model: As for :func:`encode`.
        tokens: int64 [texts, length].
        groups: How many groups; small batches are left whole.
    """
    order = run_order(model, tokens, groups)
    if len(order) == 1:
        return encode(model, cut(model, tokens) if len(tokens) else tokens)
    parts = [encode(model, cut(model, tokens[rows])) for rows in order]
    return torch.cat(parts)[torch.cat(order).argsort()]


def run_order(model: Any, tokens: Tensor, groups: int = 4) -> tuple[Tensor, ...]:
    """Which rows each pass of :func:`encode_by_length` has, in its order: int64 [rows of the pass] each."""
    if len(tokens) < _LEAST_GROUP * groups or isinstance(text_module(model), HFTextEncoder):
        return (torch.arange(len(tokens), device=tokens.device),)
    return _ends(text_module(model), tokens).argsort(stable=True).chunk(groups)


def lengths(text: Any, tokens: Tensor) -> Tensor:
    """How many tokens of each row are the text's own, up to its end token; the others are padding.

    A tower that is pooled elsewhere than at an end token has none that it knows: there the last tokens that are all
    equal are the padding.

    Args:
        text: A text tower, as :func:`text_module` gives it.
        tokens: int64 [texts, length].

    Returns:
        int64 [texts], 1 or more.
    """
    if isinstance(text, HFTextEncoder):
        own = tokens != text.config.pad_token_id
    elif _pool_type(text) in ("argmax", "eos"):
        return _ends(text, tokens) + 1
    else:
        own = tokens != tokens[:, -1:]
        own[:, -1] |= own[:, -2:-1].any(dim=1)  # a last token unlike the one before it is no padding
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return torch.as_tensor((own * places).amax(dim=1).clamp_min(1))


def _pool_type(text: Any) -> Any:
    return getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)


def _eos(text: Any) -> int | None:
    return getattr(text, "eos_id", None) or getattr(text, "text_eos_id", None)


def _ends(text: Any, tokens: Tensor) -> Tensor:
    if _pool_type(text) == "eos":
        return torch.eq(tokens, _eos(text) or 0).int().argmax(dim=-1)
    return tokens.argmax(dim=-1)
