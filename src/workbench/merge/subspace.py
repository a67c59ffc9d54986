"""Merges by singular values and vectors, found from the factors: no ΔW is formed unless Σ r ≥ min(d_out, d_in).

Weights multiply the ΔW_i before anything else, so an adapter of weight 0 takes no direction. What is rounding and what
is rank is decided in one place, `numerical_rank`; directions that no adapter has are left out, where the papers' codes
fill them up with arbitrary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.merge.registry import method
from workbench.options import Count, Share
from workbench.singular import factored_svd, places
from workbench.singular import polar as _polar
from workbench.stack import Stack, Units

__all__ = ["iso_c", "iso_cts", "lowered", "nothing", "numerical_rank", "polar", "tsv"]

_ALL = {"units", "gauge", "scale", "order"}
NOISE = 100  # in units of ε: the SVD of a product of factors leaves a few where exact arithmetic leaves 0


def _tsv_notes(stack: Stack, weights: Tensor, options: dict) -> list[str]:
    return lowered(stack, weights, options["per_adapter"])


@method("tsv", paper="https://arxiv.org/abs/2412.00081", invariances=_ALL, notes=_tsv_notes)
def tsv(units: Units, weights: Tensor, *, per_adapter: Count | None = None) -> tuple[Tensor, Tensor]:
    """TSV-Merge: the strongest singular triplets of each w_i ΔW_i, decorrelated: ΔW = U⊥ Σ V⊥ᵀ.

    U⊥ and V⊥ are the polar factors of U = [U_1 | … | U_N] and V = [V_1 | … | V_N], the nearest matrices of orthonormal
    columns. Where the columns are dependent there is no single nearest one, and the polar factor is the partial isometry:
    N copies, of weights w_i, come out as the mean of w_i times the one, as long as all of its triplets are kept. One
    adapter comes out as itself.

    Args:
        per_adapter: triplets kept of each adapter (the recycling study, arXiv 2602.12323, keeps 8). None gives each an
            equal share of the directions, min(d_out, d_in) // N with N the adapters that have the module and a weight
            other than 0, but at least 1. There are no more than min(d_out, d_in) orthonormal directions: a number that
            is too large is lowered until all fit, and where one each is too many, the strongest of these are kept; the
            result's notes say where.
    """
    units = units.weighted(weights)
    if not len(units):
        return nothing(units)
    room, parts = min(units.shape), _parts(units)
    each = _each([len(own) for own in parts], room, per_adapter)
    triplets = []
    for own in parts:
        u, s, vh = factored_svd(own.B, own.A)
        kept = min(numerical_rank(s), max(1, each))
        triplets.append((u[:, :kept], s[:kept], vh[:kept]))
    u, s, vh = _joined(triplets)
    if not len(s):
        return nothing(units)
    strongest = s.argsort(descending=True, stable=True)[:room]
    return polar(u[:, strongest]) * s[strongest], polar(vh[strongest].T).T


@method("iso_c", paper="https://arxiv.org/abs/2502.04959", invariances=_ALL)
def iso_c(units: Units, weights: Tensor, *, divide: Literal["rank", "dimension"] = "rank") -> tuple[Tensor, Tensor]:
    """Iso-C (§4): X = Σ_i w_i ΔW_i with each singular value set to their mean, ΔW = σ̄ U Vᵀ; one adapter is flattened too.

    Args:
        divide: what the sum of the singular values is divided by: the numerical rank of X (their sum stays what it was),
            or min(d_out, d_in), which gives the σ̄ of the paper's code; that one puts arbitrary directions where X, of
            low rank, has none, and here these stay 0.
    """
    units = units.weighted(weights)
    u, s, vh = _sum(units)
    return _flat(units, u, s, vh, divide) if len(s) else nothing(units)


def _cts_notes(stack: Stack, weights: Tensor, options: dict) -> list[str]:
    none, fewest = [], 0
    for module, units in stack.outline.items():
        ranks = _ranks(stack, units, weights)
        if ranks and not _split(min(sum(ranks), *units.shape), len(ranks), options["common"])[1]:
            none, fewest = [*none, module], min(fewest or len(ranks), len(ranks))
    if not none or options["common"] == 1:
        return []
    return [
        f"{len(none)} modules, such as {none[0]}, have no room for a direction of its own for each adapter ({fewest} or more "
        "share it), so that the result is that of iso_c there"
    ]


@method("iso_cts", paper="https://arxiv.org/abs/2502.04959", invariances=_ALL, notes=_cts_notes)
def iso_cts(
    units: Units, weights: Tensor, *, common: Share = 0.8, divide: Literal["rank", "dimension"] = "rank"
) -> tuple[Tensor, Tensor]:
    """Iso-CTS (§4): the strongest directions of X = Σ_i w_i ΔW_i, then some of each adapter's own, all at one value.

    Of r directions, r the numerical rank of X (in the paper min(d_out, d_in)), each of the N adapters gets
    n = round((r − ⌊common · r⌋) / N) and X the first k = r − n N: U_c, V_c. An adapter's own are the n strongest singular
    triplets of w_i ΔW_i − U_c U_cᵀ w_i ΔW_i, fewer where that has a lower rank. ΔW = σ̄ U⊥ V⊥ᵀ, with U⊥ and V⊥ the polar
    factors (as in `tsv`) of [U_1 | … | U_N | U_c] and [V_1 | … | V_N | V_c] and σ̄ the mean of these triplets' singular
    values. One adapter comes out as in `iso_c`; so does everything where n = 0 (the result's notes say where).

    Args:
        common: the share of directions that X keeps.
        divide: as in `iso_c`; `rank` is the number of triplets.
    """
    units = units.weighted(weights)
    u, s, vh = _sum(units)
    if not len(s):
        return nothing(units)
    parts = _parts(units)
    k, n = _split(len(s), len(parts), common)
    found = [(u[:, :k], s[:k], vh[:k])]
    for own in parts if n else ():
        rest = own.B - u[:, :k] @ (u[:, :k].T @ own.B)
        u_i, s_i, vh_i = factored_svd(rest, own.A)
        n_i = min(n, numerical_rank(s_i, _largest(own), derived=True))
        found.append((u_i[:, :n_i], s_i[:n_i], vh_i[:n_i]))
    u, s, vh = _joined(found)
    return _flat(units, polar(u), s, polar(vh.T).T, divide)


# The steps ----------------------------------------------------------------------------------------------------------


def nothing(units: Units) -> tuple[Tensor, Tensor]:
    """The factors of ΔW = 0."""
    return units.B.new_zeros(units.shape[0], 1), units.A.new_zeros(1, units.shape[1])


def numerical_rank(s: Tensor, largest: Tensor | None = None, *, derived: bool = False) -> int:
    """How many singular values (in descending order) are more than rounding.

    Args:
        s: the values.
        largest: what rounding is measured against; None is the first of them. It matters for what is left of a
            difference: all of that may be rounding.
        derived: the matrix was made of singular vectors, which carry ε over the gaps between singular values: the
            threshold is √ε of the largest, below which dividing by a value blows up more rounding than is left in it;
            otherwise it is `NOISE` · ε.
    """
    if not len(s):
        return 0
    epsilon = torch.finfo(s.dtype).eps
    threshold = (epsilon**0.5 if derived else NOISE * epsilon) * (s[0] if largest is None else largest)
    return int((s > threshold).sum())


def polar(x: Tensor) -> Tensor:
    """The polar factor of (d, k), k ≤ d: orthonormal columns, or the partial isometry where columns are dependent."""
    return _polar(x, torch.finfo(x.dtype).eps ** 0.5)


def lowered(stack: Stack, weights: Tensor, asked: int | None) -> list[str]:
    """Where `tsv` cannot keep the triplets asked for (None: all), in words."""
    fewer, one = [], []
    for module, units in stack.outline.items():
        room = min(units.shape)
        ranks = _ranks(stack, units, weights)
        if not ranks:
            continue
        each = _each(ranks, room, asked)
        if not each:
            one.append(f"{module} (the strongest {room} of {len(ranks)})")
        elif each < min(asked or room, room, max(ranks)):
            fewer.append(f"{module} ({each} of each of {len(ranks)} adapters in {room} dimensions)")
    notes = []
    if fewer:
        notes.append(
            f"not all singular triplets {'asked for ' * bool(asked)}fit in {len(fewer)} modules, such as {fewer[0]}"
        )
    if one:
        notes.append(f"not even one singular triplet of each adapter fits in {len(one)} modules, such as {one[0]}")
    return notes


def _ranks(stack: Stack, units: Units, weights: Tensor) -> list[int]:
    """The units of each adapter that has the module and a weight other than 0."""
    return [rank for rank, w in zip(units.ranks(len(stack)).tolist(), weights.tolist(), strict=True) if rank and w]


def _each(ranks: Sequence[int], room: int, asked: int | None) -> int:
    """Triplets that each adapter may keep so that all of them fit; 0 where one each is too many."""
    each = max(1, room // len(ranks)) if asked is None else min(asked, max(ranks))
    while each and sum(min(each, rank) for rank in ranks) > room:
        each -= 1
    return each


def _split(rank: int, n: int, common: float) -> tuple[int, int]:
    """(common directions, directions of each adapter) of Iso-CTS; what does not divide evenly is common."""
    each = min(round((rank - int(common * rank)) / n), rank // n)
    return rank - each * n, each


def _parts(units: Units) -> list[Units]:
    """The units of each adapter that has any."""
    return [units[own] for own in places(units.owner).values()]


def _joined(triplets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """[U_1 | U_2 | …], all the values, and the V_iᵀ below one another."""
    u, s, vh = zip(*triplets, strict=True)
    return torch.cat(u, 1), torch.cat(s), torch.cat(vh)


def _sum(units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of the sum of the units, cut at its numerical rank; what cancelled is none."""
    if not len(units):
        return units.B[:, :0], units.B.new_zeros(0), units.A[:0]
    u, s, vh = factored_svd(units.B, units.A)
    parts = torch.stack([_largest(own) for own in _parts(units)])
    rank = numerical_rank(s, torch.maximum(s[0], parts.max()))
    return u[:, :rank], s[:rank], vh[:rank]


def _largest(own: Units) -> Tensor:
    """‖ΔW‖_F from the factors: at least the largest singular value. In fp64, where no fp32 overflows."""
    b, a = own.B.double(), own.A.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt().to(own.B)


def _flat(units: Units, u: Tensor, s: Tensor, vh: Tensor, divide: str) -> tuple[Tensor, Tensor]:
    mean = s.sum() / (len(s) if divide == "rank" else min(units.shape))
    return u * mean, vh
