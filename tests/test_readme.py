"""The README tells the truth: its tables are made from the committed results, its configuration and commands work."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.stages.inputs import name_checks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language; those without one are commands."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for found, text in fences if found == language]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")))
def test_the_tables_are_those_of_the_committed_results(name):
    done = subprocess.run(
        [sys.executable, "-c", "import sys, bars; print(bars.table(sys.argv[1]))", name],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", README, re.S)
    assert found is not None
    assert found.group(1).strip() == done.stdout.strip()


def test_the_demo_has_a_committed_result():
    assert (ROOT / "benchmarks" / "results" / "demo.json").is_file()


def test_the_configuration_is_valid(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "run.toml").write_text(blocks("toml")[0], encoding="utf-8")
    config = RunConfig.load(tmp_path / "run.toml", checks=[name_checks])
    assert config.teacher.model == "ViT-L-14"
    assert RunConfig.load(tmp_path / "run.toml", ["train.lr=3e-4", "loss.preset=clip_kd"]).loss.preset == "clip_kd"


@pytest.mark.parametrize("number", range(1, len(blocks("toml"))))
def test_the_further_sections_fit_the_first_configuration(tmp_path, number):
    (tmp_path / "pictures").mkdir()
    raw = {**tomllib.loads(blocks("toml")[0]), **tomllib.loads(blocks("toml")[number])}
    RunConfig.parse(raw, tmp_path, checks=[name_checks])


def test_every_command_names_a_verb_that_exists():
    from clipdistill.cli import app

    verbs = {command.callback.__name__ for command in app.registered_commands}
    commands = "\n".join(blocks(""))
    used = re.findall(r"^(?:\S*/)?clipdistill (\w+)", commands, re.M)
    assert len(used) >= 5
    assert set(used) <= verbs


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", README)) <= targets


def test_its_source_forms_are_read(tmp_path):
    for name in ("pictures", "folder"):
        tiny.image_folder(tmp_path / name, 2)
    for name in ("a.csv", "b.csv", "pairs.csv", "queries.txt"):
        (tmp_path / name).touch()
    forms = re.findall(r"\| `train = (.+?)`(?:,|\s*\|)", README)
    assert len(forms) >= 6
    for form in forms:
        if "*" in form or "{0000" in form or "dataset_coco" in form:
            continue  # their files are made by the readers' own tests
        (tmp_path / "run.toml").write_text(f'name = "a"\n[data]\ntrain = {form}\n[teacher]\nmodel = "ViT-B-32"\n')
        assert RunConfig.load(tmp_path / "run.toml").data.train


@pytest.mark.slow
def test_the_python_examples_run(tmp_path):
    """On a small run in place of the demo's."""
    tiny.run_toml(tmp_path)
    for verb, *more in (("run",), ("export", 'export.layouts=["onnx"]')):
        call = [sys.executable, "-m", "clipdistill", verb, "run.toml", *more, "--out", "runs/demo"]
        subprocess.run(call, cwd=tmp_path, check=True, capture_output=True)
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert len(done.stdout.splitlines()) == 5, done.stderr
