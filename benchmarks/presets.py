"""Which preset serves best: each on the embedded data, the same student, batches and steps, several seeds.

`python benchmarks/presets.py` trains every preset of `clipdistill/losses/presets.py` and writes `results/presets.json`.
A run is a process of its own with one thread, and a finished one is kept in the working folder, so that a bench that
was stopped goes on where it was. Beside presets there can be candidates, which are printed and not written:

    python benchmarks/presets.py --jobs 2
    python benchmarks/presets.py --presets default,fd --seeds 17 --candidate soft "feature_cosine=8,affinity=0.5"

The student, its learning rates and its frozen blocks are the demo's (`data/demo.toml`), whose rates were found with
the feature term alone: a preset that wants others is not at its best here. `clip` is what the data give without a
teacher. The demo's unpaired texts are part of every batch; a preset that takes pairs alone leaves them unused.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import bars
import torch
from result import write_result

from clipdistill.config import LossConfig, RunConfig
from clipdistill.config.loss import TERMS
from clipdistill.core import files, fingerprint, toml
from clipdistill.core.errors import ConfigError, suggest
from clipdistill.demo import demo_config
from clipdistill.losses.presets import PRESETS
from clipdistill.stages.train import loss_weights

MEASURES, SETS = ("overlap", "success", "retention"), ("test", "unseen")
PAIRINGS = {"": "student", "_query_side": "student_query_teacher_index"}
FIGURES = tuple(f"{measure}10_{name}{side}" for side in PAIRINGS for name in SETS for measure in MEASURES)
BARRED = ("overlap10_test", "success10_test", "overlap10_unseen", "success10_unseen")
"""Where `default` has to be the best, or within the best one's interval."""
# Student's t at 97.5%, by the number of seeds.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_log = logging.getLogger("presets")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        name: The preset's or the candidate's.
        seed: The run's seed.
        config: The whole configuration.
        folder: Where it lies; its name changes with all that decides the run.
    """

    name: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def result(self) -> Path:
        """The figures of a finished run."""
        return self.folder / "figures.json"


def candidate(text: str) -> LossConfig:
    """A loss of its own: `feature_cosine=8,affinity=0.5`, all other weights 0; `preset=fd,clip=1` changes a preset.

    Raises:
        ConfigError: If a key or a value is not one of the configuration's.
    """
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    alone = not any(piece.partition("=")[0].strip() == "preset" for piece in pieces)
    raw: dict[str, Any] = {"loss": dict.fromkeys(TERMS, 0.0) if alone else {}}
    faults = list(toml.apply_overrides(raw, [f"loss.{piece}" for piece in pieces]))
    found, more = toml.validate(LossConfig, raw["loss"])
    if faults or more:
        raise ConfigError([*faults, *(f"loss.{fault}" for fault in more)])
    return found


def plan(options: argparse.Namespace, losses: Mapping[str, LossConfig]) -> list[Run]:
    """All runs, seed by seed, so that a bench that is stopped early has compared every loss on some seeds."""
    settings = [
        f"train.steps={options.steps}",
        f"train.eval_every={options.steps}",
        "train.save_every=65",
        "train.threads=1",
        *options.set,
    ]
    runs = []
    for seed in options.seeds:
        base = demo_config([f"seed={seed}", *settings], options.folder / "shared")
        for name, loss in losses.items():
            config = base.model_copy(update={"loss": loss, "name": f"{name}-{seed}"})
            decisive = [config.model_dump(mode="json"), dataclasses.asdict(loss_weights(loss))]
            digest = fingerprint.of_value(decisive)[:10]
            runs.append(Run(name, seed, config, options.folder / f"{name}-{seed}-{digest}"))
    return runs


def measure(run: Run) -> dict[str, float]:
    """Do a run in a process of its own, or take its figures where it is finished.

    Raises:
        RuntimeError: If the process fails, with the end of what it said.
    """
    if run.result.exists():
        return dict(files.read_json(run.result))
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder.with_suffix(".toml")
    file.write_text(run.config.to_toml(), encoding="utf-8")
    started = time.monotonic()
    call = [sys.executable, "-m", "clipdistill", "evaluate", str(file), "--json", "--out", str(run.folder)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | one_thread)
    if done.returncode:
        raise RuntimeError(f"{run.name}, seed {run.seed}: exit code {done.returncode}: {done.stderr[-2000:]}")
    figures = dict(figures_of(files.read_json(run.folder / "report.json")))
    shutil.rmtree(run.folder / "training", ignore_errors=True)  # checkpoints of no further use
    seconds = time.monotonic() - started
    files.write_json(run.result, figures | {"seconds": round(seconds, 1)})
    _log.info("%s, seed %d: overlap@10 unseen %.3f, %.0f s", run.name, run.seed, figures["overlap10_unseen"], seconds)
    return dict(files.read_json(run.result))


def figures_of(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of one run's report: text to image, exact search, at 10."""
    rows = [
        row
        for row in report["evaluation"]["rows"]
        if (row["direction"], row["search"], row["k"]) == ("text_to_image", "exact", 10)
    ]
    found = {(row["measure"], row["set"], row["pairing"]): row["value"] for row in rows}
    for side, pairing in PAIRINGS.items():
        for name in SETS:
            for measure in MEASURES:
                yield f"{measure}10_{name}{side}", float(found[measure, name, pairing])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds and its 95% interval by Student's t; of one seed the value itself."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = STUDENT_T.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def summarise(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Each loss's figures over its seeds: `NAME_FIGURE`, and the same with `_low` and `_high`."""
    figures: dict[str, float] = {}
    for name, runs in found.items():
        for figure in FIGURES:
            values = interval([run[figure] for run in runs])
            for end, value in zip(("", "_low", "_high"), values, strict=True):
                figures[f"{name}_{figure}{end}"] = round(value, 4)
    return figures


def bars_of(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What `default` has to reach: the lower end of the best preset's interval, for each barred figure."""
    found = {}
    for figure in BARRED:
        best = max(names, key=lambda name, figure=figure: figures[f"{name}_{figure}"])
        found[f"default_{figure}"] = {"at_least": figures[f"{best}_{figure}_low"]}
    return found


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, LossConfig]]:
    """The options, and the losses by name.

    Raises:
        ConfigError: If a preset is not known, or a candidate is not a loss.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default=",".join(PRESETS), help="names, with commas; empty = none")
    parser.add_argument("--candidate", nargs=2, action="append", default=[], metavar=("NAME", "WEIGHTS"))
    parser.add_argument("--seeds", default="17,18,19")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "presets")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    names = [name for name in options.presets.split(",") if name]
    unknown = [f"--presets: {name!r} is unknown; {suggest(name, PRESETS)}" for name in names if name not in PRESETS]
    taken = [f"--candidate: {name!r} is a preset's name" for name, _ in options.candidate if name in PRESETS]
    if unknown or taken:
        raise ConfigError([*unknown, *taken])
    losses = {name: LossConfig(preset=name) for name in names}
    return options, losses | {name: candidate(text) for name, text in options.candidate}


def main() -> None:
    """Do all runs, print them as a table, and write the result where every preset was measured and nothing else."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # as every run has, for the result's words about the machine
    started = time.monotonic()
    options, losses = parse()
    runs = plan(options, losses)
    _log.info("%d runs in %s, %d finished", len(runs), options.folder, sum(run.result.exists() for run in runs))
    with ThreadPoolExecutor(options.jobs) as pool:
        done = [pool.submit(measure, run) for run in runs]
        try:
            wait(done)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # else the next runs would begin
            raise
    failed = [str(job.exception()) for job in done if job.exception() is not None]
    if failed:
        raise SystemExit("\n".join(failed))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in losses}
    for run, job in zip(runs, done, strict=True):
        found[run.name].append(job.result())
    figures = summarise(found)
    print(bars.compared(figures, {}, list(losses), FIGURES))
    seconds = sum(run["seconds"] for each in found.values() for run in each)
    if set(losses) != set(PRESETS) or options.set:
        _log.info("not written to results/: that needs every preset, no candidates and no --set")
        return
    command = f"python benchmarks/presets.py --steps {options.steps} --seeds {','.join(map(str, options.seeds))}"
    path = write_result(
        "presets",
        figures,
        bars_of(figures, list(losses)),
        seeds=options.seeds,
        seconds=seconds,
        command=command,
        compared={"names": list(losses), "figures": list(FIGURES)},
    )
    _log.info("%s, after %.0f s", path, time.monotonic() - started)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as fault:
        sys.exit(str(fault))
