"""Readers of tables: CSV, TSV, JSON Lines and Parquet, with Hugging Face's picture columns and imagefolder metadata.

A row's key is its key column's value. Where there is none, it is the picture's path as the table writes it, and rows
of one path become one pair with all their captions (open_clip's CSV files hold a row for each caption); where the
table holds the picture's bytes, or only texts, it is the table's stem and the row's number.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipdistill.core.errors import ConfigError, DataError, suggest
from clipdistill.data.readers import Reading, Refused, Row, label_of, picture_at, texts_of
from clipdistill.data.records import Picture, Rejection

IMAGE_COLUMNS = ("filepath", "file_name", "image", "image_path", "path", "filename", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "texts", "sentences", "sentence", "description", "txt")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
KEY_COLUMNS = ("key", "id")
SPLIT_COLUMN = "split"

_PEEK = 1000
"""So many JSON Lines are looked at to learn the columns, since each line names its own."""
_BATCH = 1024
_PARQUET_FAULTS = (pa.ArrowException, OSError, ValueError, KeyError)

Record = Mapping[str, Any] | Refused


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column plays which part in a table; None or empty = none does."""

    image: str | None
    captions: tuple[str, ...]
    label: str | None
    key: str | None
    split: str | None

    def names(self) -> list[str]:
        """The columns to be read, each once."""
        named = (self.image, *self.captions, self.label, self.key, self.split)
        return list(dict.fromkeys(name for name in named if name is not None))


def choose_columns(names: Sequence[str], shown: str, reading: Reading) -> Columns:
    """Settle which columns are read: those that the source names, else the first of the known names that is there.

    Args:
        names: The table's columns.
        shown: The table, for messages.
        reading: The source and what is wanted of it.

    Raises:
        ConfigError: With every fault: a named column that is not there, or a needed one that is not found.
    """
    spec, faults = reading.spec, []
    wanted = {"image": [spec.image], "captions": spec.captions, "label": [spec.label], "key": [spec.key]}
    for option, chosen in wanted.items():
        for name in chosen:
            if name is not None and name not in names:
                faults.append(f"data: {shown}: {option}: no column {name!r}; {suggest(name, names)}")
    if spec.split is not None and SPLIT_COLUMN not in names:
        faults.append(f"data: {shown}: split = {spec.split!r} needs a column {SPLIT_COLUMN!r}; {_listed(names)}")
    image = spec.image or next((name for name in IMAGE_COLUMNS if name in names), None)
    captions = spec.captions or tuple(name for name in CAPTION_COLUMNS if name in names)[:1]
    if reading.kind != "texts" and image is None:
        faults.append(f"data: {shown}: no picture column is known; {_listed(names)}; set image = '...' for this source")
    label = spec.label or next((name for name in LABEL_COLUMNS if name in names), None)
    if reading.kind == "classes" and label is None:
        faults.append(
            f"data: {shown}: no column of classes is known; {_listed(names)}; set label = '...' for this source"
        )
    if reading.kind in ("pairs", "texts") and not captions:
        faults.append(f"data: {shown}: no caption column is known; {_listed(names)}; set captions = ['...'] for it")
    columns = Columns(
        image=None if reading.kind == "texts" else image,
        captions=captions if reading.kind in ("pairs", "texts") else (),
        label=label if reading.kind == "classes" else None,
        key=spec.key or next((name for name in KEY_COLUMNS if name in names), None),
        split=SPLIT_COLUMN if spec.split is not None else None,
    )
    faults += [
        f"data: {shown}: several columns are named {name!r}" for name in columns.names() if names.count(name) > 1
    ]
    if faults:
        raise ConfigError(faults)
    return columns


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"its columns are: {shown}"


def read_csv(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A CSV file with a header, TAB separated as open_clip's where the header holds a TAB, else by commas."""
    with path.open("rb") as file:
        sniffed = "\t" if b"\t" in file.readline() else ","
    return _delimited(path, reading.spec.separator or sniffed, reading)


def read_tsv(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A TAB separated file with a header."""
    return _delimited(path, "\t", reading)


def _delimited(path: Path, separator: str, reading: Reading) -> Iterator[Row | Rejection]:
    if len(separator) != 1:
        raise ConfigError(f"data: {reading.show(path)}: separator must be one character, got {separator!r}")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, delimiter=separator)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise DataError(f"{path}: the header cannot be read: {error}") from error
        if header:
            columns = choose_columns(header, reading.show(path), reading)
            yield from _rows(path, columns, _csv_records(rows, header), reading)


def _csv_records(rows: Iterator[list[str]], header: Sequence[str]) -> Iterator[Record]:
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Refused(f"broken row: {error}")
            continue
        if len(fields) > len(header):
            yield Refused(f"broken row: {len(fields)} fields under {len(header)} columns (a separator not in quotes?)")
        elif fields:
            yield dict(zip(header, fields, strict=False))


def read_jsonl(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A JSON Lines file: an object a line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        records = (_json_record(line) for line in lines if line.strip())
        first = list(islice(records, _PEEK))
        names = dict.fromkeys(name for record in first if isinstance(record, Mapping) for name in record)
        if first and not names:
            raise DataError(f"{path}: none of its first {len(first)} lines is a JSON object")
        if first:
            columns = choose_columns(list(names), reading.show(path), reading)
            yield from _rows(path, columns, chain(first, records), reading)


def _json_record(line: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Refused(f"broken row: not JSON: {error}")
    return value if isinstance(value, dict) else Refused("broken row: not a JSON object")


def read_parquet(path: Path, reading: Reading) -> Iterator[Row | Rejection]:
    """A Parquet file: the picture a path, bytes, or Hugging Face's struct of bytes and path.

    Only the needed columns are read, one row group at a time. Bytes of pictures stay in memory, in ``Picture.data``:
    a data set larger than memory belongs into tars or files, which are read when needed.
    """
    with _parquet(path) as file:
        columns = choose_columns(file.schema_arrow.names, reading.show(path), reading)
        records = _parquet_records(file, columns.names(), path)
        classes = _class_names(file.schema_arrow, columns.label)
        yield from _rows(path, columns, _with_names(records, columns.label, classes) if classes else records, reading)


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names of a numbered class column, from the features that Hugging Face's datasets write beside the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _with_names(records: Iterator[Record], label: str | None, classes: Sequence[str]) -> Iterator[Record]:
    for record in records:
        number = None if isinstance(record, Refused) else record.get(label or "")
        if isinstance(record, Mapping) and isinstance(number, int):
            # HF writes -1 where the class is not known
            known = 0 <= number < len(classes)
            yield {**record, label or "": classes[number] if known else None}
        else:
            yield record


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except _PARQUET_FAULTS as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from error


def _parquet_records(file: pq.ParquetFile, names: list[str], path: Path) -> Iterator[Record]:
    try:
        for batch in file.iter_batches(batch_size=_BATCH, columns=names, use_threads=False):
            values = [_values(batch.column(name)) for name in names]
            for cells in zip(*values, strict=True):
                fault = next((cell for cell in cells if isinstance(cell, Refused)), None)
                yield fault or dict(zip(names, cells, strict=True))
    except _PARQUET_FAULTS as error:
        raise DataError(f"{path}: a damaged Parquet file: {error}") from error


def _values(column: Any) -> list[Any]:
    """A column's values; where a text of the batch is not UTF-8, that cell alone is a :class:`Refused`."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(cell) for cell in column]
    return values


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Refused("caption is not UTF-8")


def _rows(path: Path, columns: Columns, records: Iterator[Record], reading: Reading) -> Iterator[Row | Rejection]:
    """Rows out of a table's records; ``split`` leaves out the others without a word, being the user's own wish."""
    shown = reading.show(path)
    for number, record in enumerate(records):
        origin = f"{shown}[{number}]"
        if isinstance(record, Refused):
            yield Rejection(f"{path.stem}/{number}", record.reason, origin)
            continue
        if columns.split is not None:
            split = str(record.get(columns.split))
            reading.splits.add(split)
            if split != reading.spec.split:
                continue
        yield _row(record, columns, path, (shown, number), reading)


def _row(
    record: Mapping[str, Any], columns: Columns, path: Path, at: tuple[str, int], reading: Reading
) -> Row | Rejection:
    origin = f"{at[0]}[{at[1]}]"
    own = None if columns.key is None else record.get(columns.key)
    key = f"{path.stem}/{at[1]}" if own is None or own == "" else str(own)
    try:
        if columns.key is not None and not isinstance(own, str | int):
            raise Refused("no key" if own is None else f"key is not a text or a whole number: {type(own).__name__}")
        picture = None if columns.image is None else _picture(record.get(columns.image), origin, path, reading)
        captions = tuple(text for name in columns.captions for text in texts_of(record.get(name)))
        label = None if columns.label is None else label_of(record.get(columns.label))
    except Refused as refused:
        return Rejection(key, refused.reason, origin)
    if columns.key is not None:
        return (
            Rejection(key, "no key", origin)
            if own == ""
            else Row(key, None, "", picture, captions, origin, label=label)
        )
    if picture is None or picture.path is None:
        return Row(key, path, str(at[1]), picture, captions, origin, label=label)
    name = str(_path(record[columns.image or ""]))
    return Row(name, picture.path, "", picture, captions, origin, joins=True, label=label)


def _picture(cell: Any, origin: str, path: Path, reading: Reading) -> Picture | None:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes):
        return Picture(origin=origin, data=data)
    name = _path(cell)
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise Refused(f"picture is neither a path nor bytes: {type(name).__name__}")
    return picture_at(name, reading.root(path), reading)


def _path(cell: Any) -> Any:
    return cell.get("path") if isinstance(cell, Mapping) else cell
