"""The stored embeddings of several teachers, read as those of one; each member stays bound by its own manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from clipdistill.cache.store import TeacherCache, Views
from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Rejection
from clipdistill.data.views import View
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.ensemble import Ensemble, Form, MemberFacts


@dataclass(frozen=True, slots=True)
class CachedMember:
    """One teacher of an ensemble by its stored embeddings.

    Attributes:
        label: What it is called in messages: ``teacher.members.0 (ViT-B-32:openai)``.
        cache: Its embeddings.
        weight: How much it counts, against the other members' weights.
        scale: The inverse temperature that its cosines get; None = its own exp(logit_scale).
    """

    label: str
    cache: TeacherCache
    weight: float = 1.0
    scale: float | None = None


@final
class EnsembleCache:
    """The embeddings of an ensemble: what :class:`TeacherCache` is for one teacher.

    A picture or a text has a row where every member has one.

    Args:
        folder: Where the members' caches lie, as far as they have no other place.
        members: The teachers' caches; each was checked against its own teacher and the data.
        form: How they are combined.
        whole: Whether only the whole pictures' rows are asked for, so that the members' further views may differ.

    Raises:
        ConfigError: If there are fewer than two members, a weight or scale is not above 0, or embeddings of different
            widths are to be averaged.
        MismatchError: If the members' views differ.
    """

    def __init__(
        self, folder: str | Path, members: Sequence[CachedMember], form: Form = "logits", *, whole: bool = False
    ) -> None:
        self.folder, self.members = Path(folder), tuple(members)
        self.ensemble = Ensemble(tuple(map(_facts, members)), form)
        self.dim, self.scale, self.bias = self.ensemble.dim, self.ensemble.scale, self.ensemble.bias
        self.drawn = Views() if whole else self.members[0].cache.drawn
        for member in () if whole else self.members[1:]:
            _check_views(self.members[0], member)

    @property
    def facts(self) -> dict[str, Any]:
        """What the members' manifests say, taken together; ``teacher.members`` names each with its weight and scale."""
        told = [member.cache.facts for member in self.members]
        names = [fact["teacher"]["name"] for fact in told]
        members = [{**part, "name": name} for part, name in zip(self.ensemble.to_json()["members"], names, strict=True)]
        counts = {
            what: min((fact[what] for fact in told if fact.get(what) is not None), default=None)
            for what in ("pictures", "texts")
        }
        prints = [fact["teacher"]["fingerprint"] for fact in told]
        teacher = {
            "name": " + ".join(names),
            "fingerprint": fingerprint.of_value([self.ensemble.form, members, prints]),
            "combine": self.ensemble.form,
            "members": members,
        }
        return {
            **counts,
            "teacher": teacher,
            "logit_scale": self.scale,
            "logit_bias": self.bias,
            "dim": self.dim,
            "views": self.drawn.to_json(),
        }

    @property
    def views(self) -> int:
        """How many views of each picture are stored."""
        return self.drawn.count

    @property
    def widest(self) -> int:
        """The width of the widest member: what a student takes where none is asked for."""
        return self.ensemble.widest

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the members' caches hold, of what made them, and of how they are combined."""
        shares = zip(self.ensemble.shares, self.ensemble.members, self.members, strict=True)
        parts = [[member.cache.fingerprint, share, facts.scale] for share, facts, member in shares]
        return fingerprint.of_value({"combine": self.ensemble.form, "members": parts})

    @property
    def rejected(self) -> list[Rejection]:
        """The pictures that any member could not embed, each once, with the first member's reason."""
        rows: dict[str, Rejection] = {}
        for member in self.members:
            for row in member.cache.rejected:
                rows.setdefault(row.key, row)
        return list(rows.values())

    def has_image(self, key: str) -> bool:
        """Whether every member has a row for the picture with this key."""
        return all(member.cache.has_image(key) for member in self.members)

    def has_text(self, text: str) -> bool:
        """Whether every member has a row for this text."""
        return all(member.cache.has_text(text) for member in self.members)

    def image_rows(self, keys: Sequence[str], views: Sequence[int] | None = None) -> Vectors:
        """The ensemble's embeddings of pictures.

        Args:
            keys: The pictures' keys.
            views: The number of the view for each; none = the whole pictures.

        Returns:
            float32 [keys, dim], unit rows.

        Raises:
            DataError: If a key has no row, naming it and the member; or the members' rows cancel out.
        """
        return self.ensemble.combine_arrays([member.cache.image_rows(keys, views) for member in self.members])

    def text_rows(self, texts: Sequence[str]) -> Vectors:
        """The ensemble's embeddings of texts: float32 [texts, dim], unit rows.

        Raises:
            DataError: If a text has no row, naming it and the member; or the members' rows cancel out.
        """
        return self.ensemble.combine_arrays([member.cache.text_rows(texts) for member in self.members])

    def view(self, key: str, number: int) -> View:
        """The crop and mirroring that a stored view of a picture was made with, the same for all members."""
        return self.drawn.of(key, number)

    def mark(self, key: str) -> str | None:
        """The content mark of the picture's bytes when its rows were made; None where no member knows it.

        Raises:
            MismatchError: If the members saw different pictures under this key.
        """
        known = [(member.label, mark) for member in self.members if (mark := member.cache.mark(key)) is not None]
        for label, mark in known[1:]:
            if mark != known[0][1]:
                remedy = f"The picture changed between the two. Build {label}'s cache again with --force."
                raise MismatchError(
                    f"{label}: picture {key}", f"content seen by {known[0][0]}", known[0][1], mark, remedy
                )
        return known[0][1] if known else None

    def agreement(self, keys: Sequence[str]) -> float:
        """How far the members' embeddings are of one space: near 0 for models trained apart, 1 for the same model.

        The least over pairs of members of the mean cosine between their centred embeddings of the same pictures.
        Centred, as a model's embeddings lie in a narrow cone, whose direction alone would make a cosine.

        Args:
            keys: Two pictures or more that every member has a row for.

        Raises:
            ValueError: If the members are not equally wide.
        """
        if len({facts.dim for facts in self.ensemble.members}) > 1:
            raise ValueError("only rows of one width have cosines")
        rows = [_centred(member.cache.image_rows(keys)) for member in self.members]
        return min(
            float(np.mean((rows[one] * rows[other]).sum(axis=1))) for other in range(len(rows)) for one in range(other)
        )


def _centred(rows: Vectors) -> Vectors:
    moved = rows - rows.mean(axis=0)
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    centred: Vectors = moved / np.maximum(lengths, np.finfo(np.float32).tiny)
    return centred


def _facts(member: CachedMember) -> MemberFacts:
    cache = member.cache
    scale = cache.scale if member.scale is None else member.scale
    return MemberFacts(member.label, cache.dim, scale, member.weight, cache.bias)


def _check_views(first: CachedMember, other: CachedMember) -> None:
    wanted, found = first.cache.drawn.to_json(), other.cache.drawn.to_json()
    for name, value in wanted.items():
        if found[name] != value and not (wanted["count"] == found["count"] == 1):
            remedy = "All members must have seen the same views: build this one again, or set cache.views = 1."
            raise MismatchError(f"{other.label}: {other.cache.folder}", f"views.{name}", value, found[name], remedy)
