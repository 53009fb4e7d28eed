import numpy as np
import open_clip
import pytest
import tiny
import torch

from clipdistill.core.errors import ConfigError
from clipdistill.data.pictures import decode
from clipdistill.towers import context
from clipdistill.towers.teacher import Teacher, load_teacher

TEXTS = ["a dog", "a very small red bicycle leaning against an old wall", "", "猫 🐈"]


@pytest.fixture(scope="module", params=["clip", "custom", "siglip"])
def loaded(request, tmp_path_factory):
    folder = tiny.teacher_folder(
        tmp_path_factory.mktemp("t") / "teacher", siglip=request.param == "siglip", custom=request.param != "clip"
    )
    return request.param, folder, load_teacher(f"local-dir:{folder}")


def test_it_embeds_as_open_clip_does_with_its_own_preprocess_and_tokenizer(loaded):
    _, folder, teacher = loaded
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    pictures = [pair.picture for pair in tiny.pairs(5)]
    pixels = torch.stack([transform(decode(p.data, 10**6, p.origin)) for p in pictures])
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(teacher.encode_images(pictures, batch=2), images, atol=1e-5)
    np.testing.assert_allclose(teacher.encode_texts(TEXTS, batch=3), texts, atol=1e-5)


def test_the_context_is_cut_where_it_is_exact_and_only_there(loaded):
    kind, _, teacher = loaded
    assert context.can_cut(teacher.model) == (kind != "siglip")
    if kind != "siglip":
        tokens = teacher.tokenizer(["a dog", "a red cat on a mat"])
        cut = context.cut(teacher.model, tokens)
        assert cut.shape[1] == 8  # start, six words, end
        with torch.no_grad():
            whole = teacher.model.encode_text(tokens)
            np.testing.assert_allclose(context.encode(teacher.model, cut), whole, atol=1e-5)


def test_scale_and_bias_are_the_models_own(loaded):
    kind, _, teacher = loaded
    if kind == "siglip":
        assert teacher.scale == pytest.approx(np.exp(2.3), rel=1e-5)
        assert teacher.bias == -10.0
    else:
        assert teacher.scale == pytest.approx(1 / 0.07, rel=1e-5)
        assert teacher.bias is None


def test_it_is_frozen(loaded):
    _, _, teacher = loaded
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_fingerprint_follows_weights_preprocess_and_tokenizer(loaded, tmp_path):
    kind, folder, teacher = loaded
    assert load_teacher(f"local-dir:{folder}").fingerprint == teacher.fingerprint
    other = tiny.teacher_folder(tmp_path / "b", seed=1, siglip=kind == "siglip", custom=kind != "clip")
    changed = load_teacher(f"local-dir:{other}").parts
    assert changed["weights"] != teacher.parts["weights"]
    assert changed["tokenizer"] == teacher.parts["tokenizer"]
    shifted = Teacher(teacher.model, teacher.transform, lambda texts: teacher.tokenizer(texts), name="x")
    assert shifted.fingerprint != teacher.fingerprint


@pytest.mark.parametrize(
    ("model", "tag", "part"),
    [
        ("ViT-B-23", "openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32", "opnai", "did you mean 'openai'"),
        ("ViT-B-32", None, "random weights"),
        ("local-dir:/nowhere/at/all", None, "open_clip_config.json"),
        ("hf-hub:nonsense", None, "hf-hub:organisation/repository"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(model, tag, part):
    with pytest.raises(ConfigError, match=part):
        load_teacher(model, tag)


def test_without_a_network_the_message_names_the_file_and_the_way_round(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Failed to download weights for tag 'openai': could not resolve host")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"vit_base_patch32_clip_224\.openai.*safetensors.*local-dir:FOLDER"):
        load_teacher("ViT-B-32", "openai")


def test_a_file_of_weights_with_a_name(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("RN50", pretrained=None)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    teacher = load_teacher("RN50", str(path))
    assert teacher.name == "RN50:weights"
    tokens = open_clip.get_tokenizer("RN50")(["a cat"])
    with torch.no_grad():
        expected = model.eval().encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(teacher.encode_texts(["a cat"]), expected, atol=1e-5)
