"""Exports of small real students: every layout loaded by its own consumer, and what is refused."""

import json

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError, ParityError
from clipdistill.formats import CardFacts, Probe, export, verify
from clipdistill.retrieval.index import VectorIndex
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.student import DualEncoder, assemble, projections

pytestmark = pytest.mark.slow

PAIRS = tiny.pairs(14)
TEXTS = ["", "a", *(pair.captions[0] for pair in PAIRS), " ".join(["red bicycle"] * 40)]
ALL = ("fp32", "fp16", "int8")


def query_student():
    words = little.tokenizer()
    text = {"context_length": 16, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 16, "custom_text": True, "text_cfg": text}
    maps = projections(16, little.TEACHER_DIM, 0, sides=("text",))
    return DualEncoder(assemble(cfg), cfg, words, None, projection=maps, searches=SearchedTeacher("big", "f" * 64))


def probe(student, **more):
    return Probe.of(student, TEXTS, [pair.picture for pair in PAIRS], **more)


def session(folder, name):
    return onnxruntime.InferenceSession(str(folder / "onnx" / name), providers=["CPUExecutionProvider"])


def texts(model, tokens):
    mask = (np.arange(tokens.shape[1]) <= tokens.argmax(axis=1)[:, None]).astype(np.int64)
    (rows,) = model.run(["text_embeds"], {"input_ids": tokens, "attention_mask": mask})
    return rows


def cosine(found, wanted):
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3
    return float((found * wanted).sum(axis=1).min())


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def exported(request, tmp_path_factory):
    student = little.student(request.param)
    folder = tmp_path_factory.mktemp("export") / "made"
    right = [(), (), *((row,) for row in range(14)), ()]
    facts = CardFacts(name="a | b: c", licence="Apache-2.0", teacher="big", data_licence="CC-BY-4.0")
    vectors = student.encode_images([pair.picture for pair in PAIRS])
    VectorIndex.build(vectors, [pair.key for pair in PAIRS], encoder=student.fingerprint).save(folder.parent / "index")
    given = {"probe": probe(student, relevant=right), "facts": facts, "index": folder.parent / "index"}
    return student, folder, export(student, folder, (), ALL, **given)


def test_the_folder_holds_what_the_contract_says(exported):
    student, folder, report = exported
    values = json.loads((folder / "manifest.json").read_text())
    assert values["kind"] == "export" and values["version"] == 1
    assert values["encoder"] == student.fingerprint
    assert (values["dim"], values["context_length"], values["searches"]) == (16, 16, None)
    assert values["preprocess"] == student.preprocess.to_open_clip()
    assert values["layouts"] == ["open_clip", "onnx"] and values["precisions"] == list(ALL)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    graphs = {
        f"onnx/{tower}_model{suffix}.onnx" for tower in ("text", "vision") for suffix in ("", "_fp16", "_quantized")
    }
    assert files >= graphs | {"tokenizer.json", "open_clip_config.json", "open_clip_model.safetensors", "README.md"}
    assert files >= {"config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert values["files"] == {name: fingerprint.of_file(folder / name) for name in files - {"manifest.json"}}
    assert set(values["parity"]) == {"open_clip", "onnx/fp32", "onnx/fp16", "onnx/int8"}
    for name, bar in (("open_clip", 0.99999), ("onnx/fp32", 0.99999), ("onnx/fp16", 0.9999), ("onnx/int8", 0.995)):
        for tower, rows in (("image", 14), ("text", len(TEXTS))):
            assert values["parity"][name][tower]["worst_cosine"] >= bar
            assert values["parity"][name][tower]["rows"] == rows
    assert values["recall"]["onnx/fp32"]["overlap10"] == 1
    assert values["recall"]["onnx/fp32"]["success10"] == values["recall"]["onnx/fp32"]["student_success10"]
    assert values["recall"]["open_clip"]["index_overlap10"] == values["recall"]["onnx/fp32"]["index_overlap10"] == 1
    assert 0.8 <= values["recall"]["onnx/int8"]["index_overlap10"] <= 1
    assert values["index"] == {"vectors": 14, "factory": "Flat", "encoder": student.fingerprint}
    assert report.vectors == 14 and "with an index of 14 pictures" in report.lines()[-1]
    assert report.to_json()["bytes"] == sum((folder / name).stat().st_size for name in files)


@pytest.mark.parametrize(("name", "bar"), [("", 0.99999), ("_fp16", 0.9999), ("_quantized", 0.995)])
def test_any_batch_and_any_length_equals_the_student(exported, name, bar):
    student, folder, _ = exported
    model = session(folder, f"text_model{name}.onnx")
    wanted = student.encode_texts(TEXTS)
    whole = student.tokenizer.encode(TEXTS, cut=False)
    assert cosine(texts(model, whole), wanted) >= bar
    for row, text in enumerate(TEXTS):  # each alone at its own length: 2, 3, ... 16
        assert cosine(texts(model, student.tokenizer.encode([text])), wanted[row : row + 1]) >= bar
    assert cosine(texts(model, student.tokenizer.encode(TEXTS[:5])), wanted[:5]) >= bar
    one = np.array([[student.tokenizer.end_id]])
    with torch.no_grad():
        end = student.embed_tokens(torch.from_numpy(one)).numpy()
    assert cosine(texts(model, one), end) >= bar
    pictures = [pair.picture for pair in PAIRS]
    pixels, images = probe(student).pixels, student.encode_images(pictures)
    model = session(folder, f"vision_model{name}.onnx")
    for count in (1, 5, 14):
        (rows,) = model.run(["image_embeds"], {"pixel_values": pixels[:count]})
        assert cosine(rows, images[:count]) >= bar


def test_what_the_mask_leaves_out_changes_nothing(exported):
    student, folder, _ = exported
    model, ids = session(folder, "text_model.onnx"), student.tokenizer.encode(["a red cat"], cut=False)
    mask = (ids != 0).astype(np.int64)
    other = np.where(mask == 1, ids, student.tokenizer.end_id)  # as CLIP's own tokenizer pads
    rows = [model.run(None, {"input_ids": one, "attention_mask": mask})[0] for one in (ids, other)]
    np.testing.assert_array_equal(*rows)


def test_fewer_bits_are_fewer_bytes_and_no_path_of_this_machine_is_in_them(exported):
    _, folder, report = exported
    for tower in ("text", "vision"):
        whole = report.sizes[f"onnx/{tower}_model.onnx"]
        assert report.sizes[f"onnx/{tower}_model_quantized.onnx"] < whole
        assert report.sizes[f"onnx/{tower}_model_fp16.onnx"] < whole
    for path in (folder / "onnx").iterdir():
        data = path.read_bytes()
        assert b"site-packages" not in data and b"/clipdistill/" not in data


def test_the_card_says_licences_figures_and_use(exported):
    _, folder, _ = exported
    text = (folder / "README.md").read_text()
    head = text.split("---")[1]
    assert 'license: "apache-2.0"' in head
    for part in (
        "# a | b: c",
        "| training data | CC-BY-4.0 |",
        "| teacher | not stated |",
        "onnx/int8",
        "local-dir:",
        "FOLDER/index",
    ):
        assert part in text, text


def test_verify_loads_it_again(exported):
    _, folder, report = exported
    again = verify(folder)
    assert [one.reading for one in again.parities] == [one.reading for one in report.parities]
    assert all(values["rows"] == 8 for one in again.parities for values in one.towers.values())
    assert again.sizes == report.sizes
    assert again.parities[0].recall == {"overlap7": 1, "index_overlap10": 1}  # of the 8 pictures that travel
    assert again.vectors == 14


@pytest.mark.parametrize("name", ["onnx/text_model.onnx", "open_clip_model.safetensors", "tokenizer.json", "check.npz"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_changed_file_is_refused_by_name_with_both_digests(exported, name, how):
    _, folder, _ = exported
    path = folder / name
    data, before = path.read_bytes(), fingerprint.of_file(path)
    changed = {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[: len(data) // 2], "gone": b""}[how]
    path.write_bytes(changed)
    found = "no file" if how == "gone" else fingerprint.of_file(path)
    if how == "gone":
        path.unlink()
    try:
        with pytest.raises(MismatchError) as caught:
            verify(folder)
    finally:
        path.write_bytes(data)
    for part in (str(path), before, found, "Export again"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"files": None}, DataError, "files is missing"),
        ({"files": {}}, MismatchError, "sha256"),
        ({"layouts": ["onxn"]}, DataError, "did you mean 'onnx'"),
        ({"kind": "index"}, MismatchError, "kind does not match"),
        ({"version": 9}, MismatchError, "version does not match"),
        ({"preprocess": 3}, DataError, "preprocess"),
    ],
)
def test_a_changed_manifest_is_refused(exported, change, error, message):
    _, folder, _ = exported
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **change}))
    try:
        with pytest.raises(error, match=message):
            verify(folder)
    finally:
        path.write_text(text)


def test_a_text_tower_alone_asks_in_its_teachers_space(tmp_path):
    student = query_student()
    gallery = np.stack([little.Teacher().row(pair.key) for pair in PAIRS])
    report = export(student, tmp_path / "made", (), ("fp32", "int8"), probe=Probe.of(student, TEXTS, gallery=gallery))
    assert (report.layouts, report.encoder, report.dim) == (("onnx",), "f" * 64, little.TEACHER_DIM)
    assert report.parities[0].recall["overlap10"] == 1
    values = json.loads((tmp_path / "made/manifest.json").read_text())
    assert values["preprocess"] is None and values["searches"] == {"name": "big", "fingerprint": "f" * 64}
    wanted = student.to_teacher_vectors(student.encode_texts(TEXTS), "text")
    rows = texts(session(tmp_path / "made", "text_model.onnx"), student.tokenizer.encode(TEXTS, cut=False))
    assert cosine(rows, wanted) >= 0.99999
    assert not (tmp_path / "made/onnx/vision_model.onnx").exists()
    verify(tmp_path / "made")
    from clipdistill.runtime import RuntimeEncoder

    encoder = RuntimeEncoder.load(tmp_path / "made")
    assert (encoder.dim, encoder.fingerprint) == (little.TEACHER_DIM, "f" * 64)
    assert cosine(encoder.encode_texts(TEXTS), wanted) >= 0.99999


def test_below_the_bar_nothing_is_left(tmp_path, monkeypatch):
    from clipdistill.formats import precision

    def ruined(model):
        copy = type(model)()
        copy.CopyFrom(model)
        for table in copy.graph.initializer:
            if table.name.endswith("token_embedding.weight"):
                from onnx import numpy_helper

                values = numpy_helper.to_array(table).copy()
                values[5:] = 0.01
                table.CopyFrom(numpy_helper.from_array(values, table.name))
        return copy

    student = query_student()
    monkeypatch.setitem(precision.CONVERSIONS, "int8", ruined)
    with pytest.raises(ParityError, match=r"onnx/int8: .*worst cosine text -?0\.\d+ of 17 rows; at least 0\.995"):
        export(student, tmp_path / "made", ("onnx",), ("int8",), probe=probe(student))
    assert list(tmp_path.iterdir()) == []


def test_a_consumer_that_fails_is_a_parity_error_with_its_last_line(tmp_path, monkeypatch):
    from clipdistill.formats import onnx

    student = query_student()
    monkeypatch.setattr(onnx, "unit_rows", lambda model, tower: type(model)())
    with pytest.raises(ParityError, match="onnx/fp32: onnxruntime cannot load or run it: "):
        export(student, tmp_path / "made", ("onnx",), ("fp32",), probe=probe(student))
    assert list(tmp_path.iterdir()) == []


def test_faults_are_told_at_once_and_nothing_is_written(tmp_path):
    student = query_student()
    with pytest.raises(ConfigError) as caught:
        export(student, tmp_path / "made", ("onxn", "open_clip"), ("fp23",), probe=Probe.of(student, TEXTS))
    text = "\n".join(caught.value.faults)
    for part in ("unknown layout 'onxn'; did you mean 'onnx'?", "'fp23'", "open_clip has no text tower alone"):
        assert part in text
    with pytest.raises(DataError, match="no texts or no pictures"):
        Probe.of(little.student("test_vit"), ["a"])
    assert list(tmp_path.iterdir()) == []


def test_open_clip_alone_holds_no_graphs_and_replaces_an_older_export(tmp_path):
    from clipdistill.runtime import RuntimeEncoder

    student = little.student("test_vit")
    for _ in range(2):
        report = export(student, tmp_path / "made", ("open_clip",), probe=probe(student))
    values = json.loads((tmp_path / "made/manifest.json").read_text())
    assert (values["layouts"], values["precisions"]) == (["open_clip"], [])
    assert not (tmp_path / "made/onnx").exists()
    assert [one.reading for one in verify(tmp_path / "made").parities] == ["open_clip"]
    assert [one.reading for one in report.parities] == ["open_clip"]
    with pytest.raises(ConfigError, match="holds no ONNX graphs"):
        RuntimeEncoder.load(tmp_path / "made")


def test_what_is_no_export_is_never_replaced(tmp_path):
    student = query_student()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="left alone"):
        export(student, tmp_path / "mine", probe=Probe.of(student, TEXTS))
    assert (tmp_path / "mine/thesis.txt").read_text() == "dear"
    with pytest.raises(DataError, match=r"no manifest\.json"):
        verify(tmp_path / "mine")


def test_a_missing_library_is_named_with_the_pip_line(tmp_path, monkeypatch):
    import importlib.util

    student, real = query_student(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a))
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*clipdistill\[export\]"):
        export(student, tmp_path / "made", probe=Probe.of(student, TEXTS))


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 0.99999), ("fp16", 0.9999), ("int8", 0.995)])
def test_the_runtime_without_torch_reads_it(exported, precision, bar):
    from clipdistill.runtime import RuntimeEncoder

    student, folder, _ = exported
    encoder = RuntimeEncoder.load(folder, precision=precision)
    assert (encoder.dim, encoder.fingerprint) == (student.dim, student.fingerprint)
    pictures = [pair.picture for pair in PAIRS]
    assert cosine(encoder.encode_texts(TEXTS), student.encode_texts(TEXTS)) >= bar
    assert cosine(encoder.encode_images(pictures), student.encode_images(pictures)) >= bar
