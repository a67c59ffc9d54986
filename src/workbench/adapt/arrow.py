"""Arrow: every token routed to the adapters whose main direction it points along (Ostapenko et al. 2024, arXiv 2405.11157).

prototype of adapter i in module m = top right singular vector v of ΔW_{i, m}, the input that it changes most
y += Σ_i w_i ΔW_{i, m} x,    w = softmax over the `top` largest |x · v_i| / temperature

A model that routes is no adapter: no one update equals it. `Router` composes and scores like one, and cannot be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, NoReturn

import numpy as np
import torch
from torch import Tensor

from workbench.adapt.fitted import Fitted, modules_of
from workbench.adapt.gradient import Schedule, Watch, fit
from workbench.base import Base
from workbench.compose import Routed, check_routing, compose
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import Encoded, Packed
from workbench.options import Count, Range
from workbench.singular import factored_svd
from workbench.stack import Stack

__all__ = ["ARROW", "Router", "arrow", "mean_weights", "prototypes", "routed"]

ARROW = Schedule(steps=100, lr=1e-2, batch=8, every=10)


@dataclass(frozen=True)
class Router:
    """A stack whose adapters every token weighs by its own hidden states; prototypes are module → (N, d_in).

    An adapter that a module lacks, or that changes nothing there, has a prototype of zeros, and is never routed to there.
    """

    name: str
    stack: Stack
    prototypes: dict[str, Tensor]
    top: int = 4
    temperature: float = 1.0
    info: dict = field(default_factory=dict)

    def __post_init__(self):
        check_routing(self.top, self.temperature)
        want = {module: (len(self.stack), units.shape[1]) for module, units in self.stack}
        got = {module: tuple(p.shape) for module, p in self.prototypes.items()}
        if bad := [module for module in want | got if want.get(module) != got.get(module)]:
            raise MergeError(f"{self.name}: expected prototypes {want.get(bad[0])} in {bad[0]}, got {got.get(bad[0])}")

    @property
    def base(self) -> str:
        """The base model's name."""
        return self.stack.base

    def updates(self, device: str | torch.device = "cpu") -> dict[str, Routed]:
        """For `compose` and `score`: all rows are routed alike."""
        settings = {"top": self.top, "temperature": self.temperature}
        return {
            module: Routed(
                units.B, units.A, owner=units.owner, prototypes=self.prototypes[module].to(device), **settings
            )
            for module, units in self.stack.to(device)
        }

    def save(self, *_, **__) -> NoReturn:
        """Raises:
        AdapterError: always.
        """
        raise AdapterError(
            f"{self.name} routes each token among {len(self.stack)} adapters by itself, so no single low-rank update equals it "
            "and there is no adapter to save; save the adapters, or fit one set of coefficients for all tokens "
            '(method "coefficients") to get one'
        )

    push = save


def prototypes(stack: Stack) -> dict[str, Tensor]:
    """Module → (N, d_in): each adapter's top right singular vector there, of length 1; zeros where it changes nothing.

    Its sign is arbitrary and does not matter to Arrow; of equal largest singular values any one's vector is taken.
    """
    out = {}
    for module, units in stack:
        out[module] = p = units.A.new_zeros(len(stack), units.shape[1])
        for i in range(len(stack)):
            own = units.of(i)
            if not len(own):
                continue
            _, s, vh = factored_svd(own.B, own.A)
            rounding = 4 * torch.finfo(s.dtype).eps * own.B.norm() * own.A.norm()
            if s[0] > rounding:  # what is less has no direction
                p[i] = vh[0]
    return out


def routed(routers: Sequence[Router], device: str | torch.device = "cpu") -> dict[str, Routed]:
    """Each router for its own group of rows: units and adapters filled up with zeros, which are never routed to.

    Raises:
        MergeError: routers that differ in top or temperature.
        AdapterError: two that disagree about a module's shape.
    """
    if len(settings := sorted({(r.top, r.temperature) for r in routers})) > 1:
        raise MergeError(f"routers side by side need one top and one temperature, got {settings}")
    n, found = max(len(r.stack) for r in routers), {}
    for router in routers:
        for module, units in router.stack:
            shape, first = found.setdefault(module, (units.shape, router.name))
            if units.shape != shape:
                raise AdapterError(
                    f"{router.name}: {module} is {units.shape[0]}×{units.shape[1]}, but {shape[0]}×{shape[1]} in {first}; "
                    "they are of different bases"
                )
    out = {}
    for module, ((d_out, d_in), _) in found.items():
        widest, g = max(len(r.stack.modules.get(module, ())) for r in routers), len(routers)
        B, A = torch.zeros(g, d_out, widest), torch.zeros(g, widest, d_in)
        owner, p = torch.zeros(g, widest, dtype=torch.long), torch.zeros(g, n, d_in)
        for k, router in enumerate(routers):
            if (u := router.stack.modules.get(module)) is not None:
                B[k, :, : len(u)], A[k, : len(u)], owner[k, : len(u)] = u.B.cpu(), u.A.cpu(), u.owner.cpu()
                p[k, : len(router.stack)] = router.prototypes[module].cpu()
        B, A, owner, p = (tensor.to(device) for tensor in (B, A, owner, p))
        out[module] = Routed(B, A, owner=owner, prototypes=p, top=routers[0].top, temperature=routers[0].temperature)
    return out


def arrow(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = ARROW,
    *,
    seeds: Sequence[int],
    top: Count = 4,
    temperature: Annotated[float, Range(0)] = 1.0,
    trained: bool = False,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """Arrow routing over G stacks, as it is or with its prototypes trained side by side (recycling study, arXiv 2602.12323).

    Every fit gets exactly what it would get alone. Prototypes are fp32, whatever the base's type, start at the singular
    vectors, and are not brought back to length 1.

    Args:
        top: adapters kept for each token; more than a module has takes all of them.
        temperature: of the softmax over those.
        trained: train the prototypes; otherwise nothing is fitted and the schedule has no part.
        names: of the routers returned.
        watch: see `gradient.fit`.

    Returns:
        Routers, which are no adapters. Coefficients (M, N) are each adapter's mean routing weight over all tokens of the
        fit's training examples (`mean_weights`), in a forward pass that `passes` and `tokens` leave out.

    Raises:
        MergeError: top below 1, a temperature not above 0, stacks of unequal numbers of adapters, a diverging fit.
        BaseError, AdapterError: a module that the base lacks, or of another shape there.
    """
    check_routing(top, temperature)
    names = names or [f"arrow-of-{len(stack)}" for stack in stacks]
    if not len(stacks) == len(train) == len(seeds) == len(names):
        raise MergeError(
            f"expected one of each per fit, got {len(stacks)} stacks, {len(train)} lists of examples, {len(seeds)} seeds and "
            f"{len(names)} names"
        )
    modules_of(stacks, base)
    starts = {id(stack): prototypes(stack) for stack in {id(stack): stack for stack in stacks}.values()}
    routers = [Router(name, s, starts[id(s)], top, temperature) for name, s in zip(names, stacks, strict=True)]
    if not trained:
        return [Fitted(r, mean_weights(base, r, rows), None, 0, 0) for r, rows in zip(routers, train, strict=True)]
    updates = routed(routers, base.device)
    parameters = [update.prototypes for update in updates.values()]
    curves = fit(base, parameters, lambda: updates, train, validation, schedule, seeds, watch=watch)
    out = []
    for g, (name, stack) in enumerate(zip(names, stacks, strict=True)):
        router = Router(
            name, stack, {m: updates[m].prototypes[g].cpu().clone() for m in stack.modules}, top, temperature
        )
        spent = curves.spent(g, train[g], validation[g] if validation else None, schedule.batch)
        number = sum(int(p.ne(0).any(1).sum()) * p.shape[1] for p in starts[id(stack)].values())
        out.append(Fitted(router, mean_weights(base, router, train[g]), curves.of(g), *spent, None, number))
    return out


@torch.no_grad()
def mean_weights(base: Base, router: Router, rows: Sequence[Encoded], *, max_tokens: int | None = None) -> Tensor:
    """(M, N) mean weight of each adapter over all tokens, prompt and answer, that a module sees of these examples.

    Examples of one length are fed together, so that no padding is counted, whatever the architecture. Zeros where nothing
    is routed.
    """
    updates = router.updates(base.device)
    totals = [torch.zeros(len(router.stack), dtype=torch.float64, device=base.device) for _ in updates]
    counted = {
        module: _Counted(**{f.name: getattr(update, f.name) for f in fields(Routed)}, total=total)
        for (module, update), total in zip(updates.items(), totals, strict=True)
    }
    if rows:
        packed = Packed(rows, base)
        lengths, which = np.unique(np.stack(packed.parts, 1), axis=0, return_inverse=True)
        budget = max_tokens or (524_288 if base.device.type == "cuda" else 16_384)
        head = any(base.model.get_submodule(module) is base.model.get_output_embeddings() for module in updates)
        with compose(base.model, counted):
            for k, one in enumerate(lengths):
                index = (which.ravel() == k).nonzero()[0]
                for part in np.array_split(index, math.ceil(len(index) * one.sum() / budget)):
                    batch = packed.batch(part)
                    if batch.decoder is None:  # a causal model's head sees no more than is kept
                        batch = replace(batch, keep=batch.ids.shape[1] if head else 1)
                    base.next_token_logits(batch)
    table = torch.stack(totals).cpu()
    return (table / table.sum(1, keepdim=True).clamp_min(1e-300)).float()


@dataclass(frozen=True, kw_only=True)
class _Counted(Routed):
    """Adds the weights of all tokens that it routes to `total` (N,)."""

    total: Tensor

    def weights(self, x: Tensor) -> Tensor:
        weights = super().weights(x)
        self.total.add_(weights.sum(-2))
        return weights
