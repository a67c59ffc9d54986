"""The entries of a sweep's list of recipes: a method with its settings, its grid multiplied out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields

from workbench.adapt import ADAPTIVE
from workbench.baselines import BASELINES
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe
from workbench.merge import methods
from workbench.options import Count, Option, near
from workbench.plain import show
from workbench.sweep.fields import listed, settings, text, told
from workbench.sweep.spec import MULTITASK_BASELINES

__all__ = ["entries", "grid_of"]

_ANY_MERGE = {"weights": Option(None), "scale": Option(1.0, float), "rank": Option(None, Count | None)}


def entries(place: str, given, kind: type) -> Iterator[tuple[str, object]]:
    """(path, recipe) of each entry with its grid multiplied out; for a dict (path, (method, fields of a `Multitask`))."""
    own = [one.name for one in fields(Recipe)] if kind is Recipe else ["method", "options", "tune", "control", "rank"]
    for i, entry in enumerate(listed(place, given, least=0)):
        at = f"{place}[{i}]"
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            raise WorkbenchError(f"{at}: expected a method with its settings, got {show(entry)}")
        fixed = {name: value for name, value in entry.items() if name != "grid"}
        for chosen, places in grid_of(at, fixed, entry.get("grid", {})):
            if "method" not in chosen:
                raise WorkbenchError(f"{at}.method is missing")
            method = text(places["method"], chosen["method"])
            known = _options(method, kind)
            if known is None:
                every = [*methods(), *(MULTITASK_BASELINES if kind is dict else [*ADAPTIVE, *BASELINES])]
                raise WorkbenchError(f"{places['method']}: no method {method!r}{near(method, every)}")
            for name in chosen:
                if name not in own and name not in known:
                    raise WorkbenchError(
                        f"{places[name]}: {method} has no such setting{near(str(name), [*own, *known])}"
                    )
            about = {name: value for name, value in chosen.items() if name in own}
            options = settings(f"{at}.options", about.pop("options", {}), list(known))
            options = {**options, **settings(at, {name: v for name, v in chosen.items() if name not in own})}
            tune = settings(f"{at}.tune", about.pop("tune", {}), list(known))
            if kind is Recipe and (deep := [name for name, value in options.items() if isinstance(value, Mapping)]):
                raise WorkbenchError(f"{at}: {deep[0]} is a mapping, which a recipe's options cannot be; give a list")
            about["options"] = {name: _number(known[name], value) for name, value in options.items()}
            about["tune"] = {
                name: [_number(known[name], one) for one in listed(f"{at}.tune.{name}", values)]
                for name, values in tune.items()
            }
            yield at, told(at, Recipe, **about) if kind is Recipe else (about.pop("method"), about)


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


def grid_of(place: str, fixed: Mapping, grid) -> Iterator[tuple[dict, dict[str, str]]]:
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
