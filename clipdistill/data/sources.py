"""The front door of the user's data: source entries in, checked rows out, with every refused row and its reason."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipdistill.core import files, fingerprint
from clipdistill.core.errors import ConfigError, DataError, suggest
from clipdistill.data.inputs import FORMATS, inputs_of
from clipdistill.data.pictures import PictureError, check_header, measured
from clipdistill.data.readers import Kind, Reading, Refused, Row, SourceSpec
from clipdistill.data.records import Pair, Picture, Rejection

__all__ = [
    "FORMATS",
    "Kind",
    "Source",
    "SourceSpec",
    "check_rejections",
    "load_source",
    "write_rejections",
]


@dataclass(frozen=True, slots=True)
class Source:
    """One split's rows, in order.

    Attributes:
        pairs: The rows; every key once.
        weights: For each pair the weight of the source it came from, for the sampler.
        rejected: The rows that were refused.
        labels: Every class that a row names, also those whose rows were all refused, in order of first appearance.
    """

    pairs: tuple[Pair, ...]
    weights: tuple[float, ...]
    rejected: tuple[Rejection, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.pairs) != len(self.weights):
            raise ValueError(
                f"a source needs a weight for each pair: {len(self.pairs)} pairs, {len(self.weights)} weights"
            )

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.pairs)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the rows' keys, captions, classes and pictures' sizes, in order; computed at every call.

        The pictures are not read: one that changes without changing its size is noticed by the cache, not here.
        """
        return fingerprint.of_lines(itertools.chain.from_iterable(map(_lines, self.pairs)))


def _lines(pair: Pair) -> Iterator[str]:
    yield pair.key
    yield "" if pair.picture is None else str(_bytes(pair.picture))
    yield str(len(pair.captions))
    yield from pair.captions
    if pair.label is not None:
        yield f"\0{pair.label}"  # a row without a class has no line for it; no key begins with this character


def _bytes(picture: Picture) -> int | None:
    return picture.size if picture.data is None else len(picture.data)


def load_source(
    specs: Sequence[SourceSpec],
    *,
    base: Path,
    max_pixels: int,
    kind: Kind = "pairs",
    taken: set[str] | None = None,
) -> Source:
    """Read one split's rows out of one or several sources, and refuse those that cannot be used.

    Every picture's header is checked; pixels are decoded later, where they are needed.

    Args:
        specs: The sources, in order.
        base: The folder that relative paths start from.
        max_pixels: The largest width times height that a picture's header may say.
        kind: ``pairs``: rows need a picture and a caption. ``classes``: they need a picture and a class, and captions
            are ignored. ``images``: captions are ignored. ``texts``: rows need a caption, and pictures are ignored.
        taken: Keys that other splits have already, with marks of where made keys come from; this split's are added. A
            made key, unlike the user's own, is lengthened where it is taken, so load the splits always in one order.

    Raises:
        ConfigError: For an unknown format, column or split, or an option that the format does not have.
        DataError: For a missing or unreadable file, or a source without a single row.
    """
    intake = _Intake(kind, max_pixels, set() if taken is None else taken)
    for spec in specs:
        if not (math.isfinite(spec.weight) and spec.weight > 0):
            raise ConfigError(f"data: {spec.path}: weight must be above 0, got {spec.weight}")
        reading = Reading(spec, kind, Path(os.path.normpath(Path.cwd() / base)))
        places: dict[str, int] = {}
        before = intake.seen
        try:
            for path, name in inputs_of(reading):
                for row in FORMATS[name].read(path, reading):
                    intake.take(row, spec.weight, places)
        except OSError as error:
            raise DataError(f"{spec.path}: cannot be read: {error}") from error
        if intake.seen == before:
            _no_rows(reading)
    return Source(tuple(intake.pairs), tuple(intake.weights), tuple(intake.rejected), tuple(intake.labels))


def _no_rows(reading: Reading) -> None:
    spec = reading.spec
    if spec.split is not None and reading.splits:
        raise ConfigError(f"data: {spec.path}: no row of split {spec.split!r}; {suggest(spec.split, reading.splits)}")
    raise DataError(f"{spec.path}: it holds no rows; check the path, and the format where it is not by the file's name")


class _Intake:
    """Rows on their way into a source: each is checked, then kept or refused."""

    def __init__(self, kind: Kind, max_pixels: int, taken: set[str]) -> None:
        self._kind, self._max_pixels, self._taken = kind, max_pixels, taken
        self._first: dict[str, str] = {}
        self.seen = 0
        self.pairs: list[Pair] = []
        self.weights: list[float] = []
        self.rejected: list[Rejection] = []
        self.labels: dict[str, None] = {}

    def take(self, row: Row | Rejection, weight: float, places: dict[str, int]) -> None:
        """Keep or refuse one row; ``places`` remembers where this source's rows stand, for those that join others."""
        self.seen += 1
        if isinstance(row, Rejection):
            self.rejected.append(Rejection(_printable(row.key), _printable(row.reason), _printable(row.origin)))
            return
        try:
            label = self._label(row)
            captions = self._captions(row)
            mark = _mark(row)
            at = places.get(mark or "") if row.joins else None
            if at is not None and label != self.pairs[at].label:
                raise Refused(f"second label: {label!r}, and {self.pairs[at].label!r} in an earlier row")
            if at is not None:
                self.pairs[at] = replace(self.pairs[at], captions=self.pairs[at].captions + captions)
                return
            key = self._key(row, mark)
            picture = self._picture(row)
        except (Refused, PictureError) as fault:
            self.rejected.append(Rejection(_printable(row.key), _printable(fault.reason), _printable(row.origin)))
            return
        for name in (key, mark) if mark else (key,):
            self._taken.add(name)
            self._first.setdefault(name, row.origin)
        if row.joins and mark:
            places[mark] = len(self.pairs)
        self.pairs.append(Pair(key, picture, captions, label))
        self.weights.append(weight)

    def _label(self, row: Row) -> str | None:
        if self._kind != "classes":
            return None
        if row.label is None or row.label.isspace():
            raise Refused("no label")
        if _broken(row.label):
            raise Refused("label is not UTF-8")
        self.labels.setdefault(row.label)
        return row.label

    def _captions(self, row: Row) -> tuple[str, ...]:
        if self._kind in ("images", "classes"):
            return ()
        if any(_broken(text) for text in row.captions):
            raise Refused("caption is not UTF-8")
        captions = tuple(text for text in row.captions if text and not text.isspace())
        if not captions:
            raise Refused("no text" if self._kind == "texts" else "no caption")
        return captions

    def _key(self, row: Row, mark: str | None) -> str:
        if _broken(row.key):
            raise Refused("key is not UTF-8")
        if "\0" in row.key:
            raise Refused("key holds a NUL character")
        if mark in self._taken:
            raise Refused(f"duplicate key: first in {self._first.get(mark or '', 'another split')}")
        free = next((name for name in _names(row) if name not in self._taken), None)
        if free is None:
            raise Refused(f"duplicate key: first in {self._first.get(row.key, 'another split')}")
        return free

    def _picture(self, row: Row) -> Picture | None:
        if self._kind == "texts":
            return None
        if row.picture is None:
            raise Refused("no picture")
        picture = measured(row.picture)
        check_header(picture, self._max_pixels)
        return picture


def _mark(row: Row) -> str | None:
    """What stands among the taken keys for the place of a row whose key was made; no key holds a NUL character."""
    return None if row.file is None else f"{os.path.normpath(row.file)}\0{row.inside}"


def _names(row: Row) -> Iterator[str]:
    """The keys that a row can have, in the order they are tried: its own, then longer and longer ends of its path.

    The folder that relative paths start from plays no part, so the keys stay when the run is started elsewhere.
    """
    yield row.key
    if row.file is not None:
        path = row.file.with_suffix("") / row.inside if row.inside else row.file
        parts = Path(os.path.normpath(path)).parts[1:]
        for length in range(row.key.count("/") + 2, len(parts) + 1):
            yield "/".join(parts[-length:])


def _broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_rejections(path: Path, rejections: Iterable[Rejection]) -> None:
    """Write refused rows as JSON Lines of key, reason and origin, ordered by origin, key and reason."""
    ordered = sorted(rejections, key=lambda item: (item.origin, item.key, item.reason))
    lines = (
        json.dumps({"key": item.key, "reason": item.reason, "origin": item.origin}, ensure_ascii=False) + "\n"
        for item in ordered
    )
    files.write_text(path, "".join(lines))


def check_rejections(
    rejected_count: int, total: int, max_rejected: float, where: str, rejections: Iterable[Rejection] = ()
) -> None:
    """Fail when more rows were refused than the user allows.

    Args:
        rejected_count: How many rows were refused.
        total: How many rows there were, the refused ones included.
        max_rejected: Below 1 a share of the rows, from 1 on a count.
        where: The file that lists them: the path of ``rejected.jsonl``.
        rejections: The refused rows, for their commonest reasons.

    Raises:
        DataError: With both numbers, the commonest reasons, and where the rows are listed.
    """
    allowed = max_rejected if max_rejected >= 1 else max_rejected * total
    if rejected_count <= allowed:
        return
    limit = f"{max_rejected:g} rows" if max_rejected >= 1 else f"{max_rejected:g} of the rows, {math.floor(allowed)}"
    common = ", ".join(f"{reason} ({count})" for reason, count in count_reasons(rejections).items())
    raise DataError(
        f"{rejected_count} of {total} rows were refused, and data.max_rejected allows {limit}"
        + (f": {common}" if common else "")
        + f". They are listed in {where}; mend them, or raise data.max_rejected."
    )


def count_reasons(rejections: Iterable[Rejection]) -> dict[str, int]:
    """How many rows were refused for each kind of reason (the part before the first colon), the commonest first."""
    counts = Counter(item.reason.partition(":")[0] for item in rejections)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
