"""Recipes and their comparison: no merge without its random control and a newly trained adapter beside it.

recipe = Recipe("coefficients", select="evaluation", k=10, granularity="module")
table = compare(base, pool, ["nano/mirror-months"], [recipe], seeds=range(3))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from operator import index
from pathlib import Path

import pandas as pd

from workbench.base import Base
from workbench.baselines import BASELINES
from workbench.errors import MergeError, TaskError
from workbench.pool import Pool
from workbench.recipe import NEW_ADAPTER, ZERO_SHOT, Recipe
from workbench.results import Results, provenance, run_key
from workbench.runs import Case, Outcome, Workplace, check_examples, run
from workbench.select import choose
from workbench.tasks import Task
from workbench.tasks import load as load_task
from workbench.usage import Peak, device_name

__all__ = ["NEW_ADAPTER", "ZERO_SHOT", "Recipe", "case_of", "compare", "key_of", "rows_of"]

MOST_TESTED = 500  # examples, where nothing else is asked for


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
