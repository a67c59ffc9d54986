"""Greedy generation: one update for all prompts, or each group of prompts under its own, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from workbench.base import Base
from workbench.compose import LowRank, alone, compose
from workbench.errors import MergeError, TaskError

__all__ = ["decode", "generate"]


@torch.no_grad()
def generate(
    base: Base,
    groups: Sequence[Sequence[Sequence[int]]],
    limit: int,
    updates: Mapping[str, LowRank] | None = None,
    *,
    max_tokens: int | None = None,
) -> list[list[list[int]]]:
    """What a model writes after each prompt: the likeliest token each time, at most `limit` of them.

    Args:
        groups: G groups of prompts (token ids), in any numbers; group g is continued under the g-th group of the updates,
            which are those of `workbench.evaluate.score`. An encoder–decoder reads the prompts and writes from its start
            token.
        limit: new tokens at most, the stop token counted.
        max_tokens: tokens in one batch, padding and those to be written included (default: `Base.room`); where memory runs
            out on a GPU batches are halved until they fit. A batch holds at least one prompt of each group.

    Returns:
        For each prompt its new token ids; the last is a stop token (any of `Base.stop_ids`) unless the limit came first.

    Raises:
        TaskError: an empty prompt, or a limit below 1.
        MergeError: updates that cannot be split among the groups.
    """
    if limit < 1:
        raise TaskError(f"limit is {limit}, expected at least one new token")
    if any(not len(prompt) for group in groups for prompt in group):
        raise TaskError("a prompt has no tokens, so there is nothing to continue")
    told = {n for u in (updates or {}).values() for n in (len(u.B) if u.B.ndim == 3 else 1, u.groups)}
    if any(len(groups) % n for n in told):
        raise MergeError(f"{len(groups)} groups of prompts cannot be split among {max(told)} candidates")
    count = max((len(group) for group in groups), default=0)
    if not count:
        return [[] for _ in groups]
    widest = limit + max(len(prompt) for group in groups for prompt in group)
    units = max((update.A.shape[-2] for update in (updates or {}).values()), default=0)
    budget = max_tokens or base.room("generate", 1 / widest, units=units, cached=True)
    filler = min((prompt for group in groups for prompt in group), key=len)  # evens the groups out, and is thrown away
    rows = [[*group, *[filler] * (count - len(group))] for group in groups]
    order = [sorted(range(count), key=lambda i, row=row: len(row[i])) for row in rows]
    out: list[list[list[int]]] = [[[]] * count for _ in groups]
    with compose(base.model, updates) if updates else nullcontext(), _neutral(base, limit) as settings:
        at = 0
        while at < count:
            step = 1
            while at + step < count and _cost(rows, order, at + step + 1, limit) * (step + 1) <= budget:
                step += 1
            index, written = [(g, i) for g, places in enumerate(order) for i in places[at : at + step]], None
            try:
                written = _written(base, [rows[g][i] for g, i in index], settings)
            except torch.cuda.OutOfMemoryError:
                if step == 1:
                    raise
            if written is None:
                base.held["generate"] = budget = _cost(rows, order, at + step, limit) * step // 2
                continue
            for (g, i), ids in zip(index, written, strict=True):
                out[g][i] = ids
            at += step
    return [found[: len(group)] for found, group in zip(out, groups, strict=True)]


def _cost(rows: Sequence, order: Sequence, stop: int, limit: int) -> int:
    """Tokens of one row of each group, as wide as the longest prompt before `stop`."""
    return len(rows) * (max(len(row[places[stop - 1]]) for row, places in zip(rows, order, strict=True)) + limit)


def _written(base: Base, prompts: Sequence[Sequence[int]], settings) -> list[list[int]]:
    """One batch: padded on the left, so that what is written follows its prompt; on the right for an encoder."""
    width, causal = max(map(len, prompts)), base.decoder_start is None
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if causal else slice(0, len(prompt))
        ids[i, place], mask[i, place] = torch.tensor(prompt), 1
    ids, mask = ids.to(base.device), mask.to(base.device)
    with alone(base.model):
        found: Tensor = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [_ended(row, base.stop_ids) for row in found[:, width if causal else 1 :].tolist()]


def _ended(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The ids up to and with the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[: end + 1])


@contextmanager
def _neutral(base: Base, limit: int) -> Iterator:
    """Plain greedy decoding, whatever the model's own configuration says of sampling, penalties and forced tokens."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],  # behind a mask, or behind a stop token
        decoder_start_token_id=base.decoder_start,
        use_cache=True,
    )
    own, base.model.generation_config = base.model.generation_config, settings
    try:
        yield settings
    finally:
        base.model.generation_config = own


def decode(base: Base, ids: Sequence[int]) -> str:
    """The text of an answer's token ids, its stop token left out."""
    body = list(ids[:-1] if len(ids) and ids[-1] in base.stop_ids else ids)
    return base.tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False)
