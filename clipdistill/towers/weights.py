"""Pretrained weights for a student's towers: from a file, from open_clip, or from timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clipdistill.core.errors import ConfigError
from clipdistill.towers.blueprint import ImageTower, timm_defaults, timm_weights
from clipdistill.towers.student import seeded

Weights = Mapping[str, Tensor]
_FETCH_FAULTS = (OSError, RuntimeError, ValueError, KeyError)


def fill_image(visual: Any, tower: ImageTower, file: Path | None, pretrained: str | None) -> None:
    """Give a new picture tower its pretrained weights; a projection of another width stays as it was drawn.

    Args:
        visual: The ``visual`` of the open_clip model, changed in place.
        tower: What it was built from.
        file: A safetensors file under timm's names (or open_clip's, for a tower of its own); goes first.
        pretrained: An open_clip tag or checkpoint file, for an open_clip configuration.

    Raises:
        ConfigError: If there are no weights, they do not fit, or cannot be fetched.
    """
    if file is not None:
        _fill_from_file(visual, tower, file)
    elif tower.open_clip_name is not None and pretrained is not None:
        source = open_clip_model(
            tower.open_clip_name, pretrained, "student.image", None if tower.timm_name else tower.size
        )
        _copy(visual, source.visual.state_dict())
    elif tower.timm_name is not None:
        _fill_trunk(visual.trunk, tower, _fetched(tower.timm_name), f"timm's weights of {tower.timm_name}")
    else:
        raise ConfigError(f"student.pretrained: missing: {tower.name} needs an open_clip tag or a file for its weights")


def open_clip_model(name: str, pretrained: str, field: str, size: tuple[int, int] | None = None) -> Any:
    """Load an open_clip model with its weights, to take towers from.

    Args:
        name: An open_clip configuration.
        pretrained: A tag of it, or a checkpoint file.
        field: The configuration key that asked for it, for messages.
        size: The input size that position tables are resized to; None keeps the model's own.

    Raises:
        ConfigError: If the tag is unknown, or the weights cannot be fetched or do not fit.
    """
    import open_clip

    if pretrained not in tags(name) and not Path(pretrained).is_file():
        raise ConfigError(
            f"student.pretrained: {pretrained!r} is neither a file nor a tag of {name}, which {field} names; "
            f"valid: {', '.join(tags(name)) or 'none'}"
        )
    source = open_clip.get_pretrained_cfg(name, pretrained) or {}
    try:
        with seeded(0):
            return open_clip.create_model(
                name,
                pretrained=pretrained,
                force_custom_text=True,
                force_quick_gelu=bool(source.get("quick_gelu")),
                force_image_size=size,
            )
    except _FETCH_FAULTS as fault:
        place = source.get("hf_hub") or source.get("url")
        if not place:
            raise ConfigError(f"student.pretrained: {pretrained} does not fit {name}: {_short(fault)}") from fault
        raise ConfigError(
            f"student.pretrained: the weights of {name} would be fetched from {place.rstrip('/')} "
            "(open_clip_model.safetensors), which did not work. Without a network, put that file on this machine and "
            f'set student.pretrained = "FILE". ({_short(fault)})'
        ) from fault


def needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the weights of this tag were trained with QuickGELU."""
    import open_clip

    return bool(pretrained and (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu"))


def fill_text(text: Any, source: Any, teacher_ids: list[int | None]) -> None:
    """Give a new text tower the weights of an open_clip model's, with the rows of the kept tokens.

    With the same width of embeddings the towers then agree on every text that is cut into kept pieces; otherwise the
    last projection stays as it was drawn.

    Args:
        text: The ``text`` of the student's open_clip model, changed in place.
        source: The model that :func:`open_clip_model` gave.
        teacher_ids: For each of the student's tokens the source's, or None: padding, start and end.
    """
    from open_clip.tokenizer import SimpleTokenizer

    weights = dict(source.text.state_dict())
    table = weights.pop("token_embedding.weight")
    tokenizer = SimpleTokenizer()
    special = [0, *[None] * (len(teacher_ids) - 3), tokenizer.sot_token_id, tokenizer.eot_token_id]
    rows = [kept if kept is not None else other for kept, other in zip(teacher_ids, special, strict=True)]
    known = [number for number, row in enumerate(rows) if row is not None]
    text.token_embedding.weight.data[known] = table[[row for row in rows if row is not None]]
    _copy(text, weights)


def tags(name: str) -> list[str]:
    """The pretrained tags that open_clip knows for one of its configurations."""
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(name))


def _fill_from_file(visual: Any, tower: ImageTower, file: Path) -> None:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as fault:
        raise ConfigError(f"student.image_weights: {file} is not a readable safetensors file: {fault}") from fault
    what = f"student.image_weights: {file}"
    if tower.timm_name is not None:
        _fill_trunk(visual.trunk, tower, _bare(weights, ("visual.trunk.", "trunk.")), what)
    else:
        _fit(visual, _bare(weights, ("visual.",)), ("proj", "attnpool.c_proj"), what, tower.name)


def _fill_trunk(trunk: nn.Module, tower: ImageTower, weights: Weights, what: str) -> None:
    names = timm_defaults(tower.timm_name or "").get("classifier") or ()
    _fit(trunk, weights, (names,) if isinstance(names, str) else tuple(names), what, tower.name)


def _fetched(name: str) -> Weights:
    """The weights of a timm model, from timm's hub or its cache on this machine."""
    import timm

    place = timm_weights(name)
    if place is None:
        raise ConfigError(
            f"student.image: timm has no pretrained weights for {name}; give them "
            '(student.image_weights = "FILE.safetensors") or set student.image_init = "random"'
        )
    try:
        with seeded(0):
            return dict(timm.create_model(name, pretrained=True).state_dict())
    except _FETCH_FAULTS as fault:
        raise ConfigError(
            f"student.image: the weights of {name} would be fetched from {place} (model.safetensors), which did not "
            "work. Without a network, put that file on this machine and set "
            f'student.image_weights = "FILE.safetensors", or set student.image_init = "random". ({_short(fault)})'
        ) from fault


def _bare(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    """The weights of the picture tower alone, without the prefix of the model that they lie in."""
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if inside:
            return inside
    return weights


def _fit(module: nn.Module, weights: Weights, last: tuple[str, ...], what: str, name: str) -> None:
    """Copy weights that must match name by name and shape by shape, but for the last layer, which is left alone."""
    target = module.state_dict()

    def ours(key: str) -> bool:
        return not any(key == layer or key.startswith(f"{layer}.") for layer in last)

    wanted, given = ({key for key in part if ours(key)} for part in (target, weights))
    missing = [key for key in sorted(wanted - given) if not key.endswith("num_batches_tracked")]
    wrong = [
        f"{key} is {list(weights[key].shape)} and not {list(target[key].shape)}"
        for key in sorted(wanted & given)
        if weights[key].shape != target[key].shape
    ]
    faults = [*(f"no {key}" for key in missing), *(f"unknown {key}" for key in sorted(given - wanted)), *wrong]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ConfigError(f"{what} does not fit {name}: {'; '.join(faults[:4])}{more}")
    _copy(module, {key: weights[key] for key in wanted & given})


def _copy(module: nn.Module, weights: Weights) -> None:
    """Copy what has the same name and shape; the rest, which depends on the width of the embeddings, stays."""
    target = module.state_dict()
    fitting = {key: value for key, value in weights.items() if key in target and target[key].shape == value.shape}
    module.load_state_dict(fitting, strict=False)


def _short(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200]
