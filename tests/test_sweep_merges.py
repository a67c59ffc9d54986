"""One merge for several tasks as a run of a sweep: the rows are `multitask`'s own, under keys of their own."""

import json
from dataclasses import replace

import pytest

from workbench.base import Base
from workbench.errors import TaskError
from workbench.multitask import multitask
from workbench.pool import Pool
from workbench.sweep.merges import keys_of, members, rows_of
from workbench.sweep.spec import Multitask

NAMES = ("second-animals-commas", "smallest-animals-commas")
LEGO = Multitask("nano", None, {}, NAMES, (), "lego", 0, 3, 2, 4, {"k": 4})


@pytest.fixture(scope="module")
def pool():
    return Pool.open("nano")


@pytest.fixture(scope="module")
def base(pool):
    return Base.load(pool.base, device="cpu")


@pytest.mark.parametrize("control", ["", "sigma"])
def test_rows_are_those_of_multitask(base, pool, control):
    run = replace(LEGO, control=control)
    rows, tasks = rows_of(base, pool, run), members(pool, run)
    whole = multitask(base, pool.stack(NAMES), tasks, {"lego": ("lego", {"k": 4})}, fresh=(), single=False, seed=0)
    want = whole[(whole.variant == "lego") & (whole.control == control)]
    for name in ("adapter", "task", "accuracy", "loss", "scale", "own", "norm"):
        assert [row[name] for row in rows] == pytest.approx(want[name].tolist()), name
    assert [row["key"] for row in rows] == keys_of(base, pool, run)
    assert all(row["seconds"] >= row["merge_seconds"] > 0 for row in rows)


def test_beside_merges(base, pool):
    zero = rows_of(base, pool, replace(LEGO, method="zero-shot", options={}))
    new = rows_of(base, pool, replace(LEGO, method="new adapter", options={"steps": 2}, rank=2))
    best = rows_of(base, pool, replace(LEGO, method="best single", options={}))
    assert [row["task"] for row in zero] == [f"nano/{name}" for name in NAMES]
    assert {row["rank"] for row in new} == {2}
    assert json.loads(best[0]["options"])["of"] in NAMES
    keys = [row["key"] for row in (*zero, *new, *best)]
    assert len(set(keys)) == 6


def test_keys_change_with_what_determines_rows_alone(base, pool):
    keys = keys_of(base, pool, LEGO)
    changes = [
        {"seed": 1},
        {"options": {"k": 5}},
        {"control": "norm"},
        {"rank": 2},
        {"n_test": 5},
        {"adapters": NAMES[::-1]},
    ]
    for change in changes:
        assert not set(keys) & set(keys_of(base, pool, replace(LEGO, **change))), change
    assert keys == keys_of(base, pool, replace(LEGO, load={"device": "cpu"}))


def test_drawn_adapters_and_unknown_tasks(pool):
    drawn = members(pool, replace(LEGO, adapters=3))
    assert len(drawn) == 3
    assert list(drawn) != list(members(pool, replace(LEGO, adapters=3, seed=1)))
    with pytest.raises(TaskError, match="not bundled ones"):
        members(pool, replace(LEGO, adapters=("stranger", "another")))
