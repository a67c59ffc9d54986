"""Exact match by teacher forcing against generating, and in-context learning whose demonstrations are read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from workbench.base import Base
from workbench.bench.measure import Line, timed
from workbench.bench.models import random_base
from workbench.bench.population import random_rows
from workbench.encoding import Encoded
from workbench.evaluate import score
from workbench.generation import generate

__all__ = ["lines", "written"]

AREA, OURS, ONCE, EACH = "matching", "teacher forcing", "demonstrations read once", "demonstrations read for each"


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """40 prompts of 128 tokens, 30 to write: all at once and four at a time; then the same behind 640 of demonstrations.

    Half of the targets are what the model writes, half have their last token changed; the error is the share of
    prompts about which generating and teacher forcing disagree (two likeliest tokens that differ by less than rounding).
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" and scale != "nano" else torch.float32
    base = random_base(scale, device, dtype)
    number, prompt, limit, shown = (6, 20, 5, 80) if quick else (40, 128, 30, 640)
    prompts = [row.prompt for row in random_rows(base, number, prompt, 1)]
    own = written(base, prompts, limit, number)
    targets = [ids if i % 2 else (*ids[:-1], (ids[-1] + 1) % base.model.config.vocab_size) for i, ids in enumerate(own)]
    rows = [Encoded(p, tuple(t)) for p, t in zip(prompts, targets, strict=True)]
    match = score(base, [rows]).match[0]
    forced = timed(lambda: score(base, [rows]), device)
    for batch in (number, 4):
        work, way = f"{number} prompts of {prompt} tokens, {limit} to write", f"generate, batches of {batch}"
        timing = timed(lambda n=batch: written(base, prompts, limit, n), device, repeat=1)
        found = [list(ids) == list(t) for ids, t in zip(written(base, prompts, limit, batch), targets, strict=True)]
        error = float((match != torch.tensor(found)).float().mean())
        yield Line(AREA, f"{work} in batches of {batch}", way, way, timing, "prompt", number)
        yield Line(AREA, f"{work} in batches of {batch}", OURS, way, forced, "prompt", number, error=error)
    rows = random_rows(base, number, shown + prompt, limit, common=shown)
    work = f"{number} prompts of {prompt} tokens behind {shown} of demonstrations, {limit} to score"
    each = [[row] for row in rows]  # groups of one example share nothing
    losses = score(base, each).loss[:, 0]
    timing = timed(lambda: score(base, each), device)
    yield Line(AREA, work, EACH, EACH, timing, "prompt", number)
    error = float((score(base, [rows]).loss[0].double() / losses.double() - 1).abs().max())
    timing = timed(lambda: score(base, [rows]), device)
    yield Line(AREA, work, ONCE, EACH, timing, "prompt", number, error=error)


def written(base: Base, prompts: Sequence[Sequence[int]], limit: int, batch: int) -> list[list[int]]:
    """What `generate` of transformers writes, so many prompts at a time."""
    return [
        ids
        for at in range(0, len(prompts), batch)
        for ids in generate(base, [prompts[at : at + batch]], limit, max_tokens=10**9)[0]
    ]
