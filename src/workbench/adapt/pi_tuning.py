"""π-tuning: adapters interpolated by trained weights, and trained on themselves (Wu et al. 2023, arXiv 2304.14381)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.adapt.coefficients import ACTIVATIONS, Granularity, slots
from workbench.adapt.fitted import Fitted, fold, modules_of, side_by_side
from workbench.adapt.gradient import Schedule, Watch, fit
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank
from workbench.errors import MergeError
from workbench.evaluate import Encoded
from workbench.options import Count
from workbench.stack import Stack

__all__ = ["FRESH", "PI_TUNING", "pi_tuning"]

PI_TUNING = Schedule(steps=100, lr=1e-4, batch=8, every=10)
FRESH = "fresh"


def pi_tuning(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = PI_TUNING,
    *,
    seeds: Sequence[int],
    granularity: Granularity = "expert",
    fresh: bool = True,
    rank: Count = 8,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """Train softmax weights from an equal start, and all A and B with them, for G fits side by side.

    Settings as in the recycling study (arXiv 2602.12323): lr 1e-4, adapters chosen by quasi-FIM; where the target's own
    adapter is not among them one slot is a fresh adapter, A ~ N(0, 0.01²) and B = 0, in every linear layer of the base.

    Args:
        granularity: what shares its weights; unit is not possible.
        fresh: add the fresh adapter (it comes on top of the stack's, so the softmax is over K + 1).
        rank: of the fresh adapter.

    Returns:
        Coefficients (M, N) are of the stack's own adapters; what is missing to 1 is the fresh one's.

    Raises:
        MergeError: unit granularity, or whatever `learn_coefficients` raises.
    """
    if granularity == "unit":
        raise MergeError("π-tuning trains the units themselves, so weights per unit would be a second name for them")
    if len(stacks) != len(seeds):
        raise MergeError(f"expected {len(stacks)} fits throughout, got {len(stacks)} stacks and {len(seeds)} seeds")
    whole = [stack.to("cpu") for stack in stacks]
    if fresh:
        whole = [_with_fresh(stack, base, rank, seed) for stack, seed in zip(whole, seeds, strict=True)]
    modules, k = modules_of(whole, base), len(whole[0])
    slot = slots(modules, granularity)
    theta = torch.zeros(len(whole), max(slot) + 1, k, device=base.device)
    pieces = side_by_side(whole, base)
    act = ACTIVATIONS["softmax"]

    def updates() -> dict[str, LowRank]:
        value = act(theta)
        return {
            m: LowRank(b, a, value[:, slot[i]].gather(1, owner)) for i, (m, (b, a, owner)) in enumerate(pieces.items())
        }

    trained = [theta, *(tensor for b, a, _ in pieces.values() for tensor in (b, a))]
    curves = fit(base, trained, updates, train, validation, schedule, seeds, watch=watch)
    out = []
    for g, stack in enumerate(whole):
        value = act(theta[g]).cpu()[[slot[modules.index(module)] for module in stack.modules]]
        new = {}
        for module, units in stack:
            b, a, _ = pieces[module]
            new[module] = replace(units, B=b[g, :, : len(units)].cpu(), A=a[g, : len(units)].cpu())
        name = names[g] if names else f"pi_tuning-of-{k}"
        adapter = fold(replace(stack, modules=new), value, name)
        own = value[[list(stack.modules).index(module) for module in stacks[g].modules], : len(stacks[g])]
        spent = curves.spent(g, train[g], validation[g] if validation else None, schedule.batch)
        number = len({slot[modules.index(m)] for m in stack.modules}) * k
        number += sum(u.A.numel() + u.B.numel() for _, u in stack)
        out.append(Fitted(adapter, own, curves.of(g), *spent, None, number))
    return out


def _with_fresh(stack: Stack, base: Base, rank: int, seed: int) -> Stack:
    generator = torch.Generator().manual_seed(int(seed))

    def start(d_out: int, d_in: int) -> Factors:
        a: Tensor = 0.01 * torch.randn(rank, d_in, generator=generator)
        return Factors(torch.zeros(d_out, rank), a)

    own = Adapter(FRESH, {module: start(*shape) for module, shape in base.projections.items()}, stack.base)
    return Stack.of([*(stack.adapter(i) for i in range(len(stack))), own])
