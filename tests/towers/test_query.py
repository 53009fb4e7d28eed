"""A student that is a text tower alone: what it embeds and saves, and the whole model it makes with its teacher."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import tiny
import torch
from safetensors.torch import load_file

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.pictures import decode
from clipdistill.towers.build import build_query_student, student_faults
from clipdistill.towers.combined import save_combined, teacher_model_cfg
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import load_teacher

TEXTS = [tiny.caption(number) for number in range(30)] + ["", "🦊 中文", "a very long caption about a cat " * 20]
SEARCHES = SearchedTeacher("big", "f" * 64)


def build(**changes):
    options = {"text": "nano", "dim": 24, "teacher_dim": 24, "text_init": "random", "texts": TEXTS, "seed": 5}
    return build_query_student(**{**options, "searches": SEARCHES, **changes})


@pytest.fixture(scope="module")
def student():
    return build()


@pytest.fixture(scope="module")
def projected():
    return build(dim=16)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return tiny.teacher_folder(tmp_path_factory.mktemp("teachers") / "big")


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_teacher(f"local-dir:{teacher_folder}")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_it_embeds_texts_alone_and_a_picture_is_the_teachers(student):
    rows = student.encode_texts(TEXTS)
    assert rows.shape == (33, 24)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    assert not [name for name in student.model.state_dict() if not name.startswith(("text.", "logit_scale"))]
    pictures = [pair.picture for pair in tiny.pairs(2)]
    for embed in (lambda: student.encode_images(pictures), lambda: student.embed_pixels(torch.zeros(1, 3, 8, 8))):
        with pytest.raises(DataError, match="pictures are embedded by the teacher big"):
            embed()


def test_the_text_tower_is_the_one_of_open_clip_itself(student):
    cfg = {**student.model_cfg, "vision_cfg": tiny.model_cfg()["vision_cfg"]}
    model = open_clip.model.CustomTextCLIP(**{key: value for key, value in cfg.items() if key != "custom_text"})
    text = {name: value for name, value in student.model.state_dict().items() if name.startswith("text.")}
    found = model.load_state_dict(text, strict=False)
    assert not found.unexpected_keys
    assert {name.split(".")[0] for name in found.missing_keys} == {"visual", "logit_scale"}
    with torch.no_grad():
        theirs = model.eval().encode_text(torch.from_numpy(student.tokenizer.encode(TEXTS)), normalize=True).numpy()
    assert np.abs(student.encode_texts(TEXTS) - theirs).max() < 1e-5


@pytest.mark.parametrize("dim", [24, 16])
def test_what_is_saved_is_what_is_loaded(dim, tmp_path):
    student = build(dim=dim)
    student.set_scale(42.0, -3.0)
    student.save(tmp_path / "it", {"run": "test"})
    found = DualEncoder.load(tmp_path / "it")
    assert found.searches == SEARCHES
    assert (found.dim, found.teacher_dim, found.parameters) == (dim, 24, student.parameters)
    assert found.fingerprint == student.fingerprint
    rows = student.to_teacher_vectors(student.encode_texts(TEXTS), "text")
    assert np.array_equal(found.to_teacher_vectors(found.encode_texts(TEXTS), "text"), rows)
    assert rows.shape == (33, 24)
    assert found.model.logit_scale.exp().item() == pytest.approx(42)
    assert found.model.logit_bias.item() == -3
    manifest = json.loads((tmp_path / "it/manifest.json").read_text())
    assert manifest["kind"] == "query-student"
    assert set(load_file(tmp_path / "it/open_clip_model.safetensors")) == set(student.model.state_dict())
    assert (tmp_path / "it/tokenizer.json").is_file()
    assert (tmp_path / "it/projection.safetensors").exists() == (dim == 16)


def test_another_teacher_written_into_a_saved_student_is_found_out(student, tmp_path):
    student.save(tmp_path / "it")
    path = tmp_path / "it/open_clip_config.json"
    path.write_text(path.read_text().replace("f" * 64, "e" * 64))
    with pytest.raises(MismatchError, match=r"open_clip_config\.json: sha256"):
        DualEncoder.load(tmp_path / "it")


def test_a_folder_of_another_kind_is_refused_with_both_kinds(student, tmp_path):
    student.save(tmp_path / "it")
    path = tmp_path / "it/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "index"}))
    with pytest.raises(MismatchError, match="kind does not match: expected student or query-student, found index"):
        DualEncoder.load(tmp_path / "it")


def test_the_map_to_the_teacher_has_no_picture_side(projected):
    assert list(projected.projection) == ["text"]
    assert projected.teacher_dim == 24
    rows = torch.eye(24)
    assert projected.to_teacher(rows, "image") is rows


def test_it_is_a_function_of_its_arguments_and_the_vocabulary_is_pruned(student, teacher):
    assert build().fingerprint == student.fingerprint
    assert build(seed=6).fingerprint != student.fingerprint
    inherited = build(text_init="inherit", teacher=teacher)
    assert inherited.tokenizer.vocab_size < 1500
    assert inherited.model.state_dict()["text.token_embedding.weight"].shape[1] == 192


def test_choices_that_do_not_go_together_are_refused():
    for match, changes in (
        (r"student\.text_init", {"text_init": "inherit"}),
        (r"student\.pretrained: 'openai' is for a pretrained text tower", {"pretrained": "openai"}),
        (r"student\.text: unknown", {"text": "nanoo"}),
    ):
        with pytest.raises(ConfigError, match=match):
            build(**changes)
    assert list(student_faults("teacher", "nano")) == []
    assert "did you mean 'teacher'" in next(student_faults("teacherr", "nano"))


# --- the whole model -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [24, 16])
def test_open_clip_loads_the_teachers_pictures_with_the_students_texts(dim, teacher, teacher_folder, tmp_path):
    student = build(dim=dim, text_init="inherit", teacher=teacher)
    student.set_scale(33.0)
    name = f"local-dir:{teacher_folder}"
    save_combined(tmp_path / "it", student, teacher.model, teacher_model_cfg(name))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'it'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'it'}")
    pictures = [pair.picture for pair in tiny.pairs(5)]
    pixels = torch.stack([transform(decode(picture.read(), 10**6, "x")) for picture in pictures])
    with torch.no_grad():
        images = model.eval().encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    assert np.array_equal(images, teacher.encode_images(pictures))
    own = student.to_teacher_vectors(student.encode_texts(TEXTS), "text")
    assert np.abs(unit(texts) - own).max() < 1e-5
    assert model.logit_scale.exp().item() == pytest.approx(33)


def test_the_teachers_activation_is_taken_however_it_came_by_it(teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "quick")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    quick = load_teacher(f"local-dir:{folder}")
    student = build(teacher=quick)
    assert student.model_cfg["quick_gelu"] is True
    save_combined(tmp_path / "it", student, quick.model, config["model_cfg"])
    # One that has the other activation would change what the pictures' tower gives, and is not written.
    with pytest.raises(ConfigError, match="activations"):
        save_combined(tmp_path / "other", build(), quick.model, config["model_cfg"])
    assert not (tmp_path / "other").exists()


def test_a_tower_that_its_configuration_does_not_make_is_not_written(student, teacher, teacher_folder, tmp_path):
    cfg = teacher_model_cfg(f"local-dir:{teacher_folder}")
    deeper = {**cfg, "vision_cfg": {**cfg["vision_cfg"], "layers": 2}}
    with pytest.raises(ConfigError, match="cannot be rebuilt from its configuration"):
        save_combined(tmp_path / "it", student, teacher.model, deeper)
    for wrong in ({"embed_dim": 24}, {**cfg, "multimodal_cfg": {}}):
        with pytest.raises(ConfigError, match="does not stand alone"):
            save_combined(tmp_path / "it", student, teacher.model, wrong)
    assert not (tmp_path / "it").exists()
    with pytest.raises(ConfigError, match="hf-hub:a/b is not at hand"):
        teacher_model_cfg("hf-hub:a/b")
    assert teacher_model_cfg("ViT-B-32")["embed_dim"] == 512
