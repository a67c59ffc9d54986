"""The merge bench: forms from signatures, a merge beside what must stand beside it, its code, and who has the base."""

import ast
import html
import json
import threading
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

import workbench as wb
from helpers import generate, hook_count, hook_logits, peft_logits, strange_pool, tiny_base
from workbench import trial as under_test
from workbench.adapt import ADAPTIVE
from workbench.base import Base
from workbench.compose import compose, grouped
from workbench.errors import BaseError, MergeError, SelectionError, TaskError
from workbench.experiment import ZERO_SHOT
from workbench.merge import methods, registry
from workbench.options import Count, Option, Range, Share
from workbench.pool import Pool
from workbench.tasks import Example, Task
from workbench.trial import BASE, CONTROL, MERGE, NEW, Trial, line, try_merge
from workbench.widgets import MergeBench, WeightExplorer
from workbench.widgets.form import Form, read
from workbench.widgets.outcome import answers_table, heat_maps, interval_picture, layers_by_projection, result_rows
from workbench.widgets.parts import MEMORY, turn

WAIT = 60
EVIL, MATHS = "<script>alert(1)</script>", r"$\frac{1}{2}$"
NAMES = ("apple", "banana", EVIL)
FEW = {"steps": 3}
WORDS = ("ab", "cde", "fg h", "i", "jkl m", "nop", "q", "rs t", "uvw", "xy")


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=10.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    return strange_pool(tmp_path_factory.mktemp("pool"), base, [*NAMES, MATHS])


@pytest.fixture(scope="module")
def task():
    some = [Example(text, text[::-1][:2]) for text in WORDS]
    return Task("own & <b>task</b>", "turn", tuple(some[:3]), tuple(some[:3]), tuple(some), max_new_tokens=3)


@pytest.fixture(scope="module")
def nano():
    pool = Pool.open("nano")
    base = Base.load(pool.base, device="cpu")
    return base, pool, wb.tasks.load("nano/rotate-right-months", n_train=4, n_validation=3, n_test=8)


@pytest.fixture
def pictures():
    """Asked for by tests that look at the pictures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Elsewhere none are drawn, which would take most of the time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("workbench.widgets.bench.interval_picture", lambda _: None)
        monkeypatch.setattr("workbench.widgets.benchtabs.heat_maps", lambda _: None)


@pytest.fixture
def bench(base, pool, task):
    return MergeBench(base, pool, task, chosen=NAMES, options=FEW, new=FEW)


@pytest.fixture
def own(monkeypatch):
    """A method of a user's own with an option of every kind; what it was called with."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    called = []

    def register():
        @registry.method("own <b>way</b>", paper="", invariances=set())
        def own_way(
            units,
            weights,
            *,
            share: Share = 0.5,
            count: Count | None = None,
            kind: Literal["a", "b"] = "a",
            flag: bool = True,
            size: float = 1.5,
            word: str = "x",
            several: tuple[float, ...] = (1.0, 0.5),
        ):
            """My way."""
            called.append((share, count, kind, flag, size, word, several))
            return units.times(share * weights[units.owner]), units.A

    return register, called


def done(bench):
    assert bench.work.wait(WAIT)
    assert bench.error is None, bench._message.value
    return bench


def merged(bench):
    bench.merge()
    return done(bench)


def executed(code, base, pool, task):
    """What the lines shown give to someone who runs them."""
    names = {"base": base, "pool": pool, "task": task, "wb": wb}
    exec(code, names)
    return names["trial"]


def same(a, b):
    pd.testing.assert_frame_equal(a.table, b.table, rtol=0, atol=0)
    digests = [{what: one and one.digest() for what, one in trial.adapters.items()} for trial in (a, b)]
    assert digests[0] == digests[1]


# what a text means under a hint


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (Share, " 0.25 ", 0.25),
        (Share, "1", 1),
        (float, "1e-6", 1e-6),
        (Count | None, "", None),
        (Count | None, "None", None),
        (Count | None, "3", 3),
        (Literal["zero", "equal"] | float, "equal", "equal"),
        (Literal["zero", "equal"] | float, "0.3", 0.3),
        (str | int | None, "apple", "apple"),
        (str | int | None, "2", 2),
        (str | int | None, "'2'", "2"),
        (str, "12", "12"),
        (bool | None, "False", False),
        (tuple[float, ...], "1, 0.5", (1, 0.5)),
        (tuple[float, ...], "[2]", (2,)),
        (tuple[float, ...], "0.5", (0.5,)),
        (tuple[float, ...], "", ()),
        (object, "[1, 2]", (1, 2)),
        (object, "a b", "a b"),
    ],
)
def test_a_text_is_read_under_its_hint(hint, text, value):
    found = read("x", Option(0, hint), text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Share, "1.5"),
        (Share, "nan"),
        (Share, ""),
        (Share, "True"),
        (Count, "2.5"),
        (Count | None, "0"),
        (int, "two"),
        (float, "1e999"),
        (float, "__import__('os')"),
        (tuple[float, ...], "1, a"),
        (Annotated[float, Range(0)], "-1"),
        (bool | None, "1"),
    ],
)
def test_what_a_hint_does_not_allow_is_a_sentence(hint, text):
    with pytest.raises(MergeError, match=r"x is .*, expected "):
        read("x", Option(0, hint), text)


@pytest.mark.parametrize("name", [*ADAPTIVE, *methods()])
def test_every_method_has_a_form_whose_defaults_are_the_methods(name):
    options = {**methods(), **ADAPTIVE}[name].options
    form = Form(options)
    assert list(form.fields) == list(options)
    assert form.options() == form.texts == {}
    for key, field in form.fields.items():
        assert field.description
        assert str(options[key]) in field.tooltip
        default = options[key].default
        if type(field).__name__ == "Text":  # typed anew, a default reads as itself (tuples are shown rounded)
            found = read(key, options[key], field.value)
            assert found == (pytest.approx(default, rel=1e-5) if isinstance(default, tuple) else default)
        elif type(field).__name__ == "Dropdown":
            assert field.value == default
            field.value = next(value for _, value in field.options if value != default)
            assert form.options() == {key: field.value}
            field.value = default
        else:
            field.value = not field.value
            assert form.options() == {key: field.value}
            field.value = not field.value


def test_a_method_of_ones_own_appears_with_its_form(own, base, pool, task):
    register, called = own
    register()
    bench = MergeBench(base, pool, task, chosen=["apple"], method="own <b>way</b>", options={"size": 2.0}, new=FEW)
    kinds = {name: type(field).__name__ for name, field in bench.form.fields.items()}
    texts = dict.fromkeys(("share", "count", "size", "word", "several", "rank"), "Text")
    assert kinds == {**texts, "kind": "Dropdown", "flag": "Checkbox"}
    assert "My way." in bench.how._doc.value
    for name, value in {"share": "0.25", "count": "3", "kind": "b", "flag": False, "several": "2, 3"}.items():
        bench.form.fields[name].value = value
    merged(bench)
    assert set(called) == {(0.25, 3, "b", False, 2.0, "x", (2, 3))}
    scale = bench.trial.scale * 0.25
    units = pool.adapter("apple").modules
    for module, factors in bench.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), scale * units[module].delta())
    assert "own &lt;b&gt;way&lt;/b&gt;" in bench.result.value


def test_a_method_registered_later_is_listed_too(own, bench):
    register, _ = own
    assert "own <b>way</b>" not in [name for _, name in bench.method.options]
    register()
    bench.chooser.names = ["apple"]
    assert "own <b>way</b>" in [name for _, name in bench.method.options]
    assert bench.method.value == "coefficients"
    assert bench.form.options() == FEW
    bench.method.value = "own <b>way</b>"
    assert "share" in bench.form.fields


def test_each_methods_form_keeps_what_was_typed(bench):
    first = list(bench.form.fields)
    bench.method.value = "ties"
    assert list(bench.form.fields) == ["density", "elect", "divide", "rank"] != first
    bench.form.fields["density"].value = "0.5"
    assert bench.code.count("'ties', {'density': 0.5}") == 1
    bench.method.value = "coefficients"
    assert bench.form.fields["steps"].value == "3"
    bench.method.value = "ties"
    assert bench.form.options() == {"density": 0.5}


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("steps", "-1", "coefficients: steps|steps is &#x27;-1&#x27;, expected a whole number ≥ 0"),
        ("l1", "<b>", "l1 is &#x27;&lt;b&gt;&#x27;, expected a finite number ≥ 0"),
        ("lr", "0", "lr is 0, expected above 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_told_and_nothing_runs(bench, monkeypatch, field, text, says):
    monkeypatch.setattr("workbench.widgets.bench.try_merge", lambda *_, **__: pytest.fail("it ran"))
    bench.form.fields[field].value = text
    assert isinstance(bench.error, MergeError)
    assert any(one in bench._message.value for one in says.split("|"))
    bench.error = None
    bench.merge()
    assert isinstance(bench.error, MergeError)
    assert not bench.work.running
    with pytest.raises(MergeError):
        bench.code  # noqa: B018
    assert "no code: " in repr(bench)
    bench.form.fields[field].value = "1"
    assert bench.error is None
    assert f"'{field}': 1" in bench.code


# the trial


def test_a_trial_is_what_compare_has_of_the_same_recipe(base, pool, task):
    recipes = [wb.Recipe("coefficients", select="random", k=3, steps=3), wb.Recipe("ties", k=2, density=0.4)]
    new = wb.Recipe("new adapter", steps=4)
    rows = wb.compare(base, pool, [task], recipes, seeds=[1], baselines=(ZERO_SHOT, new))
    for recipe in recipes:
        told = rows[rows.method == recipe.method].set_index("control")
        names = json.loads(told.chosen[""])
        trial = try_merge(base, pool, names, task, recipe.method, recipe.options, seed=1, new={"steps": 4})
        found = trial.table[["accuracy", "loss"]].to_numpy()
        wanted = [told.loc[""], rows[rows.method == "zero-shot"].iloc[0], rows[rows.method == "new adapter"].iloc[0]]
        wanted = pd.DataFrame([*wanted, told.loc["sigma"]])[["accuracy", "loss"]].to_numpy(float)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
        assert list(trial.table.index) == [MERGE, BASE, NEW, CONTROL]
        assert (trial.scale is None) == (recipe.method == "coefficients")
        if trial.scale:
            assert trial.scale == told.scale[""]


def test_intervals(base, pool, task, monkeypatch):
    trial = try_merge(base, pool, NAMES, task, "sum", new=FEW)
    n, z = len(task.test), norm.ppf(0.975)
    for what, row in trial.table.iterrows():
        p = row["accuracy"]
        centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        wanted = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
        np.testing.assert_allclose(row[["low", "high"]].astype(float), np.clip(wanted, 0, 1), atol=1e-12)
        assert row["loss_low"] < row["loss"] < row["loss_high"]
        assert np.isnan(row["difference"]) == (what == MERGE)
        if what != MERGE:
            gap = trial.table.accuracy[MERGE] - p
            assert row["difference"] == pytest.approx(gap)
            assert row["difference_low"] <= gap <= row["difference_high"]


def test_a_fit_is_explained_by_its_summary(bench):
    for name, one in ADAPTIVE.items():
        bench.how.method.value = name
        assert f">{html.escape(f'{one.summary} {one.paper}'.strip())}<" in bench.how._doc.value


def test_every_method_that_the_bench_lists_gives_a_trial(base, pool, task):
    names, quick = NAMES[:2], {"steps": 2, "merge_steps": 2, "budget": 4, "iterations": 1}
    place = under_test.Workplace(base, pool)
    for name, record in {**methods(), **ADAPTIVE}.items():
        if getattr(record, "needs", ""):
            continue
        options = {key: value for key, value in quick.items() if key in record.options}
        trial = try_merge(base, pool, names, task, name, options, new=FEW, place=place)
        assert trial.table[["accuracy", "loss", "low", "high"]].notna().all(axis=None), name
        assert (trial.coefficients is None) == (name in methods())
    assert trial.coefficients.shape == (len(trial.modules), 2)
    assert hook_count(base.model) == 0


def test_merges_that_look_at_examples_find_those_of_bundled_adapters(nano):
    base, pool, task = nano
    names = ["rotate-right-animals", "rotate-right-letters"]
    bench = MergeBench(base, pool, task, chosen=names, method="regmean", new={"steps": 1})
    assert "Not listed" not in bench.how._out.value
    stack = pool.stack(names)
    known = wb.merge.collect(base, stack, wb.tasks.upstream(stack, 16), gradients=True)
    for method in ("regmean", "fisher"):
        bench.method.value = method
        merged(bench)
        oracle = wb.merge(stack, method, statistics=known)
        oracle = (oracle.truncate() if method == "fisher" else oracle).times(bench.trial.scale)
        for module, factors in bench.adapter.modules.items():
            torch.testing.assert_close(factors.delta(), oracle.modules[module].delta())


def test_of_strangers_they_are_left_out_with_a_sentence(bench, base, pool, task):
    listed = [name for _, name in bench.method.options]
    assert not {"regmean", "fisher"} & set(listed)
    assert {"ties", "coefficients"} <= set(listed)
    assert "Not listed: regmean, fisher. They look at examples" in bench.how._out.value
    with pytest.raises(MergeError, match=r"fisher.*Not listed"):
        MergeBench(base, pool, task, method="fisher")
    with pytest.raises(MergeError, match="regmean needs inputs"):
        try_merge(base, pool, NAMES, task, "regmean")


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"method": "tise"}, MergeError, "did you mean 'ties'"),
        ({"options": {"step": 1}}, MergeError, "no option 'step'"),
        ({"options": {"target": "durian"}}, MergeError, "not among the chosen"),
        ({"new": {"stepz": 1}}, MergeError, "stepz"),
        ({"control": "none"}, MergeError, "choose one of sigma"),
        ({"names": []}, SelectionError, "empty"),
    ],
)
def test_what_a_trial_refuses(base, pool, task, changed, error, says):
    given = {"names": NAMES, "method": "coefficients"} | changed
    with pytest.raises(error, match=says):
        try_merge(base, pool, given.pop("names"), task, given.pop("method"), **given)
    with pytest.raises(TaskError, match="needs training, validation and test"):
        try_merge(base, pool, NAMES, replace(task, validation=()), "sum")


def test_a_named_target_is_one_place_in_the_control_too(base, pool, task):
    options = {"start": "target", "target": "banana", "steps": 0}
    trial = try_merge(base, pool, NAMES, task, "coefficients", options, new=FEW)
    assert trial.coefficients.abs().sum().gt(0).tolist() == [False, True, False]


def test_a_fit_that_is_stopped_can_be_had_again_by_its_code(base, pool, task):
    def tell(done, total, words):
        return words.startswith("loss") and done == 2

    options = {"steps": 9, "every": 1}
    trial = try_merge(base, pool, NAMES, task, "coefficients", options, new=FEW, tell=tell)
    assert (trial.told, trial.until) == ((2, 9), 2)
    assert trial.code.endswith("until=2)")
    again = eval(trial.code, {"try_merge": try_merge, "base": base, "pool": pool, "task": task})
    same(trial, again)
    whole = try_merge(base, pool, NAMES, task, "coefficients", options, new=FEW)
    assert whole.until is None
    assert whole.adapters[CONTROL].digest() == trial.adapters[CONTROL].digest()
    assert whole.adapter.digest() != trial.adapter.digest()


@pytest.mark.parametrize("stage", [BASE, CONTROL, NEW])
def test_no_merge_without_what_stands_beside_it(base, pool, task, stage):
    seen = []

    def tell(done, total, words):
        seen.append(words)
        return words.startswith(stage) and (done == 1 or stage == BASE)

    place = under_test.Workplace(base, pool)
    assert try_merge(base, pool, NAMES, task, "coefficients", FEW, new=FEW, place=place, tell=tell) is None
    assert seen[-1].startswith(stage)
    assert not any(key[0] == stage for key in place.beside)  # half a control is not kept
    assert hook_count(base.model) == 0


# the bench


def test_nothing_runs_by_itself(base, pool, task):
    calls = []
    handle = base.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        bench = MergeBench(base, pool, task, chosen=NAMES)
        bench.method.value = "ties"
        bench.chooser.names = ["apple"]
    finally:
        handle.remove()
    assert (calls, bench.trial, bench.work.running) == ([], None, False)
    assert "Nothing is merged yet" in repr(bench)
    with pytest.raises(MergeError, match="press Merge"):
        bench.adapter  # noqa: B018


@pytest.mark.parametrize(
    ("method", "options"), [("coefficients", FEW), ("dare_ties", {"seed": 3, "density": 0.4, "rank": 2})]
)
def test_the_code_shown_is_what_ran(pictures, base, pool, task, method, options):
    bench = MergeBench(base, pool, task, chosen=NAMES, method=method, options=options, seed=2, new=FEW)
    bench.how.control.value = "norm"
    merged(bench)
    same(bench.trial, executed(bench.code, base, pool, task))
    assert bench.adapter is bench.trial.adapter
    assert "display:none" not in bench.result.value
    bench.show_code.value = True
    assert bench._code.layout.display == "block"
    assert "control=&#x27;norm&#x27;" in bench._code.value
    for what in (MERGE, BASE, NEW, CONTROL):
        assert f">{what}" in bench.result.value
    assert bytes(bench._picture.value).startswith(b"\x89PNG")
    assert repr(bench).endswith(bench.code)
    assert all(cell in repr(bench) for cells in result_rows(bench.trial) for cell in cells[:2])


def test_settings_changed_since_are_said(bench):
    merged(bench)
    before = bench.result.value
    bench.form.fields["steps"].value = "4"
    assert "earlier settings" in bench._said.value
    assert "{&#x27;steps&#x27;: 4}" in bench._code.value
    assert bench._code.value.count("try_merge(") == 2
    assert bench.result.value == before
    bench.form.fields["steps"].value = "3"
    assert bench._said.value == ""


def test_a_second_merge_trains_nothing_beside_it_again(bench, monkeypatch):
    trained, drawn = [], []
    train, draw = under_test.train_many, under_test.random_like
    monkeypatch.setattr(under_test, "train_many", lambda *a, **k: trained.append(1) or train(*a, **k))
    monkeypatch.setattr(under_test, "random_like", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    first = merged(bench).trial
    same(first, merged(bench).trial)
    assert (len(trained), len(drawn)) == (1, 1)
    bench.method.value = "sum"
    merged(bench)
    assert (len(trained), len(drawn)) == (1, 2)  # another recipe has a control of its own
    bench.how.seed.value = 1
    merged(bench)
    assert (len(trained), len(drawn)) == (2, 3)


def test_stopping_the_fit_in_the_bench(bench, base, pool, task):
    bench.form.fields["steps"].value = "8"
    seen = []

    def stop(change):
        seen.append(change["new"])
        if change["new"].startswith("loss") and "(2 of 8)" in change["new"]:
            bench.work._stop.click()

    bench.work._words.observe(stop, "value")
    merged(bench)
    assert any(words.startswith("random control: loss") for words in seen)
    assert any(words.startswith("new adapter: loss") for words in seen)
    assert bench.trial.until == 2
    assert "stopped at 2 of 8" in bench.result.value
    assert "until=2" in bench.code
    same(bench.trial, executed(bench.code, base, pool, task))
    bench.form.fields["steps"].value = "9"
    assert "until" not in bench.code


def test_stopping_before_the_control_shows_no_merge(bench):
    bench.work._words.observe(lambda change: bench.work.stop() if "control" in change["new"] else None, "value")
    merged(bench)
    assert bench.trial is None
    assert "no merge is shown without them" in bench._said.value
    assert bench.result.value == ""
    assert not bench.go.disabled


def test_nothing_chosen_and_adapters_that_cannot_be_merged_so(bench):
    bench.chooser.names = []
    bench.merge()
    assert "no adapter is chosen" in bench._message.value
    bench.chooser.names = NAMES
    bench.method.value = "slerp"
    bench.merge()
    assert bench.work.wait(WAIT)
    assert "slerp merges 2 adapters, got 3" in bench._message.value
    assert "Traceback" in bench._message.value
    assert not bench.go.disabled
    bench.chooser.names = NAMES[:2]
    merged(bench)


# one at a time


def test_a_job_has_the_base_to_itself(bench, base):
    bench.tabs.open_sliders()
    explorer = done(bench).tabs.explorer
    held, free, numbers = threading.Event(), threading.Event(), explorer.numbers.value
    bench.run(lambda tell: (held.set(), free.wait(WAIT)), lambda: None)
    assert held.wait(WAIT)
    assert bench.go.disabled
    assert all(slider.disabled for slider in explorer.sliders.values())
    calls, handle = [], base.model.register_forward_hook(lambda *_: calls.append(1))
    explorer.sliders["apple"].value = 0.3  # a slider is disabled in the browser only
    other = None
    with pytest.raises(BaseError, match="busy with a job"):
        other = WeightExplorer(base, explorer._stack, explorer.task)
    handle.remove()
    assert (calls, other) == ([], None)
    assert isinstance(explorer.error, BaseError)
    assert "busy with a job" in explorer._message.value
    bench.tabs.answer()
    assert "a job is running" in bench._message.value
    free.set()
    assert bench.work.wait(WAIT)
    assert not any(slider.disabled for slider in explorer.sliders.values())
    explorer.sliders["apple"].value = 0.4
    assert explorer.error is None
    assert explorer.numbers.value != numbers


def test_jobs_of_two_benches_take_turns_on_one_base(bench, base, pool, task):
    other, order, held, free = MergeBench(base, pool, task), [], threading.Event(), threading.Event()
    bench.run(lambda tell: (held.set(), free.wait(WAIT), order.append("first")), lambda: None)
    assert held.wait(WAIT)
    other.run(lambda tell: order.append("second"), lambda: None)
    assert not other.work.wait(0.3)
    assert "waiting for the base" in other.work._words.value
    free.set()
    assert bench.work.wait(WAIT)
    assert other.work.wait(WAIT)
    assert order == ["first", "second"]


def test_waiting_for_the_base_can_be_stopped(base):
    def other():
        with turn(base):
            held.set()
            free.wait(WAIT)

    held, free = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(WAIT)
    asked = []
    with pytest.raises(BaseError, match="busy"), turn(base, stop=lambda: asked.append(1) or len(asked) > 2):
        pytest.fail("it is not alone")
    free.set()
    thread.join()
    assert len(asked) == 3
    with turn(base), turn(base):
        pass
    with turn(base):
        pass


# the pages


def test_sliders_start_at_the_fits_mean_coefficients(bench):
    merged(bench).tabs.open_sliders()
    explorer = done(bench).tabs.explorer
    means = bench.trial.coefficients.mean()
    assert list(explorer.weights.values()) == pytest.approx(means.tolist(), abs=1e-6)
    assert explorer in bench.tabs._sliders.children
    bench.chooser.names = ["apple"]
    bench.tabs.open_sliders()
    assert done(bench).tabs.explorer.weights == {"apple": 1.0}


def test_more_adapters_than_sliders(base, pool, task, monkeypatch):
    monkeypatch.setattr("workbench.widgets.weights.MOST", 2)
    bench = MergeBench(base, pool, task, chosen=NAMES)
    bench.tabs.open_sliders()
    assert bench.work.wait(WAIT)
    assert "expected at most 2" in bench._message.value
    assert "expected at most 2" in bench.tabs.opened.value


def test_an_answer_of_each_side_by_side(bench, base):
    merged(bench).tabs.prompt.value = "turn: ab = "
    bench.tabs.limit.value = 4
    bench.tabs.answer()
    done(bench)
    found = bench.trial.answers(base, "turn: ab = ", 4)
    assert list(found) == [MERGE, BASE, NEW, CONTROL]
    ids = base.tokenizer("turn: ab = ")["input_ids"]
    for what, text in found.items():
        adapter = bench.trial.adapters[what]
        with compose(base.model, grouped([adapter], base.device) if adapter else {}):
            (written,) = generate(base, [ids], 4, base.model)
        assert base.tokenizer.decode(written, skip_special_tokens=True) == text
    assert bench.tabs.answers.value == answers_table(found)
    bench.tabs.prompt.value = ""
    bench.tabs.answer()
    assert bench.work.wait(WAIT)
    assert bench.error is not None


def test_answers_are_shown_as_text():
    shown = answers_table({"merge": "<img src=x onerror=alert(1)>\n$x$\x00", "base alone": ""})
    assert "&lt;img" in shown
    assert "<img" not in shown
    assert "mathjax_ignore" in shown
    assert "$x$\\x00" in shown
    assert "(nothing)" in shown


def test_before_there_is_a_merge_the_pages_say_so(bench):
    for press in (bench.tabs.answer, bench.tabs.write):
        press()
        assert bench.work.wait(WAIT)
        assert "nothing is merged yet" in bench._message.value


def test_plain_peft_loads_what_is_saved(bench, base, tmp_path):
    bench.tabs.path.value = str(tmp_path / "made")
    merged(bench).tabs.write()
    done(bench)
    assert "Saved: PeftModel.from_pretrained(model, " in bench.tabs.saved.value
    ids = torch.tensor([base.tokenizer("turn: ab = ")["input_ids"]])
    theirs = peft_logits(base, tmp_path / "made", ids)
    torch.testing.assert_close(theirs, hook_logits(base, bench.adapter, ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (theirs - base.model(ids).logits).abs().max() > 1e-2
    before = (tmp_path / "made" / "adapter_model.safetensors").stat()
    bench.tabs.write()
    assert bench.work.wait(WAIT)
    assert "exists already; choose another folder" in bench._message.value
    assert "exists already" in bench.tabs.saved.value
    after = (tmp_path / "made" / "adapter_model.safetensors").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    bench.tabs.path.value = "  "
    bench.tabs.write()
    assert bench.work.wait(WAIT)
    assert "no folder is given" in bench._message.value


def test_a_routed_model_says_why_it_cannot_be_saved(base, pool, task, tmp_path):
    bench = merged(MergeBench(base, pool, task, chosen=NAMES, method="arrow", new=FEW))
    bench.tabs.answer()
    done(bench)
    bench.tabs.path.value = str(tmp_path / "router")
    bench.tabs.write()
    assert bench.work.wait(WAIT)
    assert "there is no adapter to save" in bench._message.value
    assert not (tmp_path / "router").exists()


def test_coefficients_lie_where_their_layer_and_projection_do(pictures, bench):
    trial = merged(bench).trial
    figure = heat_maps(trial.coefficients)
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == len(NAMES)
    for ax, name in zip(panels, trial.names, strict=True):
        image, rows, columns = (
            ax.images[0].get_array(),
            *([one.get_text() for one in ticks()] for ticks in (ax.get_yticklabels, ax.get_xticklabels)),
        )
        for module, value in trial.coefficients[name].items():
            i, j = rows.index(module.split(".")[2]), columns.index(module.split(".")[-1])
            assert float(image[i, j]) == pytest.approx(value, abs=1e-6)
    assert bytes(bench.tabs._maps.value).startswith(b"\x89PNG")
    assert "one panel per adapter" in bench.tabs._caption.value
    bench.method.value = "sum"
    merged(bench)
    assert bytes(bench.tabs._maps.value) == b""
    assert "learns no coefficients" in bench.tabs._caption.value


def test_rows_and_columns_of_other_models():
    found = layers_by_projection(
        [
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.q",
            "lm_head",
        ]
    )
    assert found.layer.tolist() == ["encoder.block.0", "decoder.block.0", "decoder.block.0", ""]
    assert found.projection.nunique() == 3
    assert not found.duplicated().any()
    plain = layers_by_projection(["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj"])
    assert plain.values.tolist() == [["0", "q_proj"], ["11", "up_proj"]]
    many = pd.DataFrame(np.ones((2, 11)), index=plain.index, columns=[f"a{i}" for i in range(11)])
    many["a10"] = 3.0
    titles = [ax.get_title() for ax in heat_maps(many).axes if ax.get_title()]
    assert len(titles) == 8
    assert "a10" in titles


def test_the_picture_has_every_row_and_its_interval(bench):
    trial = merged(bench).trial
    first, second = interval_picture(trial).axes
    assert [one.get_text().replace("\n", " ") for one in first.get_xticklabels()] == list(trial.table.index)
    for ax, column in ((first, "accuracy"), (second, "loss")):
        drawn = ax.containers[0].lines[0].get_ydata()
        np.testing.assert_allclose(np.asarray(drawn, float), trial.table[column])


# manners


def test_settings_outlive_the_control_under_a_key(base, pool, task):
    first = MergeBench(base, pool, task, chosen=["apple"], key="one")
    first.chooser.names = ["banana", MATHS]
    first.method.value = "ties"
    first.form.fields["density"].value = "0.7"
    first.how.seed.value, first.how.control.value = 4, "spectrum"
    first.tabs.prompt.value, first.tabs.limit.value, first.tabs.path.value = "my prompt", 2, "out/x"
    again = MergeBench(base, pool, task, chosen=["apple"], key="one")
    assert again.code == first.code
    assert (again.tabs.prompt.value, again.tabs.limit.value, again.tabs.path.value) == ("my prompt", 2, "out/x")
    assert again.trial is None
    assert MergeBench(base, pool, task, chosen=["apple"], key="other").names == ("apple",)
    assert MergeBench(base, pool, task, chosen=["apple"]).names == ("apple",)
    kept = MEMORY["MergeBench", "one"]
    kept |= {"chosen": ["banana", "gone <b>"], "method": "vanished"}
    left = MergeBench(base, pool, task, key="one")
    assert (left.names, left.method.value) == (("banana",), "coefficients")
    assert "no longer to be had: gone &lt;b&gt;, method vanished" in left._said.value


def test_strangers_names_reach_the_browser_as_text(base, pool, task):
    bench = MergeBench(base, pool, task, chosen=[EVIL, MATHS], method="sum", new=FEW)
    bench.show_code.value = True
    merged(bench).tabs.open_sliders()
    done(bench)
    widgets, shown = [bench], []
    while widgets:
        one = widgets.pop()
        widgets += getattr(one, "children", ())
        if type(one).__name__ == "HTML":
            shown.append(one.value)
        elif type(one).__name__ != "SelectMultiple":
            assert "<script" not in str(getattr(one, "description", "")) or not one.description_allow_html
    assert not any("<script" in text or "<b>" in text for text in shown)
    assert sum("&lt;script&gt;" in text for text in shown) >= 2
    assert any("own &amp; &lt;b&gt;task" in text for text in shown)
    assert all("mathjax_ignore" in text for text in shown if "frac" in text)


def test_every_control_has_a_label_and_a_tooltip(bench):
    tabs = bench.tabs
    buttons = [bench.go, bench.show_code, tabs.opening, tabs.asking, tabs.saving]
    own = [bench.method, bench.how.seed, bench.how.control, tabs.prompt, tabs.limit, tabs.path]
    for control in [*buttons, *own, *bench.form.fields.values()]:
        assert control.description
        assert control.tooltip
    bundle = bench._repr_mimebundle_()
    assert bundle["text/plain"] == repr(bench)


def test_a_line_says_only_what_is_not_default():
    assert line(["a"], "ties", {}) == "try_merge(base, pool, ['a'], task, 'ties')"
    call = line(["a", "it's"], "x", {"k": (1, 2)}, 3, "norm", {"steps": 4}, 5)
    arguments = ast.parse(call, mode="eval").body
    assert [ast.literal_eval(one) for one in (arguments.args[2], *arguments.args[4:])] == [
        ["a", "it's"],
        "x",
        {"k": (1, 2)},
    ]
    assert {one.arg: ast.literal_eval(one.value) for one in arguments.keywords} == {
        "seed": 3,
        "control": "norm",
        "new": {"steps": 4},
        "until": 5,
    }
    assert Trial.__doc__
