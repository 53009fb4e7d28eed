"""The classes of a classification: which there are, how each is read, and the prompts that stand for it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import ConfigError, DataError, suggest
from clipdistill.data.readers import named
from clipdistill.data.sources import Source

_log = logging.getLogger("clipdistill")
UNKNOWN = -1
"""The number of a picture without a known class."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes, in the order of their labels; a class's number is its place here.

    Attributes:
        labels: As the data name them: folders, or a column's values.
        names: As they are read in a prompt.
        templates: The prompts of every class; ``{}`` stands for its name.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.labels)

    def prompts(self, name: str) -> tuple[str, ...]:
        """The prompts of the class that is read so."""
        return tuple(template.replace("{}", name) for template in self.templates)

    @property
    def every_prompt(self) -> tuple[str, ...]:
        """The prompts of all classes, class by class, in the templates' order."""
        return tuple(prompt for name in self.names for prompt in self.prompts(name))

    def numbers(self, labels: Sequence[str | None]) -> npt.NDArray[np.int64]:
        """The number of each label; :data:`UNKNOWN` where there is none."""
        known = {label: number for number, label in enumerate(self.labels)}
        found = [UNKNOWN if label is None else known.get(label, UNKNOWN) for label in labels]
        return np.asarray(found, np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"labels": list(self.labels), "names": list(self.names), "templates": list(self.templates)}


def classes_of(labels: Sequence[str], templates: Sequence[str], names: Mapping[str, str]) -> Classes:
    """The classes that the training data name.

    Args:
        labels: Every class of ``data.train``, in any order.
        templates: The prompts, each with ``{}`` where the name goes.
        names: Names to read by label; a label without one is read with its underscores as blanks.

    Raises:
        ConfigError: With every fault: fewer than two classes, a name for a class that does not exist, a class without
            a readable name.
    """
    ordered = tuple(sorted(set(labels)))
    faults = []
    if len(ordered) < 2:
        found = f"the one class {ordered[0]!r}" if ordered else "no class"
        faults.append(f"data.train: {found} is there, and a classification needs two or more: one folder or label each")
    faults += [
        f"task.names: no class {label!r} in data.train; {suggest(label, ordered)}"
        for label in names
        if label not in ordered
    ]
    readable = tuple(names.get(label, label.replace("_", " ")).strip() for label in ordered)
    faults += [
        f"task.names: the class {label!r} has no name that can be read; give it one"
        for label, name in zip(ordered, readable, strict=True)
        if not name
    ]
    if faults:
        raise ConfigError(faults)
    if shared := [name for name, count in Counter(readable).items() if count > 1]:
        _log.warning("several classes read alike, so no prompt tells them apart: %s (see task.names)", named(shared))
    return Classes(ordered, readable, tuple(templates))


def check_sets(classes: Classes, sets: Mapping[str, Source]) -> None:
    """Refuse sets that do not fit the classes.

    Args:
        classes: The classes.
        sets: The sets by name; every class needs a picture in ``train``, and every other set has only such classes.

    Raises:
        DataError: Naming the classes that have lost all their training pictures, or the set and the classes that
            ``train`` lacks.
    """
    if faults := list(_set_faults(classes, sets)):
        raise DataError("\n".join(faults))


def _set_faults(classes: Classes, sets: Mapping[str, Source]) -> Iterator[str]:
    trained, known = {pair.label for pair in sets["train"].pairs}, set(classes.labels)
    if lost := [label for label in classes.labels if label not in trained]:
        yield (
            f"data.train: {len(lost)} of {len(classes)} classes have no picture left to train on: {named(lost)}. "
            "Theirs were all refused (see rejected.jsonl) or held out: mend them, hold out less, or take it away"
        )
    for name, source in sets.items():
        strange = list(dict.fromkeys(pair.label or "" for pair in source.pairs if pair.label not in known))
        if strange and name != "train":
            where = "data.val" if name == "val" else f"data.test.{name}"
            yield (
                f"{where}: {len(strange)} of its classes are not in data.train: {named(strange)}; "
                f"{strange[0]!r}: {suggest(strange[0], classes.labels)}"
            )


def prompted(classes: Classes, source: Source) -> Source:
    """The same rows, each with the prompts of its class for captions."""
    prompts = {
        label: classes.prompts(name) for label, name in zip(classes.labels, classes.names, strict=True)
    }  # one tuple a class, shared by all its rows
    pairs = tuple(replace(pair, captions=prompts.get(pair.label or "", ())) for pair in source.pairs)
    return replace(source, pairs=pairs)
