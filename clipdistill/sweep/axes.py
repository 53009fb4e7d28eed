"""The axes of a sweep: which keys of the configuration change, to which values, and whether it takes them."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import RangeConfig, RunConfig, Section, SweepConfig
from clipdistill.core.errors import ConfigError, suggest
from clipdistill.stages.inputs import name_checks

Params = Mapping[str, Any]
"""A trial's values by the axes' keys."""

_REFUSED: Mapping[str, str] = {
    "name": "a name changes nothing",
    "seed": "set sweep.seeds instead",
    "sweep": "a sweep does not change itself",
    "data.val": "the trials are compared on it",
    "data.hold_out": "the trials are compared on what it sets aside",
    "cache.folder": "every teacher gets its own by itself",
}
_IDENTITY = ("model", "pretrained", "embeddings", "logit_scale", "logit_bias", "members")
_MOST_COMBINATIONS = 200


@dataclass(frozen=True, slots=True)
class Axis:
    """One changing key of the configuration.

    Attributes:
        key: Its dotted name; a section's own name where the values are tables.
        values: A finite axis's values; empty for a range.
        low: A range's lower end.
        high: Its upper end.
        log: Whether a range is sampled evenly in its logarithm.
        whole: Whether a range has whole numbers only.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The values as text, which a storage keeps."""
        return tuple(label(value) for value in self.values)

    @property
    def kind(self) -> str:
        """What it trades: ``capacity``, ``data``, ``teacher`` or ``length``; else it is a ``choice`` of settings."""
        section = self.key.split(".")[0]
        if self.key in ("train.steps", "train.budget_minutes"):
            return "length"
        return {"student": "capacity", "data": "data", "teacher": "teacher"}.get(section, "choice")


def label(value: Any) -> str:
    """A value as JSON text with sorted keys: ``"nano"``, ``0.5``, ``{"image": "nano", "text": "nano"}``."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def config_keys() -> dict[str, Any]:
    """The annotation of every section and key of the configuration, by dotted name."""
    return dict(_fields(RunConfig, ""))


def _fields(section: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")


def read_axes(sweep: SweepConfig) -> tuple[Axis, ...]:
    """The axes of a configuration; a range of a grid, or one with a step, becomes a list.

    Raises:
        ConfigError: If there is none, a key is unknown or refused, or a range does not fit its key or the sampler.
    """
    if not sweep.axes:
        raise ConfigError('sweep.axes: no axis is given. Give one, such as "loss.temperature" = [0.5, 1.0, 2.0]')
    known = config_keys()
    axes = [_axis(key, value, known) for key, value in sweep.axes.items() if key in known]
    faults = [fault for key in sweep.axes for fault in _key_faults(key, known, list(sweep.axes))]
    faults += [fault for axis in axes for fault in _axis_faults(axis, sweep, known[axis.key])]
    if faults:
        raise ConfigError(faults)
    return tuple(axes)


def _axis(key: str, value: RangeConfig | tuple[Any, ...], known: Mapping[str, Any]) -> Axis:
    if not isinstance(value, RangeConfig):
        return Axis(key, value)
    whole = float not in _numbers(known[key])
    if value.step is not None:
        return Axis(key, tuple(int(point) if whole else point for point in value.points()))
    if whole and not value.log and value.high - value.low < _MOST_COMBINATIONS:
        return Axis(key, tuple(range(int(value.low), int(value.high) + 1)))
    return Axis(key, (), value.low, value.high, value.log, whole)


def _key_faults(key: str, known: Mapping[str, Any], others: Sequence[str]) -> Iterator[str]:
    if key not in known:
        yield f"sweep.axes: no key {key!r} in the configuration; {suggest(key, known)}"
    for name, reason in _REFUSED.items():
        if key == name or key.startswith(f"{name}."):
            yield f"sweep.axes: {key} cannot be an axis: {reason}"
    for other in others:
        if other.startswith(f"{key}."):
            yield f"sweep.axes: {other} is a part of {key}, which is an axis too: give one of them"


def _axis_faults(axis: Axis, sweep: SweepConfig, annotation: Any) -> Iterator[str]:
    given = sweep.axes[axis.key]
    if isinstance(given, RangeConfig):
        if not _numbers(annotation):
            yield f"sweep.axes: {axis.key} takes no numbers: give a list of values instead of a range"
        elif float not in _numbers(annotation) and any(
            not float(number).is_integer() for number in (given.low, given.high, given.step or 1)
        ):
            yield f"sweep.axes: {axis.key} takes whole numbers only: low, high and step must be whole"
        elif not axis.values and sweep.sampler == "grid":
            yield f'sweep.axes: {axis.key}: a grid needs a list of values or a step (or sweep.sampler = "random")'
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    for value in axis.values:
        if is_section and not isinstance(value, Mapping):
            yield f"sweep.axes: {axis.key} is a section: its values are tables such as {{...}}, got {label(value)}"
    twice = [text for place, text in enumerate(axis.labels) if text in axis.labels[:place]]
    if twice:
        yield f"sweep.axes: {axis.key}: the value {twice[0]} is given twice"


def _numbers(annotation: Any) -> set[type]:
    """Which of int and float an annotation takes."""
    found = {annotation} & {int, float} if isinstance(annotation, type) else set()
    for part in typing.get_args(annotation):
        found |= _numbers(part)
    return found


def trial_config(base: RunConfig, folder: Path, params: Params) -> RunConfig:
    """The configuration of a run with some keys changed, checked as if it had been written so.

    Args:
        base: The sweep's configuration.
        folder: Where relative paths among the values start.
        params: The values by dotted key; a table is merged into its section.

    Raises:
        ConfigError: With every fault.
    """
    raw = base.model_dump(mode="json", exclude_none=True, exclude={"sweep"})
    for key, value in params.items():
        *sections, name = key.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        if isinstance(value, Mapping) and isinstance(place.get(name), dict) and _is_section(key):
            _merge(place[name], value, drop=_IDENTITY if key == "teacher" else ())
        else:
            place[name] = value
    return RunConfig.parse(raw, folder, checks=[name_checks])


def _is_section(key: str) -> bool:
    annotation = config_keys().get(key)
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _merge(section: dict[str, Any], value: Mapping[str, Any], *, drop: Sequence[str]) -> None:
    """Put a table's values into a section; another teacher takes the place of the whole old one."""
    if any(name in value for name in drop):
        for name in drop:
            section.pop(name, None)
    for name, item in value.items():
        if isinstance(item, Mapping) and isinstance(section.get(name), dict):
            _merge(section[name], item, drop=())
        else:
            section[name] = item


def check_values(base: RunConfig, folder: Path, axes: Sequence[Axis]) -> None:
    """Refuse values that the configuration does not take, before anything runs; of a range its ends are tried.

    A value that is refused alone may fit another axis's: then it stays, and the trials that it does not fit fail.

    Raises:
        ConfigError: Naming every axis and value that is refused with whatever the other axes give.
    """
    faults = []
    for axis in axes:
        for value in _tried(axis):
            fault = _fault(base, folder, {axis.key: value})
            if fault and not _fits_somewhere(base, folder, axis, value, axes):
                faults.append(f"sweep.axes: {axis.key} = {label(value)} is refused: {fault}")
    if faults:
        raise ConfigError(faults)


def _tried(axis: Axis) -> tuple[Any, ...]:
    ends = (int(axis.low), int(axis.high)) if axis.whole else (axis.low, axis.high)
    return axis.values or ends


def _fault(base: RunConfig, folder: Path, params: Params) -> str:
    try:
        trial_config(base, folder, params)
    except ConfigError as error:
        return error.faults[0]
    return ""


def _fits_somewhere(base: RunConfig, folder: Path, axis: Axis, value: Any, axes: Sequence[Axis]) -> bool:
    others = [other for other in axes if other is not axis]
    combinations = itertools.product(*(_tried(other) for other in others))
    for found in itertools.islice(combinations, _MOST_COMBINATIONS if others else 0):
        params = {axis.key: value, **dict(zip((other.key for other in others), found, strict=True))}
        if not _fault(base, folder, params):
            return True
    return False
