"""What the commands share: errors and their exit codes, tables, and text in which nothing of a stranger's steers the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from workbench.errors import SelectionError, WorkbenchError

__all__ = ["AsJson", "columns", "failures", "short", "show"]

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@contextmanager
def failures() -> Iterator[None]:
    """The package's errors, said on stderr: a wrong name is wrong usage, anything else failed at run time."""
    try:
        yield
    except WorkbenchError as error:
        show([str(error)], err=True)
        raise typer.Exit(2 if isinstance(error, SelectionError) else 1) from error


def short(value: float) -> str:
    """A number in three digits; empty for NaN."""
    return "" if value != value else f"{value:.3g}"


def columns(titles: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a table, its columns side by side."""
    from workbench.card import printable

    cells = [tuple(titles), *(tuple(printable(str(cell)) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def show(lines: Iterable[str], err: bool = False) -> None:
    """Print lines in which nothing of a stranger's steers the terminal."""
    from workbench.card import printable

    for line in lines:
        typer.echo(printable(line, 10_000), err=err)
