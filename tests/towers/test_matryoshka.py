"""Embeddings that can be cut: the cut rows, the axes that the map begins with, and the narrower student by itself."""

import numpy as np
import open_clip
import pytest
import tiny
import torch

from clipdistill.core.errors import ConfigError
from clipdistill.data.records import Picture
from clipdistill.towers.build import build_student
from clipdistill.towers.matryoshka import cut, cut_vectors, principal_axes, sliced
from clipdistill.towers.student import DualEncoder

TEXTS = [tiny.caption(number) for number in range(20)]
PICTURES = [Picture(f"memory[{number}]", data=tiny.image_bytes(number)) for number in range(4)]


def build(image="mobilenetv4_conv_small_050", *, dims=(24, 16, 8), teacher_dim=24, axes=None, text="nano"):
    return build_student(
        image=image,
        text=text,
        dim=dims[0],
        dims=dims,
        axes=axes,
        teacher_dim=teacher_dim,
        image_init="random",
        text_init="random",
        texts=TEXTS,
        seed=5,
        image_size=32,
    )


@pytest.fixture(scope="module")
def student():
    return build()


def rows(count, dim, seed=0):
    found = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_a_cut_row_is_its_first_entries_made_unit():
    whole = rows(7, 12)
    for dim in (12, 5, 1):
        expected = np.stack([row[:dim] / np.sqrt(sum(float(x) ** 2 for x in row[:dim])) for row in whole])
        np.testing.assert_allclose(cut_vectors(whole, dim), expected, atol=1e-6)
        np.testing.assert_allclose(cut(torch.from_numpy(whole), dim).numpy(), expected, atol=1e-6)


def test_the_axes_hold_the_most_of_the_rows_in_the_fewest_directions():
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))
    strength = np.array([5, 3, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    data = (np.random.default_rng(2).standard_normal((4000, 10)) * strength) @ basis.T
    data = (data / np.linalg.norm(data, axis=1, keepdims=True)).astype(np.float32)
    axes = principal_axes(data, 10).numpy()
    np.testing.assert_allclose(axes.T @ axes, np.eye(10), atol=1e-5)
    kept = [float(np.square(data @ axes[:, :dim]).sum()) for dim in range(1, 11)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(len(data), rel=1e-4)
    for dim in (1, 3):  # no other directions hold more: the sum of the largest eigenvalues is the most there is
        values = np.linalg.eigvalsh(data.astype(np.float64).T @ data)[::-1]
        assert kept[dim - 1] == pytest.approx(values[:dim].sum(), rel=1e-5)
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(10)] > 0).all()


def test_a_student_of_several_widths_has_a_map_that_is_cut_with_its_rows(student):
    assert student.dims == (24, 16, 8)
    embeddings = torch.from_numpy(rows(3, 24))
    for dim in (24, 8):
        weight = student.projection["text"].weight[:, :dim]
        expected = torch.nn.functional.normalize(cut(embeddings, dim) @ weight.T, dim=-1)
        torch.testing.assert_close(student.to_teacher(cut(embeddings, dim), "text"), expected)


def test_with_the_axes_the_map_loses_nothing_at_full_width_and_the_least_below():
    teacher = rows(500, 24, seed=3) * np.linspace(3, 0.1, 24, dtype=np.float32)
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    axes = principal_axes(teacher, 24)
    student = build(axes=axes)
    own = torch.from_numpy(teacher) @ axes  # a perfect student
    back = student.to_teacher(own, "image").detach().numpy()
    np.testing.assert_allclose(back, teacher, atol=1e-5)
    short = student.to_teacher(cut(own, 8), "image").detach().numpy()
    drawn = build().to_teacher(torch.from_numpy(teacher[:, :8]), "image").detach().numpy()
    assert (short * teacher).sum(axis=1).mean() > (drawn * teacher).sum(axis=1).mean() + 0.2


@pytest.mark.parametrize("image", ["mobilenetv4_conv_small_050", "ViT-S-32-alt"])
def test_the_narrower_student_embeds_as_the_cut_one(image, tmp_path):
    student = build(image)
    narrower = student.truncate(8)
    assert narrower.dim == 8
    assert narrower.dims == (8,)
    assert narrower.parameters < student.parameters
    images, texts = student.encode_images(PICTURES), student.encode_texts(TEXTS)
    np.testing.assert_allclose(narrower.encode_images(PICTURES), cut_vectors(images, 8), atol=1e-5)
    np.testing.assert_allclose(narrower.encode_texts(TEXTS), cut_vectors(texts, 8), atol=1e-5)
    mapped = student.to_teacher_vectors(cut_vectors(texts, 8), "text")
    np.testing.assert_allclose(narrower.to_teacher_vectors(narrower.encode_texts(TEXTS), "text"), mapped, atol=1e-5)
    narrower.save(tmp_path / "narrow")
    again = DualEncoder.load(tmp_path / "narrow")
    assert again.fingerprint == narrower.fingerprint
    name = f"local-dir:{tmp_path / 'narrow'}"
    model, _ = open_clip.create_model_from_pretrained(name)
    with torch.no_grad():
        features = model.eval().encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    np.testing.assert_allclose(features.numpy(), cut_vectors(texts, 8), atol=1e-5)


def test_the_widths_survive_saving(student, tmp_path):
    student.save(tmp_path / "it")
    again = DualEncoder.load(tmp_path / "it")
    assert again.dims == student.dims
    assert again.projection is not None
    assert again.fingerprint == student.fingerprint


def test_a_width_that_was_not_trained_is_refused(student):
    with pytest.raises(ConfigError, match=r"12 is not a width that the student was trained for \(24, 16, 8\)"):
        student.truncate(12)


def test_a_last_layer_that_is_no_single_map_is_refused():
    wide, narrow = {"head.weight": torch.zeros(8, 16)}, {"head.weight": torch.zeros(4, 8)}
    with pytest.raises(ConfigError, match=r"head\.weight is \[8, 16\] and would be \[4, 8\]"):
        sliced(wide, narrow)
