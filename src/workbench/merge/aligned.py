"""Merges entry by entry in a basis that the adapters share: KnOTS and core space.

A sparse mask or an elected sign depends on the basis in which the entries are taken. Both methods take one from the
adapters themselves, by SVD, merge there with the steps of `workbench.merge.elementwise` (whose conventions hold here
too) and go back. Shares of entries are taken per module, where the KnOTS code takes them over the whole model. The basis
is found from the ΔW_i without their weights, as in the papers' codes, which scale the merged result only; an adapter of
weight 0 does not enter it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from workbench.merge.elementwise import Divide, Elect, consensus, deltas, dropped, present, seeds, ties
from workbench.merge.linear import sum_
from workbench.merge.registry import method
from workbench.merge.subspace import iso_c, lowered, nothing, numerical_rank, tsv
from workbench.options import Share
from workbench.singular import left as _left
from workbench.singular import places
from workbench.stack import Stack, Units

__all__ = ["core", "core_dare", "knots_dare", "knots_ties"]

Basis = Literal["factors", "deltas"]
_GAUGE, _MASKED = {"units", "gauge", "scale", "order"}, {"units", "order"}


@method("knots_ties", paper="https://arxiv.org/abs/2410.19735", invariances=_GAUGE)
def knots_ties(
    units: Units,
    weights: Tensor,
    *,
    on: Literal["SV", "V"] = "SV",
    density: Share = 0.2,
    elect: Literal["total", "frequency"] = "total",
    divide: Literal["count", "weights"] = "count",
) -> tuple[Tensor, Tensor]:
    """KnOTS: [ΔW_1 | … | ΔW_N] = U Σ [V_1ᵀ | … | V_Nᵀ], TIES merges the V_iᵀ, and ΔW = U Σ V_mergedᵀ.

    Args:
        on: what is trimmed: V_iᵀ, as the paper has it, or Σ V_iᵀ = Uᵀ ΔW_i, as the authors' code does in all the
            settings it comes with. Election and mean are the same for both, so at density 1 they agree; otherwise they
            differ a lot, since V gives the weakest directions as many entries as the strongest.
        density, elect, divide: as in `ties`.
    """
    units = units.live(weights)
    left, inner = _knots(units, on)
    if not left.shape[1]:
        return nothing(units)
    return _product(left, ties(inner, weights, density=density, elect=elect, divide=divide))


@method("knots_dare", version=2, paper="https://arxiv.org/abs/2410.19735", invariances=_MASKED)
def knots_dare(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    rescale: bool = True,
    elect: Elect = "total",
    divide: Divide = "count",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """KnOTS with DARE's random dropping in place of TIES' trimming; as in `dare_ties`.

    Random masks do not look at sizes, so V and Σ V give the same.
    """
    units = units.live(weights)
    left, inner = _knots(units, "SV")
    if not left.shape[1]:
        return nothing(units)
    return _product(left, _dare(inner, units, weights, density, rescale, elect, divide, seed))


def _core_notes(stack: Stack, weights: Tensor, options: dict) -> list[str]:
    return lowered(stack, weights, max(map(len, stack.outline.values()))) if options["combine"] == "tsv" else []


@method(
    "core",
    paper="https://arxiv.org/abs/2509.17786",
    invariances=_MASKED,
    also={
        ("basis", "deltas"): _GAUGE,
        ("combine", "tsv"): _GAUGE,
        ("combine", "iso_c"): _GAUGE,
        ("combine", "sum"): _GAUGE | {"linear"},
    },
    notes=_core_notes,
)
def core(
    units: Units,
    weights: Tensor,
    *,
    combine: Literal["ties", "tsv", "iso_c", "sum"] = "ties",
    basis: Basis = "factors",
    density: Share = 0.2,
    elect: Literal["total", "frequency"] = "total",
    divide: Literal["count", "weights"] = "count",
) -> tuple[Tensor, Tensor]:
    """Core space: the cores M_i = Uᵀ ΔW_i V, in orthonormal bases U and V that hold every ΔW_i, merged: U M Vᵀ.

    The core is min(d_out, R) × min(d_in, R), R = Σ_i r_i (with ranks above d_in or d_out counted as those in the `deltas`
    basis), copies and adapters of 0 counted too. Nothing is lost on the way there and back.

    Args:
        combine: `ties` on the entries of the cores; `tsv`, which keeps all singular triplets of every adapter, or as many
            as fit; `iso_c`; or `sum`. Singular values do not depend on the basis: the last two are `iso_c` and `sum`
            themselves, and `tsv` is `tsv` with that number of triplets.
        basis: `factors`: U from the SVD of [B_1 | … | B_N], s folded in, V from that of the stacked A_i, as published. What
            `ties` makes of it depends on how each adapter happens to be factored. `deltas`: the left singular vectors of
            [ΔW_1 | … | ΔW_N] and the right ones of the stacked ΔW_i, which mends that.
        density, elect, divide: of `ties`.
    """
    units = units.live(weights)
    if not len(units):
        return nothing(units)
    u, inner, v = _core(units, basis)
    if combine == "ties":
        return _product(u, ties(inner, weights, density=density, elect=elect, divide=divide), v.T)
    if combine == "tsv":
        b, a = tsv(inner, weights, per_adapter=len(units))
    else:
        b, a = iso_c(inner, weights) if combine == "iso_c" else sum_(inner, weights)
    return u @ b, a @ v.T


@method("core_dare", version=2, paper="https://arxiv.org/abs/2509.17786", invariances=_MASKED)
def core_dare(
    units: Units,
    weights: Tensor,
    *,
    basis: Basis = "factors",
    density: Share = 0.2,
    rescale: bool = True,
    elect: Elect = "total",
    divide: Divide = "count",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Core space with DARE's random dropping on the cores: as in `dare_ties`, or with `elect` and `divide` none, DARE.

    Args:
        basis: as in `core`. The masks stay those of the adapters' units, so `deltas` does not make them independent of
            how the adapters are factored.
    """
    units = units.live(weights)
    if not len(units):
        return nothing(units)
    u, inner, v = _core(units, basis)
    return _product(u, _dare(inner, units, weights, density, rescale, elect, divide, seed), v.T)


# The steps ----------------------------------------------------------------------------------------------------------


def _product(left: Tensor, middle: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """left · middle · right as factors, of as few units as their shapes allow."""
    if left.shape[1] <= middle.shape[1]:
        return left, middle if right is None else middle @ right
    if right is None:
        right = torch.eye(middle.shape[1], dtype=middle.dtype, device=middle.device)
    return left @ middle, right


def _dare(
    inner: Units, units: Units, weights: Tensor, density: float, rescale: bool, elect: Elect, divide: Divide, seed: int
) -> Tensor:
    """DARE on units moved to another basis, under the masks' seeds of where they come from (a basis carries rounding)."""
    part = dropped(deltas(inner), seeds(units, seed), density, rescale)
    return consensus(part, present(units, weights), weights, elect=elect, divide=divide)


def _knots(units: Units, on: str) -> tuple[Tensor, Units]:
    """(left, inner): ΔW_i = left · (inner's ΔW_i), with left U and inner Σ V_iᵀ, or U Σ and V_iᵀ."""
    u, s = _left(_side_by_side(units.B, units.A, units.owner))
    rank = numerical_rank(s)
    u, s = u[:, :rank], s[:rank]
    inner = u.T @ units.B
    return (u, replace(units, B=inner)) if on == "SV" else (u * s, replace(units, B=inner / s[:, None]))


def _core(units: Units, basis: str) -> tuple[Tensor, Units, Tensor]:
    """(U, the units of the cores, V)."""
    B, A, owner = units.B, units.A, units.owner
    left, right = (B, A.T) if basis == "factors" else (_side_by_side(B, A, owner), _side_by_side(A.T, B.T, owner))
    u, v = _left(left)[0], _left(right)[0]
    return u, replace(units, B=u.T @ B, A=A @ v), v


def _side_by_side(B: Tensor, A: Tensor, owner: Tensor) -> Tensor:
    """A matrix with the left singular vectors and the singular values of [ΔW_1 | … | ΔW_N], but at most R columns.

    A_iᵀ = Q_i R_i (QR), so ΔW_i = B_i R_iᵀ Q_iᵀ, and Q_i is dropped.
    """
    parts = [B[:, own] @ torch.linalg.qr(A[own].T, mode="r").R.T for own in places(owner).values()]
    return torch.cat(parts, 1) if parts else B
