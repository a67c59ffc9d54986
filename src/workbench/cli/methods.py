"""The merging methods, the benchmark and a paper's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.shared import AsJson, columns, failures, short, show
from workbench.errors import WorkbenchError

__all__ = ["bench", "figures", "methods"]


def methods(
    name: Annotated[str, typer.Argument(help="One method, with all its options explained; all of them without.")] = "",
    as_json: AsJson = False,
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


def bench(
    area: Annotated[list[str] | None, typer.Option("--area", help="One area; repeatable. All of them without.")] = None,
    scale: Annotated[str, typer.Option(help="The model's size: nano, 1B or 8B; its weights are random.")] = "nano",
    device: Annotated[str, typer.Option(help="Where; by default a GPU where there is one.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small work, to see whether it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder to write the table (Parquet) and its figure to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast it is: ours beside the ways it is usually done, in one process, with ratios and peak memory."""
    from workbench.bench.run import AREAS, keep, run
    from workbench.usage import default_device

    with failures():
        where = device or default_device()
        table = run(area or AREAS, scale, where, quick=quick, say=lambda line: typer.echo(line, err=True))
    if out is not None:
        for path in keep(table, out):
            typer.echo(path, err=True)
    if as_json:
        typer.echo(table.to_json(orient="records", indent=2))
    else:
        titles = ("area", "work", "way", "each, s", "ratio", "peak, MiB", "TFLOP/s", "GB/s", "error")
        sizes = table.assign(peak=table["peak"] / 2**20, operations=table["operations"] / 1e12)
        sizes["traffic"] /= 1e9
        numbers = sizes[["each", "ratio", "peak", "operations", "traffic", "error"]].map(short)
        show(columns(titles, zip(*(table[name] for name in ("area", "work", "way")), *numbers.T.values, strict=True)))


def figures(
    name: Annotated[
        list[str] | None, typer.Option("--name", help="One figure; repeatable. All of them without.")
    ] = None,
    venue: Annotated[
        str, typer.Option(help="Whose widths: aaai, acl, cvpr, iclr, icml, ieee, jmlr, neurips, tmlr.")
    ] = "icml",
    data: Annotated[Path, typer.Option(help="The folder that the notebooks wrote their figures to.")] = Path("figures"),
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("figures/paper"),
) -> None:
    """Draw a paper's figures at a venue's widths from the data behind the notebooks' figures; nothing is computed anew."""
    from workbench.plots.paper import draw

    with failures():
        draw(name or (), data=data, out=out, venue=venue, say=typer.echo)
