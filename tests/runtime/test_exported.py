"""A real student, exported by clipdistill.formats, embeds and finds in the runtime what it does in PyTorch."""

import numpy as np
import pytest
from runtime import tiny_export
from training import little

from clipdistill.core.errors import DataError
from clipdistill.data.records import Picture
from clipdistill.formats import Probe, export
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import QuerySide, Searcher
from clipdistill.towers.build import build_query_student
from clipdistill.towers.encoder import SearchedTeacher

pytestmark = pytest.mark.slow

TEXTS, PICTURES = tiny_export.TEXTS, tiny_export.pictures(24)
LEAST = {"fp32": 0.99999, "int8": 0.995}


@pytest.fixture(scope="module")
def student():
    return little.student()


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "it"
    export(student, folder, ("onnx",), tuple(LEAST), probe=Probe.of(student, TEXTS, PICTURES))
    return folder


@pytest.mark.parametrize("precision", LEAST)
def test_embeddings_are_the_students(student, exported, precision):
    encoder = RuntimeEncoder.load(exported, precision=precision, threads=1)
    assert (encoder.dim, encoder.fingerprint) == (student.dim, student.fingerprint)
    assert np.array_equal(encoder.tokenizer.encode(TEXTS), student.tokenizer.encode(TEXTS))
    for batch in (1, 5, 256):
        texts = (encoder.encode_texts(TEXTS, batch) * student.encode_texts(TEXTS)).sum(axis=1)
        pictures = (encoder.encode_images(PICTURES, batch) * student.encode_images(PICTURES)).sum(axis=1)
        assert (len(texts), len(pictures)) == (33, 24)
        assert min(texts.min(), pictures.min()) >= LEAST[precision]


def test_hits_in_an_index_of_the_pytorch_student_are_its_own(student, exported, tmp_path):
    names = [picture.origin for picture in PICTURES]
    VectorIndex.build(student.encode_images(PICTURES), names, encoder=student.fingerprint).save(tmp_path / "index")
    ours, theirs = (
        Searcher(one, VectorIndex.load(tmp_path / "index", encoder=one.fingerprint))
        for one in (RuntimeEncoder.load(exported, threads=1), student)
    )
    for text in TEXTS[:30]:
        assert_same(ours.by_text(text, k=10), theirs.by_text(text, k=10))
    for picture in PICTURES:
        assert_same(ours.by_picture(picture, k=10), theirs.by_picture(picture, k=10))


def assert_same(ours, theirs):
    """The same names in the same order, but for rows whose scores differ by less than rounding."""
    assert np.allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=2e-6)
    scores = {hit.key: hit.score for hit in theirs}
    for left, right in zip(ours, theirs, strict=True):
        assert left.key == right.key or abs(scores.get(left.key, right.score) - right.score) < 4e-6


def test_a_text_tower_alone_searches_its_teachers_index(tmp_path):
    searches = SearchedTeacher("big", tiny_export.TEACHER)
    options = {"text": "nano", "dim": 16, "teacher_dim": 24, "text_init": "random", "texts": TEXTS, "seed": 5}
    student = build_query_student(**options, searches=searches)
    rows = tiny_export.unit(np.random.default_rng(0).standard_normal((40, 24))).astype(np.float32)
    probe = Probe.of(student, TEXTS, gallery=rows)
    export(student, tmp_path / "it", ("onnx",), ("fp32",), probe=probe)
    encoder = RuntimeEncoder.load(tmp_path / "it", threads=1)
    index = VectorIndex.build(rows, [f"row {number}" for number in range(40)], encoder=searches.fingerprint)
    assert (encoder.dim, encoder.searches) == (24, searches)
    asking = [Searcher(one, index) for one in (encoder, QuerySide(encoder), QuerySide(student))]
    for text in TEXTS[:30]:
        direct, wrapped, theirs = (searcher.by_text(text, k=5) for searcher in asking)
        assert direct == wrapped
        assert_same(direct, theirs)
    with pytest.raises(DataError, match="pictures are embedded by the teacher big"):
        encoder.encode_images([Picture("it", data=b"")])
