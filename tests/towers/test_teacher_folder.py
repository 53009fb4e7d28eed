import json

import numpy as np
import pytest
import torch
from training import live_teachers

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.towers.teacher import Teacher, load_teacher
from clipdistill.towers.teacher_folder import load_saved, save_teacher

TEXTS = ["a red bicycle", "a large flat cat in a picture"]


@pytest.fixture(params=["clip", "siglip"])
def trained(request, tmp_path):
    teacher = live_teachers.load(tmp_path / "original", request.param).copy()
    with torch.no_grad():
        for value in teacher.model.parameters():
            value.add_(0.01)
    return teacher


def test_what_is_saved_loads_as_the_same_teacher(trained, tmp_path):
    save_teacher(trained, tmp_path / "saved", {"from": "here"})
    for again in (load_teacher(f"local-dir:{tmp_path / 'saved'}"), load_saved(tmp_path / "saved")):
        assert again.fingerprint == trained.fingerprint
        assert (again.scale, again.bias) == (trained.scale, trained.bias)
        np.testing.assert_array_equal(again.encode_texts(TEXTS), trained.encode_texts(TEXTS))
    assert json.loads((tmp_path / "saved/manifest.json").read_text())["extra"] == {"from": "here"}


def test_a_copy_is_a_network_of_its_own(trained):
    other = trained.copy()
    assert other.fingerprint == trained.fingerprint
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    assert other.parts["weights"] != trained.parts["weights"]


def test_a_tampered_or_unfinished_folder_is_refused(trained, tmp_path):
    with pytest.raises(DataError, match="manifest"):
        load_saved(tmp_path / "original")
    save_teacher(trained, tmp_path / "saved")
    (tmp_path / "saved/open_clip_config.json").write_text("{}")
    with pytest.raises(MismatchError, match="sha256"):
        load_saved(tmp_path / "saved")


def test_a_teacher_without_a_name_cannot_be_saved(trained, tmp_path):
    nameless = Teacher(trained.model, trained.transform, trained.tokenizer, name="mine")
    with pytest.raises(ConfigError, match="mine: it is no open_clip model by name"):
        save_teacher(nameless, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
