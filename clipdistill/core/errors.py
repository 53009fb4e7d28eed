"""The package's errors: each is also a built-in, and carries the exit code that the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_MISSING_EXTRA = 3
EXIT_MISMATCH = 4


class ConfigError(ValueError):
    """A fault of the configuration: an unknown key, a wrong type, an unknown model or a missing file.

    Args:
        faults: One sentence a fault, each beginning with the dotted path of the key that is wrong.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(ValueError):
    """The user's data cannot be used as they are: unreadable files, or more rejected rows than allowed."""

    exit_code = EXIT_BAD_INPUT


class MismatchError(ValueError):
    """An artefact does not match what it is used with.

    Args:
        what: The artefact, named as the user knows it (a path, mostly).
        field: The field of its manifest that differs.
        expected: The value that is needed.
        found: The value that the artefact has.
        remedy: What the user can do next.
    """

    exit_code = EXIT_MISMATCH

    def __init__(self, what: str, field: str, expected: object, found: object, remedy: str) -> None:
        self.what, self.field, self.expected, self.found, self.remedy = what, field, expected, found, remedy
        super().__init__(f"{what}: {field} does not match: expected {expected}, found {found}. {remedy}")


class ParityError(RuntimeError):
    """Two things that must compute the same do not: the message carries the measured difference and the bound."""

    exit_code = EXIT_MISMATCH


class MissingExtraError(ImportError):
    """An optional dependency is not installed, or too old; the message carries the exact pip line, or what else to do.

    Args:
        package: Its name, as pip knows it.
        extra: The extra that brings it.
        found: The version that is installed; None: it is not.
        least: The oldest version that will do, where one is installed.
        remedy: How to get what pip does not install, in a sentence.
    """

    exit_code = EXIT_MISSING_EXTRA

    def __init__(
        self,
        package: str,
        extra: str,
        *,
        found: str | None = None,
        least: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.package, self.extra = package, extra
        what, how = "is not installed", "install"
        if found is not None:
            what, how = f"{found} is installed, and {least} or newer is needed", "install --upgrade"
        remedy = remedy or f"Install it with: pip {how} 'clipdistill[{extra}]'"
        super().__init__(f"{package} {what}. {remedy}")


def suggest(name: str, valid: Iterable[str]) -> str:
    """The nearest valid name as a phrase to end a message with, or the valid names where none is near.

    Args:
        name: What the user wrote.
        valid: The names that would have been accepted.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"valid: {shown}"
