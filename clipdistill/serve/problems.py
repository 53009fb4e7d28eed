"""Refusals as the client sees them: ``application/problem+json`` of RFC 9457, and nothing of the server's inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

MEDIA_TYPE = "application/problem+json"
_LONGEST = 500
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110's names; http.HTTPStatus has older ones


class ProblemError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status, 400 to 599.
        detail: What is wrong with this request and what would be right, in a sentence.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.detail, self.headers = status, detail, dict(headers or {})
        super().__init__(f"{status}: {detail}")


class BusyError(ProblemError):
    """More waits than the service takes on.

    Args:
        retry_after_s: When it is worth asking again, in seconds; sent as ``Retry-After``.
    """

    def __init__(self, retry_after_s: int) -> None:
        detail = f"too many requests are waiting; ask again in {retry_after_s} s"
        super().__init__(503, detail, {"Retry-After": str(retry_after_s)})


class AsciiJson(JSONResponse):
    """JSON whose strings are escaped to ASCII: a key with half a surrogate pair in it cannot break the answer."""

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem_response(problem: ProblemError) -> AsciiJson:
    """The answer that a problem is sent as."""
    content = {
        "type": "about:blank",
        "title": _TITLES.get(problem.status) or HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail if len(problem.detail) <= _LONGEST else problem.detail[:_LONGEST] + "...",
    }
    return AsciiJson(content, problem.status, problem.headers, MEDIA_TYPE)


def of_validation(fault: ValidationError) -> ProblemError:
    """The first faults of a body that does not fit its schema, each with its place; the values are not repeated."""
    errors = fault.errors(include_url=False, include_context=False, include_input=False)
    texts = [f"{'.'.join(str(part)[:60] for part in error['loc']) or 'body'}: {error['msg']}" for error in errors[:3]]
    return ProblemError(422, "; ".join(texts))
