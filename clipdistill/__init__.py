"""clipdistill: distil large CLIP-style models into small dual encoders, and prove it with retrieval recall.

The names below are loaded when they are first used; importing the package alone has no side effect and imports no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.cache import TeacherCache as TeacherCache
    from clipdistill.config import RunConfig as RunConfig
    from clipdistill.evaluation import RetrievalReport as RetrievalReport
    from clipdistill.evaluation import evaluate as evaluate
    from clipdistill.retrieval.index import VectorIndex as VectorIndex
    from clipdistill.search import Searcher as Searcher
    from clipdistill.towers.classifier import Classifier as Classifier
    from clipdistill.towers.student import DualEncoder as DualEncoder
    from clipdistill.training.loop import distill as distill

__version__ = "0.1.0"

_HOMES = {
    "Classifier": "clipdistill.towers.classifier",
    "DualEncoder": "clipdistill.towers.student",
    "RetrievalReport": "clipdistill.evaluation",
    "RunConfig": "clipdistill.config",
    "Searcher": "clipdistill.search",
    "TeacherCache": "clipdistill.cache",
    "VectorIndex": "clipdistill.retrieval.index",
    "distill": "clipdistill.training.loop",
    "evaluate": "clipdistill.evaluation",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    """Load one of the public names from its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'clipdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted([*globals(), *_HOMES])
