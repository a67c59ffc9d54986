"""Loss and matches on examples, for one model or for many candidates in one pass, with the tokens spent.

Exact match needs no generation: under greedy decoding the target's token ids come out exactly when each of them, and a
stop token behind them where the target is shorter than the limit, is the arg-max under teacher forcing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.adapters import Adapter
from workbench.base import Base, Prefix
from workbench.compose import LowRank, compose, grouped, slice_groups
from workbench.encoding import Encoded, Packed, encode, encode_all, encode_task, word
from workbench.errors import MergeError, TaskError
from workbench.tasks import Task

__all__ = [
    "Encoded",
    "Packed",
    "Scores",
    "encode",
    "encode_all",
    "encode_task",
    "evaluate",
    "evaluate_many",
    "row_losses",
    "score",
    "word",
]

_PREFIX = 64  # tokens that prompts must have in common for these to be read once
_SMALL = 4096  # tokens of a vocabulary whose logits cost so little that they are taken beside answers too


@dataclass(frozen=True)
class Scores:
    """loss (G, N): mean cross-entropy over answer tokens, nats; match (G, N): exact match, or what the task's metric says
    (true or false, or fp32 shares between 0 and 1 where one gives partial credit); tokens: all that were fed.
    """

    loss: Tensor
    match: Tensor
    tokens: int

    @property
    def accuracy(self) -> Tensor:
        """(G,) mean of the matches."""
        return self.match.float().mean(1)


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: summed cross-entropy over answer tokens (fp32) and their number."""
    losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(
        labels.shape
    )
    return losses.sum(1), (labels != -100).sum(1)


@torch.no_grad()
def score(
    base: Base,
    groups: Sequence[Sequence[Encoded]],
    updates: Mapping[str, LowRank] | None = None,
    *,
    max_tokens: int | None = None,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = row_losses,
) -> Scores:
    """Score G groups of N examples each; group g under the g-th group of the updates.

    For a population of candidates on the same examples, repeat the list. Batches hold at most `max_tokens` tokens,
    padding included (default: `Base.room`); where memory runs out on a GPU they are halved until they fit, down to one
    example of each group. `loss` of logits and labels gives sums and counts per row, whose quotient is `Scores.loss`.

    What all prompts of every group begin with is read once for each group, and its keys and values are shared, where that
    is 64 tokens or more and two thirds of the longest row. `Scores.tokens` counts it for every example, as a prompt's cost.

    Raises:
        MergeError: groups of unequal size, or updates that cannot be split among them.
    """
    total = len(groups)
    if not total or len({len(group) for group in groups}) != 1 or not len(groups[0]):
        raise MergeError(f"expected groups of equally many examples, got sizes {sorted({len(g) for g in groups})}")
    count = len(groups[0])
    told = max((update.groups for update in (updates or {}).values()), default=1)
    parts = {
        n for u in (updates or {}).values() for n in (len(u.B) if u.B.ndim == 3 else 1, 1 if u.c is None else len(u.c))
    }
    if any(total % n for n in parts):
        raise MergeError(f"{total} groups of examples cannot be split among {told} candidates")
    lists = {id(group): group for group in groups}
    first = dict(zip(lists, np.cumsum([0, *[count] * (len(lists) - 1)]).tolist(), strict=True))
    rows = [row for group in lists.values() for row in group]
    packed, reach = Packed(rows, base), torch.tensor([row.reachable for row in rows])
    order = np.stack([np.argsort(packed.lengths[first[id(g)] : first[id(g)] + count], kind="stable") for g in groups])
    places = order + np.array([first[id(group)] for group in groups])[:, None]
    unit = math.lcm(*(total // n for n in parts if n > 1))  # a batch never splits what one stack or candidate covers
    shared = _shared(lists.values(), packed) if count > 1 else 0
    tight = base.model.config.get_text_config().vocab_size > _SMALL and base.model.get_output_embeddings() is not None
    longest = int((packed.lengths - packed.starts).max())
    units = max((update.A.shape[-2] for update in (updates or {}).values()), default=0)
    budget = max_tokens or base.room("score", longest / packed.width, units=units, cached=shared > 0)
    losses, match, tokens = torch.zeros(total, count), torch.zeros(total, count, dtype=torch.bool), 0

    def scored(index: np.ndarray, prefix: Prefix | None) -> list[Tensor]:
        """Losses and matches of these rows; all else that it made is let go."""
        batch = packed.batch(index.reshape(-1), tight=tight)
        if prefix is not None:
            at = None if batch.at is None else batch.at - shared
            batch = replace(batch, ids=batch.ids[:, shared:], at=at, prefix=prefix)
        logits = base.next_token_logits(batch)
        sums, counts = loss(logits, batch.labels)
        right = _answers_right(logits.argmax(-1), batch.labels, base.stop_ids).cpu()
        return [(sums / counts).cpu().view(index.shape), (right & reach[index.reshape(-1)]).view(index.shape)]

    def fill(start: int, stop: int, at: int) -> int:
        """Groups start … stop from their at-th example on, as far as memory for one of each lasts; where it ended."""
        nonlocal budget, shared, tokens
        part, prefix = slice_groups(updates, start, stop, total) if updates and told > 1 else updates, None
        with compose(base.model, part) if part else nullcontext():
            while at < count:
                step = min(count - at, max(1, budget // ((stop - start) * packed.width)))
                index, found = places[start:stop, at : at + step], None
                try:
                    if shared and prefix is None:
                        prefix = base.prefix(packed.ids[torch.from_numpy(index[:, 0]), :shared].long())
                        shared = shared if prefix else 0
                    found = scored(index, prefix)
                except torch.cuda.OutOfMemoryError:
                    if step == 1 and stop - start <= unit:
                        raise
                if found is None:
                    base.held["score"] = budget = (stop - start) * step * packed.width // 2
                    if step == 1:
                        break
                    continue
                where = torch.arange(start, stop)[:, None], torch.from_numpy(order[start:stop, at : at + step])
                losses[where], match[where] = found
                tokens += int(packed.lengths[index].sum())
                at += step
        return at

    todo = [(0, total, 0)]
    while todo:
        start, stop, at = todo.pop()
        chunk = max(unit, min(stop - start, budget // packed.width) // unit * unit)
        if start + chunk < stop:
            todo.append((start + chunk, stop, at))
        if (end := fill(start, start + chunk, at)) < count:
            todo.append((start, start + chunk, end))
    return Scores(losses, match, tokens)


def _shared(lists: Iterable[Sequence[Encoded]], packed: Packed) -> int:
    """How many tokens all prompts of every list begin with, alike within a list; 0 where it is too few to pay.

    The last token of a prompt is never one of them: it predicts the answer's first.
    """
    if packed.start is not None:
        return 0
    least = int(packed.starts.min()) - 1
    if least < _PREFIX or 3 * least < 2 * packed.width:
        return 0
    alike = least
    for rows in lists:
        ends = [min(row.prompt for row in rows), max(row.prompt for row in rows)]  # what these share, all share
        same = np.equal(*(np.array(end[:alike]) for end in ends))
        alike = int(same.cumprod().sum())
    return alike if alike >= _PREFIX and 3 * alike >= 2 * packed.width else 0


def _answers_right(best: Tensor, labels: Tensor, stops: Sequence[int]) -> Tensor:
    """(rows,) every answer token is the arg-max; where a stop token is due, any stop token will do."""
    right = (best == labels) | (labels == -100)
    if len(stops) > 1:
        ends = torch.tensor(stops, device=best.device)
        last = (labels != -100) & (torch.cumsum((labels != -100).flip(1), 1).flip(1) == 1)
        right |= last & torch.isin(labels, ends) & torch.isin(best, ends)
    return right.all(1)


def evaluate(
    base: Base,
    task: Task,
    updates: Mapping[str, LowRank] | None = None,
    *,
    split: str = "test",
    shots: int = 0,
    seed: int = 0,
    once: bool = False,
) -> Scores:
    """Score a task's split by its metric, under updates of one or more groups (None: the base alone, zero-shot or in
    context, see `encode_task`).
    """
    from workbench.judging import judged  # which stands above this module

    examples = getattr(task, split)
    rows = encode_task(base, task, examples, shots=shots, seed=seed, once=once)
    told = max((update.groups for update in (updates or {}).values()), default=1)
    return judged(base, [task] * told, [examples] * told, [rows] * told, updates)


def evaluate_many(
    base: Base, adapters: Sequence[Adapter], tasks: Sequence[Task], *, split: str = "test"
) -> pd.DataFrame:
    """Accuracy, by each task's metric, of every adapter (rows) on every task (columns), all adapters side by side.

    Raises:
        TaskError: tasks of unequal size.
    """
    splits = [getattr(task, split) for task in tasks]
    if len({len(examples) for examples in splits}) != 1:
        raise TaskError(
            f"expected tasks of equally many {split} examples, got {[len(examples) for examples in splits]}"
        )
    updates = grouped(adapters, base.device)
    share = {}
    for task in tasks:
        share[task.name] = evaluate(base, task, updates, split=split).accuracy.numpy()
    return pd.DataFrame(share, index=[adapter.name for adapter in adapters])
