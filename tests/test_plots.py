"""Figures carry their data and their caption, leave no global state behind, and show what the table says."""

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from workbench import plots
from workbench.errors import WorkbenchError

TABLE = pd.DataFrame(
    {
        "kind": ["latent", "relative"] * 2,
        "who": ["merge", "merge", "new", "new"],
        "k": [5, 10, 5, 10],
        "mean": [0.2, 0.8, 0.9, 0.6],
        "low": [0.1, 0.7, 0.8, float("nan")],
        "high": [0.4, 0.9, 1.0, float("nan")],
    }
)


@pytest.fixture(autouse=True)
def closed():
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def test_intervals_draw_every_mean_with_its_interval():
    _, ax = plots.figure()
    drawn = plots.intervals(ax, TABLE, x="kind", series="who", label="exact match")
    assert [artist.get_label() for artist in drawn] == ["merge", "new"]
    heights = [y for artist in drawn for y in artist.lines[0].get_ydata()]
    assert heights == [0.2, 0.8, 0.9, 0.6]
    first = drawn[0].lines[2][0].get_segments()[0]
    assert first[:, 1].tolist() == pytest.approx([0.1, 0.4])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["latent", "relative"]
    assert ax.get_ylabel() == "exact match"


def test_curves_bars_heatmap_and_units_show_the_table():
    _, axes = plots.figure(2, 2)
    lines = plots.curves(axes[0, 0], TABLE, x="k", series="who", log=True)
    assert [line.get_ydata().tolist() for line in lines] == [[0.2, 0.8], [0.9, 0.6]]
    assert [text.get_text() for text in axes[0, 0].get_xticklabels()] == ["5", "10"]
    bars = plots.bars(axes[0, 1], pd.Series({"a": 3, "b": 1}), label="rank")
    assert [bar.get_height() for bar in bars] == [3, 1]
    image = plots.heatmap(axes[1, 0], pd.DataFrame([[0.0, 1.0], [0.5, -1.0]]), limits=(-1, 1))
    assert image.get_array().tolist() == [[0.0, 1.0], [0.5, -1.0]]
    flat = pd.DataFrame({"x": range(4), "y": range(4), "norm": 1.0, "operation": ["sort", "sort", "first", "last"]})
    assert len(plots.units(axes[1, 1], flat, by="operation", most=2)) == 3  # two operations, and the rest in grey


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax, t: plots.intervals(ax, t.drop(columns="low"), x="kind"),
        lambda ax, t: plots.curves(ax, t, x="steps", series="who"),
        lambda ax, t: plots.units(ax, t, by="who"),
    ],
)
def test_a_missing_column_is_named(draw):
    _, ax = plots.figure()
    with pytest.raises(WorkbenchError, match="the table has no column"):
        draw(ax, TABLE)


def test_a_saved_figure_has_its_data_and_caption_beside_it_and_no_time_stamp(tmp_path):
    fig, ax = plots.figure()
    plots.curves(ax, TABLE, x="k", series="who")
    for folder in ("one", "two"):
        plots.save(fig, tmp_path / folder, "03_test", TABLE, caption="What it shows.", made={"seed": 0})
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"03_test.pdf", "03_test.png", "03_test.csv", "03_test.json"}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert pd.read_csv(tmp_path / "one" / "03_test.csv").shape == TABLE.shape
    note = json.loads((tmp_path / "one" / "03_test.json").read_text())
    assert note["caption"] == "What it shows."
    assert note["made"] == {"seed": 0}
    assert (
        b"/FontFile2" in (tmp_path / "one" / "03_test.pdf").read_bytes()
        or b"/TrueType" in (tmp_path / "one" / "03_test.pdf").read_bytes()
    )
    with pytest.raises(WorkbenchError, match="no data behind"):
        plots.save(fig, tmp_path, "empty", TABLE.iloc[:0], caption="")
