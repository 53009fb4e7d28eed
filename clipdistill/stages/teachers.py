"""The teachers and their stored embeddings: one, or the members of an ensemble, each checked by its own proof."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from clipdistill.cache import AnyCache, CachedMember, EnsembleCache, TeacherCache, Views, adopt, fill
from clipdistill.config import MemberConfig, RunConfig, TeacherConfig
from clipdistill.core import manifest
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.ensemble import Ensemble, EnsembleTeacher, MemberFacts
from clipdistill.towers.inherit import teacher_token_table
from clipdistill.towers.teacher import Teacher, load_teacher

WholeTeacher = Teacher | EnsembleTeacher
_log = logging.getLogger("clipdistill")
_AGREEMENT_ROWS = 256
_SAME_SCALE = 1e-3
_LEAST_AGREEMENT = 0.2  # of models trained apart it is about 0


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One teacher of the run, and what its embeddings are made with.

    Attributes:
        section: Where the configuration names it.
        config: What the configuration says of it.
        teacher: The live teacher; None where its embeddings alone are given.
        folder: Where its embeddings are stored.
        batch: Pictures a forward pass.
    """

    section: str
    config: TeacherConfig | MemberConfig
    teacher: Teacher | None
    folder: Path
    batch: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.section} ({self.config.name})" if isinstance(self.config, MemberConfig) else self.section

    @property
    def stored(self) -> bool:
        """Whether its embeddings are there, whoever made them."""
        return self.teacher is None or (self.folder / manifest.NAME).exists()


def open_teachers(config: RunConfig) -> tuple[Teacher | None, ...]:
    """Load the teacher, or each member of the ensemble; None stands for one whose embeddings alone are given."""
    return tuple(_load(config, section, member) for section, member in _sections(config))


def drawn_views(config: RunConfig) -> Views:
    """How the views of the training pictures are drawn."""
    return Views(config.cache.views, config.cache.view_seed, config.cache.view_scale)


def first_teacher(teachers: Sequence[Teacher | None]) -> Teacher | None:
    """The teacher that a student begins from: the first with a token table, else the first that is live, or None."""
    live = [teacher for teacher in teachers if teacher is not None]
    if len(live) < 2:
        return live[0] if live else None
    return next((teacher for teacher in live if teacher_token_table(teacher.model) is not None), live[0])


def whole_teacher(config: RunConfig, teachers: Sequence[Teacher | None]) -> WholeTeacher | None:
    """All teachers as one that embeds live; None where only embeddings are given of any."""
    live = [teacher for teacher in teachers if teacher is not None]
    if len(live) < len(teachers):
        return None
    if not config.teacher.members:
        return live[0]
    facts = [
        MemberFacts(
            f"{section} ({member.name})", teacher.dim, member.scale or teacher.scale, member.weight, teacher.bias
        )
        for teacher, (section, member) in zip(live, _sections(config), strict=True)
        if isinstance(member, MemberConfig)
    ]
    return EnsembleTeacher(live, Ensemble(tuple(facts), config.teacher.combine))


def teacher_parts(workspace: Workspace, teachers: Sequence[Teacher | None]) -> list[TeacherPart]:
    """The teachers with what belongs to each."""
    whole = workspace.config.teacher
    return [
        TeacherPart(section, member, teacher, workspace.cache_of(member), member.batch or whole.batch)
        for (section, member), teacher in zip(_sections(workspace.config), teachers, strict=True)
    ]


def open_rows(
    workspace: Workspace,
    pairs: Sequence[Pair],
    texts: Sequence[str],
    teachers: Sequence[Teacher | None],
    *,
    force: bool = False,
) -> AnyCache:
    """The teacher's embeddings of all rows: adopted, reused after a check and a live probe, or filled.

    Args:
        workspace: The run.
        pairs: All rows with pictures.
        texts: Unpaired texts.
        teachers: What :func:`open_teachers` loaded.
        force: Build them again.

    Raises:
        MismatchError: If stored embeddings do not match, naming the member where there are several.
        ConfigError: If members of different widths are to be averaged.
    """
    parts = teacher_parts(workspace, teachers)
    return _gathered(workspace, parts, pairs, texts, lambda part: _filled(workspace, part, pairs, texts, force))


def stored_rows(
    workspace: Workspace, pairs: Sequence[Pair], texts: Sequence[str], teachers: Sequence[Teacher | None]
) -> AnyCache | None:
    """The teacher's embeddings of all rows as far as they are there already; None where any were never stored.

    Args:
        workspace: The run.
        pairs: All rows with pictures.
        texts: Unpaired texts.
        teachers: What :func:`open_teachers` loaded.

    Raises:
        DataError: If they cannot be read.
        MismatchError: If they are of another teacher or lack rows of the data.
    """
    parts = teacher_parts(workspace, teachers)
    if not all(part.stored for part in parts):
        return None
    return _gathered(workspace, parts, pairs, texts, lambda part: _stored(part, pairs, texts))


def _gathered(
    workspace: Workspace,
    parts: Sequence[TeacherPart],
    pairs: Sequence[Pair],
    texts: Sequence[str],
    open_live: Callable[[TeacherPart], TeacherCache],
) -> AnyCache:
    """One teacher's embeddings, or all members' as one; ``open_live`` finds or makes those of a live teacher."""
    if not workspace.config.teacher.members:
        if parts[0].teacher is not None:
            return open_live(parts[0])
        alone = _adopted(parts[0], pairs)
        _check_views(workspace.config, alone)
        alone.check_data(pairs, texts)
        return alone
    _refuse_shared_folders(parts)
    caches: dict[str, TeacherCache] = {}
    for part in parts:
        if part.teacher is None:
            with _naming(part.label):
                caches[part.section] = _adopted(part, pairs)
                _check_views(workspace.config, caches[part.section])
    _refuse_widths(workspace.config, parts, caches)
    for part in parts:
        if part.teacher is not None:
            _log.info("%s:", part.label)
            with _naming(part.label):
                caches[part.section] = open_live(part)
    # An embeddings folder need not have the pictures that no teacher can decode.
    refused = {row.key for cache in caches.values() for row in cache.rejected}
    kept = [pair for pair in pairs if pair.key not in refused]
    for part in parts:
        if part.teacher is None:
            with _naming(part.label):
                caches[part.section].check_data(kept, texts)
    members = [
        CachedMember(part.label, caches[part.section], part.config.weight, part.config.scale)
        for part in parts
        if isinstance(part.config, MemberConfig)
    ]
    config = workspace.config
    cache = EnsembleCache(workspace.cache, members, config.teacher.combine, whole=config.train.mode != "cached")
    _warn_of_spaces(cache, kept)
    return cache


def _sections(config: RunConfig) -> list[tuple[str, TeacherConfig | MemberConfig]]:
    members = config.teacher.members
    if not members:
        return [("teacher", config.teacher)]
    return [(f"teacher.members.{number}", member) for number, member in enumerate(members)]


def _load(config: RunConfig, section: str, member: TeacherConfig | MemberConfig) -> Teacher | None:
    if member.model is None:
        return None
    return load_teacher(
        member.model,
        member.pretrained,
        precision=member.precision or config.teacher.precision,
        device=member.device or config.teacher.device,
        max_pixels=config.data.max_pixels,
        section=section,
    )


def _refuse_shared_folders(parts: Sequence[TeacherPart]) -> None:
    """Refuse members whose caches would lie in or below one folder, however it is written.

    Raises:
        ConfigError: Naming both members.
    """
    live = [(part, part.folder.resolve()) for part in parts if part.teacher is not None]
    for (one, mine), (other, theirs) in combinations(live, 2):
        if mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
            raise ConfigError(
                f"{other.section}.cache: {other.label} would store its embeddings in {theirs}, and {one.label} in "
                f"{mine}; give each a cache folder of its own"
            )


def _check_views(config: RunConfig, cache: TeacherCache) -> None:
    """Refuse embeddings that are not of the views that the configuration asks for."""
    wanted, found = drawn_views(config), cache.drawn
    if config.train.mode == "cached" and found.count == 1 < wanted.count:
        remedy = "These embeddings are of whole pictures only: set cache.views = 1."
        raise MismatchError(str(cache.folder), "cache.views", wanted.count, found.count, remedy)
    if config.train.mode == "cached":
        cache.check_views(wanted)


def _refuse_widths(config: RunConfig, parts: Sequence[TeacherPart], adopted: Mapping[str, TeacherCache]) -> None:
    """Refuse members that cannot be averaged before any of them embeds anything."""
    known = [(part.label, part.teacher or adopted[part.section]) for part in parts]
    Ensemble(tuple(MemberFacts(label, teacher.dim, teacher.scale) for label, teacher in known), config.teacher.combine)


def _filled(
    workspace: Workspace, part: TeacherPart, pairs: Sequence[Pair], texts: Sequence[str], force: bool
) -> TeacherCache:
    config, teacher, folder = workspace.config.cache, part.teacher, part.folder
    needs_views = workspace.config.train.mode == "cached"  # else only the whole pictures' rows are used
    if teacher is None:
        raise ValueError(f"{part.label}: embeddings alone cannot fill a cache")
    if force and folder.exists() and any(folder.iterdir()):
        _clear(folder)
    if not part.stored:
        return fill(
            folder,
            teacher,
            pairs,
            texts,
            views=drawn_views(workspace.config) if needs_views else Views(),
            shard_rows=config.shard_rows,
            batch=part.batch,
            dtype=config.dtype,
        )
    cache = _stored(part, pairs, texts)
    if needs_views:
        cache.check_views(drawn_views(workspace.config))
    cache.check_dtype(config.dtype)
    least = cache.probe(teacher, pairs, rows=config.probe_rows, cosine=config.probe_cosine)
    _log.info("teacher cache: %s, kept; least cosine with the live teacher %.6f", folder, least)
    return cache


def _stored(part: TeacherPart, pairs: Sequence[Pair], texts: Sequence[str]) -> TeacherCache:
    cache = TeacherCache.open(part.folder)
    if part.teacher is not None:
        cache.check_teacher(part.teacher)
    cache.check_data(pairs, texts)
    return cache


def _adopted(part: TeacherPart, pairs: Sequence[Pair]) -> TeacherCache:
    """Embeddings that are there already: in a cache of ours, which knows its teacher, or in clip-retrieval's layout."""
    given, folder = part.config, Path(part.config.embeddings or "")
    if not (folder / manifest.NAME).exists():
        return adopt(folder, pairs, logit_scale=given.logit_scale or 0.0, logit_bias=given.logit_bias)
    cache = TeacherCache.open(folder)
    for field, mine, found in (
        ("logit_scale", given.logit_scale, cache.scale),
        ("logit_bias", given.logit_bias, cache.bias),
    ):
        if mine is not None and (found is None or not math.isclose(mine, found, rel_tol=_SAME_SCALE)):
            raise MismatchError(str(folder), f"{part.section}.{field}", mine, found, f"Leave {field} out: it is known.")
    return cache


def _clear(folder: Path) -> None:
    """Remove a cache, finished or not; a folder that is not one is left alone.

    Raises:
        MismatchError: If the folder holds something else.
    """
    if not (folder / "plan.json").exists():
        TeacherCache.open(folder, verify=False)
    shutil.rmtree(folder)


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Let an error say which member it is about."""
    try:
        yield
    except MismatchError as fault:
        what = f"{label}: {fault.what}"
        raise MismatchError(what, fault.field, fault.expected, fault.found, fault.remedy) from fault
    except DataError as fault:
        raise DataError(f"{label}: {fault}") from fault


def _warn_of_spaces(cache: EnsembleCache, pairs: Sequence[Pair]) -> None:
    """Say when averaged embeddings seem not to be of one space: equal widths alone are no proof that they are."""
    keys = [pair.key for pair in pairs if cache.has_image(pair.key)][:_AGREEMENT_ROWS]
    if cache.ensemble.form != "embeddings" or len(keys) < 2:
        return
    agreement = cache.agreement(keys)
    if agreement < _LEAST_AGREEMENT:
        _log.warning(
            "teacher.combine: the members' embeddings of the same pictures, centred, have a mean cosine of %.2f, so "
            'they seem to be of different spaces, and their mean says little; set teacher.combine = "logits"',
            agreement,
        )
