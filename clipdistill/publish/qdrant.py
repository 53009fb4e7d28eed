"""Qdrant, a server or a folder: points by an id that follows from the key, the encoder in the collection's metadata."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.publish.faults import check_made, lost, one_line
from clipdistill.publish.target import Floats, Found, Layout, Mask, by_score, check_k

API_KEY = "QDRANT_API_KEY"
_NAMESPACE = uuid.UUID("5e0d5b0e-6f0c-5a3d-9d0e-0c7f7c1d9a11")
_ENCODER = "clipdistill.encoder"
_BAD_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_SECONDS = 60
_NUMBERS_A_REQUEST = 1_000_000  # about 20 MB of JSON; a server takes 32


@final
class QdrantCollection:
    """A collection of points with the payload ``key``. Make one with :func:`open_qdrant`.

    Similarity is the inner product, which for unit rows is the cosine: under Qdrant's own cosine it would divide each
    row by its length again and change its last bits.
    """

    __slots__ = ("_client", "_layout", "_local", "_place")

    def __init__(self, client: QdrantClient, layout: Layout, place: str, *, local: bool) -> None:
        self._client, self._layout, self._place, self._local = client, layout, place, local

    def prepare(self) -> None:
        """Make the collection where there is none, and hold an existing one against the layout.

        Raises:
            MismatchError: If it was made from something else.
            DataError: If the server cannot hold the encoder's fingerprint.
        """
        name = self._layout.table
        with _answers(self._place):
            made = not self._client.collection_exists(name)
            if made:
                self._create()
            config = self._client.get_collection(name).config
            if made and not config.metadata:
                self._client.delete_collection(name)
                raise DataError("collections have no metadata, so nothing would say which encoder made the rows")
        vectors = config.params.vectors
        single = vectors if isinstance(vectors, models.VectorParams) else None
        expected = {"dim": self._layout.dim, "distance": "Dot", "encoder": self._layout.encoder}
        found = {
            "dim": single.size if single else "named vectors",
            "distance": single.distance.value if single else "named vectors",
            "encoder": (config.metadata or {}).get(_ENCODER, "none"),
        }
        check_made(f"collection {name!r}", expected, found)

    def changed(self, keys: Sequence[str], vectors: Floats) -> Mask:
        """Which rows the collection does not hold bit for bit: bool [len(keys)]."""
        ids = [point_id(key) for key in keys]
        with _answers(self._place):
            points = self._client.retrieve(self._layout.table, ids, with_payload=False, with_vectors=True)
        held = {str(point.id): np.asarray(point.vector, np.float32).tobytes() for point in points}
        return np.array([held.get(i) != row.tobytes() for i, row in zip(ids, vectors, strict=True)], np.bool_)

    def upsert(self, keys: Sequence[str], vectors: Floats) -> None:
        """Insert or replace points, in requests of up to a million numbers, each durable when it is answered."""
        step = max(1, _NUMBERS_A_REQUEST // self._layout.dim)
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            points = models.Batch(
                ids=[point_id(key) for key in part],
                vectors=vectors[start : start + step].tolist(),
                payloads=[{"key": key} for key in part],
            )
            with _answers(self._place):
                self._client.upsert(self._layout.table, points, wait=True)

    def build_index(self) -> str | None:
        """Say which graph the server keeps, which builds it while rows arrive; a folder has none, and is exact."""
        if self._local or not self._layout.index:
            return None
        with _answers(self._place):
            graph = self._client.get_collection(self._layout.table).config.hnsw_config
        return f"HNSW of the server, m {graph.m}, ef_construction {graph.ef_construct}"

    def count(self) -> int:
        """How many points the collection holds."""
        with _answers(self._place):
            return int(self._client.count(self._layout.table, exact=True).count)

    def nearest(self, query: Floats, k: int, *, exact: bool = False) -> list[Found]:
        """The k nearest points by inner product, best first."""
        check_k(k)
        params = None if self._local else models.SearchParams(exact=exact, hnsw_ef=max(128, 2 * k))
        with _answers(self._place):
            answer = self._client.query_points(
                self._layout.table, query=query.tolist(), limit=k, search_params=params, with_payload=["key"]
            )
        return by_score([Found(str((point.payload or {})["key"]), float(point.score)) for point in answer.points])

    def close(self) -> None:
        """Close the client; a folder is free for another process then."""
        self._client.close()

    def _create(self) -> None:
        layout = self._layout
        self._client.create_collection(
            layout.table,
            vectors_config=models.VectorParams(size=layout.dim, distance=models.Distance.DOT),
            # Without links there is no graph, and each search looks at every point.
            hnsw_config=models.HnswConfigDiff(m=layout.m if layout.index else 0, ef_construct=layout.ef_construction),
            metadata={_ENCODER: layout.encoder},
        )


def point_id(key: str) -> str:
    """The id of a key's point: the same for ever, so that publishing again replaces it (UUID version 5)."""
    return str(uuid.uuid5(_NAMESPACE, key))


def open_qdrant(url: str, layout: Layout) -> QdrantCollection:
    """Connect to a server or open a folder, and make the collection ready.

    Args:
        url: ``https://host:6333``; a folder's path; or ``:memory:``, which ends with the process. The key of a server
            is taken from ``QDRANT_API_KEY``, never from the URL.
        layout: The collection.

    Raises:
        ConfigError: If the URL or the name cannot be.
        ConnectionError: If the server cannot be reached.
        MismatchError: If the collection was made from something else.
        DataError: If the server refuses, or another process holds the folder.
    """
    if not 1 <= len(layout.table) <= 255 or layout.table in (".", "..") or _BAD_NAME.search(layout.table):
        raise ConfigError(f'--table: {layout.table!r}: Qdrant takes 1 to 255 characters, none of < > : " / \\ | ? *')
    place, client, local = _connect(url)
    collection = QdrantCollection(client, layout, place, local=local)
    try:
        collection.prepare()
    except BaseException:
        client.close()
        raise
    return collection


def _connect(url: str) -> tuple[str, QdrantClient, bool]:
    """The place without secrets, a client, and whether it is a folder or memory of this process."""
    if url == ":memory:":
        return url, QdrantClient(url), True
    if "://" in url:
        place = _check_url(url)
        return (
            place,
            QdrantClient(place, api_key=os.environ.get(API_KEY), timeout=_SECONDS, check_compatibility=False),
            False,
        )
    if not url or "\0" in url:
        raise ConfigError("--url: give a server's https://host:6333, or the path of a folder")
    Path(url).mkdir(parents=True, exist_ok=True)
    with _answers(url):
        return url, QdrantClient(path=url), True


def _check_url(url: str) -> str:
    """The URL of a server, known to hold no secret. A refused one is not repeated: it may."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6333
    except ValueError:
        raise ConfigError("--url: not a URL. Write https://host:6333") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"--url: holds more than a place. Keep the key in the environment variable {API_KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url: a Qdrant server is reached by http or https, not {parts.scheme}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


@contextmanager
def _answers(place: str) -> Iterator[None]:
    """Turn the client's errors into the package's: no answer, or what the server refused."""
    try:
        yield
    except ResponseHandlingException as fault:
        raise lost(place, fault) from fault
    except ApiException as fault:
        raise DataError(
            f"{place}: Qdrant: {one_line(fault)}. Is {API_KEY} set, and the server 1.16 or newer?"
        ) from fault
    except (RuntimeError, ValueError) as fault:  # the folder's own: held by another process, or not readable
        raise DataError(f"{place}: Qdrant: {one_line(fault)}") from fault
