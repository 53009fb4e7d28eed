"""The layouts that have folders of their own: immich's model folder, Triton's repository, clip-retrieval's vectors."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from formats import test_export as shared
from PIL import Image
from training import little

import clipdistill.formats
from clipdistill.cache.adopt import adopt
from clipdistill.core.errors import ConfigError, DataError, MissingExtraError, ParityError
from clipdistill.data.records import Pair
from clipdistill.formats import Probe, export, verify
from clipdistill.formats.immich import NAMES, immich_faults
from clipdistill.formats.layouts import LAYOUTS, check_packages, chosen_layouts, readings_of
from clipdistill.formats.parity import measure, measure_stored
from clipdistill.formats.probe import expected_rows
from clipdistill.formats.vectors import read_stored

pytestmark = pytest.mark.slow

LAYERS = ("onnx", "immich", "triton", "vectors")
PAIRS = [*tiny.pairs(11), Pair("row/bare", tiny.pairs(1, 11)[0].picture, ())]
TEXTS = [
    "",
    "a",
    " \t a  red\nbicycle ",
    "ÀÉ — “quoted” ﬁ ½",
    *(pair.captions[0] for pair in PAIRS[:6]),
    "red cat " * 40,
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    student, folder = little.student("test_vit"), tmp_path_factory.mktemp("servers") / "made"
    probe = Probe.of(student, TEXTS, [pair.picture for pair in PAIRS])
    return student, folder, probe, export(student, folder, LAYERS, ("fp32",), probe=probe, pairs=PAIRS)


@pytest.fixture
def copied(made, tmp_path):
    """A copy to spoil, and how its readers find it."""
    student, folder, probe, _ = made
    shutil.copytree(folder, tmp_path / "copy")
    given = {one.name: one for one in readings_of(LAYERS, ("fp32",))}
    expected = expected_rows(student, probe)

    def read(name):
        if name == "vectors":
            return measure_stored(given[name], tmp_path / "copy", probe, read_stored(folder))
        return measure(given[name], tmp_path / "copy", probe, expected)

    return tmp_path / "copy", read


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def script(name):
    place = Path(clipdistill.formats.__file__).parent / "readers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_lie_side_by_side_and_are_verified(made):
    _, folder, _, report = made
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "immich/config.json", "immich/visual/model.onnx", "immich/visual/preprocess_cfg.json",
        "immich/textual/model.onnx", "immich/textual/tokenizer.json", "immich/textual/tokenizer_config.json",
        "triton/text/config.pbtxt", "triton/text/1/model.onnx", "triton/image/config.pbtxt",
        "triton/image/1/model.onnx",
        "vectors/img_emb/img_emb_0.npy", "vectors/text_emb/text_emb_0.npy", "vectors/metadata/metadata_0.parquet",
        "onnx/text_model.onnx", "onnx/vision_model.onnx",
    } <= files  # fmt: skip
    assert [one.reading for one in report.parities] == ["onnx/fp32", "immich", "triton", "vectors"]
    drift = report.parities[1].recall["preprocess_cosine"]  # 40 x 36 pixels: 3 of 35 are cut off, so it is one pixel
    assert 0.3 < drift < 0.9999, drift
    again = verify(folder)
    assert [one.reading for one in again.parities] == ["onnx/fp32", "immich", "triton", "vectors"]
    assert {one.towers["image"]["rows"] for one in report.parities} == {12}
    card = (folder / "README.md").read_text()
    for part in ("/cache/clip/ViT-B-32__openai/", "filled up with zeros to 512", "immich itself was not run"):
        assert part in card
    assert "tritonserver --model-repository=FOLDER/triton" in card and "the server itself was not run" in card


def test_immich_has_its_names_types_and_shapes_and_rows_of_a_known_width(made):
    student, folder, probe, _ = made
    place = folder / "immich"
    config = json.loads((place / "config.json").read_text())
    assert (config["embed_dim"], config["text_cfg"]["context_length"], config["vision_cfg"]["image_size"]) == (
        512,
        16,
        32,
    )
    assert json.loads((place / "textual/tokenizer_config.json").read_text())["pad_token"] == "<|pad|>"
    image, text = session(place / "visual/model.onnx"), session(place / "textual/model.onnx")
    assert [(one.name, one.type, one.shape) for one in image.get_inputs()] == [
        ("image", "tensor(float)", [1, 3, 32, 32])
    ]
    assert [(one.name, one.type, one.shape) for one in text.get_inputs()] == [("text", "tensor(int32)", [1, 16])]
    wanted = student.encode_texts(TEXTS)
    for row, tokens in enumerate(probe.tokens):
        (found,) = text.run(None, {"text": tokens[None].astype(np.int32)})
        assert found.shape == (1, 512) and not found[:, 16:].any()
        assert shared.cosine(found[:, :16], wanted[row : row + 1]) >= 0.99999
    (found,) = image.run(None, {"image": probe.pixels[:1]})
    assert shared.cosine(found[:, :16], student.encode_images([PAIRS[0].picture])) >= 0.99999


def test_immichs_own_tokens_are_the_students(made):
    student, folder, _, _ = made
    ids = script("read_immich")._token_ids(folder / "immich/textual", 16, TEXTS)
    np.testing.assert_array_equal(ids, student.tokenizer.encode(TEXTS, cut=False))


def test_another_tokenizer_in_immichs_folder_is_a_parity_error(copied):
    folder, read = copied
    path = folder / "immich/textual/tokenizer_config.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|endoftext|>"))
    with pytest.raises(ParityError, match="has other token ids than the student for 9 of 11 texts, first for ''"):
        read("immich")


@pytest.mark.parametrize(("size", "shift"), [((64, 40), 1), ((32, 32), 0), ((37, 32), 0), ((35, 32), 1)])
def test_immich_prepares_pictures_as_the_student_does_but_for_some_margins(size, shift):
    student = little.student("test_vit")
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    cfg, picture = student.preprocess.to_open_clip(), Image.fromarray(pixels)
    theirs, own = script("read_immich")._prepared(picture, cfg)[0], student.preprocess(picture)
    if not shift:
        np.testing.assert_allclose(theirs, own, atol=1e-5)
    else:  # one pixel further left
        np.testing.assert_allclose(theirs[:, :, 1:], own[:, :, :-1], atol=1e-5)
        assert np.abs(theirs - own).max() > 1
    squash = {**cfg, "resize_mode": "squash"}
    theirs = script("read_immich")._prepared(picture, squash)[0]
    np.testing.assert_allclose(theirs, replace(student.preprocess, resize_mode="squash")(picture), atol=1e-5)


def test_what_immich_cannot_use_is_refused_with_a_next_step(monkeypatch):
    whole = little.student("test_vit")
    assert list(immich_faults(whole)) == []
    whole.preprocess = replace(whole.preprocess, size=(32, 48))
    assert "32 x 48" in next(immich_faults(whole))
    whole.preprocess = replace(whole.preprocess, size=(32, 32), resize_mode="longest")
    assert "longest" in next(immich_faults(whole))
    monkeypatch.setattr("clipdistill.formats.immich.served_dim", lambda student: 2048)
    assert "wider than 1536" in list(immich_faults(whole))[-1]
    assert sorted(NAMES) == list(NAMES) and len(set(NAMES.values())) == len(NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "colour: 3\n", 'no field named "colour"'),
        (lambda text: text.replace("dims: [ 16 ]", "dims: [ 17 ]"), "config.pbtxt states"),
        (lambda text: text.replace("TYPE_INT64", "TYPE_INT32"), "TYPE_INT32"),
        (lambda text: text.replace('name: "text"', 'name: "txt"'), "not a batched ONNX Runtime model of that name"),
        (lambda text: text.replace("max_batch_size: 64", "max_batch_size: 0"), "not a batched ONNX Runtime model"),
        (lambda text: text.replace("attention_mask", "mask"), "mask"),
    ],
)
def test_tritons_schema_and_the_graph_refuse_another_configuration(copied, change, message):
    folder, read = copied
    path = folder / "triton/text/config.pbtxt"
    path.write_text(change(path.read_text()))
    with pytest.raises(ParityError, match="triton: tritonclient cannot load or run it: ") as caught:
        read("triton")
    assert message in str(caught.value)


def test_the_vectors_are_the_students_row_for_row_and_can_be_adopted(made):
    student, folder, _, _ = made
    pictures = student.encode_images([pair.picture for pair in PAIRS])
    captions = [*(pair.captions[0] for pair in PAIRS[:11]), ""]
    for name, wanted in (("img_emb", pictures), ("text_emb", student.encode_texts(captions))):
        rows = np.load(folder / "vectors" / name / f"{name}_0.npy", mmap_mode="r")
        assert rows.dtype == np.float16 and len(rows) == 12
        np.testing.assert_allclose(rows.astype(np.float32), wanted, atol=1e-3)
    cache = adopt(folder / "vectors", PAIRS, logit_scale=50.0)
    keys = [pair.key for pair in PAIRS[::-1]]
    assert shared.cosine(cache.image_rows(keys), pictures[::-1]) >= 0.9999
    assert shared.cosine(cache.text_rows(captions[:11]), student.encode_texts(captions[:11])) >= 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "image: expected 12 rows, found 11 rows and 12 keys"),
        (lambda rows: rows[::-1], "worst cosine image"),
        (lambda rows: rows * 1.1, "expected unit rows"),
        (lambda rows: rows[:, :8], "as wide as the student's, found 8"),
        (lambda rows: rows * np.nan, "expected unit rows"),
    ],
)
def test_other_vectors_are_a_parity_error(copied, change, message):
    folder, read = copied
    path = folder / "vectors/img_emb/img_emb_0.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(ParityError, match=f"vectors: .*{message}"):
        read("vectors")


def test_another_order_of_keys_is_a_parity_error(copied):
    import pandas as pd

    folder, read = copied
    path = folder / "vectors/metadata/metadata_0.parquet"
    pd.read_parquet(path).iloc[::-1].to_parquet(path)
    with pytest.raises(ParityError, match="row 0 is of another picture than it was: 'row/bare'"):
        read("vectors")


@pytest.mark.parametrize(
    "change", [{"places": np.arange(8) + 90}, {"keys": np.zeros(0, np.uint8)}, {"image": np.ones((2, 16))}]
)
def test_a_broken_check_of_the_vectors_is_a_named_fault(copied, change):
    folder, _ = copied
    with np.load(folder / "vectors/check.npz") as parts:
        whole = dict(parts)
    np.savez(folder / "vectors/check.npz", **{**whole, **change})
    with pytest.raises(DataError, match=r"vectors/check\.npz: holds no rows"):
        read_stored(folder)


def test_they_are_written_where_they_are_asked_for_alone(tmp_path, monkeypatch):
    whole, text = little.student("test_vit"), shared.query_student()
    assert not {"immich", "triton", "vectors"} & {*chosen_layouts(whole, ()), *chosen_layouts(text, ())}
    with pytest.raises(ConfigError) as caught:
        export(text, tmp_path / "made", ("immich", "vectors"), probe=Probe.of(text, TEXTS))
    faults = "\n".join(caught.value.faults)
    assert all(
        part in faults for part in ("immich needs both towers", "vectors holds pictures'", "there are no pictures")
    )
    assert not list(LAYOUTS["triton"].faults(text))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tritonclient" else real(name))
    with pytest.raises(MissingExtraError, match=r"tritonclient is not installed.*clipdistill\[export\]"):
        check_packages(["triton"])
