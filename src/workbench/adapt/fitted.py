"""What a fit returns, and stacks brought side by side for many fits in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from workbench.adapt.gradient import Curves
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.lowrank import filled_up
from workbench.stack import Stack

if TYPE_CHECKING:
    from workbench.adapt.arrow import Router

__all__ = ["Fitted", "fold", "modules_of", "side_by_side", "unit_means"]


@dataclass(frozen=True)
class Fitted:
    """What a fit returns: the update, its coefficients (M, N) per module and adapter, and the curves.

    `adapter` is an ordinary adapter, or the routed model of a method that routes tokens. At unit granularity `units` has
    the coefficients themselves, module → (R,), and `coefficients` each adapter's mean. `passes` counts examples fed
    forward, `tokens` their tokens, in training and in the choice of the best step together; `parameters` is the number of
    trained ones.
    """

    adapter: Adapter | Router
    coefficients: Tensor
    curves: Curves | None
    passes: int
    tokens: int
    units: Mapping[str, Tensor] | None = None
    parameters: int = 0


def fold(stack: Stack, coefficients: Tensor | Mapping[str, Tensor], name: str, info: dict | None = None) -> Adapter:
    """Σ_i c_{m,i} ΔW_{i,m} as one adapter, exactly: every unit kept, its coefficient in B.

    Coefficients are (N,), (M, N), or per unit: module → (R,).

    Raises:
        MergeError: coefficients of the wrong length.
    """
    n, m = len(stack), len(stack.modules)
    if isinstance(coefficients, Mapping):
        got = {module: tuple(one.shape) for module, one in coefficients.items()}
        if got != {module: (len(units),) for module, units in stack}:
            raise MergeError(f"expected one coefficient a unit of {m} modules, got shapes {list(got.values())[:4]}")
        each = {module: one.to(stack.device) for module, one in coefficients.items()}
    elif tuple(coefficients.shape) not in ((n,), (m, n)):
        raise MergeError(f"expected coefficients ({n},) or ({m}, {n}), got {tuple(coefficients.shape)}")
    else:
        full = coefficients.expand(m, n).to(stack.device)
        each = {module: full[i][units.owner] for i, (module, units) in enumerate(stack)}
    modules = {
        module: Factors(units.times(each[module]).cpu(), units.A.cpu(), embedding=units.embedding)
        for module, units in stack
    }
    return Adapter(name, modules, stack.base, info or {})


def unit_means(stack: Stack, units: Mapping[str, Tensor]) -> Tensor:
    """(M, N) mean over each adapter's units of coefficients per unit; 0 where it does not have the module."""
    out = torch.zeros(len(stack.modules), len(stack))
    for i, (module, own) in enumerate(stack):
        out[i].index_add_(0, own.owner.cpu(), units[module].cpu().float())
        out[i] /= own.ranks(len(stack)).cpu().clamp_min(1)
    return out


def side_by_side(
    stacks: Sequence[Stack], base: Base, *, frozen: bool = False
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per module of G stacks B (G, d_out, R), A (G, R, d_in) and owner (G, R), filled up with zeros, on the base's device.

    frozen: factors that take no gradient, held in the type that the layer computes in, to which they would be cast at every
    step otherwise; those of a single stack may be the stack's own.
    """
    out, nobody = {}, torch.zeros(0, dtype=torch.long)
    for module in modules_of(stacks, base, alike=False):
        units = [stack.modules.get(module) for stack in stacks]
        dtype = _computes_in(base, module) if frozen else torch.float32
        if frozen and len(units) == 1:
            (u,) = units
            out[module] = (
                u.B[None].to(base.device, dtype),
                u.A[None].to(base.device, dtype),
                u.owner[None].to(base.device),
            )
            continue
        B, A = filled_up([None if u is None else (u.B, u.A) for u in units], dtype)
        owner = pad_sequence([nobody if u is None else u.owner for u in units], batch_first=True)
        out[module] = (B.to(base.device), A.to(base.device), owner.to(base.device))
    return out


def _computes_in(base: Base, module: str) -> torch.dtype:
    """The type of a layer's weight, or of the base's where it is quantised."""
    weight = getattr(base.model.get_submodule(module), "weight", None)
    plain = weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1
    return weight.dtype if plain else base.dtype


def modules_of(stacks: Sequence[Stack], base: Base, *, alike: bool = True) -> list[str]:
    """The modules of all stacks, in the base's order; `alike` demands equally many adapters of each.

    Raises:
        MergeError: stacks of unequal numbers of adapters.
        BaseError, AdapterError: a module that the base lacks, or of another shape there.
    """
    if alike and len({len(stack) for stack in stacks}) != 1:
        raise MergeError(
            f"fits side by side need stacks of equally many adapters, got {sorted({len(s) for s in stacks})}"
        )
    found = {module: units.shape for stack in stacks for module, units in stack.outline.items()}
    if absent := [module for module in found if module not in base.layers]:
        raise BaseError(
            f"{len(absent)} of {len(found)} modules are not in this base, such as {absent[0]!r}; are the adapters of another base?"
        )
    for stack in stacks:
        for module, units in stack.outline.items():
            if units.shape != base.layers[module]:
                (d_out, d_in), (rows, columns) = units.shape, base.layers[module]
                raise AdapterError(
                    f"{stack.names[int(units.owner[0])]}: {module} is {d_out}×{d_in}, the base's is {rows}×{columns}"
                )
    return [module for module in base.layers if module in found]
