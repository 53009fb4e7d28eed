"""FAISS factory strings: which one ``auto`` means, how much effort a search makes, and why one is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import ConfigError

EXAMPLES = "Flat; IVF1024,Flat; HNSW32; SQ8; IVF1024,PQ128x4fs,RFlat; RaBitQ; Binary,Refine(SQ8); or auto"

AUTO: Final[tuple[tuple[float, str], ...]] = (
    (200_000, "Flat"),
    (2_000_000, "IVF{cells},Flat"),
    (float("inf"), "IVF{cells},PQ{parts}x4fs,RFlat"),
)
"""Up to how many vectors ``auto`` takes which layout.

Flat is exact, and answers 1,000 queries a second among 100 k vectors on two cores; IVF trains in seconds and stays
within a hair of it; 4-bit PQ with a refinement is the fastest where memory bandwidth is what counts. HNSW is never
chosen: it takes minutes to build a million, and its graph depends on the timing of threads.
"""

# FAISS's own defaults (nprobe 1, efSearch 16, k_factor 1) lose up to half the recall; and texts are out of distribution
# for an index of pictures, so they need more effort than pictures would.
_EF_SEARCH = 128
_K_FACTOR = 8
_LEAST_PROBES = 16
_PROBED_SHARE = 16  # one cell in 16, and at least 16 of them

_TRAINING_POINTS_A_CELL = 39  # where FAISS begins to warn
_TOO_FEW = re.compile(
    r"Number of training points \((\d+)\) should be at least as large as number of clusters \((\d+)\)"
)
_BINARY = re.compile(r"Binary(?:,(?:(RFlat)|Refine\((.+)\)))?")
_log = logging.getLogger("clipdistill")


def resolve_factory(factory: str, count: int, dim: int) -> str:
    """The factory string itself, or the one that ``auto`` stands for.

    Args:
        factory: A FAISS factory string, or ``auto``.
        count: The number of vectors.
        dim: Their width.
    """
    if factory.strip().lower() != "auto":
        return factory.strip()
    layout = next(layout for most, layout in AUTO if count <= most)
    # 4 to 16 sqrt(n) cells are usual; a power of two near 4 sqrt(n) keeps training cheap and cells of some hundreds.
    cells = 1 << round(np.log2(4 * max(count, 1) ** 0.5))
    if "{parts}" in layout and dim % 4:
        layout = "IVF{cells},Flat"  # PQ cuts a vector into equal parts
    return layout.format(cells=cells, parts=dim // 4)


def filled_index(factory: str, vectors: npt.NDArray[np.float32]) -> Any:
    """A FAISS index by inner product, trained on the vectors and holding them.

    Args:
        factory: A FAISS factory string.
        vectors: C-contiguous unit rows [n, d], n at least 1.

    Raises:
        ConfigError: If the string is not valid, does not search by inner product, or needs more vectors to train on.
    """
    try:
        index = _made(factory, vectors.shape[1])
        _check_metric(index, factory)
        _prepare_training(index, factory, len(vectors))
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as fault:
        raise ConfigError(_explained(factory, str(fault))) from fault
    return index


def _made(factory: str, dim: int) -> Any:
    binary = _BINARY.fullmatch(factory)
    if binary is None:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    return _binary(factory, "Flat" if binary[1] else binary[2], dim)


def _binary(factory: str, store: str | None, dim: int) -> Any:
    """Sign bits searched by Hamming distance, and what is found rescored with what ``store`` keeps of the vectors.

    FAISS's own name for the bits (LSH) goes with L2 alone, because it returns Hamming distances. Under a refinement
    they are never returned: they choose the candidates, and inner products with the stored rows order them.
    """
    if store is None:
        raise ConfigError(
            f"index.factory: {factory!r} has Hamming distances and no scores. Say what rescores: Binary,Refine(SQ8)"
        )
    bits: Any = faiss.IndexLSH(dim, dim, False, False)  # no random rotation, no thresholds: the signs themselves
    bits.metric_type = faiss.METRIC_INNER_PRODUCT
    stored: Any = faiss.index_factory(dim, store, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexRefine(bits, stored)
    bits.this.disown()
    stored.this.disown()
    index.own_fields = index.own_refine_index = True
    return index


def default_params(index: Any) -> dict[str, int]:
    """Sensible search-time parameters for an index, by FAISS's names."""
    params: dict[str, int] = {}
    for layer in _layers(index):
        if isinstance(layer, faiss.IndexIVF):
            params["nprobe"] = min(layer.nlist, max(_LEAST_PROBES, layer.nlist // _PROBED_SHARE))
        elif isinstance(layer, faiss.IndexHNSW):
            params["efSearch"] = _EF_SEARCH
        elif isinstance(layer, faiss.IndexRefine):
            params["k_factor_rf"] = _K_FACTOR
    return params


def apply_params(index: Any, params: Mapping[str, int], factory: str) -> None:
    """Set search-time parameters on an index.

    Raises:
        ConfigError: If the index has no such parameter, or the value is not a positive whole number.
    """
    space = faiss.ParameterSpace()
    for name, value in params.items():
        fault = f"index.search_params.{name}: {value!r}"
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{fault} is not a whole number of at least 1")
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError as problem:
            own = ", ".join(default_params(index)) or "none"
            raise ConfigError(f"{fault}: an index {factory} has no such parameter; it has: {own}") from problem


def table_bytes(index: Any) -> int:
    """How many bytes of look-up tables FAISS computes when it reads the index, beyond what the file holds."""
    # FAISS wants its limit to be one number above the table, hence the last 4.
    kinds = (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)
    return sum(layer.nlist * layer.pq.M * layer.pq.ksub * 4 + 4 for layer in _layers(index) if isinstance(layer, kinds))


def _layers(index: Any) -> Iterator[Any]:
    """An index and what it wraps, from the outside in."""
    while index is not None:
        index = faiss.downcast_index(index)
        yield index
        if isinstance(index, faiss.IndexPreTransform):
            index = index.index
        elif isinstance(index, faiss.IndexRefine):
            index = index.base_index
        else:
            return


def _check_metric(index: Any, factory: str) -> None:
    """FAISS takes some combinations (HNSW32,PQ8) and searches them by L2 all the same: those would rank backwards."""
    if any(layer.metric_type != faiss.METRIC_INNER_PRODUCT for layer in _layers(index)):
        raise ConfigError(f"index.factory: {factory!r} does not search by inner product in FAISS. Valid: {EXAMPLES}")


def _prepare_training(index: Any, factory: str, count: int) -> None:
    """Drop work of no use here, and say ourselves when vectors are few: FAISS would write to the process's stderr."""
    for layer in _layers(index):
        if isinstance(layer, faiss.IndexIVF):
            _check_enough(factory, count, layer.nlist)
            layer.cp.min_points_per_centroid = 1
            if count < _TRAINING_POINTS_A_CELL * layer.nlist:
                _log.warning(
                    "index.factory: %s has %d cells for %d vectors; fewer than %d would be trained better",
                    factory,
                    layer.nlist,
                    count,
                    max(1, count // _TRAINING_POINTS_A_CELL),
                )
        if hasattr(layer, "do_polysemous_training"):
            # It only renumbers the centroids, for a Hamming filter that is never switched on here, and takes minutes.
            layer.do_polysemous_training = False
        if hasattr(layer, "pq"):
            layer.pq.cp.min_points_per_centroid = 1


def _check_enough(factory: str, count: int, needed: int) -> None:
    if count < needed:
        raise ConfigError(_too_few(factory, count, needed))


def _too_few(factory: str, count: int, needed: int) -> str:
    return (
        f"index.factory: {factory!r} needs at least {needed} vectors to train on, and there are {count}. "
        "Take fewer cells or bits, or Flat, or auto"
    )


def _explained(factory: str, problem: str) -> str:
    """FAISS's message without its source lines and signatures."""
    few = _TOO_FEW.search(problem)
    if few:
        return _too_few(factory, int(few[1]), int(few[2]))
    reason = re.split(r"failed: |Error: |\.cpp:\d+: ", problem)[-1].strip()
    return f"index.factory: {factory!r} is not usable: {reason}. Valid, for example: {EXAMPLES}"
