"""The public face is frozen: names, signatures, verbs. A change here is made on purpose."""

import inspect
import json
import subprocess
import sys

import clipdistill

SIGNATURES = {
    "distill": "student cache data objective train seed folder on_eval resume fingerprint on_log extras facts live "
    "mutual",
    "evaluate": "encoder pairs name teacher index ks seed to_teacher",
}
VERBS = [
    "cache",
    "compress",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "index",
    "inspect",
    "publish",
    "report",
    "run",
    "search",
    "serve",
    "sweep",
    "train",
    "verify",
]


def test_the_public_names():
    assert clipdistill.__all__ == [
        "Classifier",
        "DualEncoder",
        "RetrievalReport",
        "RunConfig",
        "Searcher",
        "TeacherCache",
        "VectorIndex",
        "distill",
        "evaluate",
        "__version__",
    ]
    for name in clipdistill.__all__:
        assert getattr(clipdistill, name) is not None
    assert set(clipdistill.__all__) <= set(dir(clipdistill))


def test_the_signatures():
    for name, arguments in SIGNATURES.items():
        found = inspect.signature(getattr(clipdistill, name)).parameters
        assert " ".join(found) == arguments, name


def test_the_methods():
    expected = {
        "Classifier": "load classify probabilities names save",
        "DualEncoder": "encode_images encode_texts save load dim fingerprint",
        "VectorIndex": "build search save load",
        "TeacherCache": "open image_rows text_rows check_teacher check_data probe",
        "Searcher": "by_text by_picture",
        "RetrievalReport": "value to_json from_json table merge",
        "RunConfig": "load parse to_toml",
    }
    for name, methods in expected.items():
        for method in methods.split():
            assert hasattr(getattr(clipdistill, name), method), f"{name}.{method}"


def test_the_verbs():
    from clipdistill.cli import app

    assert sorted(command.callback.__name__ for command in app.registered_commands) == VERBS


def test_importing_it_is_light_and_help_imports_no_torch():
    script = (
        "import sys, json, clipdistill, clipdistill.cli, clipdistill.config;"
        "print(json.dumps([m for m in ('torch', 'open_clip', 'numpy', 'faiss', 'PIL') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
