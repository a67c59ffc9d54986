"""A stack, a stack that is computed twice, and a hook for each adapter: one gradient."""

from functools import partial

import pytest
import torch

from helpers import hook_count
from workbench.bench import random_base
from workbench.bench.coefficients import (
    LOOP,
    OURS,
    RECOMPUTED,
    gradient,
    lines,
    one_by_one,
    random_pieces,
    stacked,
    wider,
)
from workbench.bench.population import random_rows
from workbench.encoding import Packed


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    assert [line.way for line in found] == [OURS, LOOP, OURS, RECOMPUTED]
    assert [line.against for line in found] == [OURS, LOOP, LOOP, LOOP]
    assert all(line.timing.seconds > 0 and line.operations > 0 for line in found)
    assert found[0].error is None
    assert all(0 < line.error < 1e-4 for line in found[1:])
    assert [line.adapters for line in found] == [2, None, 3, None]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_the_loop_s(recompute):
    base = random_base("nano", layers=2)
    base.model.double()
    pieces = random_pieces(base.projections, [1, 3, 2], "cpu", torch.float64)
    theta = torch.randn(14, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    batch = Packed(random_rows(base, 3, 9, 4), base).batch(torch.arange(3).numpy())
    want = gradient(base, batch, partial(one_by_one, base.model, pieces), theta)
    got = gradient(base, batch, partial(stacked, base.model, pieces), theta, recompute)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(wider(base, batch, pieces, theta), want, rtol=1e-5, atol=1e-7)
    assert base.dtype == torch.float64
    assert float(want.abs().max()) > 1e-4
    assert hook_count(base.model) == 0
