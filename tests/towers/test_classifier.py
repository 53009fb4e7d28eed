import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import little

from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.towers.classifier import ClassHead, Classifier, class_vectors


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def head(count=4, dim=little.TEACHER_DIM, scale=30.0):
    labels = tuple(f"n{number}" for number in range(count))
    vectors = unit(np.random.default_rng(1).normal(size=(count, dim)))
    return ClassHead(labels, tuple(f"thing {number}" for number in range(count)), ("a {}",), vectors, scale)


@pytest.fixture(params=[16, little.TEACHER_DIM])
def classifier(request):
    student = little.student(dim=request.param)
    student.module.eval()
    return Classifier(student, head())


PICTURES = [Picture(f"memory {number}", data=tiny.image_bytes(number)) for number in range(5)]


def test_a_class_s_vector_is_the_mean_of_its_prompts_made_unit():
    rows = unit(np.random.default_rng(0).normal(size=(3, 5, 7)))
    found = class_vectors(rows)
    for number in range(3):
        mean = sum(rows[number][place].astype(float) for place in range(5)) / 5
        np.testing.assert_allclose(found[number], mean / np.sqrt((mean**2).sum()), atol=1e-6)


def test_probabilities_are_the_softmax_of_scaled_cosines(classifier):
    images = classifier.encoder.to_teacher_vectors(classifier.encoder.encode_images(PICTURES), "image")
    expected = torch.softmax(30.0 * torch.tensor(images).double() @ torch.tensor(classifier.head.vectors).double().T, 1)
    found = classifier.probabilities(PICTURES)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    guesses = classifier.classify(PICTURES)
    for row, guess in enumerate(guesses):
        assert guess.name == f"thing {int(found[row].argmax())}"
        assert guess.probability == found[row].max()
    name, probability = guesses[0]
    assert (name, probability) == guesses[0]


def test_no_pictures_have_no_classes(classifier):
    assert classifier.classify([]) == []
    assert classifier.probabilities([]).shape == (0, 4)


def test_it_comes_back_from_its_folder_and_reads_paths(classifier, tmp_path):
    classifier.encoder.save(tmp_path / "student")
    classifier.save(tmp_path / "student")
    again = Classifier.load(tmp_path / "student")
    assert again.head.labels == classifier.head.labels
    assert again.head.scale == 30.0
    assert again.fingerprint == classifier.fingerprint
    path = tmp_path / "a.png"
    path.write_bytes(tiny.image_bytes(2))
    assert again.classify([path, str(path)]) == classifier.classify([PICTURES[2]] * 2)
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        again.classify([tmp_path / "gone.png"])


def test_the_student_s_own_vectors_rank_the_classes_as_the_classifier_does(classifier, tmp_path):
    classifier.encoder.save(tmp_path / "student")
    classifier.save(tmp_path / "student")
    own = load_file(tmp_path / "student/classifier/classes.safetensors")["student_vectors"].numpy()
    assert own.shape == (4, classifier.encoder.dim)
    ranked = np.argsort(-(classifier.encoder.encode_images(PICTURES) @ own.T), axis=1)
    np.testing.assert_array_equal(ranked, np.argsort(-classifier.probabilities(PICTURES), axis=1))


def test_a_student_without_classes_another_s_classes_and_changed_files_are_refused(tmp_path):
    student = little.student()
    student.save(tmp_path / "student")
    with pytest.raises(DataError, match="classifier"):
        Classifier.load(tmp_path / "student")
    Classifier(student, head()).save(tmp_path / "student")
    (tmp_path / "student/classifier").rename(tmp_path / "kept")
    little.student(seed=9).save(tmp_path / "other")
    (tmp_path / "kept").rename(tmp_path / "other/classifier")
    with pytest.raises(MismatchError, match="encoder does not match"):
        Classifier.load(tmp_path / "other")
    Classifier(student, head()).save(tmp_path / "student")
    plain = tmp_path / "student/classifier/classes.json"
    plain.write_text(plain.read_text().replace("thing 1", "thing 7"))
    with pytest.raises(MismatchError, match="sha256"):
        Classifier.load(tmp_path / "student")
