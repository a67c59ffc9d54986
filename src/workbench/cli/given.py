"""Arguments and options that several commands take, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import completion

if TYPE_CHECKING:
    from workbench.base import Base
    from workbench.tasks import Task

__all__ = [
    "SELECT",
    "BaseName",
    "Count",
    "Device",
    "Names",
    "Options",
    "Out",
    "Overwrite",
    "Seed",
    "Source",
    "Train",
    "Validation",
    "base_of",
    "task_of",
    "words",
]

Source = Annotated[
    str,
    typer.Argument(
        metavar="POOL",
        help="'nano' (the bundled pool), a folder of adapter folders, or hub:BASE.",
        autocompletion=completion.pools,
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The PEFT folder to write, model card included.")]
Names = Annotated[
    str,
    typer.Option(
        "--names",
        metavar="A,B,…",
        help="These adapters of the pool, in this order.",
        autocompletion=completion.adapters,
    ),
]
SELECT = "How adapters are chosen: random, evaluation, rank, diverse, cosine, …"
Count = Annotated[int, typer.Option("-k", min=1, help="How many adapters are chosen.")]
Options = Annotated[
    list[str] | None,
    typer.Option("-o", "--option", metavar="NAME=VALUE", help="An option of the method, as JSON or YAML; repeatable."),
]
Train = Annotated[
    int | None, typer.Option("--n-train", min=1, help="Training examples; the task's own number without.")
]
Validation = Annotated[
    int | None, typer.Option("--n-validation", min=1, help="Validation examples; the task's own number without.")
]
Seed = Annotated[int, typer.Option(help="Of the examples drawn, a random choice of adapters, and training.")]
BaseName = Annotated[
    str, typer.Option("--base", help="The base's folder or id, where it is not what the adapters' configurations name.")
]
Device = Annotated[str, typer.Option(help="Where the base computes; by default a GPU where there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that lies in the folder.")]


def words(names: str) -> list[str]:
    """The names of a list with commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def task_of(
    name: str, seed: int, n_train: int | None, n_validation: int | None = None, n_test: int | None = None
) -> Task:
    """A task's examples, drawn under the seed; None leaves a number to the task."""
    from workbench.tasks import load

    return load(name, seed=seed, n_train=n_train, n_validation=n_validation, n_test=n_test)


def base_of(name: str, device: str) -> Base:
    """A base by its folder or id, or the name that the bundled one's adapters give it; '' is any device."""
    from workbench.base import Base
    from workbench.nano.shelf import bundled

    return Base.load(bundled(name), device=device or None)
