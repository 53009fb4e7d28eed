"""What the service's JSON bodies look like: checked on the way in, and shown in its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipdistill.search import MOST_HITS

_STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1, le=MOST_HITS)]


class SearchRequest(BaseModel):
    """A search by text; a search by picture sends the picture itself as the body, with ``k`` in the query."""

    model_config = _STRICT
    text: str
    k: Count = 10
    compare: bool = False
    variant: str | None = None


class SearchQuery(BaseModel):
    """The query string of a search by picture."""

    model_config = ConfigDict(extra="forbid")
    k: Count = 10
    compare: bool = False
    variant: str | None = None


class TextInput(BaseModel):
    """A text to embed."""

    model_config = _STRICT
    text: str


class ImageInput(BaseModel):
    """A picture to embed: base64, or a data URL. Addresses are not fetched."""

    model_config = _STRICT
    image: str


Input = str | TextInput | ImageInput


class EmbeddingsRequest(BaseModel):
    """What the OpenAI API's embeddings request holds, and pictures besides."""

    model_config = _STRICT
    input: Input | list[Input]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class FoundItem(BaseModel):
    """One hit: ``score`` is the cosine of query and item, ``item`` the address of its thumbnail, null without one."""

    rank: int
    key: str
    score: float
    item: str | None


class Latency(BaseModel):
    """Milliseconds that encoding the query (with its wait for the encoder) and searching took."""

    encode: float
    search: float


class Found(BaseModel):
    """The hits of one model, best first."""

    model: str
    hits: list[FoundItem]
    latency_ms: Latency


class SearchResponse(Found):
    """The hits, which of the model's variants found them, and another model's for the same query.

    That is null where it was not asked for, there is none, or the query is a picture and it has no tower for pictures.
    """

    variant: str
    compared: Found | None


class Embedding(BaseModel):
    """One unit vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts; 0 where the service has no tokenizer to count with."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ProblemBody(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
