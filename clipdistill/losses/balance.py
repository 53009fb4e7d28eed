"""Weights that balance themselves: a log-variance is learned for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

_BOUND = 10.0  # a loss that reaches 0 would otherwise end in an infinite weight


@final
class Uncertainty(nn.Module):
    """Learned log-variances, one a weight.

    A term's share of the total is ``w (exp(-s) L + s)``, s its log-variance: homoscedastic uncertainty (Kendall et al.
    2018, arXiv 1705.07115), doubled so that at the start, with every s = 0, the total is the fixed sum. At its best
    ``exp(s) = L``: each term then pulls with its own weight, however large its loss is. Adam moves s by about the
    learning rate a step, so that a short run stays near the fixed sum.

    Args:
        names: The weights that are balanced.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, name: str, loss: Tensor) -> Tensor:
        """A term before it is weighted: ``exp(-s) L + s``.

        Args:
            name: Its weight's.
            loss: L.
        """
        log_variance = self.log_variances[name]
        balanced: Tensor = torch.exp(-log_variance) * loss + log_variance
        return balanced

    def values(self) -> dict[str, Tensor]:
        """The log-variances, as they are reported."""
        return {f"log_variance_{name}": value.detach().clone() for name, value in self.log_variances.items()}

    @torch.no_grad()
    def hold(self) -> None:
        """Bring every log-variance back between the bounds."""
        for value in self.log_variances.values():
            value.clamp_(-_BOUND, _BOUND)
