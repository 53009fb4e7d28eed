"""What a sweep found, in sentences with numbers: each where the data carry it, by the rule written beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipdistill.sweep.axes import label
from clipdistill.sweep.effects import Contrast, Effect, Effects
from clipdistill.sweep.law import LearningCurve
from clipdistill.sweep.outcome import FAILED, Outcome

_CLEARLY = 2.0
"""The most important axis explains so many times what the next does."""
_MOST_REASONS = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence.

    Attributes:
        rule: The rule that it follows from: ``larger``, ``small_enough``, ``more_data``, ``data_or_size``, ``tuned``,
            ``chosen``, ``matters_most``, ``trade_off``, ``failed``, ``nothing`` or ``unknown``.
        text: The sentence.
    """

    rule: str
    text: str


def findings(
    effects: Effects,
    curve: LearningCurve | None,
    bases: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    trade_off: Finding | None = None,
) -> list[Finding]:
    """Everything that the rules find.

    Args:
        effects: The axes' effects on the objective.
        curve: The learning curve over ``data.fraction``; None where it was not swept.
        bases: The configuration's own value of each axis, where it is one that the axis has.
        outcomes: All finished trials.
        trade_off: What the loss weights trade, where they do.
    """
    found = [
        *_capacity(effects),
        *_data(curve, effects),
        *(one for effect in effects.effects for one in _setting(effect, bases)),
        *_importance(effects),
        *([trade_off] if trade_off else []),
    ]
    if not any(effect.matters for effect in effects.effects) and not any(one.rule == "more_data" for one in found):
        found += _nothing(effects, outcomes)
    return [*found, *_failures(outcomes)]


def _capacity(effects: Effects) -> Iterator[Finding]:
    """The student's size.

    ``larger``: of two sizes or more, the largest student is beyond chance better than the next smaller one.
    ``small_enough``: else, the smallest one that the best student does not beat beyond chance, where that is not the
    largest that was tried.
    """
    for effect in effects.effects:
        order = _by_size(effect)
        if len(order) < 2 or not effect.contrasts:
            continue
        largest, second = order[-1], order[-2]
        contrast = effect.contrasts[largest, second]
        if contrast.low > 0:
            yield Finding(
                "larger",
                f"The student is too small for this teacher: {_named(effect, largest)} reaches "
                f"{_reached(effect, largest)}, {_gain(contrast)} more than {_named(effect, second)}, "
                "and nothing larger was tried.",
            )
            continue
        enough = next(
            place for place in order if place == effect.best or not effect.contrasts[effect.best, place].is_real
        )
        if enough != largest:
            other = effect.best if effect.best != enough else largest
            yield Finding(
                "small_enough",
                f"A smaller student may do: {_named(effect, enough)} reaches {_reached(effect, enough)}; "
                f"{_named(effect, other)} is not better beyond chance: {_gain(effect.contrasts[other, enough])}.",
            )


def _by_size(effect: Effect) -> list[int]:
    """The places of a capacity axis's levels by the size of their students; none where sizes are equal or unknown."""
    sizes = {place: level.parameters for place, level in enumerate(effect.levels) if level.parameters is not None}
    if effect.axis.kind != "capacity" or len(set(sizes.values())) < len(effect.levels):
        return []
    return sorted(sizes, key=lambda place: sizes[place] or 0)


def _data(curve: LearningCurve | None, effects: Effects) -> Iterator[Finding]:
    """The amount of data.

    ``more_data``: the interval of what twice the rows would bring is above 0.
    ``data_or_size``: that interval, and the one of the step to the largest student (brought to twice the parameters),
    do not overlap.
    """
    if curve is None or curve.low is None or curve.high is None:
        return
    doubled = Contrast(curve.gain, curve.low, curve.high)
    most = curve.rows[-1]
    if doubled.low > 0:
        yield Finding(
            "more_data",
            f"Twice the data ({most:,} to {2 * most:,} rows) would bring {_gain(doubled)}, "
            f"by the fitted law 1 − objective = {curve.law.formula}.",
        )
    for effect in effects.effects:
        larger = _twice_as_large(effect)
        if larger is None:
            continue
        words = f"twice the rows {_gain(doubled)}, twice the parameters {_gain(larger)}"
        if doubled.low > max(0.0, larger.high):
            yield Finding("data_or_size", f"More data would help more than a larger student: {words}.")
        elif larger.low > max(0.0, doubled.high):
            yield Finding("data_or_size", f"A larger student would help more than more data: {words}.")


def _twice_as_large(effect: Effect) -> Contrast | None:
    """What the step to the largest student brought, for each doubling of its parameters."""
    order = _by_size(effect)
    if len(order) < 2 or not effect.contrasts:
        return None
    largest, second = (effect.levels[place].parameters or 1.0 for place in (order[-1], order[-2]))
    doublings, contrast = math.log2(largest / second), effect.contrasts[order[-1], order[-2]]
    return Contrast(contrast.gain / doublings, contrast.low / doublings, contrast.high / doublings)


def _setting(effect: Effect, bases: Mapping[str, Any]) -> Iterator[Finding]:
    """A setting that costs nothing, or the teacher.

    ``tuned``: its best value is beyond chance better than the configuration's own (than its worst, where the
    configuration's own was not tried). ``chosen``: the configuration's own is the best, beyond chance better than
    another.
    """
    if effect.axis.kind not in ("choice", "teacher") or not effect.matters:
        return
    key, best, base = effect.axis.key, effect.best, _base_level(effect, bases)
    worst = min(range(len(effect.levels)), key=lambda place: effect.levels[place].objective)
    if base == best and effect.contrasts[best, worst].low > 0:
        text = f"{key} = {_value(effect, best)} is well chosen: {_gain(effect.contrasts[best, worst])} more than "
        yield Finding("chosen", f"{text}{_value(effect, worst)}.")
    elif base is not None and base != best and effect.contrasts[best, base].low > 0:
        text = f"{key} was not tuned: {_value(effect, best)} gains {_gain(effect.contrasts[best, base])} over "
        yield Finding("tuned", f"{text}the configuration's {_value(effect, base)}.{_at_the_end(effect)}")
    elif base is None and effect.contrasts[best, worst].low > 0:
        text = f"{key} = {_value(effect, best)} gains {_gain(effect.contrasts[best, worst])} over "
        yield Finding("tuned", f"{text}{_value(effect, worst)}.{_at_the_end(effect)}")


def _base_level(effect: Effect, bases: Mapping[str, Any]) -> int | None:
    """The level with the configuration's own value; of a range the point nearest to it, where it lies inside."""
    base = bases.get(effect.axis.key)
    if effect.axis.values:
        labels = [label(level.value) for level in effect.levels]
        return labels.index(label(base)) if base is not None and label(base) in labels else None
    points = [float(level.value) for level in effect.levels]
    if base is None or not points[0] <= base <= points[-1]:
        return None
    scale = math.log if effect.axis.log else float
    return min(range(len(points)), key=lambda place: abs(scale(points[place]) - scale(base)))


def _at_the_end(effect: Effect) -> str:
    """A hint where the best of three rising numbers or more is the first or the last of them."""
    values = [level.value for level in effect.levels]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(values) < 3:
        return ""
    best = values[effect.best]
    return " That is the end of the axis: values beyond it may be better." if best in (min(values), max(values)) else ""


def _importance(effects: Effects) -> Iterator[Finding]:
    """``matters_most``: of two axes or more, one that matters explains at least twice what the next does."""
    order = sorted(effects.effects, key=lambda effect: -effect.importance)
    if len(order) >= 2 and order[0].matters and order[0].importance >= _CLEARLY * order[1].importance:
        first, second = order[:2]
        yield Finding(
            "matters_most",
            f"{first.axis.key} matters most: it explains {first.importance:.0%} of the differences between the "
            f"trials; the next, {second.axis.key}, {second.importance:.0%}.",
        )


def _nothing(effects: Effects, outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """``nothing``: the spread is known and no axis goes beyond it. ``unknown``: it is not known."""
    if effects.spread is not None and effects.effects:
        source = {"seeds": "between seeds", "trials": "that the axes leave unexplained"}[effects.spread.source]
        yield Finding(
            "nothing",
            f"No axis made a difference beyond the spread {source} (a standard deviation of "
            f"{effects.spread.deviation:.4f} in a trial's objective).",
        )
    elif any(outcome.objective is not None for outcome in outcomes):
        yield Finding(
            "unknown",
            "There are too few trials and seeds to tell a difference from chance: "
            "set sweep.seeds to 2 or more, or sweep.trials higher.",
        )


def _failures(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """``failed``: every failure is told, equal reasons together."""
    reasons = Counter(outcome.reason.splitlines()[0] for outcome in outcomes if outcome.state == FAILED)
    if not reasons:
        return
    listed = [f"{reason} ({count} trials)" if count > 1 else reason for reason, count in reasons.most_common()]
    more = f"; and {len(listed) - _MOST_REASONS} other reasons" if len(listed) > _MOST_REASONS else ""
    total = reasons.total()
    text = f"{total} of {len(outcomes)} trials failed: {'; '.join(listed[:_MOST_REASONS])}{more}."
    yield Finding("failed", text)


def weights_trade_off(outcomes: Sequence[Outcome], effects: Effects, keys: Sequence[str]) -> Finding | None:
    """What the loss weights trade.

    ``trade_off``: the trial with the best agreement and the one with the most right answers have different loss
    settings; each is ahead in its own measure by more than two standard deviations of a trial's objective.

    Args:
        outcomes: Complete trials.
        effects: The axes' effects, for the spread.
        keys: The axes of the losses.
    """
    scored = [(outcome, mean_measure(outcome, "success10")) for outcome in outcomes]
    known = [(outcome, success) for outcome, success in scored if success is not None]
    if not keys or effects.spread is None or len(known) < 2:
        return None
    agreeing = max(known, key=lambda pair: pair[0].objective or 0.0)
    right = max(known, key=lambda pair: pair[1])
    margin = 2 * effects.spread.deviation
    overlap, success = (agreeing[0].objective or 0) - (right[0].objective or 0), right[1] - agreeing[1]
    if min(overlap, success) <= margin or all(
        label(agreeing[0].params[key]) == label(right[0].params[key]) for key in keys
    ):
        return None
    first, second = (", ".join(f"{key} = {label(one[0].params[key])}" for key in keys) for one in (agreeing, right))
    return Finding(
        "trade_off",
        f"The loss trades agreement for right answers: {first} agrees most with the teacher (+{overlap:.3f}), "
        f"{second} has the most right answers (success@10 +{success:.3f}).",
    )


def mean_measure(outcome: Outcome, name: str) -> float | None:
    """A measure's mean over a trial's seeds and evaluation sets; None where it has none."""
    found = [values.get(name) for seed in outcome.seeds for values in seed.sets.values()]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _named(effect: Effect, place: int) -> str:
    size = effect.levels[place].parameters
    return f"{effect.axis.key} = {_value(effect, place)} ({(size or 0) / 1e6:.3g} M parameters)"


def _value(effect: Effect, place: int) -> str:
    value = effect.levels[place].value
    return f"{value:.3g}" if not effect.axis.values else label(value)


def _reached(effect: Effect, place: int) -> str:
    return f"{effect.levels[place].objective:.3f}"


def _gain(contrast: Contrast) -> str:
    return f"{contrast.gain:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]"
