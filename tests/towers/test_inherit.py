"""The token table by PCA, against scikit-free linear algebra done another way."""

import numpy as np
import open_clip
import pytest
import torch

from clipdistill.core.errors import DataError
from clipdistill.towers.inherit import teacher_token_table, token_table

TEXT = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher(rows=200, width=24, seed=0):
    """Rows with a mean and very unequal variances, as real token tables have."""
    table = torch.randn(rows, width, generator=generator(seed)) * torch.linspace(3, 0.1, width)
    return table @ torch.linalg.qr(torch.randn(width, width, generator=generator(1)))[0] + 5


def centred(table):
    return (table - table.mean(dim=0)).double()


def test_equal_width_keeps_inner_products_up_to_one_factor():
    table = teacher()
    ids = list(range(0, 200, 2))
    ours = token_table(table, ids, 24, generator=generator())
    wanted = centred(table[ids]) @ centred(table[ids]).T
    found = centred(ours) @ centred(ours).T
    factor = float((wanted * found).sum() / (wanted * wanted).sum())
    assert torch.allclose(found, wanted * factor, atol=1e-6)
    assert abs(float(ours.square().mean().sqrt()) - 0.02) < 1e-6


def test_smaller_width_is_the_best_rank_approximation():
    table = teacher()
    ours = token_table(table, list(range(200)), 7, generator=generator())
    values, vectors = np.linalg.eigh(np.cov(table.double().numpy().T))
    best = centred(table).numpy() @ vectors[:, ::-1][:, :7]
    gram = centred(ours).numpy() @ centred(ours).numpy().T
    wanted = best @ best.T
    assert np.allclose(gram / np.linalg.norm(gram), wanted / np.linalg.norm(wanted), atol=1e-6)
    variances = centred(ours).var(dim=0).numpy()
    assert np.allclose(variances / variances.sum(), values[::-1][:7] / values[::-1][:7].sum(), atol=1e-4)


def test_axes_have_a_fixed_sign():
    table = teacher()
    ids = list(range(200))
    straight = token_table(table, ids, 8, generator=generator())
    shuffled = torch.randperm(200, generator=generator(3)).tolist()
    other = token_table(table[shuffled], ids, 8, generator=generator())
    assert torch.allclose(straight[shuffled], other, atol=1e-5)


def test_larger_width_fills_the_rest_with_little_noise():
    ours = token_table(teacher(), list(range(200)), 40, generator=generator())
    assert abs(float(ours[:, 24:].std()) - 0.002) < 2e-4
    assert float(ours[:, 24:].std(dim=0).min()) > 0
    assert abs(float(ours[:, :24].square().mean().sqrt()) - 0.02) < 1e-6


def test_tokens_without_a_teacher_are_random_at_the_same_scale():
    ids = [None, *range(150), *[None] * 300]
    ours = token_table(teacher(), ids, 16, generator=generator())
    assert ours.shape == (451, 16)
    assert abs(float(ours[151:].std()) - 0.02) < 1e-3
    assert torch.equal(ours, token_table(teacher(), ids, 16, generator=generator()))
    again = token_table(teacher(), ids, 16, generator=generator(9))
    assert torch.equal(ours[1:151], again[1:151])
    assert not torch.equal(ours[151:], again[151:])


def test_global_randomness_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    token_table(teacher(), [None, 1, 2, 3], 4, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ids", [[None, None], [5], [5, 5], [0, 1]])
def test_few_rows_are_no_special_case(ids):
    ours = token_table(teacher(), ids, 16, generator=generator())
    assert ours.shape == (len(ids), 16)
    assert bool(ours.isfinite().all())
    assert float(ours.abs().max()) > 0


def test_ids_outside_the_table_are_refused():
    with pytest.raises(DataError, match=r"200 rows, .* to 200"):
        token_table(teacher(), [0, 200], 4, generator=generator())


@pytest.mark.parametrize("kind", [open_clip.model.CLIP, open_clip.model.CustomTextCLIP])
def test_the_table_of_a_native_tower_is_found(kind):
    model = kind(8, VISION, TEXT)
    weight = model.token_embedding.weight if kind is open_clip.model.CLIP else model.text.token_embedding.weight
    table = teacher_token_table(model)
    assert torch.equal(table, weight)
    assert not table.requires_grad
    table.zero_()
    assert bool(weight.any())


def test_the_table_of_a_hugging_face_tower_is_found(tmp_path):
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=50, **sizes).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    model = open_clip.model.CustomTextCLIP(8, VISION, text)
    assert teacher_token_table(model).shape == (50, 32)


def test_a_tower_without_a_table_has_none():
    assert teacher_token_table(torch.nn.Linear(2, 2)) is None
