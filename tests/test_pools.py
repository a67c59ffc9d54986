"""Pools made beside the bundled one, in a hurry: what is in them, whole or not at all, and not mistaken for another."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from helpers import tiny_base
from workbench import Base, Pool, tasks
from workbench.adapt.gradient import Schedule
from workbench.errors import WorkbenchError
from workbench.nano import pools, world
from workbench.nano.blocks import GRIDS
from workbench.nano.dial import levels_of
from workbench.nano.forge import PRESETS
from workbench.nano.pools import make

HURRY = replace(PRESETS["tiny"], examples=30, adapter=Schedule(steps=4, lr=1e-2, batch=8, every=2))


@pytest.fixture(scope="module")
def bundled():
    return Pool.open("nano")


@pytest.fixture(scope="module")
def base(bundled):
    return Base.load(bundled.base, device="cpu")


@pytest.fixture(scope="module")
def twins(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools") / "deep" / "twins"
    return folder, make("twins", folder, base, preset=HURRY, most=2)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder, tiny = tmp_path_factory.mktemp("pools") / "rank-4", tiny_base()
    return folder, tiny, make("rank-4", folder, tiny, preset=HURRY, most=3)


@pytest.fixture
def nothing_is_trained(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(pools, "train_pool", refuse)


def test_twins_lie_beside_all_bundled_adapters(twins, bundled, base):
    """All are accepted, whatever name the base was loaded under: the dial needs both."""
    folder, pool = twins
    made = [spec.slug for spec in world.TARGETS[:2]]
    assert pool.refused() == {}
    assert sorted(pool.names) == sorted([*bundled.names, *made])
    assert sorted(path.name for path in folder.iterdir()) == sorted(pool.names)
    for name in bundled.names[::9]:
        assert pool.adapter(name).digest() == bundled.adapter(name).digest()
    for name in made:
        adapter, config = pool.adapter(name), json.loads((folder / name / "adapter_config.json").read_text())
        assert {factors.rank for factors in adapter.modules.values()} == {8}
        assert set(adapter.modules) == set(base.projections)
        assert (config["r"], config["lora_alpha"]) == (8, 16)
        assert config["base_model_name_or_path"] == bundled.adapter(bundled.names[0]).base
    task = tasks.load(f"nano/{made[0]}", n_train=2)
    assert levels_of(task, pool) == ("twin", "format", "nothing")  # months are in no bundled adapter
    stack = pool.select("dial twin", 4, task=task, base=base)
    assert stack.names[0] == made[0]
    assert {*stack.names[1:]} <= {*bundled.names}


def test_a_pool_of_one_rank_is_of_the_upstream_tasks(ranked):
    folder, tiny, pool = ranked
    assert pool.names == tuple(sorted(spec.slug for spec in world.UPSTREAM[:3]))
    for name in pool.names:
        assert {factors.rank for factors in pool.adapter(name).modules.values()} == {4}
        assert {factors.scale for factors in pool.adapter(name).modules.values()} == {2.0}
        assert set(pool.adapter(name).modules) == set(tiny.projections)
        assert any(factors.B.abs().max() > 0 for factors in pool.adapter(name).modules.values())
    assert len({pool.adapter(name).digest() for name in pool.names}) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_opening_again_trains_nothing(ranked, twins, base, nothing_is_trained):
    folder, tiny, pool = ranked
    assert make("rank-4", folder, tiny, preset=HURRY, most=3).digest == pool.digest
    assert make("rank-4", folder, tiny, most=2).digest == pool.digest  # it has more than was asked for
    assert make("twins", twins[0], base, most=2).digest == twins[1].digest


def test_another_pool_in_its_place_is_no_substitute(ranked, base, nothing_is_trained):
    folder, tiny, _ = ranked
    with pytest.raises(
        WorkbenchError, match=r"not the pool 'rank-1': rank is not 1; give another folder, or remove it"
    ):
        make("rank-1", folder, tiny, most=3)
    with pytest.raises(WorkbenchError, match=r"not the pool 'rank-4': .* and 0 more are lacking"):
        make("rank-4", folder, tiny, most=4)
    with pytest.raises(WorkbenchError, match=r"not the pool 'twins': .* and 131 more are lacking or refused"):
        make("twins", folder, base)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, save, saved = tmp_path / "new" / "rank-1", pools.save_stranger, []

    def fails_at_the_second(*given):
        saved.append(given)
        if len(saved) == 2:
            raise OSError("disk full")
        return save(*given)

    with monkeypatch.context() as broken:
        broken.setattr(pools, "save_stranger", fails_at_the_second)
        with pytest.raises(OSError, match="disk full"):
            make("rank-1", folder, tiny_base(), preset=HURRY, most=2)
    assert list(folder.parent.iterdir()) == []
    assert len(make("rank-1", folder, tiny_base(), preset=HURRY, most=2)) == 2


@pytest.mark.parametrize("kind", ["twins", "rank-16"])
def test_examples_are_not_the_test_s_and_no_study_draws_them(kind, tmp_path, monkeypatch, bundled):
    """What the training is given: so many examples, no input of the target's test, drawn under a seed of their own."""
    given = []

    def note(base, specs, plans, preset, seeds, draw):
        given.append((specs, plans, seeds, draw))
        raise InterruptedError

    monkeypatch.setattr(pools, "train_pool", note)
    base = replace_name(tiny_base(), bundled.base)
    with pytest.raises(InterruptedError):
        make(kind, tmp_path / kind, base)
    ((specs, plans, seeds, draw),) = given
    assert tuple(specs) == (world.TARGETS if kind == "twins" else world.UPSTREAM)
    assert {plan.rank for plan in plans} == {8 if kind == "twins" else 16}
    assert len(set(seeds)) == len(specs)
    for spec in specs[::25]:
        task = world.make_task(spec, seed=draw, n_train=PRESETS["nano"].examples, n_test=2000)
        drawn, tests = [example.input for example in task.train], {example.input for example in task.test}
        assert (len(set(drawn)), len(tests)) == (4000, 2000)
        assert not set(drawn) & tests
        few = [world.make_task(spec, seed=seed, n_train=80).train for seed in range(5)]
        assert all(examples != task.train[:80] for examples in few)
    assert draw not in {seed for grid in GRIDS.values() for block in grid() for seed in block.seeds}


def replace_name(base, name):
    return Base(base.model, base.tokenizer, name)


def test_seeds_of_different_pools_are_apart():
    first = sorted(pools._SEEDS.values())
    assert all(b - a >= max(len(world.TARGETS), len(world.UPSTREAM)) for a, b in pairwise(first))


def test_what_cannot_be_made_is_said(tmp_path, nothing_is_trained):
    tiny = tiny_base()
    with pytest.raises(WorkbenchError, match="no pool 'rank-3'; choose one of twins, rank-1, rank-4, rank-16"):
        make("rank-3", tmp_path / "a", tiny)
    with pytest.raises(
        WorkbenchError, match="twins lie beside the bundled adapters, so they need the bundled base, got 'tiny'"
    ):
        make("twins", tmp_path / "a", tiny)
    for most in (0, -1):
        with pytest.raises(WorkbenchError, match=f"most is {most}, expected at least one task"):
            make("rank-4", tmp_path / "a", tiny, most=most)
    assert list(tmp_path.iterdir()) == []
