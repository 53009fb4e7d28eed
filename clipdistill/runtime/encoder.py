"""The exported student as an encoder: ONNX Runtime in torch's place, and the student's own tokenizer and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import numpy as np
from tokenizers import Tokenizer

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.runtime.folder import REMEDY, SUFFIXES, TEXT, TOKENIZER, VISION, ExportFolder
from clipdistill.runtime.graphs import Graph
from clipdistill.towers.encoder import SearchedTeacher, Vectors
from clipdistill.towers.tokenizer import StudentTokenizer

Precision = Literal["fp32", "fp16", "int8"]
_TEXT_INPUTS = {"input_ids": "tensor(int64)", "attention_mask": "tensor(int64)"}
_PICTURE_INPUTS = {"pixel_values": "tensor(float)"}


@final
class RuntimeEncoder:
    """An exported student without torch: an :class:`~clipdistill.towers.encoder.Encoder`.

    Make one with :meth:`load`. It may be used from several threads at once.

    Of a text tower alone the export ends in the teacher's space and carries the teacher's fingerprint, so that it
    searches the teacher's index as it is; with the live teacher for pictures, by :class:`clipdistill.search.QuerySide`.

    With int8 a graph scales its activations by the largest of the whole batch, so that there a row also depends, within
    the precision of 8 bits, on the others that it went through the graph with; ``batch=1`` makes it independent.
    """

    __slots__ = ("_folder", "_pictures", "_texts", "precision", "tokenizer")

    def __init__(
        self,
        folder: ExportFolder,
        precision: Precision,
        tokenizer: StudentTokenizer,
        texts: Graph,
        pictures: Graph | None,
    ) -> None:
        self._folder, self._texts, self._pictures = folder, texts, pictures
        self.precision: Precision = precision
        """Of the graphs."""
        self.tokenizer = tokenizer
        """The student's own."""

    @staticmethod
    def load(folder: str | Path, *, precision: Precision = "fp32", threads: int = 0) -> RuntimeEncoder:
        """Load an export, after comparing each file that is used with the manifest's SHA-256.

        Args:
            folder: What ``clipdistill export`` wrote, with the layout ``onnx``.
            precision: Of the graphs.
            threads: How many threads one batch uses; 0 = one for each core.

        Raises:
            ConfigError: If the export has no graphs of this precision, or the number of threads is negative.
            DataError: If it is no export, or a file cannot be read as what it is named.
            MismatchError: If a file is missing or is not the one that was written, or contradicts the manifest.
            MissingExtraError: If ONNX Runtime is not installed.
        """
        if threads < 0:
            raise ConfigError(f"threads: must be 0 (one for each core) or more, got {threads}")
        export = ExportFolder.open(folder)
        export.check_precision(precision)
        text, vision = (name.format(SUFFIXES[precision]) for name in (TEXT, VISION))
        names = [TOKENIZER, text, *([] if export.preprocess is None else [vision])]
        proved = {name: export.read(name) for name in names}  # all of them, before the first is used
        tokenizer = _tokenizer(export, proved.pop(TOKENIZER))
        texts = _text_graph(export, text, proved.pop(text), threads)
        pictures = _picture_graph(export, vision, proved.pop(vision), threads) if vision in proved else None
        return RuntimeEncoder(export, precision, tokenizer, texts, pictures)

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._folder.dim

    @property
    def fingerprint(self) -> str:
        """What an index for it carries: the exported student's, or for a text tower alone its teacher's."""
        return self._folder.encoder

    @property
    def max_pixels(self) -> int:
        """Pictures that claim more are refused."""
        return self._folder.max_pixels

    @property
    def searches(self) -> SearchedTeacher | None:
        """The teacher whose pictures it searches; None where it has a picture tower of its own."""
        return self._folder.searches

    @property
    def teacher_dim(self) -> int:
        """Of a text tower alone, the width of the teacher's embeddings: its own, since it ends in their space."""
        return self.dim

    def to_teacher_vectors(self, vectors: Vectors, side: Literal["image", "text"]) -> Vectors:
        """A text tower's embeddings in the teacher's space: they are there already.

        Raises:
            DataError: If it has a picture tower of its own, and so no map to a teacher's space.
        """
        if self.searches is None:
            raise DataError(
                f"{self._folder.path}: an export holds no map to the teacher's space. Map {side} embeddings with the "
                "student that it was made from"
            )
        return vectors

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures: float32 [pictures, dim], unit rows.

        Args:
            pictures: What to embed.
            batch: How many go through the graph at once; never changes a result beyond rounding.

        Raises:
            DataError: If a picture cannot be read or decoded, naming it, or there is no picture tower.
            ValueError: If ``batch`` is below 1.
        """
        preprocess, graph = self._folder.preprocess, self._pictures
        if preprocess is None or graph is None:
            name = "the teacher" if self.searches is None else f"the teacher {self.searches.name}"
            raise DataError(
                f"this export has a text tower alone: pictures are embedded by {name}. Search its index with texts, or "
                "embed pictures with that teacher"
            )
        if batch < 1:
            raise ValueError(f"batch must be at least 1: got {batch}")
        vectors = np.zeros((len(pictures), self.dim), np.float32)
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            vectors[start : start + len(part)] = graph.run(pixel_values=preprocess.read(part, self.max_pixels))
        return vectors

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 [texts, dim], unit rows, in the order of the texts.

        Args:
            texts: What to embed.
            batch: How many go through the graph at once, those of like length together; never changes a result beyond
                rounding.

        Raises:
            ValueError: If ``batch`` is below 1.
        """
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for rows, tokens in self.tokenizer.by_length(texts, batch):
            vectors[rows] = self._texts.run(input_ids=tokens, attention_mask=self.tokenizer.mask(tokens))
        return vectors


def _tokenizer(export: ExportFolder, data: bytes) -> StudentTokenizer:
    path = export.path / TOKENIZER
    try:
        backend = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as fault:  # the Rust library raises plain Exception on a file that it cannot parse
        raise DataError(f"{path}: cannot be read: {fault}. {REMEDY}") from fault
    longest = (backend.truncation or {}).get("max_length", export.context_length)
    if longest != export.context_length:
        raise MismatchError(str(path), "truncation.max_length", export.context_length, longest, REMEDY)
    return StudentTokenizer(backend, export.context_length)


def _text_graph(export: ExportFolder, name: str, model: bytes, threads: int) -> Graph:
    sizes = {"text_embeds": (None, export.dim)}
    return Graph(
        str(export.path / name), model, inputs=_TEXT_INPUTS, output="text_embeds", sizes=sizes, threads=threads
    )


def _picture_graph(export: ExportFolder, name: str, model: bytes, threads: int) -> Graph:
    size = (None, None) if export.preprocess is None else export.preprocess.size
    sizes = {"pixel_values": (None, 3, *size), "image_embeds": (None, export.dim)}
    return Graph(
        str(export.path / name), model, inputs=_PICTURE_INPUTS, output="image_embeds", sizes=sizes, threads=threads
    )
