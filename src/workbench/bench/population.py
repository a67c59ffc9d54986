"""A generation of candidates in one pass: against the bare model on the same rows, and against peft one candidate at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from workbench.adapters import Adapter
from workbench.base import Base, free_memory
from workbench.bench.measure import Line, timed
from workbench.bench.models import random_adapters, random_base
from workbench.compose import LowRank, grouped, shared
from workbench.encoding import Encoded, Packed
from workbench.evaluate import row_losses, score
from workbench.stack import Stack

__all__ = ["by_state_dicts", "lines", "random_rows"]

AREA, OURS, BARE, PEFT = "population", "all candidates in one pass", "bare model, same rows", "state dicts and peft"
WHOLE, EACH = "all adapters side by side", "one adapter after another"


def random_rows(base: Base, number: int, prompt: int, answer: int, *, common: int = 0, seed: int = 0) -> list[Encoded]:
    """Examples of random tokens, none of them a stop token, whose first `common` tokens are the same."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(sorted(set(range(base.model.config.vocab_size)) - set(base.stop_ids)))

    def draw(n: int) -> tuple[int, ...]:
        return tuple(allowed[torch.randint(len(allowed), (n,), generator=generator)].tolist())

    start = draw(common)
    return [Encoded(start + draw(prompt - common), draw(answer)) for _ in range(number)]


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """Populations of 12 and 64 over 20 adapters of rank 16, 5 examples of 128 tokens; then more adapters, and other ranks.

    Losses are compared with the state dicts' for candidates that are one adapter each: weighted sums of factors, as that
    way has them, are another function of the weights elsewhere.
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" and scale != "nano" else torch.float32
    base = random_base(scale, device, dtype)
    number, rank, tokens = (3, 4, 24) if quick else (20, 16, 128)
    rows = random_rows(base, 5, tokens - 8, 8)
    adapters = random_adapters(base.projections, number, rank, device=device, dtype=dtype)
    stack = Stack.of(adapters)
    single = torch.eye(2, number)
    with by_state_dicts(base, rows, adapters) as losses:
        alone = timed(lambda: losses(single), device, repeat=2)
        few = losses(single)
    yield from _whole_pool(base, rows, adapters, f"{number} adapters of rank {rank}, 5 examples of {tokens} tokens")
    del adapters
    for population in (3, 4) if quick else (12, 64):
        c = torch.randn(population, number, generator=torch.Generator().manual_seed(0)) / number
        c[:2] = single
        work = f"{population} candidates of {number} adapters of rank {rank}, 5 examples of {tokens} tokens"
        yield Line(AREA, work, PEFT, PEFT, alone, "candidate", 2, 2 * _operations(base, rows, 1, rank))
        yield from _against_bare(base, rows, population, shared(stack, c), work, device, PEFT, few)
    del stack
    population = 2 if quick else 12 if torch.device(device).type == "cuda" else 3
    counts, ranks = ((2, 5), (2, 8)) if quick else ((10, 30, 100, 300, 960), (4, 64))
    for n, r in [*((n, rank) for n in counts), *((number, r) for r in ranks)]:
        size = sum(d_out + d_in for d_out, d_in in base.projections.values()) * n * r * dtype.itemsize
        if torch.device(device).type == "cuda" and 1.4 * size > free_memory(torch.device(device)):
            continue
        updates = _random_updates(base, population, n * r, dtype)
        work = f"{population} candidates of {n} adapters of rank {r}, 5 examples of {tokens} tokens"
        grown = {"adapters": n} if r == rank else {"rank": r}
        yield from _against_bare(base, rows, population, updates, work, device, grown=grown)
        del updates


def _whole_pool(base: Base, rows: Sequence[Encoded], adapters: Sequence[Adapter], work: str) -> Iterator[Line]:
    """Every adapter by itself on the same examples, as selecting by evaluation asks for; their factors in place included."""
    found = {}

    def each() -> None:
        found[EACH] = torch.cat([score(base, [rows], grouped([adapter], base.device)).loss for adapter in adapters])

    def whole() -> None:
        found[WHOLE] = score(base, [rows] * len(adapters), grouped(adapters, base.device)).loss

    for way, run in ((EACH, each), (WHOLE, whole)):
        timing = timed(run, str(base.device), repeat=2)
        error = float((found[way].double() / found[EACH].double() - 1).abs().max()) if way == WHOLE else None
        yield Line(AREA, work, way, EACH, timing, "adapter", len(adapters), error=error)


def _against_bare(
    base: Base,
    rows: Sequence[Encoded],
    population: int,
    updates: Mapping[str, LowRank],
    work: str,
    device: str,
    against: str = BARE,
    few: Tensor | None = None,
    grown: Mapping[str, int] | None = None,
) -> Iterator[Line]:
    """The bare model and ours. `few`: losses of the first candidates, which ours are compared with."""
    units, found, groups = max(update.A.shape[0] for update in updates.values()), [], [rows] * population
    bare = timed(lambda: score(base, groups), device)
    plain, full = (_operations(base, rows, population, n) for n in (0, units))
    yield Line(AREA, work, BARE, against, bare, "candidate", population, plain)
    again = {} if units < 2000 or torch.device(device).type == "cuda" else {"warm": 0, "repeat": 1}
    timing = timed(lambda: found.append(score(base, groups, updates).loss), device, **again)
    note = f"{timing.seconds / bare.seconds:.3f} × bare, of {full / plain:.3f} × its operations"
    error = None if few is None else float((found[-1][: len(few)].double() / few.double() - 1).abs().max())
    more = {"error": error, "note": note, **(grown or {})}
    yield Line(AREA, work, OURS, against, timing, "candidate", population, full, **more)


def _operations(base: Base, rows: Sequence[Encoded], population: int, units: int) -> float:
    """Of the linear layers (the head at answers alone) and of updates of so many units on all projections."""
    fed, answered = sum(map(len, rows)), sum(len(row.answer) for row in rows)
    each = sum(d_out * d_in + units * (d_out + d_in) for d_out, d_in in base.projections.values())
    head = base.model.config.vocab_size * base.model.config.hidden_size
    return 2.0 * population * (fed * each + answered * head)


def _random_updates(base: Base, population: int, units: int, dtype: torch.dtype) -> dict[str, LowRank]:
    """A stack of so many units on all projections, made where it is used."""
    generator = torch.Generator(base.device).manual_seed(1)
    made = {"generator": generator, "device": base.device, "dtype": dtype}
    c = torch.randn(population, units, generator=generator, device=base.device)
    return {
        m: LowRank(torch.randn(d_out, units, **made) * (0.02 / units**0.5), torch.randn(units, d_in, **made), c)
        for m, (d_out, d_in) in base.projections.items()
    }


@contextmanager
def by_state_dicts(
    base: Base, rows: Sequence[Encoded], adapters: Sequence[Adapter]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """weights (C, K) → losses (C, N) as LoraHub's reference code has them.

    Both factors' state dicts are summed under the weights and set into a model wrapped by peft, one forward pass a candidate.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    dicts = [
        {
            f"base_model.model.{module}.lora_{part}.weight": getattr(factors, part)
            for module, factors in adapter.modules.items()
            for part in "AB"
        }
        for adapter in adapters
    ]
    names = sorted({module.rpartition(".")[2] for module in adapters[0].modules})
    rank = adapters[0].rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of other libraries' versions
        wrapped = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names)).eval()
    batch = Packed(rows, base).batch(np.arange(len(rows)), tight=True)

    @torch.no_grad()
    def losses(weights: Tensor) -> Tensor:
        out = []
        for own in weights.tolist():
            mixed = {key: own[0] * tensor for key, tensor in dicts[0].items()}
            for weight, one in zip(own[1:], dicts[1:], strict=True):
                for key, tensor in one.items():
                    mixed[key] += weight * tensor
            set_peft_model_state_dict(wrapped, mixed)
            sums, counts = row_losses(base.logits(batch), batch.labels)
            out.append((sums / counts).cpu())
        return torch.stack(out)

    try:
        yield losses
    finally:
        wrapped.unload()
