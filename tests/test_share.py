"""What processes that share jobs make once: claims, waiting, rankings and own adapters that all read alike."""

import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch

from helpers import six_adapters, solved_task, tiny_base, train_briefly
from workbench import baselines, select
from workbench.adapters import Adapter
from workbench.errors import AdapterError
from workbench.experiment import Recipe, compare
from workbench.nano import share
from workbench.nano.share import asks_for_own, asks_for_rankings, claimed, once, share_own, share_rankings
from workbench.pool import Pool
from workbench.runs import OWN, Case, Workplace
from workbench.select import CLOSENESS, SELECTIONS, rank_adapters


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=12.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("pool")
    six_adapters(base, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(base, home):
    pool = Pool.open(home)
    return [
        replace(solved_task(base, pool.adapter(f"n{i}"), i, (6, 4, 8)), name=name, labels={"operation": name})
        for i, name in ((1, "one"), (3, "two"))
    ]


@pytest.fixture
def quick(monkeypatch):
    """Own adapters in few steps."""
    train_briefly(monkeypatch)


def test_what_is_claimed_is_made_by_one_and_awaited_by_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(share, "PAUSE", 0.01)
    made, claims = [], tmp_path / "claims"
    paths = [tmp_path / "out" / name for name in "abc"]
    paths[0].parent.mkdir()

    def work(which):
        return [(path, lambda path=path: (made.append((which, path.name)), path.touch())) for path in paths]

    paths[0].touch()  # there already
    assert claimed(claims, "out-b")  # another process is at it
    assert not claimed(claims, "out-b")
    threading.Timer(0.2, paths[1].touch).start()
    once(work("first"), claims)
    assert made == [("first", "c")]
    once(work("second"), claims)
    assert made == [("first", "c")]
    paths[1].unlink()
    monkeypatch.setattr(share, "PATIENCE", 0.05)
    once(work("third"), claims)  # the process that claimed it is gone
    assert made == [("first", "c"), ("third", "b")]
    paths[2].unlink()
    once(work("alone"), None)
    assert made[2:] == [("alone", "c")]


def test_others_work_is_awaited_last(tmp_path, monkeypatch):
    """What is free is made before any waiting."""
    monkeypatch.setattr(share, "PATIENCE", 0.0)
    made, claims = [], tmp_path / "claims"
    claimed(claims, f"{tmp_path.name}-a")
    once([(tmp_path / name, lambda name=name: made.append(name)) for name in "ab"], claims)
    assert made == ["b", "a"]


def test_rankings_are_made_once_and_read_by_all(base, home, tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(share.CHUNK, "rankings", 1)
    cases = [Case(task, 0) for task in (*tasks, tasks[0])]
    places = [Workplace(base, Pool.open(home)) for _ in range(2)]
    share_rankings(places[0], cases, tmp_path, tmp_path / "claims")
    assert len(list((tmp_path / "rankings").iterdir())) == 2  # one a case, and a case asked for twice is one
    monkeypatch.setattr(share, "rank_adapters", None)
    share_rankings(places[1], cases, tmp_path, tmp_path / "claims")
    monkeypatch.setattr(select, "_score_all", None)
    fresh = Pool.open(home)
    read = [rank_adapters(places[1].pool, task, base) for task in tasks]
    monkeypatch.undo()
    for task, table in zip(tasks, read, strict=True):
        pd.testing.assert_frame_equal(table, rank_adapters(fresh, task, base))
    assert read[0]["name"].tolist() != read[1]["name"].tolist()


def test_own_adapters_are_trained_once_and_read_by_all(base, home, tasks, tmp_path, quick, monkeypatch):
    cases = [Case(task, seed) for task in tasks for seed in (0, 1)]
    places = [Workplace(base, Pool.open(home)) for _ in range(3)]
    share_own(places[0], cases, tmp_path, tmp_path / "claims")
    monkeypatch.setitem(baselines._TRAINERS, "new adapter", None)
    share_own(places[1], cases, tmp_path, tmp_path / "claims")
    first, second = places[0].own(cases), places[1].own(cases)
    monkeypatch.undo()
    train_briefly(monkeypatch)
    for one, other, direct in zip(first, second, places[2].own(cases), strict=True):
        assert one.name == other.name == direct.name == OWN
        assert one.digest() == other.digest()
        for module, factors in direct.modules.items():
            torch.testing.assert_close(one.modules[module].delta(), factors.delta(), rtol=1e-6, atol=1e-9)
    assert len({adapter.digest() for adapter in first}) == 4


def test_an_own_adapter_that_diverged_is_left_to_who_needs_it(base, home, tasks, tmp_path, quick, monkeypatch):
    cases, save = [Case(task, 0) for task in tasks], Adapter.save

    def unlucky(self, folder, **how):
        if tasks[0].digest()[:24] in str(folder):
            raise AdapterError("a value is not finite")
        return save(self, folder, **how)

    monkeypatch.setattr(Adapter, "save", unlucky)
    place = Workplace(base, Pool.open(home))
    share_own(place, cases, tmp_path, None)
    assert len(list((tmp_path / "own").glob("*.done"))) == 1
    assert len([path for path in (tmp_path / "own").iterdir() if path.is_dir()]) == 1
    assert len(place.own(cases)) == 2


def test_which_recipes_ask_for_what():
    for how in SELECTIONS:
        if not how.startswith("dial"):
            assert asks_for_rankings(Recipe("average", select=how)) == (how in ("evaluation", "diverse"))
            assert asks_for_own(Recipe("average", select=how)) == (how in CLOSENESS)
    assert asks_for_own(Recipe("average", own=True))
    assert asks_for_rankings(Recipe("best single"))
    assert not asks_for_rankings(Recipe("best single", among="random"))
    assert not asks_for_rankings(Recipe("zero-shot"))


def test_rows_are_those_of_a_comparison_alone(base, home, tasks, tmp_path, quick):
    """Evaluation, closeness and own among the chosen: sharing changes no row."""
    recipes = [Recipe("average", select=how, k=2, own=own) for how, own in (("evaluation", True), ("cosine", False))]
    settings = {"baselines": (), "control": "", "seeds": (0, 1)}
    place = Workplace(base, Pool.open(home))
    cases = [Case(task, seed) for task in tasks for seed in (0, 1)]
    share_rankings(place, cases, tmp_path, None)
    share_own(place, cases, tmp_path, None)
    shared = compare(base, place.pool, tasks, recipes, place=place, **settings)
    alone = compare(base, Pool.open(home), tasks, recipes, **settings)
    assert shared["chosen"].tolist() == alone["chosen"].tolist()
    assert shared["loss"].to_numpy() == pytest.approx(alone["loss"].to_numpy(), rel=1e-5)
