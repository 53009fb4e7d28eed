"""Read stored embeddings as clip-retrieval does: memory-mapped rows, and tables in the order of their names.

clip-retrieval reads rows with embedding-reader, whose releases hold numpy and pandas below the versions that this
package needs, or fail with the present fsspec; so this script does with numpy and pandas what they do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Read all rows of both towers, and the keys of the table beside them; the probes are not needed."""
    place = Path(folder) / "vectors"
    table = pd.concat(pd.read_parquet(path) for path in sorted((place / "metadata").glob("*.parquet")))
    keys = np.frombuffer(json.dumps(table["key"].tolist()).encode("utf-8"), np.uint8)
    np.savez(out, keys=keys, image=_rows(place / "img_emb"), text=_rows(place / "text_emb"))
    sys.stdout.write(f"{np.__version__}, pandas {pd.__version__}")


def _rows(folder: Path) -> Any:
    return np.concatenate([np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))])


if __name__ == "__main__":
    main(*sys.argv[1:5])
