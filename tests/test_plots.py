"""Figures carry their data and their caption, leave no global state behind, and show what the table says."""

import json
from itertools import pairwise

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


def test_labels_of_a_logarithmic_axis_are_not_drawn_over_one_another():
    """Upright in a narrow panel 256 would lie on 342, the largest, which stays; its tick stays too."""
    ks = [1, 4, 16, 64, 256, 342]
    fig, axes = plots.figure(1, 4)
    for ax, width in ((axes[0], "narrow"), (plots.figure(1, 1)[1], "wide")):
        plots.curves(ax, pd.DataFrame({"k": ks, "mean": 0.5, "who": "a"}), x="k", series="who", log=True)
        ax.tick_params(axis="x", rotation=90)
        labels = [text.get_text() for text in ax.get_xticklabels()]
        assert labels == ["1", "4", "16", "64", "" if width == "narrow" else "256", "342"]
        assert ax.get_xticks().tolist() == ks
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in axes[0].get_xticklabels() if text.get_text()]
    assert all(one.x1 <= other.x0 for one, other in pairwise(boxes))


REPORT = pd.DataFrame(
    {
        "n_train": [10, 10, 10, 80, 80],
        "recipe": ["ties", "lego", "zero-shot", "ties", "lego"],
        "control_difference": [0.2, -0.1, float("nan"), 0.3, 0.0],
        "control_low": [0.1, -0.3, float("nan"), 0.2, float("nan")],
        "control_high": [0.4, 0.1, float("nan"), 0.5, float("nan")],
        "control_holm": [0.049, 0.05, float("nan"), 0.0, float("nan")],
    }
)


def filled(marks):
    return [tuple(face) != (1, 1, 1, 1) for face in marks.get_facecolors()]


def test_a_forest_has_a_row_per_recipe_and_fills_what_is_significant():
    _, ax = plots.figure()
    ten, eighty = plots.forest(ax, REPORT, series="n_train", label="difference")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["ties", "lego"]  # a baseline has no control
    assert ax.get_ylim() == (1.5, -0.5)  # the first on top
    assert [ten.get_offsets()[:, 0].tolist(), eighty.get_offsets()[:, 0].tolist()] == [[0.2, -0.1], [0.3, 0.0]]
    rows = [ten.get_offsets()[:, 1].tolist(), eighty.get_offsets()[:, 1].tolist()]
    assert rows == [pytest.approx([-0.175, 0.825]), pytest.approx([0.175, 1.175])]
    assert [filled(ten), filled(eighty)] == [[True, False], [True, False]]
    assert [ten.get_label(), eighty.get_label()] == ["10", "80"]
    assert ten.get_paths()[0].vertices.shape != eighty.get_paths()[0].vertices.shape  # told apart without colour
    zero, lines = ax.lines[0], [c for c in ax.collections if c not in (ten, eighty)]
    assert list(zero.get_xdata()) == [0, 0]
    assert [segment[:, 0].tolist() for segment in lines[0].get_segments()] == [[0.1, 0.4], [-0.3, 0.1]]
    assert [segment[0, 1] for segment in lines[0].get_segments()] == pytest.approx([-0.175, 0.825])
    _, ax = plots.figure()
    new = REPORT[REPORT.n_train == 10].rename(columns=lambda name: name.replace("control_", "new_"))
    (marks,) = plots.forest(ax, new, against="new", alpha=0.051)
    assert filled(marks) == [True, True]
    assert marks.get_offsets()[:, 1].tolist() == [0, 1]
    ax.figure.canvas.draw()
    with pytest.raises(
        WorkbenchError, match="more than one row of 'ties' has control_difference; expected one per recipe"
    ):
        plots.forest(ax, REPORT)
    with pytest.raises(WorkbenchError, match="no recipe has control_difference"):
        plots.forest(ax, REPORT[REPORT.recipe == "zero-shot"])


def test_importance_has_a_bar_per_term_and_none_for_the_residual():
    table = pd.DataFrame({"term": ["k", "a × b", "residual"], "omega2": [0.3, -0.01, float("nan")], "holm": [0.01, 0.5, float("nan")], "share": [0.5, 0.1, 0.4]})  # fmt: skip
    _, ax = plots.figure()
    bars = plots.importance(ax, table)
    assert [bar.get_width() for bar in bars] == [0.3, -0.01]
    assert [bar.get_facecolor() != (1, 1, 1, 1) for bar in bars] == [True, False]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["k", "a × b"]
    assert ax.get_ylim() == (1.5, -0.5)
    assert [bar.get_width() for bar in plots.importance(ax, table, value="share", label="share")] == [0.5, 0.1]
    assert ax.get_xlabel() == "share"


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax, t: plots.intervals(ax, t.drop(columns="low"), x="kind"),
        lambda ax, t: plots.curves(ax, t, x="steps", series="who"),
        lambda ax, t: plots.units(ax, t, by="who"),
        lambda ax, t: plots.forest(ax, t.rename(columns={"who": "recipe"})),
        lambda ax, t: plots.importance(ax, t),
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
