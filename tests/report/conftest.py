"""A small run's report, measured on random vectors, with pictures of one colour each."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.records import Pair, Picture
from clipdistill.evaluation import Embedded, RetrievalReport, evaluate_embedded, judged

DIM = 16
COUNTS = {"test": 12, "unseen": 20}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def colour(number, size=(120, 90)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 13 % 256)).save(buffer, "PNG")
    return Picture(f"picture {number}", buffer.getvalue())


def pairs_of(name, number):
    return [
        Pair(f"{name}/{row}", colour(row + 50 * (name == "unseen")), (f"thing{row}", f"thing{row} of kind{row % 7}"))
        for row in range(number)
    ]


def measured(name, pairs, noise, **kwargs):
    rows = judged(name, pairs)
    draw = np.random.default_rng(len(pairs))
    images = unit(draw.standard_normal((len(rows.keys), DIM)))
    owners = np.array([row[0] for row in rows.relevant_pictures])
    texts = unit(images[owners] + noise * draw.standard_normal((len(owners), DIM)))
    near = [unit(part + 0.2 * draw.standard_normal(part.shape)) for part in (images, texts)]
    student, teacher = Embedded(*near, "the student"), Embedded(images, texts, "the teacher")
    return evaluate_embedded(rows, student, teacher=teacher, factory="Flat", ks=(1, 5, 10), **kwargs)


def run_report(evaluation):
    return {
        "schema": "clipdistill.run-report/1",
        "name": "small",
        "seed": 7,
        "data": {
            "sets": {"unseen": {"pictures": 20, "texts": 40}, "train": {"pictures": 1234, "texts": 99}},
            "images": 3,
            "texts": 4,
            "rejected": 5,
        },
        "sizes": {
            "teacher": {"name": "big-model", "dim": 16, "parameters": 28_400_000, "megabytes": 113.6},
            "student": {"parameters": 5_680_000, "megabytes": 22.7, "dim": 16},
        },
        "speeds": {
            "teacher": {"images_per_s": 10.0, "texts_per_s": 100.0},
            "student": {"images_per_s": 92.0, "texts_per_s": 1250.0},
            "pictures": 64,
            "texts": 512,
            "runtime": "PyTorch, eager, end to end",
        },
        "evaluation": evaluation,
        "student_fingerprint": "ab" * 32,
        "libraries": {"torch": "2.14.0", "python": "3.11.9"},
    }


def training_lines():
    lines = []
    for step in range(10, 210, 10):
        value = math.exp(-step / 80)
        terms = {"clip": 2 * value, "feature_image": 0.2 * value}
        rates = {"image": 1e-4 * value, "text": 1e-3 * value, "other": 1e-3 * value}
        lines.append({"step": step, "epoch": 0, "loss": 3.6 * value, "terms": terms, "lr": rates, "grad_norm": 1.0})
        if step % 50 == 0:
            scores = {"overlap10_text_to_image": 1 - value, "score": step / 1000 if step < 200 else 0.1}
            lines.append({"step": step, "eval": scores})
    return lines


@pytest.fixture(scope="session")
def whole_report():
    parts = [measured(name, pairs_of(name, number), 0.35 + 0.4 * (name == "unseen")) for name, number in COUNTS.items()]
    return run_report(RetrievalReport.merge(parts).to_json())


@pytest.fixture(scope="session")
def whole_pictures():
    return {pair.key: pair.picture for name, number in COUNTS.items() for pair in pairs_of(name, number)}


@pytest.fixture(scope="session")
def whole_metrics():
    return training_lines()


@pytest.fixture
def report(whole_report):
    """A copy to change."""
    return copy.deepcopy(whole_report)


@pytest.fixture
def retrieval(whole_report):
    return RetrievalReport.from_json(whole_report["evaluation"])


@pytest.fixture
def pictures(whole_pictures):
    return dict(whole_pictures)


@pytest.fixture
def metrics():
    return training_lines()
