"""Does mutual distillation improve the student? Cached against mutual, same steps and seeds: `make bench-mutual`.

The demo's data, teacher and student, short: the teacher's towers are frozen and its projection heads train, unless
``--freeze`` says otherwise. Validation and overlap are against the teacher as it was before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from result import write_result

from clipdistill.demo import demo_config
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace

COMMAND = "make bench-mutual"
SEEDS = (17, 18, 19)
SETS = ("test", "unseen")
MEASURES = ("success", "overlap")
HEADS_ONLY = ("visual.trunk", "text.transformer")
_T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds


def train_once(out: Path, mode: str, seed: int, steps: int, freeze: Sequence[str], weights: Path) -> dict[str, Any]:
    """Run one mode with one seed, and return its report."""
    names = ", ".join(f'"{name}"' for name in freeze)
    changes = [
        f"seed={seed}",
        f"train.mode={mode}",
        f"train.steps={steps}",
        "train.batch=32",
        "train.batch_texts=0",
        f"train.warmup={steps // 6}",
        f"train.eval_every={steps}",
        f"train.save_every={steps}",
        f"mutual.freeze=[{names}]",
        "loss.clip=1.0",
        "loss.affinity=1.0",
        "loss.interactive=1.0",
    ]
    return run(Workspace.of(demo_config(changes, weights), out), until="evaluate")


def figure(report: Mapping[str, Any], measure: str, name: str) -> float:
    """A figure of the student, text to picture, exact search, at 10."""
    wanted = (measure, 10, name, "student", "exact", "text_to_image")
    for row in report["evaluation"]["rows"]:
        if (row["measure"], row["k"], row["set"], row["pairing"], row["search"], row["direction"]) == wanted:
            return float(row["value"])
    raise KeyError(wanted)


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences with its 95% interval by Student's t over the seeds; one seed has none."""
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return mean, float("-inf"), float("inf")
    half = _T95[count] * float(np.std(differences, ddof=1)) / count**0.5
    return mean, mean - half, mean + half


def compare(reports: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> tuple[dict[str, float], list[str]]:
    """The figures by name, and a sentence for each measure and set."""
    figures: dict[str, float] = {}
    sentences = []
    for name in SETS:
        for measure in MEASURES:
            found = {mode: [figure(one, measure, name) for one in each.values()] for mode, each in reports.items()}
            label = f"{measure}10_{name}"
            figures |= {f"{label}_{mode}": round(float(np.mean(values)), 4) for mode, values in found.items()}
            mean, low, high = paired(np.subtract(found["mutual"], found["cached"]).tolist())
            ends = {"difference": mean, "difference_low": low, "difference_high": high}
            figures |= {f"{label}_{end}": round(value, 4) for end, value in ends.items() if np.isfinite(value)}
            verb = "improved" if low > 0 else "did not improve"
            sentences.append(
                f"{label}: mutual {verb} the student: {mean:+.4f}, 95% from {low:+.4f} to {high:+.4f}, "
                f"over {len(found['mutual'])} seeds"
            )
        before, after = (
            [one["mutual"]["sets"][name][when]["value"] for one in reports["mutual"].values()]
            for when in ("before", "after")
        )
        figures |= {f"teacher_success10_{name}_before": round(float(np.mean(before)), 4)}
        figures |= {f"teacher_success10_{name}_after": round(float(np.mean(after)), 4)}
    return figures, sentences


def main() -> None:
    """Run both modes once a seed, and write the paired differences."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--steps", type=int, default=30)
    given.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given.add_argument("--freeze", nargs="*", default=list(HEADS_ONLY))
    given.add_argument("--dry", action="store_true", help="print, and write no result")
    asked = given.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reports = {
            mode: {
                seed: train_once(root / f"{mode}{seed}", mode, seed, asked.steps, asked.freeze, root / "start")
                for seed in asked.seeds
            }
            for mode in ("cached", "mutual")
        }
    figures, sentences = compare(reports)
    seconds = time.monotonic() - started
    print("\n".join([*(f"{name} = {value}" for name, value in figures.items()), *sentences, f"{seconds:.0f} s"]))
    if not asked.dry:
        write_result("mutual", figures, {}, seeds=list(asked.seeds), seconds=seconds, command=COMMAND)


if __name__ == "__main__":
    main()
