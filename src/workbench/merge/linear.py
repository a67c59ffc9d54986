"""Merges whose result is a sum of the adapters' own units: exact on the factors, whatever the ranks and targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from workbench.merge.registry import method
from workbench.options import Share
from workbench.stack import Units, gram

__all__ = ["average", "linear", "slerp", "sum_", "svd"]

_ALL = {"units", "gauge", "scale", "order"}


@method("cat", paper="https://github.com/huggingface/peft/pull/364", invariances=_ALL | {"linear"})
@method("sum", paper="https://arxiv.org/abs/2212.04089", invariances=_ALL | {"linear"})
def sum_(units: Units, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i w_i ΔW_i, by concatenating the factors: task arithmetic's sum, and peft's `cat`, are one and the same."""
    return units.times(weights[units.owner]), units.A


@method("average", paper="https://arxiv.org/abs/2203.05482", invariances=_ALL | {"linear"})
def average(units: Units, weights: Tensor, *, divide: Literal["all", "present"] = "all") -> tuple[Tensor, Tensor]:
    """Σ_i w_i ΔW_i / N.

    N is the number of adapters, never the sum of weights (which can be 0): `all` counts every adapter, one without the
    module adding nothing there; `present` counts those that have the module.
    """
    ranks = units.ranks(len(weights))
    n = len(weights) if divide == "all" else int((ranks > 0).sum())
    return units.times(weights[units.owner] / n), units.A


@method("svd", paper="https://doi.org/10.1007/BF02288367", invariances=_ALL, truncates=True)
def svd(units: Units, weights: Tensor, *, of: Literal["average", "sum"] = "average") -> tuple[Tensor, Tensor]:
    """The average (over all adapters) or the sum, truncated by SVD to `rank`, or to the candidates' largest rank.

    The error of truncation is in the result's `info["error"]`.
    """
    return average(units, weights) if of == "average" else sum_(units, weights)


@method("linear", paper="https://github.com/huggingface/peft/pull/364", invariances={"order"})
def linear(units: Units, weights: Tensor) -> tuple[Tensor, Tensor]:
    """peft's `linear`, for comparison: (Σ √|w_i s_i| B_i)(Σ ±√|w_i s_i| A_i), raw factors, the sign of w_i s_i on A.

    Not Σ w_i ΔW_i: every adapter's B meets every other's A. peft refuses unequal ranks; here the lower ones are filled
    up with zeros, so that unit j of one adapter is added to unit j of the next.
    """
    ranks = units.ranks(len(weights))
    b, a = units.B.new_zeros(units.shape[0], int(ranks.max())), units.A.new_zeros(int(ranks.max()), units.shape[1])
    for i in units.owner.unique().tolist():
        own = units.of(i)
        ws = weights[i] * own.scale[0].to(weights)
        b[:, : len(own)] += own.B / own.scale.to(own.B) * ws.abs().sqrt()
        a[: len(own)] += own.A * ws.abs().sqrt() * ws.sign()
    return b, a


@method(
    "slerp",
    paper="https://doi.org/10.1145/325165.325242",
    invariances=_ALL - {"order"},
    also={("t", 0.5): {"order"}},
    takes=2,
)
def slerp(units: Units, weights: Tensor, *, t: Share = 0.5) -> tuple[Tensor, Tensor]:
    """Spherical interpolation from w_1 ΔW_1 (t = 0) to w_2 ΔW_2 (t = 1), per module.

    (sin((1 − t) θ) X_1 + sin(t θ) X_2) / sin θ with θ the angle between the two; the straight line where one is zero or
    absent, or where they are parallel or opposed (sin θ < 10⁻³), for then no shortest arc is defined.
    """
    first, second = weights.nonzero().flatten().tolist() if weights.any() else (0, 1)
    units = replace(units, B=units.times(weights[units.owner]))
    inner = gram(units, len(weights)).double()
    lengths = inner.diagonal().clamp_min(0).sqrt()
    cosine = inner[first, second] / (lengths[first] * lengths[second]).clamp_min(1e-300)
    theta = cosine.clamp(-1, 1).arccos()
    one, two = 1.0 - t, float(t)
    if theta.sin() >= 1e-3 and lengths[first] > 0 and lengths[second] > 0:
        one, two = float((one * theta).sin() / theta.sin()), float((two * theta).sin() / theta.sin())
    share = torch.zeros_like(weights)
    share[first], share[second] = one, two
    return units.times(share[units.owner]), units.A
