"""The endpoints: what each request asks, checked, given to the engines, and answered."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from clipdistill.data.records import Picture
from clipdistill.page import load_page
from clipdistill.retrieval.exact import Vectors
from clipdistill.serve import bodies, schemas
from clipdistill.serve.engine import Answer, Engine
from clipdistill.serve.metrics import CONTENT_TYPE, Metrics
from clipdistill.serve.models import Models
from clipdistill.serve.options import Options
from clipdistill.serve.problems import AsciiJson, ProblemError, of_validation
from clipdistill.serve.thumbnails import Thumbnails
from clipdistill.serve.workers import Gate

Model = TypeVar("Model", bound=BaseModel)
_JSON = "application/json"
_INPUT = 'input: must be a text, {"text": ...}, {"image": base64}, or a list of these'


@final
class Routes:
    """The endpoints of one service.

    Args:
        models: The model in its variants, and perhaps the one it is compared with.
        options: The bounds.
        metrics: What ``/metrics`` shows.
        gate: The threads that decode thumbnails.
        thumbnails: The indexed pictures; None = none.
        count_tokens: Counts the tokens of texts; None = not counted.
    """

    def __init__(
        self,
        models: Models,
        options: Options,
        metrics: Metrics,
        gate: Gate,
        thumbnails: Thumbnails | None,
        count_tokens: Callable[[Sequence[str]], int] | None,
    ) -> None:
        self._models = models
        self._options, self._metrics, self._gate = options, metrics, gate
        self._thumbnails, self._count_tokens = thumbnails, count_tokens
        self._keys = frozenset(key for engine in models.each for key in engine.searcher.index.ids)
        self._bodies = bodies.Bodies(options)
        self._page = load_page()

    async def search(self, request: Request) -> Response:
        """Search by a text (JSON) or by a picture (the body itself, of Content-Type image/*)."""
        kind = bodies.media_type(request)
        async with self._bodies.read(request) as data:
            if kind == _JSON:
                asked = _valid(schemas.SearchRequest, bodies.parse_json(data))
                text = bodies.checked_text(asked.text, "text", self._options.text_chars)
                return await self._found(text, asked)
            if kind.startswith("image/"):
                query = _valid(schemas.SearchQuery, dict(request.query_params))
                return await self._found(Picture("picture", data=data), query)
        raise ProblemError(
            415,
            f"send {_JSON} with a text, or a picture as the body with its Content-Type (image/jpeg, image/png, ...)",
        )

    async def _found(self, query: str | Picture, asked: schemas.SearchRequest | schemas.SearchQuery) -> Response:
        variant = self._models.variant(asked.variant)
        main, other = self._models.ways[variant].engine, self._models.other if asked.compare else None
        if isinstance(query, Picture):
            self._check_pictures(main)
            other = other if other is not None and self._models.takes_pictures(other) else None
        searches = [engine.search(query, asked.k) for engine in (main, other) if engine is not None]
        answers = [await searches[0]] if len(searches) == 1 else await asyncio.gather(*searches)
        compared = None if other is None else self._shown(other, answers[1])
        return AsciiJson({**self._shown(main, answers[0]), "variant": variant, "compared": compared})

    def _check_pictures(self, engine: Engine) -> None:
        if not self._models.takes_pictures(engine):
            raise ProblemError(422, f"{engine.name} takes words alone: it has no tower for pictures. Send a text")

    def _shown(self, engine: Engine, answer: Answer) -> dict[str, Any]:
        hits = [
            {"rank": hit.rank, "key": hit.key, "score": hit.score, "item": self._address(hit.key)}
            for hit in answer.hits
        ]
        latency = {"encode": round(answer.encode_ms, 3), "search": round(answer.search_ms, 3)}
        return {"model": engine.name, "hits": hits, "latency_ms": latency}

    def _address(self, key: str) -> str | None:
        return None if self._thumbnails is None else "/items/" + quote(key, safe="/", errors="replace")

    async def embeddings(self, request: Request) -> Response:
        """Embed texts and pictures, as the OpenAI API does."""
        if bodies.media_type(request) != _JSON:
            raise ProblemError(415, f"send {_JSON}")
        async with self._bodies.read(request) as data:
            body = bodies.parse_json(data)
            self._check_count(body.get("input"))
            asked = _valid(schemas.EmbeddingsRequest, body)
            engine = self._models.embedding(asked.model, asked.dimensions)
            inputs = [self._input(each, place) for place, each in enumerate(_listed(asked.input))]
            if any(isinstance(each, Picture) for each in inputs):
                self._check_pictures(engine)
            rows = await _embedded(engine, inputs)
        texts = [each for each in inputs if isinstance(each, str)]
        tokens = self._count_tokens(texts) if texts and self._count_tokens is not None else 0
        shown = _base64 if asked.encoding_format == "base64" else _floats
        return AsciiJson(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": place, "embedding": shown(row)} for place, row in enumerate(rows)
                ],
                "model": engine.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def _check_count(self, value: object) -> None:
        """Before the schema sees it: a list of millions would be as many faults."""
        if isinstance(value, list) and not 1 <= len(value) <= self._options.inputs:
            raise ProblemError(422, f"input: {len(value)} items; from 1 to {self._options.inputs} are accepted")

    def _input(self, value: schemas.Input, place: int) -> str | Picture:
        where = f"input[{place}]"
        if isinstance(value, schemas.ImageInput):
            return Picture(where, data=bodies.picture_bytes(value.image, where))
        text = value.text if isinstance(value, schemas.TextInput) else value
        if isinstance(value, str) and bodies.is_data_url(value):
            return Picture(where, data=bodies.picture_bytes(value, where))
        return bodies.checked_text(text, where, self._options.text_chars)

    async def item(self, key: str) -> Response:
        """The thumbnail of an indexed picture, as JPEG."""
        data = None
        if self._thumbnails is not None and key in self._keys:
            self._gate.admit()
            data = await self._gate.run(self._thumbnails.jpeg, key)
        if data is None:
            raise ProblemError(404, "no such item, or no picture of it at hand")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def models(self) -> Response:
        """The models that can be named in an embeddings request, as the OpenAI API lists them."""
        names = [engine.name for engine in self._models.each]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "clipdistill"} for name in names]
        return AsciiJson({"object": "list", "data": data})

    async def info(self) -> Response:
        """What is served: models with their widths, vectors and variants, and the bounds of requests."""
        limits = {name: getattr(self._options, name) for name in ("body_bytes", "text_chars", "inputs", "pixels")}
        return AsciiJson(
            {"models": self._models.to_json(), "thumbnails": self._thumbnails is not None, "limits": limits}
        )

    async def health(self) -> Response:
        """Whether the service is up."""
        return AsciiJson({"status": "ok"})

    async def metrics(self) -> Response:
        """The counters, for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        """The search page."""
        headers = {"Content-Security-Policy": self._page.policy, "Cache-Control": "no-cache"}
        return Response(self._page.html, media_type="text/html; charset=utf-8", headers=headers)


def _valid(model: type[Model], body: dict[str, Any]) -> Model:
    try:
        return model.model_validate(body)
    except ValidationError as fault:
        if any(error["loc"][:1] == ("input",) and "input" in body for error in fault.errors()):
            raise ProblemError(422, _INPUT) from None  # a union's faults are one for each of its members
        raise of_validation(fault) from None


def _listed(value: schemas.Input | list[schemas.Input]) -> list[schemas.Input]:
    return value if isinstance(value, list) else [value]


async def _embedded(engine: Engine, inputs: Sequence[str | Picture]) -> Vectors:
    """Embed a mixed list, each kind in one go, and put the rows in the inputs' order."""
    texts = [place for place, each in enumerate(inputs) if isinstance(each, str)]
    pictures = [place for place, each in enumerate(inputs) if isinstance(each, Picture)]
    rows: npt.NDArray[np.float32] = np.empty((len(inputs), engine.searcher.encoder.dim), np.float32)

    async def embed_texts() -> None:
        rows[texts] = await engine.embed_texts([str(inputs[place]) for place in texts])

    async def embed_pictures() -> None:
        rows[pictures] = await engine.embed_pictures([each for each in inputs if isinstance(each, Picture)])

    await asyncio.gather(*([embed_texts()] if texts else []), *([embed_pictures()] if pictures else []))
    return rows


def _floats(row: Vectors) -> list[float]:
    return [float(value) for value in row]


def _base64(row: Vectors) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
