"""Recipes and their comparison: no merge without its random control and a newly trained adapter beside it.

recipe = Recipe("coefficients", select="evaluation", k=10, granularity="module")
table = compare(base, pool, ["nano/mirror-months"], [recipe], seeds=range(3))
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from pathlib import Path

import pandas as pd

from workbench.adapt import ADAPTIVE
from workbench.base import Base
from workbench.baselines import BASELINES
from workbench.controls import BUT_OWN, CONTROLS, SHUFFLED
from workbench.errors import MergeError, SelectionError, TaskError
from workbench.merge import methods
from workbench.pool import Pool
from workbench.results import Results, provenance, run_key
from workbench.runs import Case, Outcome, Workplace, check_examples, check_options, run
from workbench.select import SELECTIONS, choose
from workbench.tasks import Task
from workbench.tasks import load as load_task
from workbench.usage import Peak, device_name

__all__ = ["NEW_ADAPTER", "ZERO_SHOT", "Recipe", "case_of", "compare", "key_of", "rows_of"]


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


MOST_TESTED = 500  # examples, where nothing else is asked for
ZERO_SHOT, NEW_ADAPTER = Recipe("zero-shot"), Recipe("new adapter")


def compare(
    base: Base,
    pool: Pool,
    tasks: Iterable[str | Task],
    recipes: Sequence[Recipe],
    *,
    seeds: Iterable[int] = (0,),
    n_train: int = 80,
    n_validation: int = 20,
    n_test: int | None = None,
    control: str = "sigma",
    baselines: Sequence[Recipe] = (ZERO_SHOT, NEW_ADAPTER),
    results: str | Path | None = None,
    place: Workplace | None = None,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Run every recipe, its random control and the baselines on every task and seed; one tidy row each.

    Fits of one recipe run side by side over tasks and seeds. Selection and fitting are rerun for every seed, which also
    draws the training examples (a `Task` given as such keeps its own).

    Args:
        tasks: names for `workbench.tasks.load`, or tasks.
        n_test: test examples of tasks given by name; None takes 500, or all of a task that has fewer.
        control: what the random controls are matched by (sigma, norm, spectrum) or another control of `Recipe`; "" leaves
            them out.
        baselines: recipes run beside; () leaves them out.
        results: a folder; rows already stored there under the same key are read, not run again.
        place: a `runs.Workplace` over this base and pool, which keeps encoded examples, selections and targets' own adapters
            from one comparison to the next.
        say: called with a line of progress per recipe.

    Returns:
        Columns: key, task, metric (by which accuracy is), kind, operation, domain, format, recipe, method and its version,
        select, k, skip, own, control, options, tune, seed, n_train, n_validation, n_test, accuracy and loss on the test
        split, train_loss, train_accuracy, validation_loss, validation_accuracy, scale (λ, tuned), accuracy_unscaled (at
        λ = 1), tuned (the options chosen), coefficient_mean, _norm, _min, _max and _zeros (the share that is 0), rank, norm,
        stable_rank, parameters (trained numbers), diverged, tokens_per_example, passes, tokens, chosen; what it cost:
        seconds (the wall time of all runs of the recipe here, shared equally), side_by_side (among how many) and peak_memory
        (bytes while they ran: on a GPU the most that PyTorch held, the base with it; on a processor by how much the
        process's resident set rose, see `usage.Peak`); and provenance: content hashes of pool, base and split (the task's
        examples), dtype, device, device_name, commit, versions, platform. Stored rows also have schema and written (UTC,
        seconds since 1970). `stats.report` sums them up.

    Raises:
        TaskError: no tasks, or one that does not exist.
        SelectionError, MergeError: what a recipe asks for cannot be done.
    """
    if isinstance(tasks, str | Task):
        raise TaskError(f"expected a sequence of tasks, got the single task {tasks!r:.60}; write [it]")
    seeds, recipes = [index(seed) for seed in seeds], list(recipes)
    sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
    cases = [case_of(task, seed, **sizes) for task in tasks for seed in seeds]
    if not cases:
        raise TaskError("nothing to compare: give at least one task and one seed")
    every = list(baselines)
    for recipe in recipes:
        every += [recipe] + [recipe.against(control)] * bool(
            control and not recipe.control and recipe.method not in BASELINES
        )
    every = list(dict.fromkeys(every))
    if not every:
        raise MergeError("nothing to compare: give at least one recipe or baseline")
    for recipe in every:
        _check(pool, recipe)
    store, place, frames = Results(results) if results else None, place or Workplace(base, pool), []
    for number, recipe in enumerate(every, 1):
        keys = [key_of(base, pool, case, recipe) for case in cases]
        stored = store.keys() if store else ()
        todo = [case for case, key in zip(cases, keys, strict=True) if key not in stored]
        start = time.perf_counter()
        rows = rows_of(place, recipe, todo) if todo else []
        spent = time.perf_counter() - start
        if store:
            for row in rows:
                store.write(row)
            frames.append(store.read(keys))
        else:
            frames.append(pd.DataFrame(rows))
        if say:
            say(
                f"{number}/{len(every)} {recipe.label}: {len(todo)} runs ({len(cases) - len(todo)} stored) in {spent:.1f} s"
            )
    return pd.concat(frames, ignore_index=True)


def _plain(value):
    """An option's value as one that hashes and reads alike wherever it came from: no list, no NumPy number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value


def case_of(
    task: str | Task,
    seed: int,
    *,
    n_train: int | None = 80,
    n_validation: int | str | None = 20,
    n_test: int | None = None,
    draw: int | None = None,
    folder: str | None = None,
) -> Case:
    """A task by name with the examples that a seed draws (`draw`: another seed's), or as it is given, under a seed.

    Raises:
        TaskError: no such task, more examples than it has, or a split without any.
    """
    if not isinstance(task, Task):
        sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test, "folder": folder}
        task = load_task(task, seed=seed if draw is None else draw, **sizes)
        task = task if n_test is not None else replace(task, test=task.test[:MOST_TESTED])
    if not (task.train and task.validation and task.test):
        raise TaskError(f"{task.name}: comparing needs training, validation and test examples")
    return Case(task, seed)


def _check(pool: Pool, recipe: Recipe) -> None:
    """Say before anything runs that a pool is too small for a recipe, or that examples which it needs are not known."""
    if recipe.method not in BASELINES:
        choose(pool, "random", recipe.k, skip=recipe.skip)
        check_examples(recipe.method, pool)


def rows_of(place: Workplace, recipe: Recipe, cases: Sequence[Case]) -> list[dict]:
    """Run one recipe on cases, side by side: a row for each, which `compare` describes.

    Raises:
        SelectionError, MergeError: what the recipe asks for cannot be done.
    """
    _check(place.pool, recipe)
    start, peak = time.perf_counter(), Peak(place.base.device)
    outcomes = run(place, recipe, cases)
    cost = {
        "seconds": (time.perf_counter() - start) / len(cases),
        "side_by_side": len(cases),
        "peak_memory": peak.highest if place.base.device.type == "cuda" else peak.rise,
    }
    return [
        _row(place.base, place.pool, case, recipe, found, cost) for case, found in zip(cases, outcomes, strict=True)
    ]


def key_of(base: Base, pool: Pool, case: Case, recipe: Recipe) -> str:
    """A run's key: a hash of the content of pool, base and task's split, the recipe with its method's own version, the seed,
    the type of numbers and the kind of device.
    """
    return run_key(
        {
            "pool": "" if recipe.method in BASELINES and recipe.method != "best single" else pool.digest,
            "base": base.digest,
            "task": [case.task.name, case.digest],
            "recipe": [getattr(recipe, field.name) for field in fields(recipe)],
            "version": recipe.version,
            "seed": case.seed,
            "dtype": str(base.dtype),
            "device": base.device.type,
        }
    )


def _row(base: Base, pool: Pool, case: Case, recipe: Recipe, outcome: Outcome, cost: Mapping) -> dict:
    task, labels = case.task, case.task.labels
    return {
        "key": key_of(base, pool, case, recipe),
        "task": task.name,
        "metric": task.metric,
        "operation": labels.get("operation", task.name),  # intervals are clustered by it
        **{name: labels.get(name, "") for name in ("kind", "domain", "format")},
        "recipe": recipe.label,
        "method": recipe.method,
        "version": recipe.version,
        "select": recipe.select,
        "k": recipe.k,
        "skip": recipe.skip,
        "own": recipe.own,
        "control": recipe.control,
        "options": json.dumps(dict(recipe.options)),
        "tune": json.dumps(dict(recipe.tune)),
        "seed": case.seed,
        "n_train": len(task.train),
        "n_validation": len(task.validation),
        "n_test": len(task.test),
        **outcome.facts,
        **cost,
        "chosen": json.dumps(outcome.chosen),
        "pool": pool.digest,
        "base": base.digest,
        "split": case.digest,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "device_name": device_name(base.device),
        **provenance(),
    }
