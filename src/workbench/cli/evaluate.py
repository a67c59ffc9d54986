"""An adapter scored beside what must stand beside it."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.cli import completion
from workbench.cli.given import BaseName, Device, Seed, Train, Validation, base_of, task_of
from workbench.cli.shared import AsJson, columns, failures, options_of, show

if TYPE_CHECKING:
    from workbench.beside import Beside

__all__ = ["evaluate"]


def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="A PEFT folder, such as out/ties; with --pool, an adapter's name in it."
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK…", help="Tasks, such as nano/mirror-months.", autocompletion=completion.tasks),
    ],
    pool: Annotated[
        str,
        typer.Option("--pool", help="The pool that ADAPTER is one of; its base too.", autocompletion=completion.pools),
    ] = "",
    base: BaseName = "",
    n_train: Train = None,
    n_validation: Validation = None,
    n_test: Annotated[int | None, typer.Option(min=1, help="Test examples; without, 500 or all of fewer.")] = None,
    seed: Seed = 0,
    control: Annotated[
        Literal["sigma", "norm", "spectrum"], typer.Option(help="What random adapters are matched by.")
    ] = "sigma",
    draws: Annotated[int, typer.Option(min=1, help="How many random adapters.")] = 5,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--option", metavar="NAME=VALUE", help="An option of the new adapter, such as steps=40; repeatable."
        ),
    ] = None,
    no_new: Annotated[bool, typer.Option("--no-new", help="Train no new adapter; the output says so.")] = False,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Score an adapter on tasks, and beside it the base alone, random adapters like it, and a new adapter.

    The random adapters have its modules, ranks and size of weights; the new adapter is trained on the task's training
    examples (give the --seed and --n-train that the adapter was fitted with). Accuracy is by the task's own metric, loss in
    nats per answer token; both on the test split, with 95 % intervals over its examples.

    \b
    workbench evaluate out/rotate nano/rotate-right-months --n-train 10
    workbench evaluate reverse-digits-quotes nano/mirror-months --pool nano --n-test 200 --no-new
    workbench evaluate out/ties nano/mirror-months nano/second-days -o steps=40 --json

    Exit codes: 0 scored, 1 it failed, 2 wrong usage.
    """
    from workbench.adapt.progress import Bar
    from workbench.adapters import Adapter
    from workbench.baselines import BASELINES
    from workbench.beside import NEW, try_adapter
    from workbench.experiment import MOST_TESTED
    from workbench.folders import named_base
    from workbench.pool import Pool
    from workbench.runs import Workplace

    settings = options_of(option, {"seed": "--seed"})
    with failures(usage=True):
        BASELINES[NEW].check(settings)
        asked = [task_of(task, seed, n_train, n_validation, n_test) for task in tasks]
        asked = [task if n_test else replace(task, test=task.test[:MOST_TESTED]) for task in asked]
    with failures():
        if pool:
            opened = Pool.open(pool)
            loaded, one = base_of(base or opened.base, device), opened.adapter(adapter)
        else:
            home = base or named_base(Path(adapter)) or Adapter.load(adapter).base
            if not home:
                raise typer.BadParameter(f"{adapter} does not say which base it is for; add --base")
            loaded = base_of(home, device)
            one = Adapter.load(adapter, shapes=loaded.layers)
        place, found = Workplace(loaded, None), []
        given = {
            "seed": seed,
            "control": control,
            "draws": draws,
            "new": settings,
            "train_new": not no_new,
            "place": place,
        }
        for task in asked:
            with ExitStack() as closing:
                bar = Bar(f"new adapter, {task.name}", shown=sys.stderr.isatty())
                closing.push(bar)  # closed, but never entered: Ctrl-C ends the command
                found.append(try_adapter(loaded, one, task, watch=bar, **given))
    if as_json:
        told = {"adapter": adapter, "base": base or one.base, "control": control, "seed": seed}
        typer.echo(json.dumps(told | {"tasks": [_told(beside) for beside in found]}, indent=2))
        return
    for beside in found:
        show([*_lines(beside), ""])


def _told(beside: Beside) -> dict:
    """A task's table as plain values."""
    return {
        "task": beside.task.name,
        "metric": beside.task.metric,
        "n_train": len(beside.task.train),
        "n_test": len(beside.task.test),
        "rows": json.loads(beside.table.reset_index().to_json(orient="records", double_precision=15)),
        "random_accuracies": list(beside.draws),
        "left_out": [] if beside.new else ["new adapter"],
    }


def _lines(beside: Beside) -> list[str]:
    task, draws = beside.task, beside.draws
    rows = [
        (
            row.Index,
            *(_within(*row[i : i + 3]) for i in (1, 4)),
            "" if row.difference != row.difference else _within(*row[7:10]),
        )
        for row in beside.table.itertuples()
    ]
    titles = ("", f"accuracy ({task.metric})", "loss", "adapter minus this, accuracy")
    told = f"{task.name}, {len(task.test)} test examples, {len(task.train)} for the new adapter; 95 % intervals in brackets"
    said = f"random control: {len(draws)} random adapters matched by {beside.control}, accuracy {min(draws):.3f} to {max(draws):.3f}"
    left_out = (
        [] if beside.new else ["new adapter: left out (--no-new), so whether training afresh does as well is not known"]
    )
    return [told, "", *columns(titles, rows), "", said, *left_out]


def _within(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
