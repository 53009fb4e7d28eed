"""What structured pruning keeps of a pretrained picture tower: `make bench-pruning`.

The demo's data, teacher, cache and text tower, with three picture towers of one network: whole and pretrained, pruned
to half of its channels from the pretrained weights, and pruned to the same shapes from random ones. All train alike,
with every layer: none is frozen, since a random or pruned layer has to learn. Each run lies in `runs/pruning/NAME_SEED`
and is bound to its configuration: called again, the benchmark goes on from what is done.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from result import write_result

from clipdistill.config import RunConfig
from clipdistill.core import files
from clipdistill.demo import demo_config
from clipdistill.evaluation import RetrievalReport
from clipdistill.stages.run import run_all
from clipdistill.stages.workspace import Workspace

COMMAND = "make bench-pruning"
SEEDS, STEPS = (17,), 150
TOWERS = {
    "unpruned": [],
    "pruned_inherited": ["student.prune=0.5"],
    "pruned_random": ["student.prune=0.5", "student.image_init=random"],
}
_log = logging.getLogger("pruning")


def tower_config(name: str, seed: int, steps: int, root: Path) -> RunConfig:
    """The demo's configuration with one of the three picture towers."""
    settings = [f"seed={seed}", f"train.steps={steps}", f"train.eval_every={steps}", "train.save_every=50"]
    settings += ["train.freeze=[]", "train.threads=1", *TOWERS[name]]
    config = demo_config(settings, root / "shared")
    if name == "pruned_random":
        config = config.model_copy(update={"student": config.student.model_copy(update={"image_weights": None})})
    return config.model_copy(update={"name": f"{name}_{seed}"})


def measure(name: str, seed: int, steps: int, root: Path) -> dict[str, float]:
    """Run one tower with one seed, or read what is done of it."""
    folder = root / f"{name}_{seed}_{steps}"
    if not (folder / "figures.json").exists():
        report = run_all(Workspace.of(tower_config(name, seed, steps, root), folder))
        measured = RetrievalReport.from_json(report["evaluation"])
        found = {
            f"{kind}10_{part}": measured.value(measure=kind, k=10, set=part, pairing="student")
            for part in ("test", "unseen")
            for kind in ("overlap", "success")
        }
        found["parameters"] = report["sizes"]["student"]["parameters"]
        weights = folder / "student" / "open_clip_model.safetensors"
        found["megabytes"] = round(weights.stat().st_size / 1e6, 2)
        found["pictures_per_s"] = report["speeds"]["student"]["images_per_s"]
        files.write_json(folder / "figures.json", found)
    return dict(files.read_json(folder / "figures.json"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "pruning")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    return options


def main() -> None:
    """Run all towers with all seeds, and keep the means."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    started, options = time.monotonic(), parse()
    figures: dict[str, float] = {}
    for name in TOWERS:
        runs = [measure(name, seed, options.steps, options.folder) for seed in options.seeds]
        figures |= {f"{name}_{key}": round(statistics.fmean(run[key] for run in runs), 4) for key in runs[0]}
    for name, value in figures.items():
        _log.info("%s: %s", name, value)
    if options.dry:
        return
    bars = {
        f"pruned_inherited_overlap10_{part}": {"at_least": figures[f"pruned_random_overlap10_{part}"]}
        for part in ("test", "unseen")
    }
    seconds = time.monotonic() - started
    path = write_result("pruning", figures, bars, seeds=options.seeds, seconds=seconds, command=COMMAND)
    _log.info("%s", path)


if __name__ == "__main__":
    main()
