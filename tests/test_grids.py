"""The grids behind the notebooks: what they ask for, shared among processes, gathered; the design's sample."""

from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import workbench as wb
from helpers import random_adapter
from workbench import experiment
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe
from workbench.nano import dial, grids, pools, world
from workbench.nano.blocks import DESIGN, GRIDS, Block, design
from workbench.nano.grids import gather, job_path, jobs, run_grids
from workbench.pool import Pool
from workbench.runs import Case
from workbench.tasks import Task


@pytest.fixture(scope="module")
def base():
    return wb.Base.load(Pool.open("nano").base, device="cpu")


@pytest.fixture
def small(monkeypatch):
    """A grid of two blocks, one with fixed examples, both without any fitting."""

    def blocks():
        recipes = [Recipe("zero-shot"), Recipe("in-context", shots=1)]
        sizes = {"n_train": 4, "n_validation": 2, "n_test": 3}
        yield Block(recipes, ("nano/ends-months", "nano/second-days"), (1, 0), **sizes)
        yield Block(recipes[1:], ("nano/ends-months",), (0, 1), fixed=True, **sizes)

    monkeypatch.setitem(GRIDS, "small", blocks)
    return blocks


def test_grids_are_well_formed():
    bundled = set(wb.tasks.names())
    stand_in = SimpleNamespace(digest="b", dtype=torch.float32, device=torch.device("cpu"))
    for name, blocks in GRIDS.items():
        keys, paths = [], []
        for block in blocks():
            assert set(block.tasks) <= bundled
            assert len(set(block.tasks)) == len(block.tasks) > 10
            assert block.pool in ("nano", "twins", *(f"rank-{rank}" for rank in pools.RANKS))
            assert len(set(block.recipes)) == len(block.recipes)
            task = Task(f"{block.n_train}", "do", (), (), ())
            for recipe in block.recipes:
                assert recipe.k + recipe.skip <= 72
                keys.append(
                    (
                        experiment.key_of(stand_in, stand_in, Case(task, 0), recipe),
                        block.pool,
                        block.fixed,
                        str(block.tasks),
                    )
                )
                paths.append(job_path(name, block, recipe, grids.Path("x")))
        assert len(set(keys)) == len(keys) == len(set(paths))


@pytest.mark.parametrize("grid", ["findings", "relevance", "lorahub", "open"])
def test_a_grid_for_claims_has_five_seeds_and_every_target_of_every_kind(grid):
    counted = [block for block in GRIDS[grid]() if "dial" not in str(block.recipes)]
    assert counted
    for block in counted:
        kinds = Counter(world.find(name.removeprefix("nano/")).kind for name in block.tasks)
        assert kinds == dict.fromkeys(world.KINDS, 12)
        assert len(set(block.seeds)) == 5


def test_every_merge_and_fit_has_its_control_and_a_new_adapter_beside_it():
    for name in ("findings", "lorahub", "regularisation", "open", "relevance", "design"):
        recipes = {recipe for block in GRIDS[name]() for recipe in block.recipes}
        assert any(recipe.control == "sigma" for recipe in recipes)
        has_new = any(recipe.method == "new adapter" for recipe in recipes)
        assert has_new or name in ("open", "relevance")  # those are read beside grid_findings
    assert {"sigma", "norm", "spectrum", "shuffled", "sigma but own"} <= {
        recipe.control for block in GRIDS["findings"]() for recipe in block.recipes
    }


def test_the_dial_asks_only_where_there_is_such_an_adapter():
    for block in GRIDS["relevance"]():
        for recipe in block.recipes:
            if recipe.select.startswith("dial ") and recipe.select != "dial twin":
                which = recipe.select.removeprefix("dial ")
                specs = [world.find(name.removeprefix("nano/")) for name in block.tasks]
                assert all(which in {dial.level(spec, up) for up in world.UPSTREAM} for spec in specs)


def test_the_design_takes_every_value_of_a_choice_equally_often():
    recipes = design(240)
    for name, values in DESIGN.items():
        if name in ("k", "select", "own"):
            counts = Counter(getattr(recipe, name) for recipe in recipes)
        else:
            counts = Counter(dict(recipe.options)[name] for recipe in recipes)
        assert counts == dict.fromkeys(values, 240 // len(values))
    assert design(10) == design(10) != design(10, seed=1)
    assert len(set(recipes)) == 240
    uneven = Counter(recipe.select for recipe in design(7, space={**DESIGN, "k": (5,)}))
    assert max(uneven.values()) - min(uneven.values()) == 1
    with pytest.raises(WorkbenchError, match="3 recipes asked for, but the space has 2"):
        design(3, space={"k": (5, 10)})


def test_jobs_are_shared_stored_and_gathered(small, tmp_path, base, monkeypatch):
    """Two processes in turn by claims, a third that finds all stored; the file is sorted and complete."""
    lines = []
    ours, folder = jobs(["small"]), tmp_path / "runs"
    assert len(ours) == 3
    with pytest.raises(WorkbenchError, match=r"3 of 3 jobs of small are not stored in .*; run them first"):
        gather("small", folder, tmp_path)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / job_path(*ours[1], folder).stem).touch()  # another process is at it
    run_grids(["small"], folder, claims=tmp_path / "claims", device="cpu", say=lines.append)
    assert len(lines) == 2
    with pytest.raises(WorkbenchError, match="1 of 3"):
        gather("small", folder, tmp_path)
    part = pd.read_parquet(gather("small", folder, tmp_path / "part", partial=True))
    assert part.groupby(["recipe", "n_train"]).ngroups == 2
    with pytest.raises(WorkbenchError, match="3 of 3"):
        gather("small", tmp_path / "nothing", tmp_path / "part of nothing", partial=True)
    run_grids(["small"], folder, device="cpu", say=lines.append)
    assert len(lines) == 3
    run_grids(["small"], folder, device="cpu", say=lines.append)
    assert len(lines) == 3
    path = gather("small", folder, tmp_path / "out")
    table = pd.read_parquet(path)
    assert len(table) == 4 + 4 + 2
    order = table[["recipe", "task", "seed", "n_train"]].to_numpy().tolist()
    assert order == sorted(order)
    assert set(table["pool_kind"]) == {"nano"}
    assert not {"versions", "platform", "split"} & set(table)
    assert (table.dtypes["accuracy"], table.dtypes["loss"]) == ("float32", "float32")
    before = path.read_bytes()
    assert gather("small", folder, tmp_path / "out").read_bytes() == before
    again = tmp_path / "again"  # from here on the gathered rows stand for jobs that the folder lacks
    with pytest.raises(WorkbenchError, match="3 of 3"):
        gather("small", again, tmp_path / "elsewhere")
    assert gather("small", again, tmp_path / "out").read_bytes() == before
    run_grids(["small"], again, gathered=tmp_path / "out", device="cpu", say=lines.append)
    assert len(lines) == 3
    kept = table[table["recipe"] != "zero-shot"]
    kept.assign(loss=7.0).to_parquet(path, index=False)
    run_grids(["small"], again, gathered=tmp_path / "out", device="cpu", say=lines.append)
    assert len(lines) == 4
    mended = pd.read_parquet(gather("small", again, tmp_path / "out"))
    assert (mended[mended["recipe"] != "zero-shot"]["loss"] == 7.0).all()
    kept = (rows[rows["recipe"] == "zero-shot"][["key", "loss"]] for rows in (mended, table))
    pd.testing.assert_frame_equal(*kept, check_dtype=False)
    fixed = table[~table["drawn"]]
    drawn = table[table["drawn"] & (table["recipe"] == fixed["recipe"].iloc[0]) & (table["task"] == "nano/ends-months")]
    assert fixed["tokens_per_example"].notna().all()
    assert sorted(fixed["seed"]) == [0, 1]
    at = drawn.set_index("seed")
    assert fixed.set_index("seed").loc[0, "loss"] == at.loc[0, "loss"]
    assert fixed.set_index("seed").loc[1, "loss"] != at.loc[1, "loss"]


def test_a_grid_over_another_pool_makes_it_first(small, tmp_path, base, monkeypatch):
    made = []

    def make(kind, folder, given):
        made.append((kind, folder))
        if not folder.is_dir():
            random_adapter(given, 2, 0, name="a").save(folder / "a")
        return Pool.open(folder, base=Pool.open("nano").base)

    def blocks():
        yield Block([Recipe("average", k=1)], ("nano/ends-months",), (0,), 4, 2, 3, pool="rank-4")

    monkeypatch.setattr(pools, "make", make)
    monkeypatch.setitem(GRIDS, "small", blocks)
    run_grids(["small"], tmp_path, device="cpu", say=lambda line: None)
    assert set(made) == {("rank-4", tmp_path / "pools" / "rank-4")}
    table = pd.read_parquet(gather("small", tmp_path, tmp_path))
    assert table["pool_kind"].tolist() == ["rank-4"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(grids, "run_grids", lambda names, folder, **how: ran.append((names, str(folder), how)))
    monkeypatch.setattr(grids, "gather", lambda name, folder, out, **how: ran.append(("gather", name)) or out / name)
    grids.main(["--out", str(tmp_path), "--results", "r", "--grid", "random", "--claims", "c"])
    assert ran == [(["random"], "r", {"claims": grids.Path("c"), "gathered": None})]
    ran.clear()
    grids.main(["--out", str(tmp_path), "--results", "r", "--grid", "random", "--claims", "c", "--missing"])
    assert ran == [(["random"], "r", {"claims": grids.Path("c"), "gathered": tmp_path})]
    ran.clear()
    grids.main(["--out", str(tmp_path), "--grid", "random", "--gather"])
    assert ran == [("gather", "random")]
    ran.clear()
    grids.main(["--out", str(tmp_path)])
    assert [one[-1] for one in ran[1:]] == list(GRIDS)
    assert str(tmp_path / "random") in capsys.readouterr().out
