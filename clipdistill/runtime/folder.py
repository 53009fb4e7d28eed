"""An export's folder: what its manifest says, each value checked, and its files, each read once and proved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, final

from clipdistill.core import files, manifest
from clipdistill.core.errors import ConfigError, DataError, MismatchError, suggest
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.preprocess import Preprocess

KIND, VERSION = "export", 1
REMEDY = "Export the student again, or copy the folder again from where it was made."
TOKENIZER, TEXT, VISION = "tokenizer.json", "onnx/text_model{}.onnx", "onnx/vision_model{}.onnx"
SUFFIXES: Final[Mapping[str, str]] = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
"""How the graphs of each precision are named, as transformers.js looks for them."""


@final
@dataclass(frozen=True, slots=True)
class ExportFolder:
    """An exported student as its manifest describes it; no other file is read before it is asked for.

    Attributes:
        path: The folder.
        encoder: The fingerprint that an index for it carries.
        dim: The width of the embeddings.
        context_length: How many tokens a text is cut to.
        preprocess: How pictures are prepared; None for a text tower alone.
        max_pixels: Pictures that claim more are refused.
        precisions: Which graphs there are.
        searches: The teacher whose pictures a text tower alone searches; None for a student with both towers.
        digests: SHA-256 by file name.
    """

    path: Path
    encoder: str
    dim: int
    context_length: int
    preprocess: Preprocess | None
    max_pixels: int
    precisions: tuple[str, ...]
    searches: SearchedTeacher | None
    digests: Mapping[str, str]

    @staticmethod
    def open(folder: str | Path) -> ExportFolder:
        """Read an export's manifest.

        Raises:
            DataError: If there is no readable manifest, or it names a file outside the folder.
            MismatchError: If it is another artefact's, or a value is missing or of a kind that no export has.
        """
        path = Path(folder)
        values = _Values(path / manifest.NAME, manifest.read(path, KIND, VERSION, REMEDY))
        digests = values.mapping("files")
        for name, digest in digests.items():
            values.check("files", isinstance(digest, str), f"a SHA-256 for {name}", digest)
            if not files.stays_inside(name):
                raise DataError(
                    f"{path / manifest.NAME}: files: {name!r} is not the name of a file inside the folder. {REMEDY}"
                )
        return ExportFolder(
            path=path,
            encoder=values.text("encoder"),
            dim=values.whole("dim", least=1),
            context_length=values.whole("context_length", least=3),
            preprocess=values.preprocess(),
            max_pixels=values.whole("max_pixels", least=1),
            precisions=values.names("precisions"),
            searches=values.searches(),
            digests=digests,
        )

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the folder has no graphs of.

        Raises:
            ConfigError: Naming those that it has.
        """
        held = [name for name in SUFFIXES if name in self.precisions]
        if precision in held:
            return
        if not held:
            raise ConfigError(f"precision: {self.path} holds no ONNX graphs. Export the student with the layout onnx")
        guess = "" if precision in SUFFIXES else f"; {suggest(precision, SUFFIXES)}"
        raise ConfigError(f"precision: {self.path} has no {precision!r} graphs, it holds: {', '.join(held)}{guess}")

    def read(self, name: str) -> bytes:
        """The bytes of one file, after comparing them with the manifest's SHA-256.

        What was compared is what is returned, so that nothing can change between the two.

        Args:
            name: The file's name in the manifest.

        Raises:
            DataError: If it is a symbolic link, or lies behind one.
            MismatchError: If it is missing or is not the one that was written.
        """
        path = self.path / name
        for part in (path, *path.parents[: len(PurePosixPath(name).parts) - 1]):
            if part.is_symlink():
                raise DataError(f"{part}: is a symbolic link, and could lead anywhere. Copy the file itself there")
        data = path.read_bytes() if path.is_file() else None
        found = "no file" if data is None else hashlib.sha256(data).hexdigest()
        expected = self.digests.get(name, "none in the manifest")
        if data is None or found != expected:
            raise MismatchError(str(path), "sha256", expected, found, REMEDY)
        return data


class _Values:
    """The manifest's values by kind: a changed manifest is a named fault and never a crash further on."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def check(self, field: str, fits: bool, expected: str, found: object) -> None:
        if not fits:
            raise MismatchError(str(self._path), field, expected, "none" if found is None else repr(found), REMEDY)

    def text(self, field: str) -> str:
        return str(self._fitting(field, "a text", lambda value: isinstance(value, str) and value != ""))

    def whole(self, field: str, *, least: int) -> int:
        return int(self._fitting(field, f"a whole number of at least {least}", lambda value: _whole(value, least)))

    def names(self, field: str) -> tuple[str, ...]:
        return tuple(self._fitting(field, "a list of names", _names))

    def mapping(self, field: str) -> dict[str, Any]:
        return dict(self._fitting(field, "a table", lambda value: isinstance(value, dict)))

    def preprocess(self) -> Preprocess | None:
        """The preprocessing.

        Raises:
            DataError: If there is none of that kind.
        """
        if self._values.get("preprocess") is None:
            return None
        cfg = self.mapping("preprocess")
        try:
            preprocess = Preprocess.from_open_clip(cfg)
        except (TypeError, ValueError) as fault:
            raise DataError(f"{self._path}: preprocess: {fault}. {REMEDY}") from fault
        self.check("preprocess.size", min(preprocess.size) >= 1, "a height and a width of at least 1", cfg.get("size"))
        return preprocess

    def searches(self) -> SearchedTeacher | None:
        if self._values.get("searches") is None:
            return None
        teacher = _Values(self._path, self.mapping("searches"))
        return SearchedTeacher(teacher.text("name"), teacher.text("fingerprint"))

    def _fitting(self, field: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self._values.get(field)
        self.check(field, fits(value), expected, value)
        return value


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
