"""The preprocessing against open_clip's own transform (torchvision), bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipdistill.core.errors import DataError
from clipdistill.towers.preprocess import Preprocess

MODES = ("shortest", "longest", "squash")
SIZES = [
    (1, 1),
    (1, 7),
    (9, 1),
    (2, 3),
    (31, 33),
    (32, 32),
    (33, 32),
    (64, 31),
    (200, 37),
    (37, 401),
    (96, 97),
    (500, 499),
]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(cfg, image):
    return image_transform_v2(PreprocessCfg(**cfg), is_train=False)(image).numpy()


def assert_same(cfg, image):
    ours = Preprocess.from_open_clip(cfg)(image)
    theirs = reference(cfg, image)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_square_targets_equal_open_clip_bit_for_bit(mode, size):
    for target in (32, 33):
        assert_same({"size": target, "resize_mode": mode, "fill_color": 114}, noise(*size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_oblong_targets_and_filters_equal_open_clip(mode, interpolation):
    for size in SIZES:
        cfg = {"size": (24, 40), "resize_mode": mode, "interpolation": interpolation}
        assert_same(cfg, noise(*size))
        assert_same({**cfg, "size": 40}, noise(*size))


def test_every_byte_is_normalised_to_the_same_bits():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    for mean, std in [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (None, None)]:
        assert_same({"size": 16, **({"mean": mean, "std": std} if mean else {})}, Image.fromarray(ramp))


def test_normalise_of_a_batch_is_that_of_each_picture():
    prepare = Preprocess(size=(8, 8))
    pixels = [prepare.pixels(noise(10, 12, seed)) for seed in range(3)]
    batch = prepare.normalise(np.stack(pixels))
    assert batch.shape == (3, 3, 8, 8)
    assert batch.flags.c_contiguous
    for row, picture in zip(batch, pixels, strict=True):
        assert np.array_equal(row, prepare.normalise(picture))


def test_a_strip_that_open_clip_cannot_fit_keeps_one_pixel():
    strip = Image.new("RGB", (1000, 1), (255, 255, 255))
    cfg = {"size": 32, "resize_mode": "longest"}
    with pytest.raises(ValueError, match="must be > 0"):
        reference(cfg, strip)
    pixels = Preprocess.from_open_clip(cfg).pixels(strip)
    assert pixels.shape == (32, 32, 3)
    assert (pixels.sum(axis=(1, 2)) > 0).sum() == 1


@pytest.mark.parametrize("size", [(4001, 3), (3, 4001), (4001, 90), (1, 500), (90, 4001)])
def test_an_extreme_strip_is_not_blown_up_and_differs_by_rounding_alone(size, monkeypatch):
    strip = noise(*size)
    prepare = Preprocess(size=(64, 64))
    exact = prepare.pixels(strip)
    monkeypatch.setattr("clipdistill.towers.preprocess._LARGEST_INTERMEDIATE", 1)
    gap = np.abs(prepare.pixels(strip).astype(int) - exact.astype(int))
    assert gap.max() <= (1 if max(size) / min(size) > 100 else 12)
    assert gap.mean() < 0.5
    assert exact.std() > 10


def test_a_strip_of_ten_million_pixels_takes_little_memory():
    assert Preprocess(size=(224, 224)).pixels(Image.new("RGB", (1, 10_000_000))).shape == (224, 224, 3)


def test_open_clip_cfg_round_trip():
    cfg = {
        "size": [24, 40],
        "mode": "RGB",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "longest",
        "fill_color": 7,
    }
    assert Preprocess.from_open_clip(cfg).to_open_clip() == cfg
    assert Preprocess.from_open_clip({"size": 32}).size == (32, 32)


@pytest.mark.parametrize("cfg", [{"interpolation": "lanczos"}, {"resize_mode": "fit"}, {"mode": "L"}, {"mean": [0.5]}])
def test_unknown_values_are_refused(cfg):
    with pytest.raises(DataError, match="preprocess_cfg"):
        Preprocess.from_open_clip({"size": 32, **cfg})


def test_importing_it_loads_no_torch():
    code = "import sys, clipdistill.towers.preprocess; assert not {'torch', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
