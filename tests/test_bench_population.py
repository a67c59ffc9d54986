"""Ours and the ways it is compared with compute the same; not how fast they are."""

import pytest
import torch

from helpers import hook_count
from workbench.bench import random_adapters, random_base
from workbench.bench.population import AREA, BARE, EACH, OURS, PEFT, WHOLE, by_state_dicts, lines, random_rows
from workbench.compose import grouped, shared
from workbench.evaluate import score
from workbench.stack import Stack


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    works = list(dict.fromkeys(line.work for line in found))
    assert len(works) == 1 + 2 + 4
    each, whole = found[:2]
    assert (each.way, whole.way, whole.against, whole.per) == (EACH, WHOLE, EACH, 3)
    assert whole.error < 1e-5
    for work in works[1:]:
        ways = {line.way: line for line in found if line.work == work}
        assert set(ways) in ({OURS, BARE, PEFT}, {OURS, BARE})
        assert all(line.area == AREA and line.timing.seconds > 0 and line.operations > 0 for line in ways.values())
        assert ways[OURS].against == ways[BARE].against == (PEFT if PEFT in ways else BARE)
        assert ways[OURS].per == ways[BARE].per == int(work.split()[0])
        assert 1 < ways[OURS].operations / ways[BARE].operations < 2.5
        assert "× bare, of 1." in ways[OURS].note
    errors = [line.error for line in found if line.error is not None]
    assert len(errors) == 2 + 1
    assert max(errors) < 1e-4


def test_the_share_of_operations():
    """20 adapters of rank 16 on the seven projections of an 8B model add 12 % to its layers'."""
    from workbench.bench import SCALES

    shapes = SCALES["8B"].shapes().values()
    share = 320 * sum(a + b for a, b in shapes) / sum(a * b for a, b in shapes)
    assert share == pytest.approx(0.12, abs=0.001)


def test_state_dicts_are_summed_factor_by_factor():
    base = random_base("nano", layers=2)
    rows = random_rows(base, 3, 12, 4, common=5)
    assert len({row.prompt[:5] for row in rows}) == 1
    assert {(len(row.prompt), len(row.answer)) for row in rows} == {(12, 4)}
    adapters = random_adapters(base.projections, 3, 4)
    plain = score(base, [rows]).loss
    with by_state_dicts(base, rows, adapters) as losses:
        found = losses(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, -0.7], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found[0], score(base, [rows], grouped(adapters[1:2])).loss[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], plain[0], rtol=1e-4, atol=1e-5)
    mixed = [
        type(adapters[0])(
            "mixed",
            {
                m: type(f)(0.5 * f.B - 0.7 * adapters[2].modules[m].B, 0.5 * f.A - 0.7 * adapters[2].modules[m].A)
                for m, f in adapters[0].modules.items()
            },
        )
    ]
    torch.testing.assert_close(found[1], score(base, [rows], grouped(mixed)).loss[0], rtol=1e-4, atol=1e-5)
    assert hook_count(base.model) == 0
    assert set(base.projections) == set(adapters[0].modules)  # peft's layers are gone
    torch.testing.assert_close(score(base, [rows]).loss, plain)
    ours = score(base, [rows], shared(Stack.of(adapters), torch.eye(3)[1:2])).loss
    torch.testing.assert_close(ours[0], found[0], rtol=1e-4, atol=1e-5)
