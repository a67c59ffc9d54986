"""Merges that are linear in the adapters: exact on the factors, whatever the ranks and targets."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from workbench.merge.registry import method
from workbench.stack import Units

__all__ = ["average", "sum_", "svd"]


@method("sum", paper="https://arxiv.org/abs/2212.04089", invariances={"units", "gauge", "scale", "order", "linear"})
def sum_(units: Units, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i w_i ΔW_i, by concatenating the factors (task arithmetic; peft calls it `cat`)."""
    return units.times(weights[units.owner]), units.A


@method("average", paper="https://arxiv.org/abs/2203.05482", invariances={"units", "gauge", "scale", "order", "linear"})
def average(units: Units, weights: Tensor, *, divide: Literal["all", "present"] = "all") -> tuple[Tensor, Tensor]:
    """Σ_i w_i ΔW_i / N.

    N is the number of adapters, never the sum of weights (which can be 0): `all` counts every adapter, one without the
    module adding nothing there; `present` counts those that have the module.
    """
    ranks = units.ranks(len(weights))
    n = len(weights) if divide == "all" else int((ranks > 0).sum())
    return units.times(weights[units.owner] / n), units.A


@method(
    "svd",
    paper="https://doi.org/10.1007/BF02288367",
    invariances={"units", "gauge", "scale", "order"},
    truncates=True,
)
def svd(units: Units, weights: Tensor, *, of: Literal["average", "sum"] = "average") -> tuple[Tensor, Tensor]:
    """The average (over all adapters) or the sum, truncated by SVD to `rank`, or to the candidates' largest rank.

    The error of truncation is in the result's `info["error"]`.
    """
    return average(units, weights) if of == "average" else sum_(units, weights)
