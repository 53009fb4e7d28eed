"""Sweeps whose truth is known: objectives are made from a formula of the values, with seeds' noise on top."""

from __future__ import annotations

import itertools
import math

import numpy as np

from clipdistill.config import RunConfig
from clipdistill.sweep.axes import Axis
from clipdistill.sweep.outcome import COMPLETE, FAILED, PRUNED, Outcome, SeedResult
from clipdistill.sweep.results import sweep_results

TEMPERATURE = Axis("loss.temperature", (0.5, 1.0, 2.0, 4.0))
STUDENT = Axis("student", ({"image": "nano", "text": "nano"}, {"image": "tiny", "text": "tiny"}))
SIZES = Axis("student.text", ("nano", "tiny", "small"))
FRACTION = Axis("data.fraction", (0.125, 0.25, 0.5, 1.0))
PRESET = Axis("loss.preset", ("default", "clip", "fd"))
LR = Axis("train.lr", (), 1e-4, 1e-2, log=True)
PARAMETERS = {"nano": 1_500_000, "tiny": 4_000_000, "small": 11_000_000}
ROWS = 8000


def outcome(number, params, value, *, seeds=2, noise=0.004, state=COMPLETE, reason="", success=None):
    """A trial whose seeds scatter about a value; a seed moves all trials alike, too."""
    draw = np.random.default_rng([number, 5])
    shared = np.random.default_rng(11).normal(0, 0.05, seeds)
    text = params.get("student.text", (params.get("student") or {}).get("text", "nano"))
    results = []
    for seed in range(seeds if state == COMPLETE else 1):
        reached = float(value + shared[seed] + draw.normal(0, noise))
        curve = tuple((step, reached * (1 - math.exp(-step / 40))) for step in range(25, 101, 25))
        results.append(
            SeedResult(
                seed=17 + seed,
                objective=reached,
                best_step=100,
                curve=curve if state == COMPLETE else curve[:1],
                seconds=40 + number,
                parameters=PARAMETERS[text],
                rows=int(ROWS * params.get("data.fraction", 1)),
                picture_ms=4 * (PARAMETERS[text] / 1.5e6) ** 0.4 * (1 + 0.02 * (number % 5)),
                text_ms=0.2 * (PARAMETERS[text] / 1.5e6) ** 0.7 * (1 + 0.02 * (number % 3)),
                sets={
                    "test": {"overlap10": reached - 0.05, "success10": success or reached + 0.3, "retention10": 0.9},
                    "unseen": {"overlap10": reached - 0.15, "success10": success or reached + 0.1, "retention10": None},
                },
            )
        )
    return Outcome(number, state, params, tuple(results), reason)


def grid(axes, formula, **more):
    """A complete trial for each point of the product."""
    points = itertools.product(*(axis.values for axis in axes))
    keys = [axis.key for axis in axes]
    made = [dict(zip(keys, point, strict=True)) for point in points]
    return [outcome(number, params, formula(params), **more) for number, params in enumerate(made)]


def config(folder, **sections):
    raw = {
        "name": "synthetic",
        "data": {"train": "train", "val": "val"},
        "teacher": {"model": "local-dir:teacher"},
        **sections,
    }
    return RunConfig.parse(raw, folder)


def everything(folder, *, seeds=2, name="catalogue-small"):
    """All axes at once, with stopped and failed trials, as a large sweep would give."""
    axes = [TEMPERATURE, SIZES, FRACTION, PRESET]

    def formula(params):
        size = {"nano": 0, "tiny": 0.04, "small": 0.07}[params["student.text"]]
        heat = -0.02 * math.log2(params["loss.temperature"] / 2) ** 2
        preset = {"default": 0.0, "clip": -0.03, "fd": 0.012}[params["loss.preset"]]
        return 0.85 - 3 * (ROWS * params["data.fraction"]) ** -0.3 + size + heat + preset - 0.1

    found = [one for one in grid(axes, formula, seeds=seeds) if one.number * one.number % 7 in (1, 4)]
    found = [Outcome(place, one.state, one.params, one.seeds, one.reason) for place, one in enumerate(found)]
    last = len(found)
    params = found[3].params
    found += [
        outcome(
            last,
            {**params, "loss.preset": "clip"},
            0.2,
            state=PRUNED,
            reason="stopped after step 25 of 100: below the median of 4",
        ),
        outcome(
            last + 1,
            params,
            0,
            state=FAILED,
            reason="step 12: loss nan: 11 steps were not finite, and train.max_skipped = 10",
        ),
        outcome(
            last + 2,
            params,
            0,
            state=FAILED,
            reason="step 12: loss nan: 11 steps were not finite, and train.max_skipped = 10",
        ),
    ]
    made = config(folder, name=name, sweep={"sampler": "grid", "seeds": seeds})
    return sweep_results(made, axes, "score", found)
