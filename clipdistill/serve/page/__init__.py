"""The search page: one static file that needs nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Page:
    """The page, and the policy that lets a browser run it and nothing else.

    Attributes:
        html: The file's bytes.
        policy: Its Content-Security-Policy; script and style are allowed by their SHA-256.
    """

    html: bytes
    policy: str


def load_page() -> Page:
    """Read the page out of the package."""
    html = resources.files(__name__).joinpath("index.html").read_bytes()
    policy = (
        f"default-src 'none'; script-src {_hashes(html, b'script')}; style-src {_hashes(html, b'style')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _hashes(html: bytes, tag: bytes) -> str:
    parts = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)
