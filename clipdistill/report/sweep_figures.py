"""A sweep's figures, from its results: what each axis does, what size and data buy, and how the trials trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from clipdistill.report.panel import CYCLE, INK, LOST, SOFT, STUDENT, TEACHER, Drawing, drawing, panel
from clipdistill.report.tables import amount, count, decimal, millions

_NARROW, _WIDE = 4.4, 5.4
_LONGEST = 30
_RATIO = 8.0
"""Numbers whose largest is at least so many times the smallest are drawn on a logarithmic axis."""
COSTS: Mapping[str, tuple[str, str]] = {
    "parameters": ("parameters", "parameters of the student"),
    "picture_ms": ("picture latency", "milliseconds a picture"),
    "text_ms": ("text latency", "milliseconds a text"),
}

Values = Mapping[str, Any]


def short(value: Any, most: int = _LONGEST) -> str:
    """An axis's value in a few letters: text bare, a table as ``image: nano, text: nano``."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {short(item)}" for key, item in value.items()) or "as configured"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(short(item) for item in value)}]"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def is_numeric(values: Sequence[Any]) -> bool:
    """Whether all of some values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def axis_figure(effect: Values, base: Any, trials: Sequence[Values]) -> Drawing:
    """The objective against one axis: its levels with their intervals, and the trials behind them.

    Args:
        effect: The axis's effect, as in the results.
        base: The configuration's own value; None where there is none.
        trials: The complete trials.
    """
    levels, key = effect["levels"], effect["key"]
    points = [(trial["params"][key], trial["objective"]) for trial in trials]
    words = "; ".join(f"{short(level['value'])} {_interval_words(level)}" for level in levels)
    title = f"Objective against {short(key, 60)}"
    if is_numeric([level["value"] for level in levels]):
        return _number_axis(title, words, levels, points, base)
    return _name_axis(title, words, levels, points)


def _number_axis(
    title: str, words: str, levels: Sequence[Values], points: Sequence[tuple[Any, float]], base: Any
) -> Drawing:
    with panel(_NARROW, 2.7, left=0.14, right=0.97) as (figure, axes):
        xs, ys = [float(level["value"]) for level in levels], [level["objective"] for level in levels]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=STUDENT, alpha=0.35, markersize=5)
        axes.plot(xs, ys, color=INK, marker="o" if len(xs) < 9 else None, markersize=5)
        for x, level in zip(xs, levels, strict=True):
            if level["low"] is not None:
                axes.plot([x, x], [level["low"], level["high"]], color=INK, linewidth=1.1)
        best = max(range(len(ys)), key=lambda place: ys[place])
        axes.plot([xs[best]], [ys[best]], "o", markersize=10, color=INK, fillstyle="none", markeredgewidth=1.6)
        if _is_number(base):
            axes.axvline(base, color=TEACHER, linestyle=(0, (4, 3)), linewidth=1.2)
            last = base >= max(xs)  # there is no room to the right of it then
            axes.annotate(
                "configured",
                (base, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if last else 4, -2),
                textcoords="offset points",
                color=TEACHER,
                ha="right" if last else "left",
                va="top",
                fontsize=10,
            )
        _number_scale(axes, [*xs, *([base] if _is_number(base) else [])])
        _objective_scale(axes)
        return drawing(figure, title, words)


def _name_axis(title: str, words: str, levels: Sequence[Values], points: Sequence[tuple[Any, float]]) -> Drawing:
    """Names down the side are written above their lines, so that long ones have room."""
    with panel(_NARROW, 0.3 + 0.52 * len(levels), left=0.03, right=0.97) as (figure, axes):
        best = max(range(len(levels)), key=lambda place: levels[place]["objective"])
        for place, level in enumerate(levels):
            found = [y for value, y in points if value == level["value"]]
            axes.plot(found, [place] * len(found), "o", color=STUDENT, alpha=0.35, markersize=5)
            if level["low"] is not None:
                axes.plot([level["low"], level["high"]], [place, place], color=INK, linewidth=1.1)
            axes.plot([level["objective"]], [place], "o", color=INK, markersize=6)
            if place == best:
                axes.plot([level["objective"]], [place], "o", markersize=11, color=INK, fillstyle="none")
            axes.annotate(
                f"{short(level['value'], 44)}  {decimal(level['objective'])}",
                (0, place),
                xycoords=("axes fraction", "data"),
                xytext=(0, 7),
                textcoords="offset points",
                va="bottom",
            )
        axes.set_ylim(len(levels) - 0.6, -0.75)
        axes.yaxis.set_major_locator(NullLocator())
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        return drawing(figure, title, words)


def cost_figure(cost: str, trials: Sequence[Values], front: Sequence[int]) -> Drawing | None:
    """The objective against what a student costs, with the Pareto front: what nothing as cheap beats.

    Args:
        cost: ``parameters``, ``picture_ms`` or ``text_ms``.
        trials: The complete trials.
        front: The numbers of those on the front, by rising cost.

    Returns:
        The figure; None where fewer than two different costs are known.
    """
    known = {trial["number"]: trial for trial in trials if _positive(trial["means"][cost])}
    if len({trial["means"][cost] for trial in known.values()}) < 2:
        return None
    title, unit = COSTS[cost]
    best = [known[number] for number in front if number in known]
    with panel(_NARROW, 2.9, left=0.14, right=0.94) as (figure, axes):
        for trial in known.values():
            on_front = trial["number"] in front
            _whisker(axes, trial["means"][cost], trial)
            axes.plot(
                [trial["means"][cost]],
                [trial["objective"]],
                "o",
                color=STUDENT if on_front else SOFT,
                alpha=1 if on_front else 0.55,
                markersize=7 if on_front else 5,
            )
        steps = [(trial["means"][cost], trial["objective"]) for trial in best]
        axes.plot([x for x, _ in steps], [y for _, y in steps], color=STUDENT, drawstyle="steps-post", linewidth=1.4)
        _front_names(axes, [(trial["means"][cost], trial["objective"], trial["number"]) for trial in best])
        _number_scale(axes, [trial["means"][cost] for trial in known.values()], always=True)
        show = millions if cost == "parameters" else amount
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(float(x))))
        axes.set_xlabel(unit)
        axes.margins(y=0.18)
        _objective_scale(axes)
        words = "on the Pareto front: " + "; ".join(
            f"trial {trial['number']} with {show(trial['means'][cost])}: {decimal(trial['objective'])}"
            for trial in best
        )
        return drawing(figure, f"Objective against {title}", words)


def _front_names(axes: Axes, front: Sequence[tuple[float, float, int]]) -> None:
    """The trials' numbers above their points, the best ones first; one that has no room beside them is left out."""
    room = math.log(front[-1][0] / front[0][0]) / 14
    last = math.inf
    for x, y, number in reversed(front):
        if last - math.log(x) >= room:
            axes.annotate(
                str(number), (x, y), xytext=(0, 7), textcoords="offset points", ha="center", va="bottom", fontsize=10
            )
            last = math.log(x)


def learning_figure(curve: Values) -> Drawing:
    """The objective against the rows of training, and the law through it up to twice the rows.

    Args:
        curve: The learning curve of the results.
    """
    rows, reached, law = curve["rows"], curve["reached"], curve["law"]
    most = rows[-1]
    line = [most * 2 ** (place / 16) for place in range(math.floor(16 * math.log2(rows[0] / most)), 17)]

    def said(count: float) -> float:
        return float(1 - law["floor"] - law["factor"] * count ** -law["exponent"])

    with panel(_NARROW, 2.9, left=0.14, right=0.94) as (figure, axes):
        inside = [x for x in line if x <= most]
        beyond = [x for x in line if x >= most]
        axes.plot(inside, [said(x) for x in inside], color=STUDENT)
        axes.plot(beyond, [said(x) for x in beyond], color=STUDENT, linestyle=(0, (4, 3)))
        axes.plot(rows, reached, "o", color=INK, markersize=6)
        twice, now = said(2 * most), said(most)
        if curve["low"] is not None:
            axes.plot([2 * most] * 2, [now + curve["low"], now + curve["high"]], color=STUDENT, linewidth=1.1)
        axes.plot([2 * most], [twice], "o", color=STUDENT, fillstyle="none", markersize=8, markeredgewidth=1.6)
        axes.annotate(
            f"twice the data: {decimal(twice)}",
            (2 * most, twice),
            xytext=(6, 12),
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
        _number_scale(axes, [*rows, 2 * most], always=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(float(x))))
        axes.set_xlabel("training rows")
        axes.margins(y=0.2)
        _objective_scale(axes)
        words = "; ".join(f"{count(n)} rows {decimal(y)}" for n, y in zip(rows, reached, strict=True))
        words += f"; the law says {decimal(twice)} at {count(2 * most)} rows"
        return drawing(figure, "Learning curve", words)


def trade_off_figure(trials: Sequence[Values], keys: Sequence[str]) -> Drawing | None:
    """Right answers against agreement with the teacher, coloured by the losses' settings.

    Args:
        trials: The complete trials.
        keys: The axes of the losses.

    Returns:
        The figure; None where no axis is a loss's or fewer than two trials have both measures.
    """
    known = [trial for trial in trials if trial["success10"] is not None and trial["overlap10"] is not None]
    if not keys or len(known) < 2:
        return None
    groups = _groups(known, keys)
    with panel(_NARROW, 2.9, left=0.21, right=0.97) as (figure, axes):
        named = len(groups) <= len(CYCLE)
        for place, (name, group) in enumerate(groups.items()):
            xs, ys = [one["overlap10"] for one in group], [one["success10"] for one in group]
            axes.plot(xs, ys, "o", color=CYCLE[place] if named else STUDENT, markersize=7, label=name, alpha=0.85)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        axes.set(xlabel="overlap@10 with the teacher", ylabel="success@10")
        axes.margins(0.12)
        if named:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.2, -0.24), ncols=1, borderaxespad=0, labelspacing=0.3)
        words = "overlap@10 and success@10: " + "; ".join(
            f"trial {one['number']} ({name}): {decimal(one['overlap10'])} and {decimal(one['success10'])}"
            for name, group in groups.items()
            for one in group
        )
        return drawing(figure, "Right answers against agreement", words)


def _groups(trials: Sequence[Values], keys: Sequence[str]) -> dict[str, list[Values]]:
    """The trials by their losses' settings: by all of them, or by the first few where those have colours enough."""
    for most in range(len(keys), 0, -1):
        groups: dict[str, list[Values]] = {}
        for trial in sorted(trials, key=lambda one: one["number"]):
            name = ", ".join(f"{key} = {short(trial['params'][key], 24)}" for key in keys[:most])
            groups.setdefault(name, []).append(trial)
        if len(groups) <= len(CYCLE):
            break
    return groups


def importance_figure(effects: Sequence[Values]) -> Drawing | None:
    """The share of the differences between trials that each axis explains; None with fewer than two axes."""
    if len(effects) < 2:
        return None
    order = sorted(effects, key=lambda effect: -effect["importance"])
    with panel(_NARROW, 0.56 * len(order), left=0, right=1, bottom=0, top=1) as (figure, axes):
        for place, effect in enumerate(order):
            colour = STUDENT if effect["matters"] else SOFT
            axes.barh(place, effect["importance"], height=0.3, color=colour, linewidth=0)
            axes.text(0, place - 0.26, short(effect["key"], 44), ha="left", va="bottom", color=INK)
            axes.annotate(
                f"{effect['importance']:.0%}",
                (1, place - 0.26),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
            )
        axes.set(xlim=(0, 1), ylim=(len(order) - 0.82, -0.68))
        axes.set_axis_off()
        words = "; ".join(f"{effect['key']} {effect['importance']:.0%}" for effect in order)
        return drawing(figure, "Share of the differences that each axis explains", words)


def training_figure(trials: Sequence[Values]) -> Drawing | None:
    """The validation score of each trial's first seed over the steps; None where no trial has any."""
    drawn = [trial for trial in trials if trial["repeats"] is None and _curve(trial)]
    if not drawn:
        return None
    best = max((trial for trial in drawn if trial["state"] == "complete"), key=_reached, default=None)
    with panel(_WIDE, 3.0, left=0.11, right=0.97) as (figure, axes):
        for trial in drawn:
            steps, scores = zip(*_curve(trial), strict=True)
            complete = trial["state"] == "complete"
            chosen = trial is best
            axes.plot(
                steps,
                scores,
                color=INK if chosen else STUDENT if complete else LOST,
                zorder=3 if chosen else 2,
                linewidth=2.4 if chosen else 1.2,
                alpha=1 if chosen or not complete else 0.5,
            )
            if not complete:
                axes.plot(steps[-1:], scores[-1:], "x", color=LOST, markersize=7, markeredgewidth=1.8)
            elif len(steps) == 1:
                axes.plot(steps, scores, "o", color=INK if chosen else STUDENT, markersize=5)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(float(x))))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _objective_scale(axes)
        words = "; ".join(
            f"trial {trial['number']}, {trial['state']}: {decimal(_curve(trial)[-1][1])}" for trial in drawn
        )
        return drawing(figure, "Validation over the steps", words)


def _curve(trial: Values) -> Sequence[tuple[float, float]]:
    curve: Sequence[tuple[float, float]] = trial["seeds"][0]["curve"] if trial["seeds"] else ()
    return curve


def _reached(trial: Values) -> float:
    return float(trial["objective"])


def _whisker(axes: Axes, x: float, trial: Values) -> None:
    if trial["interval"]:
        axes.plot([x, x], trial["interval"], color=SOFT, linewidth=1)


def _objective_scale(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))


def _number_scale(axes: Axes, values: Sequence[float], *, always: bool = False) -> None:
    """The x axis, logarithmic where the values are far apart; few values are marked themselves."""
    low, high = min(values), max(values)
    if low > 0 and (always or high >= _RATIO * low):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.margins(x=0.12)
        marks = list(_apart(sorted(set(values)), math.log(high / low)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        marks = sorted(set(values)) if len(set(values)) <= 6 and not always else []
    if marks and len(marks) <= 6:
        axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))


def _apart(values: Sequence[float], width: float) -> Iterator[float]:
    """Those of rising values that leave room for each other's names on a logarithmic axis."""
    last = -math.inf
    for value in values:
        if math.log(value) - last >= width / 6:
            last = math.log(value)
            yield value


def _interval_words(level: Values) -> str:
    low, high = level["low"], level["high"]
    interval = "" if low is None else f" [{decimal(low)}, {decimal(high)}]"
    return f"{decimal(level['objective'])}{interval}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value > 0
