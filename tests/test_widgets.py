"""Controls, moved by setting their values as a browser would: what they show, hand on, and do when something fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ipywidgets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jupyter_core.paths import jupyter_path

import workbench as wb
from helpers import dense_model, generate, hook_count, random_adapter, strange_pool, tiny_base
from workbench.base import Base
from workbench.errors import AdapterError, MergeError, SelectionError, TaskError
from workbench.evaluate import encode, evaluate
from workbench.nano import world
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.tasks import Example, Task
from workbench.widgets import AdapterChooser, MergeBench, PoolExplorer, UnitExplorer, WeightExplorer, weights

PNG = b"\x89PNG"
EVIL = "<script>alert(1)</script>"  # a folder `<script>alert(1)<` that holds a folder `script>`
MATHS = r"$\frac{ & 漢$"
NAMES = ("apple", "banana", "cherry", EVIL)
START = {"apple": 0.5, "banana": -0.25, "cherry": 0.0, EVIL: 1.0}
SPECS = world.UPSTREAM[:3]


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=10.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    """Six adapters of unequal ranks and targets, two of them named by someone who means harm."""
    names = ["apple", "banana", "cherry", "damson", EVIL, MATHS]
    return strange_pool(tmp_path_factory.mktemp("pool"), base, names, narrow=(1, 4), refused="refused")


@pytest.fixture(scope="module")
def task(base, pool):
    """Some targets are what the base says under START, some what it says by itself, one is neither."""
    draft = Task("own & <b>task</b>", "turn", (), (), (), max_new_tokens=2)
    merged, rows = dense(base, pool.stack(NAMES), START).model, {True: [], False: []}
    for text in ("ab", "cde", "fg h", "i", "jkl m", "nop", "q", "rs t", "uvw", "x y z", "aa", "bcb", "dd e", "fff"):
        for ours in (True, False):
            prompt = encode(base, draft.prompt(Example(text, "a")), "a").prompt
            (said,) = generate(base, [prompt], 2, merged if ours else base.model)
            target = base.tokenizer.decode(said)
            if len(target) == 2 and "\n" not in target and base.tokenizer(target)["input_ids"] == said:
                rows[ours].append(Example(text, target))
    validation = (*rows[True][:3], *rows[False][:2], Example("ghg", "zz"))
    assert len(validation) == 6
    return replace(draft, train=validation[:2], validation=validation, test=validation[:1])


@pytest.fixture
def stack(pool):
    return pool.stack(NAMES)


@pytest.fixture
def explorer(base, stack, task):
    return WeightExplorer(base, stack, task, weights=START)


def dense(base, stack, given):
    """The oracle: Σ w ΔW in float64, added to a copy of the weights; no hook takes part."""
    deltas = {
        module: sum(
            given[name] * stack.adapter(name).modules[module].delta().double()
            for name in stack.names
            if module in stack.adapter(name).modules
        )
        for module in stack.modules
    }
    return Base(dense_model(base, deltas), base.tokenizer, "dense")


def dense_scores(base, stack, task, given, split="validation"):
    scores = evaluate(dense(base, stack, given), task, split=split)
    return float(scores.loss.mean()), int(scores.match.sum())


def drawn(control):
    return bytes(control._picture.value)


def texts(widget):
    """Every text that a control and those in it give to the browser as HTML."""
    return [c.value for c in widget.children if type(c).__name__ == "HTML"]


# the chooser


def test_a_choice_is_handed_on(pool):
    chooser = AdapterChooser(pool, chosen=["cherry", "apple"])
    assert chooser.names == chooser.listed.value == ("apple", "cherry")
    chooser.listed.value = ("banana", "damson")
    assert chooser.names == chooser.stack().names == ("banana", "damson")
    assert chooser.code == "pool.stack(['banana', 'damson'])"
    same = eval(chooser.code, {"pool": pool})
    assert (same.names, same.digest()) == (chooser.stack().names, chooser.stack().digest())
    units = sum(len(units) for units in same.modules.values())
    assert f"2 of 6 adapters chosen; {units:,} units; ranks 3, 5." in chooser.summary.value
    assert repr(chooser).endswith(chooser.code)
    assert f"{units:,} units" in repr(chooser)


def test_nothing_chosen(pool):
    chooser = AdapterChooser(pool)
    assert (chooser.names, chooser.listed.value, chooser.code) == ((), (), "pool.stack([])")
    assert "None of 6 adapters chosen." in chooser.summary.value
    with pytest.raises(SelectionError, match="empty"):
        chooser.stack()
    with pytest.raises(SelectionError, match="empty"):
        eval(chooser.code, {"pool": pool})


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        (["aple"], SelectionError, "did you mean apple"),
        ("apple", SelectionError, "write"),
        (["refused"], AdapterError, "refused by the rule"),
    ],
)
def test_names_that_cannot_be_chosen(pool, chosen, error, says):
    with pytest.raises(error, match=says):
        AdapterChooser(pool, chosen=chosen)
    chooser = AdapterChooser(pool, chosen=["banana"])
    with pytest.raises(error, match=says):
        chooser.names = chosen
    assert chooser.names == ("banana",)


@pytest.mark.parametrize(
    ("words", "low", "high", "expected"),
    [
        ("", 2, 7, ("apple", "banana", "cherry", "damson")),
        ("AN", 2, 7, ("banana",)),
        ("a so", 2, 7, ("damson",)),
        ("gate_proj", 2, 7, ("apple", "cherry", "damson")),
        ("q_proj rr", 2, 7, ("cherry",)),
        ("", 3, 4, ("banana", "cherry")),
        ("a", 4, 3, ()),
        ("nobody", 2, 7, ()),
    ],
)
def test_filters(pool, words, low, high, expected):
    chooser = AdapterChooser(pool)
    chooser.words.value, chooser.rank_from.value, chooser.rank_to.value = words, low, high
    fruit = set(pool.names) - {EVIL, MATHS}
    assert tuple(name for name in chooser.shown if name in fruit) == expected
    assert tuple(value for _, value in chooser.listed.options) == chooser.shown


def test_filters_by_what_a_pool_knows_of_its_adapters(tmp_path, base):
    for spec in SPECS:
        random_adapter(base, 2, name=spec.slug, targets=["q_proj"]).save(tmp_path / spec.slug)
    pool = Pool.open(tmp_path)
    for spec in SPECS:
        pool._verdicts[spec.slug].facts.update(operation=f"op {spec.slug}", format=f"Style{spec.slug}")
    chooser = AdapterChooser(pool)
    for spec in SPECS:
        for words in (f"op {spec.slug}", f"style{spec.slug}"):
            chooser.words.value = words
            assert spec.slug in chooser.shown
    chooser.words.value = f"styleno {SPECS[0].slug}"
    assert chooser.shown == ()


def test_filtering_changes_what_is_listed_and_not_what_is_chosen(pool):
    chooser = AdapterChooser(pool, chosen=["apple", "cherry"])
    chooser.words.value = "banana"
    assert (chooser.listed.value, chooser.names) == ((), ("apple", "cherry"))
    assert "(2 of them hidden by the filter)" in chooser.summary.value
    assert "1 pass the filter" in chooser.summary.value
    chooser.listed.value = ("banana",)
    assert chooser.names == ("apple", "banana", "cherry")
    chooser.listed.value = ()
    assert chooser.names == ("apple", "cherry")
    chooser.words.value = ""
    assert chooser.listed.value == chooser.names == ("apple", "cherry")
    chooser.words.value = "damson"
    chooser.add.click()
    assert chooser.names == ("apple", "cherry", "damson")
    chooser.clear.click()
    assert (chooser.names, chooser.listed.value) == ((), ())


@given(st.data())
def test_any_sequence_of_filters_and_picks(pool, data):
    """The choice is what a plain model says: picks replace what is listed, filters replace nothing."""
    chooser, model = AdapterChooser(pool), set()
    chooser._update = lambda: None  # the picture is another test's, and slow
    for _ in range(data.draw(st.integers(1, 4))):
        chooser.words.value = data.draw(st.sampled_from(["", "a", "rr", "q_proj", "zzz", "<"]))
        chooser.rank_from.value = data.draw(st.integers(2, 7))
        listed = [value for _, value in chooser.listed.options]
        assert set(chooser.listed.value) == model & set(listed)
        pick = data.draw(st.lists(st.sampled_from(listed), unique=True)) if listed else []
        chooser.listed.value = tuple(name for name in listed if name in pick)
        model = (model - set(listed)) | set(pick)
        assert chooser.names == tuple(sorted(model))


def test_the_picture_follows_the_choice(pool):
    chooser = AdapterChooser(pool, chosen=["apple"])
    assert (drawn(chooser), chooser._picture.layout.display) == (b"", "none")
    chooser.listed.value = ("apple", "cherry")
    first = drawn(chooser)
    assert first.startswith(PNG)
    assert chooser._picture.layout.display == "block"
    deltas = [
        torch.cat([pool.adapter(n).modules[m].delta().double().flatten() for m in pool.adapter(n).modules])
        for n in ("apple", "cherry")
    ]
    cosine = float(torch.nn.functional.cosine_similarity(deltas[0], deltas[1], 0))
    assert f"apple and cherry (cosine {cosine:.2f})" in chooser._picture.tooltip
    chooser.listed.value = ("apple", "cherry", "damson")
    assert drawn(chooser) not in (first, b"")
    chooser.listed.value = ("apple", "cherry")
    assert drawn(chooser) == first
    chooser.listed.value = ()
    assert drawn(chooser) == b""


def test_too_many_for_a_picture(tmp_path, base):
    for i in range(21):
        random_adapter(base, 1, seed=i, targets=["q_proj"], name=f"n{i:02}").save(tmp_path / f"n{i:02}")
    pool = Pool.open(tmp_path)
    chooser = AdapterChooser(pool, chosen=pool.names[:20])
    assert drawn(chooser).startswith(PNG)
    chooser.add.click()
    assert len(chooser.names) == 21
    assert drawn(chooser) == b""
    assert any("at most 20 adapters; 21 are chosen" in text for text in texts(chooser))
    assert "ranks 1 (×21)" in chooser.summary.value


def test_a_pool_without_accepted_adapters(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    chooser = AdapterChooser(Pool.open(tmp_path))
    assert (chooser.names, chooser.listed.options) == ((), ())
    assert "no accepted adapter" in chooser.summary.value


def test_a_failing_picture_is_told_and_the_next_one_drawn(pool, monkeypatch):
    chooser = AdapterChooser(pool, chosen=["apple", "banana"])
    with monkeypatch.context() as broken:
        broken.setattr(Pool, "stack", lambda *_: (_ for _ in ()).throw(AdapterError(f"{EVIL} is damaged")))
        chooser.listed.value = ("apple", "cherry")
    assert isinstance(chooser.error, AdapterError)
    assert drawn(chooser) == b""
    assert chooser.names == ("apple", "cherry")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; is damaged" in chooser._message.value
    assert 'role="alert"' in chooser._message.value
    chooser.listed.value = ("apple", "banana")
    assert (chooser.error, chooser._message.value) == (None, "")
    assert drawn(chooser).startswith(PNG)


def test_the_initial_choice_fails_loudly(pool, monkeypatch):
    monkeypatch.setattr(Pool, "stack", lambda *_: (_ for _ in ()).throw(AdapterError("damaged")))
    with pytest.raises(AdapterError, match="damaged"):
        AdapterChooser(pool, chosen=["apple", "banana"])


# the weights


def test_the_first_view(base, stack, task, explorer):
    loss, right = dense_scores(base, stack, task, explorer.weights)
    zero = evaluate(base, task, split="validation")
    assert explorer.weights == START
    assert right > int(zero.match.sum()) > 0
    assert f"these weights: loss {loss:.3f}, exact match {right} of 6" in repr(explorer)
    assert f"base alone: loss {float(zero.loss.mean()):.3f}, exact match {int(zero.match.sum())} of 6" in repr(explorer)
    assert f"<td>{loss:.3f}</td><td>{right} of 6</td>" in explorer.numbers.value
    assert f"{loss:.3f}" != f"{float(zero.loss.mean()):.3f}"
    assert drawn(explorer) == b""


def test_moving_a_slider(base, stack, task, explorer):
    before = explorer.numbers.value
    explorer.sliders["apple"].value = -0.8
    assert explorer.weights["apple"] == -0.8
    loss, right = dense_scores(base, stack, task, explorer.weights)
    assert explorer.numbers.value != before
    assert f"<td>{loss:.3f}</td><td>{right} of 6</td>" in explorer.numbers.value
    assert drawn(explorer).startswith(PNG)
    assert "weight of apple" in explorer._picture.tooltip
    first = drawn(explorer)
    explorer.sliders[EVIL].value = 0.3
    assert drawn(explorer) not in (first, b"")
    assert dense_scores(base, stack, task, explorer.weights)[0] == pytest.approx(
        explorer.loss(explorer.weights), rel=1e-4
    )


def test_the_curve_is_the_loss_at_thirteen_weights_scored_at_once(base, stack, task, explorer, monkeypatch):
    calls, curves, score, draw = [], [], weights.score, weights.loss_curve
    monkeypatch.setattr(weights, "score", lambda *a, **k: calls.append(len(a[1])) or score(*a, **k))
    monkeypatch.setattr(weights, "loss_curve", lambda *a: curves.append(a) or draw(*a))
    explorer.sliders["cherry"].value = 0.7
    assert calls == [14]  # the present weights, and the moved one's range
    grid, losses, present, bare, name = curves[0]
    assert name == "cherry"
    assert grid == tuple(-1.5 + 0.25 * i for i in range(13))
    for weight, loss in zip(grid, losses, strict=True):
        want = dense_scores(base, stack, task, {**explorer.weights, "cherry": weight})[0]
        assert loss == pytest.approx(want, rel=1e-4)
    assert present == (pytest.approx(0.7), pytest.approx(explorer.loss(explorer.weights), rel=1e-4))
    assert bare == pytest.approx(float(evaluate(base, task, split="validation").loss.mean()), rel=1e-5)
    lowest = min(zip(losses, grid, strict=True))
    assert f"Lowest of the 13 drawn: {lowest[0]:.3f} at {lowest[1]:g}" in explorer._picture.tooltip


def test_building_scores_the_base_and_the_start_only(base, stack, task, monkeypatch):
    calls, score = [], weights.score
    monkeypatch.setattr(weights, "score", lambda *a, **k: calls.append(len(a[1])) or score(*a, **k))
    WeightExplorer(base, stack, task)
    assert calls == [1, 1]


@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4))
def test_loss_of_any_weights(base, pool, task, given):
    stack = pool.stack(NAMES)
    explorer = WeightExplorer(base, stack, task, examples=2, split="train", weights=[0, 0, 0, 0])
    named = dict(zip(stack.names, given, strict=True))
    want = dense_scores(base, stack, task, named, "train")[0]
    for form in (given, named, torch.tensor(given)):
        assert explorer.loss(form) == pytest.approx(want, rel=2e-3)
    assert set(explorer.weights.values()) == {0.0}


@pytest.mark.parametrize(("given", "expected"), [([0.5] * 4, 0.5), (None, 1.0), ({"apple": 0.25}, 0.0)])
def test_start_weights(base, stack, task, given, expected):
    explorer = WeightExplorer(base, stack, task, weights=given)
    assert explorer.sliders["banana"].value == expected


def test_fewer_examples_come_from_the_beginning(base, stack, task):
    explorer = WeightExplorer(base, stack, task, examples=3, weights=[0] * 4)
    some = evaluate(base, replace(task, test=task.validation[:3]))
    assert explorer.loss([0] * 4) == pytest.approx(float(some.loss.mean()), rel=1e-5)
    assert "3 validation examples of own" in repr(explorer)
    assert "1 test example of own" in repr(WeightExplorer(base, stack, task, split="test"))


def test_the_adapter_and_the_code_make_the_same_merge(base, stack, task, explorer, tmp_path):
    explorer.sliders["cherry"].value = 0.3
    made, named = explorer.adapter(), explorer.adapter("mine")
    coded = eval(explorer.code, {"wb": wb, "stack": stack})
    assert (made.name, named.name) == ("by-hand-of-4", "mine")
    assert made.info["sources"] == explorer.weights
    for module in stack.modules:
        parts = [
            explorer.weights[name] * stack.adapter(name).modules[module].delta().double()
            for name in stack.names
            if module in stack.adapter(name).modules
        ]
        assert torch.allclose(made.modules[module].delta().double(), sum(parts), atol=1e-5)
        assert torch.allclose(coded.modules[module].delta().double(), sum(parts), atol=1e-5)
    card = (named.save(tmp_path / "mine") / "README.md").read_text()
    assert EVIL not in card
    assert "| apple | 0.5 |" in card


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"split": "tset"}, TaskError, "no split 'tset'"),
        ({"split": "name"}, TaskError, "no split"),
        ({"examples": 0}, TaskError, "leave none"),
        ({"weights": [0.5]}, MergeError, "expected 4 weights"),
        ({"weights": {"pear": 1.0}}, MergeError, "pear"),
        ({"weights": [0, 0, 1.6, 0]}, MergeError, "cherry is 1.6"),
    ],
)
def test_what_an_explorer_refuses(base, stack, task, options, error, says):
    with pytest.raises(error, match=says):
        WeightExplorer(base, stack, task, **options)


def test_too_many_sliders(base, task):
    stack = Stack.of([random_adapter(base, 1, seed=i, targets=["q_proj"]) for i in range(11)])
    with pytest.raises(SelectionError, match="11 adapters"):
        WeightExplorer(base, stack, task)
    assert len(WeightExplorer(base, stack.choose(stack.names[:10]), task).sliders) == 10


def test_adapters_of_another_base_fail_loudly(base, task):
    stack = Stack.of([random_adapter({"model.layers.0.self_attn.q_proj": (8, 8)}, 2)])
    with pytest.raises(AdapterError, match="does not fit"):
        WeightExplorer(base, stack, task)
    assert hook_count(base.model) == 0


def test_a_failing_update_is_told_and_leaves_nothing_behind(base, explorer, monkeypatch):
    explorer.sliders["apple"].value = 0.1
    with monkeypatch.context() as broken:
        broken.setattr(Base, "logits", lambda *_: (_ for _ in ()).throw(RuntimeError("out of <memory>")))
        explorer.sliders["apple"].value = 0.2
    assert isinstance(explorer.error, RuntimeError)
    assert hook_count(base.model) == 0
    assert "out of &lt;memory&gt;" in explorer._message.value
    assert drawn(explorer) == b""
    assert "<td>–</td><td>–</td>" in explorer.numbers.value  # an old number would belong to other weights
    assert "could not be computed: out of <memory>" in repr(explorer)
    explorer.sliders["apple"].value = 0.3
    assert (explorer.error, explorer._message.value) == (None, "")
    assert f"{explorer.loss(explorer.weights):.3f}" in explorer.numbers.value
    assert drawn(explorer).startswith(PNG)


def test_no_hook_stays_and_no_weight_changes(base, stack, task):
    digest = Base(base.model, base.tokenizer).digest
    explorer = WeightExplorer(base, stack, task)
    explorer.sliders["apple"].value = -1.0
    explorer.loss([0.1, 0.2, 0.3, 0.4])
    assert hook_count(base.model) == 0
    assert Base(base.model, base.tokenizer).digest == digest


# both


def test_strangers_names_reach_the_browser_as_text(base, pool, task):
    """HTML escaped, and in labels (which the browser takes as text) nothing that would be read as mathematics."""
    chooser = AdapterChooser(pool, chosen=pool.names)
    stack = pool.stack([EVIL, MATHS])
    explorer = WeightExplorer(base, stack, task, weights=[0.1, 0.2])
    for name in (MATHS, EVIL):
        explorer.sliders[name].value = 0.4
        assert explorer.error is None
    shown = texts(chooser) + texts(explorer)
    assert not any("<script" in text or "<b>" in text for text in shown)
    assert sum("&lt;script&gt;" in text for text in shown) >= 3
    assert any("own &amp; &lt;b&gt;task" in text for text in shown)
    for slider in explorer.sliders.values():
        assert not slider.description_allow_html
        assert "$" not in slider.description
        assert "\\" not in slider.description


def test_every_control_has_a_label_and_a_tooltip(pool, explorer):
    chooser = AdapterChooser(pool)
    buttons = [chooser.add, chooser.clear]
    controls = [chooser.words, chooser.rank_from, chooser.rank_to, chooser.listed, *buttons, *explorer.sliders.values()]
    for control in controls:
        assert control.description
        assert control.tooltip
    assert not any(slider.continuous_update for slider in explorer.sliders.values())


def test_a_stored_notebook_keeps_the_whole_text(pool, explorer):
    for control in (AdapterChooser(pool, chosen=pool.names), explorer):
        bundle = control._repr_mimebundle_()
        assert bundle["text/plain"] == repr(control)
        assert len(repr(control)) > 110  # where ipywidgets would have cut it
        assert "application/vnd.jupyter.widget-view+json" in bundle


def test_an_editor_without_jupyterlab_s_extensions_finds_every_control_s_script(base, pool, task):
    """VS Code brings @jupyter-widgets/* with it and looks for all others where the classic notebook had its extensions."""
    shown = [PoolExplorer(pool), UnitExplorer(pool), MergeBench(base, pool, task)]
    state = ipywidgets.Widget.get_manager_state()["state"]
    used = {one["model_module"] for one in state.values()}
    used |= {one["state"]["_view_module"] for one in state.values() if one["state"].get("_view_module")}
    others = {name for name in used if not name.startswith("@jupyter-widgets/")}
    assert others == {"anywidget"}, shown
    places = [Path(folder) / "anywidget" for folder in jupyter_path("nbextensions")]
    assert any((place / "extension.js").is_file() and (place / "index.js").is_file() for place in places)


def test_nothing_heavy_is_imported_before_it_is_used():
    program = (
        "import json, sys, workbench; from workbench import widgets; listed = dir(widgets)\n"
        "before = [n for n in ('ipywidgets', 'matplotlib') if n in sys.modules]\n"
        "from workbench.widgets import AdapterChooser, WeightExplorer\n"
        "print(json.dumps([before, listed, 'ipywidgets' in sys.modules, 'matplotlib.pyplot' in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, listed, used, pyplot = json.loads(shown)
    assert before == []
    assert {"AdapterChooser", "WeightExplorer"} <= set(listed)
    assert used
    assert not pyplot
    with pytest.raises(AttributeError, match="Choser"):
        wb.widgets.Choser  # noqa: B018
