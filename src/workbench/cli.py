"""The command line: each command is one call into the package. What strangers wrote is shown escaped.

Exit codes: 0 fine, 1 nothing was accepted or it failed at run time, 2 wrong usage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from workbench.errors import SelectionError, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.screen import Checked

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Are other people's LoRA adapters worth recycling?"
)

pool = typer.Typer(no_args_is_help=True, help="Other people's adapters of a base: list, screen and fetch them.")
app.add_typer(pool, name="pool")

Base = Annotated[str, typer.Argument(help="The base model's id on the Hub, such as meta-llama/Llama-3.1-8B-Instruct.")]
Alias = Annotated[
    list[str] | None, typer.Option("--alias", help="Another name of the same weights, such as a re-upload; repeatable.")
]
Quantised = Annotated[bool, typer.Option("--quantised", help="Also adapters of the base's 4-bit forms (-bnb-4bit).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many, the most downloaded.")]
Rules = Annotated[
    str, typer.Option(help="The rules: 'default', 'study' (the recycling study's), or names with commas between them.")
]
Without = Annotated[list[str] | None, typer.Option("--without", help="A rule to switch off; repeatable.")]
Cache = Annotated[Path | None, typer.Option(help="Where files are kept; by default the Hub client's own cache.")]
Offline = Annotated[bool, typer.Option("--offline", help="Ask nothing of the Hub; as does HF_HUB_OFFLINE=1.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


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


@pool.command()
def scan(
    base: Base, alias: Alias = None, quantised: Quantised = False, limit: Limit = None, as_json: AsJson = False
) -> None:
    """List the adapters of a base that the Hub knows, with what their cards say. Nothing is downloaded."""
    from dataclasses import asdict

    from workbench.hub import discover

    with _failures():
        repos = discover(_id(base), aliases=alias or (), quantised=quantised, limit=limit)
    if as_json:
        typer.echo(json.dumps([asdict(repo) for repo in repos], indent=2))
    else:
        titles = ("adapter", "created", "downloads", "likes", "licence", "gated", "datasets")
        rows = [
            (r.id, r.created, r.downloads, r.likes, r.licence, "yes" if r.gated else "", ",".join(r.datasets))
            for r in repos
        ]
        _print([*_columns(titles, rows), "", f"{len(repos)} adapters of {base}"])
    raise typer.Exit(0 if repos else 1)


@pool.command()
def screen(
    source: Annotated[str, typer.Argument(help="'nano', a folder of adapter folders, or hub:BASE.")],
    rules: Rules = "default",
    without: Without = None,
    explain: Annotated[str, typer.Option(metavar="NAME", help="What each rule says of this one adapter.")] = "",
    base: Annotated[str | None, typer.Option(help="The base's folder or id, where it is not to be guessed.")] = None,
    alias: Alias = None,
    quantised: Quantised = False,
    limit: Limit = None,
    cache: Cache = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Say which adapters may be used, and for each other one which rule it broke and why.

    On the Hub, configurations and the headers of the weights are read and no weights downloaded: what is accepted here
    may still be refused by its values, which `pool fetch` looks at.
    """
    from workbench.hub import explain_one, survey
    from workbench.pool import Pool

    chosen, name = _rules(rules, without or ()), _id(source)
    options = _asked(alias, quantised, limit, cache, offline) | {"base": base, "rules": chosen}
    with _failures():
        if name == source:
            found = Pool.open(source, base=base, cache=cache, rules=chosen)
            if explain:
                _explained(explain, found.explain(explain, chosen), as_json)
        elif explain:
            _explained(explain, explain_one(name, explain, **options), as_json)
        else:
            seen = survey(name, **options, until="header")
            found = Pool(source, name, seen.verdicts, seen.folders, seen.shapes)
        _screened(found.table, as_json)


@pool.command()
def fetch(
    base: Base,
    budget: Annotated[str, typer.Option(help="Room on the disk for the weights, such as 100GB.")] = "",
    rules: Rules = "default",
    without: Without = None,
    alias: Alias = None,
    quantised: Quantised = False,
    limit: Limit = None,
    cache: Cache = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Screen the adapters of a base and fetch those that pass, into the Hub client's cache.

    It can be interrupted at any time: the same command goes on where it stopped.
    """
    from workbench.pool import Pool

    options = _asked(alias, quantised, limit, cache, offline)
    options |= {"rules": _rules(rules, without or ()), "budget": _bytes(budget)}
    with _failures():
        _screened(Pool.open(f"hub:{_id(base)}", **options).table, as_json)


@app.command()
def bench(
    area: Annotated[list[str] | None, typer.Option("--area", help="One area; repeatable. All of them without.")] = None,
    scale: Annotated[str, typer.Option(help="The model's size: nano, 1B or 8B; its weights are random.")] = "nano",
    device: Annotated[str, typer.Option(help="Where; by default a GPU where there is one.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small work, to see whether it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder to write the table (Parquet) and its figure to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast it is: ours beside the ways it is usually done, in one process, with ratios and peak memory."""
    import torch

    from workbench.bench.run import AREAS, keep, run

    with _failures():
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
        numbers = sizes[["each", "ratio", "peak", "operations", "traffic", "error"]].map(_short)
        _print(
            _columns(titles, zip(*(table[name] for name in ("area", "work", "way")), *numbers.T.values, strict=True))
        )


@app.command()
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

    with _failures():
        draw(name or (), data=data, out=out, venue=venue, say=typer.echo)


def _short(value: float) -> str:
    return "" if value != value else f"{value:.3g}"


def _asked(alias, quantised: bool, limit: int | None, cache: Path | None, offline: bool) -> dict:
    """The options that say which adapters are meant, as `hub.survey` takes them."""
    where = {"aliases": alias or (), "quantised": quantised, "limit": limit}
    return where | {"cache": cache, "offline": offline or None}


def _screened(table: pd.DataFrame, as_json: bool) -> NoReturn:
    """Print a row for each adapter and how many each rule refused, and end."""
    from workbench.screen import counts

    refused, accepted = counts(table), int(table["accepted"].sum())
    if as_json:
        rows = json.loads(table.to_json(orient="records"))
        typer.echo(json.dumps({"adapters": rows, "refused": refused.to_dict("records")}, indent=2))
    else:
        rows = [(n, "accepted" if a else "refused", r, w) for n, a, r, w in table.iloc[:, :4].itertuples(index=False)]
        _print([*_columns(("adapter", "verdict", "rule", "reason"), rows), ""])
        if accepted < len(table):
            _print([*_columns(("rule", "refused", "what it asks"), refused.itertuples(index=False)), ""])
        _print([f"{accepted} of {len(table)} adapters accepted"])
    raise typer.Exit(0 if accepted else 1)


def _explained(name: str, checked: Sequence[Checked], as_json: bool) -> NoReturn:
    """Print what each rule says of one adapter, and end."""
    broken = [one.rule.name for one in checked if one.state == "refused"]
    if as_json:
        rows = [{"rule": c.rule.name, "outcome": c.state, "reason": c.reason, "why": c.rule.why} for c in checked]
        typer.echo(json.dumps({"name": name, "accepted": not broken, "rules": rows}, indent=2))
    else:
        rows = [(c.rule.name, c.rule.stage, c.state, c.reason or c.rule.why) for c in checked]
        _print([*_columns(("rule", "stage", "outcome", "why, or what it asks"), rows), ""])
        _print(
            [f"{name} is refused by {', '.join(broken)}" if broken else f"{name} is accepted by all that were asked"]
        )
    raise typer.Exit(1 if broken else 0)


@contextmanager
def _failures() -> Iterator[None]:
    """The package's errors, said on stderr: a wrong name is wrong usage, anything else failed at run time."""
    try:
        yield
    except WorkbenchError as error:
        _print([str(error)], err=True)
        raise typer.Exit(2 if isinstance(error, SelectionError) else 1) from error


def _rules(rules: str, without: Sequence[str]) -> tuple[str, ...]:
    from workbench.screen import DEFAULT, RULES, STUDY, applied

    named = tuple(filter(None, map(str.strip, rules.split(","))))
    chosen = {"default": DEFAULT, "study": STUDY}.get(rules, named)
    with _failures():
        applied((*chosen, *without))
    if needed := [name for name in without if RULES[name].required]:
        raise typer.BadParameter(f"{needed[0]!r} cannot be switched off: what breaks it cannot be read as an adapter")
    return tuple(name for name in chosen if name not in without)


def _bytes(text: str) -> int | None:
    """Bytes from a number with a unit, such as 1.5GB (1.5 · 10⁹) or 2GiB (2 · 2³⁰); None from ''."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", text.strip(), re.IGNORECASE)
    if text and not match:
        raise typer.BadParameter(f"a size is a number with a unit, such as 100GB or 1.5TiB; got {text!r}")
    if not match:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))


def _id(base: str) -> str:
    return base.removeprefix("hub:")


def _columns(titles: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a table, its columns side by side."""
    from workbench.card import printable

    cells = [tuple(titles), *(tuple(printable(str(cell)) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _print(lines: Iterable[str], err: bool = False) -> None:
    """Print lines in which nothing of a stranger's steers the terminal."""
    from workbench.card import printable

    for line in lines:
        typer.echo(printable(line, 10_000), err=err)
