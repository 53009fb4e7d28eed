"""The vectors that a FAISS index holds, where its layout keeps them bit for bit."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

EXACT_LAYOUTS = "Flat; IVF1024,Flat; HNSW32; or any with RFlat"


def exact_vectors(index: Any) -> npt.NDArray[np.float32] | None:
    """The vectors in row order, the same bits that were added: float32 [rows, dim]. None where they are not kept.

    Flat layouts keep them, HNSW graphs over a flat storage do, and so does the exact side of a refinement
    (``RFlat``). Quantised layouts keep an approximation, and rotations (``OPQ``, ``PCA``) other numbers.

    Args:
        index: A FAISS index whose rows were added in order.
    """
    layer = _exact_layer(index)
    if layer is None:
        return None
    rows: npt.NDArray[np.float32] = layer.reconstruct_n(0, layer.ntotal)
    return rows


def _exact_layer(index: Any) -> Any | None:
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat)):
        return index
    if isinstance(index, faiss.IndexRefine):
        return _exact_layer(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        return _exact_layer(index.storage)
    return None
