from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from training import little

from clipdistill.core.errors import ConfigError
from clipdistill.training.batches import BatchMaker, TrainingData
from clipdistill.training.queue import Queue

PAIRS = tuple(tiny.pairs(14))
TEXTS = tuple(little.TEXTS[40:50])
DATA = TrainingData(PAIRS, (), (), TEXTS)
KEYS = [pair.key for pair in PAIRS]


def names(rows: torch.Tensor, candidates: list[str]) -> list[str]:
    """Which of the candidates each row is the teacher's row of."""
    table = np.stack([little.Teacher().row(name) for name in candidates])
    found = [np.flatnonzero((table == row).all(1)) for row in rows.numpy()]
    assert all(len(places) == 1 for places in found)
    return [candidates[int(places[0])] for places in found]


def queue(rows: int = 5, seed: int = 7, keys=KEYS, texts=TEXTS, *, images=True, sentences=True) -> Queue:
    return Queue(little.Teacher(), keys, texts, rows, seed, images=images, sentences=sentences)


def maker(data: TrainingData = DATA, queue_rows: int = 6, **train: object) -> BatchMaker:
    settings = little.settings(**({"batch": 4, "batch_texts": 2} | train))
    student = little.student()
    arguments = (student.preprocess, student.tokenizer, little.Teacher(data.pairs), data, settings, 7)
    return BatchMaker(*arguments, max_pixels=10**6, queue_rows=queue_rows)


def test_no_row_comes_again_before_the_steps_that_the_stored_rows_fill():
    found = [queue().draw(step) for step in range(40)]
    images = [names(each.images, [f"{key}#0" for key in KEYS]) for each in found]
    texts = [names(each.texts, list(TEXTS)) for each in found]
    for start in range(0, 40, 2):  # two steps of 5 fit into 14 pictures, and just into 10 texts
        assert len({*images[start], *images[start + 1]}) == 10
        assert {*texts[start], *texts[start + 1]} == set(TEXTS)
    assert {name for each in images for name in each} == {f"{key}#0" for key in KEYS}
    assert len({tuple(each) for each in texts}) == 40  # no order twice


def test_a_draw_is_a_function_of_seed_and_step_alone():
    one, used = queue(), queue()
    for step in (9, 0, 4):
        used.draw(step)
    for step in (0, 4, 9):
        assert torch.equal(one.draw(step).texts, used.draw(step).texts)
        assert torch.equal(one.draw(step).images, used.draw(step).images)
    assert not torch.equal(queue(seed=8).draw(0).texts, one.draw(0).texts)


def test_where_fewer_rows_are_stored_each_comes_once():
    drawn = queue(rows=4096).draw(3)
    assert (len(drawn.images), len(drawn.texts)) == (14, 10)
    assert len(set(names(drawn.texts, list(TEXTS)))) == 10


def test_a_modality_that_is_not_stored_has_an_empty_queue():
    drawn = queue(texts=[], images=False).draw(0)
    assert (drawn.images.shape, drawn.texts.shape) == ((5, little.TEACHER_DIM), (0, little.TEACHER_DIM))
    assert len(queue(keys=["one"]).draw(0).images) == 0  # a single row has nothing to be compared with


@pytest.mark.parametrize(
    "given",
    [{"texts": [], "sentences": False}, {"keys": [], "images": False}, {"texts": ["one"], "sentences": False}],
)
def test_a_queue_that_nothing_could_be_compared_with_is_refused(given):
    with pytest.raises(ConfigError, match=r"loss\.queue compares .* Add data of the other modality"):
        queue(**given)


def test_a_batch_brings_its_steps_queue_to_every_part_and_device():
    batch = maker().make_batch(2)
    captions = sorted({*TEXTS, *(caption for pair in PAIRS for caption in pair.captions)})
    assert len(set(names(batch.queue.images, [f"{key}#0" for key in KEYS]))) == 6
    assert len(set(names(batch.queue.texts, captions))) == 6
    for part in batch.parts(2):
        assert part.queue is batch.queue
    moved = batch.to(torch.device("meta")).queue
    assert moved.images.device.type == moved.texts.device.type == "meta"
    again = maker().make_batch(2)
    assert torch.equal(again.queue.texts, batch.queue.texts)


def test_without_queue_rows_there_is_no_queue_and_the_rest_is_the_same():
    plain, queued = maker(queue_rows=0).make_batch(1), maker().make_batch(1)
    assert plain.queue is None
    assert torch.equal(plain.pixels, queued.pixels)
    assert (plain.keys, plain.texts) == (queued.keys, queued.texts)


def test_a_queue_needs_the_other_modality_among_the_training_data():
    alone = replace(DATA, pairs=())
    with pytest.raises(ConfigError, match="the data have 0 pictures and 10 texts"):
        maker(alone, batch=0)
