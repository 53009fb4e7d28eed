"""A torch-free encoder over real pictures, and services made of it."""

import hashlib
import io
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clipdistill.data.pictures import decode
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Searcher

COLOURS = {
    "red": (200, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 200), "yellow": (230, 200, 50),
    "violet": (140, 60, 170), "orange": (235, 130, 40), "grey": (120, 120, 120), "black": (20, 20, 20),
}  # fmt: skip


class ColourEncoder:
    """A picture is its mean colour, a text the colours that it names, plus a little of its own; ``turn`` mixes axes.

    Args:
        turn: Angle of a rotation of the colour space: another model.
        pause_s: How long a batch takes.
    """

    dim = 8

    def __init__(self, turn=0.0, pause_s=0.0):
        self.turn, self.pause_s = turn, pause_s
        self.fingerprint = f"colours-{turn}"
        self.batches, self.open, self.entered = [], threading.Event(), threading.Event()
        self.open.set()

    def encode_images(self, pictures, batch=64):
        colours = [np.asarray(decode(p.read(), 10**6, p.origin), np.float64).mean(axis=(0, 1)) for p in pictures]
        return self._rows("image", [(colour, p.read()) for colour, p in zip(colours, pictures, strict=True)])

    def encode_texts(self, texts, batch=256):
        known = [[COLOURS[word] for word in text.split() if word in COLOURS] or [(128, 128, 128)] for text in texts]
        return self._rows("text", [(np.mean(c, axis=0), t.encode()) for c, t in zip(known, texts, strict=True)])

    def _rows(self, tower, items):
        self.entered.set()
        assert self.open.wait(20)
        time.sleep(self.pause_s)
        self.batches.append((tower, len(items)))
        rows = np.stack([self._one(colour, own) for colour, own in items])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def _one(self, colour, own):
        seed = int.from_bytes(hashlib.sha256(own).digest()[:8], "little")
        centred = np.asarray(colour) / 128 - 1
        turned = centred + self.turn * np.roll(centred, 1)
        return np.concatenate([turned, 0.08 * np.random.default_rng(seed).standard_normal(self.dim - 3)])


def picture(colour, number=0, size=(48, 40), form="PNG"):
    """A picture of one colour with a darker figure in it."""
    rng = np.random.default_rng([number, *colour])
    pixels = np.full((size[1], size[0], 3), colour, np.uint8)
    x, y = rng.integers(4, size[0] // 2), rng.integers(4, size[1] // 2)
    pixels[y : y + size[1] // 3, x : x + size[0] // 3] = np.array(colour) // 2
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def gallery(folder, each=4):
    """A folder of pictures in one folder a colour; the keys are their paths, as the package's readers write them."""
    folder = Path(folder)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            (folder / name / f"{number}.png").write_bytes(picture(colour, number))
    return folder


def searcher(folder, encoder):
    """The encoder, with an index of a gallery."""
    from clipdistill.data.records import Picture

    files = sorted(folder.rglob("*.png"))
    keys = [f"{folder.name}/{file.relative_to(folder).as_posix()}" for file in files]
    pictures = [Picture(key, path=file) for key, file in zip(keys, files, strict=True)]
    vectors = encoder.encode_images(pictures)
    encoder.batches.clear()
    encoder.entered.clear()
    return Searcher(encoder, VectorIndex.build(vectors, keys, encoder=encoder.fingerprint))
