"""Newly trained adapters, many side by side: the baseline beside every merge, and how the bundled pool was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.adapt.gradient import Curves, Schedule, Watch, fit
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import Encoded
from workbench.options import Count

__all__ = ["NEW_ADAPTER", "Plan", "start_factors", "train_fresh"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """One adapter's shape: rank, α/r (before rslora), rslora, and the projections it targets (None: every linear layer)."""

    rank: Count = 8
    ratio: float = 2.0
    rslora: bool = False
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """s, the factor before B A."""
        return self.ratio * math.sqrt(self.rank) if self.rslora else self.ratio

    def has(self, module: str) -> bool:
        """Does it target this module?"""
        return self.targets is None or module.rsplit(".", 1)[-1] in self.targets


NEW_ADAPTER = Schedule(steps=400, lr=3e-3, batch=8, every=10)


def start_factors(
    shapes: Mapping[str, tuple[int, int]], plans: Sequence[Plan], seeds: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per module B (G, d_out, r) zero and A (G, r, d_in) Kaiming-uniform as in peft, drawn per adapter; r the largest rank.

    What an adapter lacks in rank or modules is zero in both factors, gets no gradient, and stays zero.
    """
    widest = max(plan.rank for plan in plans)
    out = {
        m: (torch.zeros(len(plans), d_out, widest), torch.zeros(len(plans), widest, d_in))
        for m, (d_out, d_in) in shapes.items()
    }
    for g, (plan, seed) in enumerate(zip(plans, seeds, strict=True)):
        generator = torch.Generator().manual_seed(int(seed))
        for module, (_, d_in) in shapes.items():
            if plan.has(module):
                out[module][1][g, : plan.rank] = (2 * torch.rand(plan.rank, d_in, generator=generator) - 1) / math.sqrt(
                    d_in
                )
    return out


def train_fresh(
    base: Base,
    names: Sequence[str],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = NEW_ADAPTER,
    *,
    seeds: Sequence[int],
    plans: Sequence[Plan] | None = None,
    autocast: bool = False,
    watch: Watch | None = None,
) -> tuple[list[Adapter], Curves]:
    """Train one new adapter per list of examples, all at once, each exactly as it would be trained alone.

    Args:
        watch: see `gradient.fit`.

    Raises:
        AdapterError: a plan that targets no layer of the base.
        MergeError: lists of unequal number, or a fit that diverges.
    """
    plans = list(plans or [Plan()] * len(names))
    if not len(names) == len(plans) == len(train) == len(seeds):
        raise MergeError(
            f"expected one of each per adapter, got {len(names)} names, {len(plans)} plans, {len(train)} lists of examples "
            f"and {len(seeds)} seeds"
        )
    shapes = base.projections
    for name, plan in zip(names, plans, strict=True):
        if not any(plan.has(module) for module in shapes):
            raise AdapterError(
                f"{name}: the base has no layer named {' or '.join(plan.targets)}; its layers are such as {next(iter(shapes))}"
            )
    factors = {m: (b.to(base.device), a.to(base.device)) for m, (b, a) in start_factors(shapes, plans, seeds).items()}
    scales = torch.tensor([plan.scale for plan in plans], device=base.device)[:, None, None]
    curves = fit(
        base,
        [tensor for pair in factors.values() for tensor in pair],
        lambda: {m: LowRank(b * scales, a) for m, (b, a) in factors.items()},
        train,
        validation,
        schedule,
        seeds,
        autocast=autocast,
        watch=watch,
    )
    adapters = []
    for g, (name, plan) in enumerate(zip(names, plans, strict=True)):
        modules = {
            m: Factors((b[g, :, : plan.rank] * plan.scale).cpu(), a[g, : plan.rank].cpu(), plan.scale)
            for m, (b, a) in factors.items()
            if plan.has(m)
        }
        adapters.append(Adapter(name, modules, base.name))
    return adapters, curves
