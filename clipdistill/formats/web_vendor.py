"""The JavaScript that a web bundle carries: two packages of npm, pinned by version and SHA-512, fetched once.

``web_vendor.json`` names the packages, the SHA-512 that npm's registry states for each tarball, and the SHA-256 of each
file that is taken out of it. The tarballs are kept in the user's cache; nothing of them is in this package.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.core.errors import ConfigError, MismatchError, MissingExtraError

NOTICE = "NOTICE.txt"
_SECONDS = 600
_EXPORT_AGAIN = "Remove it and export again, or give another folder as export.web_vendor"
_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class VendoredFile:
    """One file of a package.

    Attributes:
        name: What it is called in the bundle.
        path: Where it lies in the tarball.
        sha256: What it must be.
    """

    name: str
    path: str
    sha256: str


@dataclass(frozen=True)
class VendoredPackage:
    """One pinned package of npm.

    Attributes:
        name: npm's.
        version: The pinned one.
        tarball: What ``npm pack`` calls it.
        integrity: ``sha512-`` and the tarball's SHA-512 in base64, as npm's lock files have it.
        copyright: Whose it is, under which licence.
        files: What is taken.
    """

    name: str
    version: str
    tarball: str
    integrity: str
    copyright: str
    files: tuple[VendoredFile, ...]

    @property
    def spec(self) -> str:
        """As npm names it with its version."""
        return f"{self.name}@{self.version}"


@cache
def packages() -> tuple[VendoredPackage, ...]:
    """The pinned packages."""
    text = resources.files("clipdistill.formats").joinpath("web_vendor.json").read_text("utf-8")
    return tuple(
        VendoredPackage(**{**one, "files": tuple(VendoredFile(**part) for part in one["files"])})
        for one in json.loads(text)
    )


def file_names() -> tuple[str, ...]:
    """The files of a bundle's ``vendor`` folder."""
    return (*(part.name for one in packages() for part in one.files), NOTICE)


def command(folder: Path) -> list[str]:
    """The ``npm`` command that fetches the tarballs into a folder, from whichever registry npm is configured for."""
    return ["npm", "pack", "--silent", "--pack-destination", str(folder), *(one.spec for one in packages())]


def cache_folder() -> Path:
    """Where fetched tarballs are kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdistill" / "npm"


def vendored(folder: Path | None = None, *, seconds: float = _SECONDS) -> dict[str, bytes]:
    """The files by name, taken out of tarballs whose SHA-512 was compared first.

    Args:
        folder: Where the tarballs are; None = the cache, where missing ones are fetched to.
        seconds: How long npm may take.

    Raises:
        ConfigError: If the given folder lacks a tarball.
        MismatchError: If a tarball or a file in it is not the pinned one.
        MissingExtraError: If the tarballs are not in the cache and npm cannot fetch them, with what to do.
    """
    place = cache_folder() if folder is None else folder
    missing = [one for one in packages() if not (place / one.tarball).is_file()]
    if missing and folder is not None:
        raise ConfigError(
            f"export.web_vendor: {folder / missing[0].tarball}: not there. Fetch it with: {' '.join(command(folder))}"
        )
    if missing:
        _fetch(place, seconds)
    found = {name: data for one in packages() for name, data in _taken(place / one.tarball, one).items()}
    return {**found, NOTICE: _notice().encode()}


def _fetch(place: Path, seconds: float) -> None:
    """Let npm fetch the tarballs, compare them, and only then put them into the cache."""
    if shutil.which("npm") is None:
        raise _missing(place, "npm is not there either: it comes with Node.js")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        try:
            done = subprocess.run(
                command(Path(scratch)), cwd=scratch, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise _missing(place, f"npm gave no answer in {seconds:g} s") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            raise _missing(place, f"npm could not fetch it: {lines[0][:200]}")
        for one in packages():
            path = Path(scratch) / one.tarball
            _compare(path, one)
            path.replace(place / one.tarball)
    files.sync_folder(place)


def _missing(place: Path, reason: str) -> MissingExtraError:
    return MissingExtraError(
        " and ".join(one.spec for one in packages()),
        "export",
        remedy=f"{reason[:1].upper()}{reason[1:]}. Where npm and a network are, run: {' '.join(command(place))} "
        "(or leave web out of export.layouts)",
    )


def _compare(path: Path, package: VendoredPackage) -> bytes:
    """A tarball's bytes, which are the pinned ones.

    Raises:
        MismatchError: If they are not, with both digests.
    """
    if not path.is_file():
        raise MismatchError(str(path), "file", package.tarball, "none", _EXPORT_AGAIN)
    data = path.read_bytes()
    found = f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}"
    if found != package.integrity:
        raise MismatchError(str(path), "integrity", package.integrity, found, _EXPORT_AGAIN)
    return data


def _taken(path: Path, package: VendoredPackage) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(_compare(path, package)), mode="r:gz") as tarball:
        for part in package.files:
            member: Any = tarball.extractfile(part.path)
            found[part.name] = member.read()
            digest = hashlib.sha256(found[part.name]).hexdigest()
            if digest != part.sha256:
                raise MismatchError(f"{path}: {part.path}", "sha256", part.sha256, digest, _EXPORT_AGAIN)
    return found


def _notice() -> str:
    """Whose code a bundle carries, and under which licences."""
    lines = ["The files in this folder are other people's work, unchanged:", ""]
    for one in packages():
        names = ", ".join(part.name for part in one.files)
        lines.append(f"* {one.spec} ({names}): {one.copyright}")
    lines += [
        "",
        "transformers.min.js holds, besides, @huggingface/tokenizers (Apache-2.0), @huggingface/jinja (MIT),",
        "onnxruntime-web and onnxruntime-common (MIT). The Apache licence 2.0 is in transformers.LICENSE.txt; the MIT",
        "licence reads:",
        "",
        _MIT,
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> int:
    """Fetch the packages into the cache; says what is wrong and ends with 1 where they cannot be fetched.

    Args:
        arguments: How many seconds npm may take; none = 600.
    """
    try:
        found = vendored(seconds=float(arguments[0]) if arguments else _SECONDS)
    except (MissingExtraError, MismatchError) as fault:
        sys.stderr.write(f"{fault}\n")
        return 1
    sys.stdout.write(f"{cache_folder()}: {sum(map(len, found.values())) / 1e6:.1f} MB for web bundles\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
