"""Figures as SVG text, drawn without pyplot: the same values give the same bytes.

Each figure is a small panel, so that a page can set several side by side and one below the other on a phone. Colours
are CSS variables (``var(--ink)``), so that the page's light and dark schemes hold inside the figures too, and texts
stay texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from clipdistill.report.panel import CYCLE, INK, LOST, SOFT, STUDENT, TEACHER, Drawing, drawing, panel
from clipdistill.report.tables import count, decimal, millions

# Inches of 72 units: at the width that the page gives them, a unit is about a CSS pixel.
_NARROW, _WIDE = 4.4, 5.4
_MOST_POINTS = 200
_LABEL_GAP = 0.085
_LONGEST_NAME = 12
_TRAINING_FACTS = (
    "step",
    "epoch",
    "data_seconds",
    "compute_seconds",
    "samples_per_s",
    "grad_norm",
    "rejected",
    "skipped",
    "skipped_loss",
    "skipped_grad_norm",
    "class_scale",
    "phase",
)
_BALANCE = "log_variance_"
_MEASURED = ("overlap", "success", "recall", "agreement", "top1", "score")

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Size:
    """A model's size and what it reaches.

    Attributes:
        name: ``teacher`` or ``student``.
        parameters: How many it has; None where that is not known.
        megabytes: Its size in float32; None where that is not known.
        success: Its success@k for each evaluation set by name; None where it is not defined.
    """

    name: str
    parameters: float | None
    megabytes: float | None
    success: Mapping[str, float | None]


def training_curves(metrics: Iterable[Mapping[str, Any]]) -> list[Drawing]:
    """The loss with its terms, the validation's agreement with the teacher, and the learning rate, over the steps.

    Args:
        metrics: The lines of ``metrics.jsonl``. A line without ``step``, and a value that is no finite number, is
            passed over.

    Returns:
        A figure for each of the three that has values, and one of the losses' learned balance where there is such; the
        long ones are thinned by averaging neighbours. The terms of narrower widths stay in the metrics alone.
    """
    series = _series(metrics)
    losses = {name: points for name, points in series.items() if _is_loss(name)}
    agreement = {name: points for name, points in series.items() if _is_measured(name)}
    balance = {name: points for name, points in series.items() if name.startswith(_BALANCE)}
    rates = {name: points for name, points in series.items() if _is_rate(name)}
    panels = (
        ("Training loss", losses, "loss"),
        ("Validation against the teacher", agreement, "value"),
        ("Learning rate", rates, "rate"),
        ("Learned balance of the losses", balance, "log-variance"),
    )
    since = _last_phase(series)
    return [_curves(title, values, unit, since) for title, values, unit in panels if values]


def size_against_recall(sizes: Sequence[Size], k: int) -> Drawing | None:
    """Success@k over the number of parameters, on a logarithmic axis.

    Args:
        sizes: The models. One whose parameters are not known is drawn as a level line.
        k: The cut-off, for the words.

    Returns:
        The figure; None where there is nothing to draw.
    """
    known = [size for size in sizes if _usable(size.parameters) and any(map(_usable, size.success.values()))]
    names = list(dict.fromkeys(name for size in sizes for name in size.success))
    if not known:
        return None
    with panel(_WIDE, 3.0, left=0.09, right=0.76) as (figure, axes):
        colours = dict(zip(names, _cycled(len(names)), strict=True))
        for name in names:
            _size_line(axes, name, known, colours[name])
        _size_guides(axes, known)
        largest = max(size.parameters or 0 for size in known)
        for size in sizes:
            if _usable(size.parameters):
                _size_values(axes, size, last=size.parameters == largest)
            else:
                _unknown_levels(axes, size, colours)
        words = "; ".join(_size_words(size, k) for size in sizes)
        return drawing(figure, f"success@{k} against parameters", words)


def recall_budget(title: str, steps: Sequence[tuple[str, float | None]]) -> Drawing | None:
    """A falling row of bars: what each step from the teacher to the shipped index costs.

    Args:
        title: What it is measured on.
        steps: Each step's name and its value in 0 to 1, the teacher first; steps without a value are left out.

    Returns:
        The figure; None where fewer than two steps have a value.
    """
    found = [(name, float(value)) for name, value in steps if value is not None and math.isfinite(value)]
    if len(found) < 2:
        return None
    first = found[0][1]
    with panel(_WIDE, 0.62 * len(found), left=0, right=1, bottom=0, top=1) as (figure, axes):
        longest = max([value for _, value in found] + [1e-9])
        for place, (name, value) in enumerate(found):
            _budget_bar(axes, place, name, value, first if place else None, found[max(0, place - 1)][1])
        axes.set(xlim=(0, longest), ylim=(len(found) - 0.82, -0.68))
        axes.set_axis_off()
        words = "; ".join(f"{name} {decimal(value)}" for name, value in found)
        return drawing(figure, title, words)


def _budget_bar(axes: Axes, place: int, name: str, value: float, first: float | None, before: float) -> None:
    if first is not None and first > value:
        axes.barh(place, first - value, left=value, height=0.3, color=LOST, alpha=0.28, linewidth=0)
    axes.barh(place, value, height=0.3, color=TEACHER if first is None else STUDENT, linewidth=0)
    axes.text(0, place - 0.26, name, ha="left", va="bottom", color=INK)
    change = "" if first is None else f"\u2002{_signed(value - before)}"
    right_edge = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(1, place - 0.26, f"{decimal(value)}{change}", ha="right", va="bottom", transform=right_edge)


def _signed(change: float) -> str:
    text = f"{abs(change):.3f}"
    return "±0.000" if text == "0.000" else f"{'+' if change > 0 else '−'}{text}"


def _size_line(axes: Axes, name: str, known: Sequence[Size], colour: str) -> None:
    points = [(float(size.parameters or 0), _finite(size.success.get(name))) for size in known]
    drawn = sorted((x, y) for x, y in points if y is not None)
    axes.plot([x for x, _ in drawn], [y for _, y in drawn], color=colour, marker="o", markersize=7)


def _size_values(axes: Axes, size: Size, *, last: bool) -> None:
    """A model's values beside its points: with the sets' names right of the largest, bare left of the others."""
    for place, value, name in _apart(size.success):
        axes.annotate(
            f"{decimal(value)}  {name[:_LONGEST_NAME]}" if last else decimal(value),
            (float(size.parameters or 0), place),
            xytext=(9 if last else -9, 0),
            textcoords="offset points",
            ha="left" if last else "right",
            va="center_baseline",
            annotation_clip=False,
        )


def _unknown_levels(axes: Axes, size: Size, colours: Mapping[str, str]) -> None:
    """The values of a model whose size is not known, as lines from the left edge."""
    edge = blended_transform_factory(axes.transAxes, axes.transData)
    for place, value, name in _apart(size.success):
        axes.plot([0, 0.46], [value, value], transform=edge, color=colours[name], linestyle=(0, (4, 3)), linewidth=1.2)
        text = f"{size.name} {decimal(value)}  {name[:_LONGEST_NAME]}"
        axes.text(0.01, place + 0.02, text, transform=edge, va="bottom", color=SOFT, fontsize=10)


def _apart(values: Mapping[str, float | None]) -> Iterator[tuple[float, float, str]]:
    """Where to write each value so that none covers another: place, value, name, from below."""
    found = sorted((y, name) for name, value in values.items() if (y := _finite(value)) is not None)
    place = -1.0
    for value, name in found:
        place = max(value, place + _LABEL_GAP)
        yield place, value, name


def _size_guides(axes: Axes, known: Sequence[Size]) -> None:
    """The logarithmic axis with a little room, marked where the models are."""
    places = [float(size.parameters or 1) for size in known]
    low, high = min(places), max(places)
    room = max(2.0, (high / low) ** 0.45)
    axes.set_xscale("log")
    axes.set(xlim=(low / room, high * (1.15 if high > low else room)), ylim=(0, 1.05))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, labels=[size.name for size in known])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", length=4)
    below = blended_transform_factory(axes.transData, axes.transAxes)
    for place, size in zip(places, known, strict=True):  # a line of its own: only single lines are centred in any font
        axes.text(place, -0.16, _size_label(size), transform=below, ha="center", va="top", color=SOFT)


def _size_label(size: Size) -> str:
    megabytes = f" · {size.megabytes:,.0f} MB" if _usable(size.megabytes) else ""
    return f"{millions(size.parameters)}{megabytes}"


def _size_words(size: Size, k: int) -> str:
    values = ", ".join(f"{decimal(value)} on {name}" for name, value in size.success.items())
    return f"{size.name} with {millions(size.parameters)} parameters: success@{k} {values}"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _usable(value: float | None) -> bool:
    return (_finite(value) or 0) > 0


def _series(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Every number over the steps, by its name: ``loss``, ``terms/clip``, ``lr/image``, ``eval/score``."""
    found: dict[str, Points] = {}
    for line in metrics:
        step = line.get("step")
        if isinstance(step, int | float):
            for name, value in _numbers(line):
                found.setdefault(name, []).append((float(step), value))
    return found


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _is_measured(name: str) -> bool:
    return name.startswith("eval/") or ("/" not in name and name.startswith(_MEASURED))


def _is_rate(name: str) -> bool:
    return name == "lr" or name.startswith(("lr/", "lr_"))


def _is_loss(name: str) -> bool:
    return name.startswith("terms/") or (
        not {"/", "@"}.intersection(name)
        and name not in _TRAINING_FACTS
        and not _is_rate(name)
        and not name.startswith(_BALANCE)
        and not _is_measured(name)
    )


def _merged(series: Mapping[str, Points], alone: str) -> dict[str, Points]:
    """Curves that lie on one another as one, under both names, as one would hide the other; one of them stays alone."""
    names: dict[tuple[bool, tuple[tuple[float, float], ...]], list[str]] = {}
    for name, points in series.items():
        names.setdefault((_readable(name) == alone, tuple(points)), []).append(_readable(name))
    return {", ".join(same): list(points) for (_, points), same in names.items()}


def _last_phase(series: Mapping[str, Points]) -> float:
    """The first step of the phase that the kept student is of; 0 where the training had no phases."""
    points = series.get("phase", [])
    return min((step for step, phase in points if phase == points[-1][1]), default=0.0)


def _curves(title: str, series: Mapping[str, Points], unit: str, since: float = 0.0) -> Drawing:
    total = "loss" if unit == "loss" else "score"
    series = _merged(series, alone=total)
    with panel(_NARROW, 2.7, left=0.14, right=0.97) as (figure, axes):
        others = [name for name in series if name != total]
        colours = {**dict(zip(others, _cycled(len(others)), strict=True)), total: INK}
        for name, points in series.items():
            xs, ys = zip(*_thinned(points), strict=True)
            few = len(xs) <= 30 and unit == "value"
            axes.plot(
                xs,
                ys,
                color=colours[name],
                label=_readable(name),
                marker="o" if few else None,
                markersize=4,
                linewidth=2.4 if name == total else 1.6,
            )
        _scale_axis(axes, series, unit)
        if unit == "value" and total in series:
            _mark_best(axes, [point for point in series[total] if point[0] >= since])
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(series) > 1:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(-0.14, -0.24),
                ncols=1 if unit == "value" else 2,
                borderaxespad=0,
                columnspacing=1.2,
                labelspacing=0.3,
            )
        words = "; ".join(_curve_words(name, points) for name, points in series.items())
        return drawing(figure, title, words)


def _scale_axis(axes: Axes, series: Mapping[str, Points], unit: str) -> None:
    values = [value for points in series.values() for _, value in points]
    if unit == "loss" and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0.0, min(values)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(y) if unit == "rate" else f"{y:.3g}"))


def _power(value: float) -> str:
    """A small number the way that learning rates are written: ``5e-4``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def _mark_best(axes: Axes, points: Points) -> None:
    step, best = max(points, key=lambda point: (point[1], -point[0]))
    axes.plot([step], [best], marker="o", markersize=9, color=INK, fillstyle="none", markeredgewidth=1.6)
    axes.annotate(f"kept: {decimal(best)}", (step, best), xytext=(0, 10), textcoords="offset points", ha="right")


def _readable(name: str) -> str:
    text = name.split("/", 1)[-1].removeprefix("lr_") if name != "lr" else "learning rate"
    text = re.sub(r"^(overlap|success|recall)(\d+)_", r"\1@\2 ", text)
    return text.replace("text_to_image", "text → picture").replace("image_to_text", "picture → text").replace("_", " ")


def _curve_words(name: str, points: Points) -> str:
    first, last = (f"{value:.4g} at step {count(step)}" for step, value in (points[0], points[-1]))
    return f"{name} from {first} to {last}"


def _thinned(points: Points) -> Points:
    """At most some hundred points: the means of neighbours."""
    group = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]


def _cycled(number: int) -> list[str]:
    return [CYCLE[place % len(CYCLE)] for place in range(number)]
