"""The pool's commands: other people's adapters of a base, listed, screened and fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from workbench.cli.shared import AsJson, columns, failures, show

if TYPE_CHECKING:
    import pandas as pd

    from workbench.screen import Checked

__all__ = ["pool"]

pool = typer.Typer(no_args_is_help=True, help="Other people's adapters of a base: list, screen and fetch them.")

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


@pool.command()
def scan(
    base: Base, alias: Alias = None, quantised: Quantised = False, limit: Limit = None, as_json: AsJson = False
) -> None:
    """List the adapters of a base that the Hub knows, with what their cards say. Nothing is downloaded."""
    from dataclasses import asdict

    from workbench.hub import discover

    with failures():
        repos = discover(_id(base), aliases=alias or (), quantised=quantised, limit=limit)
    if as_json:
        typer.echo(json.dumps([asdict(repo) for repo in repos], indent=2))
    else:
        titles = ("adapter", "created", "downloads", "likes", "licence", "gated", "datasets")
        rows = [
            (r.id, r.created, r.downloads, r.likes, r.licence, "yes" if r.gated else "", ",".join(r.datasets))
            for r in repos
        ]
        show([*columns(titles, rows), "", f"{len(repos)} adapters of {base}"])
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
    with failures():
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
    with failures():
        _screened(Pool.open(f"hub:{_id(base)}", **options).table, as_json)


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
        show([*columns(("adapter", "verdict", "rule", "reason"), rows), ""])
        if accepted < len(table):
            show([*columns(("rule", "refused", "what it asks"), refused.itertuples(index=False)), ""])
        show([f"{accepted} of {len(table)} adapters accepted"])
    raise typer.Exit(0 if accepted else 1)


def _explained(name: str, checked: Sequence[Checked], as_json: bool) -> NoReturn:
    """Print what each rule says of one adapter, and end."""
    broken = [one.rule.name for one in checked if one.state == "refused"]
    if as_json:
        rows = [{"rule": c.rule.name, "outcome": c.state, "reason": c.reason, "why": c.rule.why} for c in checked]
        typer.echo(json.dumps({"name": name, "accepted": not broken, "rules": rows}, indent=2))
    else:
        rows = [(c.rule.name, c.rule.stage, c.state, c.reason or c.rule.why) for c in checked]
        show([*columns(("rule", "stage", "outcome", "why, or what it asks"), rows), ""])
        show([f"{name} is refused by {', '.join(broken)}" if broken else f"{name} is accepted by all that were asked"])
    raise typer.Exit(1 if broken else 0)


def _rules(rules: str, without: Sequence[str]) -> tuple[str, ...]:
    from workbench.screen import DEFAULT, RULES, STUDY, applied

    named = tuple(filter(None, map(str.strip, rules.split(","))))
    chosen = {"default": DEFAULT, "study": STUDY}.get(rules, named)
    with failures():
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
