"""Pruned convolutional picture towers: which channels leave, what is left of the embeddings, and that all is kept."""

from __future__ import annotations

import copy
import json
import sys

import open_clip
import pytest
import tiny
import torch
from torch import nn

from clipdistill.config import InheritConfig, RunConfig
from clipdistill.core import files
from clipdistill.core.errors import ConfigError, DataError, MissingExtraError
from clipdistill.stages.index import search
from clipdistill.stages.inputs import name_checks
from clipdistill.stages.run import run_all
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.blueprint import image_tower
from clipdistill.towers.build import build_student, prune_faults
from clipdistill.towers.inheritance.convolutional import prune_channels, reestimate
from clipdistill.towers.inheritance.narrower import narrower
from clipdistill.towers.inheritance.plan import Calibration
from clipdistill.towers.inheritance.tower import tower_of
from clipdistill.towers.inheritance.trunk import plan_trunk
from clipdistill.towers.pruned import reshape, shapes_of
from clipdistill.towers.student import DualEncoder, assemble

TOWERS = ("mobilenetv4_conv_small_050", "test_efficientnet", "resnet10t", "tf_efficientnet_lite0")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}


def tower(name, *, dim=24, seed=0, **more):
    cfg = {"embed_dim": dim, "custom_text": True, "text_cfg": TEXT}
    return assemble(cfg | {"vision_cfg": image_tower(name, dim, 64).vision_cfg | more}, seed).visual.eval()


def pictures(count=16, seed=1, size=64):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear")


def size(module):
    return sum(part.numel() for part in module.parameters())


def student(image="test_efficientnet", **changes):
    given = {"image": image, "text": "nano", "dim": 24, "teacher_dim": 24, "image_init": "random", "image_size": 64}
    given |= {"text_init": "random", "texts": ["a red cat"], "seed": 3, "share": 0.5}
    given |= {"pictures": lambda preprocess: pictures(size=preprocess.size[0])}
    return build_student(**given | changes)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_half_of_the_channels_are_a_quarter_to_a_half_of_the_weights(name, importance):
    whole = tower(name)
    pruned = copy.deepcopy(whole)
    prune_channels(pruned, 0.5, pictures(), importance=importance)
    assert 0.2 < size(pruned) / size(whole) < 0.5
    found = pruned(pictures(3, seed=2))
    assert found.shape == (3, 24)
    assert found.isfinite().all()
    assert not pruned.training
    assert all(parameter.grad is None for parameter in pruned.parameters())
    convolutions = [
        pair
        for pair in zip(whole.modules(), pruned.modules(), strict=True)
        if isinstance(pair[0], nn.Conv2d) and pair[0].out_channels > 4
    ]
    assert all(kept.out_channels == round(old.out_channels / 2) for old, kept in convolutions)


@pytest.mark.parametrize("name", TOWERS)
def test_a_share_of_one_changes_no_bit_and_needs_no_pictures(name):
    whole = tower(name)
    same = copy.deepcopy(whole)
    prune_channels(same, 1.0, torch.zeros(0, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), same.state_dict().values(), strict=True))


def test_the_same_arguments_give_the_same_bits_whatever_the_ambient_state():
    found = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        pruned = tower("test_efficientnet")
        prune_channels(pruned, 0.6, pictures(), importance="taylor", seed=5)
        found.append(pruned.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def kill_half(visual):
    """Make every second half of the channels dead: nothing leaves them, and nothing reads the residual stream's."""
    with torch.no_grad():
        for part in visual.trunk.modules():
            if isinstance(part, nn.BatchNorm2d):
                half = part.num_features // 2
                part.weight[half:], part.bias[half:] = 0, 0
                part.weight[:half].uniform_(0.5, 1.5)
            elif isinstance(part, nn.Conv2d):
                part.weight[part.out_channels // 2 :] = 0


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("name", ["resnet10t", "test_resnet"])
def test_dead_channels_are_the_ones_that_leave(name, importance):
    whole = tower(name)
    kill_half(whole)
    reestimate(whole, pictures())
    pruned = copy.deepcopy(whole)
    prune_channels(pruned, 0.5, pictures(), importance=importance)
    norms = [part for part in pruned.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) > 5
    assert all((norm.weight > 0.4).all() for norm in norms)
    held_out = pictures(8, seed=9)
    torch.testing.assert_close(pruned(held_out), whole(held_out), rtol=1e-3, atol=1e-4)


def test_statistics_counted_anew_are_those_of_the_pictures_and_bring_the_embeddings_back():
    whole = tower("resnet10t")
    reestimate(whole, pictures(64))
    stale = copy.deepcopy(whole)
    first = next(part for part in stale.modules() if isinstance(part, nn.BatchNorm2d))
    for part in stale.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.add_(part.running_var.sqrt())
            part.running_var.mul_(4)
    held_out = pictures(16, seed=9)
    wanted, before = (one(held_out).detach() for one in (whole, stale))
    momentum = first.momentum
    reestimate(stale, pictures(64, seed=4), batch=20)
    after = stale(held_out).detach()
    cosine = nn.functional.cosine_similarity
    assert cosine(after, wanted).mean() > max(0.99, float(cosine(before, wanted).mean()) + 0.01)
    assert (first.momentum, int(first.num_batches_tracked), first.training) == (momentum, 4, False)


def test_the_statistics_are_the_mean_of_the_batches_own():
    norm = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
    nn.init.dirac_(norm[0].weight)
    rows = pictures(10)
    reestimate(norm, rows, batch=5)
    parts = rows.split(5)
    wanted = torch.stack([part.var(dim=(0, 2, 3)) for part in parts]).mean(dim=0)
    torch.testing.assert_close(norm[1].running_var, wanted)
    torch.testing.assert_close(norm[1].running_mean, rows.mean(dim=(0, 2, 3)))


def test_pruning_counts_the_statistics_anew():
    pruned = tower("resnet10t")
    prune_channels(pruned, 0.5, pictures(64))
    again = copy.deepcopy(pruned)
    reestimate(again, pictures(64))
    assert all(torch.equal(a, b) for a, b in zip(pruned.buffers(), again.buffers(), strict=True))


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_rebuilt_from_its_shapes(name):
    pruned, rebuilt = tower(name), tower(name, seed=8)
    prune_channels(pruned, 0.3, pictures())
    reshape(rebuilt, shapes_of(pruned))
    rebuilt.load_state_dict(pruned.state_dict())
    assert torch.equal(rebuilt(pictures()), pruned(pictures()))
    groups = [[part.groups for part in one.modules() if isinstance(part, nn.Conv2d)] for one in (pruned, rebuilt)]
    assert groups[0] == groups[1]


def test_a_layer_that_cannot_be_given_another_width_is_refused():
    with pytest.raises(DataError, match=r"0\.weight: has the shape \[3\].*GroupNorm"):
        reshape(nn.Sequential(nn.GroupNorm(2, 4)), {"0.weight": (3,)})


def test_a_pruned_student_is_saved_and_loaded_bit_for_bit(tmp_path):
    made = student("mobilenetv4_conv_small_050", teacher_dim=30)
    made.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.pruned
    assert loaded.fingerprint == made.fingerprint
    assert torch.equal(loaded.embed_pixels(pictures()), made.embed_pixels(pictures()))
    assert loaded.parameters == made.parameters < student("mobilenetv4_conv_small_050", share=None).parameters
    loaded.save(tmp_path / "again")
    assert DualEncoder.load(tmp_path / "again").fingerprint == made.fingerprint
    assert "size mismatch" in files.read_json(tmp_path / "student" / "manifest.json")["pruned"]
    with pytest.raises(RuntimeError, match=r"size mismatch for visual\.trunk"):
        open_clip.create_model(f"local-dir:{tmp_path / 'student'}")


def test_a_whole_student_says_nothing_of_pruning(tmp_path):
    made = student(share=1.0)
    assert not made.pruned
    assert made.fingerprint == student(share=None).fingerprint
    made.save(tmp_path / "student")
    assert "pruned" not in files.read_json(tmp_path / "student" / "manifest.json")


@pytest.mark.parametrize("image", ["test_efficientnet", "resnet10t"])
def test_a_pruned_student_is_cut_to_its_narrower_widths(tmp_path, image):
    made = student(image, dims=(24, 12))
    narrow = made.truncate(12)
    wanted = nn.functional.normalize(made.embed_pixels(pictures())[:, :12], dim=-1)
    torch.testing.assert_close(narrow.embed_pixels(pictures()), wanted)
    narrow.save(tmp_path / "narrow")
    assert torch.equal(DualEncoder.load(tmp_path / "narrow").embed_pixels(pictures()), narrow.embed_pixels(pictures()))


class Teacher:
    """What a student is built from, with a convolutional picture tower."""

    def __init__(self, image="test_efficientnet", *, dim=24, **more):
        vision = image_tower(image, dim, 64).vision_cfg | more
        cfg = {"embed_dim": dim, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT | {"vocab_size": 49408}}
        self.model, self.tokenizer = assemble(cfg, 5).eval(), open_clip.get_tokenizer("ViT-B-32")
        self.model.visual.preprocess_cfg = {"size": 64, "mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
        reestimate(self.model.visual, pictures(32))


@pytest.mark.parametrize("projection", ["", "linear", "mlp"])
def test_the_teachers_own_cnn_is_copied_and_pruned(projection):
    teacher = Teacher("resnet10t", timm_proj=projection, **({"timm_proj_bias": True} if projection else {}))
    whole = student("inherit", image_init="pretrained", teacher=teacher, inherit=InheritConfig(width=1.0), share=None)
    own, copied = teacher.model.visual.state_dict(), whole.model.visual.state_dict()
    assert list(own) == list(copied)
    assert all(torch.equal(own[name], copied[name]) for name in own)
    torch.testing.assert_close(whole.model.visual(pictures()), teacher.model.visual(pictures()), rtol=1e-3, atol=1e-4)
    half = student("inherit", image_init="pretrained", teacher=teacher, inherit=InheritConfig(width=0.5), share=None)
    assert half.pruned
    assert 0.2 < size(half.model.visual) / size(teacher.model.visual) < 0.5


def test_the_teachers_cnn_is_turned_to_another_width_and_takes_another_size():
    teacher = Teacher("resnet10t")
    given = {"image_init": "pretrained", "teacher": teacher, "inherit": InheritConfig(width=1.0), "share": None}
    turned = student("inherit", dim=30, **given)  # wider: nothing is lost on the way
    back = turned.to_teacher(turned.embed_pixels(pictures()), "image")
    wanted = nn.functional.normalize(teacher.model.visual(pictures()), dim=-1)
    torch.testing.assert_close(back, wanted, rtol=1e-3, atol=1e-4)
    assert student("inherit", image_size=32, **given).embed_pixels(pictures(size=32)).shape == (16, 24)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_out_of_range_is_refused(share, tmp_path):
    with pytest.raises(ConfigError, match=r"student\.prune"):
        student(share=share)
    with pytest.raises(ConfigError, match=r"student\.prune"):
        RunConfig.load(tiny.run_toml(tmp_path), [f"student.prune={share}"])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("vit_tiny_patch16_224", "only convolutions"),
        ("test_convnext", "LayerNorm2d"),
        ("ViT-B-32", "not a convolutional network of timm"),
        ("regnetx_002", "groups of several channels"),
    ],
)
def test_a_tower_of_another_kind_is_refused_by_its_name(image, reason):
    assert reason in next(prune_faults(image))
    assert list(prune_faults("nano")) == []


def test_what_has_no_say_about_pruning_is_refused(tmp_path):
    path = tiny.run_toml(tmp_path)
    for image, match in (("inherit", r"student\.inherit\.width"), ("teacher", "keeps the teacher's own")):
        with pytest.raises(ConfigError, match=match):
            RunConfig.load(path, [f"student.image={image}", "student.prune=0.5"])
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224 cannot be pruned"):
        RunConfig.load(path, ["student.image=vit_tiny_patch16_224", "student.prune=0.5"], checks=[name_checks])


def test_too_few_pictures_are_refused():
    with pytest.raises(DataError, match="1 calibration pictures"):
        student(pictures=lambda _: pictures(1))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'clipdistill\[prune\]'"):
        student()
    with pytest.raises(MissingExtraError):
        list(prune_faults("resnet10t"))


@pytest.mark.slow
def test_a_pruned_student_through_all_stages(tmp_path):
    path = tiny.run_toml(tmp_path)
    config = RunConfig.load(path, ["train.threads=1", "student.prune=0.5"], checks=[name_checks])
    workspace = Workspace(config, tmp_path / "out")
    run_all(workspace)
    pruned = DualEncoder.load(workspace.student)
    assert pruned.pruned
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sizes"]["student"]["parameters"] == pruned.parameters
    own = {row["value"] for row in report["evaluation"]["rows"] if row["pairing"] == "student"}
    assert len(own) > 1
    assert len(search(workspace, tiny.caption(5), 3)) == 3
    run_all(workspace, force=True)
    assert DualEncoder.load(workspace.student).fingerprint == pruned.fingerprint


def test_a_pruned_picture_tower_stays_as_it_is_while_the_text_tower_is_cut_again():
    made = student()
    rows = Calibration(pictures(), torch.from_numpy(made.tokenizer.encode(["a red cat"])))
    cut = narrower(made, {"text": tower_of(made.model, "text").shape}, InheritConfig(depth=1.0, width=1.0), rows)
    assert cut.pruned
    assert torch.equal(cut.embed_pixels(pictures()), made.embed_pixels(pictures()))


def test_a_schedule_is_refused_for_a_teachers_cnn():
    visual = Teacher("resnet10t").model.visual
    with pytest.raises(ConfigError, match=r"student\.inherit\.schedule"):
        plan_trunk(visual, InheritConfig(schedule=(0.5, 0.25)))
    assert plan_trunk(nn.Identity(), InheritConfig()) is None
