"""Building students: names, choices, widths, weights, determinism."""

import json
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file

import clipdistill.towers.weights as weights_module
from clipdistill.core.errors import ConfigError
from clipdistill.towers.blueprint import image_tower, presets, text_tower
from clipdistill.towers.build import build_student, student_faults
from clipdistill.towers.inherit import token_table
from clipdistill.towers.student import DualEncoder

TEXTS = [tiny.caption(number) for number in range(70)]


def build(**changes):
    options = {
        "image": "mobilenetv4_conv_small_050",
        "text": "nano",
        "dim": 24,
        "teacher_dim": 24,
        "image_init": "random",
        "text_init": "random",
        "texts": TEXTS,
        "seed": 5,
        "image_size": 32,
    }
    return build_student(**{**options, **changes})


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny.teacher_folder(tmp_path_factory.mktemp("teacher") / "t")
    model = open_clip.create_model(f"local-dir:{folder}")
    return type("Teacher", (), {"model": model, "tokenizer": open_clip.get_tokenizer(f"local-dir:{folder}")})()


@pytest.fixture
def small_configs(monkeypatch):
    """Two small open_clip configurations among the large ones."""
    plain = tiny.model_cfg(custom=False)
    quick = {**tiny.model_cfg(custom=False), "quick_gelu": True}
    bidirectional = tiny.model_cfg(siglip=True)
    configs = {"tiny-test": plain, "tiny-quick": quick, "tiny-siglip": bidirectional}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, **configs})


@pytest.fixture
def checkpoint(small_configs, tmp_path):
    """A file of weights for tiny-test, and the model that they are of."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = open_clip.create_model("tiny-test")
    path = tmp_path / "tiny.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path, model.eval()


# --- widths, for all kinds of picture towers ----------


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ("mobilenetv4_conv_small_050", 64),
        ("tf_efficientnet_lite0", 64),
        ("convnext_atto", 64),
        ("vit_tiny_patch16_224", None),
        ("gmlp_ti16_224", None),  # its head is left at zero by timm
        ("timm/resnet10t", 32),
    ],
)
def test_a_real_forward_gives_the_width_that_was_asked_for(image, size, tmp_path):
    student = build(image=image, image_size=size, dim=40, teacher_dim=40)
    side = size or 224
    assert student.preprocess.size == (side, side)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = student.embed_pixels(pixels)
    assert rows.shape == (2, 40)
    assert rows.norm(dim=1).numpy() == pytest.approx([1, 1], abs=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 0
    student.save(tmp_path / "s")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 's'}").eval()
    with torch.no_grad():
        assert (theirs.encode_image(pixels, normalize=True) - rows).abs().max() < 1e-5


def test_open_clips_own_towers_take_any_size(small_configs, tmp_path):
    student = build(image="tiny-test", image_size=48, dim=20, teacher_dim=20)
    assert student.preprocess.size == (48, 48)
    student.save(tmp_path / "s")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 's'}")
    assert transform.transforms[0].size == 48
    with torch.no_grad():
        assert theirs.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 20)


def test_a_vit_of_timm_at_another_size_is_refused_since_open_clip_could_not_rebuild_it():
    with pytest.raises(ConfigError, match=r"student\.image_size: vit_tiny_patch16_224 cannot take 64 px.*224 px only"):
        build(image="vit_tiny_patch16_224", image_size=64)


def test_batch_norms_forget_fast_enough(monkeypatch):
    class Slow(open_clip.model.CustomTextCLIP):
        """With the momentum that networks from TensorFlow have in some versions of timm."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            for part in self.modules():
                if isinstance(part, torch.nn.BatchNorm2d):
                    part.momentum = 0.01

    monkeypatch.setattr(open_clip.model, "CustomTextCLIP", Slow)
    norms = [part for part in build().module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert len(norms) > 20
    assert {part.momentum for part in norms} == {0.1}


def test_preprocessing_is_the_tower_s_own():
    assert build(image="convnext_atto").preprocess.mean == pytest.approx((0.485, 0.456, 0.406))
    assert build(image="tf_efficientnet_lite0").preprocess.mean == (0.5, 0.5, 0.5)
    assert image_tower("vgg11").size == (224, 224)


# --- names and choices ----------


def test_presets_say_what_they_cost():
    for name in ("nano", "tiny", "small"):
        preset = presets()[name]
        student = build(image=name, text=name, dim=512, teacher_dim=512, image_size=None)
        images = sum(value.numel() for value in student.model.visual.parameters())
        table = student.model.text.token_embedding.weight
        texts = sum(value.numel() for value in student.model.text.parameters()) - table.numel()
        comment = preset["comment"]
        assert comment.startswith(
            f"{images / 1e6:.2f} M parameters for pictures at a width of 512, {texts / 1e6:.2f} M"
        )
        assert f"besides {table.shape[1]} for each entry" in comment
        assert student.preprocess.size == (preset["image_size"],) * 2
        assert preset["text"]["heads"] * 64 == preset["text"]["width"]


def test_unknown_names_are_all_reported_with_the_nearest():
    faults = list(student_faults("mobilnetv4_conv_small_050", "ViT-B-23"))
    assert len(faults) == 2
    assert faults[0].startswith("student.image: unknown picture tower")
    assert "mobilenetv4_conv_small_050" in faults[0]
    assert faults[1].startswith("student.text: unknown text tower")
    assert "did you mean 'ViT-B-" in faults[1]
    assert list(student_faults("nano", "tiny")) == []
    with pytest.raises(ConfigError) as caught:
        build(image="mobilnetv4_conv_small_050", text="ViT-B-23")
    assert caught.value.faults == faults


def test_names_with_a_tag_and_the_prefix_of_timm():
    assert image_tower("resnet18.a1_in1k").timm_name == "resnet18.a1_in1k"
    assert image_tower("convnext_tiny").open_clip_name == "convnext_tiny"
    assert image_tower("timm/convnext_tiny").open_clip_name is None
    with pytest.raises(ConfigError, match="unknown picture tower"):
        image_tower("resnet18.no_such_tag")


def test_text_towers_are_causal_and_pooled_at_the_end_whatever_the_name():
    siglip = text_tower("ViT-B-16-SigLIP")
    assert siglip.text_cfg["context_length"] == 64
    assert not siglip.loadable
    assert not {"no_causal_mask", "pool_type", "vocab_size", "hf_tokenizer_name"} & set(siglip.text_cfg)
    assert text_tower("ViT-B-32").loadable
    with pytest.raises(ConfigError, match=r"student\.text: .*Hugging Face"):
        text_tower("roberta-ViT-B-32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_init": "inherit"}, r"student\.text_init: \"inherit\" takes the token table"),
        ({"text_init": "pretrained"}, r"student\.text_init: \"pretrained\" needs an open_clip"),
        ({"pretrained": "openai"}, r"student\.pretrained: 'openai' is for open_clip"),
        ({"image_weights": Path("x")}, r"student\.image_weights: given, but"),
        ({"image": "ViT-B-32", "image_init": "pretrained"}, r"student\.pretrained: missing: ViT-B-32 .*openai"),
        ({"text": "ViT-B-32", "text_init": "pretrained"}, r"student\.pretrained: missing: the text tower"),
        ({"vocab_size": 10}, r"student\.vocab_size: 10 is too small"),
    ],
)
def test_choices_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_logit_scale_and_bias_reach_the_saved_model(tmp_path):
    student = build(logit_scale=30.0, logit_bias=-5.0)
    student.save(tmp_path / "s")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 's'}")
    assert theirs.logit_scale.exp().item() == pytest.approx(30.0)
    assert theirs.logit_bias.item() == -5.0
    assert build().model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# --- the vocabulary and the token table ----------


def test_the_vocabulary_is_the_teachers_and_the_size_is_kept(teacher):
    student = build(teacher=teacher, vocab_size=560)
    assert student.tokenizer.vocab_size <= 560
    assert student.model.text.token_embedding.weight.shape == (student.tokenizer.vocab_size, 192)
    assert student.tokenizer.context_length == 32
    assert student._model_cfg["text_cfg"]["eos_id"] == student.tokenizer.vocab_size - 1


def test_inherit_takes_the_token_table_by_pca(teacher):
    inherited, random = build(teacher=teacher, text_init="inherit"), build(teacher=teacher)
    assert inherited.tokenizer.fingerprint == random.tokenizer.fingerprint
    table = inherited.model.text.token_embedding.weight.detach()
    own = teacher.model.text.token_embedding.weight.detach()
    assert not torch.equal(table, random.model.text.token_embedding.weight)
    word = inherited.tokenizer.encode(["bicycle cat"])[0][1:3]
    ids = [teacher.tokenizer.encoder[f"{piece}</w>"] for piece in ("bicycle", "cat")]
    known = [teacher.tokenizer.encoder[piece] for piece in ("bicycle</w>", "cat</w>", "house</w>", "lamp</w>")]
    numbers = inherited.tokenizer.encode(["bicycle cat house lamp"])[0][1:-1]
    ours, theirs = table[numbers] - table[numbers].mean(0), own[known] - own[known].mean(0)
    assert np.corrcoef((ours @ ours.T).flatten(), (theirs @ theirs.T).flatten())[0, 1] > 0.99
    assert len(word) == len(ids) == 2
    others = [name for name, _ in random.module.named_parameters() if "token_embedding" not in name]
    assert all(torch.equal(inherited.module.get_parameter(name), random.module.get_parameter(name)) for name in others)


def test_the_token_table_is_exactly_the_one_that_inherit_makes(teacher, monkeypatch):
    seen = {}

    def spy(table, ids, width, *, generator):
        seen["ids"], seen["made"] = ids, token_table(table, ids, width, generator=generator)
        return seen["made"]

    monkeypatch.setattr("clipdistill.towers.build.token_table", spy)
    student = build(teacher=teacher, text_init="inherit")
    assert torch.equal(student.model.text.token_embedding.weight, seen["made"])
    assert len(seen["ids"]) == student.tokenizer.vocab_size


# --- determinism ----------


def test_equal_arguments_give_equal_students_whatever_the_ambient_state(teacher):
    options = {"teacher": teacher, "text_init": "inherit", "teacher_dim": 30}
    torch.manual_seed(1)
    first = build(**options)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(**options)
    assert torch.equal(before, torch.get_rng_state())
    assert first.fingerprint == second.fingerprint
    assert build(**options, seed=6).fingerprint != first.fingerprint
    assert build(**{**options, "texts": TEXTS[::-1]}).fingerprint == first.fingerprint


# --- pretrained weights ----------


def timm_file(path, name, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(21)
        network = timm.create_model(name)
    state = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    state.update(changes)
    save_file({key: value for key, value in state.items() if value is not None}, path)
    return network.eval()


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_050", "convnext_atto"])
def test_timm_weights_from_a_file_fill_all_but_the_projection(tmp_path, name):
    path = tmp_path / "w.safetensors"
    network = timm_file(path, name)
    student = build(image=name, image_init="pretrained", image_weights=path)
    random = build(image=name)
    own, given = student.model.visual.trunk.state_dict(), network.state_dict()
    head = [key for key in own if own[key].shape != given[key].shape]
    assert sorted(head) in (["classifier.bias", "classifier.weight"], ["head.fc.bias", "head.fc.weight"])
    assert all(torch.equal(own[key], given[key]) for key in own if key not in head)
    assert all(torch.equal(own[key], random.model.visual.trunk.state_dict()[key]) for key in head)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = student.model.visual.trunk.forward_features(pixels), network.forward_features(pixels)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_students_own_picture_tower_can_be_given_again(tmp_path):
    first = build(seed=1)
    first.save(tmp_path / "s")
    second = build(
        seed=2,
        image_init="pretrained",
        image_weights=tmp_path / "s" / "open_clip_model.safetensors",
        dim=16,
        teacher_dim=16,
    )
    stem = "model.visual.trunk.conv_stem.weight"
    assert torch.equal(first.module.get_parameter(stem), second.module.get_parameter(stem))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_stem.weight": None}, "no conv_stem.weight"),
        ({"conv_stem.weight": torch.zeros(1, 3, 3, 3)}, r"conv_stem\.weight is \[1, 3, 3, 3\] and not"),
        ({"extra.weight": torch.zeros(1)}, "unknown extra.weight"),
        ({"bn1.num_batches_tracked": None}, None),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, changes, message):
    path = tmp_path / "w.safetensors"
    timm_file(path, "mobilenetv4_conv_small_050", **changes)
    if message is None:
        build(image_init="pretrained", image_weights=path)
        return
    with pytest.raises(ConfigError, match=rf"student\.image_weights: .*w\.safetensors does not fit .*{message}"):
        build(image_init="pretrained", image_weights=path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"pickle?")
    for path in (tmp_path / "w.pth", tmp_path / "none"):
        with pytest.raises(ConfigError, match="not a readable safetensors file"):
            build(image_init="pretrained", image_weights=path)


def test_both_towers_from_an_open_clip_checkpoint_embed_as_it_does(checkpoint, tmp_path):
    path, model = checkpoint
    student = build(
        image="tiny-test",
        text="tiny-test",
        image_init="pretrained",
        text_init="pretrained",
        pretrained=str(path),
        image_size=None,
    )
    tokenizer = open_clip.get_tokenizer("tiny-test")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
        pixels = torch.randn(2, 3, 32, 32)
        images = model.encode_image(pixels, normalize=True)
        assert (student.embed_pixels(pixels) - images).abs().max() < 1e-5
    assert np.abs(student.encode_texts(TEXTS) - texts).max() < 1e-5
    student.save(tmp_path / "s")
    assert DualEncoder.load(tmp_path / "s").fingerprint == student.fingerprint


def test_another_width_keeps_the_towers_and_draws_the_projections(checkpoint):
    path, model = checkpoint
    options = {"image": "tiny-test", "text": "tiny-test", "image_init": "pretrained", "text_init": "pretrained"}
    student = build(**options, pretrained=str(path), dim=10, teacher_dim=10, image_size=48)
    assert torch.equal(student.model.visual.conv1.weight, model.visual.conv1.weight)
    assert student.model.visual.proj.shape == (32, 10)
    assert student.model.visual.positional_embedding.shape == (1 + 9, 32)  # interpolated from 2 x 2 to 3 x 3
    assert student.model.text.text_projection.shape == (32, 10)
    block = "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(student.model.text.get_parameter(block), model.get_parameter(block))


def test_what_cannot_be_taken_from_open_clip_is_named(small_configs, checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(ConfigError, match=r"student\.pretrained: 'no_tag' is neither a file nor a tag of tiny-test"):
        build(image="tiny-test", image_init="pretrained", pretrained="no_tag")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match=r"other\.safetensors does not fit tiny-test"):
        build(image="tiny-test", image_init="pretrained", pretrained=str(other))
    with pytest.raises(ConfigError, match="tiny-siglip is not one"):
        build(text="tiny-siglip", text_init="pretrained", pretrained=str(path))
    with pytest.raises(ConfigError, match=r"student\.text: .*differ in QuickGELU"):
        both = {"image_init": "pretrained", "text_init": "pretrained", "pretrained": str(path)}
        build(image="tiny-test", text="tiny-quick", **both)
    quick = build(image="tiny-quick", image_size=None)
    assert quick._model_cfg["quick_gelu"] is True


def test_without_a_network_the_file_and_the_way_out_are_named(monkeypatch):
    def unreachable(*args, **options):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    tower = image_tower("tf_efficientnet_lite0", 24, 32)
    trunk = build(image="tf_efficientnet_lite0").model.visual
    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(ConfigError) as caught:
        weights_module.fill_image(trunk, tower, None, None)
    message = str(caught.value)
    assert "hf-hub:timm/tf_efficientnet_lite0.in1k (model.safetensors)" in message
    assert 'student.image_weights = "FILE.safetensors"' in message
    with pytest.raises(ConfigError) as caught:
        weights_module.open_clip_model("ViT-B-32", "laion2b_s34b_b79k", "student.text")
    message = str(caught.value)
    assert "laion/CLIP-ViT-B-32-laion2B-s34B-b79K (open_clip_model.safetensors)" in message
    assert 'student.pretrained = "FILE"' in message


def test_a_timm_model_without_weights_says_so():
    name = next(
        name for name in ("mobilenetv4_conv_small_035", "resnet10t", "vgg11") if not timm.is_model_pretrained(name)
    )
    with pytest.raises(ConfigError, match=f"timm has no pretrained weights for {name}"):
        build(image=name, image_init="pretrained")


def test_preset_files_are_plain_json():
    folder = Path(weights_module.__file__).parent / "presets"
    for path in folder.glob("*.json"):
        assert set(json.loads(path.read_text())) == {"comment", "image", "image_size", "text"}
