"""Baselines beside adaptive merging: fits of as few degrees of freedom as its coefficients have, and full fine-tuning.

The recycling study explains adaptive merging as regularisation (arXiv 2602.12323). K coefficients in each of M modules are
K M numbers; these fits spend as many on directions that owe nothing to other people's adapters, under the same `Schedule`,
validation and seeds. A rank-1 adapter and an early-stopped one are `train_fresh` with Plan(rank=1) and with fewer steps.

All return what `train_fresh` does, every adapter with the count of its trained numbers as info["parameters"].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.adapt.fresh import Plan, start_factors
from workbench.adapt.gradient import Curves, Schedule, fit
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank, stores_transposed
from workbench.controls import orthonormal
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import Encoded
from workbench.options import Count

__all__ = [
    "CORE",
    "FULL",
    "RANK_3",
    "RANK_8",
    "RANK_64",
    "SUBSPACE",
    "VECTORS",
    "degrees_of_freedom",
    "train_core",
    "train_full",
    "train_subspace",
    "train_vectors",
]

RANK_3, RANK_8, RANK_64 = Plan(3, 1.0), Plan(8), Plan(64, 1.0)
SUBSPACE = Schedule(steps=400, lr=5e-2, batch=8, every=10)
CORE = Schedule(steps=400, lr=1e-1, batch=8, every=10)
VECTORS = Schedule(steps=400, lr=3e-2, batch=8, every=10)
FULL = Schedule(steps=400, lr=3e-4, batch=8, every=10)


def degrees_of_freedom(
    trained: str, base: Base, plan: Plan = RANK_8, *, dimension: int = 280, adapters: int = 10
) -> int:
    """How many numbers one fit trains.

        degrees_of_freedom("coefficients", base, adapters=10)   # 10 M, one per adapter and module
        degrees_of_freedom("core", base, Plan(rank=3))          # 9 M

    Args:
        trained: "lora" (`train_fresh`), "coefficients" (one per adapter and module), "subspace", "core", "vectors", "full".
        plan: the rank, and the layers counted.
        dimension: of the subspace.
        adapters: K, of the coefficients.

    Raises:
        MergeError: an unknown kind of fit.
        AdapterError: a plan that targets no layer of the base, or of no rank.
    """
    shapes, rank = _targets(base, plan).values(), plan.rank
    counts = {
        "lora": sum(rank * (d_out + d_in) for d_out, d_in in shapes),
        "coefficients": adapters * len(shapes),
        "subspace": dimension,
        "core": len(shapes) * rank**2,
        "vectors": sum(rank + d_out for d_out, _ in shapes),
        "full": sum(d_out * d_in for d_out, d_in in shapes),
    }
    if trained not in counts:
        raise MergeError(f"degrees of freedom of {trained!r} are unknown; choose one of {', '.join(counts)}")
    return counts[trained]


def train_subspace(
    base: Base,
    names: Sequence[str],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = SUBSPACE,
    *,
    seeds: Sequence[int],
    dimension: Count = 280,
    plan: Plan = RANK_8,
    projection: int = 0,
    autocast: bool = False,
) -> tuple[list[Adapter], Curves]:
    """A LoRA's parameters confined to a random subspace: θ = θ₀ + P z, of which only z (dimension,) is trained, from zero.

    θ holds both factors of every module that the plan targets; θ₀ is where `train_fresh` starts under the same seed (B zero,
    A random). P (|θ|, dimension) has random orthonormal columns. It is dense: 4 |θ| · dimension bytes, so choose a small rank
    for a large base.

    Args:
        projection: the seed of P, which all fits share; vary it to see how much rests on the draw.

    Raises:
        AdapterError: a plan that targets no layer of the base, or of no rank.
        MergeError: a dimension below 1 or above |θ|, lists of unequal number, or a fit that diverges.

    Source: intrinsic dimension (Li et al. 2018, arXiv 1804.08838, §2; Aghajanyan et al. 2020, arXiv 2012.13255), here of a
    LoRA instead of all weights.
    """
    shapes = _agree(base, names, train, seeds, plan)
    start = start_factors(shapes, [plan] * len(names), seeds)
    pieces = [tensor for pair in start.values() for tensor in pair]
    sizes = [piece[0].numel() for piece in pieces]
    if dimension not in range(1, sum(sizes) + 1):
        raise MergeError(f"dimension is {dimension}, expected from 1 to {sum(sizes)}, the parameters of the LoRA")
    draw = torch.Generator().manual_seed(int(projection))
    rows = orthonormal(sum(sizes), dimension, draw).T.contiguous().to(base.device)
    origin = torch.cat([piece.flatten(1) for piece in pieces], 1).to(base.device)
    z = torch.zeros(len(names), dimension, device=base.device)

    def updates() -> dict[str, LowRank]:
        theta = torch.addmm(origin, z, rows).split(sizes, 1)
        factors = [part.view(piece.shape) for part, piece in zip(theta, pieces, strict=True)]
        return {m: LowRank(factors[2 * i] * plan.scale, factors[2 * i + 1]) for i, m in enumerate(shapes)}

    count = degrees_of_freedom("subspace", base, plan, dimension=dimension)
    curves = fit(base, [z], updates, train, validation, schedule, seeds, autocast=autocast)
    return _adapters(base, names, updates, count, plan.scale), curves


def train_core(
    base: Base,
    names: Sequence[str],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = CORE,
    *,
    seeds: Sequence[int],
    plan: Plan = RANK_3,
    frozen: Literal["random", "svd"] = "random",
    projection: int = 0,
    autocast: bool = False,
) -> tuple[list[Adapter], Curves]:
    """A core R (r, r) per module between frozen factors: ΔW = s B R A, of which only R is trained, from zero.

    Args:
        plan: rank, scale and layers; rank 3 spends 9 numbers a module, about what coefficients of 10 adapters do.
        frozen: "random": orthonormal columns of B and rows of A, so that ΔW/s has the singular values of R, or "svd": LoRA-XS,
            B = U Σ and A = Vᵀ of the base's own weight's r largest singular values, whose size wants a smaller lr (3e-2).
        projection: the seed of the random factors, which all fits share; without meaning to "svd".

    Raises:
        AdapterError: a plan that targets no layer of the base, or of a rank below 1 or above the smaller side of one.
        MergeError: an unknown kind of factors, lists of unequal number, or a fit that diverges.

    Source: LoRA-XS (arXiv 2405.17604, §3), which starts R at N(0, 10⁻¹⁰) instead of zero and knows "svd" alone.
    """
    shapes = _agree(base, names, train, seeds, plan)
    if frozen not in ("random", "svd"):
        raise MergeError(f"frozen {frozen!r} is unknown; choose random or svd")
    for module, shape in shapes.items():
        if plan.rank > min(shape):
            raise AdapterError(
                f"{names[0]}: rank {plan.rank} is above the smaller side of {module}, {shape[0]}×{shape[1]}; choose a smaller one"
            )
    draw, g, held = torch.Generator().manual_seed(int(projection)), len(names), {}
    for module, (d_out, d_in) in shapes.items():
        if frozen == "svd":
            b, a = _leading(base, module, plan.rank)
        else:
            b, a = orthonormal(d_out, plan.rank, draw), orthonormal(d_in, plan.rank, draw).T
        held[module] = (b * plan.scale).to(base.device), a.to(base.device)
    cores = {m: torch.zeros(g, plan.rank, plan.rank, device=base.device) for m in shapes}

    def updates() -> dict[str, LowRank]:
        return {m: LowRank(b.expand(g, -1, -1), cores[m] @ a) for m, (b, a) in held.items()}

    curves = fit(base, list(cores.values()), updates, train, validation, schedule, seeds, autocast=autocast)
    return _adapters(base, names, updates, degrees_of_freedom("core", base, plan), plan.scale), curves


def train_vectors(
    base: Base,
    names: Sequence[str],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = VECTORS,
    *,
    seeds: Sequence[int],
    plan: Plan = RANK_64,
    projection: int = 0,
    autocast: bool = False,
) -> tuple[list[Adapter], Curves]:
    """Two vectors a module about one frozen random pair: ΔW = s diag(b) B diag(d) A; b (d_out,) from 0, d (r,) from 0.1.

    All modules share B and A, Kaiming-uniform, cut to each one's size. An adapter whose rank is above a module's smaller
    side is returned as ΔW times an identity there.

    Args:
        projection: the seed of B and A, which all fits share.

    Raises:
        AdapterError: a plan that targets no layer of the base, or of no rank.
        MergeError: lists of unequal number, or a fit that diverges.

    Source: VeRA (arXiv 2310.11454, §3).
    """
    shapes = _agree(base, names, train, seeds, plan)
    tall, wide = (max(shape[side] for shape in shapes.values()) for side in (0, 1))
    draw, g = torch.Generator().manual_seed(int(projection)), len(names)
    A = ((2 * torch.rand(plan.rank, wide, generator=draw) - 1) * math.sqrt(6 / wide)).to(base.device)
    B = ((2 * torch.rand(tall, plan.rank, generator=draw) - 1) * math.sqrt(6 / plan.rank)).to(base.device)
    b = {m: torch.zeros(g, d_out, 1, device=base.device) for m, (d_out, _) in shapes.items()}
    d = {m: torch.full((g, plan.rank, 1), 0.1, device=base.device) for m in shapes}

    def updates() -> dict[str, LowRank]:
        return {m: LowRank(b[m] * (B[:d_out] * plan.scale), d[m] * A[:, :d_in]) for m, (d_out, d_in) in shapes.items()}

    curves = fit(base, [*b.values(), *d.values()], updates, train, validation, schedule, seeds, autocast=autocast)
    return _adapters(base, names, updates, degrees_of_freedom("vectors", base, plan), plan.scale), curves


def train_full(
    base: Base,
    names: Sequence[str],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = FULL,
    *,
    seeds: Sequence[int],
    targets: tuple[str, ...] | None = None,
    autocast: bool = False,
) -> tuple[list[Adapter], Curves]:
    """Full fine-tuning of the blocks' linear layers, as ΔW (d_out, d_in) per module from zero; weight decay draws to the base.

    Embeddings, norms, biases and the output head stay as they are. Per fit it holds ΔW, its gradient, AdamW's two moments
    and the best so far. The adapters have rank min(d_out, d_in): ΔW times an identity.

    Args:
        targets: the layers' names, such as ("q_proj", "v_proj"); None takes all of `base.projections`.

    Raises:
        AdapterError: targets that the base lacks.
        MergeError: lists of unequal number, or a fit that diverges.
    """
    plan = Plan(rank=1, targets=targets)
    shapes = _agree(base, names, train, seeds, plan)
    g = len(names)
    moved = {m: torch.zeros(g, d_out, d_in, device=base.device) for m, (d_out, d_in) in shapes.items()}
    same = {width: torch.eye(width, device=base.device).expand(g, -1, -1) for _, width in shapes.values()}

    def updates() -> dict[str, LowRank]:
        return {m: _Whole(moved[m], same[d_in]) for m, (_, d_in) in shapes.items()}

    curves = fit(base, list(moved.values()), updates, train, validation, schedule, seeds, autocast=autocast)
    return _adapters(base, names, updates, degrees_of_freedom("full", base, plan), 1.0), curves


@dataclass(frozen=True)
class _Whole(LowRank):
    """B the whole ΔW (G, d_out, d_in) and A the identity, which is not multiplied by."""

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        flat, own = (t.unflatten(0, (len(self.B), -1)).flatten(1, -2) for t in (y, x.to(y.dtype)))
        return torch.baddbmm(flat, own, self.B.to(y.dtype).mT).view(y.shape)


def _leading(base: Base, module: str, rank: int) -> tuple[Tensor, Tensor]:
    """U Σ (d_out, r) and Vᵀ (r, d_in) of a layer's r largest singular values."""
    layer = base.model.get_submodule(module)
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise AdapterError(
            f"{module} is a {type(layer).__name__}, whose weight cannot be read as numbers; use frozen='random'"
        )
    u, s, v = torch.linalg.svd(weight.float().T if stores_transposed(layer) else weight.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def _agree(
    base: Base, names: Sequence[str], train: Sequence, seeds: Sequence[int], plan: Plan
) -> dict[str, tuple[int, int]]:
    """The layers that the plan targets, once the arguments are found to agree."""
    if not len(names) == len(train) == len(seeds) or not len(names):
        raise MergeError(
            f"expected one of each per adapter, got {len(names)} names, {len(train)} lists of examples and {len(seeds)} seeds"
        )
    return _targets(base, plan, f"{names[0]}: ")


def _targets(base: Base, plan: Plan, who: str = "") -> dict[str, tuple[int, int]]:
    if plan.rank < 1:
        raise AdapterError(f"{who}rank is {plan.rank}, expected at least 1")
    shapes = {module: shape for module, shape in base.projections.items() if plan.has(module)}
    if not shapes:
        wanted = " or ".join(plan.targets or ("of any kind",))
        raise AdapterError(
            f"{who}the base has no layer named {wanted}; its layers are such as {next(iter(base.projections), None)}"
        )
    return shapes


@torch.no_grad()
def _adapters(
    base: Base, names: Sequence[str], updates: Callable[[], Mapping[str, LowRank]], count: int, scale: float
) -> list[Adapter]:
    """Each fit's updates, as they are left, as an adapter."""
    final = updates()
    return [
        Adapter(name, {m: _factors(u.B[g], u.A[g], scale) for m, u in final.items()}, base.name, {"parameters": count})
        for g, name in enumerate(names)
    ]


def _factors(B: Tensor, A: Tensor, scale: float) -> Factors:
    """A pair of factors on the processor; where their rank is above min(d_out, d_in), ΔW times an identity."""
    (d_out, rank), d_in = B.shape, A.shape[1]
    if rank > min(d_out, d_in):
        delta = B @ A
        B, A, scale = (delta, torch.eye(d_in), 1.0) if d_in <= d_out else (torch.eye(d_out), delta, 1.0)
    return Factors(B.float().cpu().contiguous().clone(), A.float().cpu().contiguous().clone(), scale)
