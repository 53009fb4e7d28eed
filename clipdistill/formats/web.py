"""The layout ``web``: a folder for any static host, whose page searches in the visitor's browser.

The towers are the int8 graphs of the layout ``onnx``, the vectors int8 with a scale for each row (symmetric, as the
graphs' tables), compared one by one: of 50,000 that takes some hundredths of a second, so no graph or cells are built.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdistill import page
from clipdistill.core import files, fingerprint
from clipdistill.core.errors import DataError, MissingExtraError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.formats import onnx, web_vendor
from clipdistill.formats.graphs import served_dim, towers_of
from clipdistill.formats.readers.read_web import BROWSER_VARIABLE, BROWSERS, browser
from clipdistill.retrieval.exact import Vectors, check_unit
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.tokenizer import FILES as TOKENIZER_FILES

FOLDER, FACTS, VENDOR = "web", "bundle.json", "vendor"
PRECISION = "int8"
_KEYS, _CODES, _SCALES, _THUMBNAILS = "keys.json", "vectors.bin", "scales.bin", "thumbs"
_STEPS, _TEXT_CHARS, _QUALITY, _NAME = 127, 4096, 78, 12
_THUMBNAIL_BYTES = 256 << 20
WEB_USE = """\
In a browser, with no server behind it: copy `web/` to any static host (object storage, a pages service, \
`python -m http.server --directory FOLDER/web`) and open it; opened as a file it does not run. The int8 towers run by \
transformers.js in WebAssembly, and the page compares its int8 vectors one by one. `first_result_s` under "Parity" is \
from opening the page to the first result on the machine that exported it, `text_ms` and `search_ms` are a later \
query's. Let the host compress `.wasm`, `.onnx` and `.js` files (gzip, brotli). With the headers \
`Cross-Origin-Opener-Policy: same-origin` and `Cross-Origin-Embedder-Policy: require-corp` several threads are used.

The bundle prepares pictures as the student was trained on, to the bit and whatever the browser. transformers.js' own \
image processor resizes them as the browser's canvas does, without a filter as wide as the reduction: \
`preprocess_cosine` is how far that is from the student on the pictures of the proof, and on photographs much larger \
than the student's input it falls below 0.98. Programs of your own can take `web/pixels.js` instead (`decoded`, \
`fitted`, `normalised`), and give the vision model its tensor."""


@dataclass(frozen=True)
class Gallery:
    """What a web bundle searches.

    Attributes:
        name: What the page calls the model.
        keys: The pictures' names, each once.
        vectors: Their embeddings in the exported space: unit rows [pictures, dim].
        pictures: Themselves, for thumbnails; none: no thumbnails.
        thumbnails: The longer side of a thumbnail in pixels; 0: none.
        vendor: The folder of npm's tarballs; None: the user's cache, filled by npm where it is not yet.
    """

    name: str
    keys: tuple[str, ...]
    vectors: Vectors
    pictures: tuple[Picture, ...] = ()
    thumbnails: int = 0
    vendor: Path | None = None

    def __post_init__(self) -> None:
        check_unit(self.vectors, "web: gallery vectors")
        wanted = (len(self.vectors), len(set(self.keys)), len(self.pictures) if self.thumbnails else len(self.keys))
        if {len(self.keys)} != set(wanted):
            names, rows, pictures = len(set(self.keys)), len(self.vectors), len(self.pictures)
            raise DataError(f"web: {names} different keys, {rows} vectors and {pictures} pictures; each needs its own")


def gallery_faults(layouts: Sequence[str], gallery: Gallery | None, dim: int) -> Iterator[str]:
    """Why a bundle cannot be written with this gallery, one sentence each."""
    if FOLDER not in layouts:
        return
    if gallery is None:
        yield "export.layouts: web searches pictures, and none are given: build the run's index, or leave web out"
    elif gallery.vectors.shape[1] != dim:
        yield f"export.layouts: web: its vectors are {gallery.vectors.shape[1]} wide, and the student's {dim}"


def check_browser() -> None:
    """Refuse to begin where no Chromium could prove a bundle.

    Raises:
        MissingExtraError: If none is at hand.
    """
    if browser() is None:
        raise MissingExtraError(
            "Chromium",
            "export",
            remedy=f"A web bundle is proved in a browser: install one ({', '.join(BROWSERS[:3])}; apt-get install "
            f"chromium), or name it in the environment variable {BROWSER_VARIABLE}. Or leave web out of export.layouts",
        )


def paths(towers: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """The files of a bundle that have the same name in each."""
    names = ("index.html", FACTS, *page.ENGINE, *(f"{VENDOR}/{name}" for name in web_vendor.file_names()))
    return tuple(f"{FOLDER}/{name}" for name in names)


def write_web(student: DualEncoder, folder: Path, gallery: Gallery, scripts: Mapping[str, bytes]) -> None:
    """Write a bundle.

    What changes with the student or the gallery lies in a folder that is named by its content, so that a cached part of
    an older bundle at the same address never meets a newer one.

    Args:
        student: The student.
        folder: The export, aside; where it holds int8 graphs already, those are taken.
        gallery: What is searched.
        scripts: The files of ``vendor``, by name.

    Raises:
        ConfigError: If a tower cannot be written as ONNX.
        DataError: If the thumbnails are too many bytes, or one's picture cannot be decoded.
    """
    bundle = folder / FOLDER
    codes, scales = quantised(gallery.vectors)
    parts = (student.fingerprint, list(gallery.keys), fingerprint.of_bytes(codes.tobytes() + scales.tobytes()))
    name = f"data-{fingerprint.of_value(parts)[:_NAME]}"
    data = bundle / name
    _write_towers(student, folder, data)
    files.write_json(data / _KEYS, list(gallery.keys))
    files.write_bytes(data / _CODES, codes.tobytes())
    files.write_bytes(data / _SCALES, scales.astype("<f4").tobytes())
    if gallery.thumbnails:
        _write_thumbnails(gallery, student.max_pixels, data / _THUMBNAILS)
    files.write_json(bundle / FACTS, {**_facts(student, gallery), "data": name})
    files.write_bytes(bundle / "index.html", page.bundled_page().html)
    for module in page.ENGINE:
        files.write_bytes(bundle / module, page.asset(module))
    for script, content in scripts.items():
        files.write_bytes(bundle / VENDOR / script, content)


def bundle_vectors(folder: Path) -> Vectors:
    """The vectors that an export's bundle searches, as its page sees them: float32 [pictures, dim].

    Raises:
        DataError: If its files do not say what a bundle's say.
    """
    bundle = folder / FOLDER
    try:
        facts = files.read_json(bundle / FACTS)
        data, shape = bundle / str(facts["data"]), (int(facts["vectors"]), int(facts["dim"]))
        codes = np.frombuffer((data / _CODES).read_bytes(), np.int8).reshape(shape)
        scales = np.frombuffer((data / _SCALES).read_bytes(), "<f4").reshape(shape[0], 1)
    except (OSError, KeyError, TypeError, ValueError) as fault:
        raise DataError(f"{bundle}: no web bundle: {fault}. Export again: clipdistill export RUN.toml") from fault
    rows = codes.astype(np.float32) * scales
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def quantised(vectors: Vectors) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Unit rows as int8 codes and a scale for each row: the row's largest magnitude is 127 of its scale.

    Returns:
        int8 [rows, dim] and float32 [rows]; a row is about its codes times its scale.
    """
    scales = (np.abs(vectors).max(axis=1) / np.float32(_STEPS)).astype(np.float32)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales


def _write_towers(student: DualEncoder, folder: Path, data: Path) -> None:
    data.mkdir(parents=True)
    graphs = [onnx.graph_path(tower, PRECISION) for tower in towers_of(student)]
    if all((folder / path).exists() for path in graphs):
        (data / onnx.FOLDER).mkdir()
        for path in graphs:
            shutil.copyfile(folder / path, data / path)
        onnx.write_configs(student, data)
    else:
        onnx.write_onnx(student, data, (PRECISION,))
    for name in TOKENIZER_FILES:
        shutil.copyfile(folder / name, data / name)


def _facts(student: DualEncoder, gallery: Gallery) -> dict[str, Any]:
    """What the page's engine is told of the bundle."""
    return {
        "name": gallery.name,
        "dim": served_dim(student),
        "vectors": len(gallery.keys),
        "context_length": student.tokenizer.context_length,
        "preprocess": None if student.preprocess is None else student.preprocess.to_open_clip(),
        "max_pixels": student.max_pixels,
        "text_chars": _TEXT_CHARS,
        "thumbnails": gallery.thumbnails > 0,
    }


def _write_thumbnails(gallery: Gallery, max_pixels: int, folder: Path) -> None:
    folder.mkdir()
    total = 0
    for row, picture in enumerate(gallery.pictures):
        image = decode(picture.read(), max_pixels, picture.origin)
        image.thumbnail((gallery.thumbnails, gallery.thumbnails), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "WEBP", quality=_QUALITY)
        total += out.tell()
        if total > _THUMBNAIL_BYTES:
            raise DataError(
                f"web: the first {row + 1} of {len(gallery.pictures)} thumbnails have {total} bytes, and all may have "
                f"{_THUMBNAIL_BYTES}: make them smaller (export.web_thumbnails, {gallery.thumbnails} px; 0: none)"
            )
        (folder / f"{row}.webp").write_bytes(out.getvalue())
