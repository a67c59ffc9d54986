"""Learned coefficients over a frozen stack: the recycling study's adaptive merging (arXiv 2602.12323, §3).

ΔW_m = Σ_i f(θ_{s(m), i}) ΔW_{i, m}      f the activation; s(m) the slot of module m at the chosen granularity

At unit granularity every rank-one unit has its own: ΔW_m = Σ_j f(θ_{m, j}) b_j a_j. `adamerging` is the same with its
paper's settings (arXiv 2310.02575).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from workbench.adapt.fitted import Fitted, fold, modules_of, side_by_side, unit_means
from workbench.adapt.gradient import Schedule, Watch, fit
from workbench.base import Base
from workbench.compose import LowRank
from workbench.errors import MergeError
from workbench.evaluate import Encoded, row_losses
from workbench.options import Range
from workbench.stack import Stack

__all__ = [
    "ACTIVATIONS",
    "COEFFICIENTS",
    "GRANULARITIES",
    "STARTS",
    "adamerging",
    "entropy",
    "learn_coefficients",
    "slots",
]

COEFFICIENTS = Schedule(steps=100, lr=5e-2, batch=8, every=10)
GRANULARITIES = ("expert", "layer", "sublayer", "module", "unit")
ACTIVATIONS = {
    "leaky_relu": lambda t: leaky_relu(t, 0.01),
    "linear": lambda t: t,
    "squared": lambda t: t**2,
    "softmax": lambda t: t.softmax(-1),
    "sigmoid": torch.sigmoid,
}
STARTS = ("zero", "uniform", "normal", "equal", "target")

Granularity = Literal["expert", "layer", "sublayer", "module", "unit"]
Activation = Literal["leaky_relu", "linear", "squared", "softmax", "sigmoid"]
Start = Literal["zero", "uniform", "normal", "equal", "target"] | float
Weight = Annotated[float, Range(0)]


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
        keys.append({"layer": outer, "sublayer": module.rsplit(".", 1)[0]}.get(granularity, module))
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: the entropy (nats) of the prediction where the answer begins, and 1; no label is looked at.

    AdaMerging (arXiv 2310.02575, §3.2.2) minimises the entropy of a classifier's predictions; the first answer token is the
    one prediction of a language model that depends on the prompt alone.
    """
    first = (labels != -100).int().argmax(1)
    log_p = logits[torch.arange(len(logits), device=logits.device), first].float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1), torch.ones_like(first)


class _Theta:
    """The trained numbers of G fits: one tensor (G, slots, K), or at unit granularity one a module, (G, R)."""

    def __init__(self, stacks: Sequence[Stack], base: Base, granularity: str, activation: str):
        self.modules, self.k = modules_of(stacks, base), len(stacks[0])
        self.slot = slots(self.modules, granularity)
        self.unit, self.act = granularity == "unit", ACTIVATIONS[activation]
        self.pieces = side_by_side(stacks[:1] if all(s is stacks[0] for s in stacks) else stacks, base, frozen=True)
        self.softmax = activation == "softmax"
        g = len(stacks)
        ranks = [[len(stack.outline.get(module, ())) for stack in stacks] for module in self.modules]
        self.ranks = torch.tensor(ranks, device=base.device)  # (M, G)
        shapes = [(g, max(row)) for row in ranks] if self.unit else [(g, max(self.slot) + 1, self.k)]
        self.tensors = [torch.zeros(shape) for shape in shapes]

    def begin(
        self, stacks: Sequence[Stack], seeds: Sequence[int], start: str | float, target: str | int | None
    ) -> None:
        """Set each fit's start, drawn as it would be alone; a single number stands for all."""
        for g, (stack, seed) in enumerate(zip(stacks, seeds, strict=True)):
            generator = torch.Generator().manual_seed(int(seed))
            own = stack.index(target) if start == "target" else None
            mine = [i for i, module in enumerate(self.modules) if module in stack.modules]
            if self.unit:
                for i in mine:
                    units = stack.modules[self.modules[i]]
                    self.tensors[i][g, : len(units)] = _started(
                        start, (len(units),), self.k, generator, units.owner == own
                    )
            else:
                at, columns = list(dict.fromkeys(self.slot[i] for i in mine)), torch.arange(self.k) == own
                self.tensors[0][g, at] = _started(start, (len(at), self.k), self.k, generator, columns)

    def to(self, device: torch.device) -> None:
        self.tensors = [tensor.to(device) for tensor in self.tensors]

    def values(self, i: int, owner: Tensor, slots: Sequence[Tensor] | None = None) -> Tensor:
        """(G, R) coefficients of module i's units; `slots` are the tensor's, where several modules are asked for."""
        if not self.unit:
            return self.act(slots[self.slot[i]] if slots else self.tensors[0][:, self.slot[i]]).gather(1, owner)
        theta = self.tensors[i]
        if not self.softmax:
            return self.act(theta)
        ranks, own = self.ranks[i][:, None], self.filled(i)
        value = torch.where(ranks > 0, theta.masked_fill(~own, -torch.inf), 0.0).softmax(-1)
        return value * ranks / self.k  # equal weights are the average, as at the other granularities

    def filled(self, i: int) -> Tensor:
        """(G, R) which units of module i are a fit's own, and not there to fill up."""
        return torch.arange(self.tensors[i].shape[1], device=self.ranks.device) < self.ranks[i][:, None]

    def updates(self) -> dict[str, LowRank]:
        """The stack's units under the coefficients as they are."""
        once = len(set(self.slot)) == len(self.slot) and not self.unit
        out, slots = {}, self.tensors[0].unbind(1) if once else None  # one gradient for all slots, not one each
        for i, (module, (b, a, owner)) in enumerate(self.pieces.items()):
            c = self.values(i, owner.expand(len(self.tensors[0]), -1), slots)
            out[module] = LowRank(b[0], a[0], c) if len(b) == 1 else LowRank(b, a, c)
        return out

    def penalty(self, l1: float, l2: float) -> Tensor:
        """(G,) of l1 Σ|c| + l2 Σ c², summed over adapters (of units: times K over their number), averaged over slots."""

        def cost(value: Tensor) -> Tensor:
            return l1 * value.abs() + l2 * value**2

        if self.unit:
            owners = [owner for _, _, owner in self.pieces.values()]
            sums = [(cost(self.values(i, owner)) * self.filled(i)).sum(1) for i, owner in enumerate(owners)]
            live = self.ranks > 0
            return (torch.stack(sums) * self.k / self.ranks.clamp_min(1)).sum(0) / live.sum(0)
        live = torch.zeros(self.tensors[0].shape[:2], dtype=torch.bool, device=self.ranks.device)
        for i, at in enumerate(self.slot):
            live[:, at] |= self.ranks[i] > 0
        return (cost(self.act(self.tensors[0])).sum(2) * live).sum(1) / live.sum(1)

    def shrink(self, by: float) -> None:
        """Group soft threshold: the coefficients of one adapter in one slot are drawn towards zero together."""
        for i, theta in enumerate(self.tensors):
            if not self.unit:
                theta.mul_((1 - by / theta.abs().clamp_min(1e-30)).clamp_min(0))
                continue
            owner = self.pieces[self.modules[i]][2].expand(len(theta), -1)
            square = theta.new_zeros(len(theta), self.k).scatter_add_(1, owner, theta**2)
            size = theta.new_zeros(len(theta), self.k).scatter_add_(1, owner, self.filled(i).to(theta))
            keep = (1 - by * size.sqrt() / square.sqrt().clamp_min(1e-30)).clamp_min(0)
            theta.mul_(keep.gather(1, owner))


def _started(start: str | float, shape: tuple[int, ...], k: int, generator: torch.Generator, target: Tensor) -> Tensor:
    if start == "uniform":
        return torch.rand(shape, generator=generator)
    if start == "normal":
        return 0.5 * torch.randn(shape, generator=generator)
    if start == "target":
        return target.float().expand(shape).clone()
    return torch.full(shape, {"zero": 0.0, "equal": k**-0.5}[start] if isinstance(start, str) else float(start))


def learn_coefficients(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = COEFFICIENTS,
    *,
    seeds: Sequence[int],
    granularity: Granularity = "module",
    activation: Activation = "leaky_relu",
    start: Start = "zero",
    target: str | int | None = None,
    objective: Literal["loss", "entropy"] = "loss",
    l1: Weight = 0.0,
    l2: Weight = 0.0,
    sparsity: Weight = 0.0,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """Learn merging coefficients for G fits side by side, fit g over stacks[g] on train[g].

    Every fit gets exactly what it would get alone. Where all share one stack, it is held once. Coefficients are fp32,
    whatever the base's type.

    Args:
        granularity: what shares a coefficient per adapter: everything, a layer, its attention or its MLP, a module; or
            every unit has its own.
        activation: f of the trained numbers θ. softmax is over the adapters (of units: over the module's units, times their
            number over K, so that equal weights are the average at every granularity).
        start: of θ: zero, uniform in [0, 1), normal (σ 0.5), equal (1/√K), target (1 for the target's own adapter, 0 for
            the others), or a number for all.
        target: the target's own adapter in each stack, by name or place; `start="target"` needs it.
        objective: "loss" (labels), or "entropy" (`entropy`: prompts alone, in training and in validation).
        l1, l2: penalties l1 Σ|f(θ)| + l2 Σ f(θ)², summed over adapters and averaged over slots.
        sparsity: group soft threshold of θ after every step, times the learning rate; a group is what one adapter has in
            one slot (its units, at unit granularity). Exact zeros where f(0) = 0.
        names: of the adapters returned.
        watch: see `gradient.fit`.

    Raises:
        MergeError: an unknown granularity, activation, start or objective; stacks that differ in size; a diverging fit.
        SelectionError: start "target" without the target in the stack.
        BaseError, AdapterError: a module that the base lacks, or of another shape there.
    """
    _check(activation, ACTIVATIONS, "activation")
    _check(objective, ("loss", "entropy"), "objective")
    if isinstance(start, str):
        _check(start, STARTS, "start")
    if start == "target" and target is None:
        raise MergeError("start 'target' needs to know which adapter is the target's own: target=name or place")
    if len(stacks) != len(seeds):
        raise MergeError(f"expected {len(stacks)} fits throughout, got {len(stacks)} stacks and {len(seeds)} seeds")
    theta = _Theta(stacks, base, granularity, activation)
    theta.begin(stacks, seeds, start, target)
    theta.to(base.device)
    curves = fit(
        base,
        theta.tensors,
        theta.updates,
        train,
        validation,
        schedule,
        seeds,
        loss=entropy if objective == "entropy" else row_losses,
        penalty=(lambda: theta.penalty(l1, l2)) if l1 or l2 else None,
        project=(lambda rate: theta.shrink(rate * sparsity)) if sparsity else None,
        watch=watch,
    )
    pieces = list(theta.pieces.values())
    found = [theta.values(i, owner.expand(len(stacks), -1)).cpu() for i, (_, _, owner) in enumerate(pieces)]
    out = []
    for g, stack in enumerate(stacks):
        name = names[g] if names else f"coefficients-of-{theta.k}"
        if theta.unit:
            units = {module: found[theta.modules.index(module)][g, : len(own)] for module, own in stack}
            mine, adapter = unit_means(stack, units), fold(stack, units, name)
        else:
            full = theta.act(theta.tensors[0][g]).cpu()[[theta.slot[theta.modules.index(m)] for m in stack.modules]]
            units, mine, adapter = None, full, fold(stack, full, name)
        spent = curves.spent(g, train[g], validation[g] if validation else None, schedule.batch)
        own = {theta.slot[theta.modules.index(m)] for m in stack.modules}
        number = sum(map(len, units.values())) if units else len(own) * theta.k
        out.append(Fitted(adapter, mine, curves.of(g), *spent, units, number))
    return out


def adamerging(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule = COEFFICIENTS,
    *,
    seeds: Sequence[int],
    objective: Literal["supervised", "entropy"] = "supervised",
    granularity: Granularity = "module",
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """AdaMerging (Yang et al. 2024, arXiv 2310.02575): linear coefficients per module.

    supervised: as the recycling study has it (its appendix): every coefficient starts at 1/√K, cross-entropy. entropy: the
    paper's own (§3.2.2, §4.1): starts at 0.3, minimises the entropy of predictions on inputs without labels; the best
    validation entropy is kept, so no label is used anywhere.

    Raises:
        MergeError: an unknown objective, and whatever `learn_coefficients` raises.
    """
    _check(objective, ("supervised", "entropy"), "objective")
    alone = objective == "entropy"
    return learn_coefficients(
        base,
        stacks,
        train,
        validation,
        schedule,
        seeds=seeds,
        granularity=granularity,
        activation="linear",
        start=0.3 if alone else "equal",
        objective="entropy" if alone else "loss",
        names=names or [f"adamerging-of-{len(stack)}" for stack in stacks],
        watch=watch,
    )


def _check(given, known, what: str) -> None:
    if given not in known:
        raise MergeError(f"{what} {given!r} is unknown; choose one of {', '.join(known)}")
