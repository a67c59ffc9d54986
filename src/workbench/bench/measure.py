"""Time, peak memory, and what a device reaches at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench.usage import Peak

__all__ = ["Line", "Timing", "ceilings", "timed"]


@dataclass(frozen=True)
class Timing:
    """seconds: the median of the repetitions; spread: their largest over their smallest; peak: bytes held at most above
    what was held before (see `workbench.usage.Peak`).
    """

    seconds: float
    spread: float
    peak: int


@dataclass(frozen=True)
class Line:
    """One line of a benchmark: one way of doing one piece of work.

    area, work: what was done ("population", "64 candidates of 20 adapters, 5 examples of 128 tokens"); lines of the same
    area and work are compared. way: how ("ours", "bare backbone", "state dicts and peft"); against: the way that ratios
    are taken to. seconds are for `per` of something (`unit`: a candidate, a step, a module); operations and traffic are
    floating-point operations and bytes moved in those seconds, where they can be counted. adapters, rank: of lines that show
    how time grows with one of them.
    """

    area: str
    work: str
    way: str
    against: str
    timing: Timing
    unit: str = ""
    per: int = 1
    operations: float | None = None
    traffic: float | None = None
    error: float | None = None
    note: str = ""
    adapters: int | None = None
    rank: int | None = None

    @property
    def each(self) -> float:
        """Seconds for one unit."""
        return self.timing.seconds / self.per


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: str | torch.device, *, warm: int = 1, repeat: int = 3) -> Timing:
    """Run a piece of work `warm` times and then `repeat` times more, of which the median counts.

    A device that computes behind the interpreter's back is waited for.
    """
    device = torch.device(device)
    for _ in range(warm):
        work()
    _wait(device)
    peak, took = Peak(device), []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        _wait(device)
        took.append(time.perf_counter() - start)
    return Timing(statistics.median(took), max(took) / min(took), peak.rise)


def ceilings(device: str | torch.device, dtype: torch.dtype, *, size: int | None = None) -> dict[str, float]:
    """What the device reaches: operations (per second, a square matrix product) and traffic (bytes per second, a copy)."""
    device = torch.device(device)
    n = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.empty_like(a)
    product = timed(lambda: torch.mm(a, a, out=b), device, warm=2, repeat=7)
    copy = timed(lambda: b.copy_(a), device, warm=2, repeat=7)
    return {"operations": 2 * n**3 / product.seconds, "traffic": 2 * a.nbytes / copy.seconds}
