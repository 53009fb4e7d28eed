import numpy as np
import pytest
import tiny
import torch
from training import live_teachers

from clipdistill.data.pictures import decode
from clipdistill.towers.live import LiveTeacher
from clipdistill.towers.teacher import load_teacher

TEXTS = ["a red bicycle", "a large flat cat in a picture", ""]
PICTURES = [pair.picture for pair in tiny.pairs(3)]


@pytest.fixture(scope="module", params=["plain", "clip", "siglip"])
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / request.param
    if request.param == "plain":  # open_clip's CLIP, whose text tower is the model itself
        return load_teacher(f"local-dir:{tiny.teacher_folder(folder, custom=False)}")
    return live_teachers.load(folder, request.param)


def inputs(live):
    images = [decode(picture.read(), 10**6, picture.origin) for picture in PICTURES]
    return torch.stack([live.preparation.prepare(image) for image in images]), live.preparation.tokens(TEXTS)


def test_it_embeds_as_the_teacher_does(teacher):
    live = LiveTeacher(teacher)
    pixels, tokens = inputs(live)
    images, texts = live.embed_pixels(pixels), live.embed_tokens(tokens)
    np.testing.assert_allclose(images, teacher.encode_images(PICTURES), atol=1e-6)
    np.testing.assert_allclose(texts, teacher.encode_texts(TEXTS), atol=1e-6)
    assert not images.requires_grad
    assert live.embed_pixels(pixels[:0]).shape == live.embed_tokens(tokens[:0]).shape == (0, teacher.dim)
    assert live.preparation.tokens([]).shape[0] == 0


def test_gradients_flow_where_the_network_asks_for_them(teacher):
    live = LiveTeacher(teacher)
    pixels, tokens = inputs(live)
    teacher.model.requires_grad_(True)
    try:
        (live.embed_pixels(pixels)[:, 0].sum() + live.embed_tokens(tokens)[:, 0].sum()).backward()
        silent = [name for name, value in teacher.model.named_parameters() if value.grad is None]
    finally:
        teacher.model.requires_grad_(False)
    assert all("logit" in name for name in silent)
