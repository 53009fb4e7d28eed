"""What the demo reaches, and whether two runs with one seed end in the same weights: `make bench`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result import write_result

from clipdistill.demo import BARS

COMMAND = "make bench"


def run_demo(out: Path, *overrides: str) -> dict[str, float | str]:
    """Run the demo in a process of its own, from nothing, and return its figures, whether or not it meets its bars."""
    call = [sys.executable, "-m", "clipdistill", "demo", *overrides, "--json", "--out", str(out)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise RuntimeError(f"the demo printed nothing: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the demo twice and keep the figures of the first, with the second's weights compared."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        first, second = (run_demo(Path(folder) / name) for name in ("first", "second"))
    figures = {name: round(value, 4) for name, value in first.items() if not isinstance(value, str)}
    figures["runs_with_the_same_weights"] = 2 if first["student_sha256"] == second["student_sha256"] else 1
    bars = {name: {"at_least" if bar.at_least else "at_most": bar.bound} for name, bar in BARS.items()}
    bars["runs_with_the_same_weights"] = {"at_least": 2}
    path = write_result("demo", figures, bars, seeds=[17], seconds=time.monotonic() - started, command=COMMAND)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
