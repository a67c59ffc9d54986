"""Stored results: listed, shown, compared, exported and gathered."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.shared import AsJson, columns, failures, show

if TYPE_CHECKING:
    import pandas as pd

    from workbench.results import Results

__all__ = ["results"]

results = typer.Typer(no_args_is_help=True, help="Stored results: list, show, compare, export and gather them.")

Folder = Annotated[Path, typer.Argument(help="The folder of results, as given to compare(…, results=…).")]
RUNS = ("key", "recipe", "notebook", "task", "seed", "accuracy", "loss", "seconds", "device", "written")
FAILED = ("key", "label", "error", "written")


@results.command("ls")
def ls(
    folder: Folder,
    where: Annotated[
        str,
        typer.Option(
            help="Only rows for which this SQL holds, such as \"method = 'ties' and seed < 3\"; a column that is called like "
            "a word of SQL stands in double quotes: '\"select\" = ...'."
        ),
    ] = "",
    chosen: Annotated[
        str, typer.Option("--columns", help="The columns, with commas between them; 'all' for all.")
    ] = "",
    failed: Annotated[bool, typer.Option("--failed", help="The runs that failed and are not stored by now.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder. Exit code 1 where there are none."""
    with failures():
        table = _open(folder).query(
            f"select * from {'failures' if failed else 'results'} {f'where {where}' if where else ''} order by written, key"
        )
    wanted = [name.strip() for name in chosen.split(",") if name.strip()] or list(FAILED if failed else RUNS)
    wanted = list(table) if wanted == ["all"] else wanted
    if chosen and (unknown := [name for name in wanted if name not in table]):
        raise typer.BadParameter(f"no column {unknown[0]!r}; there are {', '.join(table)}", param_hint="--columns")
    table = table[[name for name in wanted if name in table]]
    if as_json:
        typer.echo(table.to_json(orient="records", indent=2))
    else:
        show([*_lines(table), "", f"{len(table)} {'failures' if failed else 'runs'} in {folder}"])
    raise typer.Exit(0 if len(table) else 1)


@results.command("show")
def show_run(
    folder: Folder,
    key: Annotated[str, typer.Argument(help="The run's key, or as much of its beginning as no other has.")],
    as_json: AsJson = False,
) -> None:
    """Show all that is stored of one run, and how to run it again."""
    from workbench.again import again

    with failures():
        store = _open(folder)
        key = store.find(key)
        table = store.read([key]) if store.has(key) else store.failures().query("key == @key")
        facts = table.iloc[0].dropna().to_dict()
    lines = again(facts)
    if as_json:
        typer.echo(json.dumps(facts | {"again": lines}, indent=2, default=lambda value: value.item()))
        return
    text = facts.pop("traceback", "")
    width = max(map(len, facts))
    pairs = ((name, _time(value) if name == "written" else value) for name, value in facts.items())
    show(f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs)
    show(["", *text.splitlines()] if text else [])
    show(["", "To run it again:", "", *lines.splitlines()] if lines else [])


@results.command()
def diff(
    here: Folder,
    there: Annotated[Path, typer.Argument(help="The folder to compare it with.")],
    tolerance: Annotated[float, typer.Option(min=0, help="By how much numbers may differ.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Say which runs only one of two folders has, and in which columns the runs of both differ; exit code 1 where any do.

    What a run cost and where it was run are not compared.
    """
    with failures():
        table = _open(here).diff(_open(there), tolerance)
    if as_json:
        typer.echo(table.to_json(orient="records", indent=2))
    else:
        shown = [*_lines(table, 10), ""] if len(table) else []
        counts = table["status"].value_counts()
        runs = table.loc[table["status"] == "differs", "key"].nunique()
        only = f"{counts.get('only here', 0)} runs only in {here}, {counts.get('only there', 0)} only in {there}"
        show([*shown, f"{only}, {runs} that differ"])
    raise typer.Exit(1 if len(table) else 0)


@results.command()
def export(
    folder: Folder, file: Annotated[Path, typer.Argument(help="The file to write: .csv, .parquet or .json.")]
) -> None:
    """Write all runs of a folder to one file."""
    with failures():
        show([str(_open(folder).export(file))])


@results.command()
def compact(folder: Folder) -> None:
    """Gather the files of single runs into one, which is faster to read; others may write and read meanwhile."""
    with failures():
        show([str(_open(folder).compact() or f"nothing to gather in {folder}")])


def _open(folder: Path) -> Results:
    from workbench.errors import WorkbenchError
    from workbench.results import Results

    if not folder.is_dir():
        raise WorkbenchError(f"there is no folder {folder}")
    return Results(folder)


def _lines(table: pd.DataFrame, digits: int = 3) -> list[str]:
    """A table's lines: numbers in so many digits, the first line of a text."""

    def cell(name: str, value: object) -> str:
        if value is None:
            return ""
        if name == "written":
            return _time(value)
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value).partition("\n")[0]

    plain = table.astype(object).where(table.notna(), None)
    rows = plain.itertuples(index=False, name=None)
    return columns(list(table), (list(map(cell, table, row)) for row in rows))


def _time(value: object) -> str:
    return f"{datetime.fromtimestamp(float(value), UTC):%Y-%m-%d %H:%M:%S}Z"
