"""Building a student: its towers, its vocabulary, and what both begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.towers import weights
from clipdistill.towers.blueprint import (
    INHERIT,
    ImageTower,
    image_tower,
    student_faults,
    text_tower,
    timm_defaults,
)
from clipdistill.towers.choice import (
    CUT,
    Choice,
    TeacherParts,
    choice_faults,
    kept_share,
    plan_cuts,
    prune_faults,
    quick_gelus,
)
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.inherit import teacher_token_table, token_table
from clipdistill.towers.inheritance.convolutional import (
    Importance,
    prune_channels,
)
from clipdistill.towers.inheritance.plan import Calibration, source_ids
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import MAX_PIXELS, DualEncoder, assemble, projected_sides, projections, seeded
from clipdistill.towers.tokenizer import StudentTokenizer, default_backend, teacher_backend
from clipdistill.towers.vocabulary import prune

__all__ = ["build_query_student", "build_student", "prune_faults", "student_faults"]

_FIRST_SCALE = 1 / 0.07  # CLIP's own
_TOKENIZER = "clipdistill-student"  # any name will do: open_clip reads a folder's own tokenizer when there is one


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
    cuts = plan_cuts(image, text, teacher, inherit or InheritConfig(), calibration, seed)
    picture = cuts["image"].image_tower(image_size) if "image" in cuts else image_tower(image, dim, image_size)
    words = cuts["text"].text_tower() if "text" in cuts else text_tower(text)
    first, second = (CUT if "image" in cuts else image_init), (CUT if "text" in cuts else text_init)
    plan = Choice(picture, words, first, second, pretrained, image_weights, teacher, cuts)
    faults = list(choice_faults(plan))
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
    share = kept_share(cuts, share)
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
    plan = Choice(None, text_tower(text), "", text_init, pretrained, None, teacher, {})
    faults = list(choice_faults(plan))
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


def _rotation(plan: Choice, maps: nn.ModuleDict | None) -> Tensor | None:
    """What maps the teacher's embeddings to the student's space [teacher's dim, dim], where that is another one.

    It is the transpose of the student's own map back, so that what was inherited is mapped to where it came from.
    """
    if maps is None or not plan.cuts:
        return None
    return maps.get_parameter("image.weight").detach().clone()


def _text_model_cfg(
    plan: Choice, tokenizer: StudentTokenizer, dim: int, logit_scale: float | None, logit_bias: float | None
) -> dict[str, Any]:
    """The ``model_cfg`` but for the picture tower's part."""
    return {
        "embed_dim": dim,
        "custom_text": True,
        "quick_gelu": any(quick_gelus(plan)),
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


def _backend(plan: Choice) -> Tokenizer:
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


def _fill_text(text: Any, plan: Choice, teacher_ids: list[int | None], rotation: Tensor | None, seed: int) -> None:
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


def _preprocess(plan: Choice, image: ImageTower) -> Preprocess:
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
