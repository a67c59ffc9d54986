"""Learned coefficients over a frozen stack: the recycling study's adaptive merging (arXiv 2602.12323, §3).

ΔW_m = Σ_i f(θ_{s(m), i}) ΔW_{i, m}      f the activation; s(m) the slot of module m at the chosen granularity
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from workbench.adapt.gradient import Curves, Schedule, fit
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank, shared
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.evaluate import Encoded
from workbench.stack import Stack

__all__ = [
    "ACTIVATIONS",
    "COEFFICIENTS",
    "GRANULARITIES",
    "STARTS",
    "Fitted",
    "fold",
    "learn_coefficients",
    "side_by_side",
    "slots",
]

COEFFICIENTS = Schedule(steps=100, lr=5e-2, batch=8, every=10)
GRANULARITIES = ("expert", "layer", "sublayer", "module")
ACTIVATIONS = {
    "leaky_relu": lambda t: leaky_relu(t, 0.01),
    "linear": lambda t: t,
    "squared": lambda t: t**2,
    "softmax": lambda t: t.softmax(-1),
    "sigmoid": torch.sigmoid,
}
STARTS = {
    "zero": lambda shape, generator: torch.zeros(shape),
    "uniform": lambda shape, generator: torch.rand(shape, generator=generator),
    "normal": lambda shape, generator: 0.5 * torch.randn(shape, generator=generator),
    "equal": lambda shape, generator: torch.full(shape, shape[-1] ** -0.5),
}


@dataclass(frozen=True)
class Fitted:
    """What a fit returns: the adapter, its coefficients (M, N) per module and adapter, and the curves.

    `passes` counts examples fed forward, `tokens` their tokens, in training and selection of the best step together.
    """

    adapter: Adapter
    coefficients: Tensor
    curves: Curves | None
    passes: int
    tokens: int


def slots(modules: Sequence[str], granularity: str) -> list[int]:
    """For each module the place of its coefficients: one for all, per layer, per attention or MLP of a layer, or its own.

    Raises:
        MergeError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise MergeError(f"granularity {granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}")
    if granularity == "expert":
        return [0] * len(modules)
    keys = []
    for module in modules:
        layer = re.match(r"(.*?\.\d+)\.", module)
        outer = layer[1] if layer else module
        keys.append({"layer": outer, "sublayer": module.rsplit(".", 1)[0], "module": module}[granularity])
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def fold(stack: Stack, coefficients: Tensor, name: str, info: dict | None = None) -> Adapter:
    """Σ_i c_{m,i} ΔW_{i,m} as one adapter, exactly: every unit kept, its coefficient in B. Coefficients (N,) or (M, N).

    Raises:
        MergeError: coefficients of the wrong length.
    """
    n, m = len(stack), len(stack.modules)
    if tuple(coefficients.shape) not in ((n,), (m, n)):
        raise MergeError(f"expected coefficients ({n},) or ({m}, {n}), got {tuple(coefficients.shape)}")
    full = coefficients.expand(m, n).to(stack.device)
    modules = {
        module: Factors(u.times(full[i][u.owner]).cpu(), u.A.cpu(), embedding=u.embedding)
        for i, (module, u) in enumerate(stack)
    }
    return Adapter(name, modules, stack.base, info or {})


def learn_coefficients(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = COEFFICIENTS,
    *,
    seeds: Sequence[int],
    granularity: str = "module",
    activation: str = "leaky_relu",
    start: str = "zero",
    names: Sequence[str] | None = None,
) -> list[Fitted]:
    """Learn merging coefficients for G fits side by side, fit g over stacks[g] on train[g].

    Every fit gets exactly what it would get alone. Where all share one stack, it is held once.

    Raises:
        MergeError: an unknown granularity, activation or start; stacks that differ in size; a diverging fit.
        BaseError, AdapterError: a module that the base lacks, or of another shape there.
    """
    for given, known, what in ((activation, ACTIVATIONS, "activation"), (start, STARTS, "start")):
        if given not in known:
            raise MergeError(f"{what} {given!r} is unknown; choose one of {', '.join(known)}")
    if len({len(stack) for stack in stacks}) != 1:
        raise MergeError(
            f"fits side by side need stacks of equally many adapters, got {sorted({len(s) for s in stacks})}"
        )
    modules = _modules(stacks, base)
    slot, k = slots(modules, granularity), len(stacks[0])
    theta = torch.zeros(len(stacks), max(slot) + 1, k)
    for g, (stack, seed) in enumerate(zip(stacks, seeds, strict=False)):
        own = sorted({slot[modules.index(module)] for module in stack.modules})  # drawn as it would be alone
        theta[g, own] = STARTS[start]((len(own), k), torch.Generator().manual_seed(int(seed)))
    theta = theta.to(base.device)
    act = ACTIVATIONS[activation]
    if all(stack is stacks[0] for stack in stacks):
        held = stacks[0].to(base.device)
        own = [modules.index(module) for module in held.modules]

        def updates() -> dict[str, LowRank]:
            return shared(held, act(theta)[:, [slot[i] for i in own]])
    else:
        pieces = side_by_side(stacks, base)

        def updates() -> dict[str, LowRank]:
            value = act(theta)
            return {
                m: LowRank(b, a, value[:, slot[i]].gather(1, owner))
                for i, (m, (b, a, owner)) in enumerate(pieces.items())
            }

    curves = fit(base, [theta], updates, train, validation, schedule, seeds)
    value = act(theta).cpu()[:, slot]
    out = []
    for g, stack in enumerate(stacks):
        mine = value[g][[modules.index(module) for module in stack.modules]]
        checks = len(curves.at) * (len(validation[g]) if validation else 0)
        fed = sum(len(row) for row in validation[g]) * len(curves.at) if validation else 0
        passes = schedule.steps * min(schedule.batch, len(train[g])) + checks
        one = replace(
            curves,
            train=curves.train[:, g],
            validation=curves.validation[:, g],
            best=curves.best[g],
            tokens=curves.tokens[g],
        )
        name = names[g] if names else f"coefficients-of-{k}"
        out.append(Fitted(fold(stack, mine, name), mine, one, passes, int(curves.tokens[g]) + fed))
    return out


def side_by_side(stacks: Sequence[Stack], base: Base) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per module of G stacks B (G, d_out, R), A (G, R, d_in) and owner (G, R), filled up with zeros, on the base's device."""
    out = {}
    for module in _modules(stacks, base):
        units = [stack.modules.get(module) for stack in stacks]
        widest = max(len(u) for u in units if u is not None)
        d_out, d_in = next(u.shape for u in units if u is not None)
        B, A = torch.zeros(len(units), d_out, widest), torch.zeros(len(units), widest, d_in)
        owner = torch.zeros(len(units), widest, dtype=torch.long)
        for g, u in enumerate(units):
            if u is not None:
                B[g, :, : len(u)], A[g, : len(u)], owner[g, : len(u)] = u.B.cpu(), u.A.cpu(), u.owner.cpu()
        out[module] = (B.to(base.device), A.to(base.device), owner.to(base.device))
    return out


def _modules(stacks: Sequence[Stack], base: Base) -> list[str]:
    """The modules of all stacks, in the base's order."""
    found = {module: units.shape for stack in stacks for module, units in stack}
    if absent := [module for module in found if module not in base.layers]:
        raise BaseError(
            f"{len(absent)} of {len(found)} modules are not in this base, such as {absent[0]!r}; are the adapters of another base?"
        )
    for stack in stacks:
        for module, units in stack:
            if units.shape != base.layers[module]:
                (d_out, d_in), (rows, columns) = units.shape, base.layers[module]
                raise AdapterError(
                    f"{stack.names[int(units.owner[0])]}: {module} is {d_out}×{d_in}, the base's is {rows}×{columns}"
                )
    return [module for module in base.layers if module in found]
