"""How far the demo's figures move with the seed: `make bench-seeds`. The demo's own seed, 17, is in `demo.json`.

The seeds are the three that follow it, and all are reported, whatever they reach.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from demo import run_demo
from result import write_result

from clipdistill.demo import BARS

COMMAND = "make bench-seeds"
SEEDS = (18, 19, 20)


def main() -> None:
    """Run the demo once a seed and keep its retention and overlap figures, each beside its bar."""
    started = time.monotonic()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            found = run_demo(Path(folder) / str(seed), f"seed={seed}")
            kept = {name: float(found[name]) for name in BARS if name.startswith(("retention", "overlap"))}
            figures |= {f"{name}_seed_{seed}": round(value, 4) for name, value in kept.items()}
    bars = {name: {"at_least": BARS[name.partition("_seed_")[0]].bound} for name in figures}
    path = write_result(
        "demo_seeds", figures, bars, seeds=list(SEEDS), seconds=time.monotonic() - started, command=COMMAND
    )
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
