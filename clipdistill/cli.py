"""The command line: verbs to stages, errors to exit codes, nothing else. ``--help`` imports no torch."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdistill.core.errors import EXIT_FAILED, ConfigError, DataError, MismatchError, MissingExtraError, ParityError

if TYPE_CHECKING:
    from clipdistill.stages.workspace import Workspace

app = typer.Typer(
    name="clipdistill",
    help="Distil large CLIP-style models into small dual encoders, and prove it with retrieval recall.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_EXPECTED = (ConfigError, DataError, MismatchError, ParityError, MissingExtraError)
_INTERRUPTED = 130

Run = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's configuration.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; runs/NAME when not given.")]
Force = Annotated[bool, typer.Option("--force", help="Make it again although it is done.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    # Before torch is loaded. Threads that spin while they wait lose two to ten times the speed as soon as another
    # process wants a core; sleeping ones cost nothing measurable on a quiet machine. Results do not depend on it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clipdistill").setLevel(logging.INFO)
    try:
        app(standalone_mode=True)
    except _EXPECTED as fault:
        _say(f"error: {fault}")
        sys.exit(fault.exit_code)
    except KeyboardInterrupt:
        _say("interrupted; start the same command again and it goes on from what is done")
        sys.exit(_INTERRUPTED)
    except OSError as fault:
        _say(f"error: {fault.filename or ''}: {fault.strerror or fault}")
        sys.exit(EXIT_FAILED)


@app.command()
def demo(overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False) -> None:
    """Run the whole job on the embedded data, compress and export, and hold the figures against their bars."""
    from clipdistill.demo import BARS, run_demo
    from clipdistill.report.compression import budget_summary
    from clipdistill.report.lines import bar_lines
    from clipdistill.report.terminal import summary

    outcome = run_demo(overrides or [], out or Path("runs/demo"), force=force)
    _print(*summary(outcome.report), "", *budget_summary(outcome.budget), "", *outcome.exported.lines())
    _print("verify: every layout loaded again, all files as they were written", "")
    _print(*bar_lines(outcome.figures, BARS))
    _say_paths(outcome.workspace)
    _finish(outcome.figures, as_json)
    if outcome.missed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def run(config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False) -> None:
    """Do the whole job: cache, train, index, evaluate, report. What is already done is kept."""
    from clipdistill.report.terminal import summary
    from clipdistill.stages.run import run_all

    workspace = _workspace(config, overrides, out)
    report = run_all(workspace, force=force)
    _print(*summary(report))
    _say_paths(workspace)
    _finish(report, as_json)


@app.command()
def inspect(config: Run, overrides: Overrides = None, out: Out = None, as_json: Json = False) -> None:
    """Say what the data hold and what the run will cost, before anything expensive runs."""
    from clipdistill.report.lines import inspection_lines
    from clipdistill.stages.inputs import check_limit, load_data
    from clipdistill.stages.inspect import inspect as inspect_run

    workspace = _workspace(config, overrides, out)
    data = load_data(workspace, limit=False)
    found = inspect_run(workspace, data)
    _print(*inspection_lines(found, workspace.rejected))
    _finish(found, as_json)
    check_limit(workspace, data, data.rejected)


@app.command()
def cache(
    config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Embed all pictures and texts with the teacher, once."""
    _stage("cache", config, overrides, out, force, as_json)


@app.command()
def train(
    config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Distil the student; goes on from its last checkpoint."""
    _stage("train", config, overrides, out, force, as_json)


@app.command()
def evaluate(
    config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Measure the student's recall against the ground truth and against the teacher's rankings."""
    from clipdistill.report.terminal import summary
    from clipdistill.stages.run import run as run_until

    report = run_until(_workspace(config, overrides, out), until="evaluate", force=force)
    _print(*summary(report))
    _finish(report, as_json)


@app.command()
def index(
    config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Build the FAISS index over the student's picture embeddings; over the teacher's for a text tower alone."""
    _stage("index", config, overrides, out, force, as_json)


@app.command()
def compress(
    config: Run, overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Find the smallest towers and index that keep compress.target, export them, and say what each step costs."""
    from clipdistill.report.compression import budget_summary
    from clipdistill.stages.run import run as run_until

    workspace = _workspace(config, overrides, out)
    budget = run_until(workspace, until="compress", force=force)
    _print(*budget_summary(budget), f"compressed: {workspace.compressed}")
    _finish(budget, as_json)
    if not budget["met"]:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def search(
    config: Run,
    query: Annotated[str, typer.Argument(help="A text, or the path of a picture.")],
    overrides: Overrides = None,
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Find the pictures nearest to a text or to a picture."""
    from clipdistill.stages.index import search as search_index

    hits = search_index(_workspace(config, overrides, out), query, k)
    width = max((len(hit.key) for hit in hits), default=0)
    _print(*(f"{hit.rank:3d}  {hit.key:<{width}}  {hit.score:.4f}" for hit in hits))
    _finish([{"rank": hit.rank, "key": hit.key, "score": hit.score} for hit in hits], as_json)


@app.command()
def sweep(config: Run, overrides: Overrides = None, out: Out = None, as_json: Json = False) -> None:
    """Train the run again and again with some keys changed, and say which of them matter.

    Start the command several times with one --out for several workers; start it again to go on after a kill.
    """
    from clipdistill.sweep import run_sweep, sweep_lines

    base, workspace = config.parent.resolve(), _workspace(config, overrides, out)
    result = run_sweep(workspace.config, workspace.folder, base)
    _print(*sweep_lines(result), f"report: {workspace.folder / 'sweep.html'}")
    _finish(result, as_json)
    if not any(trial["state"] == "complete" for trial in result["trials"]):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def report(config: Run, overrides: Overrides = None, out: Out = None, as_json: Json = False) -> None:
    """Write the run's report page from its measured figures."""
    from clipdistill.stages.run import make_report

    workspace = _workspace(config, overrides, out)
    make_report(workspace)
    _print(f"report: {workspace.report_html}")
    _finish({"report": str(workspace.report_html)}, as_json)


@app.command()
def publish(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="A saved index, or a .npy file with --ids.")],
    to: Annotated[str, typer.Option("--to", help="pgvector, lancedb or qdrant.")],
    url: Annotated[
        str,
        typer.Option("--url", envvar="CLIPDISTILL_PUBLISH_URL", help="The database; LanceDB and Qdrant: or a folder."),
    ],
    table: Annotated[str, typer.Option("--table", help="The table or collection; made where it is missing.")],
    ids: Annotated[Path | None, typer.Option("--ids", help="The keys of a .npy file, one a line.")] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="The fingerprint of a .npy file's encoder.")] = None,
    halfvec: Annotated[bool, typer.Option("--halfvec", help="Store float16 (pgvector).")] = False,
    no_index: Annotated[bool, typer.Option("--no-index", help="Build no approximate index.")] = False,
    m: Annotated[int, typer.Option("--m", help="HNSW: links a node.")] = 16,
    ef_construction: Annotated[int, typer.Option("--ef-construction", help="HNSW: effort of building.")] = 64,
    batch: Annotated[int, typer.Option("--batch", help="Rows a transaction.")] = 1000,
    as_json: Json = False,
) -> None:
    """Bring vectors with their keys into a database. Start it again after an interruption: it goes on by key."""
    from clipdistill.publish.databases import publish_to, read_rows
    from clipdistill.publish.target import Layout

    rows = read_rows(index, ids, encoder)
    layout = Layout(
        table, rows.dim, rows.encoder, half=halfvec, index=not no_index, m=m, ef_construction=ef_construction
    )
    done = asdict(publish_to(rows, to, url, layout, batch))
    _print(*(f"{name}: {'none' if value is None else value}" for name, value in done.items()))
    _finish(done, as_json)


@app.command()
def export(
    config: Run,
    overrides: Overrides = None,
    out: Out = None,
    to: Annotated[Path | None, typer.Option("--to", help="The export's folder; RUN/export when not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write the student in the layouts that other libraries read, each proved by loading it with them."""
    from clipdistill.stages.export import export_run

    made = export_run(_workspace(config, overrides, out), to)
    _print(*made.lines())
    _finish(made.to_json(), as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder.")], as_json: Json = False
) -> None:
    """Compare an export's files with their SHA-256, and load each of its layouts again."""
    from clipdistill.formats import verify as verify_export

    found = verify_export(folder)
    _print(*found.lines())
    _finish(found.to_json(), as_json)


@app.command()
def serve(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder.")],
    index: Annotated[
        list[Path] | None,
        typer.Option(
            "--index", help="An index of its student, EXPORT/index if not given; each further one: a variant."
        ),
    ] = None,
    dim: Annotated[
        list[int] | None, typer.Option("--dim", help="A variant of so many leading dimensions; may be repeated.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", help="Another student of the same pictures, EXPORT or EXPORT=INDEX; may be repeated."
        ),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="The indexed pictures' folder, or the run's: thumbnails.")
    ] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="Another export, shown beside it.")] = None,
    compare_index: Annotated[
        Path | None, typer.Option("--compare-index", help="The other export's index; COMPARE/index if not given.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="A run's folder: its teacher is shown beside (loads PyTorch).")
    ] = None,
    teacher_index: Annotated[
        Path | None, typer.Option("--teacher-index", help="The teacher's index; the run's cache if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name; the folder's when not given.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16 or int8; if not given fp32, or what an export holds.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port; 0: any free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name that requests' Host may say; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Of ONNX Runtime and PyTorch; 0: their own choice.")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Texts or pictures encoded together at most.")] = 32,
    window_ms: Annotated[float, typer.Option("--window-ms", help="How long a batch waits for company.")] = 2.0,
    waiting: Annotated[int, typer.Option("--waiting", help="Texts or pictures that may wait; then 503.")] = 512,
) -> None:
    """Serve an export over HTTP: search, embeddings, and the search page. SIGTERM finishes what has begun."""
    from clipdistill.serve.options import Options
    from clipdistill.stages.serve import Served
    from clipdistill.stages.serve import serve as serve_export

    options = Options(batch=batch, window_ms=window_ms, waiting=waiting, hosts=tuple(allow_host or ()))
    first, further = (index[0], index[1:]) if index else (None, [])
    served = Served(
        export,
        first,
        name=name,
        pictures=pictures,
        compare=compare,
        compare_index=compare_index,
        precision=precision,
        threads=threads,
        indexes=tuple(further),
        dims=tuple(dim or ()),
        variants=tuple(variant or ()),
        teacher=teacher,
        teacher_index=teacher_index,
    )
    serve_export(served, options, host, port)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation can do, and what is missing."""
    from clipdistill.doctor import examine

    checks = examine()
    width = max(len(check.name) for check in checks)
    _print(*(f"{'ok ' if check.ok else 'BAD'}  {check.name:<{width}}  {check.found}" for check in checks))
    _finish([{"name": c.name, "ok": c.ok, "found": c.found} for c in checks], as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_FAILED)


def _stage(name: str, config: Path, overrides: list[str] | None, out: Path | None, force: bool, as_json: bool) -> None:
    from clipdistill.stages.run import run as run_until

    made = run_until(_workspace(config, overrides, out), until=name, force=force)
    _print(*(f"{key}: {value}" for key, value in made.items() if not isinstance(value, dict)))
    _finish(made, as_json)


def _workspace(config: Path, overrides: list[str] | None, out: Path | None) -> Workspace:
    from clipdistill.config import RunConfig
    from clipdistill.stages.inputs import name_checks
    from clipdistill.stages.workspace import Workspace

    return Workspace.of(RunConfig.load(config, overrides or [], checks=[name_checks]), out)


def _say_paths(workspace: Workspace) -> None:
    _print(f"student: {workspace.student}", f"report:  {workspace.report_html}")


def _print(*items: Any) -> None:
    """Print lines or rich tables to standard output; wide enough in a log that no table is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, soft_wrap=True)
    for item in items:
        console.print(item)


def _finish(value: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
