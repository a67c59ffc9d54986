"""Recipes: how an update for a task is made from a pool, as a value.

Recipe("coefficients", select="evaluation", k=10, granularity="module").against("sigma")
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index

from workbench.adapt import ADAPTIVE
from workbench.baselines import BASELINES
from workbench.controls import BUT_OWN, CONTROLS, SHUFFLED
from workbench.errors import MergeError, SelectionError
from workbench.merge import methods
from workbench.runs import check_options
from workbench.select import SELECTIONS

__all__ = ["NEW_ADAPTER", "ZERO_SHOT", "Recipe"]


@dataclass(frozen=True, init=False)
class Recipe:
    """How to get an update for a task: select k adapters, perhaps replace them by random ones, merge or fit.

    method: a merging method (`workbench.merge.methods()`; its λ is tuned on the validation split), an adaptive one
    (`workbench.adapt.ADAPTIVE`: "coefficients", "lorahub", …), or a baseline (`workbench.baselines.BASELINES`: "zero-shot",
    "in-context", "new adapter", "best single", "random subspace", …).
    select, k, skip: how adapters are ranked, how many are taken, and how many of the best are left out before.
    A closeness is to the target's own adapter; where training it never lowered the validation loss, it is zero, nothing is
    close to it, and the order is random.
    own: the target's own adapter (the baseline "new adapter", on the same examples) comes first, on top of the k.
    control: "" for the real adapters, or what random ones are matched by: sigma, norm, spectrum; "sigma but own" and its
    like keep the target's own; "shuffled" hands the coefficients of the real fit to other adapters.
    tune: option → values; each combination is run, and the one of least validation loss stands (what all of them cost is
    counted): equal tuning for methods and baselines.
    Further keyword arguments are the method's options; one that has a name of the above goes into `options`, such as
    `Recipe("lego", k=10, options={"k": 16})`: ten adapters, sixteen clusters. Methods that need each adapter's examples
    (`regmean`, `fisher`) get 16 of its own task's, which are known for bundled adapters only.
    """

    method: str
    select: str
    k: int
    skip: int
    own: bool
    control: str
    options: tuple[tuple[str, object], ...]
    tune: tuple[tuple[str, tuple], ...]

    def __init__(
        self,
        method: str,
        *,
        select: str = "random",
        k: int = 10,
        skip: int = 0,
        own: bool = False,
        control: str = "",
        options: Mapping | None = None,
        tune: Mapping | None = None,
        **more,
    ):
        known = [*methods(), *ADAPTIVE, *BASELINES]
        if method not in known:
            near = difflib.get_close_matches(str(method), known, 2)
            raise MergeError(
                f"no method {method!r}; {'did you mean ' + ' or '.join(near) + '?' if near else 'there are ' + ', '.join(known)}"
            )
        if control and control not in CONTROLS:
            raise MergeError(f"control {control!r} is unknown; choose one of {', '.join(CONTROLS)}")
        if method in BASELINES:
            select, k, skip, own, control = "", 0, 0, False, ""
        elif select not in SELECTIONS:
            near = difflib.get_close_matches(str(select), SELECTIONS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SELECTIONS)}"
            raise SelectionError(f"no selection method {select!r}; {hint}")
        k, skip = index(k), index(skip)
        options = {name: _plain(value) for name, value in {**(options or {}), **more}.items()}
        tune = {name: _plain(values) for name, values in (tune or {}).items()}
        for name, values in tune.items():
            if name in options or not isinstance(values, tuple) or not values:
                raise MergeError(
                    f"{method}: {name} is {'both set and tuned' if name in options else f'tuned over {values!r}, expected a list of values'}"
                )
        check_options(method, options)
        for name, values in tune.items():
            for value in values:
                check_options(method, {**options, name: value})
        if control.endswith(BUT_OWN) and not own:
            raise MergeError(f"control {control!r} keeps the target's own adapter, which own=True brings in")
        if options.get("start") == "target" and not own:
            raise MergeError("start 'target' begins at the target's own adapter, which own=True brings in")
        if control == SHUFFLED and not (method in ADAPTIVE and ADAPTIVE[method].folds(options)):
            folding = [name for name, one in ADAPTIVE.items() if one.folds({})]
            raise MergeError(
                f"{method} has no coefficients over a fixed stack to shuffle; {', '.join(folding)} have (LoraHub in delta space)"
            )
        given = {"method": method, "select": select, "k": k, "skip": skip, "own": bool(own), "control": control}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        object.__setattr__(self, "tune", tuple(sorted(tune.items())))

    @property
    def label(self) -> str:
        """A short name for tables and figures, such as "lego, evaluation 10, random (sigma)"."""
        parts = [self.method] if self.method in BASELINES else [self.method, f"{self.select} {self.k}"]
        parts += [f"after {self.skip}"] * bool(self.skip) + ["own"] * self.own
        parts += [f"{key}={value}" for key, value in self.options]
        parts += [f"{key} of {'/'.join(map(str, values))}" for key, values in self.tune]
        control = SHUFFLED if self.control == SHUFFLED else f"random ({self.control})"
        return ", ".join(parts + [control] * bool(self.control))

    @property
    def version(self) -> int:
        """The method's own version number, part of a run's key."""
        return {**methods(), **ADAPTIVE, **BASELINES}[self.method].version

    def against(self, control: str = "sigma") -> Recipe:
        """The same recipe over matched random adapters, or another control."""
        return self._with(control=control)

    def at(self, options: Mapping) -> Recipe:
        """The same recipe with nothing left to tune, these options set instead."""
        return self._with(options={**dict(self.options), **options}, tune={})

    def _with(self, **changed) -> Recipe:
        given = {name: getattr(self, name) for name in ("select", "k", "skip", "own", "control")}
        given |= {"options": dict(self.options), "tune": dict(self.tune)} | changed
        return Recipe(self.method, **given)


ZERO_SHOT, NEW_ADAPTER = Recipe("zero-shot"), Recipe("new adapter")


def _plain(value):
    """An option's value as one that hashes and reads alike wherever it came from: no list, no NumPy number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value
