"""List the SHA-256 of every file of data (all but prose, code and settings) below ``data/`` in ``data/SHA256SUMS``.

Run it after any of the builders.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

LIST = "SHA256SUMS"
NOT_DATA = {".md", ".py", ".pyc", ".toml"}


def list_files(data: Path) -> list[str]:
    """One line a file, as ``sha256sum`` writes it: digest, two spaces, path; in the order of the paths."""
    found = (path for path in data.rglob("*") if path.is_file() and path.name != LIST and path.suffix not in NOT_DATA)
    names = sorted(path.relative_to(data).as_posix() for path in found)
    return [f"{hashlib.sha256((data / name).read_bytes()).hexdigest()}  {name}" for name in names]


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent
    lines = list_files(folder)
    (folder / LIST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} files")
