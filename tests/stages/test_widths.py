"""A run with embeddings that can be cut: trained, measured and loaded at every width."""

import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError
from clipdistill.evaluation import RetrievalReport
from clipdistill.report.terminal import summary
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.student import DualEncoder


@pytest.mark.slow
def test_a_run_with_several_widths(tmp_path):
    path = tiny.run_toml(tmp_path)
    workspace = Workspace(RunConfig.load(path, ["student.dims=[16, 8]"]), tmp_path / "out")
    report = run(workspace)
    found = RetrievalReport.from_json(report["evaluation"])
    pairings = {row.pairing for row in found.rows}
    assert pairings == {
        "teacher",
        "student",
        "student@8",
        "student_query_teacher_index",
        "student_query_teacher_index@8",
    }
    student = DualEncoder.load(workspace.student)
    assert student.dims == (16, 8)
    assert student.truncate(8).dim == 8
    metrics = (workspace.training / "metrics.jsonl").read_text(encoding="utf-8")
    assert "feature_image@8" in metrics
    assert any(
        "student@8" in str(cell)
        for table in summary(report)
        if hasattr(table, "columns")
        for cell in table.columns[0].cells
    )
    page = workspace.report_html.read_text(encoding="utf-8")
    assert "student at 8, exact search" in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.dims=[8, 16]"], r"student\.dims: must fall from the full width on, got \[8, 16\]"),
        (["student.dims=[16, 8]", "student.dim=24"], r"student\.dims: begins with 16, but student\.dim is 24"),
    ],
)
def test_widths_that_do_not_fall_are_refused(tmp_path, overrides, message):
    path = tiny.run_toml(tmp_path)
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(path, overrides)
