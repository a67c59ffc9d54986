"""Adapters made from others: merged, or a merge fitted to a few examples of a task."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import completion
from workbench.cli.given import (
    SELECT,
    BaseName,
    Count,
    Device,
    Names,
    Options,
    Out,
    Overwrite,
    Seed,
    Source,
    Train,
    Validation,
    base_of,
    task_of,
    words,
)
from workbench.cli.shared import AsJson, columns, failures, options_of, short, show

if TYPE_CHECKING:
    from workbench.adapters import Adapter
    from workbench.base import Base
    from workbench.pool import Pool
    from workbench.stack import Stack
    from workbench.tasks import Task

__all__ = ["adapt", "merge"]

For = Annotated[
    str,
    typer.Option(
        "--task",
        help="The task that adapters are chosen for, such as nano/mirror-months.",
        autocompletion=completion.tasks,
    ),
]
MOST_ROWS = 20  # sources shown; the card has all
_OWN = {"weights": "--weights", "scale": "--scale", "rank": "--rank", "seed": "--seed"}


def merge(
    source: Source,
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="A merging method; `workbench methods` lists them.",
            autocompletion=completion.merging,
        ),
    ],
    out: Out,
    names: Names = "",
    select: Annotated[str, typer.Option("--select", help=SELECT, autocompletion=completion.selections)] = "",
    k: Count = 10,
    task: For = "",
    n_train: Train = None,
    option: Options = None,
    weights: Annotated[
        str,
        typer.Option(metavar="W,W,…", help="A weight for each adapter, in order, or NAME=W,…, the others 0; else 1."),
    ] = "",
    scale: Annotated[float, typer.Option(help="λ, which multiplies the finished update.")] = 1.0,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the result to this rank, by SVD.")] = None,
    seed: Seed = 0,
    base: BaseName = "",
    device: Device = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters of a pool by any method and write a PEFT folder, with its model card, that plain peft loads.

    Without --names and --select all accepted adapters of the pool are merged.

    \b
    workbench merge nano ties --rank 16 -o density=0.2 --out out/ties
    workbench merge nano average --names second-digits,sort-animals-quotes --weights 1,-0.5 --out out/two
    workbench merge nano lego --select evaluation -k 4 --task nano/mirror-months -o k=16 --out out/lego

    Dense methods (ties, dare_linear, fisher, …) need --rank, since a PEFT folder holds factors; what the cut costs is
    printed, ‖ΔW − BA‖ / ‖ΔW‖ for the module that it costs most. A model is loaded only to choose adapters by what they
    do on a task, and by methods that need examples of each adapter (regmean, fisher: bundled adapters alone).
    `workbench evaluate` then sets the folder beside random adapters and a new one.

    Exit codes: 0 written, 1 it failed, 2 wrong usage (unknown names or options, too many adapters asked for).
    """
    from workbench.adapters import check_free
    from workbench.merge import describe, methods
    from workbench.merge import merge as merged
    from workbench.pool import Pool
    from workbench.runs import check_examples, observe

    settings, named = options_of(option, _OWN), words(names)
    with failures(usage=True):
        describe(method)
        methods()[method].settings(settings)
        chosen_for = task_of(task, seed, n_train) if task else None
    if names and select:
        raise typer.BadParameter("--names and --select exclude each other; give one")
    if methods()[method].dense and rank is None:
        raise typer.BadParameter(
            f"{method} gives a dense update, which no PEFT folder holds; add a rank, such as --rank 16"
        )
    with failures():
        check_free(out, overwrite)
        pool = Pool.open(source)
        check_examples(method, pool, named or None)
        loaded = base_of(base or pool.base, device) if chosen_for or methods()[method].needs else None
        stack = _chosen(pool, named, select, k, chosen_for, loaded, seed)
        known = observe(loaded, stack, method) if loaded else None
        whole = pool if len(stack) == len(pool) and not (named or select) else stack
        given = {"weights": _weights(weights), "scale": scale, "rank": rank, "statistics": known}
        result = merged(whole, method, **given, **settings)
        result.save(out, overwrite=overwrite)
    facts = _facts(result, out)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    lost, sources = facts["error"], facts["sources"]
    show(
        [
            f"{method} of {len(sources)} adapters: rank {facts['rank']} in {facts['modules']} modules, ‖ΔW‖ = {facts['norm']:.4g}"
        ]
    )
    show([f"options: {', '.join(f'{name} = {value}' for name, value in facts['options'].items())}"])
    if lost:
        worst = max(lost, key=lost.get)
        show(
            [
                f"relative truncation error: at most {short(lost[worst])} ({worst}), {short(sum(lost.values()) / len(lost))} on average"
            ]
        )
    _sources(facts, out)


def adapt(
    source: Source,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="A task, such as nano/mirror-months, or a spec's file.",
            autocompletion=completion.tasks,
        ),
    ],
    method: Annotated[
        str,
        typer.Argument(
            metavar="[METHOD]",
            help="coefficients, lorahub, adamerging, pi_tuning, prior or ridge.",
            autocompletion=completion.adaptive,
        ),
    ] = "coefficients",
    *,
    out: Out,
    names: Names = "",
    select: Annotated[str, typer.Option("--select", help=SELECT, autocompletion=completion.selections)] = "evaluation",
    k: Count = 10,
    n_train: Train = None,
    n_validation: Validation = None,
    option: Options = None,
    seed: Seed = 0,
    base: BaseName = "",
    device: Device = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit a merge of a pool's adapters to a few examples of a task, and write it as a PEFT folder with its model card.

    \b
    workbench adapt nano nano/rotate-right-months --n-train 10 --out out/rotate
    workbench adapt nano nano/rotate-right-months lorahub --select random -k 20 -o budget=60 --out out/hub
    workbench adapt nano tasks/mine.yaml prior --names a,b,c -o steps=20 -o lr=1e-3 --out out/mine

    The step of least validation loss is kept. Ctrl-C ends the fit at its step and keeps the best so far; a second one
    ends it at once, and nothing is written. Examples, random choices and the fit follow --seed: give `workbench evaluate`
    the same --seed and --n-train, so that its new adapter is trained on the same examples.

    Exit codes: 0 written (after Ctrl-C too), 1 it failed, 2 wrong usage.
    """
    from workbench.adapt import adapt as fit
    from workbench.adapt import named as adaptive
    from workbench.adapt.progress import Bar
    from workbench.adapters import check_free
    from workbench.compose import grouped
    from workbench.evaluate import evaluate as score
    from workbench.pool import Pool

    settings, named = options_of(option, {"seed": "--seed"}), words(names)
    with failures(usage=True):
        adaptive(method).settings(settings)
        on = task_of(task, seed, n_train, n_validation)
    if adaptive(method).routes:
        raise typer.BadParameter(
            f"{method} gives a routed model, which no PEFT folder holds; use it in Python, or another method"
        )
    with failures():
        check_free(out, overwrite)
        pool = Pool.open(source)
        loaded = base_of(base or pool.base, device)
        stack = _chosen(pool, named, select, k, on, loaded, seed)
        with Bar(method, shown=sys.stderr.isatty()) as bar:
            fitted = fit(loaded, stack, on, method, seed=seed, watch=bar, **settings)
        fitted.adapter.save(out, overwrite=overwrite)
        scores = (
            score(loaded, on, grouped([fitted.adapter], loaded.device), split="validation") if on.validation else None
        )
    loss = float(scores.loss.mean()) if scores else None
    stopped = bar.stopped and bar.step < bar.steps
    facts = _facts(fitted.adapter, out) | {
        "task": on.name,
        "n_train": len(on.train),
        "seed": seed,
        "validation_loss": loss,
        "passes": fitted.passes,
        "tokens": fitted.tokens,
        "parameters": fitted.parameters,
        "stopped_at": bar.step if stopped else None,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if stopped:
        show([f"interrupted at step {bar.step} of {bar.steps}: the best so far is kept"])
    fit_to = f"{method} over {len(stack)} adapters, fitted to {len(on.train)} examples of {on.name}"
    show([f"{fit_to}: validation loss {'not known, without examples' if loss is None else f'{loss:.4f}'}"])
    show(
        [
            f"spent: {fitted.passes:,} examples fed forward, {fitted.tokens:,} tokens, {fitted.parameters:,} numbers trained"
        ]
    )
    _sources(facts, out)


def _weights(text: str) -> list[float] | dict[str, float] | None:
    """1,-0.5 or a=1,b=-0.5; None from ''."""
    found: dict[str, float] = {}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for i, part in enumerate(parts):
        name, equals, number = part.rpartition("=")
        try:
            found[name if equals else str(i)] = float(number)
        except ValueError:
            raise typer.BadParameter(f"a weight is a number or NAME=number, such as 1,-0.5; got {part!r}") from None
    if len({"=" in part for part in parts}) > 1 or len(found) < len(parts):
        raise typer.BadParameter(f"weights are all by place or all by name, each once; got {text!r}")
    return (found if "=" in text else list(found.values())) or None


def _chosen(
    pool: Pool, named: Sequence[str], select: str, k: int, task: Task | None, base: Base | None, seed: int
) -> Stack:
    """The adapters by name, else selected, else all."""
    if named or not select:
        return pool.stack(named or None)
    return pool.select(select, k, task=task, base=base, seed=seed)


def _facts(adapter: Adapter, out: Path) -> dict:
    """What a folder that was written holds, in plain values."""
    info, report = adapter.info, adapter.info.get("report")
    lost = [] if report is None else report[report["status"].isin(["refused", "left out"])].to_dict("records")
    return {
        "folder": str(out),
        "method": info["method"],
        "options": json.loads(json.dumps(info["options"], default=str)),
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "norm": adapter.norm(),
        "error": info.get("error", {}),
        "sources": info["sources"],
        "licences": info.get("licences", {}),
        "left_out": [{key: row[key] for key in ("adapter", "module", "status", "reason")} for row in lost],
        "notes": list(info.get("notes", ())),
        "digest": adapter.digest(),
    }


def _sources(facts: Mapping, out: Path) -> None:
    """Print what it was made of, what was left out, and what comes next."""
    sources = sorted(facts["sources"].items(), key=lambda pair: -abs(pair[1]))
    licences = facts["licences"]
    rows = [(name, f"{weight:.4g}", licences.get(name) or "not stated") for name, weight in sources[:MOST_ROWS]]
    show(["", *columns(("source", "weight", "licence"), rows)])
    if len(sources) > MOST_ROWS:
        show([f"… and {len(sources) - MOST_ROWS} more, in {out / 'README.md'}"])
    for status in ("refused", "left out"):
        if count := sum(row["status"] == status for row in facts["left_out"]):
            show([f"{count} {'adapters' if status == 'refused' else 'modules'} {status}; the card says why"])
    show([*(f"note: {note}" for note in facts["notes"]), ""])
    show([f"written to {out}; `workbench evaluate {out} TASK` sets it beside the base, random adapters and a new one"])
