"""Which adapters of a pool to merge: every method ranks the whole pool, and the first k (after `skip`) are taken.

A new method is a function (pool, *, task, base, seed) → names, best first, registered with `@selection("name")`.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from workbench.base import Base, check_fits
from workbench.compose import grouped
from workbench.errors import SelectionError, TaskError
from workbench.evaluate import encode_task, score
from workbench.tasks import Task

if TYPE_CHECKING:
    from workbench.pool import Pool

__all__ = ["SELECTIONS", "choose", "rank_adapters", "selection"]

SELECTIONS: dict[str, Callable[..., list[str]]] = {}


def selection(name: str):
    """Register a ranking function under a name."""

    def register(function):
        SELECTIONS[name] = function
        return function

    return register


def choose(pool: Pool, how: str, k: int, *, task=None, base=None, seed: int = 0, skip: int = 0) -> list[str]:
    """The names of k adapters, best first, after leaving out the first `skip` of the ranking.

    Raises:
        SelectionError: an unknown method, k or skip out of range, or what the method needs is missing.
    """
    if how not in SELECTIONS:
        near = difflib.get_close_matches(str(how), SELECTIONS, 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(sorted(SELECTIONS))}"
        raise SelectionError(f"no selection method {how!r}; {hint}")
    if k < 1 or skip < 0:
        raise SelectionError(f"k is {k} and skip is {skip}, expected k ≥ 1 and skip ≥ 0")
    if k + skip > len(pool):
        skipped = f" after the first {skip}" if skip else ""
        raise SelectionError(f"{k} adapters asked for{skipped}, but pool {pool.name!r} has {len(pool)}")
    return SELECTIONS[how](pool, task=task, base=base, seed=seed)[skip : skip + k]


@selection("random")
def at_random(pool: Pool, *, seed: int, **_) -> list[str]:
    """A random order under the seed; fewer adapters are always the first of more."""
    names = list(pool.names)
    random.Random(f"select|{seed}").shuffle(names)
    return names


@selection("evaluation")
def by_evaluation(pool: Pool, *, task: Task | None, base: Base | None, **_) -> list[str]:
    """By each adapter's accuracy on the task's training examples."""
    if task is None or base is None:
        lacking = "task" if task is None else "base"
        raise SelectionError(f"selection by evaluation needs a {lacking}: pool.select('evaluation', k, task=…, base=…)")
    return rank_adapters(pool, task, base)["name"].tolist()


def rank_adapters(pool: Pool, task: Task, base: Base) -> pd.DataFrame:
    """name, accuracy and loss (nats per answer token, mean over examples) of every accepted adapter, best first.

    Scored on the training split only: the recycling study's reference code adds validation, which leaks. Ties in
    accuracy go to the lower loss, then to the name. Asking again for the same pool, base and examples costs nothing.

    Raises:
        TaskError: no training examples.
        SelectionError: no accepted adapter.
        AdapterError: an adapter that does not fit the base.
    """
    if not task.train:
        raise TaskError(f"{task.name} has no training examples to evaluate adapters on")
    if not len(pool):
        raise SelectionError(f"pool {pool.name!r} has no accepted adapter; pool.table says why")
    known = pool.rankings.setdefault(base, {})
    key = (task.instruction, task.template, task.max_new_tokens, task.train, str(base.device), str(base.dtype))
    if key not in known:
        known[key] = _score_all(pool, task, base)
    return known[key].copy()


def _score_all(pool: Pool, task: Task, base: Base) -> pd.DataFrame:
    examples, rows = encode_task(base, task, task.train), []
    chunks = _chunks(pool, 2**32 if base.device.type == "cuda" else 2**28)
    held = pool.rankings[base].setdefault("factors", {})  # of a pool that fits at once: the next task asks again
    for chunk in chunks:
        updates = held.get(tuple(chunk))
        if updates is None:
            adapters = [pool.adapter(name) for name in chunk]
            for adapter in adapters:
                check_fits(adapter, base.layers)
            updates = grouped(adapters, base.device)
            if len(chunks) == 1:
                held[tuple(chunk)] = updates
        result = score(base, [examples] * len(chunk), updates)
        rows += zip(chunk, result.accuracy.tolist(), result.loss.mean(1).tolist(), strict=True)
    rows.sort(key=lambda row: (-row[1], round(row[2], 6), row[0]))
    return pd.DataFrame(rows, columns=["name", "accuracy", "loss"])


def _chunks(pool: Pool, budget: int) -> list[list[str]]:
    """Names in groups of like rank, whose factors, filled up to the group's largest rank, take at most `budget` bytes."""
    facts = pool.table.set_index("name")
    names = sorted(pool.names, key=lambda name: (facts.at[name, "rank"], name))
    chunks: list[list[str]] = []
    widest = 0.0
    for name in names:
        rank, parameters = facts.at[name, "rank"], facts.at[name, "parameters"]
        widest = max(widest, parameters / facts.at[name, "mean_rank"])  # Σ (d_out + d_in), about
        if not chunks or (len(chunks[-1]) + 1) * 4 * widest * rank > budget:
            chunks.append([])
        chunks[-1].append(name)
    return chunks
