"""Whether a sweep survives being killed at any moment, and how long twelve trials take: `make bench-sweep`.

Temperature x capacity on the embedded data: four temperatures of the similarities' KL, three text towers, sixty
steps each, with early stopping. The command is killed by SIGKILL at random moments and started again until it is done.
Then one of the trials that were killed is trained again without a kill, and has to end with the same weights.

With overrides (`python benchmarks/sweep.py train.steps=2 ...`) nothing is written to `results`.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result import write_result

from clipdistill.config import RunConfig
from clipdistill.core import fingerprint
from clipdistill.demo import WEIGHTS, demo_config

COMMAND = "make bench-sweep"
SEED = 17
KILLS = 5
BETWEEN_KILLS = (30.0, 150.0)
SWEEP = (
    'sweep.axes={"loss.temperature"=[0.5, 1.0, 2.0, 4.0], "student.text"=["nano", "tiny", "small"]}',
    "sweep.sampler=grid",
    "sweep.trials=12",
    "sweep.startup=4",
    "loss.affinity=1.0",
    "train.steps=60",
    "train.eval_every=30",
    "train.save_every=15",
)


def write_run(folder: Path, overrides: list[str]) -> Path:
    """The demo's configuration with the sweep's section, as a file that the command line takes."""
    config = demo_config([*SWEEP, *overrides], folder / "demo")
    path = folder / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    RunConfig.load(path)
    return path


def finished(out: Path) -> dict[str, str]:
    """The SHA-256 of each finished trial's outcome."""
    return {path.parent.name: fingerprint.of_file(path) for path in sorted(out.glob("trials/*/trial.json"))}


def start(path: Path, out: Path) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "clipdistill", "sweep", str(path), "--out", str(out), "--json"]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True)


def swept(path: Path, out: Path) -> tuple[dict, list[str], int, int]:
    """The results, the trials that were killed, and the numbers of kills and of finished trials that a kill lost."""
    moments, killed, kills, lost = random.Random(SEED), [], 0, 0
    done: dict[str, str] = {}
    while True:
        worker = start(path, out)
        try:
            wait = moments.uniform(*BETWEEN_KILLS) if kills < KILLS else None
            text, _ = worker.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGKILL)
            worker.communicate()
            kills += 1
            killed += [folder.name for folder in out.glob("trials/*") if not (folder / "trial.json").exists()]
        now = finished(out)
        lost += sum(now.get(name) != digest for name, digest in done.items())
        done = now
        if worker.returncode == 0:
            return json.loads(text.splitlines()[-1]), killed, kills, lost
        if worker.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the sweep ended with {worker.returncode}")


def same_weights(out: Path, results: dict, killed: list[str], fresh: Path) -> float:
    """Whether a trial that was killed has the weights that it has without: 1 or 0; -1 where none was killed."""
    complete = {f"{trial['number']:04d}" for trial in results["trials"] if trial["state"] == "complete"}
    candidates = [name for name in killed if name in complete]
    if not candidates:
        return -1.0
    run = out / "trials" / candidates[-1] / f"seed-{SEED}"
    call = [sys.executable, "-m", "clipdistill", "train", str(run / "run.toml"), "--out", str(fresh)]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    digests = {fingerprint.of_file(folder / "student" / WEIGHTS) for folder in (run, fresh)}
    return 1.0 if len(digests) == 1 else 0.0


def main() -> None:
    """Run the sweep with kills and keep what it took."""
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, out = write_run(folder, overrides), folder / "sweep"
        started = time.monotonic()
        results, killed, kills, lost = swept(path, out)
        seconds = time.monotonic() - started
        trials = results["trials"]
        figures = {
            "seconds": round(seconds, 1),
            "trials": float(len(trials)),
            "trials_failed": float(sum(trial["state"] == "failed" for trial in trials)),
            "trials_stopped_early": float(sum(trial["state"] == "pruned" for trial in trials)),
            "kills": float(kills),
            "finished_trials_lost": float(lost),
            "same_weights_after_a_kill": same_weights(out, results, killed, folder / "fresh"),
            "best_validation_overlap10": round(max(trial["objective"] or 0.0 for trial in trials), 4),
        }
    for finding in results["findings"]:
        print(finding["text"])
    bars = {
        "seconds": {"at_most": 1800.0},
        "trials": {"at_least": 12.0},
        "trials_failed": {"at_most": 0.0},
        "kills": {"at_least": 3.0},
        "finished_trials_lost": {"at_most": 0.0},
        "same_weights_after_a_kill": {"at_least": 1.0},
    }
    if overrides:
        print(json.dumps(figures, indent=2))
        return
    print(write_result("sweep", figures, bars, seeds=[SEED], seconds=seconds, command=COMMAND).read_text("utf-8"))


if __name__ == "__main__":
    main()
