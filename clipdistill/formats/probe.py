"""What an export is proved with: prepared pictures and token rows, and what the PyTorch student makes of them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipdistill.core.errors import DataError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.preprocess import Pixels
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.tokenizer import Tokens, characters

Rows = dict[str, Vectors]
"""Embeddings by tower: ``text``, and ``image`` where there is a picture tower."""

CHECK = "check.npz"
"""The probes that travel with an export, with the student's own embeddings of them."""
_CHECKS, _PATCHES, _AT_ONCE = 8, 16, 32
_ORIGINALS, _LARGEST_ORIGINAL = 8, 1 << 22


@dataclass(frozen=True)
class Probe:
    """Inputs of both towers, as the consumers' own preprocessing has them last, and some as it has them first.

    Attributes:
        tokens: int64 [texts, context], padded with 0.
        pixels: float32 [pictures, 3, height, width], normalised; None for a text tower alone.
        relevant: For each text the rows of the pictures that it is right for; empty = not known.
        gallery: For a text tower alone, the pictures' embeddings by its teacher: unit rows [pictures, dim].
        texts: Those of ``tokens``, for consumers that have a tokenizer of their own; empty = not known any more.
        originals: Decoded pictures [height, width, 3] that are small enough, by their row of ``pixels``: for consumers
            that prepare pictures themselves.
    """

    tokens: Tokens
    pixels: npt.NDArray[np.float32] | None = None
    relevant: tuple[tuple[int, ...], ...] = ()
    gallery: Vectors | None = None
    texts: tuple[str, ...] = ()
    originals: Mapping[int, Pixels] = field(default_factory=dict)

    @staticmethod
    def of(
        student: DualEncoder,
        texts: Sequence[str],
        pictures: Sequence[Picture] = (),
        *,
        relevant: Sequence[Sequence[int]] = (),
        gallery: Vectors | None = None,
    ) -> Probe:
        """Prepare texts and pictures as the student does.

        Args:
            student: Whose tokenizer and preprocessing.
            texts: At least one.
            pictures: At least one, where the student has a picture tower; otherwise left aside.
            relevant: For each text the rows of the right pictures.
            gallery: The teacher's embeddings, for a text tower alone.

        Raises:
            DataError: If there is nothing to prove a tower with, or a picture cannot be decoded.
        """
        if not texts or (student.preprocess is not None and not pictures):
            raise DataError("export: no texts or no pictures to prove the exported towers with; give some of each")
        pixels, originals = None, {}
        if student.preprocess is not None:
            pixels = student.preprocess.read(pictures, student.max_pixels)
            originals = _originals(pictures, student.max_pixels)
        right = tuple(tuple(map(int, rows)) for rows in relevant)
        whole = tuple(characters(text) for text in texts)
        return Probe(student.tokenizer.encode(whole, cut=False), pixels, right, gallery, whole, originals)

    @property
    def mask(self) -> Tokens:
        """int64 [texts, context]: 1 up to the end token, whose id is the largest, and 0 after it."""
        ends = self.tokens.argmax(axis=1)[:, None]
        return np.asarray(np.arange(self.tokens.shape[1]) <= ends, np.int64)

    def save(self, path: Path) -> None:
        """Write what the consumers are given."""
        parts: dict[str, Any] = {"input_ids": self.tokens, "attention_mask": self.mask, "texts": _packed(self.texts)}
        if self.pixels is not None:
            parts["pixel_values"] = self.pixels
        for row, picture in self.originals.items():
            parts[f"original_{row}"] = picture
        np.savez(path, **parts)


@torch.inference_mode()
def expected_rows(student: DualEncoder, probe: Probe) -> Rows:
    """What the student itself makes of the probes, in the space that is exported: unit rows of each tower."""
    modes = [(part, part.training) for part in student.module.modules()]
    student.module.eval()
    try:
        texts = [
            student.to_teacher(student.embed_tokens(part.to(student.device)), "text")
            if student.searches is not None
            else student.embed_tokens(part.to(student.device))
            for part in torch.split(torch.from_numpy(probe.tokens), _AT_ONCE)
        ]
        rows = {"text": torch.cat(texts)}
        if probe.pixels is not None:
            parts = torch.split(torch.from_numpy(probe.pixels), _AT_ONCE)
            rows["image"] = torch.cat([student.embed_pixels(part.to(student.device)) for part in parts])
    finally:
        for part, mode in modes:
            part.training = mode
    return {tower: np.asarray(value.cpu().numpy(), np.float32) for tower, value in rows.items()}


def write_check(student: DualEncoder, probe: Probe, path: Path) -> None:
    """Write a few probes of some kilobytes that can be made again anywhere, with the student's embeddings of them.

    The pictures are squares of colour drawn from a fixed seed; the texts are the probe's first ones.

    Args:
        student: The student.
        probe: What was exported with.
        path: The file.
    """
    tokens = probe.tokens[:_CHECKS]
    parts: dict[str, Any] = {"input_ids": tokens, "texts": _packed(probe.texts[:_CHECKS])}
    check = Probe(tokens)
    if student.preprocess is not None:
        patches = np.random.default_rng(0).integers(0, 256, (_CHECKS, _PATCHES, _PATCHES, 3), np.uint8)
        parts["patches"] = patches
        check = Probe(tokens, student.preprocess.normalise(_enlarged(patches, student.preprocess.size)))
    parts |= {f"{tower}_embeds": value for tower, value in expected_rows(student, check).items()}
    np.savez(path, **parts)


def read_check(path: Path, preprocess: Any) -> tuple[Probe, Rows]:
    """The probes that travel with an export, and what the student made of them.

    Args:
        path: The file.
        preprocess: The export's :class:`~clipdistill.towers.preprocess.Preprocess`; None for a text tower alone.

    Raises:
        DataError: If the file is not what :func:`write_check` writes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            parts = dict(stored)
        pixels = None if preprocess is None else preprocess.normalise(_enlarged(parts["patches"], preprocess.size))
        towers = ("text",) if preprocess is None else ("image", "text")
        texts = _unpacked(parts["texts"]) if "texts" in parts else ()
        originals = {} if preprocess is None else dict(enumerate(_enlarged(parts["patches"], preprocess.size)))
        rows = {tower: parts[f"{tower}_embeds"] for tower in towers}
        return Probe(parts["input_ids"], pixels, texts=texts, originals=originals), rows
    except (OSError, EOFError, ValueError, IndexError, KeyError, zipfile.BadZipFile) as fault:
        raise DataError(f"{path}: holds no probes: {fault}. Export again: clipdistill export RUN.toml") from fault


def _originals(pictures: Sequence[Picture], max_pixels: int) -> dict[int, Pixels]:
    """The first decoded pictures that are small enough to be handed on whole, by their place; the smallest of none."""
    found: dict[int, Pixels] = {}
    smallest: tuple[int, Pixels] | None = None
    for row, picture in enumerate(pictures[:_ORIGINALS]):
        pixels = np.array(decode(picture.read(), max_pixels, picture.origin), np.uint8)
        if pixels.size <= 3 * _LARGEST_ORIGINAL:
            found[row] = pixels
        elif smallest is None or pixels.size < smallest[1].size:
            smallest = row, pixels
    return found or ({} if smallest is None else dict([smallest]))


def _packed(texts: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Texts as the bytes of a JSON list: numpy's own strings lose what they end in where that is NUL."""
    return np.frombuffer(json.dumps(list(texts)).encode("utf-8"), np.uint8)


def _unpacked(data: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(map(str, json.loads(data.tobytes())))


def _enlarged(patches: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Each patch repeated: uint8 [rows, height, width, 3], by integers alone, so the same everywhere."""
    down, across = (np.arange(length) * _PATCHES // length for length in size)
    return patches[:, down][:, :, across]
