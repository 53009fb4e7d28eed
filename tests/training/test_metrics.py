from __future__ import annotations

import json
import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdistill.training.metrics import Clock, Metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_go_to_the_file_the_events_and_the_caller(tmp_path):
    seen = []
    with Metrics(tmp_path, 0, seen.append) as metrics:
        metrics.write({"step": 10, "loss": torch.tensor(0.5), "keys": ["a"]})
        assert lines(tmp_path) == [{"step": 10, "loss": 0.5, "keys": ["a"]}]  # at once, not at the end
        metrics.write({"step": 20, "loss": math.nan})
    assert seen == lines(tmp_path) == [{"step": 10, "loss": 0.5, "keys": ["a"]}, {"step": 20, "loss": None}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5)]


def test_without_a_folder_only_the_caller_hears():
    seen = []
    with Metrics(None, 0, seen.append) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
        metrics.sync()
    assert seen == [{"step": 1, "loss": 1.0}]


def test_going_on_cuts_off_later_lines_and_half_a_line(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in (10, 20, 20, 30):
            metrics.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with Metrics(tmp_path, 20) as metrics:
        metrics.write({"step": 30, "loss": 31.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 10), (20, 20), (20, 20), (30, 31)]
    seconds = [path.name.split(".")[3] for path in (tmp_path / "tensorboard").iterdir()]
    assert len(set(seconds)) == 2  # files of one second would be read in any order
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[-1].value == 31.0
    assert len([event for event in events.Scalars("loss") if event.step == 30]) == 1


def test_the_clock_tells_data_from_compute_and_starts_again_when_read():
    clock = Clock()
    assert list(clock.timed(iter("abc"))) == ["a", "b", "c"]
    with clock.measure("compute", 4):
        pass
    first = clock.read()
    assert first["samples_per_s"] > 0
    assert first["data_seconds"] > 0
    assert clock.read() == {"samples_per_s": 0.0, "data_seconds": 0.0, "compute_seconds": 0.0}
