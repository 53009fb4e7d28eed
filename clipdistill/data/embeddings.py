"""The files of an embeddings folder as clip-retrieval lays it out: rows as ``.npy``, what they are of as Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipdistill.core import files


def write_rows(path: Path, rows: npt.NDArray[Any], dtype: str) -> None:
    """Write an array as a ``.npy`` file of this precision, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, rows.astype(dtype), allow_pickle=False)
    files.write_bytes(path, buffer.getvalue())


def write_table(path: Path, columns: Mapping[str, list[Any]]) -> None:
    """Write columns as a Parquet file, whole or not at all."""
    types = {"captions": pa.list_(pa.string()), "bytes": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    files.write_file(path, lambda aside: pq.write_table(pa.table(dict(columns), schema=schema), aside))
