"""Students cut out of their teachers: equality at full size, shapes, importance, positions, tokens, errors."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import tiny
import torch
from torch.nn import functional as F

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.data.pictures import decode
from clipdistill.towers.build import build_student
from clipdistill.towers.inheritance.cut import Kept, choose, cut, resized_positions, stride
from clipdistill.towers.inheritance.importance import measure
from clipdistill.towers.inheritance.plan import Calibration
from clipdistill.towers.inheritance.refit import fit_linear, refit
from clipdistill.towers.inheritance.shape import Shape, share_of
from clipdistill.towers.inheritance.tower import Tower, tower_of
from clipdistill.towers.student import DualEncoder, assemble
from clipdistill.towers.teacher import Teacher

TEXTS = [tiny.caption(number) for number in range(70)]
PICTURES = [pair.picture for pair in tiny.pairs(12)]
TOKENIZER = open_clip.SimpleTokenizer(context_length=32)
WHOLE = InheritConfig(depth=1.0, width=1.0)


def teacher_of(*, vision=None, text=None, custom=True, siglip=False, **changes):
    """A live teacher of three layers with random weights: weights large enough for all parts to be heard."""
    cfg = tiny.model_cfg(custom=custom, siglip=siglip)
    cfg["vision_cfg"] |= {"layers": 3, **(vision or {})}
    cfg["text_cfg"] |= {"layers": 3, **(text or {})}
    cfg |= changes
    kind = open_clip.model.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.model.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(**cfg)
        for name, value in model.named_parameters():
            if "logit" not in name and "ln_" not in name:
                value.data.copy_(torch.randn_like(value) * 0.2)
            elif "ln_" in name:
                value.data.add_(torch.randn_like(value) * 0.1)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**tiny.PREPROCESS), is_train=False
    )
    model.visual.preprocess_cfg = tiny.PREPROCESS
    return Teacher(model, transform, TOKENIZER, name="tiny")


def calibration(teacher):
    pixels = [teacher.transform(decode(picture.read(), 10**6, "memory")) for picture in PICTURES]
    return Calibration(torch.stack(pixels), teacher.tokenizer(TEXTS))


def build(teacher, rule=WHOLE, **changes):
    options = {"image": "inherit", "text": "inherit", "dim": 24, "teacher_dim": 24, "image_init": "pretrained"}
    options |= {"text_init": "inherit", "texts": TEXTS, "seed": 5, "teacher": teacher, "inherit": rule}
    options |= {"calibration": calibration(teacher) if teacher else None}
    return build_student(**{**options, **changes})


def assert_equal(student, teacher):
    np.testing.assert_array_equal(student.encode_images(PICTURES), teacher.encode_images(PICTURES))
    np.testing.assert_array_equal(student.encode_texts(TEXTS), teacher.encode_texts(TEXTS))


def weights_of(teacher, side="image"):
    return Tower(side, copy.deepcopy(tower_of(teacher.model, side).module))


KINDS = {
    "custom": {},
    "plain": {"custom": False},
    "quick": {"quick_gelu": True},
    "scaled": {"vision": {"ls_init_value": 0.5}, "text": {"ls_init_value": 0.5}},
    "mean": {"vision": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}},
    "odd mlp": {"vision": {"mlp_ratio": 3.37}, "text": {"mlp_ratio": 2.71}},
    "biased": {"text": {"proj_bias": True, "pool_type": "eos", "eos_id": 49407}},
    "epsilon": {"vision": {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}},
    "bare": {"text": {"proj_type": "none", "width": 24, "heads": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_teacher_is_kept_bit_for_bit(kind):
    teacher = teacher_of(**KINDS[kind])
    assert_equal(build(teacher), teacher)


@pytest.mark.parametrize("rule", [{"depth_by": "importance"}, {"width_by": "first"}, {"importance": "taylor"}])
def test_the_whole_is_the_same_by_every_rule(rule):
    teacher = teacher_of()
    assert_equal(build(teacher, InheritConfig(depth=1, width=1, heads=1, mlp=1, **rule)), teacher)


def test_a_pruned_vocabulary_changes_no_text_whose_tokens_are_kept():
    teacher = teacher_of()
    student = build(teacher, texts=TEXTS[:20])
    assert student.tokenizer.vocab_size < build(teacher).tokenizer.vocab_size
    np.testing.assert_array_equal(student.encode_texts(TEXTS[:20]), teacher.encode_texts(TEXTS[:20]))


@pytest.mark.parametrize("custom", [True, False])
def test_the_saved_student_loads_here_and_in_open_clip(tmp_path, custom):
    teacher = teacher_of(custom=custom)
    rule = InheritConfig(depth=0.67, width=0.5, mlp=0.3)
    student = build(teacher, rule)
    shape = Shape(layers=2, heads=1, head_width=16, hidden=38)
    assert [tower_of(student.model, side).shape for side in ("image", "text")] == [shape, shape]
    student.save(tmp_path / "s")
    again = DualEncoder.load(tmp_path / "s")
    np.testing.assert_array_equal(again.encode_texts(TEXTS), student.encode_texts(TEXTS))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 's'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 's'}")(TEXTS)
    pixels = torch.stack([transform(decode(picture.read(), 10**6, "memory")) for picture in PICTURES])
    with torch.no_grad():
        texts, images = model.eval().encode_text(tokens, normalize=True), model.encode_image(pixels, normalize=True)
    np.testing.assert_allclose(texts.numpy(), student.encode_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(images.numpy(), student.encode_images(PICTURES), atol=1e-3)
    twice = build(teacher, rule)
    assert twice.fingerprint == student.fingerprint


def test_one_tower_can_be_inherited_beside_another():
    teacher = teacher_of()
    student = build(teacher, text="nano", text_init="random")
    np.testing.assert_array_equal(student.encode_images(PICTURES), teacher.encode_images(PICTURES))
    other = build(teacher, image="mobilenetv4_conv_small_050", image_size=32, image_init="random")
    np.testing.assert_array_equal(other.encode_texts(TEXTS), teacher.encode_texts(TEXTS))


def test_a_narrower_embedding_is_mapped_back_to_where_it_came_from():
    teacher = teacher_of()
    student = build(teacher, dim=12)
    rotation = student.projection.get_parameter("image.weight").detach()
    rows = torch.from_numpy(teacher.encode_texts(TEXTS))
    np.testing.assert_allclose(student.encode_texts(TEXTS), F.normalize(rows @ rotation, dim=-1).numpy(), atol=1e-5)
    wider = build(teacher, dim=30)
    back = wider.to_teacher(torch.from_numpy(wider.encode_texts(TEXTS)), "text")
    assert back.shape == (70, 24)


def test_shares_are_rounded_and_never_nothing():
    assert [share_of(0.5, 5), share_of(0.49, 5), share_of(0.01, 5), share_of(1.0, 5)] == [3, 2, 1, 5]
    assert stride(12, 6) == [0, 2, 4, 7, 9, 11]
    assert (stride(4, 1), stride(3, 3), stride(5, 2)) == ([0], [0, 1, 2], [0, 4])
    for hidden in range(1, 200):
        ratio = Shape(1, 3, 7, hidden).mlp_ratio
        assert int(21 * ratio) == hidden


def test_first_and_stride_keep_exactly_those_weights():
    teacher = teacher_of()
    rule = InheritConfig(depth=0.67, width=0.5, mlp=0.25, width_by="first", refit=False)
    student = build(teacher, rule, calibration=None)
    old, new = teacher.model.visual, student.model.visual
    torch.testing.assert_close(new.conv1.weight, old.conv1.weight[:16], rtol=0, atol=0)
    torch.testing.assert_close(new.proj, old.proj[:16], rtol=0, atol=0)
    for place, number in enumerate((0, 2)):
        block, source = new.transformer.resblocks[place], old.transformer.resblocks[number]
        torch.testing.assert_close(block.mlp.c_fc.weight, source.mlp.c_fc.weight[:32, :16], rtol=0, atol=0)
        torch.testing.assert_close(block.mlp.c_proj.weight, source.mlp.c_proj.weight[:16, :32], rtol=0, atol=0)
        values = source.attn.in_proj_weight.view(3, 2, 16, 32)[:, 0, :, :16].reshape(48, 16)
        torch.testing.assert_close(block.attn.in_proj_weight, values, rtol=0, atol=0)
        torch.testing.assert_close(block.attn.out_proj.weight, source.attn.out_proj.weight[:16, :16], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["activation", "taylor"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_importance_keeps_the_units_that_do_something(kind, side):
    teacher = teacher_of(quick_gelu=True)
    planted = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    for block in tower_of(teacher.model, side).blocks:
        block.mlp.c_proj.weight.data[:, planted] = 0
    student = build(teacher, InheritConfig(depth=1, width=1, mlp=0.5, importance=kind))
    assert tower_of(student.model, side).shape.hidden == 64
    encode = "encode_images", PICTURES
    if side == "text":
        encode = "encode_texts", TEXTS
    ours, theirs = (getattr(one, encode[0])(encode[1]) for one in (student, teacher))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    first = build(teacher, InheritConfig(depth=1, width=1, mlp=0.5, width_by="first", refit=False))
    assert np.abs(getattr(first, encode[0])(encode[1]) - theirs).max() > 1e-3


@pytest.mark.parametrize("kind", ["activation", "taylor"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_importance_keeps_heads_channels_and_blocks_that_do_something(kind, side):
    teacher = teacher_of()
    tower = tower_of(teacher.model, side)
    for number, block in enumerate(tower.blocks):
        dead = number % 2
        block.attn.out_proj.weight.data[:, 16 * dead : 16 * dead + 16] = 0
    idle = tower.blocks[1]
    for layer in (idle.attn.out_proj, idle.mlp.c_proj):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    rows = calibration(teacher).of(side)
    scores = measure(tower, rows, kind)
    kept = choose(tower.shape, Shape(2, 1, 16, 128), InheritConfig(depth_by="importance"), scores)
    assert kept.blocks == (0, 2)
    assert [heads.tolist() for heads in kept.heads] == [[1], [1]]
    student = build(teacher, InheritConfig(depth=0.67, width=1, depth_by="importance", importance=kind))
    ours, theirs = (
        one.encode_images(PICTURES) if side == "image" else one.encode_texts(TEXTS) for one in (student, teacher)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_written_out_forward_pass_is_open_clips_own():
    for options in KINDS.values():
        teacher = teacher_of(**options)
        rows = calibration(teacher)
        for side in ("image", "text"):
            tower, inputs = tower_of(teacher.model, side), rows.of(side)
            with torch.no_grad():
                found = tower.finish(tower.run(tower.embedded(inputs)), inputs)
                wanted = getattr(teacher.model, f"encode_{side}")(inputs)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_taylor_is_the_squared_derivative_by_each_unit():
    teacher = teacher_of()
    tower, inputs = tower_of(teacher.model, "text"), teacher.tokenizer(TEXTS[:6])
    rough = torch.stack([measure(tower, inputs, "taylor", seed).hidden for seed in range(60)]).mean(dim=0)
    exact = torch.zeros_like(rough)
    step = 1e-2
    for layer in range(3):
        for unit in range(0, 128, 32):
            both = [F.normalize(_without(tower, inputs, layer, unit, sign * step), dim=-1) for sign in (1, -1)]
            exact[layer, unit] = ((both[0] - both[1]) / (2 * step)).square().sum()
    chosen = exact > 0
    torch.testing.assert_close(rough[chosen], exact[chosen], rtol=0.35, atol=1e-6)


def _without(tower, inputs, layer, unit, change):
    """The embeddings with one hidden unit made (1 + change) times as strong."""

    def tap(kind, number, values):
        if kind != "hidden" or number != layer:
            return values
        gate = torch.ones(values.shape[-1])
        gate[unit] += change
        return values * gate

    with torch.no_grad():
        return tower.finish(tower.run(tower.embedded(inputs), tap), inputs)


def test_positions_are_resized_for_another_size_of_pictures():
    teacher = teacher_of()
    student = build(teacher, image_size=64)
    assert student.model.visual.positional_embedding.shape == (17, 32)
    assert student.preprocess.size == (64, 64)
    table = teacher.model.visual.positional_embedding.detach()
    grid = table[1:].T.reshape(1, 32, 2, 2)
    wanted = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True, align_corners=False)
    found = student.model.visual.positional_embedding
    torch.testing.assert_close(found[1:], wanted[0].flatten(1).T, rtol=0, atol=0)
    torch.testing.assert_close(found[0], table[0], rtol=0, atol=0)
    constant = torch.ones(5, 3)
    torch.testing.assert_close(resized_positions(constant, (2, 2), (3, 5)), torch.ones(16, 3))


def test_a_refit_brings_the_student_nearer_to_its_teacher():
    teacher = teacher_of()
    near = {}
    for fits in (True, False):
        student = build(teacher, InheritConfig(depth=0.67, width=0.5, refit=fits))
        cosines = (student.encode_texts(TEXTS) * teacher.encode_texts(TEXTS)).sum(axis=1)
        near[fits] = cosines.mean(), (student.encode_images(PICTURES) * teacher.encode_images(PICTURES)).sum(1).mean()
    assert near[True][0] > near[False][0] + 0.1
    assert near[True][1] > near[False][1] + 0.1


def test_a_fit_is_the_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    given, wanted = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    layer = torch.nn.Linear(4, 3)
    before = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1).double()
    with torch.no_grad():
        fit_linear(layer, given, wanted)
    found = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1).double()
    x = torch.cat([given, torch.ones(50, 1)], dim=1).double()
    ridge = 1e-2 * x.square().sum(dim=0).mean()
    gradient = x.T @ (x @ found.T - wanted.double()) + ridge * (found - before).T
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)


def test_nothing_lost_is_nothing_changed_by_a_fit():
    teacher = teacher_of()
    tower, inputs = tower_of(teacher.model, "image"), calibration(teacher).pixels
    whole = Kept((0, 1, 2), torch.arange(32), (torch.arange(2),) * 3, (torch.arange(128),) * 3)
    copied = weights_of(teacher)
    refit(tower, copied, whole, inputs)
    for name, value in cut(copied, whole).items():
        torch.testing.assert_close(value, cut(tower, whole)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"vision": {"attentional_pool": True}}, "student.image: .*attention pooling .* is not supported"),
        ({"siglip": True}, 'student.text: .*bidirectional or pooled at "last".* set student.text_init = "inherit"'),
        ({"text": {"embed_cls": True}}, r"student.text: .*class token behind the text \(embed_cls\)"),
        (
            {"vision": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg"}},
            "student.image: .*timm's VisionTransformer",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(teacher, message):
    live = teacher_of(**teacher)
    with pytest.raises(ConfigError, match=message):
        build(live)


def test_what_does_not_go_together_is_refused():
    teacher = teacher_of()
    with pytest.raises(ConfigError, match=r"heads: 1.0 of 2 heads are 2, but student.inherit.width = 0.5 leaves 1"):
        build(teacher, InheritConfig(heads=1.0))
    with pytest.raises(ConfigError, match="there is none here"):
        build(None)
    with pytest.raises(ConfigError, match="has no pictures to measure importance on"):
        build(teacher, InheritConfig(), calibration=None)
    for share in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"greater than 0|less than or equal to 1"):
            InheritConfig(depth=share)


def test_a_cut_tower_has_the_configuration_that_open_clip_builds_it_from():
    student = build(teacher_of(), InheritConfig(depth=0.34, width=0.5))
    model = assemble(student.model_cfg)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in student.model.state_dict().items()
    }
