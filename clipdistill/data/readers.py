"""What every reader takes and gives, and the readers of folders, plain texts and caption JSON files.

A reader is a generator over one file or folder: a :class:`Row` for each row that it could make out, a
:class:`Rejection` for each that it could not. Whether a row is usable (its picture opens, its key is new, its texts
are UTF-8) is decided in one place, for all formats, by :func:`clipdistill.data.sources.load_source`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Picture, Rejection

Kind = Literal["pairs", "classes", "images", "texts"]

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    # These are not decoded: such a file is a row that is refused with a reason, not one that is passed over.
    | {".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".ico", ".ppm", ".pgm", ".psd", ".tga"}
)
MAX_TEXT_BYTES = 1 << 20


class Refused(Exception):  # noqa: N818 - it is not a fault of the program: it carries one row's reason
    """One row is refused.

    Args:
        reason: Why, in a phrase whose part before the first colon is the same for all rows of that fault.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One entry of the configuration's data section: where rows are, and how to read them.

    Attributes:
        path: A folder, a file, a glob, or a brace range such as ``shards/{0000..0127}.tar``.
        format: ``auto``, ``folder``, ``classes``, ``csv``, ``tsv``, ``jsonl``, ``parquet``, ``tar``, ``karpathy`` or
            ``coco``.
        image: The column (in a tar: the member extension) of the picture; None = detected.
        captions: The columns (in a tar: member extensions or JSON fields) of the captions, each a text or a list of
            texts; empty = detected.
        label: The column (in a tar: the member extension or JSON field) of the class; None = detected.
        key: The column (in a tar: the JSON field) of the key; None = detected, else made from file names.
        root: The folder that relative picture paths start from; None = the table's own.
        separator: What separates a CSV's columns; None = TAB where the header holds one, else a comma.
        split: Only the rows of this split: of a Karpathy file, or by a ``split`` column.
        weight: How often these rows are drawn in training, against the other sources' 1.0.
    """

    path: str
    format: str = "auto"
    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    key: str | None = None
    root: str | None = None
    separator: str | None = None
    split: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in the user's data, not yet checked.

    Attributes:
        key: The user's own key, or one made from file names.
        file: None for the user's own key. For a made key, the file that it was made from, absolute: where a row of
            another file has the key already, this one is lengthened by the path; the same row twice is refused.
        inside: The row's name in that file; empty where the file is the row, a picture by itself.
        picture: The picture, if any.
        captions: The texts as written. Bytes that are not UTF-8 stand in them as lone surrogates.
        origin: The row's name in messages.
        joins: Whether a later row of the source from the same file adds its captions to this one.
        label: The class as written, if any.
    """

    key: str
    file: Path | None
    inside: str
    picture: Picture | None
    captions: tuple[str, ...]
    origin: str
    joins: bool = False
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader needs to know beside the file.

    Attributes:
        spec: The source.
        kind: What is wanted of a row.
        base: The absolute folder that relative paths start from.
        splits: Filled by the readers: the names of the splits that they met.
    """

    spec: SourceSpec
    kind: Kind
    base: Path
    splits: set[str] = field(default_factory=set)

    def show(self, path: str | Path) -> str:
        """A path for messages and keys: from the base folder on where it lies below it, else whole."""
        text, base = os.path.normpath(path), f"{self.base}{os.sep}"
        return text[len(base) :] if text.startswith(base) else text

    def root(self, table: Path) -> Path:
        """The folder that a table's relative picture paths start from."""
        return table.parent if self.spec.root is None else self.base / self.spec.root


Reader = Callable[[Path, Reading], Iterator[Row | Rejection]]


def decode_text(data: bytes) -> str:
    """Bytes as text; those that are not UTF-8 stand as lone surrogates, which mark the row for rejection."""
    return data.decode("utf-8-sig", "surrogateescape")


def caption_lines(data: bytes) -> tuple[str, ...]:
    """The captions of a ``.txt`` file: one a line, blank lines dropped."""
    return tuple(line for raw in decode_text(data).split("\n") if (line := raw.strip()))


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts of a cell that holds a text, a list of texts, or nothing.

    Raises:
        Refused: If it holds something else.
    """
    if value is None or (isinstance(value, float) and value != value):  # NaN is pandas' way of writing nothing
        return ()
    if isinstance(value, bytes):
        value = decode_text(value)
    if isinstance(value, str):
        return (text,) if (text := value.strip()) else ()
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return tuple(text for item in value for text in texts_of(item))
    raise Refused(f"caption is not a text: {type(value).__name__}")


def label_of(value: Any) -> str | None:
    """The class that a cell names by a text or a number; None where it holds nothing.

    Raises:
        Refused: If it holds something else.
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, bytes):
        value = decode_text(value)
    if not isinstance(value, str | int):
        raise Refused(f"label is not a text or a whole number: {type(value).__name__}")
    return str(value).strip() or None


def picture_at(name: str, root: Path, reading: Reading) -> Picture:
    """The picture that a table names by its path.

    Raises:
        Refused: If the name is a web address: nothing is ever fetched.
    """
    if name.startswith(("http://", "https://", "s3://", "gs://")):
        raise Refused("picture is a web address: download it first, with img2dataset for example")
    path = os.path.normpath(root / name)
    return Picture(origin=reading.show(path), path=Path(path))


def read_folder(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """An image folder with all below it, or one picture; captions from the ``.txt`` file of the same stem, one a line.

    The key is the folder's name and the path inside it. Names that begin with a dot are passed over. A symbolic link
    that leads out of the folder is refused, and links to folders are not walked into.
    """
    if not path.is_dir():
        yield _folder_row(path, path.with_suffix(".txt"), path.parent, path.parent.resolve(), reading)
        return
    real = path.resolve()
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if _leaves(here / name, real):
                yield _refusal(here / name, path, reading, "symbolic link out of the folder")
        files = [here / name for name in sorted(names) if not name.startswith(".")]
        pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
        for file in pictures:
            yield _folder_row(file, texts.get(file.stem), path, real, reading)
        for stem in sorted(texts.keys() - {file.stem for file in pictures}):
            yield _refusal(texts[stem], path, reading, "no picture: none has this text's name")


def read_classes(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A folder of classes in torchvision's ImageFolder layout: a sub-folder a class, its pictures anywhere below it.

    The label is the sub-folder's name, and the key as in :func:`read_folder`. A picture beside the sub-folders has no
    label and is refused; other files, and names that begin with a dot, are passed over.

    Raises:
        ConfigError: If it is not a folder.
        DataError: If a sub-folder holds no picture, naming every such one.
    """
    if not path.is_dir():
        raise ConfigError(f"data: {reading.show(path)}: format classes reads a folder with a sub-folder for each class")
    real, filled = path.resolve(), set[str]()
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = here / name
            if name.startswith(".") or file.suffix.lower() not in PICTURE_SUFFIXES:
                continue
            label = file.relative_to(path).parts[0]
            if here == path:
                yield _refusal(file, path, reading, "no label: it lies in no class's folder")
                continue
            filled.add(label)
            row = _folder_row(file, None, path, real, reading)
            yield replace(row, label=label) if isinstance(row, Row) else row
    _check_filled(path, filled, reading)


def _check_filled(path: Path, filled: set[str], reading: Reading) -> None:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if empty := [name for name in classes if name not in filled]:
        raise DataError(
            f"{reading.show(path)}: {len(empty)} of {len(classes)} class folders hold no picture: {named(empty)}. "
            "Give them pictures, or remove them (a link to a folder is not walked into)"
        )


def named(names: Iterable[str], most: int = 8) -> str:
    """Some names for a message: the first few in quotes, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(repr, listed[:most])) + more


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error


def _folder_row(file: Path, text: Path | None, top: Path, real: Path, reading: Reading) -> Row | Rejection:
    try:
        if _leaves(file, real):
            raise Refused("symbolic link out of the folder")
        captions = () if text is None or reading.kind == "images" else _caption_file(text, real)
    except Refused as refused:
        return _refusal(file, top, reading, refused.reason)
    shown = reading.show(file)
    return Row(_folder_key(file, top), file, "", Picture(origin=shown, path=file), captions, shown)


def _caption_file(file: Path, real: Path) -> tuple[str, ...]:
    if _leaves(file, real):
        raise Refused("symbolic link out of the folder")
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise Refused(f"caption file is over {MAX_TEXT_BYTES} bytes")
        return caption_lines(file.read_bytes())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise Refused(f"unreadable caption file: {error.strerror}") from error


def _folder_key(file: Path, top: Path) -> str:
    return f"{top.name}/{file.relative_to(top).as_posix()}"


def _refusal(file: Path, top: Path, reading: Reading, reason: str) -> Rejection:
    return Rejection(_folder_key(file, top), reason, reading.show(file))


def _leaves(file: Path, real: Path) -> bool:
    return file.is_symlink() and not file.resolve().is_relative_to(real)


def read_lines(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A ``.txt`` file of unpaired texts, one a line, blank lines passed over; the key is the stem and the line."""
    shown = reading.show(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if text := decode_text(line).strip():
                yield Row(f"{path.stem}/{number}", path, str(number), None, (text,), f"{shown}[{number}]")


def load_json(path: Path) -> Any:
    """A JSON file's value; bytes that are not UTF-8 stand in its texts as lone surrogates.

    Raises:
        DataError: If it is not JSON.
    """
    try:
        return json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file: {error}") from error


def read_annotations(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A JSON file of captions: COCO's where it holds ``annotations``, else Karpathy's."""
    document = load_json(path)
    coco = isinstance(document, dict) and "annotations" in document
    if coco and reading.spec.split is not None:
        raise ConfigError(f"data: {reading.show(path)}: a COCO captions file has no splits; leave out split")
    return _coco(document, path, reading) if coco else _karpathy(document, path, reading)


def read_karpathy(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A Karpathy split file (``dataset_coco.json``, ``dataset_flickr30k.json``): five sentences a picture, mostly.

    The key is ``cocoid``, else ``imgid``; the split ``restval`` counts as ``train``.
    """
    return _karpathy(load_json(path), path, reading)


def read_coco(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A COCO captions file (``captions_val2017.json``); the key is the picture's ``id``.

    The pictures of COCO lie beside the folder of the annotations, so ``root`` is nearly always needed.
    """
    return _coco(load_json(path), path, reading)


def _karpathy(document: Any, path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    for number, record in enumerate(_records(document, "images", path)):
        split = "train" if record.get("split") == "restval" else str(record.get("split"))
        reading.splits.add(split)
        if reading.spec.split in (None, split, record.get("split")):
            sentences = record.get("sentences")
            texts = [item.get("raw") for item in sentences or () if isinstance(item, dict)]
            names = [str(name) for name in (record.get("filepath"), record.get("filename")) if name]
            name = "/".join(names) if record.get("filename") else ""
            key = str(record.get("cocoid", record.get("imgid", number)))
            yield _json_row(key, name, texts, number, path, reading)


def _coco(document: Any, path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    texts: dict[str, list[Any]] = {}
    for annotation in _records(document, "annotations", path):
        texts.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    for number, record in enumerate(_records(document, "images", path)):
        key = str(record.get("id", number))
        yield _json_row(key, str(record.get("file_name") or ""), texts.pop(key, []), number, path, reading)
    for key in texts:
        yield Rejection(key, "no picture: captions of an image_id that the file does not list", reading.show(path))


def _records(document: Any, name: str, path: Path) -> list[dict[str, Any]]:
    records = document.get(name) if isinstance(document, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: it has no list of objects named {name!r}, as a Karpathy or COCO captions file has")
    return records


def _json_row(key: str, name: str, texts: list[Any], number: int, path: Path, reading: Reading) -> Row | Rejection:
    shown = reading.show(path)
    origin = f"{shown}[{number}]"
    try:
        picture = picture_at(name, reading.root(path), reading) if name and reading.kind != "texts" else None
        captions = () if reading.kind == "images" else texts_of(texts)
        return Row(key, path, key, picture, captions, origin)
    except Refused as refused:
        return Rejection(key, refused.reason, origin)
