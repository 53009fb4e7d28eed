"""The serve stage: names of folders in, a running search service out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from clipdistill.core.errors import ConfigError, MissingExtraError
from clipdistill.retrieval.index import FOLDER, VectorIndex
from clipdistill.runtime.alone import OneByOne
from clipdistill.search import QuerySide, Searcher
from clipdistill.serve.encoders import Leading
from clipdistill.serve.options import Options
from clipdistill.serve.variants import Variant
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.tokenizer import StudentTokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clipdistill.runtime.encoder import Precision, RuntimeEncoder
    from clipdistill.serve.thumbnails import PictureSource

_EXTRA = "serve"
_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class Served:
    """What is to be served.

    Attributes:
        export: An export's folder.
        index: An index that was built with its student; None takes the one that the export carries.
        name: What the model is called; the export's folder name where None.
        pictures: The folder of the indexed pictures, or of the run that has them, for thumbnails; None = no thumbnails.
        compare: Another export whose results are shown beside; None = none.
        compare_index: Its index; None takes the one that it carries.
        precision: Of the ONNX graphs of every export: fp32, fp16 or int8; None takes fp32, or what an export holds.
        threads: For ONNX Runtime and PyTorch; 0 = their own choice.
        indexes: Further indexes of the same student's embeddings: variants to choose among.
        dims: Widths to cut the student's embeddings to, each a variant; it should be trained for them.
        variants: Further students of the same pictures, each a variant: ``EXPORT``, or ``EXPORT=INDEX``.
        teacher: The folder of a run whose teacher is shown beside; None = none.
        teacher_index: An index of that teacher's embeddings; None takes those that the run stored.
    """

    export: Path
    index: Path | None = None
    name: str | None = None
    pictures: Path | None = None
    compare: Path | None = None
    compare_index: Path | None = None
    precision: str | None = None
    threads: int = 0
    indexes: tuple[Path, ...] = ()
    dims: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    teacher: Path | None = None
    teacher_index: Path | None = None


def serve(served: Served, options: Options, host: str, port: int) -> None:
    """Serve an export until SIGINT or SIGTERM.

    Args:
        served: What.
        options: The bounds; without ``hosts``, a service that only this machine reaches answers to its names alone.
        host: The address to listen on.
        port: The port; 0 = any free one.

    Raises:
        ConfigError: For a folder that is not there, options that do not go together, or an address that cannot be used.
        DataError: If a run has no stored embeddings of its teacher.
        MismatchError: If an index was made by another encoder.
        MissingExtraError: If the libraries of the service are not installed.
    """
    _check_libraries()
    from clipdistill.serve.run import is_loopback, run

    if not options.hosts and is_loopback(host):
        options = replace(options, hosts=("localhost", "127.0.0.1", "::1", host))
    run(build_app(served, options), host, port)


def build_app(served: Served, options: Options) -> FastAPI:
    """Load what is to be served, as the application.

    Args:
        served: What.
        options: The bounds.

    Raises:
        ConfigError: For a folder that is not there, options that do not go together, or a width that cannot be cut to.
        DataError: If a run has no stored embeddings of its teacher.
        MismatchError: If an index was made by another encoder.
    """
    from clipdistill.serve.app import create_app

    _check(served)
    name = served.name or served.export.resolve().name
    student = _open(served, served.export, served.index)
    beside = _beside(served, name, student.index.ids)
    if beside is not None and served.teacher is not None:
        student = student.helped(beside[1].encoder)
    texts_alone = [name] if student.texts_alone else []
    if beside is not None and beside[2]:
        texts_alone.append(beside[0])
    return create_app(
        student.variant(),
        options,
        name=name,
        compared=None if beside is None else beside[:2],
        variants=_variants(served, student),
        texts_alone=texts_alone,
        pictures=None if served.pictures is None else _pictures(served.pictures),
        count_tokens=_token_counter(student.runtime.tokenizer),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """An export with an index, and the live teacher that embeds pictures for a text tower alone."""

    runtime: RuntimeEncoder
    index: VectorIndex
    model_bytes: int
    teacher: Encoder | None = None

    @property
    def texts_alone(self) -> bool:
        return self.runtime.searches is not None and self.teacher is None

    def helped(self, teacher: Encoder) -> _Opened:
        return replace(self, teacher=teacher) if self.runtime.searches is not None else self

    def encoder(self) -> Encoder:
        whole: Encoder = self.runtime if self.teacher is None else QuerySide(self.runtime, self.teacher)
        return OneByOne(whole) if self.runtime.precision == "int8" else whole

    def variant(self) -> Variant:
        return Variant(Searcher(self.encoder(), self.index), self.model_bytes)


def _check(served: Served) -> None:
    faults = []
    if served.compare is None and served.compare_index is not None:
        faults.append("--compare-index: give --compare too: the export whose index it is")
    if served.teacher is None and served.teacher_index is not None:
        faults.append("--teacher-index: give --teacher too: the run whose teacher made it")
    if served.teacher is not None and served.compare is not None:
        faults.append("--teacher and --compare: one model is shown beside the student; give one of the two")
    if faults:
        raise ConfigError(faults)


def _beside(served: Served, name: str, keys: tuple[str, ...]) -> tuple[str, Searcher, bool] | None:
    """What is shown beside the student: its name, which is not the student's, and whether it takes texts alone."""
    if served.teacher is not None:
        from clipdistill.stages.beside import open_beside

        other, searcher = open_beside(served.teacher, keys, served.teacher_index, served.threads)
        return other if other != name else f"{other} (teacher)", searcher, False
    if served.compare is not None:
        opened = _open(served, served.compare, served.compare_index)
        other = served.compare.resolve().name
        searcher = opened.variant().searcher
        return other if other != name else f"{other} (compared)", searcher, opened.texts_alone
    return None


def _variants(served: Served, student: _Opened) -> list[Variant]:
    """The further ways to search: other indexes, fewer dimensions, other students."""
    encoder, size = student.encoder(), student.model_bytes
    found = [
        Variant(Searcher(encoder, VectorIndex.load(index, encoder=encoder.fingerprint)), size)
        for index in served.indexes
    ]
    for dim in served.dims:
        cut = Leading(encoder, dim)
        rows, ids = cut.cut(student.index.vectors()), student.index.ids
        index = VectorIndex.build(rows, ids, factory=student.index.requested, encoder=cut.fingerprint)
        found.append(Variant(Searcher(cut, index), size))
    for text in served.variants:
        export, _, own = text.partition("=")
        opened = _open(served, Path(export), Path(own) if own else None)
        if (opened.runtime.searches is None) != (student.runtime.searches is None):
            raise ConfigError(f"--variant {text}: one of it and {served.export} has a text tower alone, the other not")
        helped = opened if student.teacher is None else opened.helped(student.teacher)
        found.append(helped.variant())
    return found


def _open(served: Served, export: Path, index: Path | None) -> _Opened:
    from clipdistill.runtime import RuntimeEncoder
    from clipdistill.runtime.folder import SUFFIXES, TEXT, VISION

    if index is None and export.is_dir() and not (export / FOLDER).is_dir():
        raise ConfigError(
            f"index: {export} holds none. Give one with --index INDEX, or export again after: "
            "clipdistill index RUN.toml"
        )
    index = index or export / FOLDER
    for what, folder in (("export", export), ("index", index)):
        if not folder.is_dir():
            raise ConfigError(f"{what}: {folder}: not a folder. Make it with: clipdistill {what} RUN.toml")
    precision = served.precision or _held_precision(export)
    runtime = RuntimeEncoder.load(export, precision=cast("Precision", precision), threads=served.threads)
    graphs = [export / name.format(SUFFIXES[precision]) for name in (TEXT, VISION)]
    size = sum(graph.stat().st_size for graph in graphs if graph.is_file())
    return _Opened(runtime, VectorIndex.load(index, encoder=runtime.fingerprint), size)


def _held_precision(export: Path) -> str:
    """The precision that is served where none is asked for: fp32, or the first that an export without it holds."""
    from clipdistill.runtime.folder import ExportFolder

    held = ExportFolder.open(export).precisions
    return held[0] if held and "fp32" not in held else "fp32"


def _pictures(folder: Path) -> PictureSource:
    """The pictures below a folder; of a run's folder those of its data, in tars and tables too."""
    from clipdistill.serve.thumbnails import PictureFolder, PictureTable

    if not (folder / "run.toml").is_file():
        return PictureFolder(folder)
    from clipdistill.stages.beside import open_run
    from clipdistill.stages.inputs import load_data

    return PictureTable(
        {pair.key: pair.picture for pair in load_data(open_run(folder), note=False).pairs if pair.picture}
    )


def _token_counter(tokenizer: StudentTokenizer) -> Callable[[Sequence[str]], int]:
    return lambda texts: int(tokenizer.mask(tokenizer.encode(texts)).sum())


def _check_libraries() -> None:
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as fault:
            raise MissingExtraError(package, _EXTRA) from fault
