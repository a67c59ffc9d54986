"""Many fits in one pass: each its own parameters, examples, seed and best checkpoint, side by side.

Every trained tensor has a leading dimension G, one slice a fit. Losses are summed over fits, gradients are clipped per
fit and AdamW is elementwise, so each fit takes exactly the steps it would take alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.base import Base
from workbench.compose import LowRank, compose
from workbench.errors import MergeError
from workbench.evaluate import Encoded, Packed, row_losses, score
from workbench.options import Count, Range, Share

__all__ = ["Curves", "Loss", "Schedule", "Watch", "check_schedule", "cosine_rate", "fit"]

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Watch = Callable[[int, int, float], bool | None]


@dataclass(frozen=True)
class Schedule:
    """AdamW (0.9, 0.999), no weight decay, cosine with 10 % warm-up, best validation loss restored (recycling study, §5).

    checkpoint: keep each layer's input alone and compute what is inside again in the backward pass: the same gradients in
    less memory, for a third more time.
    """

    steps: Annotated[int, Range(0)] = 100
    lr: float = 5e-2
    batch: Count = 8
    every: Count = 10
    clip: float | None = 1.0
    weight_decay: Annotated[float, Range(0)] = 0.0
    warmup: Share = 0.1
    checkpoint: bool = False


@dataclass(frozen=True)
class Curves:
    """train (steps, G): each step's minibatch loss; validation (evaluations, G), at `at` (evaluations,) steps; tokens fed per fit.

    Of a search (LoraHub) train is the objective of each evaluation, and there is no validation.
    """

    train: Tensor
    validation: Tensor
    at: tuple[int, ...]
    best: Tensor
    tokens: Tensor

    def of(self, g: int) -> Curves:
        """The curves of one fit: train (steps,), validation (evaluations,)."""
        return Curves(self.train[:, g], self.validation[:, g], self.at, self.best[g], self.tokens[g])

    def spent(
        self, g: int, train: Sequence[Encoded], validation: Sequence[Encoded] | None, batch: int
    ) -> tuple[int, int]:
        """Examples fed forward by fit g, in training and in choosing the best step together, and their tokens."""
        rows = validation or ()
        passes = len(self.train) * min(batch, len(train)) + len(self.at) * len(rows)
        return passes, int(self.tokens[g]) + len(self.at) * sum(map(len, rows))


def check_schedule(schedule: Schedule) -> None:
    """Raises:
    MergeError: a number of the schedule out of its range.
    """
    for name, fine, wanted in (
        ("steps", schedule.steps >= 0, "0 or more"),
        ("lr", schedule.lr > 0, "above 0"),
        ("batch", schedule.batch >= 1, "at least 1"),
        ("every", schedule.every >= 1, "at least 1"),
        ("clip", schedule.clip is None or schedule.clip > 0, "above 0, or None"),
        ("weight_decay", schedule.weight_decay >= 0, "0 or more"),
        ("warmup", 0 <= schedule.warmup <= 1, "from 0 to 1"),
    ):
        if not fine:
            raise MergeError(f"{name} is {getattr(schedule, name)}, expected {wanted}")


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
    rates: Sequence[float] | None = None,
    loss: Loss = row_losses,
    penalty: Callable[[], Tensor] | None = None,
    project: Callable[[float], None] | None = None,
    watch: Watch | None = None,
) -> Curves:
    """Train `parameters` (each (G, …), changed in place) and leave them at each fit's best validation loss.

    Args:
        updates: builds the hooks' updates, G groups of rows, from the parameters as they are.
        train: G lists of examples, of any lengths; each fit draws its own minibatches under its own seed.
        validation: G lists of equal length, or None to keep the last step.
        autocast: run the base in bf16 (GPU).
        rates: a factor of the learning rate for each of `parameters`.
        loss: of logits and labels, per row (sums, counts); in training and in validation alike.
        penalty: (G,) added to the fits' training losses, never to validation or the curves.
        project: called without gradients after every step, with the learning rate that it had, to put the parameters right
            (a proximal step).
        watch: called after every step with its number, the number of all and the mean training loss; true stops here, and
            the best so far is kept.

    Raises:
        MergeError: the numbers of fits disagree, a schedule out of range, or a fit that diverges (it is named by its
            place) with no finite validation loss to go back to.
    """
    check_schedule(schedule)
    g = len(train)
    if any(p.shape[0] != g for p in parameters) or len(seeds) != g or (validation is not None and len(validation) != g):
        raise MergeError(
            f"expected {g} fits throughout, got parameters {[p.shape[0] for p in parameters]} and {len(seeds)} seeds"
        )
    for i, examples in enumerate(train):
        if not examples:
            raise MergeError(f"fit {i} of {g} has no training examples")
    packed = Packed([row for examples in train for row in examples], base)
    drawn, real = minibatches([len(examples) for examples in train], schedule, seeds)
    fed = (packed.lengths[drawn] * real).sum(2)
    rows, places, mask = drawn.shape[2], torch.from_numpy(drawn).to(base.device), torch.from_numpy(real).to(base.device)
    mask = mask.float()
    for p in parameters:
        p.requires_grad_(True)
    groups = [
        {"params": [p], "rate": rate} for p, rate in zip(parameters, rates or [1.0] * len(parameters), strict=True)
    ]
    if rates is None:
        groups = [{"params": list(parameters), "rate": 1.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=schedule.weight_decay, foreach=True)
    kept = [p.detach().clone() for p in parameters]
    best = torch.full((g,), float("inf"))
    tokens = torch.zeros(g, dtype=torch.long)
    losses, checks, at = [], [], []

    def check(step: int) -> None:
        with torch.no_grad():
            result = score(base, validation, updates(), loss=loss).loss.mean(1)
        better = result < best  # never where it is NaN
        best[better] = result[better]
        there = better.to(base.device)
        for p, keep in zip(parameters, kept, strict=True):
            keep.copy_(torch.where(there.view(-1, *[1] * (p.ndim - 1)), p.detach(), keep))
        checks.append(result)
        at.append(step)

    if validation is not None:
        check(0)
    for step in range(schedule.steps):
        tokens += torch.from_numpy(fed[step])
        optimiser.zero_grad(set_to_none=True)
        recomputed = checkpointed(base.model) if schedule.checkpoint else nullcontext()
        with compose(base.model, updates()), recomputed:  # the backward pass of a checkpoint needs both as well
            batch = packed.batch(drawn[step].reshape(-1), where=places[step].view(-1))
            with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
                sums, counts = loss(base.logits(batch), batch.labels)
            each = (sums.view(g, rows) * mask).sum(1) / (counts.view(g, rows) * mask).sum(1)
            total = each.sum() if penalty is None else each.sum() + penalty().sum()
            total.backward()
        if schedule.clip is not None:
            clip_each(parameters, schedule.clip)
        now = schedule.lr * cosine_rate(step, schedule)
        for group in optimiser.param_groups:
            group["lr"] = now * group["rate"]
        optimiser.step()
        if project is not None:
            with torch.no_grad():
                project(now)
        losses.append(each.detach())
        stop = watch is not None and watch(step + 1, schedule.steps, float(each.detach().mean()))
        if validation is not None and ((step + 1) % schedule.every == 0 or step + 1 == schedule.steps or stop):
            check(step + 1)
        if stop:
            break
    train_curve = torch.stack(losses).cpu() if losses else torch.zeros(0, g)
    if validation is None:  # the last step must do, so that its numbers have to be finite as well
        finite = [p.detach().isfinite().flatten(1).all(1).cpu() for p in parameters]
        lost = ~torch.stack([torch.isfinite(train_curve).all(0), *finite]).all(0)
    else:
        lost = torch.isinf(best)
    if lost.any():
        raise MergeError(
            f"fit {int(lost.nonzero()[0])} of {g} diverged (its loss is not finite); lower the learning rate"
        )
    with torch.no_grad():
        for p, keep in zip(parameters, kept, strict=True):
            p.requires_grad_(False)
            if validation is not None:
                p.copy_(keep)
    return Curves(train_curve, torch.stack(checks) if checks else torch.zeros(0, g), tuple(at), best, tokens)


def minibatches(sizes: Sequence[int], schedule: Schedule, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of every step's minibatches, (steps, G, rows), of G lists that lie one behind the other; and (G, rows) which
    count. A fit draws shuffled epochs under its seed, one after the other; one that has fewer rows than others repeats one.
    """
    own = [min(schedule.batch, size) for size in sizes]
    drawn = np.empty((schedule.steps, len(sizes), max(own)), np.int64)
    for i, (size, seed, first) in enumerate(zip(sizes, seeds, np.cumsum([0, *sizes[:-1]]), strict=True)):
        generator, epochs = torch.Generator().manual_seed(int(seed)), -(-schedule.steps * own[i] // size)
        order = [torch.randperm(size, generator=generator).numpy() for _ in range(epochs)]
        if order:
            mine = np.concatenate(order)[: schedule.steps * own[i]].reshape(schedule.steps, own[i])
            drawn[:, i], drawn[:, i, : own[i]] = first + mine[:, :1], first + mine
    return drawn, np.arange(max(own)) < np.array(own)[:, None]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """While open, the model's layers keep their inputs alone and are computed again in the backward pass (non-reentrant).

    transformers' own switch acts in training mode only, which would turn dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in layers:
        layer.forward = partial(again, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def clip_each(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Clip the gradient's norm of each fit by itself; (G,) norms before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))
    return norms
