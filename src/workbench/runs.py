"""Carries recipes out, all tasks and seeds of one recipe side by side: selection, merging or fitting, scoring."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch

from workbench.adapt import ADAPTIVE, fit_many, options_of, scheduled
from workbench.adapt.fresh import NEW_ADAPTER, Plan, train_fresh
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.compose import LowRank, grouped
from workbench.controls import random_like
from workbench.errors import MergeError
from workbench.evaluate import Encoded, encode_task, score
from workbench.merge import Dense, collect, merge, methods
from workbench.nano import world
from workbench.pool import Pool
from workbench.select import choose
from workbench.stack import Stack
from workbench.tasks import Task, upstream

__all__ = [
    "BASELINES",
    "EXAMPLES",
    "SCALES",
    "Case",
    "Outcome",
    "Workplace",
    "check_examples",
    "check_options",
    "run",
    "tune_scales",
]

BASELINES = {"zero-shot": 1, "in-context": 1, "new adapter": 1}  # name → version
_BASELINE_OPTIONS = {
    "zero-shot": (),
    "in-context": ("shots",),
    "new adapter": tuple(option.name for kind in (Plan, Schedule) for option in fields(kind)),
}
_OF_ANY_MERGE = ("weights", "scale", "rank")
EXAMPLES = 16  # of each adapter's own task, for merges that need them; part of those methods' versions
SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


def check_options(method: str, options: Mapping) -> None:
    """Check a recipe's options before anything runs: their names, and a merging method's values.

    Raises:
        MergeError: an option that the method does not have (near names are given), or a value that it does not allow.
    """
    if method in methods():
        methods()[method].settings({name: value for name, value in options.items() if name not in _OF_ANY_MERGE})
        return
    known = options_of(method) if method in ADAPTIVE else _BASELINE_OPTIONS[method]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise MergeError(f"{method} has no option {name!r}{hint}; it takes {', '.join(known) or 'none'}")


def check_examples(method: str, pool: Pool) -> None:
    """Check, before anything runs, that a merge which needs the adapters' examples can have them.

    Raises:
        MergeError: the pool holds adapters that are not bundled ones, whose tasks are not known.
    """
    needs = methods()[method].needs if method in methods() else ""
    unknown = [name for name in pool.names if world.find(name) is None] if needs else []
    if unknown:
        raise MergeError(
            f"{method} needs {needs} of each adapter's examples, which a recipe finds for bundled adapters only, not for "
            f"{unknown[0]!r}; merge by hand with workbench.merge.merge(stack, {method!r}, statistics=collect(base, stack, examples))"
        )


@dataclass(frozen=True)
class Case:
    """One task with its drawn examples, under one seed."""

    task: Task
    seed: int

    @cached_property
    def digest(self) -> str:
        return self.task.digest()


@dataclass
class Outcome:
    """What one run found: `facts` are columns of its row, `chosen` the adapters' names."""

    facts: dict = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)


class Workplace:
    """A base, a pool, and what runs over them can share: encoded splits, selections, merges."""

    def __init__(self, base: Base, pool: Pool):
        self.base, self.pool = base, pool
        self.side_by_side = 512 if base.device.type == "cuda" else 8
        self._encoded: dict = {}
        self._stacks: dict = {}
        self._merged: dict = {}
        self._originals: dict = {}  # id of a stack → the names of the adapters it holds or stands in for

    def encoded(self, case: Case, split: str, shots: int = 0) -> list[Encoded]:
        """A split's examples as token ids, made once."""
        task, examples = case.task, getattr(case.task, split)
        shown = (shots, case.seed, task.train, task.bare, task.separator) if shots else ()
        key = (task.name, task.instruction, task.template, task.max_new_tokens, examples, shown)
        if key not in self._encoded:
            self._encoded[key] = encode_task(self.base, task, examples, shots=shots, seed=case.seed)
        return self._encoded[key]

    def stack(self, recipe, case: Case) -> Stack:
        """The recipe's adapters for a case, or their random stand-ins."""
        names = tuple(choose(self.pool, recipe.select, recipe.k, task=case.task, base=self.base, seed=case.seed))
        key = (names, recipe.control, case.seed if recipe.control else 0)
        if key not in self._stacks:
            chosen = self.pool.stack(names)
            self._stacks[key] = random_like(chosen, recipe.control, seed=case.seed) if recipe.control else chosen
            self._originals[id(self._stacks[key])] = names
        return self._stacks[key]

    def merged(self, recipe, stack: Stack) -> Adapter:
        """The merge of a stack, made once however many tasks ask for it."""
        key = (id(stack), recipe.method, recipe.options)
        if key not in self._merged:
            known = self._statistics(stack, methods()[recipe.method].needs)
            result = merge(stack, recipe.method, statistics=known, **dict(recipe.options))
            self._merged[key] = result.truncate() if isinstance(result, Dense) else result
        return self._merged[key]

    def _statistics(self, stack: Stack, needs: str):
        """What a merge needs of the adapters' examples, a random stand-in taking those of the adapter it replaces."""
        if not needs:
            return None
        tasks = upstream(self._originals[id(stack)], EXAMPLES)
        examples = dict(zip(stack.names, tasks.values(), strict=True))
        return collect(self.base, stack, examples, gradients=needs == "gradients")


def run(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    """Run one recipe on many cases; outcomes in their order."""
    found: dict[int, Outcome] = {}
    sizes = [tuple(len(getattr(case.task, split)) for split in ("train", "validation", "test")) for case in cases]
    for size in dict.fromkeys(sizes):
        like = [i for i, own in enumerate(sizes) if own == size]
        for start in range(0, len(like), place.side_by_side):
            part = like[start : start + place.side_by_side]
            found |= zip(
                part, _FAMILIES.get(recipe.method, _merged)(place, recipe, [cases[i] for i in part]), strict=True
            )
    return [found[i] for i in range(len(cases))]


def _prompted(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    shots = dict(recipe.options).get("shots", 5) if recipe.method == "in-context" else 0
    outcomes = _scored(place, cases, None, shots)
    for outcome in outcomes:
        outcome.facts |= {"rank": 0, "norm": 0.0, "passes": 0, "tokens": 0}
    return outcomes


def _new(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    schedule, own = scheduled(NEW_ADAPTER, dict(recipe.options))
    plan = Plan(**own)
    train, validation = ([place.encoded(case, split) for case in cases] for split in ("train", "validation"))
    adapters, curves = train_fresh(
        place.base,
        [f"new-{case.task.name}" for case in cases],
        train,
        validation,
        schedule,
        seeds=[case.seed for case in cases],
        plans=[plan] * len(cases),
    )
    outcomes = _scored(place, cases, adapters)
    for g, outcome in enumerate(outcomes):
        checks = len(curves.at)
        passes = schedule.steps * min(schedule.batch, len(train[g])) + checks * len(validation[g])
        outcome.facts |= {"passes": passes, "tokens": int(curves.tokens[g]) + checks * sum(map(len, validation[g]))}
    return outcomes


def _fitted(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    stacks = [place.stack(recipe, case) for case in cases]
    train, validation = ([place.encoded(case, split) for case in cases] for split in ("train", "validation"))
    fits = fit_many(
        place.base,
        stacks,
        train,
        validation,
        recipe.method,
        seeds=[case.seed for case in cases],
        **dict(recipe.options),
    )
    outcomes = _scored(place, cases, [fit.adapter for fit in fits])
    for outcome, fit, stack in zip(outcomes, fits, stacks, strict=True):
        outcome.chosen = list(stack.names)
        outcome.facts |= {
            "passes": fit.passes,
            "tokens": fit.tokens,
            "coefficient_mean": float(fit.coefficients.mean()),
            "coefficient_norm": float(fit.coefficients.norm()),
        }
    return outcomes


def _merged(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    stacks = [place.stack(recipe, case) for case in cases]
    adapters = [place.merged(recipe, stack) for stack in stacks]
    validation = [place.encoded(case, "validation") for case in cases]
    best = tune_scales(place.base, adapters, validation)
    unscaled = _scored(place, cases, adapters)
    outcomes = _scored(place, cases, [adapter.times(scale) for adapter, scale in zip(adapters, best, strict=True)])
    for outcome, plain, scale, stack, rows in zip(outcomes, unscaled, best, stacks, validation, strict=True):
        outcome.chosen = list(stack.names)
        fed = len(SCALES) * len(rows), len(SCALES) * sum(map(len, rows))
        outcome.facts |= {
            "scale": scale,
            "accuracy_unscaled": plain.facts["accuracy"],
            "passes": fed[0],
            "tokens": fed[1],
        }
    return outcomes


def tune_scales(base: Base, adapters: Sequence[Adapter], validation: Sequence[Sequence[Encoded]]) -> list[float]:
    """λ of least validation loss for each adapter, all in one pass: the scales are candidates over each one's stack."""
    together, n = grouped(adapters, base.device), len(SCALES)
    scales = torch.tensor(SCALES, device=base.device).repeat(len(adapters))
    updates = {m: LowRank(u.B, u.A, scales[:, None].expand(-1, u.A.shape[1])) for m, u in together.items()}
    losses = score(base, [rows for rows in validation for _ in range(n)], updates).loss.mean(1).view(len(adapters), n)
    losses = losses.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a λ that overflows is no minimum
    return [SCALES[i] for i in losses.argmin(1).tolist()]


def _scored(
    place: Workplace, cases: Sequence[Case], adapters: Sequence[Adapter] | None, shots: int = 0
) -> list[Outcome]:
    """Test, training and validation scores of each case under its adapter (None: the base alone)."""
    updates = grouped(adapters, place.base.device) if adapters else None
    facts: list[dict] = [{} for _ in cases]
    for split, prefix in (("test", ""), ("train", "train_"), ("validation", "validation_")):
        if shots and split == "train":
            continue  # the demonstrations come from there
        groups = [place.encoded(case, split, shots) for case in cases]
        result = score(place.base, groups, updates)
        for row, accuracy, loss, encoded in zip(
            facts, result.accuracy.tolist(), result.loss.mean(1).tolist(), groups, strict=True
        ):
            row |= {f"{prefix}accuracy": accuracy, f"{prefix}loss": loss}
            if split == "test":
                row["tokens_per_example"] = sum(map(len, encoded)) / len(encoded)
    for g, adapter in enumerate(adapters or []):
        facts[g] |= {"rank": adapter.rank, "norm": adapter.norm()}
    return [Outcome(row) for row in facts]


_FAMILIES = {"zero-shot": _prompted, "in-context": _prompted, "new adapter": _new, **dict.fromkeys(ADAPTIVE, _fitted)}
