"""The explorer of units, moved by setting its controls as a browser would: what it shows, hands on, and does on errors."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from helpers import random_adapter, solved_task, tiny_base
from workbench.adapters import Adapter, Factors
from workbench.clusters import cluster_units, members, purity, sharing, unit_map
from workbench.errors import MergeError, SelectionError, TaskError
from workbench.multitask import multitask
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.widgets import UnitExplorer, merge_curve, unit_views, units
from workbench.widgets.merge_curve import LEGO, RANDOM, summary
from workbench.widgets.parts import MEMORY
from workbench.widgets.unit_map import GREY, MOST, by_number, by_value
from workbench.widgets.unit_tables import layered

WAIT = 60
PNG = b"\x89PNG"
EVIL, MATHS = "<img src=x onerror=alert(1)>", r"$\frac{1}{2}$"
NAMES = ("apple", "banana", "cherry", EVIL, MATHS)
LABELS = pd.DataFrame({"kind": ["x", "x", "y", EVIL, MATHS], "one": "same"}, index=list(NAMES))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=12.0)


@pytest.fixture(scope="module")
def stack(base):
    """Adapters of unequal ranks and targets, two of them named by someone who means harm."""
    targets = [None, ["q_proj", "v_proj"], None, None, ["q_proj", "down_proj"]]
    return Stack.of([random_adapter(base, 2 + i, i, targets[i], name=n, size=0.08) for i, n in enumerate(NAMES)])


@pytest.fixture(scope="module")
def tasks(base, stack):
    return {name: solved_task(base, stack.adapter(name), i) for i, name in enumerate(("apple", "banana"))}


@pytest.fixture
def explorer(stack):
    return UnitExplorer(stack, labels=LABELS, module=Q, k=4)


def markup(widget):
    """The value of every HTML control in a widget: what the browser takes as markup. All else it takes as text."""
    own = [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    return own + [text for child in getattr(widget, "children", ()) for text in markup(child)]


def drawn(explorer):
    return pd.DataFrame(np.array(explorer.map.scatter.widget.points)[:, :2])


# the view


def test_the_first_view_is_what_the_functions_say(stack, explorer):
    frame = cluster_units(stack, 4, modules=[Q])
    flat = unit_map(stack, Q)
    columns = ["module", "adapter", "unit", "cluster", "norm"]
    pd.testing.assert_frame_equal(explorer.table[columns], frame)
    pd.testing.assert_frame_equal(explorer.table[["x", "y"]], flat[["x", "y"]])
    labels = LABELS["kind"].to_dict()
    pd.testing.assert_frame_equal(explorer.clusters, members(frame, labels))
    assert explorer.table["kind"].tolist() == [labels[name] for name in frame["adapter"]]
    shared, told = sharing(frame), purity(frame, labels).set_index(["module", "control", "measure"])
    row = told.loc[Q, "adapters", "purity"]
    said = f"purity {row.value:.2f} (shuffled over adapters {row.low:.2f}–{row.high:.2f}, p = {row.p:.2f})"
    for text in (repr(explorer), explorer._summary.value):
        assert f"{Q}: 20 units of 5 adapters" in text
        assert f"{shared['shared'].mean():.0%} of them hold units of several adapters" in text
        assert f"make it {shared['expected'].mean():.0%}" in text
        assert said in text
    assert len(drawn(explorer)) == 20
    assert explorer.error is None
    assert re.findall(r"<td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", explorer._clusters.value) == [
        (str(c), str(n)) for c, n in explorer.clusters[["cluster", "units"]].to_numpy()
    ]


def test_building_scores_and_merges_nothing(stack, base, tasks, monkeypatch):
    for name in ("multitask", "merge"):
        monkeypatch.setattr(sys.modules["workbench.multitask"], name, lambda *a, **k: 1 / 0)
    explorer = UnitExplorer(stack, base=base, tasks=tasks)
    assert explorer.error is None
    assert explorer.curve.table.empty
    assert not explorer.curve.work.running
    assert "multitask(base, stack, tasks" in explorer.code


def test_pickers_lead_to_every_module(stack, explorer):
    seen = set()
    for layer in explorer.layer.options:
        explorer.layer.value = layer
        for projection in explorer.projection.options:
            explorer.projection.value = projection
            seen.add(explorer.module)
            assert set(explorer.table["module"]) == {explorer.module}
            assert len(drawn(explorer)) == len(explorer.table) == len(stack.modules[explorer.module])
            assert explorer.error is None
    assert seen == set(stack.modules)


def test_a_layer_keeps_the_projection_and_computes_once(explorer, monkeypatch):
    calls, view = [], explorer.views.view
    monkeypatch.setattr(explorer.views, "view", lambda *a, **k: calls.append(a[0]) or view(*a, **k))
    assert (explorer.layer.value, explorer.projection.value) == ("0", "q_proj")
    explorer.layer.value = "1"
    assert explorer.module == "model.layers.1.self_attn.q_proj"
    assert calls == [explorer.module]


def test_moving_k_and_the_form(stack, explorer, monkeypatch):
    maps = []
    monkeypatch.setattr(unit_views, "unit_map", lambda *a, **k: maps.append(k["canonical"]) or unit_map(*a, **k))
    before = drawn(explorer)
    explorer.k.value = 7
    assert explorer.table["cluster"].tolist() == cluster_units(stack, 7, modules=[Q])["cluster"].tolist()
    assert len(explorer.clusters) == 7
    pd.testing.assert_frame_equal(drawn(explorer), before)  # k moves no point
    assert maps == []
    explorer.form.value = "outer"
    assert (
        explorer.table["cluster"].tolist()
        == cluster_units(stack, 7, canonical="outer", modules=[Q])["cluster"].tolist()
    )
    assert maps == ["outer"]
    assert not drawn(explorer).equals(before)
    explorer.form.value = "raw"
    assert maps == ["outer"]  # the first map was kept
    assert not explorer.k.continuous_update


@pytest.mark.parametrize("by", ["adapter", "cluster", "kind", "norm"])
def test_colours(explorer, by):
    explorer.k.value = 5
    explorer.colour.value = by
    widget = explorer.map.scatter.widget
    codes, table = np.array(widget.points)[:, 2].astype(int), explorer.table
    colours = [tuple(np.round(widget.color[code], 3)) for code in codes]
    if by == "norm":
        assert codes[table["norm"].argmax()] == codes.max()
        assert codes[table["norm"].argmin()] == codes.min()
        assert f"{table['norm'].max():.3g}</div>" in explorer.map.legend.value
        return
    found = pd.Series(colours).groupby(table[by].to_numpy()).nunique()
    assert (found == 1).all()  # one colour a value
    assert len(set(colours)) == table[by].nunique()
    assert explorer.map.legend.value.count("⬤") == table[by].nunique()


def test_more_values_than_colours_leave_the_rare_ones_grey():
    values = [f"v{i:02}" for i in range(40) for _ in range(2 if i < 24 else 1)]
    colours = by_value(values)
    assert len({colours.palette[c] for c in colours.codes}) == MOST + 1
    assert {colours.palette[c] for c, v in zip(colours.codes, values, strict=True) if v >= "v24"} == {GREY}
    assert colours.legend[-1] == (GREY, "16 others (16)")
    assert by_number([3.0, 3.0]).codes.tolist() == [0, 0]
    assert by_number([0.0, 1.0, 0.5]).codes.tolist() == [0, 31, 16]


# what is picked


def test_the_lasso_lists_units_with_their_adapters(explorer):
    explorer.map.scatter.widget.selection = np.array([0, 3, 19], dtype="uint32")  # what the browser sends
    assert explorer.map.picked == (0, 3, 19)
    pd.testing.assert_frame_equal(explorer.selected, explorer.table.iloc[[0, 3, 19]])
    assert "3 units of 3 adapters picked:" in explorer._picked.value
    assert "apple" in explorer._picked.value
    assert "&lt;img" not in explorer._picked.value or EVIL in set(explorer.selected["adapter"])
    explorer.k.value = 3  # the same points: they stay picked, under their new clusters
    assert explorer.map.picked == (0, 3, 19)
    assert explorer.selected["cluster"].tolist() == explorer.table["cluster"].iloc[[0, 3, 19]].tolist()
    explorer.projection.value = "v_proj"
    assert explorer.map.picked == ()
    assert len(np.asarray(explorer.map.scatter.widget.selection)) == 0
    assert "Lasso units" in explorer._picked.value


def test_a_cluster_can_be_picked_without_a_mouse(explorer):
    cluster = int(explorer.clusters["cluster"].iloc[1])
    explorer.cluster.value = cluster
    assert explorer.selected["cluster"].unique().tolist() == [cluster]
    assert len(explorer.selected) == int(explorer.clusters["units"].iloc[1])
    assert np.asarray(explorer.map.scatter.widget.selection).tolist() == list(explorer.map.picked)
    explorer.cluster.value = -1
    assert explorer.selected.empty


def test_the_pointer_names_a_unit(explorer):
    explorer.map.scatter.widget.hovering = 5
    row = explorer.table.iloc[5]
    assert f"Unit {row.unit} of cherry: cluster {row.cluster}, norm {row.norm:.3g}, kind y" in explorer._hovered.value
    explorer.map.scatter.widget.hovering = None
    assert explorer._hovered.value == ""


def test_the_picked_adapters_can_be_merged(explorer):
    explorer.curve.take.click()
    assert isinstance(explorer.curve.error, SelectionError)
    explorer.map.pick([0, 1, 2])
    explorer.curve.take.click()
    assert explorer.curve.error is None
    assert explorer.curve.names == ("apple", "banana")
    assert "stack.choose(['apple', 'banana'])" in explorer.code


# labels


def test_labels_that_tell_nothing_apart_are_left_out(stack, explorer):
    assert explorer.colour.options == ("adapter", "cluster", "kind", "norm")
    assert [value for _, value in explorer.label.options] == ["", "kind"]
    explorer.label.value = ""
    assert "purity" not in explorer.clusters
    assert "purity" not in explorer._summary.value
    some = UnitExplorer(stack, labels=pd.DataFrame({"kind": ["x", None]}, index=["apple", "cherry"]), module=Q)
    assert some.table.groupby("adapter")["kind"].first()[list(NAMES)].tolist() == ["x"] + ["unknown"] * 4
    with pytest.raises(SelectionError, match="cluster"):
        UnitExplorer(stack, labels=pd.DataFrame({"cluster": ["x"] * 5}, index=list(NAMES)))


def test_a_pool_of_strangers_has_fewer_choices(tmp_path, base):
    for i, name in enumerate(NAMES):
        random_adapter(base, 2, seed=i, name=name).save(tmp_path / name)
    explorer = UnitExplorer(Pool.open(tmp_path), base=base)
    assert explorer.colour.options == ("adapter", "cluster", "norm")
    assert explorer.label.value == ""
    assert explorer.error is None
    assert explorer.code.startswith("stack = pool.stack()\n")
    assert explorer.curve.names == explorer.stack.names
    explorer.curve.start.click()
    assert explorer.curve.work.wait(WAIT)
    assert isinstance(explorer.curve.error, SelectionError)
    assert "no task of these adapters is known" in explorer.curve._message.value


def test_the_bundled_pool_brings_its_labels():
    pool = Pool.open("nano")
    explorer = UnitExplorer(pool, merged=pool.names[:2])
    assert explorer.colour.options == ("adapter", "cluster", "operation", "format", "domain", "norm")
    assert explorer.curve.names == pool.names[:2]
    assert explorer.table["operation"].nunique() > 5


# many units


@pytest.fixture(scope="module")
def wide():
    """2,100 units in one module, 6 in another."""
    g = torch.Generator().manual_seed(0)
    adapters = []
    for i in range(3):
        parts = {"h.0.q": (torch.randn(8, 700, generator=g), torch.randn(700, 8, generator=g))}
        parts["h.0.v"] = (torch.randn(8, 2, generator=g), torch.randn(2, 8, generator=g))
        adapters.append(Adapter(f"a{i}", {m: Factors(*p) for m, p in parts.items()}))
    return Stack.of(adapters)


def test_many_units_are_clustered_in_the_background(wide, monkeypatch):
    explorer = UnitExplorer(wide, module="h.0.v", k=2)
    seen, view = [], explorer.views.view

    def watched(module, form, k, tell):
        seen.append((module, k, explorer.table.empty, explorer.map.layout.visibility))
        return view(module, form, k, tell)

    monkeypatch.setattr(explorer.views, "view", watched)
    explorer.projection.value = "q"
    assert explorer.work.wait(WAIT)
    assert seen == [("h.0.q", 2, True, "hidden")]
    assert len(explorer.table) == 2100
    assert explorer.map.layout.visibility == "visible"
    explorer.map.pick([5])
    explorer.k.value = 3
    assert explorer.work.wait(WAIT)
    assert explorer.table["cluster"].nunique() == 3
    assert explorer.map.picked == (5,)  # the map stays
    assert explorer.error is None


def test_a_background_view_can_be_stopped_and_a_late_one_is_not_shown(wide, monkeypatch):
    explorer = UnitExplorer(wide, module="h.0.v", k=2)
    view = explorer.views.view

    def slow(module, form, k, tell):
        while not tell(0, 1):
            time.sleep(0.002)

    monkeypatch.setattr(explorer.views, "view", slow)
    explorer.projection.value = "q"
    explorer.work.stop()
    assert explorer.work.wait(WAIT)
    assert "Stopped." in explorer._summary.value
    assert explorer.table.empty
    late = view("h.0.q", "raw", 2)
    monkeypatch.setattr(explorer.views, "view", view)
    explorer.projection.value = "v"
    explorer._show(late)
    assert set(explorer.table["module"]) == {"h.0.v"}


def test_a_map_of_too_many_points_is_of_some(wide, monkeypatch):
    monkeypatch.setattr(units, "POINTS", 100)
    explorer = UnitExplorer(wide, module="h.0.q", k=2)
    assert explorer.work.wait(WAIT)
    assert len(drawn(explorer)) == 100
    assert len(explorer.table) == 2100
    assert explorer.clusters["units"].sum() == 2100
    assert "100 of them, drawn at random" in explorer._summary.value
    explorer.map.pick([99])
    assert len(explorer.selected) == 1
    assert explorer.selected.index[0] == explorer._rows[99] > 99


# the curve


def test_the_curve_is_multitask_s_beside_its_controls(base, stack, tasks):
    explorer = UnitExplorer(stack, base=base, tasks=tasks, merged=["apple", "banana"], ks="4 1", seed=3)
    explorer.form.value, explorer.output.value = "balanced", False
    curve = explorer.curve
    curve.start.click()
    assert curve.work.wait(WAIT)
    assert (curve.error, curve.work.stopped) == (None, False)
    options = {"canonical": "balanced", "seed": 3, "output_reweighting": False}
    variants = {f"k={k}": ("lego", {"k": k, **options}) for k in (1, 4)}
    want = multitask(base, stack.choose(["apple", "banana"]), tasks, variants, fresh=(), single=False, seed=3)
    columns, keys = ["accuracy", "accuracy_unscaled", "scale", "own"], ["variant", "control", "task"]
    found = curve.table.set_index(keys).sort_index()[columns]
    pd.testing.assert_frame_equal(found, want.set_index(keys).sort_index()[columns])
    shown, bare, own = summary(curve.table)
    assert shown.groupby("series")["k"].apply(list).to_dict() == {LEGO: [1, 4], RANDOM: [1, 4]}
    lego = want[(want.method == "lego") & (want.control == "")]
    assert shown[shown.series == LEGO]["mean"].tolist() == pytest.approx(lego.groupby("k").accuracy.mean().tolist())
    assert own == pytest.approx(want[want.variant == "alone"].accuracy.mean())
    assert own > bare == pytest.approx(want[want.variant == "zero-shot"].accuracy.mean())
    assert bytes(curve._picture.value).startswith(PNG)
    assert (
        f"Base alone: {bare:.2f}; each adapter alone on its own task (a newly trained adapter for it): {own:.2f}"
        in (curve.caption.value)
    )
    assert RANDOM in curve._rows.value


def test_the_curve_fills_in_and_stops(base, stack, tasks, monkeypatch):
    explorer = UnitExplorer(stack, base=base, tasks=tasks, merged=["apple", "banana"], ks="1, 2, 3")
    curve, seen = explorer.curve, []

    def one(*args, **kwargs):
        if seen:
            curve.work._stop.click()
        seen.append((list(args[3]), 0 if curve.table.empty else int(curve.table.k.max())))
        return multitask(*args, **kwargs)

    monkeypatch.setattr(sys.modules["workbench.multitask"], "multitask", one)
    curve.start.click()
    assert curve.work.wait(WAIT)
    assert seen == [(["k=1"], 0), (["k=2"], 1)]  # the first k was there before the second was computed
    assert curve.work.stopped
    assert sorted(curve.table[curve.table.method == "lego"].k.unique()) == [1, 2]
    assert "Stopped." in curve.caption.value


def test_a_task_without_its_own_adapter_is_said(base, stack, tasks):
    other = {"apple": tasks["apple"], "elsewhere": tasks["banana"]}
    curve = UnitExplorer(stack, base=base, tasks=other, merged=["apple", "cherry"], ks="2").curve
    curve.start.click()
    assert curve.work.wait(WAIT)
    assert summary(curve.table)[2] is None
    assert "not every task has its own adapter" in curve.caption.value


def test_tasks_of_bundled_adapters_are_found():
    pool = Pool.open("nano")
    names = [name for name in pool.names if not name.endswith("-v2")][:2]
    curve = UnitExplorer(pool.stack(names), n_test=3).curve
    assert curve.names == tuple(names)
    found = curve.known([*names, "someone's"])
    assert list(found) == names
    assert {len(task.test) for task in found.values()} == {3}
    assert curve.start.disabled
    assert "Pass base=" in curve.caption.value


@pytest.mark.parametrize(
    ("ks", "error"), [("", MergeError), ("2, x", MergeError), ("0", MergeError), ("999", MergeError)]
)
def test_what_cannot_be_merged_is_told(base, stack, tasks, ks, error):
    curve = UnitExplorer(stack, base=base, tasks=tasks, ks=ks).curve
    curve.start.click()
    assert curve.work.wait(WAIT)
    assert isinstance(curve.error, error)
    assert "could not be computed" in curve._message.value
    assert not bytes(curve._picture.value)


def test_tasks_that_cannot_be_scored_and_no_choice_are_told(base, stack, tasks):
    bare = replace(tasks["apple"], validation=())
    curve = UnitExplorer(stack, base=base, tasks=[bare]).curve
    assert list(curve.tasks) == [bare.name]
    curve.start.click()
    assert curve.work.wait(WAIT)
    assert isinstance(curve.error, TaskError)
    curve.chosen.value = ()
    curve.start.click()
    assert isinstance(curve.error, SelectionError)


# manners


def test_the_code_does_the_same(base, stack, tasks):
    explorer = UnitExplorer(stack, base=base, tasks=tasks, merged=["apple", "banana"], module=DOWN, k=3, ks="2", seed=5)
    explorer.form.value, explorer.parameter.value = "svd", False
    clusters, merged, curve = explorer.code.splitlines()
    known = {
        "stack": stack,
        "base": base,
        "tasks": tasks,
        "wb": wb,
        "cluster_units": cluster_units,
        "multitask": multitask,
    }
    frame, adapter = eval(clusters, known), eval(merged, known)
    assert frame["cluster"].tolist() == explorer.table["cluster"].tolist()
    want = wb.merge(
        stack.choose(["apple", "banana"]), "lego", k=3, canonical="svd", parameter_reweighting=False, seed=5
    )
    assert torch.equal(adapter.modules[DOWN].delta(), want.modules[DOWN].delta())
    assert eval(curve, known).query("method == 'lego'").k.unique().tolist() == [2]
    assert explorer.code.splitlines()[0] in explorer._code.value.replace("&#x27;", "'")


def test_settings_outlive_a_cell_s_run(base, stack):
    first = UnitExplorer(stack, labels=LABELS, key="test")
    first.layer.value, first.k.value, first.colour.value = "1", 6, "kind"
    first.form.value, first.output.value, first.curve.ks.value = "outer", False, "5"
    first.curve.chosen.value = ("apple", EVIL)
    again = UnitExplorer(stack, labels=LABELS, key="test")
    assert repr(again) == repr(first)
    assert (again.colour.value, again.curve.names) == ("kind", ("apple", EVIL))
    assert again._note.value == ""
    assert UnitExplorer(stack, labels=LABELS, key="other").k.value == 8
    assert UnitExplorer(stack, labels=LABELS).k.value == 8
    assert ("UnitExplorer", "test") in MEMORY
    fewer = UnitExplorer(stack.choose(["apple", "cherry"]), key="test")
    assert fewer.k.value == 6
    assert fewer.curve.names == ("apple",)
    assert "adapter &lt;img" in fewer._note.value
    assert "colour kind" in fewer._note.value
    assert fewer.colour.value == "cluster"


def test_strangers_words_reach_the_browser_as_text(explorer):
    for by in ("adapter", "kind"):
        explorer.colour.value = by
        explorer.map.pick(range(20))
        explorer.map.scatter.widget.hovering = 19
        shown = [*markup(explorer), explorer.map.legend.value]
        assert not any("<img" in text for text in shown)
        assert sum("&lt;img" in text for text in shown) >= 4  # clusters, picked, hovered or code, legend
        assert all("mathjax_ignore" in text for text in shown if "frac" in text)
    state = {k: v for k, v in explorer.map.scatter.widget.get_state().items() if k not in ("_esm", "_css")}
    assert "onerror" not in str(state)  # jupyter-scatter is told no name
    assert "frac" not in str(state)


def test_a_failing_view_is_told_and_the_next_one_shown(explorer, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(unit_views, "cluster_units", lambda *a, **k: (_ for _ in ()).throw(MergeError(f"{EVIL} broke")))
        explorer.k.value = 5
    assert isinstance(explorer.error, MergeError)
    assert "&lt;img src=x onerror=alert(1)&gt; broke" in explorer._message.value
    assert (explorer._summary.value, explorer._clusters.value, explorer.map.layout.visibility) == ("", "", "hidden")
    assert explorer.table.empty
    assert "could not be computed" in repr(explorer)
    explorer.colour.value = "norm"  # nothing to colour: nothing happens
    explorer.map.pick([1])
    explorer.k.value = 6
    assert (explorer.error, explorer.map.layout.visibility) == (None, "visible")
    assert len(explorer.clusters) == 6


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"module": "x"}, MergeError, "no module 'x'"),
        ({"canonical": "polar"}, MergeError, "'polar'"),
        ({"k": 0}, MergeError, "k is 0"),
        ({"merged": ["pear"]}, SelectionError, "'pear'"),
    ],
)
def test_what_an_explorer_refuses(stack, options, error, says):
    with pytest.raises(error, match=says):
        UnitExplorer(stack, **options)


def test_every_control_has_a_label_and_a_tooltip(explorer):
    own = [
        getattr(explorer, n)
        for n in ("layer", "projection", "form", "k", "colour", "label", "cluster", "parameter", "output")
    ]
    for control in [*own, *(getattr(explorer.curve, n) for n in ("chosen", "ks", "take", "start"))]:
        assert control.description
        assert control.tooltip
    assert explorer._repr_mimebundle_()["text/plain"] == repr(explorer)


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ([Q, DOWN], {"0": {"q_proj": Q}, "1": {"down_proj": DOWN}}),
        (["lm_head", "m.0.a.q"], {"(no layer)": {"lm_head": "lm_head"}, "0": {"q": "m.0.a.q"}}),
        (
            ["e.0.self.q", "e.0.cross.q", "d.0.q"],
            {"e.0": {"self.q": "e.0.self.q", "cross.q": "e.0.cross.q"}, "d.0": {"q": "d.0.q"}},
        ),
    ],
)
def test_layers_of_any_paths(modules, found):
    assert layered(modules) == found


def test_jscatter_is_imported_where_it_is_used():
    program = (
        "import json, sys\nfrom workbench.widgets import UnitExplorer\n"
        "print(json.dumps([n for n in ('jscatter', 'sklearn') if n in sys.modules]))"
    )
    assert (
        json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        == []
    )


def test_an_accuracy_curve_can_be_drawn_without_own_adapters():
    curve = pd.DataFrame(
        {"series": [LEGO, RANDOM], "k": [2, 2], "mean": [0.5, 0.1], "at_one": [0.4, 0.0], "scale": [0.5, 1.0]}
    )
    figure = merge_curve.accuracy_curve(curve, 0.2, None)
    names = [line.get_label() for line in figure.axes[0].lines]
    assert names == [f"{LEGO}, λ tuned", f"{LEGO}, λ = 1", f"{RANDOM}, λ tuned", f"{RANDOM}, λ = 1", "base alone"]
