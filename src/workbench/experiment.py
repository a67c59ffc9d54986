"""Recipes and their comparison: no merge without its random control and a newly trained adapter beside it.

recipe = Recipe("coefficients", select="evaluation", k=10, granularity="module")
table = compare(base, pool, ["nano/mirror-months"], [recipe], seeds=range(3))
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path

import pandas as pd

from workbench.adapt import ADAPTIVE
from workbench.base import Base
from workbench.controls import MATCHES
from workbench.errors import MergeError, SelectionError, TaskError
from workbench.merge import methods
from workbench.pool import Pool
from workbench.results import Results, provenance, run_key
from workbench.runs import BASELINES, Case, Outcome, Workplace, check_examples, check_options, run
from workbench.select import SELECTIONS, choose
from workbench.tasks import Task
from workbench.tasks import load as load_task

__all__ = ["NEW_ADAPTER", "ZERO_SHOT", "Recipe", "compare"]


@dataclass(frozen=True, init=False)
class Recipe:
    """How to get an update for a task: select k adapters, perhaps replace them by random ones, merge or fit.

    method: a merging method (`workbench.merge.methods()`; its λ is tuned on the validation split), "coefficients",
    "lorahub", or a baseline: "zero-shot", "in-context" (option shots), "new adapter" (options rank, ratio, steps, lr).
    control: "" for the real adapters, or what random ones are matched by: sigma, norm, spectrum.
    Further keyword arguments are the method's options; one that has a name of the above goes into `options`, such as
    `Recipe("lego", k=10, options={"k": 16})`: ten adapters, sixteen clusters. Methods that need each adapter's examples
    (`regmean`, `fisher`) get 16 of its own task's, which are known for bundled adapters only.
    """

    method: str
    select: str
    k: int
    control: str
    options: tuple[tuple[str, object], ...]

    def __init__(
        self,
        method: str,
        *,
        select: str = "random",
        k: int = 10,
        control: str = "",
        options: Mapping | None = None,
        **more,
    ):
        known = [*methods(), *ADAPTIVE, *BASELINES]
        if method not in known:
            near = difflib.get_close_matches(str(method), known, 2)
            raise MergeError(
                f"no method {method!r}; {'did you mean ' + ' or '.join(near) + '?' if near else 'there are ' + ', '.join(known)}"
            )
        if control and control not in MATCHES:
            raise MergeError(f"random control {control!r} is unknown; choose one of {', '.join(MATCHES)}")
        if method in BASELINES:
            select, k, control = "", 0, ""
        elif select not in SELECTIONS:
            near = difflib.get_close_matches(str(select), SELECTIONS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SELECTIONS)}"
            raise SelectionError(f"no selection method {select!r}; {hint}")
        k, options = index(k), {name: _plain(value) for name, value in {**(options or {}), **more}.items()}
        check_options(method, options)
        for name, value in {"method": method, "select": select, "k": k, "control": control}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    @property
    def label(self) -> str:
        """A short name for tables and figures, such as "lego, evaluation 10, random (sigma)"."""
        parts = [self.method] if self.method in BASELINES else [self.method, f"{self.select} {self.k}"]
        return ", ".join(
            parts
            + [f"{key}={value}" for key, value in self.options]
            + [f"random ({self.control})"] * bool(self.control)
        )

    @property
    def version(self) -> int:
        """The method's own version number, part of a run's key."""
        if self.method in BASELINES:
            return BASELINES[self.method]
        return ADAPTIVE[self.method][1] if self.method in ADAPTIVE else methods()[self.method].version

    def against(self, control: str = "sigma") -> Recipe:
        """The same recipe over matched random adapters."""
        return Recipe(self.method, select=self.select, k=self.k, control=control, options=dict(self.options))


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
    n_test: int = 500,
    control: str = "sigma",
    baselines: Sequence[Recipe] = (ZERO_SHOT, NEW_ADAPTER),
    results: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Run every recipe, its random control and the baselines on every task and seed; one tidy row each.

    Fits of one recipe run side by side over tasks and seeds. Selection and fitting are rerun for every seed, which also
    draws the training examples (a `Task` given as such keeps its own).

    Args:
        tasks: names for `workbench.tasks.load`, or tasks.
        control: what the random controls are matched by (sigma, norm, spectrum); "" leaves them out.
        baselines: recipes run beside; () leaves them out.
        results: a folder; rows already stored there under the same key are read, not run again.
        say: called with a line of progress per recipe.

    Returns:
        Columns: key, task, kind, operation, domain, format, recipe, method, select, k, control, options, seed, n_train,
        accuracy and loss on the test split, train_loss, train_accuracy, validation_loss, scale (λ, tuned),
        accuracy_unscaled (at λ = 1), rank, norm, tokens_per_example, passes, tokens, seconds, chosen, and provenance.

    Raises:
        TaskError: no tasks, or one that does not exist.
        SelectionError, MergeError: what a recipe asks for cannot be done.
    """
    if isinstance(tasks, str | Task):
        raise TaskError(f"expected a sequence of tasks, got the single task {tasks!r:.60}; write [it]")
    seeds, recipes = [index(seed) for seed in seeds], list(recipes)
    cases = [
        Case(
            task
            if isinstance(task, Task)
            else load_task(task, seed=seed, n_train=n_train, n_validation=n_validation, n_test=n_test),
            seed,
        )
        for task in tasks
        for seed in seeds
    ]
    if not cases:
        raise TaskError("nothing to compare: give at least one task and one seed")
    for case in cases:
        if not (case.task.train and case.task.validation and case.task.test):
            raise TaskError(f"{case.task.name}: comparing needs training, validation and test examples")
    every = list(baselines)
    for recipe in recipes:
        every += [recipe] + [recipe.against(control)] * bool(
            control and not recipe.control and recipe.method not in BASELINES
        )
    every = list(dict.fromkeys(every))
    if not every:
        raise MergeError("nothing to compare: give at least one recipe or baseline")
    for recipe in every:
        if recipe.method not in BASELINES:
            choose(pool, "random", recipe.k)  # a k out of range is said before anything runs
            check_examples(recipe.method, pool)
    store, place, frames = Results(results) if results else None, Workplace(base, pool), []
    for number, recipe in enumerate(every, 1):
        keys = [_key(base, pool, case, recipe) for case in cases]
        todo = [i for i, key in enumerate(keys) if not (store and store.has(key))]
        start = time.perf_counter()
        found = run(place, recipe, [cases[i] for i in todo]) if todo else []
        spent = (time.perf_counter() - start) / max(1, len(todo))
        rows = [
            _row(keys[i], base, pool, cases[i], recipe, outcome, spent) for i, outcome in zip(todo, found, strict=True)
        ]
        if store:
            for row in rows:
                store.write(row)
            frames.append(store.read(keys))
        else:
            frames.append(pd.DataFrame(rows))
        if say:
            say(
                f"{number}/{len(every)} {recipe.label}: {len(todo)} runs ({len(cases) - len(todo)} stored) in {spent * len(todo):.1f} s"
            )
    return pd.concat(frames, ignore_index=True)


def _plain(value):
    """An option's value as one that hashes and reads alike wherever it came from: no list, no NumPy number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value


def _key(base: Base, pool: Pool, case: Case, recipe: Recipe) -> str:
    return run_key(
        {
            "pool": "" if recipe.method in BASELINES else pool.digest,
            "base": base.digest,
            "task": [case.task.name, case.digest],
            "recipe": [recipe.method, recipe.select, recipe.k, recipe.control, recipe.options],
            "version": recipe.version,
            "seed": case.seed,
            "dtype": str(base.dtype),
            "device": base.device.type,
        }
    )


def _row(key: str, base: Base, pool: Pool, case: Case, recipe: Recipe, outcome: Outcome, seconds: float) -> dict:
    task, labels = case.task, case.task.labels
    return {
        "key": key,
        "task": task.name,
        "operation": labels.get("operation", task.name),  # intervals are clustered by it
        **{name: labels.get(name, "") for name in ("kind", "domain", "format")},
        "recipe": recipe.label,
        "method": recipe.method,
        "select": recipe.select,
        "k": recipe.k,
        "control": recipe.control,
        "options": json.dumps(dict(recipe.options)),
        "seed": case.seed,
        "n_train": len(task.train),
        "n_validation": len(task.validation),
        "n_test": len(task.test),
        **outcome.facts,
        "seconds": seconds,
        "chosen": json.dumps(outcome.chosen),
        "pool": pool.digest,
        "base": base.digest,
        "split": case.digest,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        **provenance(),
    }
