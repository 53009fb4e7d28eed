"""The teacher: any open_clip model with its own preprocessing and tokenizer, frozen, in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, suggest
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.towers import context
from clipdistill.towers.encoder import Vectors

_log = logging.getLogger("clipdistill")
_SCHEMAS = ("hf-hub:", "local-dir:")
# Texts whose token ids tell tokenizers apart: case, entities, full width, ligatures, accents, other scripts.
_TOKENIZER_PROBE = (
    "a photo of a red bicycle",
    "A Photo &amp; its CAPTION, isn't it? 3.14",
    "ﬁne Ｆｕｌｌ ｗｉｄｔｈ naïve Ångström",
    "猫 кошка 🐈‍⬛ قطة",
    "  spaces\tand\nlines  ",
    "antidisestablishmentarianism " * 40,
)
_CUT_TOLERANCE = 1e-5
Item = TypeVar("Item")


class Teacher:
    """A frozen open_clip model that embeds pictures and texts its own way.

    Args:
        model: An open_clip model with its weights.
        transform: Its own evaluation preprocessing, from a PIL picture to float32 [3, H, W].
        tokenizer: Its own tokenizer, from texts to int64 [texts, context].
        name: How the user named it.
        device: Where it runs.
        max_pixels: Pictures that claim more are refused.
        source: What open_clip loads it by: a name, ``hf-hub:`` or ``local-dir:``; None where it was made otherwise.
        quick_gelu: Whether its weights asked for QuickGELU, which its name alone does not say.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        name: str,
        device: torch.device | str = "cpu",
        max_pixels: int = 100_000_000,
        source: str | None = None,
        quick_gelu: bool = False,
    ) -> None:
        self.source, self.quick_gelu = source, quick_gelu
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.transform, self.tokenizer, self.name = transform, tokenizer, name
        self.device, self.max_pixels = torch.device(device), max_pixels
        self.dtype = next(model.parameters()).dtype
        convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in model.modules())
        if convolutions > 4:  # more than a patch embedding: 1.3-5x on CPUs
            self.model.to(memory_format=torch.channels_last)
        self.cuts = context.can_cut(model) and self._cut_is_exact()
        self._fingerprint: str | None = None
        self.dim = int(self.encode_texts(["a"]).shape[1])

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied with before the softmax or sigmoid."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def bias(self) -> float | None:
        """SigLIP's additive logit bias; None for a softmax model."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach().float())

    @property
    def parameters(self) -> int:
        """How many parameters it has, both towers."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def picture_parameters(self) -> int:
        """How many of them its picture tower has; its texts need the others."""
        return sum(parameter.numel() for parameter in self.model.visual.parameters())

    @property
    def parts(self) -> dict[str, str]:
        """SHA-256 of what decides its embeddings: weights, preprocessing, tokenizer."""
        preprocess = getattr(getattr(self.model, "visual", None), "preprocess_cfg", None) or str(self.transform)
        return {
            "weights": fingerprint.of_tensors(self.model.state_dict()),
            "preprocess": fingerprint.of_value(plain(preprocess)),
            "tokenizer": fingerprint.of_value(
                [type(self.tokenizer).__name__, self._tokens(list(_TOKENIZER_PROBE)).tolist()]
            ),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint.of_value(self.parts)
        return self._fingerprint

    def copy(self) -> Teacher:
        """A teacher with a network of its own, equal to this one's: to train one and keep the other."""
        return Teacher(
            deepcopy(self.model),
            self.transform,
            self.tokenizer,
            name=self.name,
            device=self.device,
            max_pixels=self.max_pixels,
            source=self.source,
            quick_gelu=self.quick_gelu,
        )

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed whole pictures: float32 [pictures, dim], unit rows.

        Raises:
            DataError: If a picture cannot be decoded, naming it.
        """
        rows = [
            self.encode_decoded([decode(item.read(), self.max_pixels, item.origin) for item in part])
            for part in _parts(pictures, batch)
        ]
        return _stacked(rows, self.dim)

    @torch.no_grad()  # not inference mode: a network may keep a table that training it needs with gradients
    def encode_decoded(self, images: Sequence[Image.Image]) -> Vectors:
        """Embed decoded RGB pictures, or crops of them, as one batch: float32 [images, dim], unit rows."""
        pixels = torch.stack([self.transform(image) for image in images]).to(self.device, self.dtype)
        features = self.model.encode_image(pixels)
        return _unit(features)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts, the padding cut away where that is exact: float32 [texts, dim], unit rows."""
        rows = [self._embed(self._tokens(list(part)), self.cuts) for part in _parts(texts, batch)]
        return _stacked(rows, getattr(self, "dim", 0))

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text are not padding, to group texts of equal cost."""
        if not self.cuts:
            return [0] * len(texts)
        return [context.cut(self.model, self._tokens([text])).shape[1] for text in texts]

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def _embed(self, tokens: Tensor, cut: bool) -> Vectors:
        tokens = tokens.to(self.device)
        if cut:
            return _unit(context.encode(self.model, context.cut(self.model, tokens)))
        return _unit(self.model.encode_text(tokens))

    @torch.no_grad()
    def _cut_is_exact(self) -> bool:
        """Prove the cut on this very model: a rule about its construction alone could miss a new kind of tower."""
        tokens = self._tokens(["a dog", "two cats on a mat", ""])
        return bool(np.abs(self._embed(tokens, True) - self._embed(tokens, False)).max() < _CUT_TOLERANCE)


def load_teacher(
    model: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    device: str = "auto",
    max_pixels: int = 100_000_000,
    section: str = "teacher",
) -> Teacher:
    """Load any open_clip model with its weights, preprocessing and tokenizer.

    Args:
        model: An open_clip name, ``hf-hub:org/repo``, or ``local-dir:folder``.
        pretrained: An open_clip tag or a file of weights; only with a plain name.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        device: A torch device, or ``auto``: CUDA where there is one.
        max_pixels: Pictures that claim more are refused.
        section: Where the configuration names it, for messages.

    Raises:
        ConfigError: If the name or tag is unknown, or the weights are not at hand and cannot be fetched, saying which
            file would be fetched and how to provide it.
    """
    import open_clip

    faults = list(name_faults(model, pretrained, section))
    if faults:
        raise ConfigError(faults)
    place = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    tag = None if model.startswith(_SCHEMAS) else pretrained
    needs_quick_gelu = bool(tag and (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    try:
        network, transform = open_clip.create_model_from_pretrained(
            model, pretrained=tag, precision=precision, device=place, force_quick_gelu=needs_quick_gelu
        )
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, KeyError) as fault:
        raise ConfigError(
            f"{section}.model: {model} could not be loaded: {_reason(fault, model, tag, section)}"
        ) from fault
    return Teacher(
        network,
        transform,
        tokenizer,
        name=_full_name(model, tag),
        device=place,
        max_pixels=max_pixels,
        source=model,
        quick_gelu=needs_quick_gelu,
    )


def name_faults(model: str, pretrained: str | None, section: str = "teacher") -> Iterator[str]:
    """What is wrong with a teacher's name and tag, without loading it: one sentence a fault, with its dotted path."""
    import open_clip

    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            yield f"{section}.model: {folder} holds no open_clip_config.json; an open_clip folder is needed"
    elif model.startswith("hf-hub:"):
        if model.count("/") != 1:
            yield f"{section}.model: {model} is not of the form hf-hub:organisation/repository"
    elif model not in open_clip.list_models():
        yield f"{section}.model: unknown model {model!r}; {suggest(model, open_clip.list_models())}"
    else:
        yield from _tag_faults(model, pretrained, section)


def _tag_faults(model: str, pretrained: str | None, section: str) -> Iterator[str]:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        yield f"{section}.pretrained: missing: {model} alone has random weights; valid: {', '.join(tags)}, or a file"
    elif pretrained not in tags and not Path(pretrained).is_file():
        near = suggest(pretrained, tags)
        yield f"{section}.pretrained: {pretrained!r} is neither a file nor a tag of {model}; {near}"


def _full_name(model: str, tag: str | None) -> str:
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:")).name
    return f"{model}:{Path(tag).stem if Path(tag).is_file() else tag}" if tag else model


def _reason(fault: Exception, model: str, tag: str | None, section: str) -> str:
    """Why loading failed; where a download did, which file it was after and how to go without."""
    import open_clip

    text = " ".join(str(fault).split())
    local = model.startswith("local-dir:") or (tag is not None and Path(tag).is_file())
    if local or not any(word in text.lower() for word in ("download", "connect", "hub", "resolve", "offline", "http")):
        return text
    source = open_clip.get_pretrained_cfg(model, tag) or {} if tag else {}
    wanted = source.get("hf_hub") or source.get("url") or model.removeprefix("hf-hub:")
    return (
        f"its weights would be fetched from {wanted.rstrip('/')} (open_clip_model.safetensors), which could not be "
        "reached. Without a network, copy that repository's files into a folder and set "
        f'{section}.model = "local-dir:FOLDER", or keep the name and set {section}.pretrained = "FILE". '
        f"({text[:200]})"
    )


def plain(value: Any) -> Any:
    """A value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _unit(features: Tensor) -> Vectors:
    return np.asarray(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy(), np.float32)


def _stacked(rows: Sequence[Vectors], dim: int) -> Vectors:
    return np.concatenate(rows) if rows else np.zeros((0, dim), np.float32)
