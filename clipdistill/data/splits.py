"""Splits by hash: which part a row belongs to follows from the row alone, so everyone gets the same parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Pair
from clipdistill.data.sources import Source

By = Literal["key", "caption", "picture"]
REMAINDER = "train"
_SHARED = "data.fraction"


def split_by_hash(
    pairs: Sequence[Pair], shares: Mapping[str, float], by: By, seed_text: str = ""
) -> dict[str, list[Pair]]:
    """Share pairs out by the SHA-256 of one of their fields; the order of the pairs and of the shares is immaterial.

    Equal fields always fall into the same part: by ``caption``, pairs with the same first caption (compared in lower
    case, blanks run together) stay together; by ``picture``, pairs with the same bytes do.

    Args:
        pairs: The rows.
        shares: The share of the rows by the part's name; what they leave goes to ``train``.
        by: The field. A pair without it (no caption, no picture) is shared out by its key.
        seed_text: Mixed into the hash, for another division of the same rows.

    Returns:
        The pairs by part, in their order; every part of ``shares`` and ``train`` is there, empty or not.

    Raises:
        ConfigError: If a share is below 0 or they exceed 1 together.
        DataError: If ``by`` is ``picture`` and one cannot be read.
    """
    names = _parts(pairs, shares, by, seed_text)
    parts: dict[str, list[Pair]] = {name: [] for name in (*shares, REMAINDER)}
    for pair, name in zip(pairs, names, strict=True):
        parts[name].append(pair)
    return parts


def split_source(source: Source, shares: Mapping[str, float], by: By, seed_text: str = "") -> dict[str, Source]:
    """:func:`split_by_hash` for a source: a part keeps its pairs' weights; ``train`` keeps rejections and labels."""
    rows: dict[str, list[int]] = {name: [] for name in (*shares, REMAINDER)}
    for row, name in enumerate(_parts(source.pairs, shares, by, seed_text)):
        rows[name].append(row)
    return {
        name: Source(
            pairs=tuple(source.pairs[row] for row in mine),
            weights=tuple(source.weights[row] for row in mine),
            rejected=source.rejected if name == REMAINDER else (),
            labels=source.labels if name == REMAINDER else (),
        )
        for name, mine in rows.items()
    }


def share_of_source(source: Source, share: float) -> Source:
    """The rows of a source whose key's SHA-256 lies in the first ``share`` of all hashes, in their order.

    Which rows they are follows from their keys alone, so every smaller share is a part of every larger one. The hash
    is not that of :func:`split_source`: the rows that a hold-out left are shared out evenly all the same.

    Args:
        source: The rows; their rejections are kept, as a refused row has no part in this.
        share: Above 0 and up to 1.
    """
    rows = [row for row, pair in enumerate(source.pairs) if share >= 1 or _unit(_field(pair, "key"), _SHARED) < share]
    pairs, weights = tuple(source.pairs[row] for row in rows), tuple(source.weights[row] for row in rows)
    return replace(source, pairs=pairs, weights=weights)


def _parts(pairs: Sequence[Pair], shares: Mapping[str, float], by: By, seed_text: str) -> list[str]:
    if by not in ("key", "caption", "picture"):
        raise ConfigError(f"data.hold_out.by: must be key, caption or picture, got {by!r}")
    total = math.fsum(shares.values())
    if not all(share >= 0 for share in shares.values()) or total > 1 + 1e-9:
        raise ConfigError(f"data.hold_out: the shares must be 0 or more and 1 together at most, got {dict(shares)}")
    names = sorted(name for name in shares if name != REMAINDER)
    bounds = list(accumulate(shares[name] for name in names))
    return [_part(_unit(_field(pair, by), seed_text), names, bounds) for pair in pairs]


def _part(place: float, names: Sequence[str], bounds: Sequence[float]) -> str:
    return next((name for name, bound in zip(names, bounds, strict=True) if place < bound), REMAINDER)


def _field(pair: Pair, by: By) -> bytes:
    if by == "caption" and pair.captions:
        return " ".join(pair.captions[0].lower().split()).encode("utf-8")
    if by == "picture" and pair.picture is not None:
        try:
            return pair.picture.read()
        except OSError as error:
            raise DataError(f"{pair.picture.origin}: cannot be read for the split by picture: {error}") from error
    return pair.key.encode("utf-8")


def _unit(field: bytes, seed_text: str) -> float:
    """The first 53 bits of the hash as a number in [0, 1)."""
    digest = hashlib.sha256(seed_text.encode("utf-8") + b"\0" + field).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
