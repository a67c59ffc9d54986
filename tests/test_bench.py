"""The benchmark's own parts: times, models, ratios and what is stored. (Its areas are tried in files of their own.)"""

import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from workbench.bench import SCALES, Line, Timing, ceilings, random_adapters, random_base, timed
from workbench.bench.run import draw, draw_growth, keep, run, store, tabulate
from workbench.errors import BaseError, SelectionError
from workbench.stack import Stack


def line(way, seconds, *, area="merging", against="theirs", **other):
    return Line(area, "ten adapters", way, against, Timing(seconds, 1.1, 2**20), **other)


def test_the_median_of_the_repetitions_counts():
    waits = iter([0.0, 0.001, 0.05, 0.02])
    found = timed(lambda: time.sleep(next(waits)), "cpu", warm=1, repeat=3)
    assert 0.02 <= found.seconds < 0.045
    assert found.spread > 10


def test_what_a_processor_reaches():
    found = ceilings("cpu", torch.float32, size=256)
    assert 1e8 < found["operations"] < 1e14
    assert 1e7 < found["traffic"] < 1e13


def test_a_random_model_has_the_shapes_of_its_scale():
    base = random_base("nano", layers=2)
    wanted = {name: shape for name, shape in SCALES["nano"].shapes().items() if int(name.split(".")[2]) < 2}
    assert base.projections == wanted
    logits = base.model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 90)
    assert logits.isfinite().all()
    again = random_base("nano", layers=2)
    assert torch.equal(again.model(input_ids=torch.tensor([[3, 4, 5]])).logits, logits)
    with pytest.raises(BaseError, match="choose one of nano, 1B, 8B"):
        random_base("70B")


def test_random_adapters_have_the_size_asked_for():
    shapes = {"m": (300, 200)}
    stack = Stack.of(random_adapters(shapes, 3, [4, 8, 16], size=0.5))
    assert [stack.modules["m"].of(i).A.shape[0] for i in range(3)] == [4, 8, 16]
    for norm in stack.gram().diagonal().sqrt() / (300 * 200) ** 0.5:
        assert 0.4 < float(norm) < 0.6


def test_ratios_are_to_the_way_named_for_one_unit():
    table = tabulate(
        [line("ours", 2.0, per=4, operations=1e9), line("theirs", 3.0), line("alone", 1.0, against="lost")]
    )
    assert table["ratio"].tolist()[:2] == [6.0, 1.0]
    assert table["ratio"].isna().tolist() == [False, False, True]
    assert table["operations"].tolist()[0] == 5e8
    assert table.loc[0, ["each", "peak"]].tolist() == [0.5, 2**20]


def test_other_areas_stay_in_the_file(tmp_path):
    told = {"scale": "nano", "device": "x86_64, 1 threads"}
    first = tabulate([line("ours", 1.0), line("theirs", 2.0)]).assign(**told)
    second = tabulate([line("ours", 5.0, area="fits"), line("theirs", 9.0, area="fits")]).assign(**told)
    store(first, tmp_path)
    path = store(second, tmp_path)
    assert path.name == "bench_nano_cpu.parquet"
    assert store(first.assign(seconds=7.0), tmp_path) == path
    found = pd.read_parquet(path)
    assert found.groupby("area").seconds.first().to_dict() == {"fits": 5.0, "merging": 7.0}
    assert len(found) == 4
    assert [text.get_text() for text in draw(found).axes[0].texts] == ["2 × theirs", "1.8 × theirs"]


def test_growth_has_a_figure_of_its_own(tmp_path):
    grown = [
        line(f"{what} {n}", n * 0.5, against=f"{what} {first}", **{what: n})
        for what, first, numbers in (("adapters", 10, (10, 30)), ("rank", 4, (4, 16)))
        for n in numbers
    ]
    pairs = [
        replace(line(way, 1.0 * n, area="similarity", **size), work=f"{n} adapters of rank {r}")
        for n in (100, 960)
        for r in (16, 64)
        for way, size in (("ours", {"adapters": n, "rank": r}), ("theirs", {}))
    ]
    more = [line("ours", 1.0), line("theirs", 2.0)]
    table = tabulate([*grown, *pairs, *more]).assign(scale="nano", device="x86_64, 1 threads", quick=False)
    ax, by_rank = draw_growth(table).axes
    curves = {one.get_label(): (one.get_xdata().tolist(), one.get_ydata().tolist()) for one in ax.get_lines()}
    assert curves == {"ten adapters, a module": ([10, 30], [5, 15]), "cosines of all pairs": ([100, 960], [100, 960])}
    assert {len(one.get_xdata()) for one in by_rank.get_lines()} == {2}
    shown = draw(table).axes[0]  # ours of merging, and of similarity that of the most adapters of both ranks
    assert [text.get_text() for text in shown.get_yticklabels()] == [
        "merging: ten adapters: ours",
        "similarity: 960 adapters of rank 64: ours",
        "similarity: 960 adapters of rank 16: ours",
    ]
    assert len(shown.patches) == 3
    assert [path.name for path in keep(table, tmp_path)] == [
        f"bench_nano_cpu{end}" for end in (".parquet", ".png", "_growth.png")
    ]
    assert len(keep(table.assign(quick=True), tmp_path / "quick")) == 2
    with pytest.raises(SelectionError, match="no line of the table shows how time grows with rank"):
        draw_growth(tabulate(grown[:2]))


def test_unknown_areas_and_scales_are_named():
    with pytest.raises(SelectionError, match="no area 'speed'"):
        run(["speed"])
    with pytest.raises(SelectionError, match="no scale '3B'; choose of nano, 1B, 8B"):
        run(["merging"], "3B")
    with pytest.raises(SelectionError, match="fits: nothing to measure at scale 8B"):
        run(["fits"], "8B")
