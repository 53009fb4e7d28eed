"""Reader of tars as webdataset and img2dataset write them: indexed once, never extracted, pictures read in place.

Members belong to one row when their names agree up to the first dot after the last slash (``00017.jpg``,
``00017.txt``, ``00017.json``), wherever in the tar they stand. The row's key is the JSON member's ``key`` where there
is one, as img2dataset's is, unique over all its shards; else that common name. A key that another file has taken
already is lengthened in front, by the tar's stem (``00001/00017``) and, where that is taken too, by its folders.
Nothing of a tar is ever run: no shell pipes, no pickled members.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clipdistill.core.errors import ConfigError, DataError, suggest
from clipdistill.data.readers import (
    MAX_TEXT_BYTES,
    PICTURE_SUFFIXES,
    Reading,
    Refused,
    Row,
    caption_lines,
    decode_text,
    label_of,
    texts_of,
)
from clipdistill.data.records import Picture, Rejection

_KEY = "key"
_CAPTION_FIELDS = ("caption", "captions")
_LABELS = ("cls", "label")
_HEADER_FAULTS = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)


@dataclass(slots=True)
class _Index:
    """What a tar holds.

    Attributes:
        samples: By row name and member extension: where the member's bytes begin, and how many they are.
        faults: What is wrong with single members, and where the tar breaks off.
        seen: Member extensions and JSON fields that occur, for the message about a name that does not.
    """

    samples: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    faults: list[Rejection] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


def read_tar(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """The rows of one tar. Of a tar that breaks off, the rows before the break, and one rejection for the break.

    Captions are the ``.txt`` member's lines, else ``caption`` or ``captions`` of the ``.json`` member; ``captions`` of
    the source may name other extensions or other JSON fields. Where classes are wanted, a row's is the ``.cls`` member,
    as webdataset writes it, else ``label`` of the ``.json`` member, or what ``label`` of the source names. Members
    without an extension, and those whose name begins with a dot, are passed over.

    Raises:
        DataError: If it is no plain tar at all.
        ConfigError: If a member extension or JSON field that the source names occurs nowhere in the tar.
    """
    shown = reading.show(path)
    with path.open("rb") as file:
        index = _index(file, path, shown)
        for name, spans in index.samples.items():
            index.seen.update(spans)
            try:
                yield _row(name, spans, file, path, shown, reading, index)
            except Refused as refused:
                yield Rejection(name, refused.reason, f"{shown}/{name}")
    yield from index.faults
    if index.samples:
        _check_names(shown, reading, index.seen)


def _index(file: IO[bytes], path: Path, shown: str) -> _Index:
    index, size, last = _Index(), path.stat().st_size, -1
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closing it is nothing but closing the file
        while (member := archive.next()) is not None:
            # A negative size would lead backwards, round and round.
            if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                break
            last = archive.offset
            _add(index, member, shown)
    except _HEADER_FAULTS as error:
        if last < 0:
            raise DataError(f"{path}: not a plain tar: {error}; if it is compressed, decompress it first") from error
    else:
        if member is None and _ends_at(file, archive.offset):
            return index
    reason = f"truncated or corrupt tar: it breaks off after byte {max(last, 0)} of {size}"
    index.faults.append(Rejection(shown, reason, shown))
    return index


def _ends_at(file: IO[bytes], offset: int) -> bool:
    """Whether the block there is the mark of zeros that every whole tar ends with."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _add(index: _Index, member: tarfile.TarInfo, shown: str) -> None:
    if member.isdir():
        return
    origin = f"{shown}/{member.name}"
    folder, base = os.path.split(member.name)
    stem, _, extension = base.partition(".")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        index.faults.append(Rejection(member.name, "unsafe member name", origin))
    elif not member.isreg() or member.issparse():
        index.faults.append(Rejection(member.name, "not a plain file", origin))
    elif stem and extension:
        spans = index.samples.setdefault(f"{folder.removeprefix('./')}/{stem}".lstrip("./"), {})
        if extension.lower() in spans:
            index.faults.append(Rejection(member.name, "duplicate key: the tar holds this member twice", origin))
        else:
            spans[extension.lower()] = (member.offset_data, member.size)


def _row(
    name: str,
    spans: dict[str, tuple[int, int]],
    file: IO[bytes],
    path: Path,
    shown: str,
    reading: Reading,
    index: _Index,
) -> Row:
    fields = _fields(spans, file)
    index.seen.update(fields)
    own = reading.spec.key
    key = fields.get(own or _KEY, None if own else name)
    if not isinstance(key, str | int) or key == "":
        raise Refused("no key" if key in (None, "") else f"key is not a text or a whole number: {type(key).__name__}")
    read_texts = reading.kind in ("pairs", "texts")
    captions = _captions(spans, fields, file, reading.spec.captions) if read_texts else ()
    label = _label(spans, fields, file, reading.spec.label) if reading.kind == "classes" else None
    picture = _picture(name, spans, path, shown, reading)
    return Row(str(key), None if own else path, str(key), picture, captions, f"{shown}/{name}", label=label)


def _label(
    spans: dict[str, tuple[int, int]], fields: dict[str, Any], file: IO[bytes], chosen: str | None
) -> str | None:
    for name in (chosen,) if chosen else _LABELS:
        value = _member(spans[name], file) if name in spans else fields.get(name)
        if (label := label_of(value)) is not None:
            return label
    return None


def _picture(name: str, spans: dict[str, tuple[int, int]], path: Path, shown: str, reading: Reading) -> Picture | None:
    known = [extension for extension in spans if f".{extension}" in PICTURE_SUFFIXES]
    extension = reading.spec.image or (known[0] if known else "")
    if reading.kind == "texts" or extension not in spans:
        return None
    offset, size = spans[extension]
    return Picture(origin=f"{shown}/{name}.{extension}", path=path, offset=offset, size=size)


def _captions(
    spans: dict[str, tuple[int, int]], fields: dict[str, Any], file: IO[bytes], names: Sequence[str]
) -> tuple[str, ...]:
    if names:
        parts = [_lines(spans, name, file) if name in spans else texts_of(fields.get(name)) for name in names]
        return tuple(text for part in parts for text in part)
    lines = _lines(spans, "txt", file) if "txt" in spans else ()
    return lines or next((texts for name in _CAPTION_FIELDS if (texts := texts_of(fields.get(name)))), ())


def _lines(spans: dict[str, tuple[int, int]], extension: str, file: IO[bytes]) -> tuple[str, ...]:
    return caption_lines(_member(spans[extension], file))


def _fields(spans: dict[str, tuple[int, int]], file: IO[bytes]) -> dict[str, Any]:
    if "json" not in spans:
        return {}
    try:
        value = json.loads(decode_text(_member(spans["json"], file)))
    except (ValueError, RecursionError) as error:
        raise Refused(f"broken JSON member: {error}") from error
    if not isinstance(value, dict):
        raise Refused("broken JSON member: not an object")
    return value


def _member(span: tuple[int, int], file: IO[bytes]) -> bytes:
    offset, size = span
    if size > MAX_TEXT_BYTES:
        raise Refused(f"text member is over {MAX_TEXT_BYTES} bytes")
    file.seek(offset)
    return file.read(size)


def _check_names(shown: str, reading: Reading, seen: set[str]) -> None:
    spec = reading.spec
    wanted = {
        "image": [spec.image] if reading.kind != "texts" else [],
        "captions": spec.captions if reading.kind in ("pairs", "texts") else [],
        "label": [spec.label] if reading.kind == "classes" else [],
        "key": [spec.key],
    }
    faults = [
        f"data: {shown}: {option}: no member extension or JSON field {name!r} in it; {suggest(name, seen)}"
        for option, names in wanted.items()
        for name in names
        if name is not None and name not in seen
    ]
    if faults:
        raise ConfigError(faults)
