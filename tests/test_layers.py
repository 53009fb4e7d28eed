"""Imports only go down: a module may import its own package and lower layers, never its siblings or what is above."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "clipdistill"
LAYERS = (
    {"core"},
    {"config", "page"},
    {"data", "losses", "retrieval"},
    {"towers"},  # decodes pictures with data's code; the other sciences stay strangers
    {"cache", "evaluation", "search", "speed", "runtime", "compression", "formats"},
    {"training", "report", "serve", "publish"},
    {"stages", "doctor", "demo_teacher"},
    {"demo", "sweep"},
    {"cli"},
    {"__init__", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The package's own units that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "clipdistill" and len(part) > 1}
    return found


def test_every_unit_has_a_layer():
    assert {unit(path) for path in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_imports_only_go_down():
    wrong = [
        f"{path.relative_to(PACKAGE)} -> {target}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for target in sorted(imported(path) & set(LEVEL))
        if target != unit(path) and LEVEL[target] >= LEVEL[unit(path)]
    ]
    assert wrong == []


def test_the_check_sees_an_upward_import(tmp_path, monkeypatch):
    planted = tmp_path / "x.py"
    planted.write_text("def f():\n    from clipdistill.cli import main\n")
    assert imported(planted) == {"cli"}
