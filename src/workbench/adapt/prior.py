"""The merge as a prior: a new adapter trained on top of learned coefficients.

ΔW_m = Σ_i f(θ_{m, i}) ΔW_{i, m}  +  s B_m A_m      θ learned first and frozen, or trained along; B and A new

The sum is one adapter, exactly: the stack's units under their coefficients, and the new ones behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from workbench.adapt.coefficients import ACTIVATIONS, learn_coefficients
from workbench.adapt.fitted import Fitted, fold, modules_of, side_by_side
from workbench.adapt.fresh import NEW_ADAPTER, Plan, start_factors
from workbench.adapt.gradient import Curves, Schedule, Watch, check_schedule, fit
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import Encoded
from workbench.options import Count, Range
from workbench.stack import Stack

__all__ = ["PRIOR", "prior"]

PRIOR = NEW_ADAPTER
_SLOPE = 0.01  # of the leaky ReLU below zero


def prior(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = PRIOR,
    *,
    seeds: Sequence[int],
    merge_steps: Annotated[int, Range(0)] = 100,
    merge_lr: Annotated[float, Range(1e-12)] = 5e-2,
    joint: bool = False,
    fallback: bool = True,
    rank: Count = 8,
    ratio: float = 2.0,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """A new adapter for each of G fits, the merge of stacks[g] under it; every stage keeps its best validation loss.

    First stage: coefficients per module, leaky ReLU, from zero, for `merge_steps` at `merge_lr`, otherwise as `schedule`.
    Second: a new adapter for all of `schedule`, on top of what the first left; its step 0 is the merge alone, which stays
    where training on top of it does not help.

    Args:
        joint: the coefficients are trained on in the second stage, at `merge_lr`; with merge_steps=0 they and the new
            adapter learn together from the first step. A fit's gradient is clipped as one.
        fallback: train the same new adapter without the merge too, exactly as `train_fresh` does under this seed, and keep
            it where its validation loss is the lower one. It costs as much as a new adapter does.
        rank, ratio: of the new adapter (`Plan`), in every projection of the base.
        watch: as `gradient.fit` has it, all stages counted as one; true ends the stage, and the later ones take no step.

    Returns:
        `coefficients` are the merged part's, zero where the new adapter alone was kept. `curves` and `parameters` are of
        what was kept: with a merge, both stages in a row, `at` counting on; where they meet a step stands twice, as the
        first left it and as the best that the second starts from. `passes` and `tokens` count all that was trained.

    Raises:
        MergeError: numbers of fits that disagree, a number out of its range, `fallback` without validation examples, or a
            fit that diverges.
        BaseError, AdapterError: a module that the base lacks, or of another shape there; a rank below 1.
    """
    _check(stacks, train, validation, schedule, seeds, names, merge_steps, merge_lr, fallback, rank)
    plan, merging = Plan(rank, ratio), joint or merge_steps > 0
    told = _Stages(watch, merge_steps + schedule.steps * (1 + (merging and fallback)))
    first, found = None, []
    if merge_steps:
        settings = replace(schedule, steps=merge_steps, lr=merge_lr)
        first = learn_coefficients(base, stacks, train, validation, settings, seeds=seeds, watch=told)
    if merging:
        under, rate = _Merge(base, stacks, first), merge_lr / schedule.lr if joint else None
        found.append(_train(base, train, validation, told.left(schedule), seeds, plan, under, rate, told))
    if fallback or not merging:
        found.append(_train(base, train, validation, told.left(schedule), seeds, plan, None, None, told))
    out = []
    for g, stack in enumerate(stacks):
        kept = min(found, key=lambda one: float(one.curves.best[g]))  # the first of equals
        shown = validation[g] if validation else None
        spent = [one.curves.spent(g, train[g], shown, schedule.batch) for one in found]
        spent += [(first[g].passes, first[g].tokens)] if first else []
        name = names[g] if names else f"prior-of-{len(stack)}"
        new = kept.adapter(g, name, base, plan)
        count = sum(f.A.numel() + f.B.numel() for f in new.modules.values())
        curves, mine = kept.curves.of(g), torch.zeros(len(stack.modules), len(stack))
        if kept.under is not None:
            mine = kept.under.coefficients(g, stack)
            new, count = _on_top(base, fold(stack, mine, name), new), count + mine.numel()
            curves = _joined(first[g].curves, curves) if first else curves
        out.append(Fitted(new, mine, curves, sum(p for p, _ in spent), sum(t for _, t in spent), parameters=count))
    return out


class _Stages:
    """Tells one watcher of several stages as if they were one; once it has asked to stop, no stage has a step left."""

    def __init__(self, watch: Watch | None, total: int):
        self.watch, self.total, self.done, self.stopped = watch, total, 0, False

    def __call__(self, step: int, steps: int, loss: float) -> bool:
        self.done += 1
        self.stopped = self.watch is not None and bool(self.watch(self.done, self.total, loss))
        return self.stopped

    def left(self, schedule: Schedule) -> Schedule:
        """The schedule of the next stage."""
        return replace(schedule, steps=0) if self.stopped else schedule


class _Merge:
    """The merged part under G new adapters: its units side by side, and θ (G, M, K), from zero or where a fit left it."""

    def __init__(self, base: Base, stacks: Sequence[Stack], fits: Sequence[Fitted] | None):
        self.modules, self.pieces = modules_of(stacks, base), side_by_side(stacks, base, frozen=True)
        self.theta = torch.zeros(len(stacks), len(self.modules), len(stacks[0]))
        for g, fitted in enumerate(fits or ()):
            value = fitted.coefficients
            self.theta[g, self._places(stacks[g])] = torch.where(value < 0, value / _SLOPE, value)
        self.theta = self.theta.to(base.device)

    def coefficients(self, g: int, stack: Stack) -> Tensor:
        """(M, N) of one fit, in its stack's order of modules."""
        return self._value()[g, self._places(stack)].cpu()

    def updates(self) -> dict[str, LowRank]:
        """The merged part of every module that it has."""
        value = self._value()
        return {
            module: LowRank(b, a, value[:, i].gather(1, owner))
            for i, (module, (b, a, owner)) in enumerate(self.pieces.items())
        }

    def _value(self) -> Tensor:
        return ACTIVATIONS["leaky_relu"](self.theta)

    def _places(self, stack: Stack) -> list[int]:
        return [self.modules.index(module) for module in stack.modules]


@dataclass(frozen=True)
class _Trained:
    """G new adapters' factors as a stage left them, module → B (G, d_out, r) and A (G, r, d_in), and what lies under."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    under: _Merge | None
    curves: Curves

    def adapter(self, g: int, name: str, base: Base, plan: Plan) -> Adapter:
        """One new adapter by itself."""
        pairs = {m: ((b[g] * plan.scale).cpu(), a[g].cpu()) for m, (b, a) in self.factors.items()}
        return Adapter(name, {m: Factors(b, a, plan.scale) for m, (b, a) in pairs.items()}, base.name)


def _train(
    base: Base,
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule,
    seeds: Sequence[int],
    plan: Plan,
    under: _Merge | None,
    rate: float | None,
    watch: Watch,
) -> _Trained:
    """`train_fresh` on top of a merge; `rate` is the factor of its θ's learning rate, None holds it still."""
    start = start_factors(base.projections, [plan] * len(train), seeds)
    factors = {m: (b.to(base.device), a.to(base.device)) for m, (b, a) in start.items()}
    parameters = [tensor for pair in factors.values() for tensor in pair]
    rates = [1.0] * len(parameters)
    if rate is not None:
        parameters, rates = [under.theta, *parameters], [rate, *rates]

    def updates() -> dict[str, LowRank]:
        new = {m: LowRank(b * plan.scale, a) for m, (b, a) in factors.items()}
        merged = under.updates() if under else {}
        both = {m: _OnTop(own.B, own.A, b=u.B, a=u.A, w=u.c) for m, own in new.items() if (u := merged.get(m))}
        return merged | new | both

    curves = fit(
        base,
        parameters,
        updates,
        train,
        validation,
        schedule,
        seeds,
        rates=rates if rate is not None else None,
        watch=watch,
    )
    return _Trained(factors, under, curves)


@dataclass(frozen=True, kw_only=True)
class _OnTop(LowRank):
    """Updates of G groups with others, b, a and their coefficients w, under them: one after the other, so that only what is
    trained has its gradient taken.
    """

    b: Tensor
    a: Tensor
    w: Tensor
    stacked: ClassVar[tuple[str, ...]] = ("B", "A", "b", "a", "w")

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        return super().apply(x, LowRank(self.b, self.a, self.w).apply(x, y))


def _on_top(base: Base, merged: Adapter, new: Adapter) -> Adapter:
    """Two adapters as one: the units of both."""
    modules = {}
    for module in base.layers:
        both = [one.modules[module] for one in (merged, new) if module in one.modules]
        if both:
            b, a = torch.cat([f.B for f in both], 1), torch.cat([f.A for f in both])
            modules[module] = Factors(b, a, embedding=both[0].embedding)
    return replace(merged, modules=modules)


def _joined(first: Curves, second: Curves) -> Curves:
    at = first.at + tuple(len(first.train) + step for step in second.at)
    train, validation = torch.cat([first.train, second.train]), torch.cat([first.validation, second.validation])
    return Curves(train, validation, at, second.best, first.tokens + second.tokens)


def _check(stacks, train, validation, schedule, seeds, names, merge_steps, merge_lr, fallback, rank) -> None:
    check_schedule(schedule)
    counts = [len(stacks), len(train), len(seeds)] + ([len(names)] if names else [])
    if len(set(counts)) != 1 or not counts[0]:
        raise MergeError(
            f"expected one of each per fit, got {counts[0]} stacks, {counts[1]} lists of examples, {counts[2]} seeds"
            + (f" and {counts[3]} names" if names else "")
        )
    if merge_steps < 0 or not merge_lr > 0:
        raise MergeError(f"merge_steps is {merge_steps} and merge_lr {merge_lr}, expected 0 or more, and above 0")
    if rank < 1:
        raise AdapterError(f"rank is {rank}, expected at least 1")
    if fallback and validation is None:
        raise MergeError(
            "whether the new adapter is better off with the merge or without is decided on validation examples, and there "
            "are none; give some, or pass fallback=False"
        )
