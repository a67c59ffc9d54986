"""Many fits in one pass against one after the other, at nano scale: learned coefficients, and a pool of new adapters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.adapt.coefficients import COEFFICIENTS, learn_coefficients
from workbench.adapt.fresh import train_fresh
from workbench.adapt.gradient import Schedule
from workbench.base import Base
from workbench.bench.measure import Line, Timing, timed
from workbench.bench.models import random_adapters, random_base
from workbench.bench.population import random_rows
from workbench.compose import grouped
from workbench.encoding import Encoded
from workbench.evaluate import score
from workbench.stack import Stack

__all__ = ["ALONE", "TOGETHER", "lines"]

AREA, TOGETHER, ALONE, WHOLE = "fits", "side by side", "one by one", "all of it"


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """Fits of 10 adapters' coefficients, then new adapters, 100 steps each of 8 examples of 85 tokens; where time goes.

    Nothing at other scales: what is alike of many fits is the model, and one fit of an 8B model fills a device by itself.
    One by one is measured on some of them. The error is the largest difference of a training loss, over the largest.
    """
    if scale != "nano":
        return
    cuda = torch.device(device).type == "cuda"
    number, some, steps = (4, 2, 2) if quick else (240, 4, 100) if cuda else (16, 4, 10)
    tokens, tests = (12, 6) if quick else (85, 500 if cuda else 50)
    base, schedule = random_base(scale, device), replace(COEFFICIENTS, steps=steps)
    pool = random_adapters(base.projections, 20 if quick else 72, [4, 8, 16, 8] * (5 if quick else 18))
    rng = random.Random(0)
    stacks = [Stack.of(rng.sample(pool, 10)) for _ in range(number)]
    train, validation, test = (
        [random_rows(base, n, tokens - 6, 6, seed=1000 * n + i) for i in range(number)] for n in (10, 20, tests)
    )

    def learned(which: Sequence[int]) -> Tensor:
        given = [[every[i] for i in which] for every in (stacks, train, validation)]
        return torch.stack([fit.curves.train for fit in learn_coefficients(base, *given, schedule, seeds=which)])

    def trained(which: Sequence[int]) -> Tensor:
        given = [[every[i] for i in which] for every in (train, validation)]
        names = [str(i) for i in which]
        return train_fresh(base, names, *given, replace(schedule, lr=3e-3), seeds=which)[1].train.T

    yield from _both(f"coefficients of 10 adapters, {steps} steps", learned, number, some, device)
    yield from _both(f"new adapters, {steps} steps", trained, min(number, 72), min(some, 6), device)
    yield from _shares(base, stacks, train, validation, test, schedule, device)


def _both(work: str, fits: Callable[[Sequence[int]], Tensor], number: int, some: int, device: str) -> Iterator[Line]:
    found, alone = {}, {}
    timing = timed(lambda: alone.update({i: fits([i]) for i in range(some)}), device, warm=0, repeat=1)
    yield Line(AREA, f"{number} fits: {work}", ALONE, ALONE, timing, "fit", some, note=f"measured on {some}")
    timing = timed(lambda: found.update(all=fits(range(number))), device, warm=0, repeat=1)
    want = torch.cat([alone[i] for i in range(some)])
    error = float((found["all"][:some] - want).abs().max() / want.abs().max())
    yield Line(AREA, f"{number} fits: {work}", TOGETHER, ALONE, timing, "fit", number, error=error)


def _shares(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]],
    test: Sequence[Sequence[Encoded]],
    schedule: Schedule,
    device: str,
) -> Iterator[Line]:
    """Of side-by-side fits: setting up and folding, steps, validation, and the test of what was fitted."""
    fits, seeds = [], range(len(stacks))

    def fitted(steps: int, shown: Sequence | None) -> Timing:
        def work() -> None:
            fits[:] = learn_coefficients(base, stacks, train, shown, replace(schedule, steps=steps), seeds=seeds)

        return timed(work, device, warm=0, repeat=1)

    def tested() -> None:
        score(base, test, grouped([fit.adapter for fit in fits], base.device))

    nothing, bare, whole = fitted(0, None), fitted(schedule.steps, None), fitted(schedule.steps, validation)
    last = timed(tested, device, warm=0, repeat=1)
    parts = {
        WHOLE: replace(whole, seconds=whole.seconds + last.seconds),
        "setting up and folding": nothing,
        "steps": replace(bare, seconds=max(0.0, bare.seconds - nothing.seconds)),
        "validation": replace(whole, seconds=max(0.0, whole.seconds - bare.seconds)),
        "test": last,
    }
    work = f"where {len(stacks)} fits of coefficients spend it, {schedule.steps} steps, {len(test[0])} examples of test"
    for way, timing in parts.items():
        share = f"{timing.seconds / parts[WHOLE].seconds:.0%}"
        yield Line(AREA, work, way, WHOLE, timing, "fit", len(stacks), note=share)
