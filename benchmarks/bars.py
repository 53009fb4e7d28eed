"""Print every bar of the committed results, the missed ones marked: `make bars`. `--table` prints README's tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def rows(result: dict) -> Iterator[tuple[str, float, str, bool]]:
    """Each figure with its bar in words and whether it is met; a figure without a bar is met."""
    for name, value in result["figures"].items():
        bar = result["bars"].get(name, {})
        low, high = bar.get("at_least"), bar.get("at_most")
        words = f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""
        yield name, value, words, (low is None or value >= low) and (high is None or value <= high)


def table(name: str) -> str:
    """A result as a Markdown table, missed bars printed as missed."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| figure | measured | bar |", "|---|---:|---|"]
    for figure, value, words, met in rows(result):
        lines.append(f"| `{figure}` | {value:.4g} | {words}{'' if met else ' (**missed**)'} |")
    if "compared" in result:
        names, figures = result["compared"]["names"], result["compared"]["figures"]
        lines = compared(result["figures"], result["bars"], names, figures).splitlines()
    lines += ["", f"{result['date']}, {result['machine']}; `{result['command']}`, {result['seconds']:.0f} s."]
    return "\n".join(lines)


def compared(
    figures: Mapping[str, float], barred: Mapping[str, Mapping[str, float]], names: Sequence[str], wanted: Sequence[str]
) -> str:
    """A Markdown table of a row a name and a column a figure, each with its interval over the seeds."""
    lines = ["| | " + " | ".join(f"`{figure}`" for figure in wanted) + " |", "|---|" + "---:|" * len(wanted)]
    for name in names:
        cells = []
        for figure in wanted:
            key = f"{name}_{figure}"
            ends = (figures[f"{key}_low"], figures[f"{key}_high"])
            bar = barred.get(key, {}).get("at_least")
            missed = f" (**missed** {bar:.3f})" if bar is not None and figures[key] < bar else ""
            cells.append(f"{figures[key]:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]{missed}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print all bars of all results, or the tables with ``--table``."""
    for path in sorted(RESULTS.glob("*.json")):
        if "--table" in sys.argv:
            print(table(path.stem), end="\n\n")
            continue
        for figure, value, words, met in rows(json.loads(path.read_text(encoding="utf-8"))):
            if words:
                print(f"{'ok    ' if met else 'MISSED'}  {path.stem}.{figure}: {value:.4g} ({words})")


if __name__ == "__main__":
    main()
