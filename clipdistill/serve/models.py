"""The models of a service: one in its variants, and perhaps another beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipdistill.core.errors import suggest
from clipdistill.serve.engine import Engine
from clipdistill.serve.problems import ProblemError

_SHOWN = 60  # characters of a name that is not ours


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One variant at work.

    Attributes:
        engine: Its encoder and its index.
        facts: What a client chooses by.
    """

    engine: Engine
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The models of a service.

    Attributes:
        first: The name of the variant that answers where none is named.
        ways: The model's variants by name, from the smallest index to the largest.
        other: The model that is shown beside it; None = none.
        texts_alone: The names of the models that cannot embed pictures.
    """

    first: str
    ways: Mapping[str, Way]
    other: Engine | None
    texts_alone: frozenset[str]

    @property
    def main(self) -> Engine:
        """The variant that answers where none is named."""
        return self.ways[self.first].engine

    @property
    def each(self) -> list[Engine]:
        """One engine a model: the main one, and the one that is shown beside it."""
        return [self.main, *([] if self.other is None else [self.other])]

    def takes_pictures(self, engine: Engine) -> bool:
        """Whether a model embeds pictures."""
        return engine.name not in self.texts_alone

    def variant(self, name: str | None) -> str:
        """The name of a variant that was asked for.

        Raises:
            ProblemError: 422 where there is none of this name.
        """
        if name is None:
            return self.first
        if name not in self.ways:
            raise ProblemError(422, f"variant: no variant {name[:_SHOWN]!r} here; {suggest(name[:_SHOWN], self.ways)}")
        return name

    def embedding(self, model: str | None, dim: int | None) -> Engine:
        """The engine that embeds as asked.

        Args:
            model: A model's name; None = the main one.
            dim: How wide the embeddings are to be; None = as they are.

        Raises:
            ProblemError: 404 where there is no such model, 422 where it has no such width.
        """
        known = {engine.name: engine for engine in self.each}
        engine = self.main if model is None else known.get(model)
        if engine is None:
            shown = str(model)[:_SHOWN]
            raise ProblemError(404, f"model: no model {shown!r} here; {suggest(shown, known)}")
        offered = [engine, *(way.engine for way in self.ways.values() if engine is self.main)]
        for each in offered:
            if dim in (None, each.searcher.encoder.dim):
                return each
        widths = sorted({each.searcher.encoder.dim for each in offered}, reverse=True)
        raise ProblemError(422, f"dimensions: {engine.name} has {' or '.join(map(str, widths))}, not {dim}")

    def to_json(self) -> list[dict[str, Any]]:
        """The models as ``/info`` tells them."""
        models = [
            {
                "name": engine.name,
                "dim": engine.searcher.encoder.dim,
                "vectors": len(engine.searcher.index),
                "pictures": self.takes_pictures(engine),
            }
            for engine in self.each
        ]
        models[0] |= {"variant": self.first, "variants": [dict(way.facts) for way in self.ways.values()]}
        return models
