import math

import numpy as np
import pytest

from clipdistill.core.errors import DataError
from clipdistill.evaluation import classification
from clipdistill.evaluation.classification import (
    Side,
    Verdicts,
    calibration_error,
    evaluate_classes,
    judge,
    reliability,
    selection_score,
)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_error(confidence, right, bins):
    """Guo et al. 2017, eq. 3, picture by picture: bin m holds ((m-1)/M, m/M]."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, value in enumerate(confidence) if (m - 1) / bins < value <= m / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


def slow_softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [value / sum(powers) for value in powers]


@pytest.fixture
def world():
    rng = np.random.default_rng(5)
    classes = unit(rng.normal(size=(9, 12)))
    truth = rng.integers(0, 9, 60)
    teacher = Side(unit(classes[truth] + 0.35 * rng.normal(size=(60, 12))), 20.0)
    student = Side(unit(teacher.images + 0.25 * rng.normal(size=(60, 12))), 11.0)
    return classes, truth, teacher, student


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_a_slow_loop_s(bins):
    rng = np.random.default_rng(bins)
    confidence, right = rng.uniform(0.05, 1, 500), (rng.random(500) < 0.6).astype(float)
    confidence[:3] = (1.0, 1 / 3, 0.2)  # on the bins' edges
    found = calibration_error(reliability(confidence, right, bins))
    assert found == pytest.approx(slow_error(confidence, right, bins), abs=1e-12)
    assert found > 0.05


def test_a_model_that_knows_how_much_it_knows_has_no_calibration_error():
    confidence, right = np.full(10, 0.7), np.array([1.0] * 7 + [0.0] * 3)
    assert calibration_error(reliability(confidence, right)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(reliability(np.full(10, 1.0), np.zeros(10))) == 1
    assert calibration_error(reliability(np.zeros(0), np.zeros(0))) == 0


def test_the_bins_hold_every_picture_once():
    bins = reliability(np.array([0.0, 1.0, 1 / 15, 0.5]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert [one.pictures for one in bins] == [2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert bins[1].confidence is None
    assert bins[14].accuracy == 1


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_verdicts_are_a_slow_loop_s_whatever_the_block(world, block, monkeypatch):
    monkeypatch.setattr(classification, "_BLOCK", block)
    classes, _, teacher, student = world
    found = judge(classes, teacher, student)
    for row in range(60):
        both = []
        for side, top, sure in (
            (teacher, found.teacher, found.teacher_confidence),
            (student, found.student, found.student_confidence),
        ):
            logits = [side.scale * float(np.dot(side.images[row], one)) for one in classes]
            shares = slow_softmax(logits)
            order = sorted(range(9), key=lambda number: (-logits[number], number))
            assert top[row].tolist() == order[:5]
            assert sure[row] == pytest.approx(max(shares), rel=1e-5)
            both.append(shares)
        slow = sum(p * math.log(p / q) for p, q in zip(*both, strict=True))
        assert found.divergence[row] == pytest.approx(slow, rel=1e-3, abs=1e-5)


def test_equal_classes_rank_in_their_order():
    classes = unit(np.array([[0, 1], [1, 0], [1, 0], [1, 0]]))
    side = Side(unit(np.array([[1, 0]])), 10.0)
    assert judge(classes, side, side).teacher.tolist() == [[1, 2, 3, 0]]


def test_a_set_s_figures_are_those_of_a_slow_loop(world):
    classes, truth, teacher, student = world
    verdicts = judge(classes, teacher, student)
    labels = [f"c{number}" for number in range(9)]
    found = evaluate_classes("test", labels, [f"class {number}" for number in range(9)], truth, verdicts)
    own, theirs = verdicts.student, verdicts.teacher
    rows = range(60)
    assert found.student.top1.value == pytest.approx(sum(own[i][0] == truth[i] for i in rows) / 60)
    assert found.student.top5.value == pytest.approx(sum(truth[i] in own[i] for i in rows) / 60)
    assert found.teacher.top1.value == pytest.approx(sum(theirs[i][0] == truth[i] for i in rows) / 60)
    assert found.agreement.value == pytest.approx(sum(own[i][0] == theirs[i][0] for i in rows) / 60)
    assert found.retention.value == pytest.approx(found.student.top1.value / found.teacher.top1.value)
    assert found.retention.low < found.retention.value < found.retention.high
    assert 0.2 < found.student.top1.value < found.teacher.top1.value < 1
    right = [float(own[i][0] == truth[i]) for i in rows]
    assert found.student.ece == pytest.approx(slow_error(verdicts.student_confidence, right, 15), abs=1e-12)
    for line in found.per_class:
        mine = [i for i in rows if truth[i] == int(line.label[1:])]
        assert line.pictures == len(mine)
        assert line.student == pytest.approx(sum(own[i][0] == truth[i] for i in mine) / len(mine))
        assert line.agreement == pytest.approx(sum(own[i][0] == theirs[i][0] for i in mine) / len(mine))
    assert sum(line.pictures for line in found.per_class) == 60
    assert found.to_json()["per_class"][0]["name"] == f"class {found.per_class[0].label[1:]}"


def test_the_teacher_as_its_own_student_keeps_everything(world):
    classes, truth, teacher, _ = world
    verdicts = judge(classes, teacher, teacher)
    found = evaluate_classes("test", ["a"] * 9, ["a"] * 9, truth, verdicts)
    assert found.agreement.value == found.retention.value == found.retention.low == found.retention.high == 1
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert found.student == found.teacher
    assert selection_score(verdicts) == 1


def test_with_few_classes_top_5_is_not_defined_and_neither_is_retention_of_nothing():
    classes = unit(np.eye(3))
    side = Side(unit(np.eye(3)), 5.0)
    found = evaluate_classes("a", list("abc"), list("abc"), np.array([1, 2, 0]), judge(classes, side, side))
    assert found.teacher.top1.value == 0
    assert found.teacher.top5.value is None
    assert (found.retention.value, found.retention.low, found.retention.high) == (None, None, None)


def test_pictures_without_a_class_are_no_set(world):
    classes, truth, teacher, student = world
    verdicts = judge(classes, teacher, student)
    with pytest.raises(DataError, match="far: pictures with a class are needed"):
        evaluate_classes("far", ["a"] * 9, ["a"] * 9, np.where(truth == 2, -1, truth), verdicts)
    with pytest.raises(DataError, match="none: pictures with a class are needed"):
        evaluate_classes("none", ["a"], ["a"], np.zeros(0, np.int64), verdicts)


def verdicts_with(agree, divergence):
    count = len(agree)
    ids = np.zeros((count, 1), np.int64)
    sure = np.full(count, 0.5)
    return Verdicts(ids, 1 - np.asarray(agree, np.int64)[:, None], sure, sure, np.full(count, divergence))


def test_agreement_chooses_and_divergence_decides_between_equals():
    better, worse = verdicts_with([1, 1, 0, 0], 1e6), verdicts_with([1, 0, 0, 0], 0.0)
    assert selection_score(better) > selection_score(worse)
    near, far = verdicts_with([1, 1, 0, 0], 0.1), verdicts_with([1, 1, 0, 0], 0.2)
    assert selection_score(near) > selection_score(far) > selection_score(better)
