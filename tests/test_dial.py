"""The relevance dial: levels by hand, what each selection puts first and fills up with, and what it cannot rank."""

from collections import Counter
from types import SimpleNamespace

import pytest

from workbench import Pool
from workbench.errors import SelectionError
from workbench.nano import dial, world
from workbench.nano.dial import LEVELS, level, levels_of
from workbench.nano.world import Spec
from workbench.select import SELECTIONS, choose
from workbench.tasks import Example, Task

TARGET = Spec("rotate right", "months", "commas")
PAIR = Spec("rotate right then predecessor", "letters", "plain")


@pytest.fixture(scope="module")
def pool():
    return Pool.open("nano")


@pytest.fixture(scope="module")
def twins(pool):
    """The names that the pool of near-twins has; a ranking reads no more than names."""
    return SimpleNamespace(name="twins", names=(*pool.names, *(spec.slug for spec in world.TARGETS)))


def task(spec):
    """The task by its name, which is all that the dial reads."""
    return Task(f"nano/{spec.slug}", spec.instruction, (), (), ())


def levels_by_hand(spec, names):
    """Level → names, by what the two have in common, one fact after the other."""
    found = {}
    for name in names:
        other = world.find(name)
        shares = {part for part in spec.operation.split(" then ") if part in other.operation.split(" then ")}
        facts = (bool(shares), spec.format == other.format, spec.domain == other.domain)
        if facts == (True, True, True) and spec.operation == other.operation:
            which = "twin"
        elif facts[0]:
            which = "operation"
        else:
            which = {(1, 1): "both", (1, 0): "format", (0, 1): "domain", (0, 0): "nothing"}[facts[1:]]
        found.setdefault(which, set()).add(name)
    return found


@pytest.mark.parametrize(
    ("target", "upstream", "expected"),
    [
        (TARGET, Spec("rotate right", "months", "commas"), "twin"),
        (TARGET, Spec("rotate right", "months", "commas", "upstream", copy=1), "twin"),
        (TARGET, Spec("rotate right", "months", "plain"), "operation"),
        (TARGET, Spec("rotate right", "letters", "commas"), "operation"),
        (TARGET, Spec("rotate right", "letters", "plain"), "operation"),
        (TARGET, Spec("sort then rotate right", "months", "commas"), "operation"),
        (TARGET, Spec("second", "months", "commas"), "both"),
        (TARGET, Spec("second", "letters", "commas"), "format"),
        (TARGET, Spec("second", "months", "plain"), "domain"),
        (TARGET, Spec("second", "letters", "plain"), "nothing"),
        (TARGET, Spec("rotate left", "letters", "plain"), "nothing"),  # a word in common is no operation in common
        (PAIR, Spec("rotate right then predecessor", "letters", "plain"), "twin"),
        (PAIR, Spec("predecessor", "digits", "arrows"), "operation"),
        (PAIR, Spec("predecessor then rotate right", "letters", "plain"), "operation"),
        (PAIR, Spec("second", "letters", "plain"), "both"),
    ],
)
def test_what_two_tasks_have_in_common(target, upstream, expected):
    assert level(target, upstream) == expected


def test_nothing_is_where_relevance_is_zero_and_a_twin_is_of_relevance_two():
    for target in world.TARGETS:
        for upstream in world.UPSTREAM + world.TARGETS:
            which, shared = level(target, upstream), world.relevance(target, upstream)
            assert (which == "nothing") == (shared == 0)
            assert (which == "twin") <= (shared == 2)
            assert (which in ("format", "domain")) <= (shared == 0.5)


@pytest.mark.parametrize("which", LEVELS)
@pytest.mark.parametrize("spec", world.TARGETS[::7], ids=lambda spec: spec.slug)
def test_one_of_the_level_then_nothing_shared_then_the_rest(twins, spec, which):
    by_hand = levels_by_hand(spec, twins.names)
    if which not in by_hand:
        with pytest.raises(
            SelectionError, match=f"no adapter at level '{which}' for nano/{spec.slug}; it has .*nothing"
        ):
            SELECTIONS[f"dial {which}"](twins, task=task(spec), seed=0)
        return
    for seed in range(3):
        ranked = SELECTIONS[f"dial {which}"](twins, task=task(spec), seed=seed)
        assert sorted(ranked) == sorted(twins.names)  # all of them, none twice
        assert ranked[0] in by_hand[which]
        fillers = by_hand["nothing"] - {ranked[0]}
        assert set(ranked[1 : 1 + len(fillers)]) == fillers
        assert len(fillers) >= 9  # enough for stacks of ten


def test_every_adapter_of_the_level_can_be_the_one(pool):
    target = task(world.find("rotate-right-months"))
    found = levels_by_hand(world.find("rotate-right-months"), pool.names)["operation"]
    assert {choose(pool, "dial operation", 1, task=target, seed=seed)[0] for seed in range(60)} == found
    assert len(found) > 3


def test_the_seed_alone_draws(pool):
    target = task(world.find("rotate-right-months"))
    drawn = [choose(pool, "dial operation", 10, task=target, seed=seed) for seed in range(5)]
    assert drawn == [choose(pool, "dial operation", 10, task=target, seed=seed) for seed in range(5)]
    assert len({tuple(names) for names in drawn}) == len({frozenset(names[1:]) for names in drawn}) == 5
    reordered = SimpleNamespace(names=tuple(pool.names))
    assert SELECTIONS["dial operation"](reordered, task=target, seed=3)[:10] == drawn[3]


@pytest.mark.parametrize("spec", world.TARGETS[::7], ids=lambda spec: spec.slug)
def test_two_levels_differ_by_one_adapter(twins, spec):
    for seed in range(3):
        at = {
            which: SELECTIONS[f"dial {which}"](twins, task=task(spec), seed=seed)[:10]
            for which in levels_of(task(spec), twins)
        }
        nothing = at.pop("nothing")
        assert at
        for names in at.values():
            assert names[1:] == nothing[:9]


def test_the_levels_that_a_pool_has(pool, twins):
    for spec in world.TARGETS:
        for where in (pool, twins):
            by_hand = levels_by_hand(spec, where.names)
            assert levels_of(task(spec), where) == tuple(which for which in LEVELS if which in by_hand)
        assert "twin" not in levels_of(task(spec), pool)  # no target is an upstream task
        assert "twin" in levels_of(task(spec), twins)
    kinds = Counter((spec.kind, which) for spec in world.TARGETS for which in levels_of(task(spec), pool))
    assert {kind for kind, which in kinds if which == "operation"} == {"relative", "composition"}
    assert [which for which in LEVELS if kinds["unrelated", which]] == ["nothing"]


def test_the_choice_is_registered_for_recipes():
    assert {f"dial {which}" for which in LEVELS} <= set(SELECTIONS)
    assert set(dial.__all__) == {"LEVELS", "level", "levels_of"}


def test_what_the_dial_cannot_rank_is_said(pool):
    stranger = Task("mine", "say", (Example("a", "b"),), (), ())
    target = task(world.TARGETS[0])
    foreign = SimpleNamespace(name="hub", names=(world.UPSTREAM[0].slug, "alpaca-7b"))
    for ask in (levels_of, lambda task, pool: choose(pool, "dial nothing", 1, task=task)):
        with pytest.raises(SelectionError, match="bundled tasks and adapters only; got task 'mine'"):
            ask(stranger, pool)
        with pytest.raises(SelectionError, match="bundled tasks and adapters only; got no task"):
            ask(None, pool)
    with pytest.raises(SelectionError, match="got adapter 'alpaca-7b'"):
        levels_of(target, foreign)
    with pytest.raises(SelectionError, match="no adapter at level 'twin' for nano/mirror-months; it has"):
        choose(pool, "dial twin", 10, task=target)
