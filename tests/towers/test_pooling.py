import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipdistill.core.errors import ConfigError
from clipdistill.towers.pooling import at_unit_scale, pool_map, pool_picture_tokens, pool_text_tokens


def slow_cells(places, cells):
    """The mean over each part of [height, width, channels], one place after another."""
    height, width = places.shape[:2]
    out = []
    for row in range(cells):
        for column in range(cells):
            inside = [
                places[y, x]
                for y in range(height)
                for x in range(width)
                if row * height // cells <= y < -(-(row + 1) * height // cells)
                and column * width // cells <= x < -(-(column + 1) * width // cells)
            ]
            out.append(np.mean(inside, axis=0))
    return np.stack(out)


@pytest.mark.parametrize(("height", "width", "cells"), [(7, 7, 1), (7, 5, 2), (6, 9, 3), (2, 3, 4), (1, 1, 2)])
def test_a_map_is_averaged_over_equal_parts(height, width, cells):
    maps = torch.randn(3, 5, height, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pooled = pool_map(maps, cells)
    for row in range(3):
        expected = slow_cells(maps[row].detach().permute(1, 2, 0).numpy(), cells)
        np.testing.assert_allclose(pooled[row].detach().numpy(), expected, atol=1e-6)
    theirs = F.adaptive_avg_pool2d(maps, cells).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, theirs)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    mine, other = (torch.autograd.grad((value * weights).sum(), maps)[0] for value in (pooled, theirs))
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(3, 4), None])
def test_a_vits_tokens_go_back_to_their_grid_without_class_and_register_tokens(prefix, grid):
    height, width = grid or (3, 3)
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(2, height, width, 5, generator=generator)
    tokens = torch.cat([torch.full((2, prefix, 5), 1e6), places.flatten(1, 2)], dim=1)
    for cells in (1, 2):
        pooled = pool_picture_tokens(tokens, cells, prefix, grid, "block")
        for row in range(2):
            np.testing.assert_allclose(pooled[row].numpy(), slow_cells(places[row].numpy(), cells), atol=1e-6)
    before = pool_picture_tokens(places.flatten(1, 2), 2, prefix, (height, width), "block")
    np.testing.assert_allclose(before[0].numpy(), slow_cells(places[0].numpy(), 2), atol=1e-6)


def test_tokens_that_are_no_grid_have_a_mean_alone():
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    assert pool_picture_tokens(tokens, 1, 1, None, "block").item() == 3
    with pytest.raises(ConfigError, match="block gives 6 tokens, which are no grid"):
        pool_picture_tokens(tokens, 2, 1, None, "block")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("cells", [1, 2, 3])
def test_a_texts_own_tokens_are_averaged_over_equal_spans(first, cells):
    lengths = [1, 2, 3, 4, 7, 8]
    tokens = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        tokens[row, length:] = float("nan")  # padding: whatever is there must not be seen
    tokens.requires_grad_()
    pooled = pool_text_tokens(tokens, first, torch.tensor(lengths), cells)
    assert pooled.shape == (6, cells, 5)
    for row, length in enumerate(lengths):
        own = tokens[row, min(first, length - 1) : length].detach().numpy()
        spans = [
            own[span * len(own) // cells : -(-(span + 1) * len(own) // cells)].mean(axis=0) for span in range(cells)
        ]
        np.testing.assert_allclose(pooled[row].detach().numpy(), np.stack(spans), atol=1e-6)
    pooled.sum().backward()
    assert tokens.grad.isfinite().all()


def test_unit_scale_keeps_the_direction_and_fits_float16():
    cells = torch.tensor([[[3e6, -4e6]], [[3e-9, 4e-9]], [[0.0, 0.0]]])
    scaled = at_unit_scale(cells)
    assert scaled.square().mean(dim=-1)[:2] == pytest.approx(1.0)
    torch.testing.assert_close(F.cosine_similarity(scaled, cells * 1e3, dim=-1)[:2], torch.ones(2, 1))
    assert scaled.half().isfinite().all()
    assert not scaled[2].any()
