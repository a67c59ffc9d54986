"""The command line: each command is one call into the package."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from workbench.errors import WorkbenchError

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Are other people's LoRA adapters worth recycling?"
)


@app.callback()
def _main() -> None:
    """Are other people's LoRA adapters worth recycling?"""


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="One method, with all its options explained; all of them without.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the merging methods: what each returns, its options, the invariances that it keeps, its paper."""
    from workbench.merge import describe

    try:
        found = describe(name or None)
    except WorkbenchError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_words(one, bool(name)) for one in found))


def _words(one: dict, full: bool) -> str:
    kept = ", ".join(one["invariances"]) or "none"
    lines = [
        f"{one['name']}  ({one['result']}{', ' + one['takes'] if one['takes'] else ''}{', needs ' + one['needs'] if one['needs'] else ''})",
        f"    {one['summary']}",
        *(f"    {key} = {option['default']!r}: {option['accepts']}" for key, option in one["options"].items()),
        f"    invariant to: {kept}",
        f"    {one['paper']}",
    ]
    return "\n".join([*lines, "", one["documentation"]] if full else lines)
