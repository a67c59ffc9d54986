"""Seconds for each kind of work, from a benchmark's lines, for a base of an assumed size; `workbench.sweep.cost` adds them up."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, get_type_hints

import numpy as np
import pandas as pd

from workbench.bench.models import SCALES
from workbench.errors import WorkbenchError
from workbench.options import Count, Range, Share, accepts, near, words

__all__ = ["PARAMETERS", "Assumptions", "Rates", "Unknown"]

PARAMETERS = {"nano": 0.75e6, "1B": 1.24e9, "8B": 8.03e9}  # of the benchmark's models
_Positive = Annotated[float, Range(0)]


class Unknown(WorkbenchError):
    """The benchmark has no line for what a run does."""


@dataclass(frozen=True)
class Assumptions:
    """What the cost model is told: the `estimate` of a sweep's file.

    scale: of the benchmark, or "" for that nearest in parameters. device: gpu or cpu. parameters: the base's, None for the
    benchmark's own; seconds are proportional to them. tokens, answer: per example (prompt and answer), and those of the
    answer alone. written: the share of examples whose answer is written, since the metric reads text and it is not the
    target token by token. pool_size: accepted adapters; pools: those of each pool that has another number. rank: their mean rank.
    """

    scale: str = ""
    device: str = "gpu"
    parameters: _Positive | None = None
    tokens: _Positive = 128.0
    answer: _Positive = 8.0
    written: Share = 0.0
    pool_size: Count = 100
    pools: Mapping = field(default_factory=dict)
    rank: _Positive = 16.0

    @classmethod
    def of(cls, given: Mapping) -> Assumptions:
        """From a mapping, checked.

        Raises:
            WorkbenchError: a field that does not exist (near names are given), or a value out of its range.
        """
        hints, found = get_type_hints(cls, include_extras=True), {}
        for name, value in given.items():
            if name not in hints:
                raise WorkbenchError(f"estimate.{name}: no such field{near(name, hints)}")
            if isinstance(value, str) and hints[name] is not str:
                with contextlib.suppress(ValueError):
                    value = float(value)  # 8.03e9 is text to YAML 1.1
            if not accepts(hints[name], value):
                raise WorkbenchError(f"estimate.{name} is {value!r}, expected {words(hints[name])}")
            found[name] = value
        for name, size in dict(found.get("pools", {})).items():
            if not accepts(Count, size):
                raise WorkbenchError(f"estimate.pools.{name} is {size!r}, expected {words(Count)}")
        made = cls(**found)
        for name, known in (("scale", ("", *PARAMETERS)), ("device", ("gpu", "cpu"))):
            if getattr(made, name) not in known:
                raise WorkbenchError(f"estimate.{name} is {getattr(made, name)!r}, expected one of {', '.join(known)}")
        return made

    @property
    def nearest(self) -> str:
        """The benchmark's scale."""
        size = self.parameters or PARAMETERS["8B"]
        return self.scale or min(PARAMETERS, key=lambda one: abs(math.log(PARAMETERS[one] / size)))


class Rates:
    """Seconds for each kind of work, from the lines of a benchmark (`workbench.bench`), for a base of the assumed size."""

    def __init__(self, benchmark: pd.DataFrame, assumed: Assumptions):
        self.lines, self.assumed = benchmark, assumed
        self.factor = (assumed.parameters or PARAMETERS[assumed.nearest]) / PARAMETERS[assumed.nearest]
        self.hidden = SCALES[assumed.nearest].hidden
        self.modules = 7 * SCALES[assumed.nearest].layers
        fed = self._find("population", "bare model, same rows")
        self.bare = self.factor * float((fed.each / fed.work.map(_tokens)).median())
        self._forward = self._growth("population", "all candidates in one pass", (0.0, self.bare))
        self._backward = self._growth("coefficients", "one stack")

    @property
    def source(self) -> str:
        """Where the figures come from."""
        told = f"benchmark {self.assumed.nearest} on {self.lines.device.iloc[0]}"
        return told if self.factor == 1 else f"{told}, × {self.factor:.3g} for {self.assumed.parameters:.3g} parameters"

    def forward(self, units: float) -> float:
        """Seconds a token, read under an update of so many units on all projections."""
        return _line(self._forward, units)

    def backward(self, units: float) -> float:
        """Seconds a token, forward, backward and the optimiser's step."""
        return _line(self._backward, units)

    @cached_property
    def checkpointing(self) -> float:
        """How much longer a step takes that recomputes each layer."""
        again, kept = (self._find("coefficients", f"one stack{way}") for way in (", checkpointed", ""))
        return float(again.each.iloc[0] / kept[kept.work == again.work.iloc[0]].each.iloc[0])

    @cached_property
    def write(self) -> float:
        """Seconds for a token of an answer, in a batch of 40."""
        found = self._find("matching", "generate, batches of 40").iloc[0]
        prompt, answer = (int(n) for n in re.search(r"prompts of (\d+) tokens, (\d+) to write", found.work).groups())
        return max(0.0, self.factor * found.each - prompt * self.bare) / answer

    @cached_property
    def behind(self) -> float:
        """What a prompt behind demonstrations read once costs over one by itself."""
        once = self._find("matching", "demonstrations read once").iloc[0].each
        return float(once / self._find("matching", "teacher forcing").each.median())

    @cached_property
    def read(self) -> float:
        """Seconds to read an adapter from its file."""
        found = self._find("similarity", "a lazy stack's modules", least=0)
        return self.factor * float(found.each.iloc[0]) if len(found) else 0.0

    @cached_property
    def place(self) -> float:
        """Seconds to put an adapter's factors where they are used, beside its passes."""
        found = self._find("population", "all adapters side by side", least=0)
        if found.empty:
            return 0.0
        one = found.iloc[0]
        return max(0.0, self.factor * one.each - _tokens(one.work) * self.forward(_rank(one.work)))

    def merge(self, method: str, k: int) -> float:
        """Seconds to merge k adapters."""
        found = self.lines[self.lines.work.str.fullmatch(rf"{re.escape(method)}: .*\b\d+ adapters, \d+ modules")]
        if found.empty:
            raise Unknown(f"the benchmark has no line for merging by {method}")
        measured = int(re.search(r"(\d+) adapters, ", found.work.iloc[0])[1])
        return self.factor * float(found.seconds.iloc[0]) * k / measured

    @cached_property
    def cut(self) -> float:
        """Seconds to cut a dense update to a rank, all modules."""
        return self.factor * self.modules * float(self._find("similarity", "SVD of the dense ΔW").each.iloc[0])

    def close(self, measure: str) -> float:
        """Seconds for one adapter's closeness to a target, all modules; a measure not benchmarked as clamp."""
        found = self._find("similarity", "the stack at once")
        own = found[found.work.str.startswith(f"{measure} ")]
        own = own if len(own) else found[found.work.str.startswith("clamp ")]
        return (
            self.factor
            * float(own.each.iloc[0])
            * self.modules
            / int(re.search(r"in (\d+) modules", own.work.iloc[0])[1])
        )

    def pairs(self, n: int) -> float:
        """Seconds for all pairs of n adapters."""
        found = self._find("similarity", "Gram matrices")
        found = found[found["rank"].astype(float) == 16]
        nearest = found.iloc[(found.adapters.astype(float) - n).abs().argmin()]
        return self.factor * float(nearest.each) * n * (n - 1) / 2

    def _find(self, area: str, way: str, least: int = 1) -> pd.DataFrame:
        found = self.lines[(self.lines.area == area) & (self.lines.way == way)]
        if len(found) < least:
            raise Unknown(f"the benchmark has no line {way!r} of {area}")
        return found

    def _growth(self, area: str, way: str, *more: tuple[float, float]) -> list[tuple[float, float]]:
        """(units, seconds a token), of the lines that show how time grows with the number of adapters."""
        found = self._find(area, way)
        found = found[found.adapters.notna()]
        points = {
            n * _rank(work): self.factor * each / _tokens(work)
            for n, work, each in zip(found.adapters, found.work, found.each, strict=True)
        }
        return sorted({**dict(more), **points}.items())


def _line(points: list[tuple[float, float]], at: float) -> float:
    """Between neighbours along a line; as the first before it, and on along the last two behind them."""
    x, y = (np.array(one, dtype=float) for one in zip(*points, strict=True))
    if at <= x[-1] or len(x) == 1:
        return float(np.interp(at, x, y))
    return float(y[-1] + max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) * (at - x[-1]))


def _tokens(work: str) -> int:
    """Tokens that one of a line's units is fed: its examples times their length."""
    return math.prod(int(n) for n in re.search(r"(\d+) examples of (\d+) tokens", work).groups())


def _rank(work: str) -> float:
    """The mean rank of a line's adapters."""
    return float(np.mean([int(n) for n in re.search(r"of rank (\d+)(?: to (\d+))?", work).groups() if n]))
