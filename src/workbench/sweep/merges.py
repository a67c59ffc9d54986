"""Carries out one merge for several tasks at once (`spec.Multitask`): a row for each task, by `workbench.multitask`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from workbench.adapt.fresh import NEW_ADAPTER
from workbench.base import Base
from workbench.baselines import BASELINES
from workbench.experiment import MOST_TESTED
from workbench.merge import methods
from workbench.multitask import multitask
from workbench.pool import Pool
from workbench.results import provenance, run_key
from workbench.select import choose
from workbench.sweep.spec import Multitask
from workbench.tasks import Task, load, upstream
from workbench.usage import device_name

__all__ = ["keys_of", "members", "rows_of"]


def members(pool: Pool, run: Multitask) -> dict[str, Task]:
    """The name of each adapter that is merged → its task, with its examples drawn.

    Raises:
        TaskError: adapters whose tasks are neither given nor known.
        SelectionError: more adapters than the pool has.
    """
    chosen = run.adapters
    if isinstance(chosen, int):
        chosen = choose(pool, "random", chosen, seed=run.seed)
    if not run.tasks:
        upstream(chosen, 1)  # says whose tasks are not known
    names = run.tasks or tuple(f"nano/{name}" for name in chosen)
    sizes = {"n_train": run.n_train or 80, "n_validation": run.n_validation or 20, "n_test": run.n_test}
    found = {}
    for adapter, name in zip(chosen, names, strict=True):
        # a bundled adapter was trained on what seed 0 draws, so that its merges are tuned on what another seed draws
        seed = run.seed if run.tasks else run.seed + 1
        task = load(name, seed=seed, folder=run.folder, **sizes)
        found[adapter] = task if run.n_test is not None else replace(task, test=task.test[:MOST_TESTED])
    return found


def keys_of(base: Base, pool: Pool, run: Multitask) -> list[str]:
    """The keys of a run's rows, in the order of its tasks."""
    return _keys(base, pool, run, members(pool, run))


def rows_of(base: Base, pool: Pool, run: Multitask) -> list[dict]:
    """Merge and score: a row for each task, as `multitask` has it, with key, recipe, n_train, pool, base and provenance.

    `seconds` is the whole run's, `merge_seconds` the merge's. With `rank`, the rows are those of the merge that is cut.

    Raises:
        TaskError: as `members`, and a task without validation or test examples.
        MergeError: what the method cannot do with these adapters.
    """
    start, tasks = time.perf_counter(), members(pool, run)
    merges, fresh = run.method in methods(), run.method == "new adapter"
    n_train = min(len(task.train) for task in tasks.values())
    frame = multitask(
        base,
        pool.stack(list(tasks)),
        tasks,
        {run.method: run.variants()} if merges else {},
        controls=[run.control] if run.control else [],
        rank=run.rank,
        fresh=[n_train] if fresh else [],
        schedule=replace(NEW_ADAPTER, **(run.options if fresh else {})),
        single=run.method == "best single",
        real=not run.control,
        seed=run.seed,
    )
    seconds = time.perf_counter() - start
    limit = (run.rank or 0) if merges else 0
    wanted = (frame.method == run.method) | ((frame.variant == run.method) & ~frame.method.isin(methods()))
    rows = frame[wanted & (frame.control == run.control) & (frame.limit == limit)].to_dict("records")
    about = {
        "recipe": run.label.partition(": ")[2],
        "n_train": n_train,
        "seed": run.seed,
        "pool": pool.digest,
        "base": base.digest,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "device_name": device_name(base.device),
        "version": _version(run),
        **provenance(),
    }
    return [
        {"key": key, **row, **about, "merge_seconds": row.get("seconds"), "seconds": seconds}
        for key, row in zip(_keys(base, pool, run, tasks), rows, strict=True)
    ]


def _version(run: Multitask) -> int:
    return {**BASELINES, **methods()}[run.method].version


def _keys(base: Base, pool: Pool, run: Multitask, tasks: Mapping[str, Task]) -> list[str]:
    named = ("method", "seed", "n_train", "n_validation", "n_test", "options", "tune", "control", "rank")
    facts = {name: run.parameters[name] for name in named}
    facts |= {"adapters": list(tasks), "tasks": [task.digest() for task in tasks.values()]}
    facts |= {"version": _version(run)}
    facts |= {"pool": pool.digest, "base": base.digest, "dtype": str(base.dtype), "device": base.device.type}
    return [run_key(facts | {"member": name}) for name in tasks]
