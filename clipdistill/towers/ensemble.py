"""Several teachers as one: how their embeddings become one row, and what its inner products then mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.teacher import Teacher

Form = Literal["logits", "probabilities", "embeddings"]
_LEAST_NORM = 1e-3  # of a mean of unit rows: below it, float16's rounding decides the direction


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """What an ensemble knows of one of its teachers.

    Attributes:
        name: What it is called, in messages and in the report.
        dim: The width of its embeddings.
        scale: t, the inverse temperature that its cosines get.
        weight: w, how much it counts against the other members' weights.
        bias: Its SigLIP bias, or None.

    Raises:
        ConfigError: If scale or weight is not a finite number above 0, or the bias not finite.
    """

    name: str
    dim: int
    scale: float
    weight: float = 1.0
    bias: float | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{self.name}: {field} must be a finite number above 0; got {value}"
            for field, value in (("scale", self.scale), ("weight", self.weight))
            if not (math.isfinite(value) and value > 0)
        ]
        if self.bias is not None and not math.isfinite(self.bias):
            faults.append(f"{self.name}: logit bias must be finite; got {self.bias}")
        if faults:
            raise ConfigError(faults)


@final
@dataclass(frozen=True, slots=True)
class Ensemble:
    """The arithmetic of an ensemble: one unit row from the members' unit rows p_m.

    With weights w_m of sum 1, scales t_m and ``T = sum_m w_m t_m``, the row is

    * ``logits`` and ``probabilities``: ``r = concat_m sqrt(w_m t_m / T) p_m``. Then ``|r| = 1`` and
      ``T r.r' = sum_m w_m t_m p_m.p'_m``: one teacher of scale T whose logits are the weighted mean of the members'.
      The feature loss on such rows is a mean too: where the student's row has the same shares in the same columns,
      ``1 - u.r = sum_m (w_m t_m / T) (1 - u_m.p_m)``, u_m its part of member m made unit. With ``probabilities`` the
      losses average the members' softmaxes (as MobileCLIP does; Vasu et al. 2024, arXiv 2311.17049), which a mean of
      logits is not; the rows, the feature loss and the ranking are the same.
    * ``embeddings``: ``r = sum_m w_m p_m``, made unit, with T as its scale. It means something only for models of one
      space, such as several fine-tunings of one model; two that were trained apart are near orthogonal.

    The bias is ``sum_m w_m b_m`` where every member has one. Where some have none, the ensemble has none: the softmax
    does not know it, and a model trained by softmax says nothing of the sigmoid that it belongs to.

    Attributes:
        members: The teachers, in the order of their columns.
        form: How they are combined.

    Raises:
        ConfigError: If there are fewer than two members, or embeddings of different widths are to be averaged.
    """

    members: tuple[MemberFacts, ...]
    form: Form = "logits"

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"teacher.members: an ensemble needs two teachers or more; got {len(self.members)}")
        first = self.members[0]
        for other in self.members[1:]:
            if self.form == "embeddings" and other.dim != first.dim:
                raise ConfigError(
                    f'teacher.combine: "embeddings" averages the members\' rows, which must be equally wide: '
                    f"{first.name} has {first.dim}, {other.name} has {other.dim}; "
                    'set teacher.combine = "logits" or "probabilities", which take any widths'
                )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, made to sum 1."""
        largest = max(member.weight for member in self.members)  # or the sum of the largest numbers would overflow
        whole = math.fsum(member.weight / largest for member in self.members)
        return tuple(member.weight / largest / whole for member in self.members)

    @property
    def scale(self) -> float:
        """T, the inverse temperature of the combined rows."""
        return math.fsum(share * member.scale for share, member in zip(self.shares, self.members, strict=True))

    @property
    def bias(self) -> float | None:
        """The SigLIP bias of the combined logits; None unless every member has one."""
        known = [(share, member.bias) for share, member in zip(self.shares, self.members, strict=True)]
        if any(bias is None for _, bias in known):
            return None
        return math.fsum(share * bias for share, bias in known if bias is not None)

    @property
    def dim(self) -> int:
        """The width of the combined rows."""
        return self.widest if self.form == "embeddings" else sum(member.dim for member in self.members)

    @property
    def widest(self) -> int:
        """The width of the widest member: what a student takes where none is asked for."""
        return max(member.dim for member in self.members)

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where each member lies in the combined rows; all of them everywhere with ``embeddings``."""
        if self.form == "embeddings":
            return (slice(0, self.dim),) * len(self.members)
        ends = list(accumulate(member.dim for member in self.members))
        return tuple(slice(end - member.dim, end) for end, member in zip(ends, self.members, strict=True))

    def combine(self, rows: Sequence[Tensor]) -> Tensor:
        """The combined rows.

        Args:
            rows: Unit rows [n, dim of the member] of each member, of the same pictures or texts.

        Returns:
            Unit rows [n, dim], on the device and in the precision of the members'.

        Raises:
            DataError: If the members' embeddings of a row cancel out where they are averaged.
        """
        if self.form != "embeddings":
            whole = self.scale
            factors = [
                math.sqrt(share * member.scale / whole) for share, member in zip(self.shares, self.members, strict=True)
            ]
            return torch.cat([factor * part for factor, part in zip(factors, rows, strict=True)], dim=1)
        mean = torch.stack([share * part for share, part in zip(self.shares, rows, strict=True)]).sum(dim=0)
        norms = mean.norm(dim=1)
        if len(norms) and float(norms.min()) < _LEAST_NORM:
            raise DataError(
                f"teacher.combine: the members' embeddings of row {int(norms.argmin())} cancel out (their mean is "
                f'{float(norms.min()):.1e} long), so it has no direction; set teacher.combine = "logits"'
            )
        return F.normalize(mean, dim=1)

    def combine_arrays(self, rows: Sequence[Vectors]) -> Vectors:
        """:meth:`combine` for numpy's arrays: float32 [n, dim]."""
        combined: Vectors = self.combine([torch.from_numpy(part) for part in rows]).numpy()
        return combined

    def to_json(self) -> dict[str, Any]:
        """Plain values that decide the combination, for fingerprints and reports."""
        members = [
            {"name": member.name, "weight": share, "scale": member.scale, "dim": member.dim}
            for share, member in zip(self.shares, self.members, strict=True)
        ]
        return {"combine": self.form, "members": members}


@final
class EnsembleTeacher:
    """Several live teachers that embed as one, each with its own preprocessing and tokenizer.

    Args:
        teachers: The live teachers.
        ensemble: How they are combined; one member a teacher, in the same order.
    """

    def __init__(self, teachers: Sequence[Teacher], ensemble: Ensemble) -> None:
        if len(teachers) != len(ensemble.members):
            raise ValueError(f"{len(teachers)} teachers for {len(ensemble.members)} members: one each is needed")
        self.teachers, self.ensemble = tuple(teachers), ensemble
        self.name = " + ".join(teacher.name for teacher in teachers)
        self.dim, self.scale, self.bias = ensemble.dim, ensemble.scale, ensemble.bias
        self.max_pixels = min(teacher.max_pixels for teacher in teachers)

    @property
    def parameters(self) -> int:
        """How many parameters the members have, all together."""
        return sum(teacher.parameters for teacher in self.teachers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding."""
        return fingerprint.of_value([self.ensemble.to_json(), [teacher.fingerprint for teacher in self.teachers]])

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed whole pictures: float32 [pictures, dim], unit rows.

        Raises:
            DataError: If a picture cannot be decoded, naming it.
        """
        return self.ensemble.combine_arrays([teacher.encode_images(pictures, batch) for teacher in self.teachers])

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 [texts, dim], unit rows."""
        return self.ensemble.combine_arrays([teacher.encode_texts(texts, batch) for teacher in self.teachers])
