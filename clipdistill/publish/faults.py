"""What is said when a database refuses: the place without its password, and the next step."""

from __future__ import annotations

import errno

from clipdistill.core.errors import MismatchError

AGAIN = "Start the same command again when it is there: it goes on by key"


def lost(place: str, reason: object, remedy: str = AGAIN) -> ConnectionError:
    """The error of a database that cannot be reached, or went away.

    Args:
        place: The database, without a password.
        reason: What its client said, without a password.
        remedy: What the user can do next.
    """
    return ConnectionError(errno.ENOTCONN, f"{one_line(reason)}. {remedy}", place)


def one_line(reason: object) -> str:
    """A client's message on one line, without its last full stop."""
    return " ".join(str(reason).split()).rstrip(".") or type(reason).__name__


def check_made(what: str, expected: dict[str, object], found: dict[str, object]) -> None:
    """Compare what a table says of itself with what is to be published.

    Args:
        what: The table, as the user knows it.
        expected: By field: what is to be published.
        found: By field: what the table has; a field that it lacks counts as none.

    Raises:
        MismatchError: Naming the first field that differs, both values and the next step.
    """
    for field, value in expected.items():
        if found.get(field) != value:
            remedy = "Publish into another --table, or drop this one first if nothing needs it any more"
            raise MismatchError(what, field, value, found.get(field, "none"), remedy)
