"""What a source's path stands for: braces and globs in order, folders by what lies in them, each file's format."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from clipdistill.core.errors import ConfigError, DataError, suggest
from clipdistill.data import readers, tables, tars
from clipdistill.data.readers import Reader, Reading, SourceSpec

_MAX_RANGE = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_COLUMNS = frozenset({"image", "captions", "label", "key", "root", "split"})


@dataclass(frozen=True, slots=True)
class Format:
    """A format that sources come in.

    Attributes:
        read: Its reader.
        suffixes: The endings of its files' names, by which ``auto`` knows it.
        options: The fields of :class:`SourceSpec` that mean something to it, beside path, format and weight.
    """

    read: Reader
    suffixes: tuple[str, ...]
    options: frozenset[str] = frozenset()

    @property
    def labelled(self) -> bool:
        """Whether its rows can have a class."""
        return self.read is readers.read_classes or "label" in self.options


FORMATS: dict[str, Format] = {
    "folder": Format(readers.read_folder, tuple(sorted(readers.PICTURE_SUFFIXES))),
    "classes": Format(readers.read_classes, ()),
    "csv": Format(tables.read_csv, (".csv",), _COLUMNS | {"separator"}),
    "tsv": Format(tables.read_tsv, (".tsv",), _COLUMNS),
    "jsonl": Format(tables.read_jsonl, (".jsonl", ".ndjson"), _COLUMNS),
    "parquet": Format(tables.read_parquet, (".parquet", ".pq"), _COLUMNS),
    "tar": Format(tars.read_tar, (".tar",), frozenset({"image", "captions", "label", "key"})),
    "json": Format(readers.read_annotations, (".json",), frozenset({"root", "split"})),
    "karpathy": Format(readers.read_karpathy, (".json",), frozenset({"root", "split"})),
    "coco": Format(readers.read_coco, (".json",), frozenset({"root"})),
    "lines": Format(readers.read_lines, (".txt",)),
}
"""The formats by name. ``json`` is Karpathy's or COCO's by content; ``lines`` (``.txt`` files) holds texts only."""

_METADATA = tuple(f"metadata.{name}" for name in ("csv", "jsonl", "parquet"))


def inputs_of(reading: Reading) -> Iterator[tuple[Path, str]]:
    """The files and folders that a source's path stands for, each with its format, in order.

    Raises:
        ConfigError: For an unknown format, or an option of the source that its format does not have.
        DataError: For a path that is missing, or stands for nothing.
    """
    for path in expand(reading.spec.path, reading.base):
        for part, name in _parts(path, reading):
            unused = [
                option.name
                for option in fields(SourceSpec)
                if option.name not in {"path", "format", "weight"} | FORMATS[name].options
                and getattr(reading.spec, option.name) != option.default
            ]
            if unused:
                raise ConfigError(f"data: {reading.spec.path}: format {name} has no option {', '.join(unused)}")
            if name == "lines" and reading.kind != "texts":
                raise ConfigError(f"data: {reading.spec.path}: a .txt file holds texts only: give it as data.texts")
            _check_labelled(name, reading)
            yield part, name


def _check_labelled(name: str, reading: Reading) -> None:
    """Refuse a format without classes where they are wanted, and the folder of classes where captions are.

    Raises:
        ConfigError: Naming the format and what can be given instead.
    """
    path = reading.spec.path
    if reading.kind == "classes" and not FORMATS[name].labelled:
        known = ", ".join(other for other, format in FORMATS.items() if format.labelled)
        raise ConfigError(
            f"data: {path}: format {name} has no classes, which task.kind asks for; those that do: {known}"
        )
    if reading.kind == "pairs" and name == "classes":
        raise ConfigError(f'data: {path}: format classes has no captions; set task.kind = "classification"')


def _parts(path: Path, reading: Reading) -> list[tuple[Path, str]]:
    name = reading.spec.format
    if name != "auto" and name not in FORMATS:
        raise ConfigError(f"data: {reading.spec.path}: unknown format {name!r}; {suggest(name, ['auto', *FORMATS])}")
    if not path.is_dir():
        return [(path, _format_of(path) if name == "auto" else name)]
    if name in ("folder", "classes"):
        return [(path, name)]
    parts = _tables_in(path, name)
    if name == "auto":
        return parts or [(path, "classes" if reading.kind == "classes" else "folder")]
    if not parts:
        raise DataError(f"{path}: no {' or '.join(FORMATS[name].suffixes)} file in this folder")
    return parts


def _tables_in(folder: Path, wanted: str) -> list[tuple[Path, str]]:
    """The data files of a folder: HF's imagefolder metadata, else tars, else (if no picture is below) Parquet files."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    if wanted != "auto":
        return [(folder / name, wanted) for name in names if name.lower().endswith(FORMATS[wanted].suffixes)]
    for name in _METADATA:
        if name in names:
            return [(folder / name, _format_of(folder / name))]
    found = [(folder / name, "tar") for name in names if name.lower().endswith(".tar")]
    if found or _has_pictures(folder):
        return found
    return [(path, "parquet") for path in sorted(folder.rglob("*.parquet")) if path.is_file()]


def _has_pictures(folder: Path) -> bool:
    walk = itertools.chain.from_iterable(names for _, _, names in os.walk(folder))
    return any(Path(name).suffix.lower() in readers.PICTURE_SUFFIXES for name in walk)


def _format_of(path: Path) -> str:
    for name, known in FORMATS.items():
        if path.suffix.lower() in known.suffixes:
            return name
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise DataError(f"{path}: a compressed tar cannot be read in place: decompress it first")
    raise ConfigError(f"data: {path}: no format is known by this name; set format = to one of {', '.join(FORMATS)}")


def expand(pattern: str, base: Path) -> list[Path]:
    """The paths that a pattern stands for: itself where it exists, else brace ranges in order, then globs, sorted.

    Args:
        pattern: A path, with ``{0000..0127}``, ``{a,b}``, ``*``, ``?``, ``[...]`` or ``**``.
        base: The folder that a relative one starts from.

    Raises:
        DataError: Naming the path that is missing, or the pattern that nothing matches.
    """
    whole = Path(os.path.normpath(base / Path(pattern).expanduser()))
    if whole.exists():
        return [whole]
    found: list[Path] = []
    for part in _braces(str(whole)):
        path = Path(part)
        if path.exists():
            found.append(path)
        elif not any(sign in part for sign in "*?["):
            raise DataError(_missing(pattern, path))
        else:
            matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            shown = sorted(match for match in matches if not match.name.startswith("."))
            if not shown:
                raise DataError(f"{pattern}: nothing matches {path}")
            found += shown
    return found


def _braces(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, names = match.groups()
    items: Iterable[str] = (names or "").split(",")
    if names is None:
        step = 1 if int(first) <= int(last) else -1
        if abs(int(last) - int(first)) >= _MAX_RANGE:
            raise ConfigError(f"data: {pattern}: the range holds more than {_MAX_RANGE} names")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        items = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    for item in items:
        yield from _braces(pattern[: match.start()] + item + pattern[match.end() :])


def _missing(pattern: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{pattern}: no such file or folder: {path} (its folder is missing as well)"
    names = [entry.name for entry in folder.iterdir()]
    return f"{pattern}: no such file or folder: {path}" + (f"; {suggest(path.name, names)}" if names else "")
