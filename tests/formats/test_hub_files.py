"""The shared hub files: what CLIPImageProcessor makes of them, and what it cannot express."""

import io
import json

import numpy as np
import pytest
import tiny
from PIL import Image

from clipdistill.formats import hub_files
from clipdistill.towers.preprocess import Preprocess


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_processor_prepares_pictures_as_the_student_does(tmp_path, mode, interpolation):
    from transformers import CLIPImageProcessorPil

    own = Preprocess((32, 32), interpolation=interpolation, resize_mode=mode, mean=(0.5, 0.4, 0.3))
    assert list(hub_files.processor_faults(own, "web")) == []
    hub_files.write_processor(tmp_path, own)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    for size, shift in (((48, 36), 0), ((64, 90), 0), ((20, 17), 0), ((40, 36), mode == "shortest")):
        picture = Image.open(io.BytesIO(tiny.image_bytes(3, size))).convert("RGB")
        found, wanted = theirs(picture, return_tensors="np")["pixel_values"][0], own(picture)
        # of an odd margin it crops the smaller half first, where open_clip rounds: one pixel to the left
        kept = slice(None, -1) if shift else slice(None)
        np.testing.assert_allclose(found[..., int(shift) :], wanted[..., kept], atol=1e-5)


def test_what_it_cannot_express_is_a_sentence():
    (fault,) = hub_files.processor_faults(Preprocess((32, 32), resize_mode="longest"), "web")
    assert "web: CLIPImageProcessor cannot fit a whole picture" in fault
    (fault,) = hub_files.processor_faults(Preprocess((32, 48)), "clip_model")
    assert "32 x 48 px" in fault and "clip_model" in fault
    assert list(hub_files.processor_faults(Preprocess((32, 48), resize_mode="squash"), "web")) == []


def test_a_config_is_replaced_only_by_the_layout_that_its_weights_belong_to(tmp_path):
    def found():
        return json.loads((tmp_path / "config.json").read_text())

    hub_files.write_config(tmp_path, {"a": 1}, over=False)
    assert found() == {"a": 1}
    hub_files.write_config(tmp_path, {"a": 2}, over=False)
    assert found() == {"a": 1}
    hub_files.write_config(tmp_path, {"a": 3})
    assert found() == {"a": 3}
