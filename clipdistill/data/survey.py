"""Survey: what a source holds, counted before anything expensive runs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipdistill.core import fingerprint
from clipdistill.data.pictures import PictureError, check_header, measured
from clipdistill.data.records import Picture, Rejection
from clipdistill.data.sources import Source, count_reasons

SAMPLE = 20_000
"""At most so many pictures are opened, spread evenly over the rows; the survey says how many were."""
LISTED = 20
"""So many refused rows are listed in full."""
_ANY_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is spread: the least, the median, the 95th percentile (nearest rank) and the largest value."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What a source holds.

    Attributes:
        rows: Rows that are kept.
        pictures: Rows with a picture.
        captions: Texts, repeated ones included.
        unique_texts: Different texts: so many does the teacher encode.
        captions_a_row: How many rows have so many captions.
        sampled_pictures: How many pictures the following figures of pictures are from.
        unreadable_pictures: How many of these could not be opened (they were when the source was read).
        width: In pixels, as stored.
        height: In pixels, as stored.
        pixels: Width times height.
        picture_bytes: Encoded bytes a picture.
        caption_words: Words a caption, blanks between them.
        caption_characters: Characters a caption.
        duplicate_pictures: How many of the sampled pictures have the very bytes of an earlier one.
        duplicate_texts: How many captions repeat an earlier one.
        rejected: Refused rows, by the kind of reason, the commonest first.
        rejected_rows: The first refused rows.
        fingerprint: The source's fingerprint.
    """

    rows: int
    pictures: int
    captions: int
    unique_texts: int
    captions_a_row: dict[int, int]
    sampled_pictures: int
    unreadable_pictures: int
    width: Spread | None
    height: Spread | None
    pixels: Spread | None
    picture_bytes: Spread | None
    caption_words: Spread | None
    caption_characters: Spread | None
    duplicate_pictures: int
    duplicate_texts: int
    rejected: dict[str, int]
    rejected_rows: tuple[Rejection, ...]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The survey as plain values, with string keys."""
        value = asdict(self)
        value["captions_a_row"] = {str(number): rows for number, rows in self.captions_a_row.items()}
        value["rejected_rows"] = list(value["rejected_rows"])
        return value


def survey(source: Source, *, sample: int = SAMPLE) -> Survey:
    """Count what a source holds; of pictures beyond ``sample``, evenly spread ones stand for the rest.

    Only headers are read, and of pictures with equal numbers of bytes also the bytes, to find duplicates.

    Args:
        source: The rows.
        sample: At most so many pictures are opened.
    """
    texts = [text for pair in source.pairs for text in pair.captions]
    pictures = [pair.picture for pair in source.pairs if pair.picture is not None]
    opened, sizes = _opened(_evenly(pictures, sample))
    unique = len(set(texts))
    return Survey(
        rows=len(source),
        pictures=len(pictures),
        captions=len(texts),
        unique_texts=unique,
        captions_a_row=dict(sorted(Counter(len(pair.captions) for pair in source.pairs).items())),
        sampled_pictures=min(len(pictures), sample),
        unreadable_pictures=min(len(pictures), sample) - len(opened),
        width=spread([width for width, _ in sizes]),
        height=spread([height for _, height in sizes]),
        pixels=spread([width * height for width, height in sizes]),
        picture_bytes=spread([_bytes(picture) for picture in opened]),
        caption_words=spread([len(text.split()) for text in texts]),
        caption_characters=spread([len(text) for text in texts]),
        duplicate_pictures=_duplicates(opened),
        duplicate_texts=len(texts) - unique,
        rejected=count_reasons(source.rejected),
        rejected_rows=source.rejected[:LISTED],
        fingerprint=source.fingerprint,
    )


def spread(values: Sequence[int]) -> Spread | None:
    """The spread of some values, or None of none."""
    if not values:
        return None
    ordered = sorted(values)
    half = len(ordered) // 2
    median = float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return Spread(ordered[0], median, ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1])


def _evenly(pictures: Sequence[Picture], sample: int) -> list[Picture]:
    if len(pictures) <= sample:
        return list(pictures)
    return [pictures[number * len(pictures) // sample] for number in range(sample)]


def _opened(pictures: Sequence[Picture]) -> tuple[list[Picture], list[tuple[int, int]]]:
    """The pictures that can be opened, with their numbers of bytes filled in, and each one's width and height."""
    opened, sizes = [], []
    for picture in pictures:
        try:
            found = measured(picture)
            sizes.append(check_header(found, max_pixels=_ANY_SIZE))
            opened.append(found)
        except PictureError:  # it passed when the source was read: it is counted as unreadable
            continue
    return opened, sizes


def _bytes(picture: Picture) -> int:
    return picture.size or 0 if picture.data is None else len(picture.data)


def _duplicates(pictures: Sequence[Picture]) -> int:
    """Equal bytes have an equal number: only pictures that share theirs with another are read."""
    groups: defaultdict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[_bytes(picture)].append(picture)
    return sum(
        len(group) - len({fingerprint.of_bytes(_read(picture)) for picture in group})
        for group in groups.values()
        if len(group) > 1
    )


def _read(picture: Picture) -> bytes:
    try:
        return picture.read()
    except OSError:
        return picture.origin.encode("utf-8", "backslashreplace")  # it cannot be compared: it stands for itself
