"""The verb from end to end: chosen, saved, loaded, told on the page; a missed target; a student that is turned."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from stages.test_query_side import query_side
from typer.testing import CliRunner

from clipdistill import DualEncoder, Searcher, VectorIndex
from clipdistill.cli import app
from clipdistill.search import QuerySide

GIVEN = ("compress.k=5", "compress.dims=[24,12]", 'compress.factories=["SQ8","RaBitQ"]')


def call(verb, folder, *arguments):
    return CliRunner().invoke(app, [verb, str(folder / "run.toml"), *arguments, "--out", str(folder / "out")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compress")
    tiny.run_toml(made)
    assert call("run", made).exit_code == 0
    return made


@pytest.mark.slow
def test_the_smallest_is_saved_and_loads_and_the_page_tells(folder):
    target = ["compress.target.retention=0.01", "compress.target.of=student", 'compress.rotations=["pca"]']
    done = call("compress", folder, *GIVEN, *target, "--json", "--force")
    assert done.exit_code == 0, done.output
    budget = json.loads((folder / "out" / "compressed" / "budget.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == budget
    assert budget["met"]
    assert {one["factory"] for one in budget["candidates"]} == {"SQ8", "RaBitQ"}
    assert {row["set"] for row in budget["rows"]} == {"val", "test"}
    least = min(one["bytes_per_vector"] for one in budget["candidates"] if one["retention"] >= 0.01)
    assert budget["chosen"]["bytes_per_vector"] == least
    student = DualEncoder.load(folder / "out" / "compressed" / "student")
    index = VectorIndex.load(folder / "out" / "compressed" / "index", encoder=student.fingerprint)
    assert (student.dim, len(index)) == (budget["chosen"]["dim"], budget["vectors"]) == (student.dim, 42)
    assert len(Searcher(student, index).by_text("a red cat", 3)) == 3
    page = (folder / "out" / "report.html").read_text()
    assert 'id="compression"' in page
    assert "against bytes a vector" in page
    assert call("compress", folder, *GIVEN, *target).exit_code == 0  # kept as it is


@pytest.mark.slow
def test_a_target_that_none_keeps_ends_with_1_and_says_by_how_much(folder):
    done = call("compress", folder, *GIVEN, "compress.target.megabytes=0.5", "--force")
    assert done.exit_code == 1, done.output
    assert "None of 6 combinations keeps the target" in done.output
    assert "megabytes too large" in " ".join(done.output.split())
    made = sorted(path.name for path in (folder / "out" / "compressed").iterdir())
    assert made == ["budget.json"]


def test_a_turned_student_makes_the_projected_vectors(folder):
    import torch

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


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("compress.dims=[12,24]", "compress.dims: must fall"),
        ("compress.factories=[]", "compress.factories: nothing to try"),
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
        "compress", tmp_path, 'compress.factories=["Flat","SQ8"]', "compress.k=8", "compress.target.retention=0.01"
    )
    assert done.exit_code == 0, done.output
    made = tmp_path / "out" / "compressed"
    budget, student = json.loads((made / "budget.json").read_text()), DualEncoder.load(made / "student")
    assert [(one["rotation"], one["factory"]) for one in budget["candidates"]] == [("whole", "Flat"), ("whole", "SQ8")]
    assert budget["chosen"]["factory"] == "SQ8"
    index = VectorIndex.load(made / "index", encoder=student.searches.fingerprint)
    assert len(Searcher(QuerySide(student), index).by_text("a red cat", 3)) == 3


def test_the_benchmark_reads_the_best_within_a_bound_off_vals_curve(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from compression_budget import within

    points = [
        {"set": name, "dim": size, "rotation": "pca", "factory": "SQ8", "bytes_per_vector": size, "retention": kept}
        for name, size, kept in (
            ("val", 16, 0.5),
            ("val", 32, 0.8),
            ("val", 64, 0.9),
            ("test", 16, 0.9),
            ("test", 32, 0.7),
            ("test", 64, 0.6),
        )
    ]
    assert within(points, 50, "test")["retention"] == 0.7
    assert within(points, 64, "test")["retention"] == 0.6
    assert within(points, 8, "test") is None
