"""Fits side by side learn what each learns alone."""

from dataclasses import replace

from workbench.bench import fits
from workbench.bench.fits import ALONE, TOGETHER, lines


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    assert [line.way for line in found[:4]] == [ALONE, TOGETHER] * 2
    assert [line.per for line in found[:4]] == [2, 4, 2, 4]
    assert all(line.against == ALONE for line in found[:4])
    assert all(line.error < 1e-5 for line in found[1:4:2])
    assert {line.against for line in found[4:]} == {fits.WHOLE}
    assert len({line.work for line in found[4:]}) == 1


def test_the_parts_of_a_fit_are_differences_of_times(monkeypatch):
    """Nothing but the set-up took 1 s, with the steps 3, with validation 6, and the test of what was fitted 2."""
    clock, real = iter([1.0] * 4 + [1.0, 3.0, 6.0, 2.0]), fits.timed
    monkeypatch.setattr(fits, "timed", lambda *given, **how: replace(real(*given, **how), seconds=next(clock)))
    *_, whole, setting, steps, validation, test = lines("nano", "cpu", quick=True)
    assert [line.timing.seconds for line in (whole, setting, steps, validation, test)] == [8, 1, 2, 3, 2]
    assert [line.note for line in (whole, test)] == ["100%", "25%"]


def test_other_scales_have_no_lines():
    assert not list(lines("8B", "cpu"))
