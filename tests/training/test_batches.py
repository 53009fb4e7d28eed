from __future__ import annotations

import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from training import little

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair, Picture
from clipdistill.data.views import apply
from clipdistill.towers.preprocess import Preprocess
from clipdistill.training.batch import Batch
from clipdistill.training.batches import BatchMaker, TrainingData

PAIRS = tuple(tiny.pairs(14))
IMAGES = tuple(Pair(f"more/{pair.key}", pair.picture, ()) for pair in tiny.pairs(5, 40))
TEXTS = ("a lone text", "another one", PAIRS[0].captions[0])
DATA = TrainingData(PAIRS, (), IMAGES, TEXTS)
PREPROCESS = Preprocess(size=(32, 32))
TOKENIZER = little.tokenizer()


def maker(
    data: TrainingData = DATA, *, views: int = 1, seed: int = 7, keep_bytes: int = 0, **train: object
) -> BatchMaker:
    settings = little.settings(**({"batch": 4, "batch_images": 3, "batch_texts": 2} | train))
    teacher = little.Teacher((*data.pairs, *data.images), views)
    return BatchMaker(PREPROCESS, TOKENIZER, teacher, data, settings, seed, max_pixels=10**6, keep_bytes=keep_bytes)


def assert_same(one: Batch, two: Batch) -> None:
    for name in ("pixels", "tokens", "teacher_images", "teacher_texts", "positives"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert (one.step, one.pairs, one.keys, one.texts, one.rejected) == (
        two.step,
        two.pairs,
        two.keys,
        two.texts,
        two.rejected,
    )


def view_of(batch: Batch, row: int, views: int) -> int:
    """The view that a row's teacher vector belongs to."""
    teacher = little.Teacher()
    (number,) = [
        number
        for number in range(views)
        if np.array_equal(teacher.row(f"{batch.keys[row]}#{number}"), batch.teacher_images[row].numpy())
    ]
    return number


def test_a_batch_holds_what_it_says():
    by_key = {pair.key: pair for pair in (*PAIRS, *IMAGES)}
    teacher = little.Teacher()
    made = maker(views=3)
    for step in range(8):
        batch = made.make_batch(step)
        assert (batch.step, batch.pairs, batch.samples, batch.rejected) == (step, 4, 9, ())
        assert batch.pixels.shape == (7, 3, 32, 32)
        assert batch.pixels.dtype == torch.float32
        for row in range(4):
            assert batch.texts[row] in by_key[batch.keys[row]].captions
        for row, key in enumerate(batch.keys):
            number = view_of(batch, row, 3)  # the teacher's row and the student's picture are of one view
            image = Image.open(io.BytesIO(by_key[key].picture.read()))
            seen = PREPROCESS(apply(image, teacher.view(key, number)))
            assert np.array_equal(batch.pixels[row].numpy(), seen)
        assert np.array_equal(batch.teacher_texts.numpy(), teacher.text_rows(batch.texts))
        assert np.array_equal(batch.tokens.numpy(), TOKENIZER.encode(batch.texts, cut=True))


def test_every_kind_of_rows_goes_through_all_its_data():
    made = maker()
    batches = [made.make_batch(step) for step in range(40)]
    paired = [key for batch in batches for key in batch.keys[:4]]
    assert sorted(paired[:14]) == sorted(pair.key for pair in PAIRS)
    more = [key for batch in batches for key in batch.keys[4:]]
    assert sorted(more[:19]) == sorted(pair.key for pair in (*PAIRS, *IMAGES))
    texts = [text for batch in batches for text in batch.texts[4:]]
    unique = {*TEXTS, *(text for pair in PAIRS for text in pair.captions)}
    assert sorted(texts[: len(unique)]) == sorted(unique)
    for pair in PAIRS:  # captions take turns
        shown = [batch.texts[batch.keys.index(pair.key)] for batch in batches if pair.key in batch.keys[:4]]
        assert {shown[0], shown[1]} == set(pair.captions)
        assert shown[0] == shown[2]


def test_views_take_turns_and_meet_every_caption():
    made = maker(TrainingData(PAIRS), views=2, batch=14, batch_images=0, batch_texts=0)
    met = set()
    for step in range(4):
        batch = made.make_batch(step)
        row = batch.keys.index(PAIRS[0].key)
        met.add((batch.texts[row], view_of(batch, row, 2)))
    assert len(met) == 4


def test_a_step_does_not_depend_on_the_steps_before_it():
    made = maker(views=2)
    want = [made.make_batch(step) for step in range(10)]
    for step in (9, 0, 4):
        assert_same(maker(views=2).make_batch(step), want[step])
    assert [batch.keys for batch in want] != [maker(views=2, seed=8).make_batch(step).keys for step in range(10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    data = TrainingData((*PAIRS, little.broken("bad")), (), IMAGES, TEXTS)
    state = torch.get_rng_state()
    alone = list(maker(data, views=2).batches(3, 9))
    helped = list(maker(data, views=2).batches(3, 9, workers))
    assert [batch.step for batch in helped] == [3, 4, 5, 6, 7, 8]
    assert any(batch.rejected for batch in alone)
    for one, two in zip(alone, helped, strict=True):
        assert_same(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("keep_bytes", [1 << 20, 10 * 32 * 32 * 3])
def test_kept_pictures_change_nothing_and_are_read_once(keep_bytes, monkeypatch):
    reads = []
    read = Picture.read
    monkeypatch.setattr(Picture, "read", lambda self: reads.append(self.origin) or read(self))
    kept, fresh = maker(keep_bytes=keep_bytes), maker()
    for step in range(12):
        assert_same(kept.make_batch(step), fresh.make_batch(step))
    reads.clear()
    for step in range(12, 24):
        kept.make_batch(step)
    total = 12 * 7
    if keep_bytes == 1 << 20:
        assert reads == []
    else:
        assert 0 < len(reads) < total  # ten pictures are kept, the others are read again


def test_kept_pictures_are_whole_ones_only():
    kept, fresh = maker(views=3, keep_bytes=1 << 20), maker(views=3)
    for step in range(30):
        assert_same(kept.make_batch(step), fresh.make_batch(step))


def test_a_shared_caption_is_positive_for_both_pictures():
    one, two, three = PAIRS[:3]
    data = TrainingData(
        (Pair("a", one.picture, ("same",)), Pair("b", two.picture, ("same",)), Pair("c", three.picture, ("own",)))
    )
    batch = maker(data, batch=3, batch_images=0, batch_texts=0).make_batch(0)
    order = {key: row for row, key in enumerate(batch.keys)}
    want = torch.eye(3, dtype=torch.bool)
    want[order["a"], order["b"]] = want[order["b"], order["a"]] = True
    assert torch.equal(batch.positives, want)


def test_another_caption_of_the_same_picture_is_a_positive():
    data = TrainingData(PAIRS[:2])
    batch = maker(data, batch=4, batch_images=0, batch_texts=0).make_batch(0)  # two epochs, so both captions of each
    for i, key in enumerate(batch.keys):
        captions = next(pair.captions for pair in PAIRS if pair.key == key)
        for j, text in enumerate(batch.texts):
            assert bool(batch.positives[i, j]) == (text in captions)
    assert int(batch.positives.sum()) == 8


def test_a_picture_that_cannot_be_decoded_takes_its_text_with_it():
    data = TrainingData((*PAIRS[:3], little.broken("bad")), (), IMAGES[:2])
    made = maker(data, batch=4, batch_images=6)
    batch = made.make_batch(0)
    assert batch.pairs == 3
    assert sorted(batch.keys[:3]) == sorted(pair.key for pair in PAIRS[:3])
    assert "caption of bad" not in batch.texts[:3]
    assert batch.positives.shape == (3, 3)
    assert len(batch.keys) == len(batch.pixels) == len(batch.teacher_images) == 3 + 5
    assert len(batch.texts) == len(batch.tokens) == len(batch.teacher_texts) == 3 + 2
    assert [(bad.key, bad.origin) for bad in batch.rejected] == [("bad", "broken bad")] * 2
    assert "broken" in batch.rejected[0].reason


def test_a_batch_of_nothing_but_broken_pictures_is_empty():
    made = maker(TrainingData((little.broken("bad"),)), batch=1, batch_images=0, batch_texts=0)
    batch = made.make_batch(0)
    assert batch.pixels.shape == (0, 3, 32, 32)
    assert batch.teacher_images.shape == (0, little.TEACHER_DIM)
    assert (batch.pairs, len(batch.tokens), len(batch.rejected)) == (0, 0, 1)


def test_a_missing_file_is_a_rejection(tmp_path):
    path = tmp_path / "gone.png"
    path.write_bytes(tiny.image_bytes(1))
    gone = Pair("gone", Picture("gone.png", path=path), ("caption",))
    made = maker(TrainingData((*PAIRS[:2], gone)), batch=3, batch_images=0, batch_texts=0)
    path.unlink()
    batch = made.make_batch(0)
    assert [bad.reason for bad in batch.rejected] == ["unreadable file: No such file or directory"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changed_since_the_cache_was_made_is_refused_by_key(tmp_path, workers):
    path = tmp_path / "picture.png"
    path.write_bytes(tiny.image_bytes(1))
    pair = Pair("row/1", Picture("picture.png", path=path), ("caption",))
    made = maker(TrainingData((pair,)), batch=1, batch_images=0, batch_texts=0)
    made.make_batch(0)
    path.write_bytes(tiny.image_bytes(2))
    with pytest.raises(MismatchError, match=r"row/1 \(picture\.png\).*changed since the cache was made"):
        list(made.batches(0, 2, workers))


def test_only_what_is_asked_for_is_in_a_batch():
    texts = maker(batch=0, batch_images=0, batch_texts=5).make_batch(3)
    assert (texts.pairs, texts.keys, len(texts.texts)) == (0, (), 5)
    assert texts.pixels.shape == (0, 3, 32, 32)
    images = maker(TrainingData((), (), IMAGES), batch=0, batch_images=5, batch_texts=0).make_batch(3)
    assert (images.pairs, len(images.keys), images.texts) == (0, 5, ())
    assert images.tokens.shape == (0, 1)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (TrainingData((), (), IMAGES, TEXTS), "train.batch"),
        (TrainingData((), (), (), TEXTS), "train.batch_images"),
        (TrainingData((), (), IMAGES, ()), "train.batch_texts"),
    ],
)
def test_rows_that_the_data_do_not_have_are_refused(data, field):
    wanted = {"batch": 0, "batch_images": 0, "batch_texts": 0, field.removeprefix("train."): 2}
    with pytest.raises(ConfigError, match=rf"{field}: 2 "):
        maker(data, **wanted)


def test_pairs_with_a_hole_are_refused():
    for pair in (Pair("no picture", None, ("text",)), Pair("no caption", PAIRS[0].picture, ())):
        with pytest.raises(DataError, match=pair.key):
            maker(TrainingData((*PAIRS, pair)))


@pytest.mark.parametrize("weights", [(1.0,), (1.0,) * 13 + (0.0,)])
def test_weights_must_be_one_above_zero_for_each_pair(weights):
    with pytest.raises(DataError, match="weights for 14 pairs"):
        maker(TrainingData(PAIRS, weights))


def test_weights_reach_the_sampler():
    made = maker(TrainingData(PAIRS[:2], (3.0, 1.0)), batch=2, batch_images=0, batch_texts=0)
    keys = [key for step in range(40) for key in made.make_batch(step).keys]
    assert keys.count(PAIRS[0].key) == pytest.approx(60, abs=3)


def test_weights_of_unpaired_rows_reach_the_sampler():
    data = TrainingData(PAIRS[:2], (2.0, 2.0), IMAGES[:2], TEXTS[:2], (6.0, 2.0), (1.0, 5.0))
    made = maker(data, batch=0, batch_images=6, batch_texts=6)
    batches = [made.make_batch(step) for step in range(40)]
    keys, texts = [key for batch in batches for key in batch.keys], [text for batch in batches for text in batch.texts]
    captions = {text for pair in PAIRS[:2] for text in pair.captions}
    for key, weight in {IMAGES[0].key: 6, IMAGES[1].key: 2, PAIRS[0].key: 2, PAIRS[1].key: 2}.items():
        assert keys.count(key) == pytest.approx(240 * weight / 12, abs=3)
    assert not captions & set(TEXTS[:2])
    for text, weight in {TEXTS[0]: 1, TEXTS[1]: 5, **dict.fromkeys(captions, 2)}.items():
        assert texts.count(text) == pytest.approx(240 * weight / (6 + 2 * len(captions)), abs=8)


def test_a_row_of_several_sources_has_the_largest_of_its_weights():
    twice = (PAIRS[0], IMAGES[0])
    data = TrainingData(PAIRS[:1], (4.0,), twice, (*PAIRS[0].captions[:1], "alone"), (1.0, 1.0), (1.0, 4.0))
    made = maker(data, batch=0, batch_images=5, batch_texts=len({*PAIRS[0].captions, "alone"}))
    batches = [made.make_batch(step) for step in range(20)]
    keys, texts = [key for batch in batches for key in batch.keys], [text for batch in batches for text in batch.texts]
    assert keys.count(PAIRS[0].key) == pytest.approx(80, abs=2)
    assert texts.count("alone") == texts.count(PAIRS[0].captions[0]) == 20


@pytest.mark.parametrize("kind", ["image_weights", "text_weights"])
def test_weights_of_unpaired_rows_must_be_one_above_zero_for_each(kind):
    with pytest.raises(DataError, match="1 weights for"):
        maker(TrainingData(PAIRS, (), IMAGES, TEXTS, **{kind: (1.0,)}))


@pytest.mark.parametrize("count", [2, 3])
def test_parts_share_out_every_kind_of_rows(count):
    batch = maker(batch=6, batch_images=3, batch_texts=4).make_batch(0)
    parts = list(batch.parts(count))
    assert len(parts) == count
    assert [key for part in parts for key in part.keys[: part.pairs]] == list(batch.keys[:6])
    assert [key for part in parts for key in part.keys[part.pairs :]] == list(batch.keys[6:])
    assert [text for part in parts for text in part.texts[part.pairs :]] == list(batch.texts[6:])
    for part in parts:
        assert part.pairs == 6 // count
        for name in ("pixels", "teacher_images"):
            assert len(getattr(part, name)) == len(part.keys)
        for row, key in enumerate(part.keys[: part.pairs]):
            assert torch.equal(part.pixels[row], batch.pixels[batch.keys.index(key)])
            assert torch.equal(part.teacher_texts[row], batch.teacher_texts[batch.texts.index(part.texts[row])])
        rows = [batch.keys.index(key) for key in part.keys[: part.pairs]]
        assert torch.equal(part.positives, batch.positives[rows][:, rows])


def test_parts_are_never_without_rows_of_a_kind():
    batch = maker(batch=6, batch_images=2, batch_texts=0).make_batch(0)
    assert [len(part.keys) - part.pairs for part in batch.parts(5)] == [1, 1]
    assert list(batch.parts(1)) == [batch]


def test_epochs_are_those_of_the_pairs_or_of_what_there_is():
    assert maker(batch=7).epoch(4) == 2
    assert maker(batch=0, batch_images=19, batch_texts=1).epoch(3) == 3
