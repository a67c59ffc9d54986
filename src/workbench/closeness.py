"""How close each adapter of a pool is to a target adapter: the recycling study's measures (arXiv 2602.12323).

    closeness(stack, target, "cosine")              # (N,), one number an adapter: its modules pooled ("macro")
    closeness(stack, target, "clamp", mean=True)    # the mean over modules ("micro")

With x an adapter's ΔW of a module and t the target's, each measure is a product over the norms, summed over modules:

    cosine     ⟨x, t⟩             clamp      Σ max(x∘t, 0), entry by entry
    clamp_pm   max(⟨x, t⟩, 0)     abs        Σ |x∘t|, entry by entry
    qfim       ⟨x∘x, t∘t⟩, over the norms of x∘x and t∘t, and of the outcome the square root

The definitions are those of the study's code (r-three/realistic-adaptive-merging): all are over the norms (a plain sum
would rank by ‖ΔW‖), and the "pm" of clamp_pm is per module: modules that point away from the target count as 0. One
thing is not kept: there 1e-6 is added under the root of ‖x‖²‖t‖², which for quasi-FIM outweighs it wherever
‖x∘x‖‖t∘t‖ < 1e-3 and so prefers large adapters. Here nothing is added, no measure depends on an adapter's scale, and an
update of 0 has closeness 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.adapters import Adapter, Factors
from workbench.errors import SelectionError
from workbench.factored import products
from workbench.stack import Stack, Units

__all__ = ["MEASURES", "check_target", "closeness", "diversify"]

MEASURES = ("cosine", "clamp", "abs", "clamp_pm", "qfim")
ELEMENTWISE = ("clamp", "abs", "qfim")  # those that need ΔW itself
ENTRIES = 2**24  # of what is held of a few adapters at once, ΔW or factors; on a GPU 16 times that


def closeness(stack: Stack, target: Adapter, how: str, *, mean: bool = False) -> Tensor:
    """(N,) fp32 closeness of each adapter to the target, in the stack's order; at most 1, which the target itself has.

    cosine and clamp_pm come from Gram matrices of the factors; the others form ΔW in fp32, one module of a few adapters
    at a time. cosine lies in [-1, 1], the others in [0, 1]; abs and qfim do not tell an update from its negative.

    Args:
        how: one of `MEASURES`.
        mean: False pools the modules: products and squared norms are summed over all modules of each ("macro"). True
            measures each module by itself and takes the mean over those where the adapter or the target has an update
            ("micro"; as in the study's code, so that modules which only one of them has lower it either way); qfim's
            root is taken of the mean.

    Raises:
        SelectionError: an unknown measure; a target that is no adapter, is 0, is not finite or shares no module with
            the stack; a module whose shape differs between the target and an adapter, or an adapter not finite (named).
    """
    check_target(target, how)
    _check_shapes(stack, target)
    columns = []
    for module in dict.fromkeys([*stack.modules, *target.modules]):
        units = stack.modules.get(module)  # which reads it, where the stack is lazy
        goal = _units(target.modules.get(module), units, stack.device)
        columns.append(_module(goal[:0] if units is None else units, goal, len(stack), how))
    inner, own, theirs = (torch.stack(column, 1) for column in zip(*columns, strict=True))  # (N, M), (N, M), (1, M)
    if not torch.isfinite(own).all():
        worst = int((~torch.isfinite(own)).any(1).nonzero()[0])
        raise SelectionError(f"{stack.names[worst]}: its update is not finite, so it cannot be ranked; leave it out")
    if mean:
        out = _over(inner, own * theirs).sum(1) / ((own > 0) | (theirs > 0)).sum(1)
    else:
        out = _over(inner.sum(1), own.sum(1) * theirs.sum())
    return (out.sqrt() if how == "qfim" else out).clamp(-1, 1).float()


def check_target(target: Adapter, how: str) -> None:
    """Check a measure and a target before any adapter is read.

    Raises:
        SelectionError: an unknown measure; a target that is no adapter, is 0 or is not finite.
    """
    if how not in MEASURES:
        raise SelectionError(f"no measure of closeness {how!r}; choose one of {', '.join(MEASURES)}")
    if not isinstance(target, Adapter):
        raise SelectionError(
            f"expected the target as an Adapter, got {type(target).__name__}; pool.adapter(name) or Adapter.load(folder) "
            "gives one"
        )
    norm = target.norm()
    if not 0 < norm < math.inf:
        zero = "is 0, so nothing can be close to it (training that never lowered the validation loss leaves it so)"
        said = zero if norm == 0 else "is not finite"
        raise SelectionError(f"the target {target.name}: its update {said}; train another on more examples")


def diversify(score: Tensor, likeness: Tensor, beta: float) -> list[int]:
    """An order of N things, greedily: the first has the largest score, each next the largest score − β·likeness.

    Args:
        score: (N,).
        likeness: (N, N); what counts is the largest to one already in the order. Ties to six decimals go to the first.
    """
    left, worst = torch.ones(len(score), dtype=torch.bool), torch.zeros(len(score), dtype=torch.float64)
    order: list[int] = []
    while left.any():
        gain = ((score.double() - beta * worst) * 1e6).round()
        order.append(int(gain.masked_fill(~left, -math.inf).argmax()))
        left[order[-1]] = False
        worst = torch.maximum(worst, likeness[order[-1]].double())
    return order


def _check_shapes(stack: Stack, target: Adapter) -> None:
    shared = [module for module in target.modules if module in stack.modules]
    if not shared:
        raise SelectionError(
            f"the target {target.name} shares no module with the {len(stack)} adapters: it has such as "
            f"{next(iter(target.modules), None)!r}, they {next(iter(stack.modules), None)!r}; it is of another base"
        )
    for module in shared:
        units, factors = stack.outline[module], target.modules[module]
        got, want = (factors.B.shape[0], factors.A.shape[1]), units.shape
        if got != want or factors.embedding != units.embedding:
            first, kind = stack.names[int(units.owner[0])], {True: "an embedding of ", False: ""}
            raise SelectionError(
                f"the target {target.name}: {module} is {kind[factors.embedding]}{got[0]}×{got[1]}, but "
                f"{kind[units.embedding]}{want[0]}×{want[1]} in {first}; they are of different bases"
            )


def _units(factors: Factors | None, like: Units | None, device: torch.device) -> Units:
    """The target's module as units, all of owner 0; where it lacks the module, none of them, shaped as the adapters'."""
    if factors is None:
        return like[:0]
    A, B = factors.A.to(device), factors.B.to(device)
    return Units(B, A, torch.zeros(len(A), dtype=torch.long, device=device), torch.ones(len(A), device=device))


def _module(units: Units, target: Units, n: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of one module, fp64: (n,) products with the target, (n,) squared norms, (1,) the target's squared norm."""
    inner, own = torch.zeros(2, n, dtype=torch.float64, device=units.A.device)
    goal_B, goal_A = _fp64(target, 1)
    theirs = size = products(goal_B, goal_A)
    dense = how in ELEMENTWISE and (how == "qfim" or len(target) > 0)
    if dense:
        goal = _deltas(goal_B, goal_A, size)
        if how == "qfim":
            theirs = size**2 * _sum(goal.square_().square())
    held = math.prod(units.shape) if dense else sum(units.shape) * int(units.ranks(n).max())
    room = ENTRIES * (16 if units.A.is_cuda else 1)
    for adapters, block in units.blocks(max(1, room // max(1, held))):
        B, A = _fp64(block, len(adapters))
        norms, product = products(B, A), products(B, A, goal_B, goal_A)
        if dense:
            deltas = _deltas(B, A, norms)
            if how == "qfim":
                fourth = _sum(deltas.square_().square())
                product, norms = norms * size * _sum(deltas.mul_(goal)), norms**2 * fourth
            else:
                deltas = deltas.mul_(goal)
                product = (norms * size).sqrt() * _sum(deltas.abs_() if how == "abs" else deltas.clamp_(min=0))
        inner[adapters], own[adapters] = product.clamp_min(0) if how == "clamp_pm" else product, norms
    return inner, own, theirs


def _fp64(units: Units, n: int) -> tuple[Tensor, Tensor]:
    B, A = units.padded(n)
    return B.double(), A.double()


def _deltas(B: Tensor, A: Tensor, squares: Tensor) -> Tensor:
    """(n, d_out, d_in) fp32: each adapter's ΔW over its norm, given squared (n,); 0 where that is 0."""
    scale = torch.where(squares > 0, squares.rsqrt(), 0.0)
    return (B * scale[:, None, None]).float() @ A.float()


def _sum(dense: Tensor) -> Tensor:
    """(n,) fp64 sum over the entries of each."""
    return dense.sum((1, 2)).double()


def _over(inner: Tensor, squares: Tensor) -> Tensor:
    """A product over the root of two squared norms multiplied; 0 where that is 0."""
    return torch.where(squares > 0, inner / squares.sqrt(), 0.0)
