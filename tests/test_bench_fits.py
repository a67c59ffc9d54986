"""Fits side by side learn what each learns alone."""

import pytest

from workbench.bench.fits import ALONE, TOGETHER, lines


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    assert [line.way for line in found[:4]] == [ALONE, TOGETHER] * 2
    assert [line.per for line in found[:4]] == [2, 4, 2, 4]
    assert all(line.against == ALONE for line in found[:4])
    assert all(line.error < 1e-5 for line in found[1:4:2])
    whole, setting, steps, validation, test = found[4:]
    parts = sum(line.timing.seconds for line in (setting, steps, validation, test))
    assert whole.timing.seconds <= parts * (1 + 1e-9)  # more where a difference of two times came out below 0
    assert {line.against for line in found[4:]} == {whole.way}
    assert len({line.work for line in found[4:]}) == 1
    assert parts == pytest.approx(whole.timing.seconds, rel=0.5)


def test_other_scales_have_no_lines():
    assert not list(lines("8B", "cpu"))
