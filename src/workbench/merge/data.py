"""Merges that weigh the adapters by what a few of their own examples say: RegMean, and the diagonal Fisher.

Both look at an adapter through its layers' inputs and gradients alone, which do not depend on how it was factored.

Weights are those of the objective, so only their ratios matter: one adapter alone comes out as itself at any positive
weight, and negated at any negative one; an adapter of weight 0 is left out altogether. `divide` says who takes part in a
module: `all`, where an adapter without it asks for ΔW = 0 there with its own statistics (it ran on the base's layer), or
those `present`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from workbench.merge.registry import method
from workbench.merge.statistics import Rows
from workbench.options import Range, Share
from workbench.stack import Units

__all__ = ["RIDGE", "fisher", "regmean"]

_GAUGE = {"units", "gauge", "scale", "order"}
RIDGE = 1e-6  # of the mean Gram's diagonal: what directions without data are held to the average by


@method("regmean", paper="https://arxiv.org/abs/2212.09849", invariances=_GAUGE, needs="inputs")
def regmean(
    units: Units,
    weights: Tensor,
    rows: Sequence[Rows],
    *,
    shrink: Share = 0.9,
    normalise: bool = True,
    divide: Literal["all", "present"] = "all",
) -> tuple[Tensor, Tensor]:
    """RegMean (§3): the ΔW nearest to every adapter's own outputs on its own inputs X_i (T_i, d_in).

    Minimises Σ_i |w_i| tr((ΔW − s_i ΔW_i) G_i (ΔW − s_i ΔW_i)ᵀ), s_i the sign of w_i, G_i = X_iᵀX_i with what is off the
    diagonal multiplied by `shrink` (the paper's α); ΔW = (Σ_i w_i ΔW_i G_i)(Σ_i |w_i| G_i)⁻¹. With `normalise`, G_i is the
    mean over tokens, as in the reference code, so that more examples do not mean more say; without it the sum.

    It is computed as the average Σ w_i ΔW_i / Σ|w_i| and a correction, whose unit a of adapter i is a (G_i − Ḡ)(Ḡ + D)⁻¹
    with Ḡ = Σ|w_i| G_i / Σ|w_i|, in fp64. D, a ridge of 10⁻⁶ Ḡ's diagonal, is added to every G_i alike and cancels where
    they agree: a single adapter and equal Grams are exact, and inputs that no example excites keep the average. The
    result has the adapters' own B and as many units; the largest matrix is d_in × d_in.
    """
    chosen, share = _shares(units, weights, divide)
    if not chosen:
        return torch.zeros_like(units.B), units.A
    B, own, A = units.times((share * weights.sign())[units.owner]), units.owner, units.A.double()
    if len(chosen) == 1:
        return B, units.A
    moved = torch.zeros_like(A)  # a G_i of each unit
    diagonal = A.new_zeros(A.shape[1])
    gram = A.new_zeros(0 if units.embedding else A.shape[1], A.shape[1])
    for i in chosen:
        x, tokens = rows[i].inputs(A), max(1, len(rows[i])) if normalise else 1
        energy = (
            torch.bincount(x, minlength=A.shape[1]).to(A)
            if rows[i].ids
            else torch.linalg.vector_norm(x, dim=0).square()
        ) / tokens
        diagonal += share[i] * energy
        a = A[own == i]
        if rows[i].ids:  # one-hot inputs: the Gram is its diagonal
            moved[own == i] = a * energy
        else:
            moved[own == i] = shrink * ((a @ x.T) @ x) / tokens + (1 - shrink) * a * energy
            gram.addmm_(x.T, x, alpha=float(share[i]) / tokens)
    ridge = torch.where(diagonal > 0, RIDGE * diagonal, 1.0)
    if units.embedding:
        A = A + (moved - A * diagonal) / (diagonal + ridge)
    else:
        gram.mul_(shrink).diagonal().copy_(diagonal)
        moved -= A @ gram
        gram.diagonal().add_(ridge)
        A = A + torch.cholesky_solve(moved.T, torch.linalg.cholesky(gram)).T
    return B, A.to(units.A)


@method("fisher", paper="https://arxiv.org/abs/2111.09832", invariances=_GAUGE, dense=True, needs="gradients")
def fisher(
    units: Units,
    weights: Tensor,
    rows: Sequence[Rows],
    *,
    normalise: Literal["model", "module", "none"] = "model",
    floor: Annotated[float, Range(0)] = 1e-6,
    divide: Literal["all", "present"] = "all",
) -> Tensor:
    """Fisher-weighted averaging (§3), diagonal: Σ_i w_i F_i ΔW_i / Σ_i |w_i| F_i, entry by entry.

    F_i is the empirical Fisher of the weight: the mean over adapter i's examples of (∂ log p(answer | prompt) / ∂W)², at
    base + adapter i and the true answers (the paper draws labels from the model). Each F_i is scaled to L2 norm 1 over the
    `model`, as in the reference code, or over the `module`, or taken as it is: adapters that fit their examples better
    have smaller gradients, and would otherwise have no say. To each, `floor` times their mean entry in this module is
    added, so that entries without any information get the plain average (the reference raises F to at least 10⁻⁶, which
    depends on the loss's unit).

    Dense: one adapter's F and ΔW at a time, beside two sums.
    """
    chosen, share = _shares(units, weights, divide)
    if not chosen:
        return units.B.new_zeros(units.shape)
    total, precision = units.B.new_zeros(units.shape), units.B.new_zeros(units.shape)
    signed = (share * weights.sign()).to(units.B)
    for i in chosen:
        information = rows[i].fisher(units.B, units.shape[1])
        size = 1.0
        if normalise == "model":
            size = rows[i].whole(units.B)
        elif normalise == "module":
            size = float(torch.linalg.vector_norm(information, dtype=torch.float64))
        information *= float(share[i]) / size if size > 0 else 0.0
        precision += information
        delta = units.of(i)
        if len(delta):
            total.addcmul_(information, delta.delta(), value=float(signed[i].sign()))
    least = floor * precision.mean()
    average = units.delta(signed[units.owner])
    return torch.where(precision > 0, (total + least * average) / (precision + least), average)


def _shares(units: Units, weights: Tensor, divide: str) -> tuple[list[int], Tensor]:
    """The adapters that take part in this module, and |w_i| / Σ|w| over them, (N,) fp64."""
    size = weights.abs().double()
    if divide == "present":
        size = size * (units.ranks(len(weights)) > 0)
    return size.nonzero().flatten().tolist(), size / size.sum().clamp_min(torch.finfo(torch.float64).tiny)
