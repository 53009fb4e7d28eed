"""What the loss tests share: comparing a torch loss with its oracle, and a random batch with its expected terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import oracles_losses as oracle
import torch

from clipdistill.losses.objective import Embeddings, LossWeights, Targets


def assert_matches_oracle(loss: Callable, expected: Callable, arguments: Sequence[np.ndarray]) -> None:
    """Compare value and gradient with respect to every argument, in float64."""
    tensors = [torch.tensor(argument, dtype=torch.float64, requires_grad=True) for argument in arguments]
    value = loss(*tensors)
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), expected(*arguments), rtol=1e-10, atol=1e-12)
    value.backward()
    for position, tensor in enumerate(tensors):

        def with_replaced(array: np.ndarray, position: int = position) -> float:
            return expected(*[array if i == position else other for i, other in enumerate(arguments)])

        numeric = oracle.gradient(with_replaced, np.asarray(arguments[position], dtype=np.float64))
        assert np.abs(numeric).max() > 1e-6, f"argument {position} has no gradient: the case cannot fail"
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, rtol=1e-5, atol=1e-7)


@dataclass(frozen=True)
class Expected:
    parts: dict[str, float]
    total: float


@dataclass(frozen=True)
class Batch:
    """A batch in numpy: student rows of width 4 (u, v), the same in the teacher's width 6 (pu, pv), teacher (p, q)."""

    u: np.ndarray
    v: np.ndarray
    pu: np.ndarray
    pv: np.ndarray
    p: np.ndarray
    q: np.ndarray
    positives: np.ndarray
    pairs: int

    @staticmethod
    def random(images: int, texts: int, pairs: int, seed: int) -> Batch:
        """Random unit rows; the first text also describes the last paired image, where there are two pairs or more."""
        generator = np.random.default_rng(seed)
        sides = [oracle.unit_rows(generator, count, dim) for dim in (4, 6, 6) for count in (images, texts)]
        positives = np.eye(pairs, dtype=bool)
        if pairs > 1:
            positives[-1, 0] = True
        return Batch(*sides, positives, pairs)

    def tensors(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False):
        """The three arguments of an objective."""

        def side(images: np.ndarray, texts: np.ndarray, grad: bool) -> Embeddings:
            return Embeddings(*(torch.tensor(rows, dtype=dtype, requires_grad=grad) for rows in (images, texts)))

        targets = Targets(side(self.p, self.q, False), torch.tensor(self.positives), self.pairs)
        return side(self.u, self.v, requires_grad), side(self.pu, self.pv, requires_grad), targets

    def relations(self, scale: float, student_scale: float = 1 / 0.07, teacher_scale: float = 20.0) -> dict[str, float]:
        """The terms of pairs and of single modalities that came after the first six, from the oracles."""
        sides = [rows[: self.pairs] for rows in (self.pu, self.pv, self.p, self.q)]
        same = np.eye(self.pairs, dtype=bool)
        return {
            "vertical": oracle.vertical(*sides, scale, scale, same, same),
            "cross": oracle.cross(*sides, scale),
            "gradient": oracle.gradient_distance(*sides, student_scale, teacher_scale, self.positives),
            "pseudo_relation": sum(
                oracle.among(ours, theirs, theirs, teacher_scale, 3.0)
                for ours, theirs in ((self.pu, self.p), (self.pv, self.q))
            ),
        }

    def expected(
        self, weights: LossWeights, student_scale: float, bias: float, teacher_scale: float, icl_scale: float = 1 / 0.07
    ) -> Expected:
        """Every weighted term from the oracles, and their weighted sum."""
        n, w = self.pairs, weights
        u, v, pu, pv, p, q = (rows[:n] for rows in (self.u, self.v, self.pu, self.pv, self.p, self.q))
        parts, total = {}, 0.0
        if w.clip and n:
            parts["clip"] = oracle.clip(u, v, student_scale, self.positives)
        if w.siglip and n:
            parts["siglip"] = oracle.siglip(u, v, student_scale, bias, self.positives)
        rows = (self.u, self.v, self.p, self.q) if w.affinity_rows == "all" else (u, v, p, q)
        if w.affinity and all(len(side) for side in rows):
            parts["affinity"] = oracle.affinity(*rows, student_scale, teacher_scale, w.temperature, w.affinity_form)
        for name, ours, theirs in (("feature_image", self.pu, self.p), ("feature_text", self.pv, self.q)):
            if (w.feature_cosine or w.feature_mse) and len(ours):
                parts[name] = oracle.one_minus_cosine(ours, theirs)
                total += w.feature_cosine * parts[name] + w.feature_mse * oracle.mse(ours, theirs)
        if w.interactive and n:
            parts["interactive"] = oracle.interactive(pu, pv, p, q, icl_scale, self.positives)
        for name in ("clip", "siglip", "affinity", "interactive"):
            total += getattr(w, name) * parts.get(name, 0.0)
        return Expected(parts, total)
