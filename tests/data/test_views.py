import hashlib
import math

import numpy as np
import pytest
from PIL import Image

from clipdistill.data import views
from clipdistill.data.views import WHOLE, View, apply, view


def test_number_zero_is_the_whole_picture():
    assert view(3, "a", 0) == WHOLE == View(0, 0, 1, 1, False)


def test_a_view_depends_on_seed_key_and_number_and_on_nothing_else():
    first = [view(7, f"key{i}", n) for i in range(5) for n in (1, 2)]
    np.random.seed(1)  # noqa: NPY002 - the ambient state that must not matter
    again = [view(7, f"key{i}", n) for n in (2, 1) for i in reversed(range(5))]
    assert set(first) == set(again)
    assert len(set(first)) == 10
    assert view(8, "key0", 1) != view(7, "key0", 1)
    assert view(1, "2", 3) != view(12, "", 3)


def test_a_view_is_the_same_on_every_machine():
    """Pinned: caches store embeddings of views, so another stream would make them wrong without a word."""
    box = view(17, "noto/1f913", 1)
    expected = (0.11088094269068385, 0.0026961032184549464, 0.8636318772629981, 0.9997351273673895)
    assert (box.left, box.top, box.right, box.bottom) == pytest.approx(expected, abs=1e-12)
    assert box.flip is False


def test_views_follow_the_rule_of_random_resized_crop():
    drawn = [view(0, str(number), 1) for number in range(4000)]
    areas, aspects, lefts, flips = [], [], [], 0
    for box in drawn:
        assert 0 <= box.left < box.right <= 1 + 1e-12
        assert 0 <= box.top < box.bottom <= 1 + 1e-12
        width, height = box.right - box.left, box.bottom - box.top
        areas.append(width * height)
        aspects.append(math.log(width / height))
        if width < 1:
            lefts.append(box.left / (1 - width))
        flips += box.flip
    assert 0.6 <= min(areas) < 0.62
    assert max(areas) <= 1 + 1e-9
    assert max(map(abs, aspects)) <= math.log(4 / 3) + 1e-9
    assert abs(np.mean(aspects)) < 0.02
    assert abs(np.mean(lefts) - 0.5) < 0.03
    assert abs(np.std(lefts) - math.sqrt(1 / 12)) < 0.02
    assert abs(flips / len(drawn) - 0.5) < 0.03


def test_areas_are_uniform_where_every_box_fits():
    """With areas up to 0.5 no attempt fails, so the area's distribution is the plain uniform one."""
    areas = sorted(
        (box.right - box.left) * (box.bottom - box.top)
        for box in (view(1, str(number), 1, scale=(0.1, 0.5)) for number in range(3000))
    )
    expected = np.linspace(0.1, 0.5, len(areas))
    assert np.abs(np.array(areas) - expected).max() < 0.4 * 1.63 / math.sqrt(len(areas))  # Kolmogorov-Smirnov, 1%


def test_where_nothing_fits_the_largest_central_box_is_taken():
    wide = view(0, "a", 1, scale=(1.0, 1.0), ratio=(2.0, 2.5), flip=0.0)
    assert wide == View(0.0, 0.25, 1.0, 0.75, False)
    tall = view(0, "a", 1, scale=(1.0, 1.0), ratio=(0.25, 0.5), flip=1.0)
    assert tall == View(0.25, 0.0, 0.75, 1.0, True)


@pytest.mark.parametrize(("chance", "expected"), [(0.0, False), (1.0, True)])
def test_the_chance_of_mirroring_is_kept_at_both_ends(chance, expected):
    assert {view(0, str(number), 1, flip=chance).flip for number in range(50)} == {expected}


def test_applying_a_view_cuts_the_rounded_box_and_mirrors():
    values = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    image = Image.fromarray(values)
    box = View(0.25, 0.12, 0.75, 0.88, False)
    np.testing.assert_array_equal(np.asarray(apply(image, box)), values[1:9, 5:15])
    mirrored = View(0.25, 0.12, 0.75, 0.88, True)
    np.testing.assert_array_equal(np.asarray(apply(image, mirrored)), values[1:9, 5:15][:, ::-1])
    assert apply(image, WHOLE) is image


def test_a_box_is_never_empty_and_never_outside():
    for size in ((1, 1), (2, 3), (1, 50)):
        image = Image.new("RGB", size)
        for number in range(1, 60):
            part = apply(image, view(0, "a", number, scale=(0.01, 1.0)))
            assert 1 <= part.width <= size[0]
            assert 1 <= part.height <= size[1]
    assert apply(Image.new("RGB", (3, 3)), View(0.999, 0.999, 1.0, 1.0, False)).size == (1, 1)


def test_the_stream_is_numpys_documented_philox():
    """The raw words are those of the generator that the docstring names, keyed as it says."""
    key = int.from_bytes(hashlib.sha256(b"text").digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(3)
    stream = views._uniforms("text")
    assert [next(stream) for _ in range(3)] == [(int(word) >> 11) / 2**53 for word in raw]
