"""The application: a searcher in, a FastAPI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.search import Searcher
from clipdistill.serve import schemas
from clipdistill.serve.engine import Engine
from clipdistill.serve.guard import Guard
from clipdistill.serve.metrics import Metrics
from clipdistill.serve.models import Models, Way
from clipdistill.serve.options import Options
from clipdistill.serve.problems import MEDIA_TYPE, ProblemError, problem_response
from clipdistill.serve.routes import Routes
from clipdistill.serve.thumbnails import PictureSource, Thumbnails
from clipdistill.serve.variants import Variant, named
from clipdistill.serve.workers import Gate

_REFUSALS = {
    400: "Not JSON.",
    408: "The body did not arrive in time.",
    413: "Too large.",
    415: "Neither JSON nor a picture.",
    422: "A value out of bounds, or something that is not a picture.",
    503: "Too many requests wait; Retry-After says when to ask again.",
}
_PICTURE = {"image/*": {"schema": {"type": "string", "format": "binary"}}}


def create_app(
    searcher: Searcher | Variant,
    options: Options | None = None,
    *,
    name: str = "student",
    compared: tuple[str, Searcher] | None = None,
    variants: Sequence[Variant] = (),
    texts_alone: Collection[str] = (),
    pictures: PictureSource | None = None,
    count_tokens: Callable[[Sequence[str]], int] | None = None,
) -> FastAPI:
    """The search service as an ASGI application. It imports no torch unless an encoder does.

    Args:
        searcher: The encoder and its index.
        options: The bounds; the defaults where None.
        name: What the model is called in requests and answers.
        compared: A second model to show beside the first: its name, and its own searcher.
        variants: Further ways to search the same pictures, for the client to choose among.
        texts_alone: The names of the models that cannot embed pictures.
        pictures: Where thumbnails of the indexed pictures come from; None = no thumbnails.
        count_tokens: Counts the tokens of texts for ``usage``; 0 is reported where None.

    Raises:
        ConfigError: If both models have one name, or variants are of other pictures.
    """
    options = options or Options()
    if compared is not None and compared[0] == name:
        raise ConfigError(f"serve: both models are called {name!r}; give each a name of its own")
    metrics, gate = Metrics(), Gate(options.threads, options.waiting)
    # Searching and decoding do not wait for each other: a page full of thumbnails must not hold up the next search.
    decoding = Gate(options.threads, options.waiting)
    first = Variant(searcher) if isinstance(searcher, Searcher) else searcher
    ways = {
        way: Way(
            Engine(name, one.searcher, options, metrics, gate, series=name if one is first else f"{name} {way}"), facts
        )
        for way, (one, facts) in named([first, *variants]).items()
    }
    other = None if compared is None else Engine(*compared, options, metrics, gate)
    engines = [*(way.engine for way in ways.values()), *([] if other is None else [other])]
    main = next(way for way, each in ways.items() if each.engine.searcher is first.searcher)
    models = Models(main, ways, other, frozenset(texts_alone))
    routes = Routes(models, options, metrics, decoding, _thumbnails(pictures, options), count_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(gate)
            stack.enter_context(decoding)
            for engine in engines:
                await stack.enter_async_context(engine)
            yield

    app = FastAPI(
        title="clipdistill",
        description="Search by text or picture, and embeddings, from a distilled dual encoder.",
        version=version("clipdistill"),
        lifespan=lifespan,
        docs_url=None,  # both pages of FastAPI load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, routes)
    _add_handlers(app)
    app.add_middleware(Guard, metrics=metrics, hosts=options.hosts)
    return app


def _thumbnails(pictures: PictureSource | None, options: Options) -> Thumbnails | None:
    if pictures is None:
        return None
    return Thumbnails(
        pictures, side=options.thumbnail, pixels=options.pixels, cache_bytes=options.thumbnail_cache_bytes
    )


def _add_routes(app: FastAPI, routes: Routes) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {MEDIA_TYPE: {"schema": schemas.ProblemBody.model_json_schema()}}}
        for status, text in _REFUSALS.items()
    }
    app.add_api_route(
        "/search",
        routes.search,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": schemas.SearchResponse}, **refusals},
        openapi_extra={
            "requestBody": _body(schemas.SearchRequest, _PICTURE),
            "parameters": [
                _parameter(name, schema)
                for name, schema in schemas.SearchQuery.model_json_schema()["properties"].items()
            ],
        },
    )
    app.add_api_route(
        "/v1/embeddings",
        routes.embeddings,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": schemas.EmbeddingsResponse}, **refusals},
        openapi_extra={"requestBody": _body(schemas.EmbeddingsRequest)},
    )
    for path, endpoint in (
        ("/v1/models", routes.models),
        ("/items/{key:path}", routes.item),
        ("/info", routes.info),
        ("/healthz", routes.health),
        ("/metrics", routes.metrics),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_api_route("/", routes.page, methods=["GET"], response_model=None, include_in_schema=False)


def _body(model: type[Any], further: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": _inlined(model)}, **(further or {})}}


def _inlined(model: type[Any]) -> dict[str, Any]:
    """A model's schema with its definitions in place: references inside would point outside of this part."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            named = value.get("$ref")
            return filled(parts[named.rpartition("/")[2]]) if named else {k: filled(v) for k, v in value.items()}
        return [filled(each) for each in value] if isinstance(value, list) else value

    return dict(filled(schema))


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _add_handlers(app: FastAPI) -> None:
    async def problem(_: Request, fault: Exception) -> Response:
        return problem_response(_problem_of(fault))

    for kind in (ProblemError, HTTPException, DataError, ClientDisconnect):
        app.add_exception_handler(kind, problem)


def _problem_of(fault: Exception) -> ProblemError:
    if isinstance(fault, ProblemError):
        return fault
    if isinstance(fault, HTTPException):  # the router's own: no such route, or not this method
        return ProblemError(fault.status_code, str(fault.detail), fault.headers)
    if isinstance(fault, ClientDisconnect):
        return ProblemError(400, "the client went away before its body had arrived")
    return ProblemError(422, str(fault))
