"""The queue in front of a tower: what is put together, what is refused, and whose fault is whose."""

import asyncio
import threading
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from little_service import COLOURS, ColourEncoder, gallery, picture, searcher

from clipdistill.core.errors import DataError
from clipdistill.serve.app import create_app
from clipdistill.serve.batching import Batcher
from clipdistill.serve.options import Options
from clipdistill.serve.problems import BusyError
from clipdistill.serve.workers import Gate


class Tower:
    """Encodes a number as itself; a negative one is refused; a closed gate holds it up."""

    def __init__(self):
        self.batches, self.open = [], threading.Event()
        self.open.set()

    def __call__(self, items):
        assert self.open.wait(10)
        self.batches.append(list(items))
        if min(items) < 0:
            raise DataError(f"{min(items)} is below 0")
        return np.array(items, np.float32)[:, None]


def batcher(tower, *, batch=4, window_s=0.5, waiting=8, seen=None):
    queued, encoded = (seen.append if seen is not None else lambda _: None), lambda items, seconds: None
    return Batcher(tower, batch=batch, window_s=window_s, waiting=waiting, encoded=encoded, queued=queued)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def held(made, tower, *requests):
    """Ask while the tower is held up by a first request, and let it go once all wait."""
    tower.open.clear()
    first = asyncio.create_task(made.encode([0]))
    await until(lambda: made._count == 0 and made._queue is not None)
    await asyncio.sleep(0.01)
    asked = [asyncio.create_task(made.encode(items)) for items in requests]
    await until(lambda: made._count == sum(map(len, requests)))
    tower.open.set()
    await first
    return await asyncio.gather(*asked, return_exceptions=True)


def test_a_lone_request_does_not_wait_for_company():
    async def run():
        tower = Tower()
        async with batcher(tower, window_s=3600) as made, asyncio.timeout(60):
            for number in range(3):
                assert (await made.encode([number]))[0, 0] == number
        assert tower.batches == [[0], [1], [2]]

    asyncio.run(run())


def test_requests_that_gather_are_one_batch_and_each_gets_its_own_rows():
    async def run():
        tower, seen = Tower(), []
        async with batcher(tower, seen=seen) as made:
            one, two, three, four = await held(made, tower, [1, 2], [3], [4, 5, 6], [7])
        assert [r[:, 0].tolist() for r in (one, two, three, four)] == [[1, 2], [3], [4, 5, 6], [7]]
        assert tower.batches == [[0], [1, 2, 3], [4, 5, 6, 7]]  # never split, never above the batch
        assert (max(seen), seen[-1]) == (7, 0)

    asyncio.run(run())


def test_after_a_crowd_the_next_request_waits_the_window_at_most():
    async def run():
        tower = Tower()
        async with batcher(tower, window_s=0.15, batch=3) as made:
            await held(made, tower, [1], [2])
            early = asyncio.create_task(made.encode([3]))
            await asyncio.sleep(0.02)
            await asyncio.gather(early, made.encode([4]))
            assert tower.batches[-1] == [3, 4]
            five = asyncio.create_task(made.encode([5]))
            await asyncio.sleep(0)
            assert (made._count, made._timer is not None) == (1, True)
            await five  # nobody comes: the window ends
            six = asyncio.create_task(made.encode([6]))
            await asyncio.sleep(0)
            assert (made._count, made._timer) == (0, None)  # the last came alone: this one is not held up
            await six
            assert tower.batches[-2:] == [[5], [6]]

    asyncio.run(run())


def test_one_requests_fault_is_not_its_neighbours():
    async def run():
        tower = Tower()
        async with batcher(tower) as made:
            good, bad, other = await held(made, tower, [1], [-2], [3, 4])
            assert (good[0, 0], other[:, 0].tolist()) == (1, [3, 4])
            assert isinstance(bad, DataError)
            assert (await made.encode([5]))[0, 0] == 5

    asyncio.run(run())


def test_what_finds_no_room_is_refused_at_once_and_the_rest_is_served():
    async def run():
        tower = Tower()
        async with batcher(tower, waiting=3) as made:
            tower.open.clear()
            first = asyncio.create_task(made.encode([0]))
            await until(lambda: made._count == 0)
            await asyncio.sleep(0.01)
            waits = asyncio.create_task(made.encode([1, 2]))
            await until(lambda: made._count == 2)
            with pytest.raises(BusyError) as fault:
                await made.encode([3, 4])
            assert int(fault.value.headers["Retry-After"]) >= 1
            tower.open.set()
            assert (await waits)[:, 0].tolist() == [1, 2]
            await first

    asyncio.run(run())


def test_a_client_that_gave_up_is_not_encoded_and_leaving_finishes_what_waits():
    async def run():
        tower = Tower()
        made = batcher(tower)
        async with made:
            tower.open.clear()
            first = asyncio.create_task(made.encode([0]))
            await until(lambda: made._count == 0)
            await asyncio.sleep(0.01)
            gone, stays = asyncio.create_task(made.encode([1])), asyncio.create_task(made.encode([2]))
            await until(lambda: made._count == 2)
            gone.cancel()
            await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.05, tower.open.set)
        assert (await first)[0, 0] == 0
        assert (await stays)[0, 0] == 2
        assert tower.batches == [[0], [2]]

    asyncio.run(run())


def test_an_encoder_that_makes_too_few_rows_fails_its_request_and_not_the_service():
    async def run():
        async with batcher(lambda items: np.zeros((1, 1), np.float32)) as made:
            with pytest.raises(RuntimeError, match="1 rows of 2 items"):
                await made.encode([1, 2])
            assert (await made.encode([1])).shape == (1, 1)

    asyncio.run(run())


def test_the_gate_bounds_what_runs_and_what_waits():
    async def run():
        open_, running = threading.Event(), []

        def work(number):
            running.append(number)
            assert open_.wait(10)
            return number

        with Gate(2, 3) as gate:
            await bounded(gate, open_, running, work)

    async def bounded(gate, open_, running, work):
        tasks = [asyncio.create_task(gate.run(work, number)) for number in range(3)]
        await until(lambda: len(running) == 2)
        with pytest.raises(BusyError):
            gate.admit()
        late = asyncio.create_task(gate.run(work, 3))  # it was let in before, and is not turned out now
        await asyncio.sleep(0.01)
        assert len(running) == 2
        open_.set()
        assert await asyncio.gather(*tasks, late) == [0, 1, 2, 3]
        gate.admit()

    asyncio.run(run())


def test_over_http_a_full_queue_is_503_with_retry_after_and_the_waiting_are_answered(tmp_path):
    folder = gallery(tmp_path / "goods", each=1)
    made = searcher(folder, ColourEncoder())
    options = Options(waiting=2, inputs=2, batch=2)
    with TestClient(create_app(made, options), raise_server_exceptions=False) as client:
        made.encoder.open.clear()
        answers = []

        def ask():
            answers.append(client.post("/search", json={"text": "red"}))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        threads[0].start()
        assert made.encoder.entered.wait(10)  # the first is being encoded: two find room to wait, three do not
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 10
        while sum(a.status_code == 503 for a in list(answers)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        made.encoder.open.set()
        for thread in threads:
            thread.join(20)
        full = [answer for answer in answers if answer.status_code == 503]
        assert len(full) == 3
        assert sum(answer.status_code == 200 for answer in answers) == 3
        for answer in full:
            assert answer.headers["content-type"] == "application/problem+json"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert max(items for _, items in made.encoder.batches) <= 2


def test_bad_pictures_in_a_batch_leave_the_good_ones_alone(tmp_path):
    folder = gallery(tmp_path / "goods", each=1)
    made = searcher(folder, ColourEncoder())
    cut = picture(COLOURS["red"])[:-40]  # its header is whole: only the decoder notices
    with TestClient(create_app(made), raise_server_exceptions=False) as client:
        made.encoder.open.clear()
        found = {}

        def ask(name, data):
            found[name] = client.post("/search?k=1", content=data, headers={"Content-Type": "image/png"})

        asked = {"first": picture(COLOURS["red"]), "good": picture(COLOURS["blue"]), "bad": cut}
        threads = [threading.Thread(target=ask, args=each) for each in asked.items()]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        made.encoder.open.set()
        for thread in threads:
            thread.join(20)
        assert {name: answer.status_code for name, answer in found.items()} == {"first": 200, "good": 200, "bad": 422}
        assert found["good"].json()["hits"][0]["key"] == "goods/blue/0.png"
