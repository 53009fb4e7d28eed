"""The serve stage: names of folders in, a running search service out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, final

from clipdistill.core.errors import ConfigError, MissingExtraError
from clipdistill.data.records import Picture
from clipdistill.retrieval.index import FOLDER, VectorIndex
from clipdistill.search import Searcher
from clipdistill.serve.options import Options
from clipdistill.towers.encoder import Encoder, Vectors
from clipdistill.towers.tokenizer import StudentTokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clipdistill.runtime.encoder import Precision

_EXTRA = "serve"
_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class Served:
    """What is to be served.

    Attributes:
        export: An export's folder.
        index: The index that was built with its student; None = the one that the export holds.
        name: What the model is called; the export's folder name where None.
        pictures: The folder of the indexed pictures, for thumbnails; None = no thumbnails.
        compare: Another export whose results are shown beside; None = none.
        compare_index: Its index; None = the one that it holds.
        precision: Of the ONNX graphs: fp32, fp16 or int8.
        threads: For ONNX Runtime; 0 = its own choice.
    """

    export: Path
    index: Path | None = None
    name: str | None = None
    pictures: Path | None = None
    compare: Path | None = None
    compare_index: Path | None = None
    precision: str = "fp32"
    threads: int = 0


def serve(served: Served, options: Options, host: str, port: int) -> None:
    """Serve an export until SIGINT or SIGTERM.

    Args:
        served: What.
        options: The bounds; without ``hosts``, a service that only this machine reaches answers to its names alone.
        host: The address to listen on.
        port: The port; 0 = any free one.

    Raises:
        ConfigError: For a folder that is not there, an index without its export, or an address that cannot be used.
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
        ConfigError: For a folder that is not there, or an index without its export.
        MismatchError: If an index was made by another encoder.
    """
    from clipdistill.serve.app import create_app
    from clipdistill.serve.thumbnails import PictureFolder

    if served.compare is None and served.compare_index is not None:
        raise ConfigError("--compare-index: give --compare too: the export whose index it is")
    name = served.name or served.export.resolve().name
    searcher, tokenizer = _searcher(served, served.export, served.index)
    compared = None
    if served.compare is not None:
        other = served.compare.resolve().name
        compared = (
            other if other != name else f"{other} (compared)",
            _searcher(served, served.compare, served.compare_index)[0],
        )
    return create_app(
        searcher,
        options,
        name=name,
        compared=compared,
        pictures=None if served.pictures is None else PictureFolder(served.pictures),
        count_tokens=_token_counter(tokenizer),
    )


def _searcher(served: Served, export: Path, index: Path | None) -> tuple[Searcher, StudentTokenizer]:
    from clipdistill.runtime import RuntimeEncoder

    if index is None and export.is_dir() and not (export / FOLDER).is_dir():
        raise ConfigError(
            f"index: {export} holds none. Give one with --index INDEX, or export again after: "
            "clipdistill index RUN.toml"
        )
    index = index or export / FOLDER
    for what, folder in (("export", export), ("index", index)):
        if not folder.is_dir():
            raise ConfigError(f"{what}: {folder}: not a folder. Make it with: clipdistill {what} RUN.toml")
    runtime = RuntimeEncoder.load(export, precision=cast("Precision", served.precision), threads=served.threads)
    encoder: Encoder = OneByOne(runtime) if runtime.precision == "int8" else runtime
    return Searcher(encoder, VectorIndex.load(index, encoder=encoder.fingerprint)), runtime.tokenizer


@final
class OneByOne:
    """An encoder that gives each text and picture to its network alone, so that no answer depends on its neighbours.

    An int8 graph scales its activations by the largest of the batch. Requests of strangers meet in the service's
    batches, and the same query must give the same hits whoever else asks.

    Args:
        encoder: The encoder.
    """

    __slots__ = ("_encoder",)

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._encoder.dim

    @property
    def fingerprint(self) -> str:
        """The encoder's."""
        return self._encoder.fingerprint

    def encode_images(self, pictures: Sequence[Picture], batch: int = 1) -> Vectors:
        """Embed pictures: float32 [len(pictures), dim], unit rows; ``batch`` has no effect."""
        return self._encoder.encode_images(pictures, 1)

    def encode_texts(self, texts: Sequence[str], batch: int = 1) -> Vectors:
        """Embed texts: float32 [len(texts), dim], unit rows; ``batch`` has no effect."""
        return self._encoder.encode_texts(texts, 1)


def _token_counter(tokenizer: StudentTokenizer) -> Callable[[Sequence[str]], int]:
    return lambda texts: int(tokenizer.mask(tokenizer.encode(texts)).sum())


def _check_libraries() -> None:
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as fault:
            raise MissingExtraError(package, _EXTRA) from fault
