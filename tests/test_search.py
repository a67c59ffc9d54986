"""LoraHub: both spaces against dense weights, the objectives by hand, and what the search counts, keeps and returns."""

import random
import threading

import numpy as np
import pytest
import torch

from helpers import dense_model, hook_logits, peft_logits, random_adapter, relative, some_examples, some_ids, tiny_base
from workbench import adapt
from workbench.adapt import search
from workbench.adapt.fresh import Plan, train_fresh
from workbench.adapt.gradient import Schedule
from workbench.adapt.search import OBJECTIVES, lorahub, objective_value, population_losses
from workbench.base import Base
from workbench.errors import BaseError, MergeError
from workbench.evaluate import encode, score
from workbench.stack import Stack
from workbench.tasks import Example, Task

OPTIMISERS = ("cma", "cobyla")


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def mixed(base):
    """Three adapters of unequal ranks, scalings and targets."""
    return Stack.of(
        [
            random_adapter(base, 2, 0, name="a", size=0.2),
            random_adapter(base, 5, 1, ["q_proj", "down_proj"], name="b", size=0.2),
            random_adapter(base, 3, 2, ["q_proj", "v_proj"], alpha=3, rslora=True, name="c", size=0.2),
        ]
    )


def alike(base, rank, seed, targets, n=3, alpha=None):
    return Stack.of([random_adapter(base, rank, seed + i, targets, alpha=alpha, size=0.2) for i in range(n)])


@pytest.fixture(scope="module")
def uniform(base):
    """Two stacks for factor space, each of one rank, scaling and set of modules, but not the same as the other's."""
    return [alike(base, 2, 0, ["q_proj", "v_proj"], alpha=3), alike(base, 4, 10, ["v_proj", "up_proj"])]


def raw_sums(stack, module, w):
    """Σ w_i B_i and Σ w_i A_i on the raw factors, and the common s, by a loop in float64."""
    b = a = 0.0
    for i in range(len(stack)):
        factors = stack.adapter(i).modules[module]
        b, a, s = b + float(w[i]) * factors.raw_B.double(), a + float(w[i]) * factors.A.double(), factors.scale
    return b, a, s


def dense_delta(stack, module, w, space):
    if space == "factor":
        b, a, s = raw_sums(stack, module, w)
        return s * b @ a
    return sum(
        float(w[i]) * stack.adapter(i).modules[module].delta().double()
        for i in range(len(stack))
        if module in stack.adapter(i).modules
    )


@pytest.mark.parametrize("w", [0.5, -0.5])
def test_one_adapter_at_half_weight(base, w):
    """Factor space squares the weight, delta space does not (LoraHub's code against Σ w s B A)."""
    stack = alike(base, 3, 0, ["q_proj"], n=1, alpha=7)
    raw = {m: f.scale * f.raw_B @ f.A for m, f in stack.adapter(0).modules.items()}
    rows, found = some_examples(base, 4, 0), {}
    for space, factor in (("factor", 0.25), ("delta", w)):
        loss = population_losses(base, [stack], torch.tensor([[[w]]]), [rows], space)
        model = dense_model(base, {m: factor * delta for m, delta in raw.items()})
        torch.testing.assert_close(loss[0], score(Base(model, base.tokenizer), [rows]).loss, rtol=1e-5, atol=1e-5)
        found[space] = loss
    assert float((found["factor"] - found["delta"]).abs().max()) > 1e-3


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_population_against_dense_weights_one_by_one(base, mixed, uniform, space):
    stacks = uniform if space == "factor" else [mixed, uniform[0]]
    weights = torch.rand((2, 4, 3), generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    rows = [some_examples(base, 5, 1), some_examples(base, 5, 2)]
    got = population_losses(base, stacks, weights, rows, space)
    assert got.shape == (2, 4, 5)
    for g in range(2):
        for p in range(4):
            deltas = {m: dense_delta(stacks[g], m, weights[g, p], space) for m in stacks[g].modules}
            alone = score(Base(dense_model(base, deltas), base.tokenizer), [rows[g]]).loss[0]
            torch.testing.assert_close(got[g, p], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_the_returned_adapter_is_the_best_candidate(base, mixed, uniform, space, tmp_path):
    stack = uniform[0] if space == "factor" else mixed
    (fitted,) = lorahub(base, [stack], [some_examples(base, 4, 3)], seeds=[1], space=space, budget=20)
    w = fitted.coefficients[0]
    assert torch.equal(fitted.coefficients, w.expand(len(stack.modules), 3))
    assert w.any()
    for module, factors in fitted.adapter.modules.items():
        assert relative(factors.delta(), dense_delta(stack, module, w, space)) < 1e-5
    assert set(fitted.adapter.modules) == set(stack.modules)
    fitted.adapter.save(tmp_path / "best")
    ids = some_ids(base)
    assert relative(peft_logits(base, tmp_path / "best", ids), hook_logits(base, fitted.adapter, ids)) < 1e-5


def by_hand(losses, lengths, w, objective, batch=5):
    """The two formulas of methods.md §1, in plain Python."""
    n, k = len(losses), len(w)
    mean = lambda rows: sum(losses[i] * lengths[i] for i in rows) / sum(lengths[i] for i in rows)  # noqa: E731
    size = sum(abs(x) for x in w)
    if objective == "paper":
        return mean(range(n)) + 0.05 * size
    return sum(mean(range(s, min(s + batch, n))) for s in range(0, n, batch)) / n + 0.05 * size / k


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "k"), [(5, 20), (7, 3), (10, 1), (1, 4)])
def test_objectives_by_hand(objective, n, k):
    generator = torch.Generator().manual_seed(n)
    losses, w = 3 * torch.rand((2, n), generator=generator), 3 * torch.rand((2, k), generator=generator) - 1.5
    lengths = torch.randint(1, 9, (n,), generator=generator).float()
    want = [by_hand(losses[c].tolist(), lengths.tolist(), w[c].tolist(), objective) for c in range(2)]
    got = objective_value(losses, lengths, w, objective)
    torch.testing.assert_close(got, torch.tensor(want))
    if (objective, n, k) == ("reference", 5, 20):  # four times weaker than the paper's 0.05 Σ|w|
        mean = (losses * lengths).sum(1) / lengths.sum()
        torch.testing.assert_close(5 * got, mean + 0.0125 * w.abs().sum(1))


@pytest.fixture
def watched(monkeypatch):
    """Every candidate that was evaluated, (weights, losses), in order."""
    seen, real = [], population_losses

    def spy(base, stacks, weights, *args, **kwargs):
        losses = real(base, stacks, weights, *args, **kwargs)
        seen.append((weights.clone(), losses))
        return losses

    monkeypatch.setattr(search, "population_losses", spy)
    return seen


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("budget", [1, 4, 17])
def test_what_a_search_evaluates(base, mixed, watched, optimiser, budget, objective):
    """Zero first, exactly the budget, within the bounds, and the best ever seen comes back."""
    rows = some_examples(base, 4, 4)
    (fitted,) = lorahub(base, [mixed], [rows], seeds=[2], optimiser=optimiser, budget=budget, objective=objective)
    weights = torch.cat([w[0] for w, _ in watched])
    losses = torch.cat([loss[0] for _, loss in watched])
    assert len(weights) == budget
    assert not weights[0].any()
    assert float(weights.abs().max()) <= 1.5
    assert budget == 1 or len(weights.unique(dim=0)) > 0.9 * budget
    lengths = [len(row.answer) for row in rows]
    values = [by_hand(loss, lengths, w, objective) for loss, w in zip(losses.tolist(), weights.tolist(), strict=True)]
    torch.testing.assert_close(fitted.coefficients[0], weights[int(np.argmin(values))], rtol=0, atol=0)
    assert fitted.passes == budget * 4
    assert fitted.tokens == budget * sum(map(len, rows))
    torch.testing.assert_close(fitted.curves.train, torch.tensor(values))
    assert fitted.curves.best == fitted.curves.train.min()
    assert (fitted.curves.at, fitted.curves.validation.numel(), int(fitted.curves.tokens)) == ((), 0, fitted.tokens)
    assert fitted.parameters == 3
    if optimiser == "cobyla":
        assert all(len(w[0]) == 1 for w, _ in watched)
    elif budget > 1:
        assert [len(w[0]) for w, _ in watched] == {4: [1, 3], 17: [1, 7, 7, 2]}[budget]


def test_pycma_s_population_at_twenty_adapters(base, watched):
    """A budget of 40 is w = 0, three generations of 12, and a part."""
    stack = alike(base, 1, 0, ["q_proj"], n=20)
    lorahub(base, [stack], [some_examples(base, 2, 5)], seeds=[0])
    assert [len(w[0]) for w, _ in watched] == [1, 12, 12, 12, 3]


@pytest.mark.parametrize(
    ("budget", "stop", "evaluations"),
    [(17, 0, [1, 8, 15, 17]), (17, 3, [1, 8, 15]), (1, 0, [1]), (40, 1, [1])],
)
def test_watch_is_told_of_every_generation_and_may_stop(base, mixed, watched, budget, stop, evaluations):
    rows, told = [some_examples(base, 3, 6), some_examples(base, 3, 7)], []

    def watch(done, budget, lowest):
        told.append((done, budget, lowest))
        return len(told) == stop

    fits = lorahub(base, [mixed, mixed], rows, seeds=[2, 3], budget=budget, watch=watch)
    assert [one[:2] for one in told] == [(n, budget) for n in evaluations]
    assert [w.shape[1] for w, _ in watched] == np.diff([0, *evaluations]).tolist()
    for done, _, lowest in told:
        assert lowest == pytest.approx(np.mean([float(fit.curves.train[:done].min()) for fit in fits]))
    for g, fitted in enumerate(fits):
        assert len(fitted.curves.train) == evaluations[-1]
        assert fitted.passes == evaluations[-1] * 3
        candidates = torch.cat([w[g] for w, _ in watched])
        assert torch.equal(fitted.coefficients[0], candidates[int(fitted.curves.train.argmin())])


def test_watch_is_told_of_every_evaluation_by_cobyla_and_may_stop(base, mixed):
    rows, told = [some_examples(base, 3, 6), some_examples(base, 3, 7)], []

    def watch(done, budget, lowest):
        told.append((done, budget, lowest))
        return len(told) == stop

    stop, settings = 0, {"seeds": [2, 3], "optimiser": "cobyla", "budget": 9, "watch": watch}
    whole = lorahub(base, [mixed, mixed], rows, **settings)
    assert [one[:2] for one in told] == [(n, 9) for n in range(1, 10)]
    lowest = np.mean([np.minimum.accumulate(fitted.curves.train.numpy()) for fitted in whole], 0)
    assert [one[2] for one in told] == pytest.approx(lowest.tolist())
    for stop in (1, 4):
        told.clear()
        fits = lorahub(base, [mixed, mixed], rows, **settings)
        assert [len(fitted.curves.train) for fitted in fits] == [stop, stop]
        assert len(told) == stop
        for fitted, other in zip(fits, whole, strict=True):
            assert torch.equal(fitted.curves.train, other.curves.train[:stop])
            assert fitted.curves.best == fitted.curves.train.min()


def test_cobyla_s_searches_together_are_scipy_s_one_by_one():
    """Six of them, of which some end before the budget; every call has one candidate of each that goes on."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    centres, steep, calls = rng.normal(size=(6, 3)), np.array([1, 3, 0, 1, 0, 2.0]), []

    def value(i, w):
        return float(steep[i] * ((w - centres[i]) ** 2).sum() + np.abs(w).sum())

    def values(which, at):
        calls.append(list(which))
        return np.array([value(i, w) for i, w in zip(which, at, strict=True)])

    found = search._cobyla(values, 6, 3, 45, None)
    lengths = []
    for i, (best, history) in enumerate(found):
        seen = []

        def counted(w, i=i, seen=seen):
            seen.append((value(i, np.clip(w, -1.5, 1.5)), np.clip(w, -1.5, 1.5)))
            return seen[-1][0]

        settings = {"maxiter": 45, "rhobeg": 0.5}
        minimize(counted, np.zeros(3), method="COBYLA", bounds=[(-1.5, 1.5)] * 3, options=settings)
        assert history == [loss for loss, _ in seen][:45]
        assert np.array_equal(best, min(seen[:45], key=lambda one: one[0])[1])
        lengths.append(len(history))
    assert calls == [[i for i in range(6) if lengths[i] > n] for n in range(max(lengths))]
    assert min(lengths) < max(lengths)


def test_an_error_in_cobyla_s_threads_or_outside_ends_them_all(monkeypatch):
    def failing(which, at):
        raise MergeError("outside")

    before = threading.active_count()
    with pytest.raises(MergeError, match="outside"):
        search._cobyla(failing, 5, 2, 9, None)
    monkeypatch.setattr("scipy.optimize.minimize", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search._cobyla(failing, 5, 2, 9, None)
    for thread in threading.enumerate():
        if thread.name.endswith("(search)"):
            thread.join(5)
    assert threading.active_count() == before


def test_cobyla_s_candidates_of_all_fits_in_one_pass(base, mixed, watched, monkeypatch):
    """As on a GPU: each pass has one candidate of each fit; values begin as alone, whatever rounding then does."""
    monkeypatch.setattr(search, "_apart", lambda base: False)
    rows = [some_examples(base, 4, 20 + g) for g in range(3)]
    together = lorahub(base, [mixed] * 3, rows, seeds=[0] * 3, optimiser="cobyla", budget=4)
    assert [w.shape for w, _ in watched] == [(3, 1, 3)] * 4
    monkeypatch.undo()
    for g, fitted in enumerate(together):
        (alone,) = lorahub(base, [mixed], rows[g : g + 1], seeds=[0], optimiser="cobyla", budget=4)
        torch.testing.assert_close(fitted.curves.train, alone.curves.train, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("space", ["delta", "factor"])
def test_adapters_that_change_nothing(base, optimiser, space):
    """B = 0 everywhere: every candidate has the base's loss, so the penalty decides for w = 0, and the base comes back."""
    zero = [random_adapter(base, 2, i, ["q_proj"]).times(0.0) for i in range(3)]
    settings = {"seeds": [0], "optimiser": optimiser, "space": space, "budget": 16}
    (fitted,) = lorahub(base, [Stack.of(zero)], [some_examples(base, 3, 0)], **settings)
    assert not fitted.coefficients.any()
    assert fitted.curves.best == fitted.curves.train[0] == fitted.curves.train.min()
    assert float(fitted.curves.train[1:].min()) > float(fitted.curves.train[0])
    ids = some_ids(base)
    assert torch.equal(hook_logits(base, fitted.adapter, ids), base.model(input_ids=ids).logits)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_one_adapter_alone(base, optimiser):
    stack, rows = alike(base, 2, 0, ["q_proj"], n=1), some_examples(base, 3, 5)
    (fitted,) = lorahub(base, [stack], [rows], seeds=[0], optimiser=optimiser, budget=12)
    assert fitted.coefficients.shape == (2, 1)
    assert len(fitted.curves.train) <= 12
    assert fitted.curves.best <= fitted.curves.train[0]


def test_cobyla_may_end_before_its_budget_and_counts_what_it_spent(base, watched):
    stack = alike(base, 2, 0, ["q_proj"], n=1)
    (fitted,) = lorahub(base, [stack], [some_examples(base, 2, 5)], seeds=[0], optimiser="cobyla", budget=60)
    assert len(watched) < 60
    assert fitted.passes == 2 * len(watched)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_bounds_are_reached_and_kept(base, watched, monkeypatch, optimiser):
    """An objective that falls for ever with w: the best candidate lies at, or near, the bound."""
    monkeypatch.setattr(search, "objective_value", lambda losses, lengths, weights, objective: -weights.sum(1))
    stack = alike(base, 1, 0, ["q_proj"], n=2)
    (fitted,) = lorahub(base, [stack], [some_examples(base, 1, 5)], seeds=[0], optimiser=optimiser, budget=40)
    assert max(float(w.abs().max()) for w, _ in watched) <= 1.5
    assert float(fitted.coefficients.min()) > 1.0
    assert float(fitted.coefficients.max()) > 1.4


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_no_global_generator_is_touched_or_read(base, mixed, optimiser):
    rows = some_examples(base, 3, 6)
    found = []
    for outer in (0, 1):
        np.random.seed(outer)
        torch.manual_seed(outer)
        random.seed(outer)
        before = np.random.get_state(), torch.get_rng_state(), random.getstate()
        (fitted,) = lorahub(base, [mixed], [rows], seeds=[5], optimiser=optimiser, budget=12)
        after = np.random.get_state(), torch.get_rng_state(), random.getstate()
        assert all(np.array_equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        assert torch.equal(before[1], after[1])
        assert before[2] == after[2]
        found.append(fitted.coefficients)
    assert torch.equal(*found)


def test_the_seed_decides(base, mixed):
    rows = some_examples(base, 3, 7)
    one, other = (lorahub(base, [mixed], [rows], seeds=[s], budget=16)[0].coefficients for s in (1, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("space", "optimiser"), [("delta", "cma"), ("factor", "cma"), ("delta", "cobyla")])
def test_fits_side_by_side_equal_each_alone(base, mixed, uniform, space, optimiser):
    """Different stacks: in factor space of different ranks and modules too."""
    stacks = [*uniform, uniform[0]] if space == "factor" else [mixed, uniform[1], mixed]
    rows, settings = [some_examples(base, 4, 20 + g) for g in range(3)], {"space": space, "optimiser": optimiser}
    together = lorahub(base, stacks, rows, seeds=[3, 4, 5], budget=20, names=["x", "y", "z"], **settings)
    for g, fitted in enumerate(together):
        (alone,) = lorahub(base, [stacks[g]], [rows[g]], seeds=[3 + g], budget=20, **settings)
        # COBYLA compares values, which some processors round otherwise in a stack that is filled up
        tolerance = {"cma": 1e-6, "cobyla": 1e-2}[optimiser]
        torch.testing.assert_close(fitted.coefficients, alone.coefficients, rtol=0, atol=tolerance)
        assert (fitted.passes, fitted.tokens) == (alone.passes, alone.tokens)
        assert list(fitted.adapter.modules) == list(alone.adapter.modules)
        assert fitted.adapter.name == "xyz"[g]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_an_adapter_that_helps_is_found(base, optimiser):
    """One adapter trained on the very examples: weight above zero and a lower loss; turned round: below zero."""
    rows = some_examples(base, 5, 8)
    (trained,), _ = train_fresh(base, ["t"], [rows], None, Schedule(steps=30, lr=1e-2), seeds=[0], plans=[Plan(4)])
    zero = float(objective_value(score(base, [rows]).loss, torch.tensor([float(len(r.answer)) for r in rows]), torch.zeros(1, 1), "paper"))  # fmt: skip
    other = random_adapter(base, 2, 9, name="other", size=0.01)
    for sign in (1.0, -1.0):
        stack = Stack.of([trained.times(sign), other])
        (fitted,) = lorahub(base, [stack], [rows], seeds=[0], optimiser=optimiser, budget=30)
        assert sign * float(fitted.coefficients[0, 0]) > 0.3
        losses = population_losses(base, [stack], fitted.coefficients[None, :1], [rows])[0]
        assert float(losses.mean()) < 0.8 * zero


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_candidates_that_overflow(base, mixed, monkeypatch, optimiser):
    """All but w = 0 give NaN: it is what comes back. Where that gives NaN too, there is nothing to return."""
    broken, real = [False], population_losses

    def overflow(base, stacks, weights, *args):
        losses = real(base, stacks, weights, *args)
        return torch.where(weights.any(2, keepdim=True) | broken[0], torch.nan, losses)

    monkeypatch.setattr(search, "population_losses", overflow)
    settings = {"seeds": [0], "optimiser": optimiser, "budget": 20}
    (fitted,) = lorahub(base, [mixed], [some_examples(base, 3, 0)], **settings)
    assert not fitted.coefficients.any()
    broken[0] = True
    with pytest.raises(MergeError, match="fit 0 of 1: no candidate has a finite loss"):
        lorahub(base, [mixed], [some_examples(base, 3, 0)], **settings)


def test_factor_space_needs_adapters_alike(base, mixed):
    rows = [some_examples(base, 2, 0)]
    said = r"one rank and scaling with the same modules; in .*down_proj the ranks are \[2, 5, 0\].*space='delta'"
    with pytest.raises(MergeError, match=said):
        lorahub(base, [mixed.choose(["a", "b", "c"])], rows, seeds=[0], space="factor")
    partly = Stack.of([random_adapter(base, 2, 0, ["q_proj"]), random_adapter(base, 2, 1, ["q_proj", "v_proj"])])
    with pytest.raises(MergeError, match=r"v_proj the ranks are \[0, 2\]"):
        lorahub(base, [partly], rows, seeds=[0], space="factor")
    scaled = Stack.of([random_adapter(base, 2, 0, alpha=2), random_adapter(base, 2, 1, alpha=8)])
    with pytest.raises(MergeError, match=r"the scalings \[1\.0, 4\.0\]"):
        lorahub(base, [scaled], rows, seeds=[0], space="factor")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"space": "delt"}, "space 'delt' is unknown; choose one of delta, factor"),
        ({"optimiser": "adam"}, "optimiser 'adam' is unknown; choose one of cma, cobyla"),
        ({"objective": "loss"}, "objective 'loss' is unknown; choose one of paper, reference"),
        ({"budget": 0}, "budget is 0, expected at least 1"),
    ],
)
def test_unknown_words(base, mixed, options, said):
    with pytest.raises(MergeError, match=said):
        lorahub(base, [mixed], [some_examples(base, 2, 0)], seeds=[0], **options)


def test_fits_that_do_not_go_together(base, mixed):
    with pytest.raises(MergeError, match="equally many adapters and equally many examples"):
        lorahub(base, [mixed, mixed.choose([0])], [some_examples(base, 2, 0)] * 2, seeds=[0, 1])
    with pytest.raises(MergeError, match="equally many adapters and equally many examples"):
        lorahub(base, [mixed, mixed], [some_examples(base, 2, 0), some_examples(base, 3, 0)], seeds=[0, 1])
    with pytest.raises(MergeError, match="2 stacks, 2 lists of examples and 1 seeds"):
        lorahub(base, [mixed, mixed], [some_examples(base, 2, 0)] * 2, seeds=[0])
    with pytest.raises(BaseError, match="not in this base"):
        lorahub(base, [Stack.of([random_adapter({"x.q_proj": (8, 8)}, 2)])], [some_examples(base, 2, 0)], seeds=[0])


def test_by_name_through_adapt(base, mixed):
    made = tuple(Example(f"{n} {n}", "ab") for n in range(9))
    task = Task("own", "say", made[:5], made[5:7], made[7:])
    fitted = adapt(base, mixed, task, "lorahub", seed=4, budget=8, objective="reference")
    rows = [encode(base, task.prompt(e), e.target) for e in task.train]
    (want,) = lorahub(base, [mixed], [rows], seeds=[4], budget=8, objective="reference")
    assert torch.equal(fitted.coefficients, want.coefficients)
    assert fitted.adapter.info["sources"] == pytest.approx(dict(zip(mixed.names, want.coefficients[0].tolist(), strict=True)))  # fmt: skip
    assert fitted.adapter.info["paper"] == "https://arxiv.org/abs/2307.13269"
