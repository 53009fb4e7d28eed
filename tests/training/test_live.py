from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from training import little, live_teachers

from clipdistill.cache.store import Views
from clipdistill.core import fingerprint
from clipdistill.core.errors import DataError
from clipdistill.data.pictures import decode
from clipdistill.data.views import apply
from clipdistill.training import pictures
from clipdistill.training.batches import BatchMaker, TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def teacher(request, tmp_path_factory):
    return live_teachers.load(tmp_path_factory.mktemp("teachers") / request.param, request.param)


def maker(teacher, *, views=1, data=DATA, **train):
    student = little.student()
    return BatchMaker(
        student.preprocess,
        student.tokenizer,
        live_teachers.NoRows(data.pairs),
        data,
        little.settings(**train),
        5,
        max_pixels=10**6,
        live=live_teachers.live(teacher, views),
    )


def gradients(cache, objective, *, live=None, **train):
    """The logged losses of one step, and the gradient of every parameter that has one."""
    found, lines = {}, []

    def step(self, *arguments):
        for name, value in [*student.module.named_parameters(), *objective.named_parameters()]:
            if value.grad is not None:
                found[name] = value.grad.clone()

    student = little.student("test_vit")
    settings = little.settings(**({"steps": 1, "batch": 8, "grad_clip": 0.0} | train))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        distill(
            student, cache, DATA, objective=objective, train=settings, seed=5, live=live, on_log=lines.append
        )  # fmt: skip
    terms = {name: value for name, value in lines[0].items() if name in ("loss", *objective_terms(lines[0]))}
    return terms, found


def objective_terms(line):
    return [name for name in line if name in little_terms()]


def little_terms():
    return ("clip", "siglip", "affinity", "feature_image", "feature_text", "interactive")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 3e-3)])
def test_live_and_cached_with_one_fixed_view_give_the_same_loss_and_gradient(teacher, dtype, tolerance, tmp_path):
    cache = live_teachers.cached(tmp_path / "cache", teacher, PAIRS, dtype)
    stored, theirs = gradients(cache, live_teachers.objective(teacher))
    made, ours = gradients(
        live_teachers.NoRows(PAIRS), live_teachers.objective(teacher), live=live_teachers.live(teacher)
    )
    assert set(stored) == {"loss", *little_terms()}
    assert made == pytest.approx(stored, rel=tolerance, abs=tolerance)
    assert set(ours) == set(theirs)
    assert len(ours) > 30
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: n + text)


def test_the_accumulated_gradient_of_live_rows_is_the_whole_batchs(teacher):
    # Means over rows and a tower without batch norm: equal parts must give the whole's gradient.
    weights = {"feature_cosine": 1.0}
    found = [
        gradients(
            live_teachers.NoRows(PAIRS),
            live_teachers.objective(teacher, **weights),
            live=live_teachers.live(teacher, 2),
            accumulation=parts,
        )[1]
        for parts in (1, 2, 4)
    ]
    for name, value in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4)


def test_teacher_and_student_see_the_same_view_and_never_one_twice(teacher):
    student, drawn = little.student(), Views(2, 3)
    images = {pair.key: decode(pair.picture.read(), 10**6, pair.key) for pair in PAIRS}
    seen = set()
    for batch in itertools.islice(maker(teacher, views=2, batch=6, batch_images=6).batches(0, 6), 6):
        for row, key in enumerate(batch.keys):
            numbers = (number for number in range(1, 10) if number % 2 == (row < batch.pairs))
            for number in numbers:
                view = apply(images[key], drawn.of(key, number))
                if np.array_equal(student.preprocess(view), batch.pixels[row].numpy()):
                    break
            else:
                raise AssertionError(f"no view gives the picture {key}")
            torch.testing.assert_close(batch.teacher_inputs[0].pixels[row], teacher.transform(view), atol=0, rtol=0)
            assert (key, number) not in seen
            seen.add((key, number))
        assert torch.equal(batch.teacher_inputs[0].tokens, teacher.tokenizer(list(batch.texts)))
        assert batch.teacher_images.shape == (12, 0)
    assert len(seen) == 72


def test_one_view_is_always_the_whole_picture_decoded_once(teacher, monkeypatch):
    decoded = []
    monkeypatch.setattr(pictures, "decode", lambda data, *rest: decoded.append(1) or decode(data, *rest))
    student = little.student()
    made = BatchMaker(
        student.preprocess,
        student.tokenizer,
        live_teachers.NoRows(PAIRS),
        DATA,
        little.settings(batch=12),
        5,
        max_pixels=10**6,
        keep_bytes=1 << 24,
        live=live_teachers.live(teacher),
    )
    first, again = made.make_batch(0), made.make_batch(1)
    assert len(decoded) == 12
    order = [again.keys.index(key) for key in first.keys]
    assert torch.equal(first.teacher_inputs[0].pixels, again.teacher_inputs[0].pixels[order])
    assert first.teacher_inputs[0].pixels.shape == (12, 3, live_teachers.SIZE, live_teachers.SIZE)


def test_parts_and_unreadable_pictures_keep_the_teachers_input_in_line(teacher):
    data = TrainingData((*PAIRS[:5], little.broken("bad")), images=(little.broken("worse"), PAIRS[6]), texts=("a", "b"))
    batch = maker(teacher, views=2, data=data, batch=6, batch_images=4, batch_texts=4).make_batch(0)
    assert {row.key for row in batch.rejected} & {"bad", "worse"}
    (given,) = batch.teacher_inputs
    assert len(given.pixels) == len(batch.keys) < 10
    assert len(given.tokens) == len(batch.texts)
    for part in batch.to(torch.device("cpu")).parts(2):
        rows = [batch.keys.index(key) for key in part.keys]
        assert torch.equal(
            given.tokens[[batch.texts.index(text) for text in part.texts]], part.teacher_inputs[0].tokens
        )
        assert part.teacher_inputs[0].pixels.shape[0] == len(rows)


def test_a_batch_without_pictures_or_without_texts(teacher):
    for kinds in ({"batch_images": 3}, {"batch_texts": 3}):
        batch = maker(teacher, batch=0, **kinds).make_batch(0)
        rows = live_teachers.live(teacher).rows(batch)
        assert (len(rows.images), len(rows.texts)) == (len(batch.keys), len(batch.texts))
        assert rows.images.shape[1] == rows.texts.shape[1] == teacher.dim


def trained(teacher, folder=None, *, until=None, **train):
    """A live training with fresh views; killed after the line of a step where that is asked for."""

    def on_log(line):
        if line["step"] == until:
            raise KeyboardInterrupt

    student = little.student(drop=0.1)
    objective = live_teachers.objective(teacher)
    distill(
        student,
        live_teachers.NoRows(PAIRS),
        DATA,
        objective=objective,
        train=little.settings(**({"accumulation": 2} | train)),
        seed=5,
        folder=folder,
        on_log=on_log,
        live=live_teachers.live(teacher, 2),
    )
    return fingerprint.of_tensors({**student.module.state_dict(), **objective.state_dict()})


@pytest.mark.slow
def test_workers_and_a_stop_in_between_change_no_bit_and_the_teacher_stays(teacher, tmp_path):
    before = fingerprint.of_tensors(teacher.model.state_dict())
    whole = trained(teacher)
    assert trained(teacher, workers=2) == whole
    with pytest.raises(KeyboardInterrupt):
        trained(teacher, tmp_path, until=5)
    assert trained(teacher, tmp_path) == whole
    assert fingerprint.of_tensors(teacher.model.state_dict()) == before
    assert not teacher.model.training


def test_unreadable_pictures_of_a_live_run_are_not_blamed_on_a_cache(teacher):
    data = TrainingData(tuple(little.broken(f"bad{number}") for number in range(6)))
    with pytest.raises(DataError, match=r"6 of 6 pictures cannot be read.*: [^.]*\. See that the data are still there"):
        distill(
            little.student(),
            live_teachers.NoRows(),
            data,
            objective=live_teachers.objective(teacher),
            train=little.settings(),
            seed=1,
            live=live_teachers.live(teacher),
        )
