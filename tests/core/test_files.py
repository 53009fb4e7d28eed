import os
import stat

import pytest

from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import DataError, MismatchError


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def torn(aside):
        aside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_file(path, torn)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "out"
    with files.replaced_folder(folder) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(RuntimeError), files.replaced_folder(folder) as aside:
        (aside / "a").write_text("2")
        raise RuntimeError
    assert (folder / "a").read_text() == "1"
    with files.replaced_folder(folder) as aside:
        (aside / "b").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
        with files.replaced_folder(tmp_path / "d") as aside:
            (aside / "hidden").touch(0o600)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "d/hidden").stat().st_mode) == 0o640  # as a library may leave it


def test_json_has_stable_bytes(tmp_path):
    files.write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    files.write_json(tmp_path / "b", {"a": "ü", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert files.read_json(tmp_path / "a") == {"a": "ü", "b": 1}


def test_fingerprints_tell_apart_what_differs(tmp_path):
    import torch

    assert fingerprint.of_lines(["ab", "c"]) != fingerprint.of_lines(["a", "bc"])
    assert fingerprint.of_value({"a": 1, "b": 2}) == fingerprint.of_value({"b": 2, "a": 1})
    ones = torch.ones(2, 3)
    assert fingerprint.of_tensors({"a": ones}) != fingerprint.of_tensors({"a": ones.reshape(3, 2)})
    assert fingerprint.of_tensors({"a": ones}) != fingerprint.of_tensors({"a": ones.double()})
    assert fingerprint.of_tensors({"a": ones, "b": ones}) == fingerprint.of_tensors({"b": ones, "a": ones})
    strided = torch.arange(6.0).reshape(2, 3).t()
    assert fingerprint.of_tensors({"a": strided}) == fingerprint.of_tensors({"a": strided.contiguous()})
    (tmp_path / "x").write_bytes(b"abc")
    assert fingerprint.of_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_manifest_is_trusted_only_whole_and_of_its_kind(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(DataError, match="not finished"):
        manifest.read(tmp_path, "student", 1, "Train it.")
    manifest.write(tmp_path, "student", 1, {"dim": 3})
    read = manifest.read(tmp_path, "student", 1, "Train it.")
    assert read["dim"] == 3
    manifest.verify_files(tmp_path, read["files"], "Train it.")
    with pytest.raises(MismatchError, match=r"version does not match: expected 2, found 1\. Train it\."):
        manifest.read(tmp_path, "student", 2, "Train it.")
    (tmp_path / "a.bin").write_bytes(b"2")
    with pytest.raises(MismatchError, match=r"a\.bin: sha256"):
        manifest.verify_files(tmp_path, read["files"], "Train it.")
