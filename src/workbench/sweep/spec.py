"""What a sweep runs: each run is a frozen value that names all it depends on, and comes back equal from its JSON.

sweep = Sweep.load("studies/nano/recycling.yaml")       # see `workbench.sweep.reading` for the file
run_from(json.loads(json.dumps(sweep.runs[0].parameters))) == sweep.runs[0]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from operator import index
from pathlib import Path

from workbench.adapt import schedule_options
from workbench.adapt.fresh import NEW_ADAPTER
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe
from workbench.merge import methods
from workbench.options import near
from workbench.sweep.settings import Settings

__all__ = ["MULTITASK_BASELINES", "Experiment", "Multitask", "Notebook", "Run", "Sweep", "run_from"]

MULTITASK_BASELINES = ("zero-shot", "best single", "new adapter")


@dataclass(frozen=True)
class Experiment:
    """One recipe on one task under one seed: a row of `workbench.experiment.compare`.

    pool, opening: what `Pool.open` takes, and its options. base, load: what `Base.load` takes (None: the pool's own base),
    and its options. task, folder: what `workbench.tasks.load` takes (None: no folder). Sizes of None are `compare`'s own.
    draw: the seed under which the task's examples are drawn, None where it is `seed` (which also selects and fits).
    """

    pool: str
    base: str | None
    load: Settings
    task: str
    seed: int
    n_train: int | None
    n_validation: int | str | None
    n_test: int | None
    recipe: Recipe
    draw: int | None = None
    folder: str | None = None
    opening: Settings = Settings()

    def __post_init__(self):
        _settle(self, "load", "opening")
        _check_sizes(self)

    @property
    def parameters(self) -> dict:
        """Everything in plain JSON values."""
        recipe = {one.name: getattr(self.recipe, one.name) for one in fields(Recipe)}
        recipe |= {"options": dict(self.recipe.options), "tune": dict(self.recipe.tune)}
        return _plain(self) | {"recipe": json.loads(json.dumps(recipe))}

    @property
    def label(self) -> str:
        """A short name for progress and tables."""
        return f"{self.task}, seed {self.seed}: {self.recipe.label}"


@dataclass(frozen=True)
class Multitask:
    """One update for several tasks at once: one merge, or what stands beside it (`workbench.multitask`).

    adapters: the names of those merged, or how many are drawn at random under the seed. tasks: what each was trained on,
    in the order of the adapters; () for bundled adapters, whose tasks are known. method: a merging method, or one of
    `MULTITASK_BASELINES`; a new adapter is trained on `n_train` examples of each task together. control: what random
    stand-ins are matched by, "" for the real adapters. tune: option → values, of which those of least validation loss
    stand. rank: the merge is cut to it, and a new adapter has it (None: as the merge comes; the adapters' mean rank).
    """

    pool: str
    base: str | None
    load: Settings
    adapters: tuple[str, ...] | int
    tasks: tuple[str, ...]
    method: str
    seed: int
    n_train: int | None
    n_validation: int | None
    n_test: int | None
    options: Settings = Settings()
    tune: Settings = Settings()
    control: str = ""
    rank: int | None = None
    folder: str | None = None
    opening: Settings = Settings()

    def __post_init__(self):
        _settle(self, "load", "opening", "options", "tune")
        _check_sizes(self)
        if not isinstance(self.adapters, int):
            object.__setattr__(self, "adapters", tuple(self.adapters))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.count < 1 or (not isinstance(self.adapters, int) and len(set(self.adapters)) < self.count):
            raise WorkbenchError(
                f"adapters is {self.adapters!r}, expected a number of them or a list of different names"
            )
        if self.tasks and len(self.tasks) != self.count:
            raise WorkbenchError(
                f"{len(self.tasks)} tasks for {self.count} adapters: give one for each, in their order"
            )
        if self.tasks and isinstance(self.adapters, int):
            raise WorkbenchError("tasks are given for adapters that are drawn: name the adapters, one for each task")
        known = [*methods(), *MULTITASK_BASELINES]
        if self.method not in known:
            raise WorkbenchError(f"no method {self.method!r}{near(self.method, known)} merges for several tasks")
        if self.method in MULTITASK_BASELINES and (self.control or self.tune):
            raise WorkbenchError(f"{self.method} stands beside merges: it has no control and nothing to tune")
        if self.method in methods():
            if methods()[self.method].needs:
                raise WorkbenchError(f"{self.method} needs {methods()[self.method].needs}, which is not gathered here")
            self.variants()
        else:
            allowed = schedule_options(NEW_ADAPTER) if self.method == "new adapter" else {}
            if wrong := sorted(set(self.options) - set(allowed)):
                raise WorkbenchError(f"{self.method} has no option {wrong[0]!r}{near(wrong[0], allowed)} here")
            Recipe(self.method, options=self.options)

    def variants(self) -> list[tuple[str, dict]]:
        """The merges of which that of least validation loss stands: (method, options), one where nothing is tuned."""
        recipe = Recipe(self.method, options=self.options, tune=self.tune, control=self.control, k=self.count)
        names, values = [name for name, _ in recipe.tune], [values for _, values in recipe.tune]
        tried = [dict(zip(names, one, strict=True)) for one in itertools.product(*values)]
        return [(self.method, {**dict(recipe.options), **one}) for one in tried]

    @property
    def count(self) -> int:
        """How many adapters are merged."""
        return self.adapters if isinstance(self.adapters, int) else len(self.adapters)

    @property
    def parameters(self) -> dict:
        """Everything in plain JSON values."""
        return _plain(self)

    @property
    def label(self) -> str:
        """A short name for progress and tables."""
        parts = [f"{self.method} of {self.count}"] + [f"{name}={value}" for name, value in self.options.items()]
        parts += [f"{name} of {'/'.join(map(str, values))}" for name, values in self.tune.items()]
        parts += [f"rank {self.rank}"] * bool(self.rank) + [f"random ({self.control})"] * bool(self.control)
        return f"seed {self.seed}: {', '.join(parts)}"


@dataclass(frozen=True)
class Notebook:
    """One execution of a notebook by papermill; `given` overrides its parameters."""

    notebook: str
    given: Settings = Settings()

    def __post_init__(self):
        _settle(self, "given")

    @property
    def parameters(self) -> dict:
        """Everything in plain JSON values."""
        return _plain(self)

    @property
    def label(self) -> str:
        """A short name for progress and tables."""
        return f"{Path(self.notebook).stem}: {', '.join(f'{name}={value}' for name, value in self.given.items())}"


Run = Experiment | Multitask | Notebook


def _settle(run, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(run, name), Settings):
            object.__setattr__(run, name, Settings(getattr(run, name)))


def _check_sizes(run) -> None:
    same = ("same",) if isinstance(run, Experiment) else ()
    for name in ("n_train", "n_validation", "n_test"):
        size = getattr(run, name)
        if not (size is None or (name == "n_validation" and size in same)):
            _whole(name, size, 1)
    for name in ("seed", "draw"):
        if getattr(run, name, None) is not None or name == "seed":
            _whole(name, getattr(run, name), 0)


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkbenchError(f"{name} is {value!r}, expected a whole number, at least {least}")


def _plain(run) -> dict:
    found = {one.name: getattr(run, one.name) for one in fields(run) if one.name != "recipe"}
    return {
        name: dict(value) if isinstance(value, Settings) else list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
    }


_KINDS = {"recipe": Experiment, "adapters": Multitask, "notebook": Notebook}


def run_from(parameters: Mapping) -> Run:
    """The run whose `parameters` these are, as they come back from JSON.

    Raises:
        WorkbenchError: a field that is missing or does not exist, or a value that the run does not allow.
    """
    given = dict(parameters)
    kind = next((kind for name, kind in _KINDS.items() if name in given), None)
    if kind is None:
        raise WorkbenchError(f"not a run's parameters: expected one of {', '.join(_KINDS)} among {', '.join(given)}")
    _check_names(kind.__name__, given, kind)
    if kind is Experiment:
        recipe = dict(given["recipe"])
        _check_names("recipe", recipe, Recipe)
        given["recipe"] = Recipe(recipe.pop("method"), **recipe)
    return kind(**given)


def _check_names(what: str, given: Mapping, kind: type) -> None:
    known = [one.name for one in fields(kind)]
    if wrong := [name for name in given if name not in known]:
        raise WorkbenchError(f"{what} has no field {wrong[0]!r}{near(wrong[0], known)}; a newer version's, perhaps")
    if lost := [one for one in _needed(kind) if one not in given]:
        raise WorkbenchError(f"{what} lacks {', '.join(lost)}")


def _needed(kind: type) -> Sequence[str]:
    if kind is Recipe:
        return ("method",)
    return [one.name for one in fields(kind) if one.default is MISSING]


@dataclass(frozen=True)
class Sweep:
    """Runs in the order in which they are best computed, and where their rows go.

    together: how many runs of a recipe are computed side by side. assumed: what `workbench.sweep.estimate` is told of the
    models and the pool (scale, tokens, …).
    """

    name: str
    results: Path
    runs: tuple[Run, ...]
    together: int = 1
    assumed: Settings = Settings()

    def __post_init__(self):
        object.__setattr__(self, "results", Path(self.results))
        object.__setattr__(self, "runs", tuple(dict.fromkeys(self.runs)))
        object.__setattr__(self, "together", index(self.together))
        _settle(self, "assumed")
        if not self.runs:
            raise WorkbenchError(f"{self.name}: nothing to run")
        _whole("together", self.together, 1)

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep's file (`workbench.sweep.reading`). Neither models nor data are looked for.

        Raises:
            WorkbenchError: what the file asks for does not exist or cannot be; the message has the path of the field.
        """
        from workbench.sweep.reading import read

        return read(path)
