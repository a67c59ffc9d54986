"""Fits written out plainly, as oracles: dense weights in float64, torch's own AdamW, one fit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from workbench.adapt.gradient import Schedule, cosine_rate
from workbench.base import Base
from workbench.evaluate import Encoded


def minibatches(examples: Sequence[Encoded], batch: int, steps: int, seed: int) -> Iterator[list[Encoded]]:
    """Shuffled epochs under the seed, one after the other."""
    generator, queue = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(queue) < batch:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in queue[:batch]]
        del queue[:batch]


def answers_loss(logits: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """Cross-entropy per answer token over a minibatch; logits (rows, T, V) of whole rows."""
    total = 0.0
    for own, row in zip(logits, rows, strict=True):
        first = len(row.prompt) - 1
        total = total + cross_entropy(own[first : first + len(row.answer)], torch.tensor(row.answer), reduction="sum")
    return total / sum(len(row.answer) for row in rows)


def plain_fit(
    base: Base,
    parameters: Sequence[Tensor],
    deltas: Callable[[], Mapping[str, Tensor]],
    rows: Sequence[Encoded],
    schedule: Schedule,
    seed: int,
    *,
    loss: Callable[[Tensor, Sequence[Encoded]], Tensor] = answers_loss,
    penalty: Callable[[], Tensor] | None = None,
    project: Callable[[float], None] | None = None,
) -> tuple[list[float], list[float], list[Tensor]]:
    """Train float64 parameters in place under W + ΔW; the losses, the gradients' norms, and the first step's gradients."""
    weights = {name: p.detach().double() for name, p in base.model.named_parameters()}
    optimiser = torch.optim.AdamW(list(parameters), lr=schedule.lr, betas=(0.9, 0.999), weight_decay=0.0)
    losses, norms, first = [], [], []
    for step, part in enumerate(minibatches(rows, min(schedule.batch, len(rows)), schedule.steps, seed)):
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor([*row.prompt, *row.answer])
        moved = {f"{module}.weight": weights[f"{module}.weight"] + delta for module, delta in deltas().items()}
        logits = functional_call(base.model, weights | moved, kwargs={"input_ids": ids, "use_cache": False}).logits
        value = loss(logits, part)
        losses.append(value.item())
        optimiser.zero_grad()
        (value if penalty is None else value + penalty()).backward()
        first = first or [p.grad.clone() for p in parameters]
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters), schedule.clip or 1e9)))
        rate = schedule.lr * cosine_rate(step, schedule)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        if project is not None:
            with torch.no_grad():
                project(rate)
    return losses, norms, first
