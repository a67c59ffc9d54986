"""A sweep's file: YAML, each field checked, its grids multiplied out.

    name: recycling-nano
    results: runs/recycling-nano        # a folder; relative to the working directory
    together: 1                         # runs of a recipe computed side by side (on a GPU: many)
    pool: nano                          # as `Pool.open` takes it, with its options under `opening`
    base: null                          # null: the pool's own; options of `Base.load` under `load`
    load: {dtype: bfloat16}
    control: sigma                      # the random control beside each recipe; "" leaves them out
    baselines: [zero-shot, new adapter]
    tasks: [nano/second-days, "bbh/*", composition]     # names, patterns over them, or a kind of bundled tasks
    seeds: [0, 1]
    n_train: [10, 80]                   # a number or a list: another axis; n_validation and n_test are numbers
    recipes:
      - {method: coefficients, select: evaluation, k: 10}
      - {method: lorahub, grid: {select: [evaluation, random], k: [5, 10]}, budget: 40}
    blocks:                             # where there are any, each takes its own fields, and the rest from above
      - {name: relevance, n_train: 10, recipes: [{method: coefficients, grid: {skip: [5, 10]}}]}
    merges:                             # several tasks' adapters into one (`spec.Multitask`)
      - adapters: [reverse-letters, second-days]        # or how many are drawn; with `tasks` where not bundled
        # beside them, unless variants or `baselines` say otherwise: zero-shot, and a new adapter for all tasks
        variants: [{method: lego, grid: {k: [4, 8]}}, {method: ties, tune: {density: [0.2, 1.0]}}]
    estimate: {scale: 8B, tokens: 700}  # see `workbench.sweep.estimate`

or of one notebook's parameters:

    notebook: notebooks/03_merge_experiments.ipynb
    parameters: {n_test: 50}            # the same for all
    grid: {k: [5, 10]}                  # every combination, with each of the sets of `list`
    list: [{methods: [ties]}, {methods: [average]}]

The order of runs is by block, size, task and seed, so that neighbours share examples, rankings and new adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from pathlib import Path

import yaml

from workbench.base import Base
from workbench.baselines import BASELINES
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe
from workbench.options import near
from workbench.plain import show
from workbench.pool import Pool
from workbench.sweep.entries import entries, grid_of
from workbench.sweep.fields import Loader, axis, check_names, listed, settings, text, told, whole
from workbench.sweep.rates import Assumptions
from workbench.sweep.spec import MULTITASK_BASELINES, Experiment, Multitask, Notebook, Run, Sweep

__all__ = ["read", "sweep_of"]

_SIZES = ("n_train", "n_validation", "n_test")
_WHERE = ("pool", "opening", "base", "load", "folder", "seeds", *_SIZES)
_COMPARED = ("control", "baselines", "tasks", "draw", "recipes")
_TOP = ("name", "results", "together", "estimate")
_VARIED = ("notebook", "parameters", "grid", "list")
_MERGED = ("name", *_WHERE, "adapters", "tasks", "variants", "control", "baselines", "rank")
_BESIDE = ("zero-shot", "new adapter")


def read(path: str | Path) -> Sweep:
    """A sweep from its YAML file; raises as `sweep_of`, with the file's name."""
    path = Path(path)
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader)
        return sweep_of(given, path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise WorkbenchError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a date that is none, or our own
        raise WorkbenchError(f"{path}: {error}") from error


def sweep_of(given: Mapping, name: str = "sweep") -> Sweep:
    """A sweep from the mapping that its file holds; `name` where it has none.

    Raises:
        WorkbenchError: a field that does not exist (near names are given), a value of the wrong kind, or nothing to run.
    """
    if not isinstance(given, Mapping):
        raise WorkbenchError(f"expected the fields of a sweep (name, pool, tasks, recipes, …), got {show(given)}")
    varied = "notebook" in given
    check_names("", given, (*_TOP, *_VARIED) if varied else (*_TOP, *_WHERE, *_COMPARED, "blocks", "merges"))
    name = text("name", given.get("name", name))
    assumed = settings("estimate", given.get("estimate"))
    Assumptions.of(assumed)
    about = {"results": text("results", given.get("results", f"runs/{name}")), "assumed": assumed}
    about["together"] = whole("together", given.get("together", 1), 1)
    runs = list(_notebooks(given) if varied else _experiments(given))
    if not runs:
        raise WorkbenchError("nothing to run: give recipes (or baselines) with tasks and seeds, merges, or a notebook")
    return Sweep(name, runs=tuple(runs), **about)


def _experiments(given: Mapping) -> Iterator[Run]:
    shared = {key: given[key] for key in (*_WHERE, *_COMPARED) if key in given}
    blocks = listed("blocks", given.get("blocks", []), least=0)
    if not blocks and any(key in given for key in ("tasks", "recipes", "baselines")):
        yield from _block("", shared)
    for i, own in enumerate(blocks):
        check_names(f"blocks[{i}].", own, ("name", *_WHERE, *_COMPARED))
    for key in shared if blocks else ():
        if key in _COMPARED and all(key in own for own in blocks):
            raise WorkbenchError(f"{key} stands above the blocks, but each has its own, so it would not be used")
    for i, own in enumerate(blocks):
        place = f"blocks[{i}]."
        yield from _block(place, shared | dict(own))
    for i, own in enumerate(listed("merges", given.get("merges", []), least=0)):
        place = f"merges[{i}]."
        check_names(place, own, _MERGED)
        yield from _merges(place, {key: shared[key] for key in (*_WHERE, "control") if key in shared} | dict(own))


def _block(place: str, given: Mapping) -> Iterator[Experiment]:
    control = text(f"{place}control", given.get("control", "sigma"), empty=True)
    beside = entries(f"{place}baselines", given.get("baselines", list(_BESIDE)), Recipe)
    every = [recipe for _, recipe in beside]
    for at, recipe in entries(f"{place}recipes", given.get("recipes", []), Recipe):
        every.append(recipe)
        if control and not recipe.control and recipe.method not in BASELINES:
            every.append(told(at, recipe.against, control))
    if not every:
        raise WorkbenchError(f"{place}recipes: nothing to run: give at least one recipe or baseline")
    folder, draw = given.get("folder"), given.get("draw")
    names = _tasks(f"{place}tasks", given.get("tasks", []), folder)
    draw = None if draw is None else whole(f"{place}draw", draw, 0)
    for about in _where(place, given):
        for task in names:
            for seed in _seeds(place, given):
                for recipe in dict.fromkeys(every):
                    yield told(place, Experiment, task=task, seed=seed, recipe=recipe, draw=draw, **about)


def _merges(place: str, given: Mapping) -> Iterator[Multitask]:
    adapters, names = given.get("adapters"), given.get("tasks", [])
    if isinstance(adapters, bool) or not isinstance(adapters, int):
        adapters = tuple(
            text(f"{place}adapters[{i}]", one) for i, one in enumerate(listed(f"{place}adapters", adapters))
        )
    names = _tasks(f"{place}tasks", names, given.get("folder")) if names else []
    control = text(f"{place}control", given.get("control", "sigma"), empty=True)
    if "variants" not in given:
        raise WorkbenchError(f"{place}variants is missing: the methods that merge, each with its options")
    rank = given.get("rank")
    every = []
    variants = list(entries(f"{place}variants", given["variants"], dict))
    named = {method for _, (method, _) in variants}
    beside = entries(f"{place}baselines", given.get("baselines", list(_BESIDE)), dict)
    for at, (method, own) in (*variants, *(one for one in beside if one[1][0] not in named)):
        every.append((at, method, own))
        if control and not own.get("control") and method not in MULTITASK_BASELINES:
            every.append((at, method, own | {"control": control}))
    for about in _where(place, given):
        for seed in _seeds(place, given):
            for at, method, own in every:
                settings = {"rank": rank, **own, "adapters": adapters, "tasks": names, "method": method, "seed": seed}
                yield told(at, Multitask, **about, **settings)


def _where(place: str, given: Mapping) -> Iterator[dict]:
    """What a block's runs have in common, once for each number of training examples."""
    if "pool" not in given:
        raise WorkbenchError(f"{place}pool is missing: 'nano', a folder of adapters, or 'hub:' and a base model's id")
    about = {key: None if given.get(key) is None else text(place + key, given[key]) for key in ("base", "folder")}
    about |= {"pool": text(f"{place}pool", given["pool"])}
    about["load"] = settings(f"{place}load", given.get("load"), _options_of(Base.load))
    about["opening"] = settings(f"{place}opening", given.get("opening"), _opened())
    for key in ("n_validation", "n_test"):
        value = given.get(key)
        same = key == "n_validation" and value == "same"
        about[key] = value if value is None or same else whole(place + key, value, 1)
    sizes = given.get("n_train")
    for one in axis(f"{place}n_train", sizes):
        yield about | {"n_train": None if one is None else whole(f"{place}n_train", one, 1)}


def _seeds(place: str, given: Mapping) -> list[int]:
    return [whole(f"{place}seeds", one, 0) for one in axis(f"{place}seeds", given.get("seeds", [0]))]


def _opened() -> list[str]:
    from workbench.hub.opening import survey

    return sorted({*_options_of(Pool.open), *_options_of(survey)} - {"base"})


def _options_of(function) -> list[str]:
    return [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _tasks(place: str, given, folder) -> list[str]:
    """Names of tasks, patterns multiplied out; whether there are data is not asked."""
    found = []
    for i, entry in enumerate(axis(place, given)):
        entry = text(f"{place}[{i}]", entry)
        head, file = entry.partition("/")[0], entry.partition("#")[0]
        if entry in _known():
            found += _known()[entry]
        elif any(sign in entry for sign in "*?[") and (match := [n for n in _every() if fnmatchcase(n, entry)]):
            found += match
        elif file.endswith((".yaml", ".yml")) or (head == "lorahub" and folder is not None):
            found.append(entry)
        else:
            hint = near(entry, [*_known()]) or "; workbench.tasks.names() lists them"
            raise WorkbenchError(f"{place}[{i}]: no task {entry!r}{hint}")
    return list(dict.fromkeys(found))


@cache
def _every() -> tuple[str, ...]:
    from workbench import tasks

    return (*tasks.names(), *tasks.names("bbh"), *tasks.names("study"))


@cache
def _known() -> dict[str, list[str]]:
    """Every task by name, and the kinds of bundled ones."""
    from workbench import tasks
    from workbench.nano import world

    kinds = {kind: tasks.names(kind) for kind in (*world.KINDS, "upstream")}
    return kinds | {name: [name] for name in _every()}


def _notebooks(given: Mapping) -> Iterator[Notebook]:
    from workbench.notebooks import parameters_of
    from workbench.notebooks import read as read_notebook

    path = text("notebook", given["notebook"])
    if not Path(path).is_file():
        raise WorkbenchError(f"notebook: there is no {path} in {Path.cwd()}")
    known = parameters_of(read_notebook(path))
    fixed, sets = given.get("parameters") or {}, listed("list", given.get("list", [{}]))
    for i, own in enumerate(sets):
        for place, one in (("parameters", fixed), (f"list[{i}]", own), ("grid", given.get("grid") or {})):
            check_names(f"{place}.", one, known)
        if twice := sorted(set(fixed) & set(own)):
            raise WorkbenchError(f"list[{i}].{twice[0]}: {twice[0]} is set under parameters, too; leave one out")
        for chosen, _ in grid_of(f"list[{i}]" if "list" in given else "", {**fixed, **own}, given.get("grid") or {}):
            yield told("parameters", Notebook, path, chosen)
