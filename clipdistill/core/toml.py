"""Strict configuration files: TOML in and out, and each fault of a model as a sentence with its dotted path."""

from __future__ import annotations

import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from clipdistill.core.errors import ConfigError, suggest


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: If it is missing or not TOML, naming it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Write one after the example in the README.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as fault:
        raise ConfigError(f"{path}: not readable as TOML: {fault}") from fault


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """Set single keys of a raw configuration in place.

    Args:
        raw: The nested dictionary to change.
        overrides: ``section.key=value`` each, the value in TOML's own form; a plain word is a string. A list's items
            go by their numbers, counted from 0: ``section.list.0.key=value``.

    Yields:
        A fault for each override that cannot be applied.
    """
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            yield f"{override}: not of the form section.key=value"
            continue
        section: Any = raw
        for key in keys[:-1]:
            section = _within(section, key)
        if isinstance(section, dict):
            section[keys[-1]] = _value(text.strip())
        else:
            yield f"{dotted}: {'.'.join(keys[:-1])} is not a section"


def _within(section: Any, key: str) -> Any:
    """The part of a section with this key, made where it is missing; of a list, the item with this number."""
    if isinstance(section, list) and key.isdecimal() and int(key) < len(section):
        return section[int(key)]
    return section.setdefault(key, {}) if isinstance(section, dict) else None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def validate(model: type[BaseModel], raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Make a strict model from raw values.

    Returns:
        The model, or None where there is a fault; and the faults, one sentence each.
    """
    try:
        # By way of JSON: strict mode reads tuples from JSON lists, which it refuses from Python's.
        return model.model_validate_json(json.dumps(raw, default=str)), []
    except ValidationError as error:
        return None, [fault for item in error.errors() for fault in _faults(model, item)]


def _faults(model: type[BaseModel], item: Any) -> Iterator[str]:
    location = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        yield f"{path}: unknown key; {suggest(location[-1], _keys(model, location[:-1]))}"
    elif item["type"] == "missing":
        yield f"{path}: missing"
    elif item["type"] == "value_error":
        for line in str(item["ctx"]["error"]).splitlines():
            yield line if re.match(r"[a-z_]+\.", line) or not path else f"{path}: {line}"
    elif item["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        yield f"{path}: {item['input']!r} is not one of {', '.join(names)}; {suggest(str(item['input']), names)}"
    else:
        message = item["msg"][0].lower() + item["msg"][1:]
        yield f"{path}: {message}, got {item['input']!r}"


def _keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The valid keys of the section at a dotted place."""
    section = model
    for name in location:
        field = section.model_fields.get(name)
        if field is None:
            continue
        for kind in _models(field.annotation):
            section = kind
    return list(section.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def write(values: Mapping[str, Any], prefix: str = "") -> str:
    """Plain nested values as TOML text, in the order given; ``prefix`` is the dotted place of a sub-table."""
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    tables = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    lines = [f"{_key(key)} = {_literal(value)}" for key, value in plain.items()]
    text = "\n".join(lines) + ("\n" if lines else "")
    for key, value in tables.items():
        dotted = f"{prefix}{_key(key)}"
        text += f"\n[{dotted}]\n" + write(value, dotted + ".")
    return text


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _key(name: str) -> str:
    """A key as TOML writes it: bare where it may be, so that ``train.lr`` is one key and not a table's."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
