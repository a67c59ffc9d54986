"""The relevance dial: selections that bring in one adapter of a given relevance, among others that share nothing.

    Recipe("coefficients", select="dial operation", k=10)   # one that knows the operation, nine that share nothing

Under one seed every level has the same fillers, so two levels differ by one adapter. From the closest: twin (trained on
the target task itself; only in the pool that `nano.pools` makes), operation (in another domain or format), format,
domain (each of these alone), nothing.
"""

from __future__ import annotations

import random

from workbench.errors import SelectionError
from workbench.nano import world
from workbench.pool import Pool
from workbench.select import selection
from workbench.tasks import Task

__all__ = ["LEVELS", "level", "levels_of"]

LEVELS = ("twin", "operation", "format", "domain", "nothing")


def level(target: world.Spec, upstream: world.Spec) -> str:
    """What an upstream task has in common with a target, as one of `LEVELS`; "both" for format and domain together.

    Of a composition one part is enough to share the operation.
    """
    if (target.operation, target.domain, target.format) == (upstream.operation, upstream.domain, upstream.format):
        return "twin"
    if set(target.parts) & set(upstream.parts):
        return "operation"
    same = target.format == upstream.format, target.domain == upstream.domain
    return {(True, True): "both", (True, False): "format", (False, True): "domain", (False, False): "nothing"}[same]


def levels_of(task: Task, pool: Pool) -> tuple[str, ...]:
    """The levels at which the pool has an adapter for this task.

    Raises:
        SelectionError: the task, or an adapter of the pool, is not a bundled one.
    """
    found = set(_by_level(pool, task))
    return tuple(one for one in LEVELS if one in found)


def _by_level(pool: Pool, task: Task | None) -> dict[str, list[str]]:
    target = world.find(task.name.removeprefix("nano/")) if task is not None else None
    specs = {name: world.find(name) for name in pool.names}
    unknown = [name for name, spec in specs.items() if spec is None]
    if target is None or unknown:
        what = f"adapter {unknown[0]!r}" if unknown else f"task {task.name!r}" if task else "no task"
        raise SelectionError(f"the relevance dial knows bundled tasks and adapters only; got {what}")
    out: dict[str, list[str]] = {}
    for name, spec in specs.items():
        out.setdefault(level(target, spec), []).append(name)
    return out


def _register(which: str) -> None:
    @selection(f"dial {which}")
    def ranked(pool: Pool, *, task: Task | None, seed: int, **_) -> list[str]:
        found = _by_level(pool, task)
        if which not in found:
            raise SelectionError(
                f"the pool has no adapter at level {which!r} for {task.name}; it has {', '.join(sorted(found))}"
            )
        unrelated = found.get("nothing", [])
        fillers = random.Random(f"dial|{seed}").sample(unrelated, len(unrelated))  # the same at every level
        first = [] if which == "nothing" else [random.Random(f"dial|{which}|{seed}").choice(found[which])]
        others = [name for kind in sorted(found) if kind != "nothing" for name in found[kind] if name not in first]
        return first + fillers + others


for _level in LEVELS:
    _register(_level)
