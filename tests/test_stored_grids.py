"""The rows that the notebooks draw: whole, of the bundled pool and base, and with room above and below a new adapter."""

from pathlib import Path

import pandas as pd
import pytest

from workbench import Pool
from workbench.nano import world
from workbench.nano.blocks import GRIDS
from workbench.tasks import names

FIGURES = Path(__file__).parents[1] / "figures"


STORED = sorted(path.stem.removeprefix("grid_") for path in FIGURES.glob("grid_*.parquet"))
WHOLE = ("merging", "random", "findings", "relevance", "regularisation", "design", "open")  # of the others, whole jobs


@pytest.fixture(scope="module", params=[name for name in STORED if name in GRIDS])
def grid(request):
    return request.param, pd.read_parquet(FIGURES / f"grid_{request.param}.parquet")


def test_the_grids_that_notebooks_draw_are_stored():
    assert {*WHOLE, "lego", "lorahub"} <= set(STORED)


def test_every_job_ran_on_every_task_and_seed(grid):
    name, rows = grid
    asked = {
        (recipe.label, block.n_train, not block.fixed, block.pool): {(t, s) for t in block.tasks for s in block.seeds}
        for block in GRIDS[name]()
        for recipe in block.recipes
    }
    stored = rows.groupby(["recipe", "n_train", "drawn", "pool_kind"])
    for job, part in stored:
        assert set(zip(part.task, part.seed, strict=True)) == asked[job], job
        assert len(part) == len(asked[job])
    assert len(stored) == len(asked) or (name not in WHOLE and len(stored) > 0.8 * len(asked))
    assert len(rows[["key", "drawn", "pool_kind"]].drop_duplicates()) == len(rows)
    assert rows[["accuracy", "loss"]].notna().all(axis=None)
    assert rows.accuracy.between(0, 1).all()


def test_rows_are_of_the_bundled_base_and_pool(grid):
    rows = grid[1]
    assert set(rows[rows.pool_kind == "nano"].pool) == {Pool.open("nano").digest}
    assert rows.base.nunique() == 1
    assert all(part.pool.nunique() == 1 for _, part in rows.groupby("pool_kind"))


def test_new_adapters_leave_room_above_and_below():
    rows = pd.read_parquet(FIGURES / "grid_merging.parquet")
    fresh = rows[(rows.method == "new adapter") & (rows.n_train == 10)].groupby("task").accuracy.mean()
    assert set(fresh.index) == {name for kind in world.KINDS for name in names(kind)}
    assert fresh.between(0.3, 0.9).sum() >= 24
