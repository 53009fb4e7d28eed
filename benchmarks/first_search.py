"""One search in a process of its own, by an export alone, and what it cost: `python first_search.py EXPORT INDEX TEXT`.

Prints one JSON object: the names found, the libraries loaded, and the most memory held, in MiB.
"""

import json
import sys
from pathlib import Path

from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import Searcher


def peak_mb() -> float:
    """The most memory that this program has held: `ru_maxrss` would count what the process held that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Search for a text, or for a picture where the query is a file."""
    export, index, query, precision = [*sys.argv[1:], "fp32"][:4]
    encoder = RuntimeEncoder.load(export, precision=precision, threads=1)
    searcher = Searcher(encoder, VectorIndex.load(index, encoder=encoder.fingerprint))
    picture = Path(query).is_file()
    hits = searcher.by_picture(Picture(query, path=Path(query))) if picture else searcher.by_text(query)
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps({"hits": [hit.key for hit in hits], "loaded": loaded, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
