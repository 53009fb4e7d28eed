"""How much sooner an inherited student is as good as a randomly initialised one: `make bench-inheritance`.

The demo's teacher is a convolutional network and a Hugging Face text tower, of which neither can be cut. So a ViT and a
text transformer of open_clip's own are distilled from its stored embeddings first; they are the teacher here. Two
students of one architecture, the teacher's at half the width, then learn from that teacher in the same steps and
batches: one is cut out of it, one is drawn. The figure is how many steps the inherited one needs to reach the best
validation overlap@10 that the drawn one ever has, divided by the steps at which the drawn one has it.

Every run is a process of its own with one thread, and is kept in the working folder: called again, the benchmark goes
on from what is done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from result import write_result

from clipdistill.config import RunConfig
from clipdistill.core import files
from clipdistill.demo import embedded_data
from clipdistill.demo_teacher import assemble_teacher
from clipdistill.stages.inputs import name_checks
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.towers.student import CONFIG, DualEncoder

COMMAND = "make bench-inheritance"
SEEDS = (17, 18, 19)
BAR = 0.3333
KINDS = ("inherited", "random")
LARGE, SMALL = "clipdistill-bench-teacher", "clipdistill-bench-student"
_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3}
TEACHER_CFG = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "patch_size": 16, "head_width": 32},
    "text_cfg": _TEXT,
}
LOSS = {"preset": "default", "affinity": 0.0, "interactive": 0.0}
_log = logging.getLogger("inheritance")


def teacher_config(root: Path, steps: int) -> RunConfig:
    """The run that makes the teacher: the demo's data and teacher, without its freezing and pretrained weights."""
    data = embedded_data()
    raw: dict[str, Any] = tomllib.loads((data / "demo.toml").read_text(encoding="utf-8"))
    raw |= {"name": "inheritance_teacher", "loss": LOSS}
    raw["student"] = {"image": LARGE, "text": LARGE, "image_init": "random", "text_init": "inherit"}
    raw["student"] |= {"vocab_size": 8600}
    raw["train"] = _training(steps, every=steps, lr=1.5e-3, batch=48, batch_texts=64)
    raw["teacher"]["model"] = f"local-dir:{assemble_teacher(root / 'demo', data / 'teacher' / 'heads.safetensors')}"
    return RunConfig.parse(raw, data, checks=[name_checks])


def student_config(root: Path, kind: str, seed: int, steps: int, every: int) -> RunConfig:
    """The run of one student of the teacher that was made."""
    data = embedded_data()
    raw: dict[str, Any] = tomllib.loads((data / "demo.toml").read_text(encoding="utf-8"))
    raw |= {"name": f"{kind}_{seed}", "seed": seed, "loss": LOSS}
    raw["teacher"] = {"model": f"local-dir:{root / 'teacher' / 'student'}"}
    raw["cache"] = {"folder": str(root / "cache")}
    tower = "inherit" if kind == "inherited" else SMALL
    raw["student"] = {"image": tower, "text": tower, "vocab_size": 8600}
    raw["student"] |= {"inherit": {"width": 0.5, "depth": 1.0}} if kind == "inherited" else {}
    raw["student"] |= {} if kind == "inherited" else {"image_init": "random", "text_init": "random"}
    raw["train"] = _training(steps, every=every, lr=1.5e-3, batch=48, batch_texts=48)
    return RunConfig.parse(raw, data, checks=[name_checks])


def _training(steps: int, *, every: int, lr: float, batch: int, batch_texts: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch": batch,
        "batch_texts": batch_texts,
        "lr": lr,
        "warmup": steps // 20,
        "weight_decay": 0.05,
        "eval_every": every,
        "save_every": 60,
        "threads": 1,
    }


def register(root: Path) -> None:
    """Make the two architectures known to open_clip by their names, the small one once it was cut."""
    import open_clip

    small = root / "small.json"
    files.write_json(root / "configs" / f"{LARGE}.json", TEACHER_CFG)
    if small.exists():
        files.write_json(root / "configs" / f"{SMALL}.json", files.read_json(small))
    open_clip.add_model_config(root / "configs")


def architecture(student: Path) -> dict[str, Any]:
    """A saved student's towers as an open_clip configuration."""
    found: dict[str, Any] = files.read_json(student / CONFIG)["model_cfg"]
    text = {key: value for key, value in found["text_cfg"].items() if key in (*_TEXT, "mlp_ratio")}
    return {"embed_dim": found["embed_dim"], "vision_cfg": found["vision_cfg"], "text_cfg": text}


def work(root: Path, folder: Path) -> None:
    """Do the run whose configuration lies in a folder: what a process of its own is called for."""
    register(root)
    torch.set_num_threads(1)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    workspace = Workspace.of(RunConfig.parse(raw, folder, checks=[name_checks]), folder)
    started = time.monotonic()
    run(workspace, until="train")
    curve = [(row["step"], row["score"]) for row in read_metrics(workspace) if "score" in row]
    files.write_json(folder / "curve.json", {"curve": curve, "seconds": time.monotonic() - started})


def done(root: Path, name: str, config: RunConfig) -> Mapping[str, Any]:
    """A run's validation curve, from its own process or from an earlier call.

    Raises:
        RuntimeError: If the process fails, with the end of what it said, or the folder is of other settings.
    """
    folder, wanted = root / name, config.model_dump(mode="json", exclude_none=True)
    if (folder / "config.json").exists() and files.read_json(folder / "config.json") != wanted:
        raise RuntimeError(f"{folder}: was made with other settings; remove it, or give another --folder")
    if not (folder / "curve.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "config.json", wanted)
        call = [sys.executable, __file__, "--folder", str(root), "--work", str(folder)]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        ended = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | one_thread)
        if ended.returncode:
            raise RuntimeError(f"{name}: exit code {ended.returncode}: {ended.stderr[-2000:]}")
        found = dict(files.read_json(folder / "curve.json"))
        best = max(score for _, score in found["curve"])
        _log.info("%s: best validation overlap@10 %.4f, %.0f s", name, best, found["seconds"])
    return dict(files.read_json(folder / "curve.json"))


def compared(inherited: Sequence[tuple[int, float]], drawn: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The steps to the drawn student's best validation overlap, of both, and their ratio.

    An inherited student that never reaches it counts as one that needs a step more than it was given.
    """
    best = max(score for _, score in drawn)
    theirs = next(step for step, score in drawn if score == best)
    ours = next((step for step, score in inherited if score >= best), inherited[-1][0] + 1)
    return {
        "steps_ratio": round(ours / theirs, 4),
        "steps_inherited": ours,
        "steps_random": theirs,
        "overlap10_val_random": round(best, 4),
        "overlap10_val_inherited": round(max(score for _, score in inherited), 4),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between validations")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "inheritance")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    return options


def measure(options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """All figures, by name and seed, and the seconds that their runs took."""
    root = options.folder
    register(root)
    made = done(root, "teacher", teacher_config(root, options.teacher_steps))
    first = student_config(root, "inherited", options.seeds[0], options.steps, options.every)
    done(root, f"inherited_{options.seeds[0]}", first)  # fills the cache, and says what the architecture is
    files.write_json(root / "small.json", architecture(root / f"inherited_{options.seeds[0]}" / "student"))
    register(root)
    names = [(kind, seed) for seed in options.seeds for kind in KINDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (kind, seed): pool.submit(
                done,
                root,
                f"{kind}_{seed}",
                student_config(root, kind, seed, options.steps, options.every),
            )
            for kind, seed in names
        }
    curves = {name: job.result() for name, job in jobs.items()}
    check_same(root, options.seeds)
    figures = {
        f"{figure}_seed_{seed}": value
        for seed in options.seeds
        for figure, value in compared(*(curves[kind, seed]["curve"] for kind in KINDS)).items()
    }
    figures["overlap10_val_teacher_of_demo"] = round(max(score for _, score in made["curve"]), 4)
    return figures, made["seconds"] + sum(one["seconds"] for one in curves.values())


def check_same(root: Path, seeds: Sequence[int]) -> None:
    """Make sure that both students of each seed are of one architecture, so that the start alone differs.

    Raises:
        RuntimeError: If they are not.
    """
    for seed in seeds:
        shapes = [
            {name: tuple(value.shape) for name, value in DualEncoder.load(folder).model.state_dict().items()}
            for folder in (root / f"{kind}_{seed}" / "student" for kind in KINDS)
        ]
        if shapes[0] != shapes[1]:
            raise RuntimeError(f"seed {seed}: the inherited and the drawn student are of different architectures")


def main() -> None:
    """Run everything, print the figures, and write them with their bars."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    if options.work is not None:
        work(options.folder, options.work)
        return
    torch.set_num_threads(1)  # as every run has, for the result's words about the machine
    figures, seconds = measure(options)
    print("\n".join([*(f"{name} = {value}" for name, value in figures.items()), f"{seconds:.0f} s"]))
    if not options.dry:
        bars = {f"steps_ratio_seed_{seed}": {"at_most": BAR} for seed in options.seeds}
        write_result("inheritance", figures, bars, seeds=options.seeds, seconds=seconds, command=COMMAND)


if __name__ == "__main__":
    main()
