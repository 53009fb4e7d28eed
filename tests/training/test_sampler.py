from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from clipdistill.training.sampler import Draw, Stream, choose, seed_of


def rows(stream: Stream, first: int, last: int) -> list[int]:
    return [draw.row for step in range(first, last) for draw in stream.draw(step)]


def test_each_row_comes_exactly_once_an_epoch_and_every_batch_is_full():
    stream = Stream("batch", 10, 4, 5)
    batches = [stream.draw(step) for step in range(10)]  # 40 draws: 4 epochs, whose borders cut through batches
    assert all(len(batch) == 4 for batch in batches)
    drawn = [draw for batch in batches for draw in batch]
    for epoch in range(4):
        part = drawn[epoch * 10 : (epoch + 1) * 10]
        assert sorted(draw.row for draw in part) == list(range(10))
        assert {draw.turn for draw in part} == {epoch}
    assert len({tuple(draw.row for draw in drawn[e * 10 : e * 10 + 10]) for e in range(4)}) == 4


def test_a_step_does_not_depend_on_the_steps_before_it():
    straight = Stream("batch", 37, 8, 1)
    want = [straight.draw(step) for step in range(40)]
    for step in (39, 0, 17, 3, 39, 22):
        assert Stream("batch", 37, 8, 1).draw(step) == want[step]
    back = Stream("batch", 37, 8, 1)
    assert [back.draw(step) for step in reversed(range(40))] == want[::-1]


def test_a_batch_larger_than_the_data_goes_over_several_epochs():
    assert Counter(rows(Stream("batch", 3, 10, 0), 0, 3)) == {0: 10, 1: 10, 2: 10}


def test_names_and_seeds_make_independent_orders():
    orders = {tuple(rows(Stream(name, 50, 50, seed), 0, 1)) for name in ("batch", "batch_images") for seed in (0, 1, 2)}
    assert len(orders) == 6


def test_the_order_is_frozen():
    # A resumed run must find the order that the killed one had, whatever versions of numpy came in between.
    assert rows(Stream("batch", 8, 8, 17), 0, 1) == [5, 4, 0, 2, 7, 1, 3, 6]


def test_the_order_is_uniform():
    firsts = Counter(rows(Stream("batch", 5, 1, seed), 0, 1)[0] for seed in range(2000))
    expected = 2000 / 5
    assert sum((count - expected) ** 2 / expected for count in firsts.values()) < 18.5  # chi-square, 4 degrees, p=0.001


def test_weights_decide_how_often_rows_come():
    weights = [1.0] * 6 + [3.0] * 2  # shares of 8 draws: 2/3 and 2
    stream = Stream("batch", 8, 4, 9, weights)
    counts = Counter(rows(stream, 0, 600))  # 300 epochs
    for row in range(6):
        assert counts[row] == pytest.approx(200, abs=25)
    assert counts[6] == counts[7] == 600  # a whole share is met in every epoch
    for epoch in range(20):
        once = Counter(rows(stream, 2 * epoch, 2 * epoch + 2))
        assert all(once[row] <= 1 for row in range(6))


def test_weighted_neighbours_are_not_drawn_by_turns():
    stream = Stream("batch", 40, 40, 3, [1.0] * 20 + [3.0] * 20)  # the first half has shares of 1/2
    together = sum({0, 1} <= set(rows(stream, epoch, epoch + 1)) for epoch in range(400))
    assert 50 < together < 150  # about 1/4 of the epochs; a plain systematic pass would give none


def test_weighted_draws_are_a_pure_function_of_the_step_too():
    weights = [0.5, 1.0, 2.5, 4.0, 0.1]
    want = [Stream("batch", 5, 3, 2, weights).draw(step) for step in range(30)]
    stream = Stream("batch", 5, 3, 2, weights)
    assert [stream.draw(step) for step in range(30)] == want


def test_turns_of_a_row_rise_by_one_where_its_share_is_whole():
    stream = Stream("batch", 4, 4, 2, [3.0, 1.0, 1.0, 3.0])  # shares 1.5, 0.5, 0.5, 1.5
    whole = Stream("batch", 4, 4, 2, [2.0, 2.0, 2.0, 2.0])
    turns = [draw.turn for step in range(5) for draw in whole.draw(step) if draw.row == 0]
    assert turns == [0, 1, 2, 3, 4]
    seen: dict[int, list[int]] = {}
    for step in range(50):
        for draw in stream.draw(step):
            seen.setdefault(draw.row, []).append(draw.turn)
    assert all(len(set(turns)) == len(turns) for turns in seen.values())


def test_equal_weights_are_the_same_as_none():
    assert Stream("batch", 9, 4, 0, [2.0] * 9).draw(3) == Stream("batch", 9, 4, 0).draw(3)


def test_choices_go_round_from_a_start_that_depends_on_the_names():
    for count in (1, 2, 5):
        for key in ("a", "b", "c"):
            chosen = [choose(count, turn, 1, "caption", key) for turn in range(count * 3)]
            assert chosen == chosen[:count] * 3
            assert sorted(chosen[:count]) == list(range(count))
    starts = Counter(choose(4, 0, 1, "caption", f"key {number}") for number in range(1000))
    assert set(starts) == {0, 1, 2, 3}
    assert min(starts.values()) > 200


def test_names_with_characters_that_utf8_lacks_are_taken():
    assert choose(3, 0, "caf\udce9") in (0, 1, 2)


def test_seeds_fit_a_torch_generator():
    seeds = {seed_of(1, "step", step) for step in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_epoch_is_shuffled_once(monkeypatch):
    stream = Stream("batch", 100, 10, 0)
    calls = []
    shuffled = stream._shuffled
    monkeypatch.setattr(stream, "_shuffled", lambda epoch: calls.append(epoch) or shuffled(epoch))
    for step in range(25):
        stream.draw(step)
    assert calls == [0, 1, 2]


def test_epochs_are_counted_in_draws():
    stream = Stream("batch", 10, 4, 0)
    assert (stream.epoch(0), stream.epoch(5)) == (0, 2)
    assert isinstance(stream.draw(0)[0], Draw)
    assert np.isclose(stream.epoch(1), 0.4)
