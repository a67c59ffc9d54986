"""Adaptive methods by name: options, schedules, provenance, odd tasks, watching and interrupting a fit."""

import os
import random
import re
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from helpers import hook_count, hook_logits, random_adapter, some_ids, tiny_base
from workbench.adapt import ADAPTIVE, fit_many, options_of, search
from workbench.adapt.coefficients import COEFFICIENTS, learn_coefficients
from workbench.adapt.gradient import Schedule
from workbench.adapt.progress import Bar
from workbench.adapters import Adapter
from workbench.errors import MergeError, SelectionError, TaskError
from workbench.evaluate import encode, encode_task
from workbench.options import Option
from workbench.stack import Stack
from workbench.tasks import Example, Task

QUICK = {
    "coefficients": {"steps": 3, "start": "uniform"},
    "lorahub": {"budget": 10},
    "adamerging": {"steps": 3, "objective": "entropy"},
    "pi_tuning": {"steps": 3, "rank": 2, "lr": 0.01},
    "arrow": {"steps": 2, "trained": True},
    "prior": {"steps": 2, "merge_steps": 2, "rank": 2},
    "ridge": {"iterations": 1, "penalties": (1.0,), "lengths": (1.0,)},
}
SCHEDULE = {"steps", "lr", "batch", "every", "clip", "weight_decay", "warmup", "checkpoint"}


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stack(base):
    return Stack.of([random_adapter(base, (2, 5, 1)[i], i, name=f"a{i}", size=0.2) for i in range(3)])


def own_task(held_out=3, **changed):
    rng = random.Random(1)
    made = tuple(Example("".join(rng.choice("abc") for _ in range(n % 5 + 1)) + f" {n}", "ab") for n in range(12))
    return replace(Task("own", "say", made[:6], made[6 : 6 + held_out], made[9:]), **changed)


def states():
    return np.random.get_state(), torch.get_rng_state(), random.getstate()


def same_states(one, other):
    numpy = all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    return numpy and torch.equal(one[1], other[1]) and one[2] == other[2]


def test_every_method_is_tried_here():
    assert set(QUICK) == set(ADAPTIVE)
    assert all(ADAPTIVE[name].name == name for name in ADAPTIVE)
    assert (ADAPTIVE["coefficients"].version, ADAPTIVE["lorahub"].version) == (1, 2)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method_by_name(base, stack, method):
    """What comes back says what it is made of; seeds are its own, and the base is as it was."""
    task, options, found = own_task(), QUICK[method], []
    for outer in (0, 1):
        np.random.seed(outer)
        torch.manual_seed(outer)
        random.seed(outer)
        before = states()
        found.append(wb.adapt(base, stack, task, method, seed=3, **options))
        assert same_states(states(), before)
    fitted, again = found
    assert torch.equal(fitted.coefficients, again.coefficients)
    assert fitted.coefficients.shape == (len(stack.modules), 3)
    assert torch.isfinite(fitted.coefficients).all()
    info = fitted.adapter.info
    assert (info["method"], info["task"], info["options"]) == (method, "own", options)
    assert list(info["sources"]) == list(stack.names)
    assert list(info["sources"].values()) == pytest.approx(fitted.coefficients.mean(0).tolist())
    assert info.get("paper", "") == ADAPTIVE[method].paper
    assert fitted.passes > 0
    assert fitted.tokens > fitted.passes
    assert fitted.parameters > 0
    assert torch.isfinite(fitted.curves.train).all()
    if method in ("lorahub", "ridge"):
        assert ADAPTIVE[method].schedule is None
    assert hook_count(base.model) == 0
    assert not any(p.requires_grad for p in base.model.parameters())
    train, validation = ([encode_task(base, task, s)] for s in (task.train, task.validation))
    (same,) = fit_many(base, [stack], train, validation, method, seeds=[3], names=["mine"], **options)
    assert torch.equal(same.coefficients, fitted.coefficients)
    assert same.adapter.name == "mine"


def test_adapt_is_the_method_s_function_on_the_task_s_examples(base, stack):
    task = own_task()
    fitted = wb.adapt(base, stack, task, "coefficients", seed=3, steps=4, granularity="expert", every=2)
    train, validation = ([encode(base, task.prompt(e), e.target) for e in s] for s in (task.train, task.validation))
    schedule = Schedule(steps=4, every=2)
    (want,) = learn_coefficients(base, [stack], [train], [validation], schedule, seeds=[3], granularity="expert")
    assert torch.equal(fitted.coefficients, want.coefficients)
    assert torch.equal(fitted.curves.validation, want.curves.validation)
    assert (fitted.passes, fitted.tokens, fitted.curves.at) == (want.passes, want.tokens, (0, 2, 4))
    adapters = [stack.adapter(i) for i in range(3)]
    again = wb.adapt(base, adapters, task, seed=3, steps=4, granularity="expert", every=2)
    assert torch.equal(again.coefficients, fitted.coefficients)
    (plain,) = fit_many(base, [stack], [train], [validation], "coefficients", seeds=[3], steps=np.int64(4), every=2,
                        granularity="expert")  # fmt: skip
    assert torch.equal(plain.coefficients, fitted.coefficients)


def test_what_was_fitted_is_saved_with_its_story(base, stack, tmp_path):
    fitted = wb.adapt(base, stack, own_task(), "adamerging", steps=2, granularity="unit")
    fitted.adapter.save(tmp_path / "mirror")
    loaded, ids = Adapter.load(tmp_path / "mirror"), some_ids(base)
    torch.testing.assert_close(hook_logits(base, loaded, ids), hook_logits(base, fitted.adapter, ids))
    card = (tmp_path / "mirror" / "README.md").read_text(encoding="utf-8")
    assert "adamerging" in card
    assert "2310.02575" in card


def test_without_validation_examples_the_last_step_is_kept(base, stack):
    task = own_task(0)
    fitted = wb.adapt(base, stack, task, steps=3)
    train = [encode(base, task.prompt(e), e.target) for e in task.train]
    (want,) = learn_coefficients(base, [stack], [train], None, Schedule(steps=3), seeds=[0])
    assert torch.equal(fitted.coefficients, want.coefficients)
    assert fitted.coefficients.any()


@pytest.mark.parametrize("method", ["coefficients", "lorahub"])
@pytest.mark.parametrize(
    "change",
    [
        {"train": own_task().train[:1]},
        {"validation": own_task().train},
        {"validation": own_task().train[:2] * 2},
        {"validation": ()},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"train": (*own_task().train, Example("b", "a much longer target than the others have"))},
    ],
    ids=["one example", "validation is train", "duplicates", "no validation", "too long", "just long enough", "uneven"],
)
def test_odd_tasks(base, stack, method, change):
    """Each is fitted, and to what a plain encoding of the task says: the loss at the start is the base's."""
    task = own_task(**change)
    start = {"budget": 5} if method == "lorahub" else {"steps": 2, "batch": 8}
    fitted = wb.adapt(base, stack, task, method, **start)
    rows = [encode(base, task.prompt(e), e.target, task.max_new_tokens) for e in task.train]
    with torch.no_grad():
        losses = []
        for row in rows:
            logits = base.model(input_ids=torch.tensor([row.prompt + row.answer])).logits[0, len(row.prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer), reduction="sum"))
    want = float(sum(losses)) / sum(len(row.answer) for row in rows)
    assert float(fitted.curves.train[0]) == pytest.approx(want, rel=1e-4)
    assert torch.isfinite(fitted.coefficients).all()
    if task.max_new_tokens == 1:
        assert not any(row.reachable for row in rows)


@pytest.mark.parametrize("method", ["coefficients", "lorahub"])
def test_tasks_that_cannot_be_fitted(base, stack, method):
    with pytest.raises(TaskError, match="own has no training examples to fit to"):
        wb.adapt(base, stack, own_task(train=()), method)
    with pytest.raises(TaskError, match="nothing to score: the target"):
        wb.adapt(base, stack, own_task(train=(Example("a", ""),)), method)
    with pytest.raises(TaskError, match=r"does not know every character of the target 'ж'"):
        wb.adapt(base, stack, own_task(0, train=(Example("a", "ж"),)), method)
    with pytest.raises(SelectionError, match="empty"):
        wb.adapt(base, [], own_task(), method)


def test_unknown_methods_and_options(base, stack):
    task = own_task()
    with pytest.raises(MergeError, match=r"no adaptive method 'coeficients' \(did you mean 'coefficients'\?\)"):
        wb.adapt(base, stack, task, "coeficients")
    with pytest.raises(MergeError, match="choose one of coefficients, lorahub, adamerging, pi_tuning"):
        wb.adapt(base, stack, task, "xyz")
    with pytest.raises(
        MergeError, match=r"coefficients has no option 'bugdet'; it takes granularity, activation, start"
    ):
        wb.adapt(base, stack, task, bugdet=3)
    with pytest.raises(MergeError, match=r"no option 'granularty' \(did you mean 'granularity'\?\)"):
        wb.adapt(base, stack, task, granularty="unit")
    with pytest.raises(
        MergeError, match=r"lorahub has no option 'steps'; it takes space, optimiser, objective, budget$"
    ):
        fit_many(base, [stack], [[]], [[]], "lorahub", seeds=[0], steps=3)
    for name in ("seeds", "names", "watch"):
        with pytest.raises(MergeError, match=f"coefficients has no option '{name}'"):
            ADAPTIVE["coefficients"].settings({name: None})


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "coefficients",
            {"granularity": "units"},
            "granularity is 'units', expected one of 'expert', 'layer', 'sublayer'",
        ),
        ("coefficients", {"start": "ones"}, "start is 'ones', expected one of .*'target' or a finite number"),
        ("coefficients", {"start": float("nan")}, "start is nan, expected"),
        ("coefficients", {"activation": "relu"}, "activation is 'relu', expected one of 'leaky_relu'"),
        ("coefficients", {"objective": "supervised"}, "objective is 'supervised', expected one of 'loss', 'entropy'"),
        ("coefficients", {"l1": -1.0}, r"l1 is -1\.0, expected a finite number ≥ 0"),
        ("coefficients", {"l2": float("inf")}, "l2 is inf, expected a finite number"),
        ("coefficients", {"sparsity": True}, "sparsity is True, expected a finite number ≥ 0"),
        ("coefficients", {"target": 1.5}, r"target is 1\.5, expected a text or a whole number or None"),
        ("coefficients", {"steps": -1}, "steps is -1, expected a whole number ≥ 0"),
        ("coefficients", {"steps": 2.5}, r"steps is 2\.5, expected a whole number"),
        ("coefficients", {"lr": "fast"}, "lr is 'fast', expected a finite number"),
        ("coefficients", {"lr": 0.0}, r"lr is 0\.0, expected above 0"),
        ("adamerging", {"batch": 0}, "batch is 0, expected a whole number ≥ 1"),
        ("pi_tuning", {"every": 0}, "every is 0, expected a whole number ≥ 1"),
        ("pi_tuning", {"clip": -1.0}, r"clip is -1\.0, expected above 0, or None"),
        ("pi_tuning", {"warmup": 1.1}, r"warmup is 1\.1, expected a finite number in \[0, 1\]"),
        ("pi_tuning", {"rank": 0}, "rank is 0, expected a whole number ≥ 1"),
        ("pi_tuning", {"fresh": 1}, "fresh is 1, expected True or False"),
        ("pi_tuning", {"granularity": "unit"}, "π-tuning trains the units themselves"),
        ("adamerging", {"objective": "loss"}, "objective is 'loss', expected one of 'supervised', 'entropy'"),
        ("adamerging", {"activation": "linear"}, "adamerging has no option 'activation'"),
        ("lorahub", {"budget": 0}, "budget is 0, expected a whole number ≥ 1"),
        ("lorahub", {"space": "both"}, "space is 'both', expected one of 'delta', 'factor'"),
    ],
)
def test_values_that_an_option_does_not_allow(base, stack, method, options, said):
    """Said before anything runs, naming the method."""
    with pytest.raises(MergeError, match=said) as caught:
        wb.adapt(base, stack, own_task(), method, **options)
    assert method in str(caught.value) or "π-tuning" in str(caught.value) or "expected above 0" in str(caught.value)


def test_every_method_says_what_it_does_to_whoever_chooses_one():
    """A sentence of its own, none that speaks of the fits side by side, which only code knows."""
    told = [method.summary for method in ADAPTIVE.values()]
    assert len(set(told)) == len(ADAPTIVE)
    for text in told:
        assert re.fullmatch(r"[A-Zπ].{40,118}\.", text)
        assert not re.search(r"\bG\b|\bfits?\b|\bstacks?\b|`|\[[a-z]\]", text), text


def test_options_of_every_method():
    for name, method in ADAPTIVE.items():
        assert not {"seeds", "names", "watch"} & set(options_of(name))
        assert (set(options_of(name)) >= SCHEDULE) == (method.schedule is not None)
        for option, one in method.options.items():
            assert isinstance(one, Option)
            assert one.accepts(one.default), (name, option)
        assert method.settings({}) == (method.schedule, {})
    own = {"granularity", "activation", "start", "target", "objective", "l1", "l2", "sparsity"}
    assert set(options_of("coefficients")) == own | SCHEDULE
    assert set(options_of("pi_tuning")) == {"granularity", "fresh", "rank"} | SCHEDULE
    assert set(options_of("adamerging")) == {"granularity", "objective"} | SCHEDULE
    schedule, rest = ADAPTIVE["coefficients"].settings({"lr": 0.5, "clip": None, "l1": 2})
    assert schedule == replace(COEFFICIENTS, lr=0.5, clip=None)
    assert rest == {"l1": 2}
    for wrong in ({"lr": -1.0}, {"clip": 0.0}):  # before there is a fit
        with pytest.raises(MergeError, match="expected above 0"):
            ADAPTIVE["coefficients"].settings(wrong)


def test_which_methods_are_folded_coefficients():
    folding = {name for name, method in ADAPTIVE.items() if method.folds({})}
    assert folding == {"coefficients", "lorahub", "adamerging", "ridge"}
    assert ADAPTIVE["lorahub"].folds({"space": "delta", "budget": 3})
    assert not ADAPTIVE["lorahub"].folds({"space": "factor"})


@pytest.mark.parametrize("method", ["coefficients", "adamerging", "pi_tuning", "arrow", "lorahub"])
def test_watch_reaches_every_method_and_stops_it(base, stack, method):
    told, options = [], QUICK[method] | ({} if method == "lorahub" else {"steps": 5})

    def watch(step, steps, loss):
        told.append((step, steps))
        return len(told) == 2

    fitted = wb.adapt(base, stack, own_task(), method, watch=watch, **options)
    assert told == ([(1, 10), (8, 10)] if method == "lorahub" else [(1, 5), (2, 5)])
    assert len(fitted.curves.train) == told[-1][0]
    told.clear()
    assert wb.adapt(base, stack, own_task(), method, watch=False, **options).passes > fitted.passes


@pytest.fixture
def interrupts(monkeypatch):
    """SIGINT to this process, this many times, from within the third step of a fit."""
    step, done, times = torch.optim.AdamW.step, [], [1]

    def interrupted(self, *args, **kwargs):
        done.append(1)
        for _ in range(times[0] if len(done) == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    return times


@pytest.fixture
def handler():
    """A handler of one's own for SIGINT, so that one left behind, or a default put in its place, is seen."""

    def own(number, frame):
        raise AssertionError("nobody took the interruption")

    before = signal.signal(signal.SIGINT, own)
    yield own
    signal.signal(signal.SIGINT, before)


def test_the_first_interruption_ends_the_fit_with_the_best_so_far(base, stack, interrupts, handler, capsys):
    task = own_task()
    fitted = wb.adapt(base, stack, task, steps=8, watch=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(fitted.curves.train) == 3
    assert fitted.curves.at == (0, 3)
    interrupts[0] = 0
    want = wb.adapt(base, stack, task, steps=8, watch=lambda step, steps, loss: step == 3)
    assert torch.equal(fitted.coefficients, want.coefficients)
    assert (fitted.passes, fitted.tokens) == (want.passes, want.tokens)
    assert "coefficients" in capsys.readouterr().err


def test_the_second_interruption_is_as_ever(base, stack, interrupts, handler):
    interrupts[0] = 2
    with pytest.raises(KeyboardInterrupt):
        wb.adapt(base, stack, own_task(), steps=8, watch=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert hook_count(base.model) == 0
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("watch", [None, False, lambda *_: None])
def test_without_a_bar_interruptions_are_left_alone(base, stack, interrupts, handler, watch):
    with pytest.raises(AssertionError, match="nobody took the interruption"):
        wb.adapt(base, stack, own_task(), steps=8, watch=watch)


@pytest.mark.parametrize("optimiser", ["cma", "cobyla"])
def test_a_search_is_interrupted_too(base, stack, monkeypatch, handler, optimiser):
    real, calls = search.population_losses, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(search, "population_losses", interrupted)
    fitted = wb.adapt(base, stack, own_task(), "lorahub", budget=30, optimiser=optimiser, watch=True)
    assert len(calls) == 2
    assert len(fitted.curves.train) == {"cma": 8, "cobyla": 2}[optimiser]
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_a_thread_signals_are_left_alone(base, stack, handler):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            (wb.adapt(base, stack, own_task(), steps=3, watch=True), signal.getsignal(signal.SIGINT))
        )
    )
    thread.start()
    thread.join()
    ((fitted, during),) = found
    assert len(fitted.curves.train) == 3
    assert during is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_bar_counts_the_steps_and_gives_the_handler_back_on_an_error(handler, capsys):
    with Bar("mine") as bar:
        assert signal.getsignal(signal.SIGINT) is not handler
        assert [bar(step, 4, 1.5) for step in (1, 2, 4)] == [False] * 3
    shown = capsys.readouterr().err
    assert "mine" in shown
    assert "4/4" in shown
    assert "loss 1.5000" in shown
    with pytest.raises(ValueError, match="broken"), Bar("mine"):
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGINT) is handler
    with Bar("never called"):
        pass
    assert capsys.readouterr().err == ""
