import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.sources import SourceSpec, load_source


@pytest.fixture
def encode():
    """Encoded bytes of a real picture; another seed gives other pixels."""

    def make(format="JPEG", size=(12, 9), mode="RGB", seed=0, **options):
        depth = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1}[mode]
        values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], depth), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values.squeeze(-1) if depth == 1 else values, mode=mode).save(buffer, format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def load(tmp_path):
    """Load sources below the test's own folder."""

    def run(*specs, kind="pairs", taken=None, max_pixels=1_000_000, **options):
        specs = [SourceSpec(path=spec, **options) if isinstance(spec, str) else spec for spec in specs]
        return load_source(specs, base=tmp_path, max_pixels=max_pixels, kind=kind, taken=taken)

    return run


@pytest.fixture
def write_tar():
    def write(path, members):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write
