"""Many fits in one pass: each its own parameters, examples, seed and best checkpoint, side by side.

Every trained tensor has a leading dimension G, one slice a fit. Losses are summed over fits, gradients are clipped per
fit and AdamW is elementwise, so each fit takes exactly the steps it would take alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.base import Base
from workbench.compose import LowRank, compose
from workbench.errors import MergeError
from workbench.evaluate import Encoded, Packed, row_losses, score

__all__ = ["Curves", "Schedule", "cosine_rate", "fit"]


@dataclass(frozen=True)
class Schedule:
    """AdamW (0.9, 0.999), no weight decay, cosine with 10 % warm-up, best validation loss restored (recycling study, §5)."""

    steps: int = 100
    lr: float = 5e-2
    batch: int = 8
    every: int = 10
    clip: float | None = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.1


@dataclass(frozen=True)
class Curves:
    """train (steps, G): each step's minibatch loss; validation (evaluations, G), at `at` (evaluations,) steps; tokens fed per fit."""

    train: Tensor
    validation: Tensor
    at: tuple[int, ...]
    best: Tensor
    tokens: Tensor


def cosine_rate(step: int, schedule: Schedule) -> float:
    """The learning rate's factor at a step: linear warm-up, then half a cosine down to zero."""
    import math

    warm = max(1, round(schedule.warmup * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, schedule.steps - warm)))


def fit(
    base: Base,
    parameters: Sequence[Tensor],
    updates: Callable[[], Mapping[str, LowRank]],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    schedule: Schedule,
    seeds: Sequence[int],
    *,
    autocast: bool = False,
) -> Curves:
    """Train `parameters` (each (G, …), changed in place) and leave them at each fit's best validation loss.

    Args:
        updates: builds the hooks' updates, G groups of rows, from the parameters as they are.
        train: G lists of examples, of any lengths; each fit draws its own minibatches under its own seed.
        validation: G lists of equal length, or None to keep the last step.
        autocast: run the base in bf16 (GPU).

    Raises:
        MergeError: the numbers of fits disagree, or a loss is not finite (the fit is named by its place).
    """
    g = len(train)
    if any(p.shape[0] != g for p in parameters) or len(seeds) != g or (validation is not None and len(validation) != g):
        raise MergeError(
            f"expected {g} fits throughout, got parameters {[p.shape[0] for p in parameters]} and {len(seeds)} seeds"
        )
    for i, examples in enumerate(train):
        if not examples:
            raise MergeError(f"fit {i} of {g} has no training examples")
    order = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    queues: list[list[int]] = [[] for _ in range(g)]
    rows = max(min(schedule.batch, len(examples)) for examples in train)
    packed = Packed([row for examples in train for row in examples], base.device)
    first = np.cumsum([0, *[len(examples) for examples in train[:-1]]])
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, foreach=True)
    kept = [p.detach().clone() for p in parameters]
    best = torch.full((g,), float("inf"))
    tokens = torch.zeros(g, dtype=torch.long)
    losses, checks, at = [], [], []

    def check(step: int) -> None:
        with torch.no_grad():
            result = score(base, validation, updates()).loss.mean(1)
        better = result < best
        best[better] = result[better]
        for p, keep in zip(parameters, kept, strict=True):
            keep[better.to(p.device)] = p.detach()[better.to(p.device)]
        checks.append(result)
        at.append(step)

    if validation is not None:
        check(0)
    for step in range(schedule.steps):
        index, mask = np.empty((g, rows), np.int64), torch.zeros(g, rows)
        for i, examples in enumerate(train):
            own = min(schedule.batch, len(examples))
            while len(queues[i]) < own:
                queues[i] += torch.randperm(len(examples), generator=order[i]).tolist()
            index[i], mask[i, :own] = first[i] + queues[i][0], 1.0
            index[i, :own] = first[i] + np.array(queues[i][:own])
            del queues[i][:own]
        tokens += torch.from_numpy((packed.lengths[index] * mask.numpy()).sum(1)).long()
        ids, labels, keep = packed.batch(index.reshape(-1))
        mask = mask.to(base.device)
        with compose(base.model, updates()), torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
            sums, counts = row_losses(base.logits(ids, keep), labels)
        each = (sums.view(g, rows) * mask).sum(1) / (counts.view(g, rows) * mask).sum(1)
        optimiser.zero_grad(set_to_none=True)
        each.sum().backward()
        if schedule.clip is not None:
            clip_each(parameters, schedule.clip)
        for group in optimiser.param_groups:
            group["lr"] = schedule.lr * cosine_rate(step, schedule)
        optimiser.step()
        losses.append(each.detach())
        if validation is not None and ((step + 1) % schedule.every == 0 or step + 1 == schedule.steps):
            check(step + 1)
    train_curve = torch.stack(losses).cpu() if losses else torch.zeros(0, g)
    if not torch.isfinite(train_curve).all():
        raise MergeError(
            f"fit {int((~torch.isfinite(train_curve)).any(0).nonzero()[0])} of {g} diverged (its loss is not finite); lower the learning rate"
        )
    with torch.no_grad():
        for p, keep in zip(parameters, kept, strict=True):
            p.requires_grad_(False)
            if validation is not None:
                p.copy_(keep)
    return Curves(train_curve, torch.stack(checks) if checks else torch.zeros(0, g), tuple(at), best, tokens)


@torch.no_grad()
def clip_each(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Clip the gradient's norm of each fit by itself; (G,) norms before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))
    return norms
