"""Hooks on a tower's blocks: what they give is pooled to cells as the tower runs, and can be taken afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor

from clipdistill.core.errors import ConfigError
from clipdistill.towers import context
from clipdistill.towers.blocks import tower_of
from clipdistill.towers.pooling import Grid, pool_map, pool_picture_tokens, pool_text_tokens
from clipdistill.towers.student import Side


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of a tower.

    Attributes:
        given: What it was given: pixels, or tokens [rows, length] as far as they were run.
        cells: By block name float32 [rows, cells, width], attached where the pass was.
    """

    given: Tensor
    cells: dict[str, Tensor] = field(default_factory=dict)


@final
class Tap:
    """The blocks of one tower, pooled as it runs.

    A picture's cells are the parts of a grid. A text's are spans of its own tokens: padding is left out, and with a
    causal tower also the first token, which sees nothing but itself and gives the same for every text.

    Args:
        model: The open_clip model.
        side: Which tower.
        names: The blocks, by the names that :func:`~clipdistill.towers.blocks.find_block` gives.
        cells: Parts of a picture along each axis, or spans of a text; 1 = the mean.
        trained: Whether only passes with gradients are seen: an evaluation between two steps is none of ours.
    """

    def __init__(self, model: Any, side: Side, names: Sequence[str], cells: int, *, trained: bool = False) -> None:
        self._side, self._cells, self._trained = side, cells, trained
        self._tower = tower_of(model, side)
        self.names = tuple(dict.fromkeys(names))
        self._pool: Callable[[str, Tensor, Tensor], Tensor]
        self._pool = self._picture_cells if side == "image" else self._text_cells
        self._passes: list[Pass] = []
        self._open: Pass | None = None

    @contextmanager
    def watching(self) -> Iterator[Tap]:
        """A block in which the tower's passes are seen."""
        entry = self._tower
        if self._side == "text" and not isinstance(entry, HFTextEncoder):
            entry = entry.token_embedding  # a cut context is run around the tower's own forward
        with ExitStack() as stack:
            stack.callback(entry.register_forward_pre_hook(self._begin).remove)
            for name in self.names:
                stack.callback(self._tower.get_submodule(name).register_forward_hook(self._seer(name)).remove)
            stack.callback(self.take)
            yield self

    def take(self) -> list[Pass]:
        """The passes since the last call, in their order; they are forgotten here."""
        passes, self._passes, self._open = self._passes, [], None
        return passes

    def widths(self, run: Callable[[], object]) -> dict[str, int]:
        """The width of each block, found by letting something through the tower.

        Args:
            run: Runs the tower once on anything.

        Raises:
            ConfigError: If a block is not run, or what it gives cannot be pooled.
        """
        with self.watching():
            run()
            seen = self.take()[-1].cells
        missing = [name for name in self.names if name not in seen]
        if missing:
            raise ConfigError(f"features.{self._side}: {missing[0]} is not run by the tower; choose a block of it")
        return {name: seen[name].shape[2] for name in self.names}

    def _begin(self, _module: Any, given: tuple[Any, ...]) -> None:
        if self._trained and not torch.is_grad_enabled():
            self._open = None
            return
        self._open = Pass(given[0])
        self._passes.append(self._open)

    def _seer(self, name: str) -> Callable[[Any, Any, Any], None]:
        def see(_module: Any, _given: Any, output: Any) -> None:
            if self._open is not None:
                value = output if isinstance(output, Tensor) else output[0]
                with torch.autocast(value.device.type, enabled=False):
                    self._open.cells[name] = self._pool(name, value, self._open.given)

        return see

    def _picture_cells(self, name: str, value: Tensor, _pixels: Tensor) -> Tensor:
        trunk = getattr(self._tower, "trunk", self._tower)
        if value.ndim == 4:
            last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            return pool_map(value.permute(0, 3, 1, 2) if last else value, self._cells)
        if value.ndim == 3:
            tokens = value if _batch_first(self._tower) else value.transpose(0, 1)
            return pool_picture_tokens(tokens, self._cells, _prefix(self._tower), _tokens_grid(self._tower), name)
        return self._one_vector(name, value)

    def _text_cells(self, name: str, value: Tensor, tokens: Tensor) -> Tensor:
        if value.ndim != 3:
            return self._one_vector(name, value)
        value = value if _batch_first(self._tower) else value.transpose(0, 1)
        first = 1 if getattr(self._tower, "attn_mask", None) is not None else 0
        own = value[:, : tokens.shape[1]]  # CoCa's class token comes last
        return pool_text_tokens(own, first, context.lengths(self._tower, tokens), self._cells)

    def _one_vector(self, name: str, value: Tensor) -> Tensor:
        if value.ndim == 2 and self._cells == 1:
            return value.float()[:, None]
        found = f"gives {list(value.shape)}, which are neither places nor tokens"
        raise ConfigError(f'features.{self._side}: {name} {found}; choose a block, or pool = "mean" for single vectors')


def _batch_first(tower: Any) -> bool:
    return bool(getattr(getattr(tower, "transformer", None), "batch_first", True))


def _prefix(tower: Any) -> int:
    """How many tokens of a ViT stand for no place: its class and register tokens, which come first."""
    if hasattr(tower, "trunk"):
        return int(getattr(tower.trunk, "num_prefix_tokens", 0))
    return 1 if getattr(tower, "class_embedding", None) is not None else 0


def _tokens_grid(tower: Any) -> Grid | None:
    holder = getattr(tower.trunk, "patch_embed", None) if hasattr(tower, "trunk") else tower
    grid = getattr(holder, "grid_size", None)
    return (int(grid[0]), int(grid[1])) if grid is not None else None
