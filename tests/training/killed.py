"""Trains in processes of their own that die by SIGKILL; run as a script, so that the killed ones are real processes.

Usage: ``killed.py FOLDER CUT...``: for each cut a training in ``FOLDER/CUT`` is started and killed there. A cut is the
name of a moment (``line-5``: after the metrics' line of step 5; ``torn-4``: while the checkpoint of step 4 is written;
``best-6``: between the best student's folder of step 6 and its manifest), or ``outside-3``: by another process, at any
moment after the line of step 3.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import tiny
import torch.utils.tensorboard  # noqa: F401 - once, and not in every process
from training import little

from clipdistill.core import files
from clipdistill.training import checkpoint, folder
from clipdistill.training.batches import TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(20))
DATA = TrainingData(PAIRS, tuple([1.0] * 10 + [2.0] * 10), (), tuple(little.TEXTS[40:60]))


def train(path, **arguments):
    """The training that is killed, resumed, and compared."""
    settings = little.settings(
        steps=10, batch=6, batch_texts=4, batch_images=2, accumulation=2, ema=0.9, log_every=1, eval_every=3
    )
    scores = {3: 0.2, 6: 0.5, 9: 0.5, 10: 0.1}  # the best is that of step 6
    student = little.student(drop=0.2)
    objective = little.objective()
    arguments.setdefault("on_eval", lambda student, step: {"score": scores[step]})
    trained = distill(
        student,
        little.Teacher(PAIRS, views=2),
        DATA,
        objective=objective,
        train=settings,
        seed=5,
        folder=path,
        fingerprint="run",
        **arguments,
    )
    return trained, objective


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(path: Path, cut: str) -> None:
    moment, step = cut.split("-")[0], int(cut.split("-")[1])
    if moment == "torn":
        save_file = checkpoint.save_file

        def torn(tensors, to):
            save_file(tensors, to)
            if f"step-{step:08d}" in str(to) and to.name.startswith("optimizer"):
                die()

        checkpoint.save_file = torn
    if moment == "best":
        write_json = files.write_json

        def between(to, value):
            if to.name == folder.BEST_MANIFEST and value["step"] == step:
                die()
            write_json(to, value)

        files.write_json = between
    train(path, on_log=lambda line: die() if moment == "line" and line["step"] == step else None)


def main(root: Path, cuts: list[str]) -> None:
    for cut in cuts:
        child = os.fork()
        if child == 0:
            train_until(root / cut, cut)
            os._exit(0)
        if cut.startswith("outside"):
            lines = root / cut / "metrics.jsonl"
            while not lines.exists() or f'"step": {cut.split("-")[1]}, ' not in lines.read_text():
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"{cut}: ended with status {status}, not by SIGKILL")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
