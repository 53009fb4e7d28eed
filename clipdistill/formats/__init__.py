"""Writing the student in the layouts that other libraries and services read, each proved by its own reader.

The names below are loaded when they are first used, so that a part without torch stays without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.formats.card import CardFacts as CardFacts
    from clipdistill.formats.folder import ExportReport as ExportReport
    from clipdistill.formats.folder import export as export
    from clipdistill.formats.folder import verify as verify
    from clipdistill.formats.probe import Probe as Probe
    from clipdistill.formats.web import Gallery as Gallery

_HOMES = {
    "CardFacts": "clipdistill.formats.card",
    "ExportReport": "clipdistill.formats.folder",
    "Gallery": "clipdistill.formats.web",
    "Probe": "clipdistill.formats.probe",
    "export": "clipdistill.formats.folder",
    "verify": "clipdistill.formats.folder",
}

__all__ = ["CardFacts", "ExportReport", "Gallery", "Probe", "export", "verify"]


def __getattr__(name: str) -> Any:
    """Load one of the names from its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'clipdistill.formats' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
