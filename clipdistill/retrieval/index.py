"""FAISS indexes by inner product that know their rows' names and the encoder that made them, and survive a disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import faiss
import numpy as np
import numpy.typing as npt

from clipdistill.core import files, manifest
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.retrieval.exact import Ranking, Vectors, check_unit, exact_scores, exact_top_k, sorted_ranking
from clipdistill.retrieval.factories import apply_params, default_params, filled_index, resolve_factory, table_bytes
from clipdistill.retrieval.stored import EXACT_LAYOUTS, exact_vectors

KIND = "index"
VERSION = 1
METRIC = "inner_product"
FOLDER = "index"
"""Where an export holds the index of its student."""
_INDEX_FILE, _IDS_FILE = "index.faiss", "ids.jsonl"
FILES = (_INDEX_FILE, _IDS_FILE, manifest.NAME)
"""What an index's folder holds."""
_FIELDS = (
    "factory", "resolved_factory", "search_params", "dim", "count", "metric", "encoder", "load_bytes", "files",
)  # fmt: skip
_REMEDY = "Build the index again: clipdistill index RUN.toml --force"
_RESCORED = 32  # queries at a time, so that their candidates stay in the processor's cache
_SPARE = 12  # more candidates than asked for
_TABLE_LIMIT = 2 << 30  # FAISS itself builds no look-up table above 2 GiB
_reading = threading.Lock()


@final
class VectorIndex:
    """A FAISS index over unit vectors, searched by inner product (cosine similarity), with a name for each row.

    Make one with :meth:`build` or :meth:`load`.
    """

    __slots__ = ("_faiss", "_ids", "encoder", "factory", "requested", "search_params")

    def __init__(
        self, index: Any, ids: Sequence[str], *, factory: str, requested: str, encoder: str, params: Mapping[str, int]
    ) -> None:
        self._faiss = index
        self._ids = tuple(ids)
        self.factory = factory
        """The FAISS factory string; where ``auto`` was asked for, the one it chose."""
        self.requested = requested
        """The factory string as it was asked for."""
        self.encoder = encoder
        """The fingerprint of the encoder that made the vectors."""
        self.search_params = dict(params)
        """The search-time parameters by FAISS's names: ``nprobe``, ``efSearch``, ``k_factor_rf``."""

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        ids: Sequence[str],
        *,
        factory: str = "Flat",
        encoder: str,
        search_params: Mapping[str, int] | None = None,
    ) -> VectorIndex:
        """Train and fill an index.

        Deterministic, but for HNSW graphs, which FAISS builds in parallel.

        Args:
            vectors: Unit rows [n, d].
            ids: The rows' names, each once.
            factory: A FAISS factory string, or ``auto``: chosen by the number of vectors.
            encoder: The fingerprint of the encoder that made the vectors.
            search_params: Search-time parameters by FAISS's names, over the defaults.

        Raises:
            DataError: If there are no vectors, rows are not of unit length, or names are missing or repeated.
            ConfigError: If the factory or a parameter is not valid, or needs more vectors to train on.
        """
        check_unit(vectors, "index vectors")
        _check_ids(ids, len(vectors))
        rows = np.ascontiguousarray(vectors, np.float32)
        resolved = resolve_factory(factory, *rows.shape)
        index = filled_index(resolved, rows)
        params = {**default_params(index), **(search_params or {})}
        apply_params(index, params, resolved)
        return cls(index, ids, factory=resolved, requested=factory, encoder=encoder, params=params)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """The width of the vectors."""
        return int(self._faiss.d)

    @property
    def bytes_per_vector(self) -> float:
        """The bytes of the index as it lies on disk, divided by its vectors.

        Codes, what is stored for rescoring, codebooks and coarse cells are all in it; the rows' names are not.
        """
        return float(len(faiss.serialize_index(self._faiss))) / len(self)

    def refilled(self, vectors: Vectors, ids: Sequence[str]) -> VectorIndex:
        """An index with this one's codebooks, cells and search parameters that holds other vectors of the same encoder.

        Args:
            vectors: Unit rows [n, dim].
            ids: The rows' names, each once.

        Raises:
            DataError: If there are no vectors, rows are not of unit length, or names are missing or repeated.
            MismatchError: If the vectors have another width.
        """
        check_unit(vectors, "index vectors")
        _check_ids(ids, len(vectors))
        if vectors.shape[1] != self.dim:
            raise MismatchError("index vectors", "dim", self.dim, vectors.shape[1], "Encode them with its encoder")
        index = faiss.deserialize_index(faiss.serialize_index(self._faiss))
        index.reset()
        index.add(np.ascontiguousarray(vectors, np.float32))
        apply_params(index, self.search_params, self.factory)
        return VectorIndex(
            index, ids, factory=self.factory, requested=self.requested, encoder=self.encoder, params=self.search_params
        )

    def search(self, queries: Vectors, k: int) -> Ranking:
        """The k nearest rows of each query as the index finds them; equal scores in ascending row order.

        A ``Flat`` index returns exactly what :func:`~clipdistill.retrieval.exact.exact_top_k` does, ids and scores. Any
        other returns FAISS's own hits and scores, which are approximate where the vectors are compressed.

        Args:
            queries: Unit rows [queries, dim].
            k: How many; where the index finds fewer, ids are -1 and scores -inf.

        Raises:
            ValueError: If k is below 1.
            DataError: If a query is not of unit length.
            MismatchError: If the queries have another width.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1: got {k}")
        check_unit(queries, "queries")
        if queries.shape[1] != self.dim:
            remedy = "Encode the queries with the index's encoder"
            raise MismatchError("queries", "dim", self.dim, queries.shape[1], remedy)
        rows = np.ascontiguousarray(queries, np.float32)
        if isinstance(self._faiss, faiss.IndexFlat):
            return _search_flat(self._faiss, rows, k)
        scores, ids = self._faiss.search(rows, min(k, len(self)))
        return sorted_ranking(scores, ids, k)

    def keys(self, ranking: Ranking) -> list[list[str]]:
        """The names of the found rows, query by query, best first; padding is left out."""
        return [[self._ids[row] for row in rows if row >= 0] for rows in ranking.ids.tolist()]

    @property
    def ids(self) -> tuple[str, ...]:
        """The rows' names, in row order."""
        return self._ids

    def vectors(self) -> npt.NDArray[np.float32]:
        """The indexed vectors, the same bits that it was built from: float32 [rows, dim].

        Raises:
            DataError: If the layout keeps only an approximation of them.
        """
        rows = exact_vectors(self._faiss)
        if rows is None:
            raise DataError(
                f"index {self.factory}: it keeps its vectors compressed, not as they were. Build one that keeps them "
                f"({EXACT_LAYOUTS}), or give the vectors themselves as a .npy file"
            )
        return rows

    def save(self, folder: str | Path) -> None:
        """Write ``index.faiss``, ``ids.jsonl`` and, last, ``manifest.json``; the folder is replaced as a whole.

        Args:
            folder: A new folder, or one that held an index.

        Raises:
            DataError: If the folder holds anything else, which would be lost.
        """
        folder = Path(folder)
        strange = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
        if strange:
            raise DataError(
                f"{folder}: holds {strange[0]!r}, which is not part of an index. Choose a folder of its own"
            )
        with files.replaced_folder(folder) as aside:
            faiss.write_index(self._faiss, str(aside / _INDEX_FILE))
            files.write_text(aside / _IDS_FILE, "".join(json.dumps(name) + "\n" for name in self._ids))
            manifest.write(aside, KIND, VERSION, self._facts(aside))

    def _facts(self, folder: Path) -> dict[str, Any]:
        return {
            "factory": self.requested,
            "resolved_factory": self.factory,
            "search_params": self.search_params,
            "dim": self.dim,
            "count": len(self),
            "metric": METRIC,
            "encoder": self.encoder,
            "load_bytes": max((folder / _INDEX_FILE).stat().st_size, table_bytes(self._faiss)),
        }

    @classmethod
    def load(cls, folder: str | Path, *, encoder: str | None) -> VectorIndex:
        """Read an index, after its files' SHA-256 were compared with the manifest and before FAISS sees a byte.

        Args:
            folder: What :meth:`save` wrote.
            encoder: The fingerprint of the encoder that will make the queries; None = do not compare.

        Raises:
            DataError: If the folder has no readable manifest.
            MismatchError: If a file, a count or the encoder differs from the manifest.
        """
        folder = Path(folder)
        facts = manifest.read(folder, KIND, VERSION, _REMEDY)
        for field in _FIELDS:
            if field not in facts:
                raise MismatchError(str(folder / manifest.NAME), field, "a value", "none", _REMEDY)
        if encoder is not None and facts["encoder"] != encoder:
            remedy = f"Search with the encoder that made the index, or build it again. {_REMEDY}"
            raise MismatchError(str(folder), "encoder", encoder, facts["encoder"], remedy)
        digests = dict(facts["files"])
        if set(digests) != {_INDEX_FILE, _IDS_FILE}:
            raise MismatchError(str(folder), "files", [_IDS_FILE, _INDEX_FILE], sorted(digests), _REMEDY)
        manifest.verify_files(folder, digests, _REMEDY)
        ids = [json.loads(line) for line in (folder / _IDS_FILE).read_text("utf-8").split("\n")[:-1]]
        index = _read(folder / _INDEX_FILE, int(facts["load_bytes"]))
        _check_facts(folder, facts, index, ids)
        apply_params(index, facts["search_params"], facts["resolved_factory"])
        return cls(
            index,
            ids,
            factory=facts["resolved_factory"],
            requested=facts["factory"],
            encoder=facts["encoder"],
            params=facts["search_params"],
        )


def _check_ids(ids: Sequence[str], count: int) -> None:
    if not count:
        raise DataError("index: there are no vectors to index")
    if len(ids) != count:
        raise DataError(f"index: {count} vectors and {len(ids)} ids; each vector needs one")
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"index: the id {name!r} occurs twice; each row needs its own")
        seen.add(name)


def _search_flat(index: Any, queries: npt.NDArray[np.float32], k: int) -> Ranking:
    """FAISS finds a few more candidates than needed; their exact scores decide, ties included.

    FAISS's float32 scores of equal rows differ in their last bits, so its order among ties is arbitrary. A query whose
    k-th score is not clearly above everything that was left out is searched again without FAISS.
    """
    count, dim = index.ntotal, index.d
    vectors = faiss.rev_swig_ptr(index.get_xb(), count * dim).reshape(count, dim)
    fetched = min(count, k + max(_SPARE, k // 8))
    rough, ids = index.search(queries, fetched)
    scores = np.empty_like(rough)
    for start in range(0, len(queries), _RESCORED):
        part = slice(start, start + _RESCORED)
        scores[part] = exact_scores(queries[part], vectors[ids[part]])
    ranking = sorted_ranking(scores, ids, k)
    if fetched == count:
        return ranking
    # The error of a float32 inner product in any order, d 2^-24 |q||g|, and of the rounding that defines a score.
    slack = (dim + 4) * 2.0**-23
    unsure = np.flatnonzero(ranking.scores[:, -1] <= rough[:, -1] + slack)
    if len(unsure):
        again = exact_top_k(queries[unsure], vectors, k)
        ranking.ids[unsure], ranking.scores[unsure] = again.ids, again.scores
    return ranking


def _check_facts(folder: Path, facts: Mapping[str, Any], index: Any, ids: Sequence[str]) -> None:
    found = {"dim": int(index.d), "count": int(index.ntotal), "metric": _metric(index)}
    for field, value in found.items():
        if facts[field] != value:
            raise MismatchError(str(folder), field, facts[field], value, _REMEDY)
    if len(ids) != index.ntotal:
        raise MismatchError(str(folder / _IDS_FILE), "count", index.ntotal, len(ids), _REMEDY)


def _metric(index: Any) -> str:
    return METRIC if index.metric_type == faiss.METRIC_INNER_PRODUCT else f"FAISS metric {index.metric_type}"


def _read(path: Path, load_bytes: int) -> Any:
    """Read a FAISS file under limits of its own size, so that a crafted header cannot ask for more memory."""
    size = path.stat().st_size
    with _reading, _limits(vector_bytes=min(load_bytes, size + _TABLE_LIMIT), loops=size):
        try:
            return faiss.read_index(str(path))
        except RuntimeError as fault:
            raise DataError(f"{path}: FAISS cannot read it: {fault}. {_REMEDY}") from fault


@contextmanager
def _limits(*, vector_bytes: int, loops: int) -> Iterator[None]:
    """FAISS's process-wide deserialisation limits, put back afterwards."""
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(vector_bytes)
    faiss.set_deserialization_loop_limit(loops)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])
