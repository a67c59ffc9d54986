"""What stands beside every merge: nothing at all, demonstrations, newly trained adapters, and the best single adapter.

A baseline takes a recipe's cases side by side and returns one outcome each; `BASELINES` has them by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

import torch

from workbench.adapt import checked, schedule_options, scheduled
from workbench.adapt.fresh import NEW_ADAPTER, Plan, train_fresh
from workbench.adapt.frugal import (
    CORE,
    FULL,
    RANK_3,
    RANK_8,
    RANK_64,
    SUBSPACE,
    VECTORS,
    degrees_of_freedom,
    train_core,
    train_full,
    train_subspace,
    train_vectors,
)
from workbench.adapt.gradient import Schedule, Watch, check_schedule
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.compose import grouped
from workbench.controls import random_like
from workbench.evaluate import Encoded
from workbench.judging import judged
from workbench.options import Option, Range
from workbench.select import rank_adapters
from workbench.stack import Stack
from workbench.tasks import Task

if TYPE_CHECKING:
    from workbench.runs import Case, Outcome, Workplace

__all__ = ["BASELINES", "Baseline", "train_many"]


@dataclass(frozen=True)
class Baseline:
    """A baseline: its function (place, options, cases) → outcomes, version and options."""

    name: str
    run: Callable[[Workplace, Mapping, Sequence[Case]], list[Outcome]]
    version: int = 1
    own: Mapping[str, Option] = field(default_factory=dict)

    @cached_property
    def options(self) -> dict[str, Option]:
        trainer = _TRAINERS.get(self.name)
        return dict(self.own) | (trainer.options if trainer else {})

    def check(self, options: Mapping) -> None:
        """Check options' names and values.

        Raises:
            MergeError: an unknown option, or a value that it does not allow.
        """
        checked(self.name, options, self.options)
        if trainer := _TRAINERS.get(self.name):
            check_schedule(scheduled(trainer.schedule, options)[0])


@dataclass(frozen=True)
class _Trainer:
    """A way to train new weights side by side, with its default schedule and shape."""

    function: Callable
    schedule: Schedule
    plan: Plan | None

    @property
    def options(self) -> dict[str, Option]:
        hints = get_type_hints(self.function, include_extras=True)
        own = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        skipped = ("seeds", "plan", "plans", "autocast", "watch")
        shape = get_type_hints(Plan, include_extras=True) if self.plan else {}
        return (
            {name: Option(getattr(self.plan, name), hint) for name, hint in shape.items()}
            | {p.name: Option(p.default, hints.get(p.name, object)) for p in own if p.name not in skipped}
            | schedule_options(self.schedule)
        )


_TRAINERS = {
    "new adapter": _Trainer(train_fresh, NEW_ADAPTER, Plan()),
    "random subspace": _Trainer(train_subspace, SUBSPACE, RANK_8),
    "trained core": _Trainer(train_core, CORE, RANK_3),
    "trained vectors": _Trainer(train_vectors, VECTORS, RANK_64),
    "full fine-tuning": _Trainer(train_full, FULL, None),
}


def train_many(
    place: Workplace, kind: str, cases: Sequence[Case], options: Mapping, *, watch: Watch | None = None
) -> list[tuple[Adapter, dict]]:
    """Train one adapter a case by a kind of baseline, side by side: each with its facts (passes, tokens, parameters).

    `watch`: see `gradient.fit`; a new adapter's training alone is watched.
    """
    trainer = _TRAINERS[kind]
    schedule, own = scheduled(trainer.schedule, options)
    shape = {f.name: own.pop(f.name) for f in fields(Plan) if f.name in own and trainer.plan}
    plan = replace(trainer.plan, **shape) if trainer.plan else None
    if plan and trainer.function is train_fresh:
        own |= {"plans": [plan] * len(cases), "watch": watch}
    elif plan:
        own["plan"] = plan
    train, validation = ([place.encoded(case, split) for case in cases] for split in ("train", "validation"))
    names = [f"{kind.replace(' ', '-')}-{case.task.name}" for case in cases]
    seeds = [case.seed for case in cases]
    adapters, curves = trainer.function(place.base, names, train, validation, schedule, seeds=seeds, **own)
    out = []
    for g, adapter in enumerate(adapters):
        passes, tokens = curves.spent(g, train[g], validation[g], schedule.batch)
        parameters = adapter.info.get("parameters") or degrees_of_freedom("lora", place.base, plan)
        sound = bool(torch.isfinite(curves.train[:, g]).all())
        out.append((adapter, {"passes": passes, "tokens": tokens, "parameters": parameters, "diverged": not sound}))
    return out


def _trained(kind: str):
    def run(place: Workplace, options: Mapping, cases: Sequence[Case]) -> list[Outcome]:
        found = train_many(place, kind, cases, options)
        outcomes = place.scored(cases, [adapter for adapter, _ in found])
        for outcome, (_, facts) in zip(outcomes, found, strict=True):
            outcome.facts |= facts
        return outcomes

    return run


def _prompted(place: Workplace, options: Mapping, cases: Sequence[Case]) -> list[Outcome]:
    """The bare base, zero-shot or with demonstrations (`shots`, of the training examples, drawn under the case's seed)."""
    outcomes = place.scored(cases, None, options.get("shots", 0))
    for outcome in outcomes:
        outcome.facts |= {"rank": 0, "norm": 0.0, "passes": 0, "tokens": 0, "parameters": 0}
    return outcomes


def _single(place: Workplace, options: Mapping, cases: Sequence[Case]) -> list[Outcome]:
    """The adapter of best accuracy on the training examples, alone, at weight 1: train_accuracy is what it was picked by.

    among="random" picks in the same way among random stand-ins of the whole pool (σ, drawn under the case's seed): what
    picking alone is worth.
    """
    pool, stand_ins, picked = place.pool, {}, []
    for case in cases:
        if options.get("among", "pool") == "pool":
            name = rank_adapters(pool, case.task, place.base)["name"].iloc[0]
            picked.append((pool.adapter(name), name))
            continue
        if case.seed not in stand_ins:
            stand_ins[case.seed] = random_like(pool.stack(), seed=case.seed)
        stack = stand_ins[case.seed]
        best = _best_of(place.base, stack, case.task, place.encoded(case, "train"))
        picked.append((stack.adapter(best), stack.names[best]))
    outcomes = place.scored(cases, [adapter for adapter, _ in picked])
    for outcome, case, (_, name) in zip(outcomes, cases, picked, strict=True):
        rows = place.encoded(case, "train")
        outcome.chosen = [name]
        outcome.facts |= {"passes": len(pool) * len(rows), "tokens": len(pool) * sum(map(len, rows)), "parameters": 0}
    return outcomes


def _best_of(base: Base, stack: Stack, task: Task, rows: Sequence[Encoded]) -> int:
    """The place of the adapter of best accuracy on training examples (ties: lower loss, then the name), sixteen in a pass."""
    scores = []
    for start in range(0, len(stack), 16):
        some = [stack.adapter(i) for i in range(start, min(start + 16, len(stack)))]
        n, updates = len(some), grouped(some, base.device)
        result = judged(base, [task] * n, [task.train] * n, [rows] * n, updates)
        scores += zip((-result.accuracy).tolist(), result.loss.mean(1).tolist(), strict=True)
    return min(range(len(stack)), key=lambda i: (*scores[i], stack.names[i]))


_SHOTS = {"shots": Option(5, Annotated[int, Range(1)])}
_AMONG = {"among": Option("pool", Literal["pool", "random"])}
BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("zero-shot", _prompted),
        Baseline(
            "in-context", lambda place, options, cases: _prompted(place, {"shots": 5, **options}, cases), 1, _SHOTS
        ),
        Baseline("best single", _single, 1, _AMONG),
        *(Baseline(name, _trained(name)) for name in _TRAINERS),
    )
}
