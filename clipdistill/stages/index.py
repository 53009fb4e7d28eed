"""The index stage, and the search over it."""

from __future__ import annotations

import logging
from pathlib import Path

from clipdistill.cache import AnyCache
from clipdistill.config import known_sets
from clipdistill.core import fingerprint
from clipdistill.core.errors import DataError
from clipdistill.data.readers import PICTURE_SUFFIXES
from clipdistill.data.records import Pair, Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Hit, QuerySide, Searcher
from clipdistill.stages.inputs import RunData
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.student import DualEncoder

_log = logging.getLogger("clipdistill")


def build_index(
    workspace: Workspace, data: RunData, cache: AnyCache, student: DualEncoder, *, force: bool = False
) -> VectorIndex:
    """Build the FAISS index over the pictures of the configured sets.

    The student embeds them; where it is a text tower alone, the teacher's cached rows are indexed as they are, under
    the teacher's fingerprint, so that the index outlives the student.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The teacher's embeddings of them.
        student: The finished student.
        force: Build it again.
    """
    config = workspace.config
    pairs = indexed_pairs(workspace, data)
    keys = [pair.key for pair in pairs]
    encoder = student.fingerprint if student.searches is None else student.searches.fingerprint
    made_from = {
        "student": encoder,
        **({} if student.searches is None else {"teacher cache": cache.fingerprint}),
        "factory": config.index.factory,
        "keys": fingerprint.of_lines(keys),
    }
    if workspace.is_done("index", made_from, workspace.index, force=force):
        return VectorIndex.load(workspace.index, encoder=encoder)
    pictures = [pair.picture for pair in pairs if pair.picture is not None]
    if not pictures:
        raise DataError(f"index.sets: {', '.join(config.index.sets) or 'all sets'} hold no pictures to index")
    vectors = student.encode_images(pictures) if student.searches is None else cache.image_rows(keys)
    index = VectorIndex.build(vectors, keys, factory=config.index.factory, encoder=encoder)
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
        DataError: If the run has no student or no index yet, or the query names a picture that is not there, or one
            that only a teacher could embed of which no more than the embeddings are given.
        MismatchError: If the index was made by another student, or by another teacher than the one that it searches.
    """
    for verb, folder in (("train", workspace.student), ("index", workspace.index)):
        if not folder.exists():
            raise DataError(f"{folder}: not there yet. Make it with: clipdistill {verb} RUN.toml")
    picture = _picture(query)
    encoder = _encoder(workspace, picture)
    searcher = Searcher(encoder, VectorIndex.load(workspace.index, encoder=encoder.fingerprint))
    return searcher.by_text(query, k) if picture is None else searcher.by_picture(picture, k)


def _encoder(workspace: Workspace, picture: Picture | None) -> Encoder:
    """What embeds the query: the student, or for a picture that it has no tower for the teacher."""
    student = DualEncoder.load(workspace.student)
    if student.searches is None:
        return student
    return QuerySide(student, None if picture is None else open_teachers(workspace.config)[0])


def _picture(query: str) -> Picture | None:
    """The picture that a query names; None where it is a text."""
    path = Path(query)
    if path.suffix and _is_file(path):
        return Picture(origin=query, path=path)
    if path.suffix.lower() in PICTURE_SUFFIXES:
        raise DataError(f"{query}: no such picture. Check the path; to search for words, leave {path.suffix} out")
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a sentence may be longer than a file's name can be
        return False
