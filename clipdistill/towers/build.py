"""Building a student: its towers, its vocabulary, and what both begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, cast

import torch
from open_clip.transformer import QuickGELU
from tokenizers import Tokenizer
from torch import Tensor, nn

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.towers import weights
from clipdistill.towers.blueprint import (
    INHERIT,
    ImageTower,
    TextTower,
    image_tower,
    student_faults,
    text_tower,
    timm_defaults,
)
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.inherit import teacher_token_table, token_table
from clipdistill.towers.inheritance.convolutional import (
    Importance,
    prune_channels,
    pruning_faults,
    torch_pruning,
)
from clipdistill.towers.inheritance.plan import Calibration, Cut, plan_cut, source_ids
from clipdistill.towers.inheritance.tower import Side
from clipdistill.towers.inheritance.trunk import Trunk, plan_trunk
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import MAX_PIXELS, DualEncoder, assemble, projected_sides, projections, seeded
from clipdistill.towers.tokenizer import StudentTokenizer, default_backend, teacher_backend
from clipdistill.towers.vocabulary import prune

__all__ = ["build_query_student", "build_student", "prune_faults", "student_faults"]

_FIRST_SCALE = 1 / 0.07  # CLIP's own
_CUT = "cut"  # where the weights of an inherited tower come from
_TOKENIZER = "clipdistill-student"  # any name will do: open_clip reads a folder's own tokenizer when there is one


class TeacherParts(Protocol):
    """What a student may begin from: its teacher's model and tokenizer."""

    model: Any
    tokenizer: Any


def build_student(
    *,
    image: str,
    text: str,
    dim: int,
    teacher_dim: int,
    image_init: Literal["pretrained", "random"],
    text_init: Literal["inherit", "pretrained", "random"],
    texts: Sequence[str],
    seed: int,
    pretrained: str | None = None,
    image_weights: Path | None = None,
    image_size: int | None = None,
    vocab_size: int | None = None,
    teacher: TeacherParts | None = None,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    dims: Sequence[int] = (),
    axes: Tensor | None = None,
    max_pixels: int = MAX_PIXELS,
    inherit: InheritConfig | None = None,
    calibration: Calibration | None = None,
    share: float | None = None,
    pictures: Callable[[Preprocess], Tensor] | None = None,
) -> DualEncoder:
    """Build an untrained student, a function of its arguments alone.

    Args:
        image: The picture tower: a preset (nano, tiny, small), an open_clip configuration or a timm model; ``inherit``
            cuts the teacher's.
        text: The text tower: a preset or an open_clip configuration; ``inherit`` cuts the teacher's.
        dim: The width of its embeddings.
        teacher_dim: The width of the teacher's; where they differ the student has a projection.
        image_init: Where the picture tower's weights come from.
        text_init: ``inherit`` takes the token table from the teacher's; ``pretrained`` the whole text tower from
            open_clip; both prune the vocabulary to ``texts``, as ``random`` does.
        texts: What the vocabulary is for.
        seed: Decides everything that is random.
        pretrained: An open_clip tag or checkpoint file, for towers that are open_clip configurations.
        image_weights: A safetensors file of the picture tower, under timm's names.
        image_size: The side of the pictures in pixels; None takes the tower's own.
        vocab_size: The most entries of the vocabulary; None keeps all that the texts use.
        teacher: Its ``model`` and ``tokenizer``; None where only its embeddings are known: then the vocabulary is
            pruned from CLIP's.
        logit_scale: exp(logit_scale) at first; None takes CLIP's 1 / 0.07.
        logit_bias: SigLIP's bias at first; None for a model without one.
        dims: The widths that its embeddings can be cut to, the first ``dim``; with several it always has a projection.
        axes: Where the projection begins [teacher_dim, up to dim]; None draws a rotation.
        max_pixels: Pictures that claim more are refused.
        inherit: How an ``inherit`` tower is cut; None keeps the defaults.
        calibration: The rows that importance is measured on, for ``inherit``; None where nothing is to be measured.
        share: The share of channels that a named timm network keeps; None keeps all. Of a teacher's own convolutional
            tower it is ``inherit.width``.
        pictures: Gives pictures as a preprocessing prepares them, float32 [pictures, 3, height, width], for a
            convolutional tower that is pruned.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        ConfigError: If a name is unknown, choices do not go together, or weights are missing, do not fit or cannot be
            fetched.
        DataError: If a tower is to be pruned and there are fewer than 2 ``pictures``.
        MissingExtraError: If a tower is to be pruned without torch-pruning.
    """
    faults = list(student_faults(image, text))
    if faults:
        raise ConfigError(faults)
    cuts = _cuts(image, text, teacher, inherit or InheritConfig(), calibration, seed)
    picture = cuts["image"].image_tower(image_size) if "image" in cuts else image_tower(image, dim, image_size)
    words = cuts["text"].text_tower() if "text" in cuts else text_tower(text)
    first, second = (_CUT if "image" in cuts else image_init), (_CUT if "text" in cuts else text_init)
    plan = _Plan(picture, words, first, second, pretrained, image_weights, teacher, cuts)
    faults = list(_choice_faults(plan))
    if faults:
        raise ConfigError(faults)
    vocabulary = prune(_backend(plan), texts, size=vocab_size)
    tokenizer = StudentTokenizer(vocabulary.backend, words.text_cfg["context_length"])
    model_cfg = {**_text_model_cfg(plan, tokenizer, dim, logit_scale, logit_bias), "vision_cfg": picture.vision_cfg}
    model: Any = _assembled(model_cfg, picture, seed)
    maps = None if dim == teacher_dim and len(dims) < 2 else projections(dim, teacher_dim, seed, axes)
    rotation = _rotation(plan, maps)
    if "image" in cuts:
        cuts["image"].fill(model.visual, (), rotation, seed)
    elif image_init == "pretrained":
        weights.fill_image(model.visual, picture, image_weights, pretrained)
    _fill_text(model.text, plan, vocabulary.teacher_ids, rotation, seed)
    preprocess, rule = _preprocess(plan, picture), inherit or InheritConfig()
    share = _kept_share(cuts, share)
    if share < 1:  # before the student is made, which orders its weights in memory
        pixels = pictures(preprocess) if pictures is not None else torch.zeros(0, 3, 1, 1)
        importance: Importance = "taylor" if rule.importance == "taylor" else "magnitude"
        prune_channels(model.visual, share, pixels, importance=importance, seed=seed)
    student = DualEncoder(
        model,
        model_cfg,
        tokenizer,
        preprocess,
        projection=maps,
        dims=dims,
        max_pixels=max_pixels,
        pruned=share < 1,
    )
    student.module.eval()
    return student


def prune_faults(image: str) -> Iterator[str]:
    """Why a named picture tower cannot be pruned, found without its weights: one sentence a fault.

    Args:
        image: The picture tower's name, as in ``student.image``; a known one.

    Raises:
        MissingExtraError: If torch-pruning is not installed.
    """
    import timm

    name = image_tower(image).timm_name
    reasons = ["it is not a convolutional network of timm"]
    if name is not None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            reasons = list(pruning_faults(timm.create_model(name)))
    if reasons:
        yield f"student.prune: {image} cannot be pruned: {'; '.join(reasons)}; leave it out, or name a CNN of timm"
    torch_pruning()


def build_query_student(
    *,
    text: str,
    dim: int,
    teacher_dim: int,
    text_init: Literal["inherit", "pretrained", "random"],
    texts: Sequence[str],
    seed: int,
    searches: SearchedTeacher,
    pretrained: str | None = None,
    vocab_size: int | None = None,
    teacher: TeacherParts | None = None,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
) -> DualEncoder:
    """Build an untrained text tower for the index that its teacher's pictures are in; pictures stay the teacher's.

    Args:
        text: As for :func:`build_student`.
        dim: The width that the tower itself ends in; where it differs from the teacher's, a projection follows.
        teacher_dim: The width of the teacher's embeddings, and so of the index.
        text_init: As for :func:`build_student`.
        texts: What the vocabulary is for.
        seed: Decides everything that is random.
        searches: The teacher whose pictures it searches.
        pretrained: An open_clip tag or checkpoint file, for a pretrained text tower.
        vocab_size: The most entries of the vocabulary; None keeps all that the texts use.
        teacher: Its ``model`` and ``tokenizer``; None where only its embeddings are known. The tower takes the
            activation of the teacher's picture tower, as open_clip has one setting for both.
        logit_scale: exp(logit_scale) at first; None takes CLIP's 1 / 0.07.
        logit_bias: SigLIP's bias at first; None for a model without one.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        ConfigError: As :func:`build_student`.
    """
    if text == INHERIT:
        raise ConfigError('student.text: "inherit" needs a student with both towers; name a text tower')
    plan = _Plan(None, text_tower(text), "", text_init, pretrained, None, teacher, {})
    faults = list(_choice_faults(plan))
    if faults:
        raise ConfigError(faults)
    vocabulary = prune(_backend(plan), texts, size=vocab_size)
    tokenizer = StudentTokenizer(vocabulary.backend, plan.text.text_cfg["context_length"])
    model_cfg = _text_model_cfg(plan, tokenizer, dim, logit_scale, logit_bias)
    model: Any = assemble(model_cfg, seed)
    _fill_text(model.text, plan, vocabulary.teacher_ids, None, seed)
    maps = None if dim == teacher_dim else projections(dim, teacher_dim, seed, sides=projected_sides(searches))
    student = DualEncoder(model, model_cfg, tokenizer, None, projection=maps, searches=searches)
    student.module.eval()
    return student


class _Cuts(TypedDict, total=False):
    """How the towers that are the teacher's own are cut."""

    image: Cut | Trunk
    text: Cut


@dataclass(frozen=True)
class _Plan:
    """What was chosen, with the towers found; no picture tower where pictures stay the teacher's."""

    image: ImageTower | None
    text: TextTower
    image_init: str
    text_init: str
    pretrained: str | None
    image_weights: Path | None
    teacher: TeacherParts | None
    cuts: _Cuts


def _cuts(
    image: str,
    text: str,
    teacher: TeacherParts | None,
    rule: InheritConfig,
    calibration: Calibration | None,
    seed: int,
) -> _Cuts:
    """How the towers that are the teacher's own are cut, by side.

    Raises:
        ConfigError: If there is no teacher to cut, or it cannot be cut.
    """
    named: list[tuple[Side, str]] = [("image", image), ("text", text)]
    sides = [side for side, name in named if name == INHERIT]
    if sides and teacher is None:
        raise ConfigError(
            f'student.{sides[0]}: "inherit" cuts the tower out of one live teacher (teacher.model), and there is none '
            "here; name a tower instead"
        )
    rows = calibration or Calibration(torch.zeros(0, 3, 1, 1), torch.zeros(0, 1, dtype=torch.long))
    model = None if teacher is None else teacher.model
    found: _Cuts = {}
    if "image" in sides:
        found["image"] = inherited_image(model, rule, rows, seed)
    if "text" in sides:
        found["text"] = inherited_text(model, rule, rows, seed)
    return found


def inherited_image(model: Any, rule: InheritConfig, rows: Calibration, seed: int) -> Cut | Trunk:
    """How a teacher's picture tower is cut, by its kind.

    Raises:
        ConfigError: If there is no way for its kind, or the shares do not go together.
    """
    return plan_trunk(model.visual, rule) or plan_cut(model, "image", rule, rows, seed=seed)


def _kept_share(cuts: _Cuts, share: float | None) -> float:
    """The share of its channels that the picture tower keeps: of a teacher's own CNN, or of a named one."""
    cut = cuts.get("image")
    if isinstance(cut, Trunk):
        return cut.share
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"student.prune: must be a share above 0 and up to 1, got {share}")
    return 1.0 if share is None else share


def inherited_text(model: Any, rule: InheritConfig, rows: Calibration, seed: int) -> Cut:
    """How a teacher's text tower is cut.

    Raises:
        ConfigError: If there is no way for its kind, or the shares do not go together.
    """
    return plan_cut(model, "text", rule, rows, seed=seed)


def _rotation(plan: _Plan, maps: nn.ModuleDict | None) -> Tensor | None:
    """What maps the teacher's embeddings to the student's space [teacher's dim, dim], where that is another one.

    It is the transpose of the student's own map back, so that what was inherited is mapped to where it came from.
    """
    if maps is None or not plan.cuts:
        return None
    return maps.get_parameter("image.weight").detach().clone()


def _choice_faults(plan: _Plan) -> Iterator[str]:
    text = plan.text
    if plan.text_init == "inherit" and (plan.teacher is None or teacher_token_table(plan.teacher.model) is None):
        yield (
            'student.text_init: "inherit" takes the token table from a teacher\'s text tower, and there is none here '
            '(embeddings only, or no table); set student.text_init = "random" or "pretrained"'
        )
    if plan.text_init == "pretrained" and not text.loadable:
        yield (
            f'student.text_init: "pretrained" needs an open_clip configuration with CLIP\'s own text tower and '
            f'tokenizer, such as ViT-B-32; {text.name} is not one: set student.text_init = "inherit" or "random"'
        )
    if plan.text_init == "pretrained" and plan.pretrained is None:
        yield f"student.pretrained: missing: the text tower of {text.name} needs an open_clip tag or a file"
    if plan.image is not None:
        yield from _picture_faults(plan, plan.image)
    elif plan.pretrained is not None and plan.text_init != "pretrained":
        yield (
            f"student.pretrained: {plan.pretrained!r} is for a pretrained text tower, which {text.name} is not here; "
            'leave it out, or set student.text_init = "pretrained"'
        )


def _picture_faults(plan: _Plan, image: ImageTower) -> Iterator[str]:
    text = plan.text
    asks = (plan.image_init == "pretrained" and image.open_clip_name) or plan.text_init == "pretrained"
    if plan.pretrained is not None and not asks:
        yield (
            f"student.pretrained: {plan.pretrained!r} is for open_clip configurations with pretrained towers, which "
            f"neither {image.name} nor {text.name} is here; leave it out (timm towers take student.image_weights)"
        )
    if plan.image_init == "random" and plan.image_weights is not None:
        yield 'student.image_weights: given, but student.image_init is "random"; leave one of the two out'
    if plan.image_init == "pretrained" and plan.image_weights is None and not image.timm_name and not plan.pretrained:
        yield (
            f"student.pretrained: missing: {image.name} needs an open_clip tag or a file for its weights; valid: "
            f'{", ".join(weights.tags(image.name))}; or set student.image_init = "random"'
        )
    if len(set(_quick_gelu(plan))) == 2:
        yield (
            f"student.text: the towers of {image.name} and {text.name} differ in QuickGELU, which open_clip "
            "sets for both at once; take both from one configuration"
        )


def _quick_gelu(plan: _Plan) -> list[bool]:
    """Which activation each pretrained tower asks for that minds; else the one of the picture tower's configuration."""
    image, text, wanted = plan.image, plan.text, _cut_quick_gelu(plan.cuts)
    if image is not None and image.quick_gelu is not None and plan.image_init == "pretrained":
        wanted.append(image.quick_gelu or weights.needs_quick_gelu(image.name, plan.pretrained))
    if plan.text_init == "pretrained":
        wanted.append(text.quick_gelu or weights.needs_quick_gelu(text.name, plan.pretrained))
    return wanted or [_teacher_quick_gelu(plan.teacher) if image is None else bool(image.quick_gelu)]


def _cut_quick_gelu(cuts: _Cuts) -> list[bool]:
    """Which activation each transformer tower has that is cut out of the teacher's."""
    towers = [cuts.get("image"), cuts.get("text")]
    return [cut.source.quick_gelu for cut in towers if isinstance(cut, Cut)]


def _teacher_quick_gelu(teacher: TeacherParts | None) -> bool:
    """Whether the teacher's picture tower has QuickGELU, however it came by it: some tags ask for it, some names."""
    visual = getattr(getattr(teacher, "model", None), "visual", None)
    return visual is not None and any(isinstance(part, QuickGELU) for part in visual.modules())


def _text_model_cfg(
    plan: _Plan, tokenizer: StudentTokenizer, dim: int, logit_scale: float | None, logit_bias: float | None
) -> dict[str, Any]:
    """The ``model_cfg`` but for the picture tower's part."""
    return {
        "embed_dim": dim,
        "custom_text": True,
        "quick_gelu": any(_quick_gelu(plan)),
        "init_logit_scale": math.log(_FIRST_SCALE if logit_scale is None else logit_scale),
        **({} if logit_bias is None else {"init_logit_bias": logit_bias}),
        "text_cfg": {
            **plan.text.text_cfg,
            "vocab_size": tokenizer.vocab_size,
            "hf_tokenizer_name": _TOKENIZER,
            "pad_id": tokenizer.pad_id,
            "eos_id": tokenizer.end_id,
        },
    }


def _backend(plan: _Plan) -> Tokenizer:
    """The tokenizer that the vocabulary is pruned from: the teacher's; CLIP's where that is not known or not wanted."""
    if plan.teacher is None or plan.text_init == "pretrained":
        return default_backend()
    return teacher_backend(plan.teacher.tokenizer)


def _assembled(model_cfg: dict[str, Any], image: ImageTower, seed: int) -> nn.Module:
    """Build the model and let a picture of noise through, since only that shows whether a tower really fits.

    Raises:
        ConfigError: If the tower cannot be built, cannot take this size, or gives no embedding of the asked width.
    """
    height, width = image.size
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    try:
        model: Any = assemble(model_cfg, seed).eval()
        _enliven(model.visual, seed)
        with torch.no_grad():
            found = model.visual(noise)
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as fault:
        raise ConfigError(_misfit(image, " ".join(str(fault).split())[:200] or type(fault).__name__)) from fault
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (1, model_cfg["embed_dim"]) or not bool(found.isfinite().all() and found.any()):
        raise ConfigError(_misfit(image, f"it gives {shape} where one row of {model_cfg['embed_dim']} is needed"))
    return cast(nn.Module, model)


def _misfit(image: ImageTower, reason: str) -> str:
    native = timm_defaults(image.timm_name).get("input_size", image.size)[-1] if image.timm_name else image.size[0]
    if native != image.size[0]:
        return (
            f"student.image_size: {image.name} cannot take {image.size[0]} px ({reason}). open_clip rebuilds this "
            f"tower for {native} px only: leave student.image_size out, or choose a convolutional tower or one of "
            "open_clip's own ViTs, which take any size"
        )
    return f"student.image: {image.name} cannot be a student's picture tower: {reason}"


def _enliven(visual: Any, seed: int) -> None:
    """Draw a last layer that its network leaves at zero, from which no direction could be learnt."""
    last = visual.trunk.get_classifier() if hasattr(visual, "trunk") else None
    if isinstance(last, nn.Linear) and not bool(last.weight.any()):
        with seeded(seed):
            nn.init.normal_(last.weight, std=last.in_features**-0.5)


def _fill_text(text: Any, plan: _Plan, teacher_ids: list[int | None], rotation: Tensor | None, seed: int) -> None:
    if "text" in plan.cuts and plan.teacher is not None:
        cut = plan.cuts["text"]
        cut.fill(text, source_ids(cut, plan.teacher.tokenizer, teacher_ids), rotation, seed)
    elif plan.text_init == "pretrained":
        source = weights.open_clip_model(plan.text.name, plan.pretrained or "", "student.text")
        weights.fill_text(text, source, teacher_ids)
    elif plan.text_init == "inherit" and plan.teacher is not None:
        table = teacher_token_table(plan.teacher.model)
        if table is not None:
            generator = torch.Generator().manual_seed(seed)
            width = plan.text.text_cfg["width"]
            text.token_embedding.weight.data.copy_(token_table(table, teacher_ids, width, generator=generator))


def _preprocess(plan: _Plan, image: ImageTower) -> Preprocess:
    """The tower's own mean, deviation and filter; open_clip's defaults where it has none."""
    import open_clip

    if "image" in plan.cuts and plan.teacher is not None:
        own = open_clip.get_model_preprocess_cfg(plan.teacher.model)
        return Preprocess.from_open_clip({**own, "size": image.size})
    known: dict[str, Any] = {}
    if image.open_clip_name is not None and plan.image_init == "pretrained" and plan.pretrained is not None:
        known = open_clip.get_pretrained_cfg(image.open_clip_name, plan.pretrained) or {}
    elif image.timm_name is not None and (image.open_clip_name is None or plan.image_init == "pretrained"):
        known = timm_defaults(image.timm_name)
    kept = {key: known[key] for key in ("mean", "std", "resize_mode") if known.get(key)}
    if known.get("interpolation") in ("bicubic", "bilinear"):
        kept["interpolation"] = known["interpolation"]
    return Preprocess.from_open_clip({**kept, "size": image.size})
