"""Does a small picture classifier keep its teacher's zero-shot accuracy: the emoji as classes, by `make bench-classes`.

A class is an emoji, its prompt the bare label (whose embeddings the shipped cache holds), its pictures the four styles;
teacher and student see styles of it in `test` that are not in `train`. Of the emoji with a picture in `test`, the 400
with most pictures in `train` are taken: 1,065 pictures to train on, 83 to choose by, 443 to report. The student is the
demo's; it sees no text, only pictures, the teacher's class probabilities and the labels.

    python benchmarks/classification.py --classes 300 --steps 20

tries it, and writes nothing. With fewer classes there is no picture to choose by, and the last student is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from result import write_result

from clipdistill.demo import demo_config, embedded_data
from clipdistill.stages.run import run_all
from clipdistill.stages.workspace import Workspace

COMMAND = "make bench-classes"
CLASSES, STEPS, SEED = 400, 150, 17
SPLITS = ("train", "val", "test")


def write_splits(folder: Path, count: int) -> dict[str, str]:
    """Write the pictures of the chosen emoji, a table a split, and return the label of each by its concept."""
    tables = {name: pd.read_parquet(embedded_data() / "emoji" / f"{name}.parquet") for name in SPLITS}
    trained, tested = Counter(tables["train"]["concept"]), set(tables["test"]["concept"])
    ranked = sorted((concept for concept in trained if concept in tested), key=lambda name: (-trained[name], name))
    chosen = set(ranked[:count])
    for name, table in tables.items():
        kept = table[table["concept"].isin(chosen)]
        if len(kept):
            kept[["key", "image", "concept"]].to_parquet(folder / f"{name}.parquet")
    train = tables["train"]
    return {row.concept: row.captions[0] for row in train[train["concept"].isin(chosen)].itertuples()}


def overrides(folder: Path, names: Mapping[str, str], steps: int, seed: int) -> list[str]:
    """What differs from the demo's configuration."""
    paths = {name: json.dumps(str(folder / f"{name}.parquet")) for name in SPLITS}
    source = {name: f'{{path = {path}, label = "concept"}}' for name, path in paths.items()}
    table = ", ".join(f"{json.dumps(key)} = {json.dumps(name, ensure_ascii=False)}" for key, name in names.items())
    return [
        f"seed={seed}",
        f"data.train={source['train']}",
        f"data.val={source['val'] if (folder / 'val.parquet').exists() else '[]'}",
        f"data.test={{test = {source['test']}}}",
        "data.texts=[]",
        'task.kind="classification"',
        'task.templates=["{}"]',
        f"task.names={{{table}}}",
        "train.batch=0",
        "train.batch_texts=0",
        "train.batch_images=40",
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 3)}",
        f"train.save_every={max(1, steps // 3)}",
    ]


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures by name, from a run's report."""
    (found,) = report["classification"]["sets"]
    figures: dict[str, float] = {"classes": found["classes"], "pictures": found["pictures"]}
    for who in ("teacher", "student"):
        figures |= {f"{name}_{who}": found[who][name]["value"] for name in ("top1", "top5")}
        figures[f"ece_{who}"] = found[who]["ece"]
    for name in ("retention", "agreement"):
        figures |= {name: found[name]["value"], f"{name}_low": found[name]["low"], f"{name}_high": found[name]["high"]}
    figures["divergence"] = found["divergence"]
    teacher, student = report["sizes"]["teacher"], report["sizes"]["student"]
    figures["parameters_ratio"] = teacher["parameters"] / student["parameters"]
    return {name: round(value, 4) for name, value in figures.items()}


def measure(out: Path, count: int, steps: int, seed: int) -> dict[str, float]:
    """Train and evaluate below a folder, and return the figures."""
    out.mkdir(parents=True, exist_ok=True)
    names = write_splits(out, count)
    config = demo_config(overrides(out, names, steps, seed), out)
    return figures_of(run_all(Workspace.of(config, out / "run")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result of the full size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, help="where to keep the run; none = it is removed at the end")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure((given.out or Path(folder)).resolve(), given.classes, given.steps, given.seed)
    if (given.classes, given.steps, given.seed) != (CLASSES, STEPS, SEED):
        print(json.dumps(figures, indent=2))
        return
    seconds = time.monotonic() - started
    path = write_result("classification", figures, {}, seeds=[SEED], seconds=seconds, command=COMMAND)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
