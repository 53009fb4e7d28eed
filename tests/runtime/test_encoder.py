"""The torch-free encoder: what it feeds its graphs, what it gives back, and what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
import tiny
from onnx import TensorProto, helper
from runtime import tiny_export

from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import QuerySide, Searcher
from clipdistill.towers.preprocess import Preprocess

TEXTS, PICTURES = tiny_export.TEXTS, tiny_export.pictures(7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "it"
    return folder, tiny_export.write(folder, precisions=("fp32", "int8"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def encoder(made):
    return RuntimeEncoder.load(made[0], threads=1)


def expected_texts(weights, texts=TEXTS):
    words = tiny_export.tokenizer()
    return tiny_export.unit(np.stack([weights.text(words.encode([text])[0]) for text in texts]))


def expected_pictures(weights, pictures=PICTURES):
    prepare = Preprocess((tiny_export.SIZE, tiny_export.SIZE))
    rows = [weights.picture(prepare(decode(one.read(), 10**6, "it"))) for one in pictures]
    return tiny_export.unit(np.stack(rows))


def test_texts_are_what_numpy_makes_of_the_students_own_tokens(encoder, made):
    found = encoder.encode_texts(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (33, tiny_export.DIM)
    assert np.abs(found - expected_texts(made[1])).max() < 1e-6


def test_pictures_are_what_numpy_makes_of_the_students_own_pixels(encoder, made):
    found = encoder.encode_images(PICTURES)
    assert found.dtype == np.float32
    assert np.abs(found - expected_pictures(made[1])).max() < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_the_batch_changes_nothing_but_rounding(encoder, made, batch):
    assert np.abs(encoder.encode_texts(TEXTS[::-1], batch) - expected_texts(made[1])[::-1]).max() < 1e-6
    assert np.abs(encoder.encode_images(PICTURES, batch) - expected_pictures(made[1])).max() < 1e-5


def test_texts_beyond_one_round_of_tokenizing_are_placed_right(encoder, made, monkeypatch):
    monkeypatch.setattr("clipdistill.towers.tokenizer._TEXTS_AT_ONCE", 4)
    assert np.abs(encoder.encode_texts(TEXTS, 3) - expected_texts(made[1])).max() < 1e-6


def test_nothing_gives_no_rows_and_no_batch_is_refused(encoder):
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, tiny_export.DIM)
    for encode in (lambda: encoder.encode_texts(["a"], 0), lambda: encoder.encode_images(PICTURES, -1)):
        with pytest.raises(ValueError, match="batch must be at least 1"):
            encode()


def test_a_text_that_spells_out_the_padding_keeps_its_tokens(encoder, made):
    texts = ["a <|pad|> cat", "<|pad|>", "a red cat and a blue house"]
    assert 0 in tiny_export.tokenizer().encode(texts[:1])[0, :-1]
    assert np.abs(encoder.encode_texts(texts) - expected_texts(made[1], texts)).max() < 1e-6


def test_the_same_input_gives_the_same_bits(encoder, made):
    again = RuntimeEncoder.load(str(made[0]), threads=1)
    assert np.array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    assert np.array_equal(again.encode_images(PICTURES), encoder.encode_images(PICTURES))


def test_each_precision_has_its_own_graphs(made):
    other = RuntimeEncoder.load(made[0], precision="int8")
    assert other.precision == "int8"
    weights = tiny_export.weights(tiny_export.tokenizer().vocab_size, seed=1)
    assert np.abs(other.encode_texts(TEXTS) - expected_texts(weights)).max() < 1e-6
    assert np.abs(other.encode_images(PICTURES) - expected_pictures(weights)).max() < 1e-5


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("fp16", "has no 'fp16' graphs, it holds: fp32, int8"),
        ("int", "has no 'int' graphs, it holds: fp32, int8; did you mean 'int8'?"),
        ("", "has no '' graphs, it holds: fp32, int8; valid: fp16, fp32, int8"),
    ],
)
def test_a_precision_that_is_not_there_is_named_with_those_that_are(made, asked, told):
    with pytest.raises(ConfigError) as caught:
        RuntimeEncoder.load(made[0], precision=asked)
    assert str(caught.value) == f"precision: {made[0]} {told}"


def test_an_export_without_graphs_and_a_negative_number_of_threads_are_refused(made, folder):
    tiny_export.sign(folder, precisions=[])
    with pytest.raises(ConfigError, match="holds no ONNX graphs"):
        RuntimeEncoder.load(folder)
    with pytest.raises(ConfigError, match=r"threads: must be 0 .* got -1"):
        RuntimeEncoder.load(made[0], threads=-1)


def test_it_searches_an_index_of_the_students(encoder, made):
    rows = expected_pictures(made[1]).astype(np.float32)
    names = [f"picture {number}" for number in range(7)]
    searcher = Searcher(encoder, VectorIndex.build(rows, names, encoder=tiny_export.ENCODER))
    query = expected_texts(made[1], ["a red cat"])[0]
    order = np.argsort(-(rows.astype(np.float64) @ query))
    hits = searcher.by_text("a red cat", k=7)
    assert [hit.key for hit in hits] == [names[row] for row in order]
    assert np.allclose([hit.score for hit in hits], (rows @ query)[order], atol=1e-5)
    assert searcher.by_picture(PICTURES[3], k=1)[0].key == "picture 3"
    with pytest.raises(MismatchError, match="encoder does not match"):
        Searcher(encoder, VectorIndex.build(rows, names, encoder="another"))


def test_a_text_tower_alone_searches_the_teachers_index_and_refuses_pictures(tmp_path):
    weights = tiny_export.write(tmp_path / "it", pictures=False)
    alone = RuntimeEncoder.load(tmp_path / "it")
    with pytest.raises(DataError, match="pictures are embedded by the teacher big"):
        alone.encode_images(PICTURES)
    rows = tiny_export.unit(np.random.default_rng(0).standard_normal((9, tiny_export.DIM))).astype(np.float32)
    index = VectorIndex.build(rows, list("abcdefghi"), encoder=tiny_export.TEACHER)
    best = (rows @ expected_texts(weights, ["a cat"])[0]).argmax()
    for side in (alone, QuerySide(alone)):
        assert (side.dim, side.fingerprint) == (tiny_export.DIM, tiny_export.TEACHER)
        assert Searcher(side, index).by_text("a cat", k=1)[0].key == "abcdefghi"[best]


def test_a_student_with_both_towers_is_no_query_side(encoder):
    with pytest.raises(DataError, match="picture tower of its own"):
        QuerySide(encoder)
    with pytest.raises(DataError, match="no map to the teacher's space"):
        encoder.to_teacher_vectors(encoder.encode_texts(["a"]), "text")


def test_pictures_that_cannot_be_used_are_named(encoder, tmp_path):
    large = Picture("large.png", data=tiny.image_bytes(0, (1200, 900)))
    assert encoder.max_pixels == 1_000_000
    for bad, reason in (
        (large, "large.png: too many pixels: 1200x900 is over data.max_pixels 1000000"),
        (Picture("gone", path=tmp_path / "gone"), "gone: cannot be read: No such file"),
        (Picture("cut.png", data=PICTURES[0].read()[:60]), "cut.png: "),
        (Picture("text", data=b"hello"), "text: not a picture"),
    ):
        with pytest.raises(DataError, match=reason):
            encoder.encode_images([PICTURES[0], bad])


USED = ("tokenizer.json", "onnx/text_model.onnx", "onnx/vision_model.onnx")


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "gone", "folder"])
def test_a_changed_file_is_refused_before_anything_is_loaded(folder, name, spoil, monkeypatch):
    path = folder / name
    data = path.read_bytes()
    expected = json.loads((folder / "manifest.json").read_text())["files"][name]
    path.unlink()
    if spoil == "folder":
        path.mkdir()
    elif spoil != "gone":
        changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[: len(data) // 2], "empty": b""}
        path.write_bytes(changed[spoil])

    def never(*_, **__):
        raise AssertionError("ONNX Runtime saw a byte")

    monkeypatch.setattr("onnxruntime.InferenceSession", never)
    with pytest.raises(MismatchError) as caught:
        RuntimeEncoder.load(folder)
    assert str(path) in str(caught.value)
    assert caught.value.expected == expected
    assert caught.value.found == "no file" if spoil in ("gone", "folder") else len(str(caught.value.found)) == 64
    assert caught.value.found != expected


def test_what_is_not_used_is_not_read(folder):
    (folder / "onnx/text_model_quantized.onnx").write_bytes(b"spoiled")
    (folder / "tokenizer_config.json").unlink()
    assert RuntimeEncoder.load(folder).encode_texts(["a"]).shape == (1, tiny_export.DIM)
    with pytest.raises(MismatchError, match="text_model_quantized"):
        RuntimeEncoder.load(folder, precision="int8")


@pytest.mark.parametrize("name", ["onnx/text_model.onnx", "onnx", "tokenizer.json"])
def test_a_symbolic_link_is_not_followed(folder, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{name}: is a symbolic link"):
        RuntimeEncoder.load(folder)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../other", "onnx/../../other", "C:x", "\\\\host\\share\\x", "a\\..\\b", "", "."]
)
def test_a_name_that_leaves_the_folder_is_refused(folder, name):
    facts = json.loads((folder / "manifest.json").read_text())
    facts["files"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="is not the name of a file inside the folder"):
        RuntimeEncoder.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder", ...), ("encoder", ""), ("encoder", 7), ("dim", ...), ("dim", "6"), ("dim", 0), ("dim", True),
        ("context_length", 2), ("context_length", 16.0), ("max_pixels", -1), ("max_pixels", None),
        ("precisions", "fp32"), ("precisions", [1]), ("precisions", ...), ("preprocess", []), ("preprocess", "RGB"),
        ("searches", "big"), ("searches", {"name": "big"}), ("preprocess", {"size": [0, 32]}),
    ],
)  # fmt: skip
def test_a_manifest_without_a_usable_value_is_refused_by_its_field(folder, field, value):
    tiny_export.sign(folder, **{field: value})
    with pytest.raises(MismatchError, match=rf"{field}|fingerprint"):
        RuntimeEncoder.load(folder)


@pytest.mark.parametrize(
    "cfg", [{"size": [1, 2, 3]}, {"size": "x"}, {"mean": [1]}, {"resize_mode": "x"}, {"std": [[]]}]
)
def test_a_preprocessing_that_is_none_is_refused(folder, cfg):
    tiny_export.sign(folder, preprocess=cfg)
    with pytest.raises(DataError, match=r"manifest\.json: preprocess: "):
        RuntimeEncoder.load(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dim": 7}, "shape of text_embeds"),
        ({"preprocess": Preprocess((32, 48)).to_open_clip()}, "shape of pixel_values"),
        ({"context_length": 77}, "truncation.max_length"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused(folder, changes, field):
    tiny_export.sign(folder, **changes)
    with pytest.raises(MismatchError, match=field):
        RuntimeEncoder.load(folder)


def test_graphs_with_other_borders_or_none_at_all_are_refused(folder, made):
    path = folder / "onnx/text_model.onnx"
    path.write_bytes((folder / "onnx/vision_model.onnx").read_bytes())
    tiny_export.sign(folder)
    with pytest.raises(MismatchError, match=r"text_model.onnx: inputs does not match: .*input_ids.*pixel_values"):
        RuntimeEncoder.load(folder)
    path.write_bytes(tiny_export.text_graph(made[1].table, output="embedding"))
    tiny_export.sign(folder)
    with pytest.raises(MismatchError, match=r"output does not match: .*text_embeds.*none"):
        RuntimeEncoder.load(folder)
    for garbage in (b"garbage", b""):
        path.write_bytes(garbage)
        tiny_export.sign(folder)
        with pytest.raises(DataError, match=r"text_model.onnx: ONNX Runtime .* cannot load it"):
            RuntimeEncoder.load(folder)


def test_a_folder_that_is_no_export_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    tiny_export.sign(folder)
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        RuntimeEncoder.load(folder)
    for path in (tmp_path / "nowhere", folder / "tokenizer.json"):
        with pytest.raises(DataError, match=r"no manifest\.json"):
            RuntimeEncoder.load(path)
    VectorIndex.build(np.eye(3, dtype=np.float32), list("abc"), encoder="x").save(tmp_path / "index")
    with pytest.raises(MismatchError, match="kind does not match: expected export, found index"):
        RuntimeEncoder.load(tmp_path / "index")
    for text in ("[]", "{", "\xff"):
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises((DataError, MismatchError), match=r"manifest\.json|kind"):
            RuntimeEncoder.load(folder)


def test_without_onnx_runtime_the_pip_line_is_given(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*clipdistill\[serve\]"):
        RuntimeEncoder.load(made[0])


@pytest.mark.parametrize("location", ["secret.bin", "../{here}/secret.bin", "{path}/secret.bin"])
def test_a_graph_reads_no_file_beside_itself(tmp_path, monkeypatch, location):
    """Whoever writes the manifest also writes the digests: a forged graph must not give away what lies elsewhere."""
    monkeypatch.chdir(tmp_path)
    np.arange(12, dtype=np.float32).tofile("secret.bin")
    held = TensorProto(name="held", data_type=TensorProto.FLOAT, dims=[2, 6], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location.format(here=tmp_path.name, path=tmp_path), "length": "48"}.items():
        held.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Add", ["held", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [held],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    tiny_export.write(tmp_path / "e")
    (tmp_path / "e/onnx/text_model.onnx").write_bytes(model.SerializeToString())
    tiny_export.sign(tmp_path / "e")
    with pytest.raises(DataError, match=r"text_model\.onnx: ONNX Runtime .* cannot load it"):
        RuntimeEncoder.load(tmp_path / "e")
