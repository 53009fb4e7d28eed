"""The verb from end to end: chosen, saved, loaded, told on the page; a missed target; a student that is turned."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from stages.test_query_side import query_side
from training import little
from typer.testing import CliRunner

from clipdistill import DualEncoder, Searcher, VectorIndex
from clipdistill.cli import app
from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, MissingExtraError, ParityError
from clipdistill.runtime import RuntimeEncoder
from clipdistill.runtime.alone import OneByOne
from clipdistill.search import QuerySide
from clipdistill.serve.options import Options
from clipdistill.stages import compress_forms, compress_rows, compress_shipped
from clipdistill.stages.inputs import load_data, open_cache
from clipdistill.stages.serve import Served, build_app
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace

GIVEN = ("compress.k=5", "compress.dims=[24,12]", 'compress.factories=["SQ8","RaBitQ"]')
LOW = ("compress.target.retention=0.01", "compress.target.of=student", 'compress.rotations=["pca"]')


def call(verb, folder, *arguments):
    return CliRunner().invoke(app, [verb, str(folder / "run.toml"), *arguments, "--out", str(folder / "out")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compress")
    path = tiny.run_toml(made)
    path.write_text(path.read_text().replace("mobilenetv4_conv_small_050", "test_efficientnet"))
    assert call("run", made).exit_code == 0
    return made


@pytest.mark.slow
def test_the_smallest_is_saved_and_loads_and_the_page_tells(folder):
    done = call("compress", folder, *GIVEN, *LOW, "--json", "--force")
    assert done.exit_code == 0, done.output
    budget = json.loads((folder / "out" / "compressed" / "budget.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == budget
    assert budget["met"]
    assert {one["factory"] for one in budget["candidates"]} == {"SQ8", "RaBitQ"}
    assert {row["set"] for row in budget["rows"]} == {"val", "test"}
    keeping = [one for one in budget["candidates"] if one["retention"] >= 0.01]
    least = min((one["bytes_per_vector"], one["megabytes"]) for one in keeping)
    assert (budget["chosen"]["bytes_per_vector"], budget["attempts"][0]["searched"]["megabytes"]) == least
    assert budget["chosen"]["precision"] == "int8", "of equal bytes a vector the smaller towers"
    assert budget["chosen"]["dim"] == 12
    assert_rows(budget)
    assert_shipped(folder / "out" / "compressed", budget)
    page = (folder / "out" / "report.html").read_text()
    assert 'id="compression"' in page
    assert "against bytes a vector" in page
    assert "most recall is lost" in page or "no step loses any" in page
    assert call("compress", folder, *GIVEN, *LOW).exit_code == 0  # kept as it is


def assert_shipped(made, budget):
    """The export, its index and its bytes are what the last row of the budget says, measured anew."""
    assert sorted(path.name for path in made.iterdir()) == ["budget.json", "export", "index", "student"]
    precision = budget["chosen"]["precision"]
    runtime = RuntimeEncoder.load(made / "export", precision=precision, threads=1)
    encoder = OneByOne(runtime) if precision == "int8" else runtime
    index = VectorIndex.load(made / "index", encoder=encoder.fingerprint)
    build_app(Served(made / "export", made / "index"), Options())  # in the precision that it holds
    student = DualEncoder.load(made / "student")
    assert student.fingerprint == encoder.fingerprint
    assert (encoder.dim, len(index)) == (budget["chosen"]["dim"], budget["vectors"]) == (student.dim, 42)
    names = ["tokenizer.json", *(f"onnx/{one}_model{SUFFIX[precision]}.onnx" for one in ("text", "vision"))]
    size = sum((made / "export" / name).stat().st_size for name in names) / 1e6
    last = [row for row in budget["rows"] if row["set"] == "test"][-1]
    assert last["megabytes"] == budget["chosen"]["megabytes"] == pytest.approx(size, abs=6e-4)
    pairs = tiny.pairs(10, 32)
    pictures = encoder.encode_images([pair.picture for pair in pairs])
    texts = encoder.encode_texts([text for pair in pairs for text in pair.captions])
    refilled = index.refilled(pictures, [pair.key for pair in pairs])
    found = refilled.search(texts, 5).ids
    assert last["success"] == pytest.approx(np.mean([row // 2 in ids for row, ids in enumerate(found.tolist())]))


SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}


def assert_rows(budget):
    """Each step has its row, its speed where towers embed, and the set's largest loss is the one that is told."""
    rows = [row for row in budget["rows"] if row["set"] == "val"]
    assert [row["kind"] for row in rows] == ["teacher", "student", "truncated", "quantised", "index", "runtime"]
    for row in rows:
        assert (row["images_per_s"] is None) == (row["texts_per_s"] is None) == (row["kind"] == "index")
        assert row["kind"] == "index" or min(row["images_per_s"], row["texts_per_s"]) > 0
    assert {one["precision"] for one in budget["candidates"]} == {"fp32", "int8"}
    assert {point["precision"] for point in budget["curve"]} == {"fp32", "int8"}
    for name, most in budget["most_lost"].items():
        lost = [row["lost"] for row in budget["rows"] if row["set"] == name]
        assert (max(lost) <= 0) if most is None else (most["lost"] == max(lost))


def test_a_combination_that_fails_once_exported_gives_way_to_the_next(monkeypatch):
    made, target = attempts_of(monkeypatch, fails={8.0: 0.5, 16.0: None})
    assert [(one.searched.bytes_per_vector, one.met) for one in made] == [(8, False), (16, False), (32, True)]
    assert (made[0].measured.retention, made[1].measured, made[1].refused) == (0.5, None, "worse")
    assert compress_shipped.shown(made, target).bytes_per_vector == 32


def test_after_the_three_smallest_the_best_is_tried_and_then_it_is_told_what_is_lacking(monkeypatch):
    made, target = attempts_of(monkeypatch, fails=dict.fromkeys((8.0, 16.0, 32.0), 0.5) | {128.0: 0.8})
    assert [one.searched.bytes_per_vector for one in made] == [8, 16, 32, 128]
    assert compress_shipped.shown(made, target).retention == 0.8
    refused, target = attempts_of(monkeypatch, fails=dict.fromkeys((8.0, 16.0, 32.0, 64.0, 128.0)))
    with pytest.raises(ParityError, match=r"none of the combinations that were tried can be exported\. worse"):
        compress_shipped.shown(refused, target)


def attempts_of(monkeypatch, fails):
    """Attempts at five combinations, of which some lose retention once exported, or cannot be."""
    from dataclasses import replace

    from compression.test_budget import candidate

    from clipdistill.config import TargetConfig

    class Shipping:
        def attempt(self, one, judge, target):
            kept = fails.get(one.bytes_per_vector, one.retention)
            if kept is None:
                return compress_shipped.Attempt(one, None, "worse", met=False)
            return compress_shipped.Attempt(one, replace(one, retention=kept), None, met=kept >= target.retention)

    found = [candidate(0.97 + place / 1000, 8.0 * 2**place) for place in range(5)]
    target = TargetConfig(retention=0.9)
    return compress_shipped.attempts(Shipping(), found, None, target), target


@pytest.mark.slow
def test_a_target_that_none_keeps_ends_with_1_and_says_by_how_much(folder):
    pruned = ("compress.prune=[0.6]", "compress.recovery_steps=2", "compress.precisions=fp32")
    done = call("compress", folder, *GIVEN, *pruned, "compress.target.megabytes=0.1", "--force")
    assert done.exit_code == 1, done.output
    assert "None of 6 combinations keeps the target" in done.output
    assert "megabytes too large" in " ".join(done.output.split())
    made = sorted(path.name for path in (folder / "out" / "compressed").iterdir())
    assert made == ["budget.json"]
    budget = json.loads((folder / "out" / "compressed" / "budget.json").read_text())
    assert {one["share"] for one in budget["candidates"]} == {0.6}
    steps = [(row["kind"], row["step"]) for row in budget["rows"] if row["set"] == "test"]
    assert steps[2] == ("pruned", "pruned to 60% of the channels")
    assert budget["missed"]["megabytes"] == pytest.approx(budget["chosen"]["megabytes"] - 0.1, abs=1e-6)


def recovered(folder, *overrides):
    """The tiny run's student and the same with 60% of its channels, after two steps."""
    overrides = ("compress.prune=[0.6]", "compress.recovery_steps=2", *overrides)
    workspace = Workspace.of(RunConfig.load(folder / "run.toml", overrides), folder / "out")
    cache, data = open_cache(workspace, load_data(workspace), open_teachers(workspace.config))
    student = DualEncoder.load(folder / "out" / "student")
    rows = compress_rows.Rows.of(workspace, data, cache, student)
    return student, compress_forms.recovered(workspace, rows, student, 0.6)


def test_a_pruned_student_learns_in_its_picture_tower_alone_and_the_same_each_time(folder):
    student, smaller = recovered(folder)
    whole, visual = (sum(part.numel() for part in one.model.visual.parameters()) for one in (student, smaller))
    assert smaller.pruned
    assert visual < 0.6 * whole
    for name, value in student.model.text.state_dict().items():
        assert torch.equal(value, smaller.model.text.state_dict()[name]), name
    (learnt,) = (folder / "out" / "recovery").iterdir()
    kept = {path: path.stat().st_mtime_ns for path in learnt.rglob("*.safetensors")}
    assert recovered(folder)[1].fingerprint == smaller.fingerprint
    assert kept == {path: path.stat().st_mtime_ns for path in learnt.rglob("*.safetensors")}, "trained once"
    shutil.rmtree(learnt)
    assert recovered(folder)[1].fingerprint == smaller.fingerprint
    assert recovered(folder, "compress.recovery_steps=3")[1].fingerprint != smaller.fingerprint


def test_what_cannot_be_pruned_is_refused_before_anything_is_embedded(folder, monkeypatch):
    config = RunConfig.load(folder / "run.toml", ["compress.prune=[1.0,0.7]"])
    with pytest.raises(ConfigError, match=r"compress\.prune: this picture tower cannot be pruned: .*VisionTransformer"):
        compress_forms.check_forms(config, little.student("test_vit"))
    compress_forms.check_forms(config, little.student("test_efficientnet"))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"torch-pruning is not installed.*clipdistill\[prune\]"):
        compress_forms.check_forms(config, little.student("test_efficientnet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(MissingExtraError, match=r"onnx is not installed.*clipdistill\[export\]"):
        compress_forms.check_forms(config, little.student("test_efficientnet"))


def test_a_turned_student_makes_the_projected_vectors(folder):
    student = DualEncoder.load(folder / "out" / "student")
    axes = torch.linalg.qr(torch.randn(24, 10, generator=torch.Generator().manual_seed(1)))[0]
    turned = student.rotate(axes)
    texts, pictures = ["a red cat", "two lamps"], [pair.picture for pair in tiny.pairs(3)]
    for made, whole in (
        (turned.encode_texts(texts), student.encode_texts(texts)),
        (turned.encode_images(pictures), student.encode_images(pictures)),
    ):
        wanted = whole @ axes.numpy()
        np.testing.assert_allclose(made, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    assert turned.dims == (10,)
    assert turned.parameters < student.parameters


def test_a_run_without_val_is_refused(folder, tmp_path):
    text = (folder / "run.toml").read_text().replace('val = "val"\n', "")
    (folder / "blind.toml").write_text(text)
    done = CliRunner().invoke(app, ["compress", str(folder / "blind.toml"), "--out", str(tmp_path / "out")])
    assert "give data.val or data.hold_out.val" in str(done.exception)


def test_a_pruned_tower_needs_stored_embeddings_and_pictures(folder):
    done = call("compress", folder, "compress.prune=[0.7]", "train.mode=live", "train.batch=0", "train.batch_texts=4")
    assert 'stored embeddings, which train.mode = "live" does not have' in str(done.exception)
    assert "compress.prune: a pruned tower recovers on pictures" in str(done.exception)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("compress.dims=[12,24]", "compress.dims: must fall"),
        ("compress.factories=[]", "compress.factories: nothing to try"),
        ("compress.precisions=[]", "compress.precisions: nothing to try"),
        ('compress.precisions=["int8","int8"]', "compress.precisions: a value is given twice: int8, int8"),
        ("compress.precisions=int4", "compress.precisions"),
        ("compress.prune=[0.0]", "compress.prune"),
        ("compress.prune=[0.7,0.7]", "compress.prune: a value is given twice: 0.7, 0.7"),
        ("compress.target.retention=1.5", "compress.target.retention"),
        ("compress.target.retentoin=1", "did you mean 'retention'"),
    ],
)
def test_faults_of_the_section(folder, override, fault):
    done = call("compress", folder, override)
    assert fault in str(done.exception)


@pytest.mark.slow
def test_the_index_alone_is_compressed_where_the_pictures_stay_the_teachers(tmp_path):
    query_side(tmp_path)
    done = call(
        "compress",
        tmp_path,
        'compress.factories=["Flat","SQ8"]',
        "compress.k=8",
        "compress.target.retention=0.01",
        'compress.precisions=["fp16","int8"]',
    )
    assert done.exit_code == 0, done.output
    made = tmp_path / "out" / "compressed"
    budget, student = json.loads((made / "budget.json").read_text()), DualEncoder.load(made / "student")
    tried = [(one["rotation"], one["factory"], one["precision"]) for one in budget["candidates"]]
    assert tried == [("whole", factory, one) for one in ("fp16", "int8") for factory in ("Flat", "SQ8")]
    assert (budget["chosen"]["factory"], budget["chosen"]["precision"]) == ("SQ8", "int8")
    assert [row["images_per_s"] for row in budget["rows"]] == [None] * len(budget["rows"])
    index = VectorIndex.load(made / "index", encoder=student.searches.fingerprint)
    runtime = RuntimeEncoder.load(made / "export", precision="int8")
    hits = [Searcher(one, index).by_text("a red cat", 3) for one in (QuerySide(student), runtime)]
    assert hits[0][0].key == hits[1][0].key


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    before = set(sys.modules)
    import compression_budget

    yield compression_budget
    for name in {"compression_budget", "result"} & (set(sys.modules) - before):
        del sys.modules[name]


def points_of(name, kept):
    """Points of a curve at 16, 32, 64, ... bytes."""
    which = {"rotation": "pca", "factory": "SQ8", "share": 1.0, "precision": "int8", "megabytes": 5.0}
    return [
        which
        | {"set": name, "dim": 16 << place, "bytes_per_vector": 16 << place, "success": value / 2, "retention": value}
        | {"retention_low": value - 0.1, "retention_high": value + 0.1}
        for place, value in enumerate(kept)
    ]


def test_the_benchmark_reads_the_best_within_a_bound_off_vals_curve(bench):
    points = points_of("val", (0.5, 0.8, 0.9)) + points_of("test", (0.9, 0.7, 0.6))
    assert bench.within(points, 50, "test")["retention"] == 0.7
    assert bench.within(points, 64, "test")["retention"] == 0.6
    assert bench.within(points, 8, "test") is None


def test_the_benchmarks_figures_are_those_of_the_shipped_combination_and_no_missed_bar_is_left_out(bench):
    sizes = {"teacher": (256, 100.0), "student": (512, 20.0), "runtime": (8, 5.0)}
    rows = [
        {"set": name, "kind": kind, "success": value, "overlap": 0.5, "lost": 0.1}
        | {"bytes_per_vector": sizes[kind][0], "megabytes": sizes[kind][1], "images_per_s": None, "texts_per_s": 2.0}
        for name in ("val", "test", "unseen")
        for kind, value in (("teacher", 0.8), ("student", 0.5), ("runtime", 0.45))
    ]
    curve = [point for name in ("val", "test", "unseen") for point in points_of(name, (0.5, 0.8))]
    chosen = {"share": 0.7, "dim": 32, "bytes_per_vector": 8, "megabytes": 5.0, "precision": "int8"}
    candidates = [
        {"share": share, "precision": "int8", "retention": kept, "bytes_per_vector": size, "megabytes": 5.0}
        for share, kept, size in ((1.0, 0.99, 8), (0.7, 0.96, 32), (0.7, 0.98, 33), (0.7, 0.9, 8))
    ]
    budget = {"rows": rows, "curve": curve, "chosen": chosen, "candidates": candidates}
    figures = bench.figures_of(budget)
    assert set(bench.BARS) <= set(figures)
    assert figures["kept_test"] == 0.9
    assert (figures["times_smaller_on_disk"], figures["times_fewer_bytes_a_vector"]) == (20, 64)
    assert (figures["kept_test_at_8x"], figures["kept_test_at_8x_bytes"]) == (0.8, 32)
    assert (figures["retention_unseen_at_4x"], figures["best_retention_unseen_at_10x"]) == (0.8, 0.5)
    assert (figures["runtime_success10_unseen"], figures["texts_per_s_times"]) == (0.45, 1)
    assert "pictures_per_s_times" not in figures
    assert figures["pruned_kept_val"] == 0.96  # of those within an eighth of the teacher's bytes
    without = bench.figures_of({**budget, "curve": [], "candidates": []})
    assert (without["retention_test_at_4x"], without["pruned_kept_val"]) == (0, 0)


def test_a_finished_run_is_copied_for_the_benchmark_and_left_as_it_is(bench, folder, tmp_path):
    bench.copied(folder / "out", tmp_path / "copy")
    assert DualEncoder.load(tmp_path / "copy" / "student").dim == 24
    (tmp_path / "copy" / "mine").touch()
    bench.copied(folder / "out", tmp_path / "copy")
    assert (tmp_path / "copy" / "mine").exists(), "the same student's copy is kept"
    assert not (tmp_path / "copy" / "compressed").exists()
