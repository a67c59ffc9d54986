"""What the commands share: errors and their exit codes, tables, and text in which nothing of a stranger's steers the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from workbench.errors import ParameterError, SelectionError, WorkbenchError

__all__ = ["AsJson", "columns", "failures", "options_of", "short", "show"]

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@contextmanager
def failures(usage: bool = False) -> Iterator[None]:
    """The package's errors, said on stderr: a wrong name is wrong usage, anything else failed at run time.

    `usage`: what is checked inside are arguments, so that all of it is wrong usage.
    """
    try:
        yield
    except WorkbenchError as error:
        show([str(error)], err=True)
        raise typer.Exit(2 if usage or isinstance(error, SelectionError | ParameterError) else 1) from error
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk that is full, a folder that may not be written to
        show([str(error)], err=True)
        raise typer.Exit(1) from error


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


def options_of(pairs: Sequence[str] | None, apart: Mapping[str, str] | None = None) -> dict[str, object]:
    """`name=value` pairs as a method's options: values are read as JSON or YAML, lists as tuples, None as nothing.

    Args:
        apart: names that have a command-line option of their own, name → that option.
    """
    found: dict[str, object] = {}
    for pair in pairs or ():
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals):
            raise typer.BadParameter(f"an option of a method is name=value, such as density=0.2; got {pair!r}")
        if name in found:
            raise typer.BadParameter(f"{name} is given twice")
        if own := (apart or {}).get(name):
            raise typer.BadParameter(f"{name} is no option of a method; use {own}")
        found[name] = _value(name, text)
    return found


def _value(name: str, text: str):
    """JSON first: YAML takes 1e-3 for a text."""
    import yaml

    try:
        return _plain(json.loads(text))
    except ValueError:
        pass
    try:
        return None if text == "None" else _plain(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{name}: {text!r} is neither JSON nor YAML") from error


def _plain(value):
    return tuple(map(_plain, value)) if isinstance(value, list) else value
