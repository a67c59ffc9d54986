"""Controls: the same stack with adapters replaced by ones that were never trained, and coefficients shuffled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.errors import MergeError
from workbench.singular import factored_svd
from workbench.stack import Stack, Units

__all__ = ["CONTROLS", "MATCHES", "orthonormal", "random_like", "shuffled"]

MATCHES = ("sigma", "norm", "spectrum")
SHUFFLED = "shuffled"
BUT_OWN = " but own"
CONTROLS = (*MATCHES, *(match + BUT_OWN for match in MATCHES), SHUFFLED)


def random_like(stack: Stack, match: str = "sigma", *, seed: int, keep: Sequence[str | int] = ()) -> Stack:
    """Replace every adapter, or all but those to keep, by a random one of the same ranks and modules.

    sigma: raw A and B ~ N(0, σ²), σ the standard deviation of the raw factors over the replaced adapters, per module and
    factor, then each adapter's own scaling (recycling study, §5). norm: the same, rescaled so that each ΔW_im has the
    replaced one's Frobenius norm. spectrum: random singular vectors under the replaced one's singular values.

    Raises:
        MergeError: an unknown match.
        SelectionError: an adapter to keep that is not in the stack.
    """
    if match not in MATCHES:
        raise MergeError(f"random control {match!r} is unknown; choose one of {', '.join(MATCHES)}")
    if kept := {stack.index(which) for which in keep}:
        rest = [i for i in range(len(stack)) if i not in kept]
        drawn = random_like(stack.choose(rest), match, seed=seed) if rest else None
        return Stack.of([stack.adapter(i) if i in kept else drawn.adapter(rest.index(i)) for i in range(len(stack))])
    generator = torch.Generator().manual_seed(int(seed))
    modules = {
        module: _random_units(units.to("cpu"), match, generator) for module, units in sorted(stack.modules.items())
    }
    names = tuple(f"random-{i}-{name}" for i, name in enumerate(stack.names))
    infos = tuple({"config": info.get("config", {})} for info in stack.infos)
    return Stack(names, {module: modules[module].to(stack.device) for module in stack.modules}, stack.base, infos)


def shuffled(
    stack: Stack, coefficients: Tensor, units: Mapping[str, Tensor] | None = None, *, seed: int
) -> Tensor | dict[str, Tensor]:
    """A fit's coefficients handed to other adapters: a control that keeps the adapters and the values.

    In each module the coefficients (M, N) are permuted among the adapters that have it (at unit granularity: those of the
    units, module → (R,), among the units), each module by itself.

    Raises:
        MergeError: coefficients of the wrong shape.
    """
    generator = torch.Generator().manual_seed(int(seed))
    if units is not None:
        return {m: own[torch.randperm(len(own), generator=generator)] for m, own in units.items()}
    if tuple(coefficients.shape) != (len(stack.modules), len(stack)):
        raise MergeError(f"expected coefficients ({len(stack.modules)}, {len(stack)}), got {tuple(coefficients.shape)}")
    out = coefficients.clone()
    for i, (_, own) in enumerate(stack):
        there = own.ranks(len(stack)).nonzero()[:, 0].cpu()
        out[i, there] = coefficients[i, there[torch.randperm(len(there), generator=generator)]]
    return out


def _random_units(units: Units, match: str, generator: torch.Generator) -> Units:
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    raw_b = units.B / units.scale
    new = replace(units, A=normal(*units.A.shape) * units.A.std(), B=normal(*units.B.shape) * raw_b.std() * units.scale)
    if match == "sigma":
        return new
    A, B = new.A.clone(), new.B.clone()
    for i in units.owner.unique().tolist():
        own = units.owner == i
        if match == "norm":
            size = (units.B[:, own] @ units.A[own]).norm() / (B[:, own] @ A[own]).norm().clamp_min(1e-30)
            B[:, own] *= size
        else:
            rank = int(own.sum())
            s = factored_svd(units.B[:, own], units.A[own])[1]
            left, right = (orthonormal(d, rank, generator) for d in units.shape)
            B[:, own], A[own] = 0.0, 0.0
            columns = own.nonzero()[:, 0][: len(s)]
            q = len(columns)
            B[:, columns], A[columns] = left[:, :q] * s[:q].sqrt(), (right[:, :q] * s[:q].sqrt()).T
    return replace(new, A=A, B=B)


def orthonormal(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns (height, min(height, width)), uniform over all such: QR of a Gaussian, R's diagonal positive."""
    q, r = torch.linalg.qr(torch.randn(height, width, generator=generator))
    return q * r.diagonal().sign()
