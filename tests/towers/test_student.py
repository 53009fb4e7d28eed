"""The student as one thing: what it embeds, what it saves, and that open_clip reads the same from its folder."""

import io
import json

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.towers.build import build_student
from clipdistill.towers.student import DualEncoder, prefers_channels_last

TEXTS = [tiny.caption(number) for number in range(30)] + ["", "🦊 中文", "a very long caption about a cat " * 20]
PICTURES = [
    Picture(f"memory[{number}]", data=tiny.image_bytes(number, size))
    for number, size in enumerate([(40, 36), (31, 77), (64, 64), (200, 20), (32, 32)])
]


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


@pytest.fixture(scope="module")
def student():
    return build()


@pytest.fixture(scope="module")
def projected():
    return build(teacher_dim=40, seed=6)


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "it"
    student.save(folder, {"run": "test"})
    return folder


def cosines(left, right):
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def test_rows_are_unit_float32_in_the_order_of_the_input(student):
    images, texts = student.encode_images(PICTURES), student.encode_texts(TEXTS)
    assert images.shape == (5, 24)
    assert texts.shape == (33, 24)
    for rows in (images, texts):
        assert rows.dtype == np.float32
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    for number in (0, 17, 32):
        assert np.abs(student.encode_texts([TEXTS[number]])[0] - texts[number]).max() < 1e-5
    assert np.abs(student.encode_images(PICTURES[3:4])[0] - images[3]).max() < 1e-5
    assert student.encode_images([]).shape == student.encode_texts([]).shape == (0, 24)


def test_batch_size_changes_nothing_but_rounding(student):
    assert np.abs(student.encode_images(PICTURES, batch=2) - student.encode_images(PICTURES)).max() < 1e-5
    assert np.abs(student.encode_texts(TEXTS, batch=4) - student.encode_texts(TEXTS)).max() < 1e-5


def test_texts_beyond_one_round_of_tokenizing_are_placed_right(student, monkeypatch):
    whole = student.encode_texts(TEXTS)
    monkeypatch.setattr("clipdistill.towers.tokenizer._TEXTS_AT_ONCE", 7)
    assert np.abs(student.encode_texts(TEXTS, batch=3) - whole).max() < 1e-5


def test_cut_context_equals_the_full_context(student):
    full = student.tokenizer.encode(TEXTS, cut=False)
    assert full.shape[1] == student.tokenizer.context_length == 32
    with torch.no_grad():
        whole = student.model.encode_text(torch.from_numpy(full), normalize=True).numpy()
    assert np.abs(student.encode_texts(TEXTS) - whole).max() < 1e-5
    with torch.no_grad():
        short = student.embed_tokens(torch.from_numpy(student.tokenizer.encode(TEXTS[:5]))).numpy()
    assert np.abs(short - whole[:5]).max() < 1e-5


def test_a_text_that_spells_the_special_tokens_is_embedded_alike_alone_and_in_a_batch(student):
    texts = ["a <|pad|> cat <|pad|>", "a <|endoftext|> cat", "<|startoftext|>", *TEXTS]
    with torch.no_grad():
        tokens = torch.from_numpy(student.tokenizer.encode(texts, cut=False))
        whole = student.model.encode_text(tokens, normalize=True).numpy()
    assert np.abs(student.encode_texts(texts, batch=2) - whole).max() < 1e-5


def test_pictures_go_through_the_shared_preprocessing(student):
    picture = PICTURES[1]
    image = decode(picture.data, student.max_pixels, picture.origin)
    with torch.no_grad():
        pixels = torch.from_numpy(student.preprocess(image))[None]
        direct = student.model.encode_image(pixels, normalize=True).numpy()
    assert np.abs(student.encode_images([picture]) - direct).max() < 1e-5


def test_a_bad_picture_is_named(student, tmp_path):
    with pytest.raises(DataError, match="broken one"):
        student.encode_images([PICTURES[0], Picture("broken one", data=b"\xff\xd8\xffnothing")])
    with pytest.raises(DataError, match=r"gone\.png.*No such file"):
        student.encode_images([Picture("gone.png", path=tmp_path / "gone.png")])
    small = DualEncoder(student.model, student._model_cfg, student.tokenizer, student.preprocess, max_pixels=100)
    with pytest.raises(DataError, match="too many pixels"):
        small.encode_images(PICTURES[:1])


def test_encoding_puts_every_part_s_mode_back_and_moves_no_statistics(student):
    student.module.train()
    norm = next(part for part in student.module.modules() if isinstance(part, torch.nn.BatchNorm2d))
    norm.eval()
    before = norm.running_mean.clone(), student.fingerprint
    with pytest.raises(DataError):
        student.encode_images([*PICTURES, Picture("bad", data=b"")])
    student.encode_texts(TEXTS)
    assert student.model.training
    assert not norm.training
    assert torch.equal(before[0], norm.running_mean)
    assert student.fingerprint == before[1]
    student.module.eval()


def test_embeddings_are_differentiable(projected):
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.from_numpy(projected.tokenizer.encode(TEXTS[:2]))
    images = projected.to_teacher(projected.embed_pixels(pixels), "image")
    texts = projected.to_teacher(projected.embed_tokens(tokens), "text")
    (images * texts).sum().backward()
    still = {name for name, value in projected.module.named_parameters() if value.grad is None}
    assert still == {"model.logit_scale"}
    projected.module.zero_grad()


def test_the_projection_belongs_to_the_student(student, projected):
    assert (student.dim, student.teacher_dim, student.projection) == (24, 24, None)
    assert (projected.dim, projected.teacher_dim) == (24, 40)
    vectors = student.encode_texts(TEXTS[:4])
    assert np.array_equal(student.to_teacher_vectors(vectors, "text"), vectors)
    mapped = projected.to_teacher_vectors(vectors, "text")
    weight = projected.projection["text"].weight.detach().numpy()
    expected = vectors @ weight.T
    assert np.abs(mapped - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-6
    assert np.abs(mapped @ mapped.T - vectors @ vectors.T).max() < 1e-5  # at first a rotation
    names = {name for name, _ in projected.module.named_parameters()}
    assert {"projection.image.weight", "projection.text.weight"} <= names
    assert projected.parameters == sum(value.numel() for value in projected.module.parameters())
    towers = sum(value.numel() for value in projected.model.parameters())
    assert projected.parameters == towers + 2 * 24 * 40


def test_set_scale_changes_the_logits_and_no_embedding(student):
    before = student.fingerprint
    student.set_scale(50.0)
    assert student.model.logit_scale.exp().item() == pytest.approx(50.0)
    assert student.model.logit_bias is None
    assert student.fingerprint == before
    with pytest.raises(ConfigError, match="above 0"):
        student.set_scale(0.0)


def test_a_bias_is_kept_through_save_load_and_open_clip(tmp_path):
    student = build()
    student.set_scale(12.0, -9.0)
    student.save(tmp_path / "s")
    again = DualEncoder.load(tmp_path / "s")
    assert again.model.logit_bias.item() == -9.0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 's'}")
    assert theirs.logit_bias.item() == -9.0
    assert theirs.logit_scale.exp().item() == pytest.approx(12.0)


# --- the folder ----------


def test_save_and_load_round_trip_bit_for_bit(student, projected, tmp_path):
    for number, one in enumerate((student, projected)):
        one.save(tmp_path / str(number))
        again = DualEncoder.load(tmp_path / str(number))
        assert again.fingerprint == one.fingerprint
        ours, theirs = one.module.state_dict(), again.module.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert np.array_equal(again.encode_images(PICTURES), one.encode_images(PICTURES))
        assert np.array_equal(again.encode_texts(TEXTS), one.encode_texts(TEXTS))
        again.save(tmp_path / f"again{number}")
        for path in (tmp_path / str(number)).iterdir():
            if path.name != "manifest.json":
                assert path.read_bytes() == (tmp_path / f"again{number}" / path.name).read_bytes(), path.name


def test_open_clip_loads_the_folder_and_embeds_the_same(student, saved):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{saved}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{saved}")
    model.eval()
    with torch.no_grad():
        texts = model.encode_text(tokenizer(TEXTS)).numpy()
        images = [decode(picture.data, 10**6, picture.origin) for picture in PICTURES]
        pictures = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    assert cosines(texts, student.encode_texts(TEXTS)).min() > 0.999999
    assert cosines(pictures, student.encode_images(PICTURES)).min() > 0.999999


def test_the_manifest_is_whole(student, saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["kind"] == "student"
    assert (manifest["dim"], manifest["teacher_dim"]) == (24, 24)
    assert manifest["parameters"] == student.parameters
    assert manifest["fingerprint"] == student.fingerprint
    assert manifest["extra"] == {"run": "test"}
    assert set(manifest["files"]) == {path.name for path in saved.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"])
def test_a_tampered_file_is_refused_with_both_hashes(student, tmp_path, name):
    folder = tmp_path / "s"
    student.save(folder)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(MismatchError, match=rf"{name}: sha256 .*expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}"):
        DualEncoder.load(folder)
    (folder / name).unlink()
    with pytest.raises(MismatchError, match="no file"):
        DualEncoder.load(folder)


def test_a_manifest_that_names_other_weights_is_refused(student, projected, tmp_path):
    student.save(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["fingerprint"] = projected.fingerprint
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="fingerprint"):
        DualEncoder.load(tmp_path / "s")


def test_a_folder_that_is_not_a_student_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json"):
        DualEncoder.load(tmp_path)


def test_a_model_that_these_versions_cannot_rebuild_is_named(student, tmp_path):
    renamed = DualEncoder(student.model, student._model_cfg, student.tokenizer, student.preprocess)
    renamed._model_cfg["vision_cfg"]["timm_model_name"] = "a_tower_of_the_future"
    renamed.save(tmp_path / "s")
    with pytest.raises(DataError, match=r"cannot be rebuilt here .*a_tower_of_the_future.*'timm'"):
        DualEncoder.load(tmp_path / "s")


def test_saving_replaces_the_folder_as_a_whole(student, projected, tmp_path):
    projected.save(tmp_path / "s")
    assert (tmp_path / "s" / "projection.safetensors").exists()
    student.save(tmp_path / "s")
    assert not (tmp_path / "s" / "projection.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert DualEncoder.load(tmp_path / "s").fingerprint == student.fingerprint


def test_fingerprint_covers_weights_preprocessing_and_tokenizer(student):
    other_texts, other_seed = build(texts=["zebra"]), build(seed=9)
    prints = {student.fingerprint, other_texts.fingerprint, other_seed.fingerprint}
    weights = build()
    weights.module.get_parameter("model.text.ln_final.bias").data[0] += 1e-7
    prints |= {weights.fingerprint}
    larger = build(image_size=64)
    assert all(
        torch.equal(left, right)
        for left, right in zip(larger.module.state_dict().values(), build().module.state_dict().values(), strict=True)
    )
    prints |= {larger.fingerprint}
    assert len(prints) == 5


def test_channels_last_is_for_convolutions_and_changes_nothing(student):
    assert prefers_channels_last(student.model)
    vit = open_clip.model.VisionTransformer(32, 16, 32, 1, 2, 4.0)
    assert not prefers_channels_last(torch.nn.ModuleDict({"visual": vit}))
    plain = build()
    plain.module.to(memory_format=torch.contiguous_format)
    plain._memory_format = torch.contiguous_format
    assert np.abs(plain.encode_images(PICTURES) - student.encode_images(PICTURES)).max() < 1e-5
    assert plain.fingerprint == student.fingerprint


def test_loading_moves_no_global_randomness(saved):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DualEncoder.load(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_grey_and_transparent_pictures_are_embedded(student):
    rows = []
    for mode in ("L", "RGBA", "P"):
        out = io.BytesIO()
        Image.new(mode, (20, 20), 3).save(out, "PNG")
        rows.append(Picture(mode, data=out.getvalue()))
    assert np.isfinite(student.encode_images(rows)).all()


def test_folders_may_be_strings(student, tmp_path):
    student.save(str(tmp_path / "student"))
    assert DualEncoder.load(str(tmp_path / "student")).fingerprint == student.fingerprint
