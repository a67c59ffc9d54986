"""Collecting statistics: every adapter over its own examples, with hooks that keep the rows of each layer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.adapters import Adapter
from workbench.base import Base, Batch, check_fits
from workbench.compose import compose, grouped
from workbench.errors import MergeError, TaskError
from workbench.evaluate import Encoded, Packed, encode_task, row_losses
from workbench.merge.statistics import Rows, Statistics
from workbench.stack import Stack
from workbench.tasks import Task

if TYPE_CHECKING:
    from workbench.pool import Pool

__all__ = ["collect"]


def collect(
    base: Base,
    adapters: Pool | Stack | Sequence[Adapter],
    examples: Mapping[str, Task | Sequence[Encoded]] | Task | Sequence[Encoded],
    *,
    gradients: bool = False,
    tokens: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Statistics:
    """Run each adapter over its own examples, and keep what comes into and, with gradients, back to every layer.

    Each adapter is alone on the base (weight 1), many side by side in one pass. Prompt and answer are fed, as in training;
    rows are kept at all their tokens, in every module that any of the adapters has, and never at padding. Gradients are
    those of −log p(answer | prompt), summed over the answer's tokens, example by example. In an encoder–decoder, rows of
    the encoder's modules, and of the cross-attention's keys and values, are the prompt's tokens; all others the answer's.

    Args:
        examples: adapter's name → a task (its training examples) or encoded examples; or one of these for all.
        gradients: keep them too (`fisher`); about three times the time, and up to three times the memory.
        tokens: keep at most so many rows of each adapter, drawn evenly from all under `seed` (of an encoder's and of a
            decoder's as many each). Not with gradients, where an example needs all of its tokens: give fewer examples
            instead.
        max_tokens: of one batch, padding included (default 4,096 on a processor; 65,536 on a GPU, a quarter with gradients).

    Raises:
        TaskError: an adapter without examples.
        MergeError: tokens together with gradients, or a layer that does not see every token of every row.
        AdapterError: an adapter that does not fit the base.
    """
    if tokens is not None and (tokens < 1 or gradients):
        raise MergeError(
            f"tokens is {tokens}, expected at least 1"
            if not gradients
            else "the gradient of an example needs all of its tokens; leave tokens out, and give fewer examples instead"
        )
    adapters = adapters.stack() if hasattr(adapters, "stack") else adapters
    stack = adapters if isinstance(adapters, Stack) else Stack.of(adapters)
    for i in range(len(stack)):
        check_fits(stack.adapter(i), base.layers)
    lists = _encoded(base, stack.names, examples)
    budget = max_tokens or (65_536 // (4 if gradients else 1) if base.device.type == "cuda" else 4_096)
    longest = max(len(row) for rows in lists.values() for row in rows)
    found: dict[str, dict[str, Rows]] = {}
    for chunk in _chunks(stack, max(1, budget // longest), 2**32 if base.device.type == "cuda" else 2**28):
        found |= _observed(base, stack, chunk, lists, gradients, tokens, seed, budget)
    return Statistics(found, gradients)


def _encoded(base: Base, names: Sequence[str], examples) -> dict[str, list[Encoded]]:
    given = {name: examples.get(name) if isinstance(examples, Mapping) else examples for name in names}
    lost = [name for name, own in given.items() if own is None]
    if lost:
        raise TaskError(
            f"no examples for {len(lost)} of {len(names)} adapters, such as {lost[0]!r}; give a task for each"
        )
    made: dict[int, list[Encoded]] = {}
    for name, own in given.items():
        if id(own) not in made:
            made[id(own)] = encode_task(base, own, own.train) if isinstance(own, Task) else list(own)
        if not made[id(own)]:
            raise TaskError(f"the examples for {name} are empty; statistics need at least one")
    return {name: made[id(own)] for name, own in given.items()}


def _chunks(stack: Stack, groups: int, room: int) -> Iterator[list[int]]:
    """Adapters to run side by side: at most `groups`, their factors, filled up to the largest rank, in `room` bytes."""
    width, ranks = sum(sum(shape) for shape in stack.shapes().values()), stack.ranks().amax(1).tolist()
    chunk: list[int] = []
    for i, _ in enumerate(ranks):
        rank = max(ranks[k] for k in [*chunk, i])
        if chunk and (len(chunk) == groups or 4 * width * rank * (len(chunk) + 1) > room):
            yield chunk
            chunk = []
        chunk.append(i)
    yield chunk


def _observed(
    base: Base,
    stack: Stack,
    chunk: Sequence[int],
    lists: Mapping[str, list[Encoded]],
    gradients: bool,
    tokens: int | None,
    seed: int,
    budget: int,
) -> dict[str, dict[str, Rows]]:
    """The rows of some adapters, each a group of the batch; groups with fewer examples are filled up and masked."""
    names, g = [stack.names[i] for i in chunk], len(chunk)
    sizes = [len(lists[name]) for name in names]
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    packed = Packed([row for name in names for row in lists[name]], base)
    wanted = [np.arange(part.max() + 1) < part[:, None] for part in packed.parts]
    index = np.full((g, max(sizes)), -1)
    for k, (name, first, n) in enumerate(zip(names, firsts, sizes, strict=True)):
        index[k, :n] = first + np.argsort(packed.lengths[first : first + n], kind="stable")
        for part in wanted:
            row, column = part[first : first + n].nonzero()
            if tokens is not None and len(row) > tokens:
                drawn = random.Random(f"{name}|tokens|{seed}").sample(range(len(row)), tokens)
                part[first : first + n] = False
                part[first + row[drawn], column[drawn]] = True
    step = max(1, budget // (g * packed.width))
    kept: dict[str, list] = {module: [] for module in stack.modules}  # one (x, g, example) a call, each by group
    with compose(base.model, grouped([stack.adapter(i) for i in chunk], base.device)):
        layers = dict(base.model.named_modules())
        head = any(layers[module] is base.model.get_output_embeddings() for module in stack.modules)
        for at in range(0, index.shape[1], step):
            part = index[:, at : at + step].reshape(-1)
            rows = np.maximum(part, 0)
            batch = packed.batch(rows)
            if head and batch.decoder is None:  # its inputs at all tokens, not at the answers alone
                keep = batch.ids.shape[1]
                labels = packed.labels[torch.from_numpy(rows).to(base.device), :keep].long()
                batch = replace(batch, labels=labels, keep=keep)
            elif not gradients:
                batch = replace(batch, labels=batch.labels[:, -1:], keep=1)
            batch = _told_apart(batch)
            number = at + np.arange(len(part)) % (len(part) // g)
            views = []
            for ids, every in zip((batch.ids, batch.decoder), wanted, strict=False):
                mask = every[rows, : ids.shape[1]] & (part >= 0)[:, None]
                where, counts = torch.from_numpy(mask.ravel().nonzero()[0]), mask.reshape(g, -1).sum(1).tolist()
                example = torch.from_numpy(np.repeat(number, mask.sum(1))).split(counts)
                views.append(_View(ids, where.to(base.device), counts, example))
            with _watching(layers, stack.modules, views, gradients) as watch:
                logits = base.logits(batch)
            back: Sequence = ()
            if gradients:
                loss = row_losses(logits, batch.labels)[0].sum()
                outputs = [y for calls in watch.seen.values() for _, _, y in calls]
                back = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
            left = iter(back)
            for module, calls in watch.seen.items():
                if not calls:
                    raise MergeError(f"{module} was never run by the base, so nothing is known of its inputs")
                kept[module] += [
                    (x, view.pick(next(left)) if gradients else None, view.example if gradients else None)
                    for x, view, _ in calls
                ]
    joined: dict[tuple[int, ...], Tensor] = {}

    def whole(calls: list, part: int, k: int) -> Tensor | None:
        """One group's rows of all calls as one tensor, made once for modules that saw the same."""
        pieces = [call[part][k] for call in calls if call[part] is not None]
        key = tuple(map(id, pieces))
        if key and key not in joined:
            joined[key] = torch.cat(pieces)
        return joined.get(key)

    return {
        name: {
            module: Rows(*(whole(calls, part, k) for part in range(3)), examples=sizes[k])
            for module, calls in kept.items()
        }
        for k, name in enumerate(names)
    }


def _told_apart(batch: Batch) -> Batch:
    """A batch whose encoder reads one more column of padding where its decoder reads as many, so that each shows."""
    if batch.decoder is None or batch.ids.shape[1] != batch.decoder.shape[1]:
        return batch
    return replace(batch, ids=pad(batch.ids, (0, 1)), mask=pad(batch.mask, (0, 1)))


@dataclass(frozen=True)
class _View:
    """What some layers see of a batch: ids (rows, tokens), and which of all these places are kept.

    where are their numbers, counts how many there are of each group, and example whose they are, by group.
    """

    ids: Tensor
    where: Tensor
    counts: list[int]
    example: Sequence[Tensor]

    def shows(self, tensor: Tensor) -> bool:
        """Does it hold one row for each token? Whole numbers must be the tokens themselves."""
        flat = tensor[..., 0] if tensor.is_floating_point() else tensor
        same = flat.numel() == self.ids.numel()
        return same and (tensor.is_floating_point() or torch.equal(tensor.view_as(self.ids), self.ids))

    def pick(self, tensor: Tensor) -> Sequence[Tensor]:
        """The rows kept of (rows, tokens, width), or of ids (rows, tokens), by group, in main memory."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.is_floating_point() else tensor.reshape(-1)
        return flat[self.where].cpu().split(self.counts)


class _Watch:
    """What the hooks of one batch saw: `seen`, module → one (rows of x by group, view, output) a call."""

    def __init__(self, modules: Sequence[str], views: Sequence[_View]):
        self.views, self.seen = views, {module: [] for module in modules}
        self.last: list[tuple] = [(None, ())] * len(views)

    def see(self, module: str, gradients: bool, _, args: tuple, y: Tensor) -> Tensor:
        x = args[0]
        k = next((k for k, view in enumerate(self.views) if view.shows(x)), None)
        if k is None:
            wanted = " or ".join(str(view.ids.numel()) for view in self.views)
            raise MergeError(
                f"{module} was given {tuple(x.shape)} for {wanted} tokens; only a layer that sees every token of "
                "every row can be observed, so leave adapters of it out"
            )
        if x is not self.last[k][0]:  # q, k and v read one tensor, and share what is kept of it
            self.last[k] = x, self.views[k].pick(x)
        if gradients and not y.requires_grad:  # nothing before it is watched, and the base is frozen
            y = y.detach().requires_grad_()
        self.seen[module].append((self.last[k][1], self.views[k], y if gradients else None))
        return y


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], modules: Sequence[str], views: Sequence[_View], gradients: bool
) -> Iterator[_Watch]:
    """Hooks on the modules, behind those of `compose`, while the context is open."""
    watch = _Watch(modules, views)
    handles = []
    try:
        for module in modules:
            handles.append(layers[module].register_forward_hook(partial(watch.see, module, gradients)))
        with torch.set_grad_enabled(gradients):
            yield watch
    finally:
        for handle in handles:
            handle.remove()
        watch.last = []
