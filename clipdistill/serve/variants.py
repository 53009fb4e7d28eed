"""Several ways to search the same pictures: narrower embeddings, smaller indexes, smaller students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipdistill.core.errors import ConfigError
from clipdistill.search import Searcher

MOST = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """One way.

    Attributes:
        searcher: The encoder and its index.
        model_bytes: What the encoder's files take; None where that is not known.
    """

    searcher: Searcher
    model_bytes: int | None = None

    def facts(self) -> dict[str, Any]:
        """What a client chooses by; megabytes are of 10^6 bytes."""
        index = self.searcher.index
        size = index.bytes_per_vector
        return {
            "dim": index.dim,
            "factory": index.factory,
            "bytes_per_vector": round(size, 1),
            "index_megabytes": round(size * len(index) / 1e6, 6),
            "model_megabytes": None if self.model_bytes is None else round(self.model_bytes / 1e6, 3),
        }


def named(variants: Sequence[Variant]) -> dict[str, tuple[Variant, dict[str, Any]]]:
    """Each variant with its facts by a name of its own, ``64-SQ8``: from the fewest bytes a vector to the most.

    Raises:
        ConfigError: If there are too many, or they do not index the same pictures: their results could not be compared.
    """
    if len(variants) > MOST:
        raise ConfigError(f"serve: {len(variants)} variants are too many; at most {MOST} can be served")
    keys = frozenset(variants[0].searcher.index.ids)
    found: dict[str, tuple[Variant, dict[str, Any]]] = {}
    for variant in variants:
        facts, ids = variant.facts(), variant.searcher.index.ids
        plain = name = f"{facts['dim']}-{facts['factory']}"
        if frozenset(ids) != keys:
            raise ConfigError(
                f"serve: the variant {name} indexes other pictures than the first "
                f"({len(ids)} rows, {len(keys)} there); build both indexes over the same ones"
            )
        while name in found:
            name = f"{plain}-{sum(other.startswith(plain) for other in found) + 1}"
        found[name] = (variant, {"name": name, **facts})
    return dict(sorted(found.items(), key=lambda item: (item[1][1]["bytes_per_vector"], item[1][1]["dim"])))
