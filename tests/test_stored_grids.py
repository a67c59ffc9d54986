"""The rows that the notebooks draw: whole, of the bundled pool and base, and with room above and below a new adapter."""

from pathlib import Path

import pandas as pd
import pytest

from workbench import Pool
from workbench.nano import world
from workbench.nano.grids import GRIDS
from workbench.tasks import names

FIGURES = Path(__file__).parents[1] / "figures"


@pytest.fixture(scope="module", params=sorted(GRIDS))
def grid(request):
    return request.param, pd.read_parquet(FIGURES / f"grid_{request.param}.parquet")


def test_every_recipe_ran_on_every_task_and_seed(grid):
    name, rows = grid
    expected = 0
    for recipes, baselines, settings in GRIDS[name]:
        controlled = sum(not r.control for r in recipes) if settings.get("control", "sigma") else 0
        expected += (len(recipes) + controlled + len(baselines)) * len(settings["tasks"]) * len(settings["seeds"])
    assert len(rows) == expected
    assert rows.key.is_unique
    assert rows[["accuracy", "loss"]].notna().all(axis=None)
    assert rows.accuracy.between(0, 1).all()


def test_rows_are_of_the_bundled_pool(grid):
    assert set(grid[1].pool) == {Pool.open("nano").digest}


def test_new_adapters_leave_room_above_and_below():
    rows = pd.read_parquet(FIGURES / "grid_merging.parquet")
    fresh = rows[(rows.method == "new adapter") & (rows.n_train == 10)].groupby("task").accuracy.mean()
    assert set(fresh.index) == {name for kind in world.KINDS for name in names(kind)}
    assert fresh.between(0.3, 0.9).sum() >= 24
