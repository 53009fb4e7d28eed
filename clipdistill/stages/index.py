"""The index stage, and the search over it."""

from __future__ import annotations

import logging
from pathlib import Path

from clipdistill.config import known_sets
from clipdistill.core import fingerprint
from clipdistill.core.errors import DataError
from clipdistill.data.readers import PICTURE_SUFFIXES
from clipdistill.data.records import Pair, Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Hit, Searcher
from clipdistill.stages.inputs import RunData
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.student import DualEncoder

_log = logging.getLogger("clipdistill")


def build_index(workspace: Workspace, data: RunData, student: DualEncoder, *, force: bool = False) -> VectorIndex:
    """Embed the pictures of the configured sets with the student and build their FAISS index.

    Args:
        workspace: The run.
        data: Its rows.
        student: The finished student.
        force: Build it again.
    """
    config = workspace.config
    pairs = indexed_pairs(workspace, data)
    made_from = {
        "student": student.fingerprint,
        "factory": config.index.factory,
        "keys": fingerprint.of_lines(pair.key for pair in pairs),
    }
    if workspace.is_done("index", made_from, workspace.index, force=force):
        return VectorIndex.load(workspace.index, encoder=student.fingerprint)
    pictures = [pair.picture for pair in pairs if pair.picture is not None]
    if not pictures:
        raise DataError(f"index.sets: {', '.join(config.index.sets) or 'all sets'} hold no pictures to index")
    vectors = student.encode_images(pictures)
    index = VectorIndex.build(
        vectors, [pair.key for pair in pairs], factory=config.index.factory, encoder=student.fingerprint
    )
    index.save(workspace.index)
    workspace.mark_done("index", made_from)
    _log.info("index: %d pictures, %s, in %s", len(pairs), index.factory, workspace.index)
    return index


def indexed_pairs(workspace: Workspace, data: RunData) -> list[Pair]:
    """The rows whose pictures are indexed: of ``index.sets``, or of all sets and the unpaired pictures."""
    wanted = workspace.config.index.sets
    names = wanted or known_sets(workspace.config)
    pairs = [pair for name in names if name in data.sets for pair in data.sets[name].pairs]
    return [pair for pair in (pairs if wanted else [*pairs, *data.images]) if pair.picture is not None]


def search(workspace: Workspace, query: str, k: int) -> list[Hit]:
    """The pictures nearest to a text, or to a picture where the query is a file.

    Args:
        workspace: A run with a student and an index.
        query: A text, or the path of a picture.
        k: How many hits.

    Raises:
        DataError: If the run has no student or no index yet, or the query names a picture that is not there.
        MismatchError: If the index was made by another student.
    """
    for verb, folder in (("train", workspace.student), ("index", workspace.index)):
        if not folder.exists():
            raise DataError(f"{folder}: not there yet. Make it with: clipdistill {verb} RUN.toml")
    student = DualEncoder.load(workspace.student)
    searcher = Searcher(student, VectorIndex.load(workspace.index, encoder=student.fingerprint))
    path = Path(query)
    if path.suffix and _is_file(path):
        return searcher.by_picture(Picture(origin=query, path=path), k)
    if path.suffix.lower() in PICTURE_SUFFIXES:
        raise DataError(f"{query}: no such picture. Check the path; to search for words, leave {path.suffix} out")
    return searcher.by_text(query, k)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a sentence may be longer than a file's name can be
        return False
