"""Students as sentence-transformers' own modules: one CLIPModel, two routes, or a text tower in its teacher's space."""

import io
import json

import numpy as np
import pytest
import tiny
import torch
from formats import vits
from PIL import Image
from training import little

from clipdistill.formats.sentence_transformers import sentence_transformers_faults, write_sentence_transformers
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder, assemble, projections

PICTURES = [pair.picture for pair in tiny.pairs(5)]
HARD = ["", "A Red  bicycle &amp; “quotes” <|endoftext|> x", "<|pad|> y", "ﬁ ＡＢ é 漢字 😀\0", " ".join(["cat"] * 40)]


def timm(preprocess=None, quick_gelu=False, **vision):
    words = little.tokenizer()
    first = {"timm_model_pretrained": False, "image_size": 32, **vision}
    text = {"context_length": 16, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 24, "custom_text": True, "quick_gelu": quick_gelu, "vision_cfg": first, "text_cfg": text}
    student = DualEncoder(assemble(cfg, 1), cfg, words, preprocess or Preprocess((32, 32)))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for value in student.module.parameters():
            value += 0.05 * torch.randn_like(value)
        student.module.train()  # moves the running statistics
        student.model.visual(torch.randn(8, 3, 32, 32))
    student.module.eval()
    return student


def loaded(student, folder):
    from sentence_transformers import SentenceTransformer

    student.tokenizer.save(folder)
    write_sentence_transformers(student, folder, ())
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("student", "modules"),
    [
        (lambda: vits.vit(quick_gelu=True), ["Transformer", "Normalize"]),
        (lambda: timm(timm_model_name="test_efficientnet", timm_pool="avg", timm_proj=""), ["Router", "Normalize"]),
        (lambda: timm(timm_model_name="test_efficientnet", timm_pool="", timm_proj="linear"), ["Router", "Normalize"]),
        (
            lambda: timm(
                Preprocess((32, 32), interpolation="bilinear", resize_mode="squash", mean=(0.5, 0.4, 0.3)),
                timm_model_name="test_efficientnet",
                timm_pool="avg",
                timm_proj="mlp",
                quick_gelu=True,
            ),
            ["Router", "Normalize"],
        ),
        (
            lambda: timm(
                Preprocess((32, 48), interpolation="bilinear"),
                timm_model_name="mobilenetv4_conv_small_050",
                image_size=[32, 48],
                timm_pool="avg",
                timm_proj="",
            ),
            ["Router", "Normalize"],
        ),
    ],
    ids=["vit", "classifier", "linear", "mlp, squash", "conv head, not square"],
)
def test_texts_and_pictures_are_embedded_as_the_student_does(tmp_path, student, modules):
    student = student()
    assert list(sentence_transformers_faults(student)) == []
    model = loaded(student, tmp_path)
    assert [type(part).__name__ for part in model] == modules
    assert (model.preprocess(HARD)["input_ids"].numpy() == student.tokenizer.encode(HARD)).all()
    assert vits.cosine(model.encode(HARD), student.encode_texts(HARD)) > 0.999999
    pixels = torch.from_numpy(student.preprocess.read(PICTURES, student.max_pixels))
    with torch.inference_mode():
        images = model({"pixel_values": pixels, "modality": "image"})["sentence_embedding"]
    own = student.encode_images(PICTURES)
    assert vits.cosine(images, own) > 0.999999
    pictures = [Image.open(io.BytesIO(picture.read())).convert("RGB") for picture in PICTURES]
    prepared = vits.cosine(model.encode(pictures), own)
    assert prepared > (0.9999 if "Router" in modules else 0.5), prepared  # timm prepares pictures as open_clip does
    assert model.get_embedding_dimension() == 24


def test_a_text_tower_alone_ends_in_its_teachers_space(tmp_path):
    words = little.tokenizer()
    text = {"context_length": 16, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 16, "custom_text": True, "text_cfg": text}
    maps = projections(16, little.TEACHER_DIM, 0, sides=("text",))
    student = DualEncoder(assemble(cfg), cfg, words, None, projection=maps, searches=SearchedTeacher("big", "f" * 64))
    student.module.eval()
    model = loaded(student, tmp_path)
    assert [type(part).__name__ for part in model] == ["Transformer", "Dense", "Normalize"]
    rows = model.encode(HARD)
    assert rows.shape == (len(HARD), little.TEACHER_DIM)
    assert vits.cosine(rows, student.to_teacher_vectors(student.encode_texts(HARD), "text")) > 0.999999
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "part"),
    [
        (lambda: vits.vit(vision={"layers": [1, 1, 1, 1], "width": 16}), "open_clip's ModifiedResNet"),
        (lambda: vits.vit(vision={"no_ln_pre": True}), "open_clip's VisionTransformer"),
        (lambda: vits.vit(text={"no_causal_mask": True, "pool_type": "last"}), "(pool_type 'last')"),
        (lambda: timm(timm_model_name="test_efficientnet", timm_pool="abs_attn", timm_proj=""), "AttentionPool2d"),
        (
            lambda: timm(Preprocess((32, 32), resize_mode="longest"), timm_model_name="test_vit", timm_proj="linear"),
            "resize_mode longest",
        ),
    ],
)
def test_what_its_modules_cannot_be_is_one_sentence(student, part):
    faults = list(sentence_transformers_faults(student()))
    assert sum(part in fault for fault in faults) == 1, faults
    assert all(fault.endswith("leave sentence_transformers out, and use onnx") for fault in faults)


def test_a_pruned_tower_is_refused():
    student = timm(timm_model_name="test_efficientnet", timm_pool="avg", timm_proj="")
    student.pruned = True
    (fault,) = sentence_transformers_faults(student)
    assert "fewer channels than test_efficientnet" in fault


@pytest.mark.slow
def test_all_libraries_read_one_folder_and_the_cards_snippets_run(tmp_path):
    from clipdistill.formats import Probe, export

    student = vits.vit()
    names = ("sentence_transformers", "onnx", "clip_model", "open_clip")  # the order changes nothing
    folder = tmp_path / "made"
    pairs = tiny.pairs(12)
    probe = Probe.of(student, [pair.captions[0] for pair in pairs], [pair.picture for pair in pairs])
    report = export(student, folder, names, ("fp32",), probe=probe)
    found = {one.reading: one for one in report.parities}
    assert set(found) == {"sentence_transformers", "onnx/fp32", "clip_model", "open_clip"}
    assert all(tower["worst_cosine"] >= 0.99999 for one in found.values() for tower in one.towers.values())
    assert 0.5 < found["sentence_transformers"].recall["preprocess_cosine"] <= 1
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
    card = (folder / "README.md").read_text()
    for first in ("sentence-transformers:\n", "\ntransformers:\n"):
        code = card.split(first)[1].split("```python\n")[1].split("```")[0]
        scope: dict[str, object] = {}
        exec(code.replace("FOLDER", str(folder)), scope)
        assert vits.cosine(scope["texts"], student.encode_texts(["a red bicycle"])) > 0.999999
