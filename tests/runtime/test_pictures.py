"""Hard pictures: training, the PyTorch student and the runtime give their towers the same bits."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from runtime import tiny_export
from training import little

from clipdistill.data.records import Pair, Picture
from clipdistill.runtime import RuntimeEncoder
from clipdistill.towers.preprocess import Preprocess
from clipdistill.training.pictures import PictureReader

MODES = ("shortest", "longest", "squash")


def noise(*shape, kind=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


def stored(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(Image.fromarray(noise(41, 67, 3)), "JPEG", exif=exif, quality=90)


def hard():
    colour, clear = Image.fromarray(noise(37, 53, 3)), Image.fromarray(noise(37, 53, 4))
    palette = colour.quantize(16)
    frames = [Image.fromarray(noise(20, 30 + n, 3)).resize((30, 20)) for n in range(2)]
    return {
        "palette": stored(palette),
        "palette with alpha": stored(palette, transparency=bytes(range(0, 256, 16))),
        "palette with one clear colour": stored(palette, transparency=3),
        "alpha": stored(clear),
        "alpha, webp": stored(clear, "WEBP", lossless=True),
        "grey with alpha": stored(clear.convert("LA")),
        "grey": stored(colour.convert("L")),
        "one bit": stored(colour.convert("1")),
        "cmyk": stored(colour.convert("CMYK"), "JPEG"),
        "cmyk, tiff": stored(colour.convert("CMYK"), "TIFF"),
        "16-bit": stored(Image.fromarray(noise(37, 53, kind=np.uint16))),
        "float": stored(Image.fromarray(noise(37, 53).astype(np.float32) / 255), "TIFF"),
        "animation": stored(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "1 pixel": stored(Image.new("RGB", (1, 1), (9, 200, 77))),
        "1 x 3000": stored(Image.fromarray(noise(3000, 1, 3))),
        "3000 x 1": stored(Image.fromarray(noise(1, 3000, 3))),
        "2 x 30000": stored(Image.fromarray(noise(30000, 2, 3))),
        **{f"rotated {number}": rotated(number) for number in range(1, 9)},
    }


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "it"
    tiny_export.write(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_all_three_ways_to_a_tower_give_the_same_bits(export, mode, monkeypatch):
    preprocess = Preprocess((tiny_export.SIZE, tiny_export.SIZE), resize_mode=mode, fill_color=114)
    pictures = [Picture(name, data=data) for name, data in hard().items()]
    tiny_export.sign(export, preprocess=preprocess.to_open_clip())
    runtime, student = RuntimeEncoder.load(export, threads=1), little.student()
    student.preprocess = preprocess
    fed, embedded, run, embed = [], [], runtime._pictures.run, student.embed_pixels

    class Watched:
        def run(self, pixel_values):
            fed.append(pixel_values)
            return run(pixel_values=pixel_values)

    monkeypatch.setattr(runtime, "_pictures", Watched())
    monkeypatch.setattr(student, "embed_pixels", lambda pixels: embedded.append(pixels) or embed(pixels))
    runtime.encode_images(pictures, batch=5)
    student.encode_images(pictures, batch=7)
    trained = PictureReader(preprocess, little.Teacher(), 10**6).read([(Pair(p.origin, p, ()), 0) for p in pictures])
    assert trained.rejected == []
    assert np.concatenate(fed).shape == (len(pictures), 3, 32, 32)
    assert np.concatenate(fed).tobytes() == torch.cat(embedded).numpy().tobytes() == trained.pixels.numpy().tobytes()


def test_the_hard_pictures_are_what_they_are_named():
    modes = {name: Image.open(io.BytesIO(data)).mode for name, data in hard().items()}
    assert [modes[name] for name in ("palette", "palette with alpha", "alpha", "cmyk", "16-bit", "float")] == [
        "P", "P", "RGBA", "CMYK", "I;16", "F",
    ]  # fmt: skip
    sideways = Image.open(io.BytesIO(hard()["rotated 6"]))
    assert (sideways.size, sideways.getexif()[0x0112]) == ((67, 41), 6)
    assert Image.open(io.BytesIO(hard()["palette with alpha"])).has_transparency_data
