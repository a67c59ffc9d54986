"""Merges that look at single entries of ΔW: sparsify each ΔW_i, perhaps elect a sign per entry, add up.

They are run on ΔW = s B A and never on B and A apart, where the outcome would depend on how each adapter happened to be
factored (a relative change of about 1). Each ΔW_i is made once, one adapter and module at a time: what is positive and what
is negative is summed apart, so that the elected sign can choose between the two sums at the end. Memory is a few dense
matrices, however many adapters there are. The conventions, which papers and libraries do not share:

- trim: per tensor. A share of the entries is a number of them, rounded; with the smallest that stays, all that equal it
  stay, so that how ties are broken never matters.
- weigh, then elect: the sign of Σ_i w_i x_i (`total`) or of Σ_i sign(w_i x_i) (`frequency`). peft elects before it
  weighs, so the two agree where the weights are equal and positive.
- where that sum is 0, no sign is elected and the entry is 0 (peft takes the positive one), so that merging −ΔW_i gives
  minus the merge of ΔW_i.
- divide: Σ w_i x_i over the entries that agree, by their number (`count`, as the TIES paper), by their Σ|w_i|
  (`weights`), or not at all (`none`: task arithmetic). An entry of 0 agrees with nothing and is not counted.
- rescale: what is dropped at random is made up for by 1 / (probability of staying), so that the expectation is ΔW.
- masks: the seed of adapter i's mask is made of (seed, module, the units of ΔW_i up to sign), so the order of the
  adapters does not matter, and copies get the same mask. The draw is the device's own: a GPU's differs from a processor's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from workbench.merge.registry import method
from workbench.options import Share
from workbench.singular import on_processor, places
from workbench.stack import Units

__all__ = [
    "Divide",
    "Elect",
    "breadcrumbs",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "drop",
    "fingerprints",
    "magnitude_prune",
    "mask_seed",
    "threshold",
    "ties",
]

Elect = Literal["total", "frequency", "none"]
Divide = Literal["count", "weights", "none"]
Part = Callable[[int], Tensor]
_GAUGE, _MASKED = {"units", "gauge", "scale", "order"}, {"units", "order"}


@method("ties", paper="https://arxiv.org/abs/2306.01708", invariances=_GAUGE, dense=True)
def ties(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    elect: Literal["total", "frequency"] = "total",
    divide: Literal["count", "weights"] = "count",
) -> Tensor:
    """TIES (§3): keep the share `density` of largest magnitude, elect a sign, average the entries that agree with it."""
    return consensus(trimmed(deltas(units), density), present(units, weights), weights, elect=elect, divide=divide)


@method("magnitude_prune", paper="https://arxiv.org/abs/2306.01708", invariances=_GAUGE, dense=True)
def magnitude_prune(units: Units, weights: Tensor, *, density: Share = 0.2) -> Tensor:
    """Σ_i w_i ΔW_i, of each the share `density` of largest magnitude (TIES' trimming without its election; as in peft)."""
    return consensus(trimmed(deltas(units), density), present(units, weights), weights)


@method("dare_linear", version=2, paper="https://arxiv.org/abs/2311.03099", invariances=_MASKED, dense=True)
def dare_linear(units: Units, weights: Tensor, *, density: Share = 0.2, rescale: bool = True, seed: int = 0) -> Tensor:
    """DARE (§3.1): each entry stays with probability `density`, over which it is divided; then Σ_i w_i ΔW_i."""
    part = dropped(deltas(units), seeds(units, seed), density, rescale)
    return consensus(part, present(units, weights), weights)


@method("dare_ties", version=2, paper="https://arxiv.org/abs/2311.03099", invariances=_MASKED, dense=True)
def dare_ties(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    rescale: bool = True,
    elect: Literal["total", "frequency"] = "total",
    divide: Divide = "count",
    seed: int = 0,
) -> Tensor:
    """DARE's random dropping (§3.1) in place of TIES' trimming; then TIES' election and mean of those that agree."""
    part = dropped(deltas(units), seeds(units, seed), density, rescale)
    return consensus(part, present(units, weights), weights, elect=elect, divide=divide)


@method("della", version=2, paper="https://arxiv.org/abs/2406.11617", invariances=_MASKED, dense=True)
def della(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    window: Share = 0.2,
    rescale: bool = True,
    elect: Elect = "total",
    divide: Divide = "count",
    seed: int = 0,
) -> Tensor:
    """DELLA (§3): as `dare_ties`, with larger entries more likely to stay.

    The probability rises by rank of magnitude within each row, evenly from density − window/2 to density + window/2; the
    window is narrowed where it would leave [0, 1]. With `elect="none"` and `divide="none"` it is DELLA without election.
    """
    columns = units.shape[1]
    window = min(window, 2 * density, 2 * (1 - density)) if columns > 1 else 0.0
    found, whole = seeds(units, seed), deltas(units)
    rising = torch.linspace(-0.5, 0.5, columns, dtype=units.B.dtype, device=units.B.device) * window + density

    def part(i: int) -> Tensor:
        delta = whole(i)
        order = delta.abs().argsort(1)  # drawn in this order, each row's smallest entry first
        kept = drop(torch.ones_like(delta), rising, rescale, found(i))
        return delta.mul_(torch.empty_like(delta).scatter_(1, order, kept))

    return consensus(part, present(units, weights), weights, elect=elect, divide=divide)


@method("breadcrumbs", paper="https://arxiv.org/abs/2312.06795", invariances=_GAUGE, dense=True)
def breadcrumbs(
    units: Units,
    weights: Tensor,
    *,
    density: Share = 0.2,
    outliers: Share = 0.01,
    elect: Elect = "none",
    divide: Divide = "none",
) -> Tensor:
    """Model breadcrumbs (§3): of each ΔW_i the share `outliers` of largest magnitude is dropped, the next `density` kept.

    Then Σ_i w_i ΔW_i as in the paper, or TIES' election and mean. At density 1 everything but the outliers stays.
    """
    whole = deltas(units)

    def part(i: int) -> Tensor:
        delta = whole(i)
        sizes = delta.abs()
        top, low = threshold(sizes, outliers), threshold(sizes, min(1.0, outliers + density))
        return delta.mul_((sizes >= low) & (sizes < top))

    if density == 0:
        return units.B.new_zeros(units.shape)
    return consensus(part, present(units, weights), weights, elect=elect, divide=divide)


# The steps ----------------------------------------------------------------------------------------------------------


def present(units: Units, weights: Tensor) -> list[int]:
    """The adapters that have the module and a weight other than 0."""
    known = weights.tolist()
    return [i for i in units.owner.unique().tolist() if known[i] != 0]


def deltas(units: Units) -> Part:
    """i → ΔW_i, made anew at every call."""
    own = places(units.owner)
    return lambda i: units[own.get(i, slice(0))].delta()


def consensus(
    part: Part, chosen: list[int], weights: Tensor, *, elect: Elect = "none", divide: Divide = "none"
) -> Tensor:
    """Σ_i w_i x_i over the entries that agree with the elected sign, divided as asked; see the module's docstring.

    Args:
        part: i → x_i, a matrix of its own (it is changed in place), asked for once.
        chosen: the adapters to merge, at least one unless all are to give 0 (then the shape is that of part(0)).
        weights: (N,).
    """
    if not chosen:
        return torch.zeros_like(part(0))
    known, electing = weights.tolist(), elect != "none"
    total, sizes, heads = [], [], None
    for i in chosen:
        x = part(i) if known[i] == 1 else part(i).mul_(known[i])
        if not total:  # one sum, or one of what is positive and one of what is negative
            total = [torch.zeros_like(x) for _ in range(1 + electing)]
            sizes = [torch.zeros_like(x) for _ in total] if divide != "none" else []
            heads = torch.zeros_like(x) if elect == "frequency" else None
        if heads is not None:
            heads += x.sign()
        for place, y in enumerate((x.clamp(min=0), x.clamp(max=0)) if electing else (x,)):
            total[place] += y
            if sizes:
                sizes[place].add_(y != 0, alpha=abs(known[i]) if divide == "weights" else 1.0)
    if electing:
        lead = total[0] + total[1] if heads is None else heads
        total, sizes = ([torch.where(lead > 0, *pair)] if pair else [] for pair in (total, sizes))
        total[0].mul_(lead != 0)
    return total[0].div_(torch.where(sizes[0] > 0, sizes[0], 1.0)) if sizes else total[0]


def threshold(sizes: Tensor, share: float) -> Tensor:
    """The smallest among the round(share · entries) largest magnitudes, at least one; infinity where the share is 0.

    Exactly that on every device. `kthvalue` is the fast way on a processor; on a GPU one block does all of its work, where
    `topk` spreads its own over all.
    """
    if share <= 0:
        return sizes.new_full((), float("inf"))
    keep = max(1, round(share * sizes.numel()))
    if on_processor(sizes):
        return sizes.flatten().kthvalue(sizes.numel() - keep + 1).values
    return sizes.flatten().topk(keep, sorted=False).values.amin()


def trimmed(part: Part, density: float) -> Part:
    """`part` with all but the share of largest entries of each matrix set to 0."""

    def out(i: int) -> Tensor:
        x = part(i)
        sizes = x.abs()
        return x.mul_(sizes >= threshold(sizes, density))

    return out


def drop(x: Tensor, chance: Tensor | float, rescale: bool, seed: int) -> Tensor:
    """Entries kept with their chance and, with `rescale`, divided by it; in place. A chance of 0 gives 0."""
    generator = torch.Generator(x.device).manual_seed(seed)
    x.mul_(torch.rand(x.shape, generator=generator, device=x.device) < chance)
    if rescale and isinstance(chance, Tensor):
        x.div_(torch.where(chance > 0, chance, 1.0))
    elif rescale and chance > 0:
        x.div_(chance)
    return x


def dropped(part: Part, found: Callable[[int], int], density: float, rescale: bool) -> Part:
    """`part` under DARE's masks."""
    return lambda i: drop(part(i), density, rescale, found(i))


def seeds(units: Units, seed: int) -> Callable[[int], int]:
    """i → the seed of its mask in this module; the device is waited for once, for all adapters."""
    found = fingerprints(units).tolist()
    return lambda i: mask_seed(seed, units.module, found[i])


def mask_seed(seed: int, module: str, fingerprint: int) -> int:
    """A seed from the given one, the module's name and the fingerprint of the adapter's units in it."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{module}|{fingerprint}".encode()).digest()[:7], "big")


def fingerprints(units: Units) -> Tensor:
    """(largest owner + 1,) int64, on the units' device: what each adapter's units are, whatever their order and signs.

    Whole numbers throughout, so that every device gives the same: the bits of |b| and |a| in fp32, each multiplied by a
    number of its place and added up (a multilinear hash), per unit; scrambled, so that no unit's part can make up for
    another's; and added up per adapter. Two adapters that differ anywhere agree once in some 2³² pairs.
    """
    factors = _scrambled(torch.arange(1, sum(units.shape) + 1, device=units.B.device))
    out = factors.new_zeros(int(units.owner.max()) + 1 if len(units) else 1)
    for owner, B, A in zip(*(t.split(2048) for t in (units.owner, units.B.T, units.A)), strict=True):
        bits = (t.abs().float().contiguous().view(torch.int32).long() for t in (B, A))
        rows = sum((b * w).sum(1) for b, w in zip(bits, factors.split(units.shape), strict=True))
        out.index_add_(0, owner, _scrambled(rows))
    return out


def _scrambled(x: Tensor) -> Tensor:
    """A bijection of int64 without pattern (as SplitMix64's, with shifts that keep the sign)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)
