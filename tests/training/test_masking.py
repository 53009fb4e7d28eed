from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from training import little

from clipdistill.training.masking import GRID, mask_patches, statistics_at_rest
from clipdistill.training.sampler import permutation

KEYS = ["a", "b", "c"]


def ones(count: int = 3, height: int = 28, width: int = 21) -> torch.Tensor:
    return torch.ones(count, 3, height, width)


@pytest.mark.parametrize(("ratio", "masked"), [(0.75, 37), (0.5, 24), (0.001, 1), (0.999, 48)])
def test_so_many_whole_patches_of_each_picture_are_the_mean_colour(ratio, masked):
    found = mask_patches(ones(), KEYS, ratio, seed=3, step=5)
    patches = found.reshape(3, 3, GRID, 4, GRID, 3).permute(0, 1, 2, 4, 3, 5).reshape(3, 3, GRID * GRID, 12)
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(patches.amin(-1), patches.amax(-1))  # a patch is masked whole
    assert torch.equal(patches.amin(1), patches.amax(1))  # in all three channels
    assert (patches[:, 0, :, 0] == 0).sum(dim=1).tolist() == [masked] * 3


def test_what_is_not_masked_is_unchanged():
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = mask_patches(pixels, KEYS, 0.75, seed=3, step=5)
    assert torch.equal(found[found != 0], pixels[found != 0])
    assert 0.7 < (found == 0).float().mean() < 0.8
    assert pixels.count_nonzero() == pixels.numel()


def test_the_mask_is_a_function_of_seed_step_and_key_alone():
    whole = mask_patches(ones(), KEYS, 0.75, seed=3, step=5)
    assert torch.equal(mask_patches(ones(2), ["c", "a"], 0.75, seed=3, step=5), whole[[2, 0]])
    assert not torch.equal(whole[0], whole[1])
    for seed, step in ((4, 5), (3, 6)):
        assert not torch.equal(mask_patches(ones(), KEYS, 0.75, seed=seed, step=step), whole)


def test_every_patch_is_masked_as_often_as_the_others():
    counts = sum(
        1 - mask_patches(ones(1, GRID, GRID), ["a"], 0.75, seed=0, step=step)[0, 0].numpy() for step in range(400)
    )
    assert abs(counts / 400 - 37 / 49).max() < 0.1


@pytest.mark.parametrize("side", [2, 5, 7, 8, 33])
def test_any_size_keeps_something_and_masks_something(side):
    found = mask_patches(ones(1, side, side), ["a"], 0.75, seed=1, step=0)
    assert 0 < found.count_nonzero() < found.numel()


def test_no_pictures_are_masked_to_no_pictures():
    assert mask_patches(ones(0), [], 0.75, seed=1, step=0).shape == (0, 3, 28, 21)


def test_a_permutation_depends_on_its_names_alone_and_holds_each_number_once():
    assert sorted(permutation(20, 1, "x")) == list(range(20))
    np.testing.assert_array_equal(permutation(20, 1, "x"), permutation(20, 1, "x"))
    assert permutation(20, 1, "x").tolist() != permutation(20, 2, "x").tolist()


def test_statistics_rest_within_the_block_and_learn_again_after_it():
    student = little.student()
    student.module.train()
    norms = [part for part in student.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def statistics():
        return [value.clone() for norm in norms for value in (norm.running_mean, norm.running_var)]

    before = statistics()
    whole = student.embed_pixels(pixels)
    learned = statistics()
    assert not all(map(torch.equal, before, learned))
    with statistics_at_rest(student.module):
        masked = student.embed_pixels(mask_patches(pixels, list("abcd"), 0.75, 0, 0))
    assert all(map(torch.equal, learned, statistics()))
    (whole.sum() + masked.sum()).backward()  # both passes can be differentiated together
    assert all(norm.momentum == 0.1 for norm in norms)
    assert not torch.equal(whole, masked)
