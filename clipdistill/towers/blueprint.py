"""From a name to a tower: presets, open_clip's configurations and timm's models, as parts of a ``model_cfg``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.core.errors import ConfigError, suggest

Json = dict[str, Any]

TEACHER = "teacher"
"""What ``student.image`` says where pictures stay the teacher's: no tower of this name is built."""

INHERIT = "inherit"
"""The name of a tower that is cut out of the teacher's."""

_PRESETS = Path(__file__).parent / "presets"
_TEXT_KEYS = (
    "context_length",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "ls_init_value",
    "act_kwargs",
    "norm_kwargs",
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)


@dataclass(frozen=True)
class ImageTower:
    """A picture tower before it is built.

    Attributes:
        name: What the user called it, or what the preset stands for.
        vision_cfg: open_clip's ``vision_cfg``, its image size included.
        open_clip_name: The open_clip configuration that it is of, or None.
        timm_name: The timm model inside, or None for open_clip's own towers.
        quick_gelu: Whether open_clip's own tower uses QuickGELU; None for timm's, which do not ask.
    """

    name: str
    vision_cfg: Json
    open_clip_name: str | None
    timm_name: str | None
    quick_gelu: bool | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its input in pixels."""
        size = self.vision_cfg["image_size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class TextTower:
    """A text tower before it is built: always open_clip's own causal transformer, pooled at the end token.

    Attributes:
        name: What the user called it.
        text_cfg: open_clip's ``text_cfg`` without the vocabulary.
        open_clip_name: The open_clip configuration that it is of, or None.
        loadable: Whether that configuration's pretrained text tower is of this very kind.
        quick_gelu: Whether that configuration uses QuickGELU.
    """

    name: str
    text_cfg: Json
    open_clip_name: str | None
    loadable: bool
    quick_gelu: bool


@cache
def presets() -> Mapping[str, Json]:
    """The presets by name: a picture tower with its size, and a text tower's measures."""
    return {path.stem: files.read_json(path) for path in sorted(_PRESETS.glob("*.json"))}


def student_faults(image: str, text: str) -> Iterator[str]:
    """What is wrong with the names of a student's towers, without building them: one sentence a fault.

    Args:
        image: The picture tower's name, as in ``student.image``; ``teacher`` for none.
        text: The text tower's name, as in ``student.text``.
    """
    for fault in (None if image == TEACHER else _image_fault(image), _text_fault(text)):
        if fault is not None:
            yield fault


def image_tower(name: str, dim: int = 512, size: int | None = None) -> ImageTower:
    """Find a picture tower by name: a preset, else an open_clip configuration, else a timm model.

    Args:
        name: The name; ``timm/NAME`` is timm's where open_clip has a configuration of the same name.
        dim: The width of the embeddings.
        size: The side of the input in pixels; None takes the tower's own.

    Raises:
        ConfigError: If there is no such tower, with the nearest name.
    """
    import open_clip

    fault = _image_fault(name)
    if fault is not None:
        raise ConfigError(fault)
    if name in presets():
        preset = presets()[name]
        return image_tower(preset["image"], dim, size or preset["image_size"])
    if name in open_clip.list_models():
        return _open_clip_tower(name, dim, size)
    return _timm_tower(name.removeprefix("timm/"), size)


def text_tower(name: str) -> TextTower:
    """Find a text tower by name: a preset or an open_clip configuration.

    Raises:
        ConfigError: If there is no such tower, or it is not a transformer of open_clip's own.
    """
    import open_clip

    fault = _text_fault(name)
    if fault is not None:
        raise ConfigError(fault)
    if name in presets():
        return TextTower(name, dict(presets()[name]["text"]), None, False, False)
    config = _text_cfg(name)
    causal = not config.get("no_causal_mask") and not config.get("embed_cls")
    plain = not config.get("proj_bias") and config.get("proj_type", "linear") == "linear"
    loadable = causal and plain and config.get("pool_type", "argmax") == "argmax" and not _tokenizer_name(config)
    quick_gelu = bool(open_clip.get_model_config(name).get("quick_gelu"))
    kept = {"context_length": 77, "width": 512, "heads": 8, "layers": 12}
    kept |= {key: config[key] for key in _TEXT_KEYS if key in config}
    return TextTower(name, kept, name, loadable, quick_gelu)


def timm_weights(name: str) -> str | None:
    """Where timm's pretrained weights of a model are fetched from, or None where it has none."""
    import timm

    source = timm.get_pretrained_cfg(name)
    if source is None:
        return None
    url = source.url if isinstance(source.url, str) else None
    return f"hf-hub:{source.hf_hub_id}" if source.hf_hub_id else url or None


def timm_defaults(name: str) -> Json:
    """The input size, mean, deviation, interpolation and classifier names that timm has for a model."""
    import timm

    source = timm.get_pretrained_cfg(name)
    return {} if source is None else asdict(source)


def _image_fault(name: str) -> str | None:
    if name in presets() or name == INHERIT:
        return None
    import open_clip

    if name in open_clip.list_models() or name.removeprefix("timm/") in _timm_names():
        return None
    known = [INHERIT, TEACHER, *presets(), *open_clip.list_models(), *_timm_names()]
    return f"student.image: unknown picture tower {name!r}; {suggest(name, known)}"


def _text_fault(name: str) -> str | None:
    if name in presets() or name == INHERIT:
        return None
    import open_clip

    if name not in open_clip.list_models():
        native = (model for model in open_clip.list_models() if not _text_cfg(model).get("hf_model_name"))
        known = [INHERIT, *presets(), *native]
        return f"student.text: unknown text tower {name!r}; {suggest(name, known)}"
    if _text_cfg(name).get("hf_model_name"):
        return (
            f"student.text: the text tower of {name} is a Hugging Face model, which a student cannot have; "
            f"valid: {', '.join(presets())}, or an open_clip configuration with a text tower of its own"
        )
    return None


def _text_cfg(name: str) -> Json:
    import open_clip

    return dict(open_clip.get_model_config(name)["text_cfg"])


def _tokenizer_name(config: Json) -> str:
    return str(config.get("hf_tokenizer_name") or "")


@cache
def _timm_names() -> frozenset[str]:
    import timm

    return frozenset([*timm.list_models(), *timm.list_models(pretrained=True)])


def _open_clip_tower(name: str, dim: int, size: int | None) -> ImageTower:
    import open_clip

    config = open_clip.get_model_config(name)
    vision: Json = {key: value for key, value in config["vision_cfg"].items() if key != "output_tokens"}
    timm_name = vision.get("timm_model_name")
    vision["image_size"] = size or vision.get("image_size", 224)
    if timm_name:
        vision["timm_model_pretrained"] = False
        if vision.get("timm_proj") == "none" and dim != config["embed_dim"]:
            vision["timm_proj"] = ""  # the trunk's own head, where its bare features have another width
    return ImageTower(name, vision, name, timm_name, None if timm_name else bool(config.get("quick_gelu")))


def _timm_tower(name: str, size: int | None) -> ImageTower:
    vision = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        # The network's own classifier is the projection: it fits whatever comes before it, where open_clip's linear
        # one is made for num_features, which is not the width of a tower with a convolutional head.
        "timm_pool": _own_pool(name),
        "timm_proj": "",
        "image_size": size or _side(name),
    }
    return ImageTower(name, vision, None, name, None)


def _side(name: str) -> int:
    return int(timm_defaults(name).get("input_size", (3, 224, 224))[-1])


@cache
def _own_pool(name: str) -> str:
    """The pooling that a timm network has by itself, which open_clip would otherwise replace."""
    import timm
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = timm.create_model(name)
    for part in (network, getattr(network, "head", None)):
        pool = getattr(part, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(kind, str) and kind:
            return kind
    return "avg"
