"""The notebooks' commands: which there are, what parameters they take, and a run at other ones."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from workbench.cli.shared import AsJson, columns, failures, show
from workbench.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["notebooks"]

notebooks = typer.Typer(no_args_is_help=True, help="The numbered notebooks: list them, their parameters, and run one.")

Folder = Annotated[Path, typer.Option(help="Where the notebooks lie.")]
Name = Annotated[str, typer.Argument(help="The notebook's number, such as 03, or the beginning of its file name.")]


class _Pairs(TyperCommand):
    """A command whose option -p takes two words each time, a name and a value, as papermill's does."""

    def __init__(self, *arguments, params, **more):
        for one in params:
            if one.name == "parameters":
                one.nargs = 2
        super().__init__(*arguments, params=params, **more)


@notebooks.command("list")
def list_(folder: Folder = Path("notebooks"), as_json: AsJson = False) -> None:
    """List the notebooks with the question that each asks."""
    from workbench.notebooks import find, read, title_of

    with failures():
        rows = [(path.stem, title_of(read(path))) for path in find(folder)]
    if as_json:
        typer.echo(json.dumps([{"notebook": name, "title": title} for name, title in rows], indent=2))
    else:
        show(columns(("notebook", "question"), rows))
    raise typer.Exit(0 if rows else 1)


@notebooks.command()
def params(name: Name, folder: Folder = Path("notebooks"), as_json: AsJson = False) -> None:
    """Say what parameters a notebook takes: the default, what values may be, and what it is."""
    from workbench.notebooks import describe

    with failures():
        path = _one(folder, name)
        rows = describe(path)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    show(columns(("name", "default", "expected"), [(r["name"], json.dumps(r["default"]), r["kind"]) for r in rows]))
    show(["", *(f"{row['name']}: {row['help']}" for row in rows if row["help"])])
    first = next(row for row in rows if row["name"] in ("k", "n_test", "seed") or row is rows[-1])
    setting = f"-p {first['name']} {json.dumps(first['default'])}"
    show(["", f"papermill --cwd {folder} {path} runs/{path.name} {setting} -p out ../runs/figures"])


@notebooks.command(cls=_Pairs)
def run(
    name: Name,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", parser=tuple, metavar="NAME VALUE", help="One parameter; lists as JSON; repeatable."
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("-y", "--yaml", metavar="YAML", help="Several, as YAML: '{k: 5, seeds: [0, 1]}'."),
    ] = None,
    to: Annotated[Path, typer.Option(help="The folder of the executed copy.")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="The folder of the figures; by default figures/ below --to.")] = None,
    folder: Folder = Path("notebooks"),
    as_json: AsJson = False,
) -> None:
    """Run a notebook at other parameters into a copy, and show the numbers that it records. The parameters are checked first."""
    from workbench.notebooks import recorded
    from workbench.notebooks import run as run_notebooks

    with failures():
        path = _one(folder, name)
        given = _given(mapping or (), parameters or ())
        with redirect_stdout(sys.stderr):
            failed = run_notebooks([path], to, out, given=given)
        copy = to / path.name
        found = recorded(copy) if not failed else {}
    if as_json:
        typer.echo(json.dumps({"copy": str(copy), "error": failed.get(path.stem), "recorded": found}, indent=2))
    elif not failed:
        show([*columns(("recorded", "value"), found.items()), "", f"the executed copy: {copy}"])
    raise typer.Exit(1 if failed else 0)


def _one(folder: Path, name: str) -> Path:
    """The one notebook whose file name starts so."""
    from workbench.notebooks import find

    found = find(folder, [name])
    if len(found) != 1:
        raise ParameterError(f"{name!r} begins the names of {[path.stem for path in found]}; say which one")
    return found[0]


def _given(mappings: Sequence[str], pairs: Sequence[Sequence[str]]) -> dict[str, object]:
    """What the options say, -p before -y; values are YAML."""
    import yaml

    given: dict[str, object] = {}
    try:
        for one in mappings:
            found = yaml.safe_load(one)
            if not isinstance(found, dict):
                raise ParameterError(f"-y takes a mapping of parameters, such as '{{k: 5}}'; got {one!r}")
            given |= found
        return given | {name: yaml.safe_load(value) for name, value in pairs}
    except yaml.YAMLError as error:
        raise ParameterError(f"what -p and -y take is YAML: {error}") from error
