"""Merges that look at single entries of ΔW.

They are run on ΔW = s B A and never on B and A apart, where the outcome would depend on how each adapter happened to be
factored (a relative change of about 1). Dense matrices are made one adapter and module at a time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.merge.registry import Share, method
from workbench.stack import Units

__all__ = ["ties"]


@method("ties", paper="https://arxiv.org/abs/2306.01708", invariances={"units", "gauge", "scale", "order"}, dense=True)
def ties(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    elect: Literal["total", "frequency"] = "total",
    divide: Literal["count", "weights"] = "count",
) -> Tensor:
    """Trim, elect a sign, and average the entries that agree with it (TIES, §3), with these conventions:

    - trim per tensor: of each ΔW_i the round(density · entries) largest by magnitude stay (at least one where density
      is not 0), and with the smallest of them all that equal it;
    - weight, then elect: the sign of Σ_i w_i x_i (`total`) or of Σ_i sign(w_i x_i) (`frequency`). peft elects before it
      weights, so the two agree where the weights are equal and positive;
    - where that sum is 0, no sign is elected and the entry is 0 (peft takes the positive one), so that merging −ΔW_i
      gives minus the merge of ΔW_i;
    - divide Σ w_i x_i over the agreeing entries by their number (`count`, as the paper) or by their Σ|w_i| (`weights`).
      An entry of 0 agrees with nothing.

    Two passes over the adapters; memory is a few dense matrices, however many adapters there are.
    """
    present = [i for i in units.owner.unique().tolist() if weights[i] != 0]
    limits: dict[int, Tensor] = {}

    def weighted(i: int) -> Tensor:
        delta = units.of(i).delta()
        if i not in limits:
            limits[i] = _limit(delta, density)
        return delta.mul_(delta.abs() >= limits[i]).mul_(weights[i])

    sign = units.B.new_zeros(units.shape)
    for i in present:
        sign += weighted(i) if elect == "total" else weighted(i).sign_()
    sign.sign_()
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for i in present:
        x = weighted(i)
        agrees = x * sign > 0
        total += x.mul_(agrees)
        divisor += agrees * (weights[i].abs() if divide == "weights" else 1.0)
    return total / torch.where(divisor > 0, divisor, 1.0)


def _limit(delta: Tensor, density: float) -> Tensor:
    """The smallest magnitude that is kept."""
    keep = max(1, round(density * delta.numel())) if density > 0 else 0
    if not keep:
        return delta.new_tensor(float("inf"))
    return delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
