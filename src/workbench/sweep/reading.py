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
    blocks:                             # each with fields of its own in place of the shared ones
      - {name: relevance, n_train: 10, recipes: [{method: coefficients, grid: {skip: [5, 10]}}]}
    merges:                             # several tasks' adapters into one (`spec.Multitask`)
      - adapters: [reverse-letters, second-days]        # or how many are drawn; with `tasks` where not bundled
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

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from pathlib import Path

import yaml

from workbench.adapt import ADAPTIVE
from workbench.base import Base
from workbench.baselines import BASELINES
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe
from workbench.merge import methods
from workbench.options import Option, near
from workbench.plain import show
from workbench.pool import Pool
from workbench.sweep.spec import MULTITASK_BASELINES, Experiment, Multitask, Notebook, Run, Settings, Sweep

__all__ = ["read", "sweep_of"]

_SIZES = ("n_train", "n_validation", "n_test")
_WHERE = ("pool", "opening", "base", "load", "folder", "seeds", *_SIZES)
_COMPARED = ("control", "baselines", "tasks", "draw", "recipes")
_TOP = ("name", "results", "together", "estimate")
_VARIED = ("notebook", "parameters", "grid", "list")
_MERGED = ("name", *_WHERE, "adapters", "tasks", "variants", "control", "rank")
_ANY_MERGE = {"weights": Option(None), "scale": Option(1.0, float), "rank": Option(None, int | None)}
_BESIDE = ("zero-shot", "new adapter")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise WorkbenchError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice in one mapping")
                seen[key.value] = key
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> Sweep:
    """A sweep from its YAML file; raises as `sweep_of`, with the file's name."""
    path = Path(path)
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
    _names("", given, (*_TOP, *_VARIED) if varied else (*_TOP, *_WHERE, *_COMPARED, "blocks", "merges"))
    name = _text("name", given.get("name", name))
    assumed = _settings("estimate", given.get("estimate"))
    about = {"results": _text("results", given.get("results", f"runs/{name}")), "assumed": assumed}
    about["together"] = _whole("together", given.get("together", 1), 1)
    runs = list(_notebooks(given) if varied else _experiments(given))
    if not runs:
        raise WorkbenchError("nothing to run: give recipes (or baselines) with tasks and seeds, merges, or a notebook")
    return Sweep(name, runs=tuple(runs), **about)


def _experiments(given: Mapping) -> Iterator[Run]:
    shared = {key: given[key] for key in (*_WHERE, *_COMPARED) if key in given}
    blocks = _list("blocks", given.get("blocks", []))
    if "recipes" in shared or (shared.get("tasks") and not blocks):
        yield from _block("", shared)
    for i, own in enumerate(blocks):
        place = f"blocks[{i}]."
        _names(place, own, ("name", *_WHERE, *_COMPARED))
        yield from _block(place, {key: value for key, value in shared.items() if key != "recipes"} | dict(own))
    for i, own in enumerate(_list("merges", given.get("merges", []))):
        place = f"merges[{i}]."
        _names(place, own, _MERGED)
        yield from _merges(place, {key: shared[key] for key in (*_WHERE, "control") if key in shared} | dict(own))


def _block(place: str, given: Mapping) -> Iterator[Experiment]:
    control = _text(f"{place}control", given.get("control", "sigma"), empty=True)
    beside = _entries(f"{place}baselines", given.get("baselines", list(_BESIDE)), Recipe)
    every = [recipe for _, recipe in beside]
    for at, recipe in _entries(f"{place}recipes", given.get("recipes", []), Recipe):
        every.append(recipe)
        if control and not recipe.control and recipe.method not in BASELINES:
            every.append(_told(at, recipe.against, control))
    if not every:
        raise WorkbenchError(f"{place}recipes: nothing to run: give at least one recipe or baseline")
    folder, draw = given.get("folder"), given.get("draw")
    names = _tasks(f"{place}tasks", given.get("tasks", []), folder)
    draw = None if draw is None else _whole(f"{place}draw", draw, 0)
    for about in _where(place, given):
        for task in names:
            for seed in _seeds(place, given):
                for recipe in dict.fromkeys(every):
                    yield _told(place, Experiment, task=task, seed=seed, recipe=recipe, draw=draw, **about)


def _merges(place: str, given: Mapping) -> Iterator[Multitask]:
    adapters, names = given.get("adapters"), given.get("tasks", [])
    if isinstance(adapters, bool) or not isinstance(adapters, int):
        adapters = tuple(
            _text(f"{place}adapters[{i}]", one) for i, one in enumerate(_list(f"{place}adapters", adapters))
        )
    names = _tasks(f"{place}tasks", names, given.get("folder")) if names else []
    control = _text(f"{place}control", given.get("control", "sigma"), empty=True)
    if "variants" not in given:
        raise WorkbenchError(f"{place}variants is missing: the methods that merge, each with its options")
    rank = given.get("rank")
    every = []
    for at, (method, own) in _entries(f"{place}variants", given["variants"], dict):
        every.append((at, method, own))
        if control and not own.get("control") and method not in MULTITASK_BASELINES:
            every.append((at, method, own | {"control": control}))
    for about in _where(place, given):
        for seed in _seeds(place, given):
            for at, method, own in every:
                settings = {"rank": rank, **own, "adapters": adapters, "tasks": names, "method": method, "seed": seed}
                yield _told(at, Multitask, **about, **settings)


def _where(place: str, given: Mapping) -> Iterator[dict]:
    """What a block's runs have in common, once for each number of training examples."""
    if "pool" not in given:
        raise WorkbenchError(f"{place}pool is missing: 'nano', a folder of adapters, or 'hub:' and a base model's id")
    about = {key: None if given.get(key) is None else _text(place + key, given[key]) for key in ("base", "folder")}
    about |= {"pool": _text(f"{place}pool", given["pool"])}
    about["load"] = _settings(f"{place}load", given.get("load"), _options_of(Base.load))
    about["opening"] = _settings(f"{place}opening", given.get("opening"), _opened())
    for key in ("n_validation", "n_test"):
        value = given.get(key)
        same = key == "n_validation" and value == "same"
        about[key] = value if value is None or same else _whole(place + key, value, 1)
    sizes = given.get("n_train")
    for one in _axis(f"{place}n_train", sizes):
        yield about | {"n_train": None if one is None else _whole(f"{place}n_train", one, 1)}


def _seeds(place: str, given: Mapping) -> list[int]:
    return [_whole(f"{place}seeds", one, 0) for one in _axis(f"{place}seeds", given.get("seeds", [0]))]


def _opened() -> list[str]:
    from workbench.hub.opening import survey

    return sorted({*_options_of(Pool.open), *_options_of(survey)} - {"base"})


def _options_of(function) -> list[str]:
    return [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _tasks(place: str, given, folder) -> list[str]:
    """Names of tasks, patterns multiplied out; whether there are data is not asked."""
    found = []
    for i, entry in enumerate(_axis(place, given)):
        entry = _text(f"{place}[{i}]", entry)
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


def _entries(place: str, given, kind: type) -> Iterator[tuple[str, object]]:
    """(path, recipe) of each entry with its grid multiplied out; for a dict (path, (method, fields of a `Multitask`))."""
    own = [one.name for one in fields(Recipe)] if kind is Recipe else ["method", "options", "tune", "control", "rank"]
    for i, entry in enumerate(_list(place, given)):
        at = f"{place}[{i}]"
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            raise WorkbenchError(f"{at}: expected a method with its settings, got {show(entry)}")
        fixed = {name: value for name, value in entry.items() if name != "grid"}
        for chosen, places in _grid(at, fixed, entry.get("grid", {})):
            if "method" not in chosen:
                raise WorkbenchError(f"{at}.method is missing")
            method = _text(places["method"], chosen["method"])
            known = _options(method, kind)
            if known is None:
                every = [*methods(), *(MULTITASK_BASELINES if kind is dict else [*ADAPTIVE, *BASELINES])]
                raise WorkbenchError(f"{places['method']}: no method {method!r}{near(method, every)}")
            for name in chosen:
                if name not in own and name not in known:
                    raise WorkbenchError(
                        f"{places[name]}: {method} has no such setting{near(str(name), [*own, *known])}"
                    )
            told = {name: value for name, value in chosen.items() if name in own}
            options = told.pop("options", {}) | {k: v for k, v in chosen.items() if k not in own}
            told["options"] = {k: _number(known.get(k), v) for k, v in _settings(f"{at}.options", options).items()}
            tuned = _settings(f"{at}.tune", told.pop("tune", {}), list(known))
            told["tune"] = {k: [_number(known[k], one) for one in _list(f"{at}.tune.{k}", v)] for k, v in tuned.items()}
            if kind is Recipe:
                yield at, _told(at, Recipe, **told)
            else:
                yield at, (told.pop("method"), told)


def _options(method: str, kind: type) -> Mapping[str, Option] | None:
    if method in methods():
        return {**methods()[method].options, **_ANY_MERGE}
    if kind is Recipe and method in ADAPTIVE:
        return ADAPTIVE[method].options
    if method in (BASELINES if kind is Recipe else MULTITASK_BASELINES):
        return BASELINES[method].options
    return None


def _number(option: Option | None, value):
    """A number that YAML 1.1 reads as text, such as 1e-3, where a number is allowed and this text is not."""
    if isinstance(value, str) and option is not None and not option.accepts(value):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) and option.accepts(number) else value
    return value


def _grid(place: str, fixed: Mapping, grid) -> Iterator[tuple[dict, dict[str, str]]]:
    """Every combination of a grid's values over what is fixed, with the path of each name."""
    if not isinstance(grid, Mapping):
        raise WorkbenchError(f"{place}.grid: expected names with lists of values, got {show(grid)}")
    for name, values in grid.items():
        if name in fixed:
            raise WorkbenchError(f"{place}.grid.{name}: {name} is set beside the grid, too; leave one out")
        if not isinstance(values, list) or not values:
            raise WorkbenchError(f"{place}.grid.{name}: expected a list of values, got {show(values)}")
    places = {name: f"{place}.{name}" for name in fixed} | {name: f"{place}.grid.{name}" for name in grid}
    for values in itertools.product(*grid.values()):
        yield {**fixed, **dict(zip(grid, values, strict=True))}, places


def _notebooks(given: Mapping) -> Iterator[Notebook]:
    from workbench.notebooks import parameters_of
    from workbench.notebooks import read as read_notebook

    path = _text("notebook", given["notebook"])
    if not Path(path).is_file():
        raise WorkbenchError(f"notebook: there is no {path} in {Path.cwd()}")
    known = parameters_of(read_notebook(path))
    fixed, sets = given.get("parameters") or {}, _list("list", given.get("list", [{}]))
    for i, own in enumerate(sets):
        for place, one in (("parameters", fixed), (f"list[{i}]", own), ("grid", given.get("grid") or {})):
            _names(f"{place}.", one, known)
        if twice := sorted(set(fixed) & set(own)):
            raise WorkbenchError(f"list[{i}].{twice[0]}: {twice[0]} is set under parameters, too; leave one out")
        for chosen, _ in _grid(f"list[{i}]" if "list" in given else "", {**fixed, **own}, given.get("grid") or {}):
            yield _told("parameters", Notebook, path, chosen)


def _told(place: str, function, *given, **more):
    """A call whose error says where in the file it came from."""
    try:
        return function(*given, **more)
    except (WorkbenchError, TypeError) as error:
        raise WorkbenchError(f"{place.rstrip('.') or 'the sweep'}: {error}") from error


def _names(place: str, given, known: Sequence[str] | Mapping) -> None:
    if not isinstance(given, Mapping):
        raise WorkbenchError(f"{place.rstrip('.')}: expected fields with values, got {show(given)}")
    for name in given:
        if name not in known:
            hint = near(str(name), known) or f"; there are {', '.join(known)}"
            raise WorkbenchError(f"{place}{name}: no such field{hint}")


def _settings(place: str, given, known: Sequence[str] | None = None) -> Settings:
    if given is None:
        return Settings()
    _names(f"{place}.", given, list(given) if known is None and isinstance(given, Mapping) else known or [])
    return _told(place, Settings, given)


def _list(place: str, given) -> list:
    if not isinstance(given, list) or not given:
        if given == [] and place.endswith(("blocks", "merges", "baselines", "recipes")):
            return []
        raise WorkbenchError(f"{place}: expected a list with at least one entry, got {show(given)}")
    return given


def _axis(place: str, given) -> list:
    return _list(place, given) if isinstance(given, list) else [given]


def _text(place: str, value, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        hint = (
            " (YAML reads yes, no, on and off as true and false: put it in quotes)" if isinstance(value, bool) else ""
        )
        raise WorkbenchError(f"{place}: expected a text, got {show(value)}{hint}")
    return value


def _whole(place: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkbenchError(f"{place}: expected a whole number, at least {least}, got {show(value)}")
    return value
