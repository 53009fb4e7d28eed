"""The layouts that a student can be written in: a table of what each needs, writes and is read by."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdistill.core.errors import MissingExtraError, suggest
from clipdistill.formats import web
from clipdistill.formats.clip_model import FILES as CLIP_MODEL_FILES
from clipdistill.formats.clip_model import clip_model_faults, write_clip_model
from clipdistill.formats.graphs import towers_of
from clipdistill.formats.immich import PATHS as IMMICH_PATHS
from clipdistill.formats.immich import immich_faults, write_immich
from clipdistill.formats.onnx import graph_path, write_onnx
from clipdistill.formats.open_clip import FILES, open_clip_faults, write_open_clip
from clipdistill.formats.sentence_transformers import FILES as SENTENCE_TRANSFORMERS_FILES
from clipdistill.formats.sentence_transformers import sentence_transformers_faults, write_sentence_transformers
from clipdistill.formats.triton import triton_paths, write_triton
from clipdistill.formats.vectors import PATHS as VECTORS_PATHS
from clipdistill.formats.vectors import vectors_faults
from clipdistill.towers.student import DualEncoder

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Reading:
    """One way in which an export is loaded.

    Attributes:
        name: ``open_clip``, ``onnx/int8``.
        library: The consumer's, as pip names it.
        script: Its script below ``readers``.
        precision: What is loaded.
        prepares: Whether it prepares pictures itself, and so embeds those alone that the probe has whole.
    """

    name: str
    library: str
    script: str
    precision: str
    prepares: bool = False


@dataclass(frozen=True)
class Package:
    """A library that a layout needs.

    Attributes:
        module: As Python imports it.
        name: As pip knows it.
        least: The oldest version that knows the layout; None: any.
    """

    module: str
    name: str
    least: str | None = None


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        packages: What writing and reading it needs.
        write: Writes it into an export that is still aside.
        faults: Why a student cannot be written so, one sentence each.
        paths: The files that it must have, by the towers and precisions.
        readings: How it is loaded, by the precisions.
        by_name: Whether it is written only where it is asked for by name: what has a folder of its own for one server,
            mostly of files that the export has elsewhere already, or needs more than Python to be proved.
        check: Refuses to begin where what is no Python package is missing.
    """

    packages: tuple[Package, ...]
    write: Callable[[DualEncoder, Path, Sequence[str]], None]
    faults: Callable[[DualEncoder], Iterator[str]]
    paths: Callable[[Sequence[str], Sequence[str]], tuple[str, ...]]
    readings: Callable[[Sequence[str]], tuple[Reading, ...]]
    by_name: bool = False
    check: Callable[[], None] = lambda: None


def _no_faults(student: DualEncoder) -> Iterator[str]:
    yield from ()


def _onnx_paths(towers: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    return tuple(graph_path("image" if tower == "image" else "text", one) for tower in towers for one in precisions)


def _written_elsewhere(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """What takes more than the student is written by ``write_vectors`` and ``write_web``, which are given it."""


_ONNX = tuple(Package(name, name) for name in ("onnx", "onnxruntime", "onnxscript"))

LAYOUTS = {
    "open_clip": Layout(
        packages=(Package("open_clip", "open_clip_torch"),),
        write=write_open_clip,
        faults=open_clip_faults,
        paths=lambda towers, precisions: FILES,
        readings=lambda precisions: (Reading("open_clip", "open_clip_torch", "read_open_clip.py", "fp32"),),
    ),
    "clip_model": Layout(
        packages=(Package("transformers", "transformers", "5"),),
        write=write_clip_model,
        faults=clip_model_faults,
        paths=lambda towers, precisions: CLIP_MODEL_FILES,
        readings=lambda precisions: (Reading("clip_model", "transformers", "read_clip_model.py", "fp32"),),
    ),
    "sentence_transformers": Layout(
        packages=(
            Package("sentence_transformers", "sentence-transformers", "6"),
            Package("transformers", "transformers", "5"),
            Package("timm", "timm"),
        ),
        write=write_sentence_transformers,
        faults=sentence_transformers_faults,
        paths=lambda towers, precisions: SENTENCE_TRANSFORMERS_FILES,
        readings=lambda precisions: (
            Reading("sentence_transformers", "sentence-transformers", "read_sentence_transformers.py", "fp32"),
        ),
        by_name=True,
    ),
    "onnx": Layout(
        packages=_ONNX,
        write=write_onnx,
        faults=_no_faults,
        paths=_onnx_paths,
        readings=lambda precisions: tuple(
            Reading(f"onnx/{one}", "onnxruntime", "read_onnx.py", one) for one in precisions
        ),
    ),
    "immich": Layout(
        packages=_ONNX,
        write=write_immich,
        faults=immich_faults,
        paths=lambda towers, precisions: IMMICH_PATHS,
        readings=lambda precisions: (Reading("immich", "immich's protocol, onnxruntime", "read_immich.py", "fp32"),),
        by_name=True,
    ),
    "triton": Layout(
        packages=(*_ONNX, Package("tritonclient", "tritonclient"), Package("grpc", "grpcio")),
        write=write_triton,
        faults=_no_faults,
        paths=lambda towers, precisions: triton_paths(towers),
        readings=lambda precisions: (Reading("triton", "tritonclient", "read_triton.py", "fp32"),),
        by_name=True,
    ),
    "vectors": Layout(
        packages=(),
        write=_written_elsewhere,
        faults=vectors_faults,
        paths=lambda towers, precisions: VECTORS_PATHS,
        readings=lambda precisions: (Reading("vectors", "numpy", "read_vectors.py", "fp16"),),
        by_name=True,
    ),
    web.FOLDER: Layout(
        packages=_ONNX,
        write=_written_elsewhere,
        faults=_no_faults,
        paths=web.paths,
        readings=lambda precisions: (Reading("web", "transformers.js", "read_web.py", web.PRECISION, prepares=True),),
        by_name=True,
        check=web.check_browser,
    ),
}
"""The layouts by name."""


def chosen_layouts(student: DualEncoder, names: Sequence[str]) -> tuple[str, ...]:
    """The layouts that are asked for; of none all that need not be, and that the student can be written in."""
    return tuple(names) or tuple(
        name for name, layout in LAYOUTS.items() if not layout.by_name and not list(layout.faults(student))
    )


def name_faults(layouts: Sequence[str], precisions: Sequence[str]) -> Iterator[str]:
    """Unknown or repeated names, one sentence each, with the nearest that is known."""
    for key, given, known in (("layouts", layouts, tuple(LAYOUTS)), ("precisions", precisions, PRECISIONS)):
        for name in given:
            if name not in known:
                yield f"export.{key}: unknown {key[:-1]} {name!r}; {suggest(name, known)}"
        if len(set(given)) < len(given):
            yield f"export.{key}: a name is given twice: {', '.join(given)}"
    if not precisions:
        yield f"export.precisions: none are given; valid: {', '.join(PRECISIONS)}"


def check_packages(layouts: Sequence[str]) -> None:
    """Refuse to begin what could not be finished.

    Raises:
        MissingExtraError: If a library that writes or reads one of the layouts is not installed, or is older than the
            layout.
    """
    for name in layouts:
        LAYOUTS[name].check()
        for package in LAYOUTS[name].packages:
            if importlib.util.find_spec(package.module) is None:
                raise MissingExtraError(package.name, "export")
            found = importlib.metadata.version(package.name) if package.least is not None else ""
            if package.least is not None and _numbers(found) < _numbers(package.least):
                raise MissingExtraError(package.name, "export", found=found, least=package.least)


def _numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers: ``5.10.0rc1`` is (5, 10, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])))


def files_of(layouts: Sequence[str], student: DualEncoder, precisions: Sequence[str]) -> tuple[str, ...]:
    """The files that an export of these layouts must have."""
    return tuple(path for name in layouts for path in LAYOUTS[name].paths(towers_of(student), precisions))


def readings_of(layouts: Sequence[str], precisions: Sequence[str]) -> tuple[Reading, ...]:
    """Every way in which an export of these layouts is loaded."""
    return tuple(reading for name in layouts for reading in LAYOUTS[name].readings(precisions))
