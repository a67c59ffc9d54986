"""A paper's figures: drawn at a venue's widths from the notebooks' stored data, with fonts inside and their origin beside."""

import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from workbench import plots
from workbench.cli import app
from workbench.errors import WorkbenchError
from workbench.plots import charts
from workbench.plots.paper import FIGURES, METHODS, draw

STORED = Path(__file__).parents[1] / "figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out, before = tmp_path_factory.mktemp("paper"), plt.get_fignums()
    paths = draw(data=STORED, out=out, venue="icml", say=lambda line: None)
    assert plt.get_fignums() == before  # none stays open
    return paths


def test_every_figure_has_its_data_and_says_what_made_it(drawn):
    assert [path.stem for path in drawn] == list(FIGURES)
    for path in drawn:
        source = FIGURES[path.stem][0]
        note = json.loads(path.with_suffix(".json").read_text("utf-8"))
        before = json.loads((STORED / f"{source}.json").read_text("utf-8"))
        assert note["caption"] == before["caption"]
        assert note["made"].items() >= (before["made"] | {"of": f"{source}.csv", "venue": "icml"}).items()
        assert note["made"]["drawn"]
        stored, kept = (pd.read_csv(p) for p in (STORED / f"{source}.csv", path.with_suffix(".csv")))
        pd.testing.assert_frame_equal(stored, kept)


def test_files_are_as_wide_as_the_page_and_hold_their_fonts(drawn):
    widths = set()
    for path in drawn:
        content = path.read_bytes()
        left, _, right, _ = map(float, re.search(rb"/MediaBox \[ ?([\d. ]+)\]", content)[1].split())
        width = json.loads(path.with_suffix(".json").read_text("utf-8"))["made"]["width in inches"]
        assert (right - left) / 72 == pytest.approx(width, abs=0.01)
        pixels = struct.unpack(">I", path.with_suffix(".png").read_bytes()[16:20])[0]
        assert pixels == pytest.approx(200 * width, abs=1)
        widths.add(width)
        objects = content + b"".join(inflated(content))
        assert b"/FontFile2" in objects
        assert b"/Type3" not in objects
    assert widths == {3.25, 6.75}


def inflated(content):
    for part in re.findall(rb"stream\r?\n(.*?)endstream", content, re.DOTALL):
        try:
            yield zlib.decompress(part)
        except zlib.error:
            continue


def test_what_is_drawn_are_the_stored_numbers(monkeypatch, tmp_path):
    seen = []
    plain = charts.intervals
    monkeypatch.setattr(charts, "intervals", lambda ax, table, **more: seen.append(table) or plain(ax, table, **more))
    draw(["methods"], data=STORED, out=tmp_path, say=lambda line: None)
    stored = pd.read_csv(STORED / "03_methods.csv", keep_default_na=False)
    stored = stored[stored.recipe.isin(METHODS)]
    assert [len(table) for table in seen] == [sum(stored.n_train == n) for n in (10, 80)]
    assert {name for table in seen for name in table["recipe"]} == set(METHODS)
    for n, table in zip((10, 80), seen, strict=True):
        both = table.merge(stored[stored.n_train == n], on=["recipe", "kind"], suffixes=("", "_stored"))
        assert len(both) == len(table)
        assert (both["mean"] == both["mean_stored"]).all()


def test_a_new_adapter_stands_beside_every_merge(monkeypatch, tmp_path):
    """As a series of its own, or as a line at its stored mean."""
    lines = []
    monkeypatch.setattr(plt, "close", lambda fig: lines.append(fig))
    try:
        draw(
            ["number_of_adapters", "number_and_rank", "lego_clusters"], data=STORED, out=tmp_path, say=lambda line: None
        )
        for fig, (source, column) in zip(
            lines, (("04_sweep", "adapters"), ("07_adapters", "adapters"), ("05_clusters", "series")), strict=True
        ):
            stored = pd.read_csv(STORED / f"{source}.csv")
            level = stored[stored[column] == "new adapter"]["mean"].tolist()
            found = [
                line.get_ydata()[0] for ax in fig.axes for line in ax.get_lines() if line.get_label() == "new adapter"
            ]
            assert found
            assert set(found) <= set(level)
            assert len(found) == len(fig.axes)
            text = [
                text.get_text()
                for legend in [*fig.legends, *(ax.get_legend() for ax in fig.axes)]
                if legend
                for text in legend.get_texts()
            ]
            assert any("random" in one for one in text)
            assert "new adapter" in text
    finally:
        monkeypatch.undo()
        plt.close("all")


def test_other_venues(tmp_path):
    said = []
    (path,) = draw(["unit_map"], data=STORED, out=tmp_path, venue="neurips", say=said.append)
    assert path == tmp_path / "unit_map.pdf"
    assert said[0].startswith(f"{path}: 5.5 in wide")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json", ".pdf", ".png"]
    assert all(0 < venue.column <= venue.text < 8 for venue in plots.VENUES.values())
    with pytest.raises(WorkbenchError, match=r"no venue 'nurips' \(did you mean 'neurips'\?\)"):
        plots.venue_of("nurips")


def test_the_venues_are_named_where_one_is_chosen():
    said = CliRunner().invoke(app, ["figures", "--help"]).output
    readme = (STORED.parent / "README.md").read_text("utf-8")
    *most, last = plots.VENUES
    assert all(re.search(rf"\b{venue}\b", said) for venue in plots.VENUES)
    assert f"{', '.join(most)} or {last}" in readme
    assert len(FIGURES) == 11
    assert "typesets eleven of them" in readme


def test_what_is_missing_is_said_with_what_makes_it(tmp_path):
    with pytest.raises(WorkbenchError, match=r"no figure 'method' \(did you mean 'methods'\?\)"):
        draw(["method"], data=STORED, out=tmp_path)
    with pytest.raises(WorkbenchError, match=r"03_methods\.csv is not there; notebook 03 makes it"):
        draw(["methods"], data=tmp_path, out=tmp_path)
    for end in ("csv", "json"):
        shutil.copy(STORED / f"01_screening.{end}", tmp_path / f"03_methods.{end}")
    with pytest.raises(WorkbenchError, match=r"03_methods\.csv has no column 'n_train'; store notebook 03 anew"):
        draw(["methods"], data=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_series_are_told_apart_without_colour_and_colours_in_grey():
    """No two of eight series share marker and dashes, and none is so light that it is lost on white."""
    table = pd.DataFrame({"x": [1, 2] * 8, "mean": range(16), "who": [f"s{i // 2}" for i in range(16)]})
    table = table.assign(low=table["mean"], high=table["mean"], x2=1)
    with plots.style():
        fig, (one, two) = plt.subplots(1, 2)
        charts.curves(one, table, x="x", series="who")
        looks = {(line.get_marker(), line.get_linestyle()) for line in one.get_lines()}
        charts.intervals(two, table[table["x"] == 1], x="x", series="who")
        marks = {container.lines[0].get_marker() for container in two.containers}
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    plt.close(fig)
    assert len(looks) == 8
    assert len(marks) == 8
    lightness = [0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2 for r, g, b in map(to_rgb, colours)]
    assert max(lightness) < 0.6  # all stand out from white
