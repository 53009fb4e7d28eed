import numpy as np
import pytest
from oracles_retrieval import ToyEncoder, slow_top_k

from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Hit, QuerySide, Searcher
from clipdistill.towers.encoder import SearchedTeacher

NAMES = [f"c{i % 5}/{i}" for i in range(20)]
PICTURES = [Picture(origin=name, data=name.encode()) for name in NAMES]


@pytest.fixture
def searcher():
    encoder = ToyEncoder()
    vectors = encoder.encode_images(PICTURES)
    return Searcher(encoder, VectorIndex.build(vectors, NAMES, factory="Flat", encoder=encoder.fingerprint))


def wanted(searcher, query, k):
    gallery = searcher.encoder.encode_images(PICTURES)
    found = slow_top_k(query, gallery, k)[0]
    return [Hit(rank, NAMES[row], float(score)) for rank, (row, score) in enumerate(found, 1)]


def test_a_text_finds_what_exact_search_finds(searcher):
    hits = searcher.by_text("c3", 4)
    assert hits == wanted(searcher, searcher.encoder.encode_texts(["c3"]), 4)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert hits[0].key.startswith("c3/")


def test_a_picture_finds_itself_first(searcher):
    hits = searcher.by_picture(PICTURES[7], 3)
    assert hits == wanted(searcher, searcher.encoder.encode_images([PICTURES[7]]), 3)
    assert hits[0].key == NAMES[7]
    assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_more_hits_than_rows_are_all_rows(searcher):
    hits = searcher.by_text("c1", 1000)
    assert sorted(hit.key for hit in hits) == sorted(NAMES)
    assert np.all(np.diff([hit.score for hit in hits]) <= 0)


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_k_is_bounded(searcher, k):
    with pytest.raises(ValueError, match=f"from 1 to 1000: got {k}"):
        searcher.by_text("c1", k)
    with pytest.raises(ValueError, match=f"from 1 to 1000: got {k}"):
        searcher.by_picture(PICTURES[0], k)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(searcher, text):
    with pytest.raises(DataError, match="empty"):
        searcher.by_text(text)


def test_an_index_of_another_encoder_is_refused_naming_both(searcher):
    other = ToyEncoder(seed=1)
    with pytest.raises(MismatchError, match=f"expected {other.fingerprint}, found {searcher.encoder.fingerprint}"):
        Searcher(other, searcher.index)


class TextStudent:
    """Texts of another width than the teacher's, mapped by a fixed matrix."""

    def __init__(self, teacher, searches):
        self.searches, self.teacher_dim = searches, teacher.dim
        self._map = np.linalg.qr(np.random.default_rng(0).normal(size=(teacher.dim, teacher.dim)))[0].astype(np.float32)
        self._teacher = teacher

    def encode_texts(self, texts, batch=256):
        return self._teacher.encode_texts(texts) @ self._map

    def to_teacher_vectors(self, vectors, side):
        assert side == "text"
        return vectors @ self._map.T


def test_a_text_tower_alone_asks_in_its_teachers_space(searcher):
    teacher = searcher.encoder
    student = TextStudent(teacher, SearchedTeacher("toy", teacher.fingerprint))
    asking = QuerySide(student, teacher)
    assert (asking.dim, asking.fingerprint) == (teacher.dim, teacher.fingerprint)
    by_student = Searcher(asking, searcher.index)
    assert [hit.key for hit in by_student.by_text("c3", 4)] == [hit.key for hit in searcher.by_text("c3", 4)]
    assert by_student.by_picture(PICTURES[7], 3) == searcher.by_picture(PICTURES[7], 3)
    with pytest.raises(DataError, match="embedded by the teacher toy, which is not at hand"):
        Searcher(QuerySide(student), searcher.index).by_picture(PICTURES[7], 3)


def test_a_student_with_pictures_and_a_strange_teacher_do_not_ask_there(searcher):
    with pytest.raises(DataError, match="picture tower of its own"):
        QuerySide(TextStudent(searcher.encoder, None))
    strange = TextStudent(searcher.encoder, SearchedTeacher("other", "x" * 64))
    with pytest.raises(MismatchError, match="expected " + "x" * 64):
        QuerySide(strange, searcher.encoder)
    with pytest.raises(MismatchError, match="expected " + "x" * 64):
        Searcher(QuerySide(strange), searcher.index)
