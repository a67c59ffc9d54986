"""Sweeps: many runs from one file, on this machine or on a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.shared import AsJson, columns, failures, short, show

if TYPE_CHECKING:
    from workbench.sweep import Sweep

__all__ = ["sweep"]


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file; `studies/` has examples.")],
    results: Annotated[
        Path | None, typer.Option(help="The folder of results, instead of the file's own.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes here; by default one a GPU or a core. 0: none, one run after the other."),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="A Dask scheduler whose workers do it, such as tcp://host:8786.")
    ] = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run what failed before once more.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would run, and what it costs, from earlier runs.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what all of it costs, from the benchmark's figures alone.")
    ] = False,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(help="Another folder of results to estimate from; repeatable.", show_default=False),
    ] = None,
    benchmark: Annotated[Path, typer.Option(help="The folder of the benchmark's figures.")] = Path("figures"),
    as_json: AsJson = False,
) -> None:
    """Run a grid of experiments, merges or notebooks: what is stored is skipped, each result is stored as it comes.

    Ctrl-C lets the runs that have begun end; the same command goes on where it stopped. Several of them, on several
    machines, may share a folder of results. A run that fails is stored with its error, and the others go on.

    \b
    workbench sweep studies/nano/recycling.yaml --dry-run
    workbench sweep studies/nano/recycling.yaml --workers 2
    workbench results ls runs/recycling-nano

    Exit codes: 0 all runs are stored, 1 some failed or nothing could go on, 130 stopped by Ctrl-C.
    """
    from workbench.sweep import Sweep, run

    with failures():
        asked = Sweep.load(file)
        if dry_run or estimate:
            _told(asked, results or asked.results, earlier or [], benchmark, estimate, as_json)
            return
        try:
            report = run(
                asked,
                results=results,
                workers=workers,
                scheduler=scheduler,
                retry_failed=retry_failed,
                threads=threads,
                watch=True,
                say=lambda line: show([line], err=True),
            )
        except KeyboardInterrupt as error:  # a second one: at once
            raise typer.Exit(130) from error
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        show([report.text(results or asked.results)])
    raise typer.Exit(130 if report.stopped else 1 if report.failed or report.failed_before else 0)


def _told(
    asked: Sweep, folder: Path, earlier: list[Path], benchmark: Path, from_benchmark: bool, as_json: bool
) -> None:
    """Print the kinds of runs, how many of each are stored as far as their settings tell, and what the others cost."""
    from workbench.sweep.estimate import total
    from workbench.sweep.plan import outlook

    found, stored = outlook(asked, folder, [] if from_benchmark else earlier, benchmark, whole=from_benchmark)
    if as_json:
        rows = json.loads(found.to_json(orient="records"))
        typer.echo(json.dumps({"kinds": rows, "runs": len(asked.runs), "stored": stored}, indent=2))
        return
    titles = ("what", "n_train", "runs", "seconds each", "hours", "from")
    rows = [(r.kind, r.n_train or "", r.runs, short(r.seconds), short(r.hours), r.source) for r in found.itertuples()]
    show([*columns(titles, rows), "", f"{asked.name}: {len(asked.runs)} runs, {stored} of them stored in {folder}"])
    show([total(found) if len(found) else "nothing is left to run"])
