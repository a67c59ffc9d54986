"""Random adapters of mixed shapes and dense float64 oracles, for the tests of merging."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from workbench import singular
from workbench.adapters import Adapter, Factors
from workbench.merge import Dense, elementwise, lego, registry
from workbench.stack import Stack

SHAPES = {"wide": (7, 11), "tall": (12, 5), "square": (6, 6)}


def pool(n=4, seed=0, ranks=(3, 2, 4, 1), absent=(), shapes=SHAPES, dtype=torch.float64):
    """n random adapters of mixed ranks; `absent` holds (adapter, module) pairs that are left out."""
    g = torch.Generator().manual_seed(seed)
    adapters = []
    for i in range(n):
        modules = {}
        for module, (d_out, d_in) in shapes.items():
            r = ranks[i % len(ranks)]
            B, A = torch.randn(d_out, r, generator=g, dtype=dtype), torch.randn(r, d_in, generator=g, dtype=dtype)
            if (i, module) not in absent:
                modules[module] = Factors(B, A)
        adapters.append(Adapter(f"a{i}", modules))
    return adapters


def single(*matrices, name="m"):
    """One adapter per matrix, ΔW exactly that matrix."""
    return [
        Adapter(f"x{i}", {name: Factors(torch.tensor(m, dtype=torch.float64), torch.eye(len(m[0])).double())})
        for i, m in enumerate(matrices)
    ]


def deltas(update):
    if isinstance(update, Dense):
        return update.modules
    return {module: factors.delta() for module, factors in update.modules.items()}


def gap(got, want):
    """max over modules of ‖got − want‖ / ‖want‖."""
    got, want = deltas(got), want if isinstance(want, dict) else deltas(want)
    assert list(got) == list(want)
    return max(float((got[m].double() - want[m].double()).norm() / want[m].double().norm()) for m in want)


def weighted_sum(adapters, weights, divide=lambda present: 1):
    """Σ w ΔW over a divisor, in float64 and dense, by the definition."""
    out = {}
    for module in dict.fromkeys(m for a in adapters for m in a.modules):
        parts = [
            w * (a.modules[module].B.double() @ a.modules[module].A.double())
            for w, a in zip(weights, adapters, strict=True)
            if module in a.modules
        ]
        out[module] = sum(parts) / divide(len(parts))
    return {module: out[module] for module in Stack.of(adapters).modules}


@contextmanager
def as_on_a_gpu():
    """The ways that a GPU is asked for things, on a processor: `on_processor` says no wherever it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (singular, elementwise, lego, registry):
            patch.setattr(module, "on_processor", lambda x: False)
        yield
