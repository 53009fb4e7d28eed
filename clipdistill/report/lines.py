"""Plain lines for the terminal: what an inspection found, and the demo's figures beside their bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from clipdistill.core.progress import duration


class Bound(Protocol):
    """A bar as this module needs it."""

    @property
    def bound(self) -> float:
        """The value to reach."""
        ...

    @property
    def at_least(self) -> bool:
        """Whether the figure must not be below it; else not above it."""
        ...

    @property
    def timed(self) -> bool:
        """Whether a miss only shows."""
        ...

    @property
    def aim(self) -> float | None:
        """What would be good."""
        ...

    def met(self, value: float) -> bool:
        """Whether a figure reaches the bar."""
        ...


def bar_lines(figures: Mapping[str, Any], bars: Mapping[str, Bound]) -> Iterator[str]:
    """The figures beside their bars, a line each; a missed bar is marked.

    Args:
        figures: The figures by name.
        bars: The bars by the same names; a figure without one is shown alone.
    """
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        text = f"{name:<{width}}  {_number(value):>10}"
        bar = bars.get(name)
        yield text if bar is None else f"{text}  {_verdict(bar, float(value))}"


def _verdict(bar: Bound, value: float) -> str:
    word = "at least" if bar.at_least else "at most"
    aim = "" if bar.aim is None else f", aim {bar.aim:g}"
    state = "ok" if bar.met(value) else ("MISSED (timed: does not fail the demo)" if bar.timed else "MISSED")
    return f"{word} {bar.bound:g}{aim}: {state}"


def inspection_lines(found: Mapping[str, Any], rejected: Path) -> Iterator[str]:
    """An inspection in words: the sets, what was refused, and the cost.

    Args:
        found: What :func:`clipdistill.stages.inspect.inspect` returns.
        rejected: Where all refused rows are listed.
    """
    for name, survey in found["sets"].items():
        yield from _survey_lines(name, survey)
    if found["unused"]:
        yield f"data.fraction leaves {found['unused']} more rows of train unused"
    extra = found["unpaired"]
    if extra["images"] or extra["texts"]:
        yield f"unpaired  {extra['images']} pictures, {extra['texts']} texts"
    if any(survey["rejected"] for survey in found["sets"].values()):
        yield f"all refused rows, with reasons: {rejected}"
    yield from _coverage_lines(found["coverage"])
    yield from _cost_lines(found["cost"])


def _survey_lines(name: str, survey: Mapping[str, Any]) -> Iterator[str]:
    captions = ", ".join(f"{rows} with {number}" for number, rows in survey["captions_a_row"].items())
    yield f"{name}: {survey['rows']} rows, {survey['pictures']} pictures, {survey['captions']} captions"
    yield f"  captions a row: {captions or 'none'}; {survey['unique_texts']} unique texts"
    if survey["pictures"] > survey["sampled_pictures"]:
        yield f"  the next three lines are of {survey['sampled_pictures']} pictures, evenly spread"
    yield f"  width  {_spread(survey['width'], 'px')}; height {_spread(survey['height'], 'px')}"
    yield f"  picture size  {_spread(survey['picture_bytes'], 'bytes')}"
    yield f"  the same picture again: {survey['duplicate_pictures']}; the same text again: {survey['duplicate_texts']}"
    yield f"  caption length  {_spread(survey['caption_words'], 'words')}"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in survey["rejected"].items())
    yield f"  refused rows: {reasons or 'none'}"
    yield from (f"    {row['key']}: {row['reason']} ({row['origin']})" for row in survey["rejected_rows"])


def _spread(values: Mapping[str, Any] | None, unit: str) -> str:
    if not values:
        return "unknown"
    median = f"{_number(values['median'])} {unit} (median)"
    return f"{median}, {_number(values['minimum'])} to {_number(values['maximum'])}, 95% up to {_number(values['p95'])}"


def _coverage_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each set's pictures and texts, and a warning for each that training does not cover."""
    origin = {"cache": "the teacher's cache", "embeddings": "the adopted embeddings", "sample": "a sample"}
    if not found["from"]:
        yield f"coverage: not measured: {found['note']}"
        return
    why = f" ({found['note']})" if found["note"] else ""
    yield f"coverage by train in the teacher's space, from {origin[found['from']]}{why};"
    yield "  distance = 1 - cosine to the nearest training row; effective rank = over how many directions rows spread:"
    for kind in ("pictures", "texts"):
        measured = {name: sides[kind] for name, sides in found["sets"].items() if kind in sides}
        for row in list(measured.values())[:1]:
            yield f"  {kind}, train itself: {_distances(row, 'own_')} ({row['rows']} rows)"
        for name, row in measured.items():
            yield f"  {kind}, {name}: {_distances(row, '')}; {row['far']:.0%} beyond train's own 95%"
    for name, sides in found["sets"].items():
        for kind, row in sides.items():
            if row["faults"]:
                yield f"  WARNING: train does not cover the {kind} of {name}: {'; '.join(row['faults'])}"


def _distances(row: Mapping[str, Any], whose: str) -> str:
    median, p90, rank = (row[f"{whose}{name}"] for name in ("median", "p90", "rank"))
    return f"distance {median:.3f} (median), {p90:.3f} (90%); effective rank {rank:.0f}"


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    yield "cost:"
    members = cost.get("members", ())
    for part in members or (cost,):
        yield from _teacher_lines(part)
    if members:
        yield f"  all {len(members)} teachers: {cost['teacher_parameters'] / 1e6:.1f} M parameters"
    if "estimated_seconds" in cost:
        yield f"  cache: {cost['cache_bytes'] / 1e6:.1f} MB of embeddings"
        yield from _block_lines(cost["blocks"])
        done = " (it is cached already: nothing to pay)" if cost["cached_already"] else ""
        yield f"  estimated: {duration(cost['estimated_seconds'])} = {cost['estimated_hours']:.2f} hours{done}"


def _teacher_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    if "pictures_per_s" not in cost:
        yield f"  the teacher's embeddings are adopted from {cost['teacher']}: no teacher is run"
        return
    yield f"  teacher: {cost['teacher']}, {cost['teacher_parameters'] / 1e6:.1f} M parameters, on {cost['device']}"
    yield (
        f"  {cost['picture_passes']} picture passes at {cost['pictures_per_s']:.1f} a second, "
        f"{cost['text_passes']} text passes at {cost['texts_per_s']:.1f} a second (measured now)"
    )


def _block_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    if not found:
        return
    told = f"  inner blocks: {found['blocks']} of the teacher's, {found['bytes'] / 1e6:.1f} MB"
    if found["store"] == "cache":
        took = duration(found["estimated_seconds"])
        yield f"{told}: stored beside its embeddings, by one more pass over the training rows in {took}"
    elif found["bytes"] > found["max_bytes"]:
        limit = f"features.max_bytes ({found['max_bytes'] / 1e6:.1f} MB)"
        yield f"{told}: more than {limit}: the teacher runs on each batch"
    else:
        yield f"{told} if stored: the teacher runs on each batch instead"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."
