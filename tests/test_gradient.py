"""Fits side by side against each alone, and against plain peft with torch's own AdamW."""

import copy
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fitting import minibatches
from helpers import (
    hook_count,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_examples,
    tiny_base,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
)
from workbench.adapt import gradient
from workbench.adapt.fresh import NEW_ADAPTER, PROJECTIONS, Plan, start_factors, train_fresh
from workbench.adapt.gradient import Schedule, clip_each, cosine_rate, fit
from workbench.compose import LowRank, compose, grouped, shared
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import Encoded, Packed, row_losses, score
from workbench.stack import Stack

PLANS = [Plan(4), Plan(2, 1.0, targets=("q_proj", "v_proj")), Plan(6, 0.5, rslora=True)]


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stack(base):
    return Stack.of([random_adapter(base, 2, i, name=f"a{i}", size=0.2) for i in range(3)])


def fit_coefficients(base, stack, train, validation, schedule, seeds, start=None, **more):
    """Per-module coefficients (G, M, N) over one stack."""
    c = torch.zeros(len(train), len(stack.modules), len(stack)) if start is None else start.clone()
    return c, fit(base, [c], lambda: shared(stack, c), train, validation, schedule, seeds, **more)


def test_fits_of_coefficients_side_by_side_equal_each_alone(base, stack):
    """Training sets of 3, 8 and 11 examples, batches of 5: one fit's batch is its whole set."""
    train = [some_examples(base, n, n) for n in (3, 8, 11)]
    validation = [some_examples(base, 4, 100 + n) for n in range(3)]
    schedule = Schedule(steps=12, lr=0.1, batch=5, every=4, clip=0.5)
    together, curves = fit_coefficients(base, stack, train, validation, schedule, [7, 8, 9])
    for g in range(3):
        alone, own = fit_coefficients(base, stack, train[g : g + 1], validation[g : g + 1], schedule, [7 + g])
        torch.testing.assert_close(together[g], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(curves.train[:, g], own.train[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(curves.validation[:, g], own.validation[:, 0], rtol=1e-4, atol=1e-5)
        assert curves.tokens[g] == own.tokens[0]
        assert float(alone.abs().max()) > 0.05
    assert curves.train.shape == (12, 3)
    assert curves.at == own.at == (0, 4, 8, 12)
    torch.testing.assert_close(curves.best, curves.validation.min(0).values)
    assert not together.requires_grad


def test_new_adapters_side_by_side_equal_each_alone(base):
    """Unequal ranks, scales, targets, seeds and sizes; clipping bites for one of them and not for another."""
    train, validation = (
        [some_examples(base, n, n) for n in (2, 9, 6)],
        [some_examples(base, 3, 50 + n) for n in range(3)],
    )
    names, seeds = ["x", "y", "z"], [3, 1, 2]
    schedule = Schedule(steps=8, lr=3e-3, batch=4, every=3, clip=limit_between(base, train, seeds))
    adapters, curves = train_fresh(base, names, train, validation, schedule, seeds=seeds, plans=PLANS)
    for g, adapter in enumerate(adapters):
        (alone,), own = train_fresh(
            base,
            names[g : g + 1],
            train[g : g + 1],
            validation[g : g + 1],
            schedule,
            seeds=seeds[g : g + 1],
            plans=PLANS[g : g + 1],
        )
        assert list(adapter.modules) == list(alone.modules)
        assert adapter.name == alone.name == names[g]
        for module, factors in adapter.modules.items():
            torch.testing.assert_close(factors.B, alone.modules[module].B, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(factors.A, alone.modules[module].A, rtol=1e-4, atol=1e-6)
            assert factors.rank == PLANS[g].rank
            assert factors.scale == PLANS[g].scale
        torch.testing.assert_close(curves.train[:, g], own.train[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(curves.validation[:, g], own.validation[:, 0], rtol=1e-4, atol=1e-5)
    assert {m.rsplit(".", 1)[-1] for m in adapters[1].modules} == {"q_proj", "v_proj"}
    assert len(adapters[0].modules) == 14


def limit_between(base, train, seeds):
    """A clipping limit that the first gradient of one fit exceeds and that of another does not."""
    factors = {
        m: [t.requires_grad_() for t in pair] for m, pair in start_factors(base.projections, PLANS, seeds).items()
    }
    scales = torch.tensor([p.scale for p in PLANS])[:, None, None]
    parameters = [t for pair in factors.values() for t in pair]
    rows = [group[0] for group in train]
    batch = Packed(rows, base).batch(np.arange(3))
    with compose(base.model, {m: LowRank(b * scales, a) for m, (b, a) in factors.items()}):
        sums, counts = row_losses(base.logits(batch), batch.labels)
    (sums / counts).sum().backward()
    norms = clip_each(parameters, 1e9).tolist()
    limit = (min(norms) * max(norms)) ** 0.5
    assert min(norms) < limit / 1.3 < limit * 1.3 < max(norms)
    return limit


def test_clipping_is_per_fit():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.zeros(3, 4, 2, requires_grad=True), torch.zeros(3, 5, requires_grad=True)]
    size = torch.tensor([0.01, 1.0, 100.0])
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * size.view(-1, *[1] * (p.ndim - 1))
    before = [p.grad.clone() for p in parameters]
    norms = clip_each(parameters, 1.0)
    for g in range(3):
        mine = [torch.zeros_like(p[g]).requires_grad_() for p in parameters]
        for m, b in zip(mine, before, strict=True):
            m.grad = b[g].clone()
        assert float(torch.nn.utils.clip_grad_norm_(mine, 1.0)) == pytest.approx(float(norms[g]), rel=1e-5)
        for m, p in zip(mine, parameters, strict=True):
            torch.testing.assert_close(p.grad[g], m.grad)


def test_the_best_validation_loss_is_restored(base, stack):
    """Trained far too fast on the opposite of its validation set: a later step is worse than an earlier one."""
    good, bad = some_examples(base, 4, 1), some_examples(base, 4, 2)
    schedule = Schedule(steps=30, lr=0.5, batch=4, every=3)
    c, curves = fit_coefficients(base, stack, [good, bad], [good, good], schedule, [0, 0])
    assert (curves.validation[-1] > curves.best + 1e-3).any()
    got = score(base, [good, good], shared(stack, c)).loss.mean(1)
    torch.testing.assert_close(got, curves.best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curves.best, curves.validation.min(0).values)


def test_a_fit_that_never_improves_returns_its_start(base, stack):
    """Validated on what the base already says, trained in giant steps on something else."""
    said = []
    for row in some_examples(base, 6, 5):
        best = base.model(input_ids=torch.tensor([row.prompt])).logits[0, -1].argmax().item()
        said.append(Encoded(row.prompt, (best,)))
    start = torch.zeros(1, len(stack.modules), len(stack))
    schedule = Schedule(steps=2, lr=1e4, every=1, warmup=0)
    c, curves = fit_coefficients(base, stack, [some_examples(base, 4, 6)], [said], schedule, [0], start)
    assert (curves.validation[1:] > curves.validation[0]).all()
    assert torch.equal(c, start)
    assert curves.best == curves.validation[0]


def test_without_validation_the_last_step_is_kept(base, stack):
    train = [some_examples(base, 6, 1)]
    schedule = Schedule(steps=6, lr=0.1, batch=3)
    c, curves = fit_coefficients(base, stack, train, None, schedule, [4])
    assert curves.validation.shape == (0, 1)
    assert curves.at == ()
    assert torch.isinf(curves.best).all()
    oracle = torch.zeros_like(c).requires_grad_()
    optimiser = torch.optim.AdamW([oracle], lr=0.1, weight_decay=0)
    for step, rows in enumerate(minibatches(train[0], 3, 6, 4)):
        loss = torch.zeros(())
        tokens = sum(len(row.answer) for row in rows)
        for row in rows:
            loss = loss + summed_loss(base, {m: oracle[0, i] for i, m in enumerate(stack.modules)}, stack, row) / tokens
        assert loss.item() == pytest.approx(float(curves.train[step, 0]), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([oracle], 1.0)
        optimiser.param_groups[0]["lr"] = 0.1 * cosine_rate(step, schedule)
        optimiser.step()
    torch.testing.assert_close(c, oracle.detach(), rtol=1e-3, atol=1e-4)


def summed_loss(base, coefficients, stack, row):
    """One example's cross-entropy under dense weights W + Σ c ΔW, summed over its answer."""
    weights = dict(base.model.named_parameters())
    moved = {f"{m}.weight": weights[f"{m}.weight"] + (u.B * coefficients[m][u.owner]) @ u.A for m, u in stack}
    ids = torch.tensor([[*row.prompt, *row.answer]])
    logits = torch.func.functional_call(base.model, moved, kwargs={"input_ids": ids}).logits
    return cross_entropy(logits[0, len(row.prompt) - 1 : -1], torch.tensor(row.answer), reduction="sum")


def test_a_diverging_fit_is_named(base, stack):
    train = [some_examples(base, 3, s) for s in range(3)]
    start = torch.zeros(3, len(stack.modules), len(stack))
    start[1] = float("nan")
    for validation in (None, train):
        with pytest.raises(MergeError, match="fit 1 of 3 diverged"):
            fit_coefficients(base, stack, train, validation, Schedule(steps=2), [0, 1, 2], start)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_fit_that_diverges_after_a_finite_loss_keeps_it(base, stack):
    """NaN from the third step on: the best of what was validated before; beside it another fit goes on undisturbed."""
    train = [some_examples(base, 4, s) for s in range(2)]
    schedule = Schedule(steps=6, lr=0.1, batch=4, every=2, warmup=0)
    steps = []

    def broken(rate):
        steps.append(rate)
        if len(steps) == 3:
            c[0] = float("nan")

    c = torch.zeros(2, len(stack.modules), len(stack))
    curves = fit(base, [c], lambda: shared(stack, c), train, train, schedule, [0, 1], project=broken)
    assert curves.train.isnan().tolist() == [[False] * 2] * 3 + [[True, False]] * 3
    assert curves.validation.isnan().tolist() == [[False] * 2] * 2 + [[True, False]] * 2
    assert curves.best[0] == curves.validation[:2, 0].min()
    got = score(base, train, shared(stack, c)).loss.mean(1)
    torch.testing.assert_close(got, curves.best, rtol=1e-5, atol=1e-6)
    alone, own = fit_coefficients(base, stack, train[1:], train[1:], schedule, [1])
    torch.testing.assert_close(c[1], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves.best[1], own.best[0])


def test_without_validation_the_last_step_s_parameters_must_be_finite(base, stack):
    """Finite losses throughout, and no number left to return."""
    c = torch.zeros(2, len(stack.modules), len(stack))

    def broken(rate):
        c[1, 0, 0] = float("inf")

    train = [some_examples(base, 3, s) for s in range(2)]
    with pytest.raises(MergeError, match="fit 1 of 2 diverged"):
        fit(base, [c], lambda: shared(stack, c), train, None, Schedule(steps=1), [0, 1], project=broken)


def test_rates_of_single_parameters(base, stack):
    """Each as torch's AdamW with a group of its own has it; one alone at rate r is the same as r times the rate."""
    train, schedule = [some_examples(base, 6, 1)], Schedule(steps=5, lr=0.1, batch=3, clip=0.05)
    shape = (1, len(stack.modules), len(stack))

    def run(rates, clip=schedule.clip):
        a, b = torch.zeros(shape), torch.zeros(shape)
        fit(base, [a, b], lambda: shared(stack, a + b), train, None, replace(schedule, clip=clip), [4], rates=rates)
        return a, b

    even, plain = run([1.0, 1.0]), run(None)
    assert all(torch.equal(one, other) for one, other in zip(even, plain, strict=True))
    a, b = run([1.0, 0.25])
    thetas = [torch.zeros(shape).requires_grad_() for _ in range(2)]
    optimiser = torch.optim.AdamW([{"params": [t]} for t in thetas], lr=1.0, weight_decay=0)
    for step, rows in enumerate(minibatches(train[0], 3, 5, 4)):
        batch = Packed(rows, base).batch(np.arange(3))
        with compose(base.model, shared(stack, thetas[0] + thetas[1])):
            sums, counts = row_losses(base.logits(batch), batch.labels)
        optimiser.zero_grad()
        (sums.sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(thetas, schedule.clip)
        for group, rate in zip(optimiser.param_groups, (1.0, 0.25), strict=True):
            group["lr"] = schedule.lr * rate * cosine_rate(step, schedule)
        optimiser.step()
    torch.testing.assert_close(a, thetas[0].detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b, thetas[1].detach(), rtol=1e-3, atol=1e-4)
    assert float(b.abs().max()) < 0.5 * float(a.abs().max())
    c, _ = fit_coefficients(base, stack, train, None, schedule, [4], rates=[0.25])
    want, _ = fit_coefficients(base, stack, train, None, replace(schedule, lr=0.025), [4])
    torch.testing.assert_close(c, want)


def test_a_penalty_is_in_the_gradient_alone(base, stack):
    """Not in the curves, not in validation; per fit, so that another's does not matter."""
    train = [some_examples(base, 4, s) for s in range(2)]
    schedule, start = Schedule(steps=4, lr=0.05, batch=4, every=2, clip=None), torch.full((2, 14, 3), 0.2)
    c = start.clone()
    weight = torch.tensor([0.0, 50.0])
    curves = fit(
        base, [c], lambda: shared(stack, c), train, train, schedule, [0, 1],
        penalty=lambda: weight * (c**2).sum((1, 2)),
    )  # fmt: skip
    free, plain = fit_coefficients(base, stack, train, train, schedule, [0, 1], start)
    torch.testing.assert_close(c[0], free[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves.train[0], plain.train[0])
    torch.testing.assert_close(curves.validation[0], plain.validation[0])
    assert float((curves.train[1:, 1] - plain.train[1:, 1]).abs().max()) > 1e-4
    got = score(base, train, shared(stack, c)).loss.mean(1)
    torch.testing.assert_close(got, curves.best, rtol=1e-5, atol=1e-6)
    strong = torch.full((2, 14, 3), 0.2)
    fit(base, [strong], lambda: shared(stack, strong), train, None, schedule, [0, 1],
        penalty=lambda: weight * (strong**2).sum((1, 2)))  # fmt: skip
    assert float(strong[1].max()) < 0.2  # every coefficient falls, whatever its loss would like
    assert float(strong[0].max()) > 0.2


def test_project_is_called_with_each_step_s_rate(base, stack):
    schedule, rates, before = Schedule(steps=5, lr=0.1, batch=3, warmup=0.4), [], []

    def project(rate):
        rates.append(rate)
        before.append(c.clone())
        assert not torch.is_grad_enabled()
        c.clamp_(max=0.01)

    c = torch.zeros(1, len(stack.modules), len(stack))
    train = [some_examples(base, 6, 1)]
    fit(base, [c], lambda: shared(stack, c), train, None, schedule, [4], project=project)
    assert rates == pytest.approx([0.1 * cosine_rate(step, schedule) for step in range(5)])
    assert float(before[-1].max()) > 0.01 == pytest.approx(float(c.max()))
    assert float(c.min()) < -0.01


def test_watch_sees_every_step_and_may_stop(base, stack):
    train = [some_examples(base, 6, s) for s in range(2)]
    schedule, seen = Schedule(steps=9, lr=0.1, batch=4, every=4), []

    def watch(step, steps, loss):
        seen.append((step, steps, loss))
        return None if len(seen) < 7 else step == 7

    c, curves = fit_coefficients(base, stack, train, train, schedule, [0, 1], watch=watch)
    assert [one[:2] for one in seen] == [(step, 9) for step in range(1, 8)]
    assert [one[2] for one in seen] == pytest.approx(curves.train.mean(1).tolist())
    assert curves.train.shape == (7, 2)
    assert curves.at == (0, 4, 7)
    torch.testing.assert_close(score(base, train, shared(stack, c)).loss.mean(1), curves.best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curves.best, curves.validation.min(0).values)
    fed = [sum(map(len, rows)) for rows in train]
    assert curves.spent(0, train[0], train[0], 4) == (7 * 4 + 3 * 6, int(curves.tokens[0]) + 3 * fed[0])
    _, whole = fit_coefficients(base, stack, train, train, schedule, [0, 1])
    torch.testing.assert_close(curves.train, whole.train[:7])
    assert (curves.tokens < whole.tokens).all()
    _, once = fit_coefficients(base, stack, train, train, schedule, [0, 1], watch=lambda *_: True)
    assert once.at == (0, 1)
    assert once.train.shape == (1, 2)
    unchecked, cut = fit_coefficients(base, stack, train, None, schedule, [0, 1], watch=lambda *_: True)
    assert cut.at == ()
    assert cut.spent(1, train[1], None, 4) == (4, int(cut.tokens[1]))
    assert unchecked.any()


@pytest.mark.parametrize("raised", [ValueError("mine"), KeyboardInterrupt()])
def test_what_watch_raises_leaves_nothing_behind(base, stack, tmp_path, monkeypatch, raised):
    def watch(step, steps, loss):
        if step == 2:
            raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    digest = {name: p.clone() for name, p in base.model.named_parameters()}
    with pytest.raises(type(raised)):
        fit_coefficients(base, stack, [some_examples(base, 3, 0)], None, Schedule(steps=4), [0], watch=watch)
    assert hook_count(base.model) == 0
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    assert not base.model.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(p, digest[name]) for name, p in base.model.named_parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ({"steps": -1}, "steps is -1, expected 0 or more"),
        ({"lr": 0.0}, r"lr is 0\.0, expected above 0"),
        ({"lr": math.nan}, "lr is nan, expected above 0"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"clip": 0.0}, r"clip is 0\.0, expected above 0, or None"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1, expected 0 or more"),
        ({"warmup": 1.5}, r"warmup is 1\.5, expected from 0 to 1"),
    ],
)
def test_a_schedule_out_of_range(base, stack, number, said):
    with pytest.raises(MergeError, match=said):
        fit_coefficients(base, stack, [some_examples(base, 3, 0)], None, Schedule(**number), [0])


def test_what_does_not_agree_is_refused(base, stack):
    train = [some_examples(base, 3, s) for s in range(2)]
    schedule = Schedule(steps=1)
    with pytest.raises(MergeError, match="expected 2 fits throughout"):
        fit_coefficients(base, stack, train, None, schedule, [0])
    with pytest.raises(MergeError, match="expected 2 fits throughout"):
        fit_coefficients(base, stack, train, train[:1], schedule, [0, 1])
    with pytest.raises(MergeError, match="expected 2 fits throughout"):
        fit_coefficients(base, stack, train, None, schedule, [0, 1], torch.zeros(3, len(stack.modules), len(stack)))
    with pytest.raises(MergeError, match="fit 1 of 2 has no training examples"):
        fit_coefficients(base, stack, [train[0], []], None, schedule, [0, 1])
    with pytest.raises(AdapterError, match=r"odd: the base has no layer named wq or wk"):
        train_fresh(base, ["odd"], train[:1], None, schedule, seeds=[0], plans=[Plan(2, targets=("wq", "wk"))])
    for names, plans, seeds in ((["a"], None, [0, 1]), (["a", "b"], [Plan()], [0, 1]), (["a", "b"], None, [0])):
        with pytest.raises(MergeError, match="one of each per adapter"):
            train_fresh(base, names, train, None, schedule, seeds=seeds, plans=plans)


def test_no_steps_return_the_start(base, stack):
    train = [some_examples(base, 3, 0)]
    c, curves = fit_coefficients(base, stack, train, train, Schedule(steps=0), [0])
    assert curves.train.shape == (0, 1)
    assert curves.at == (0,)
    assert float(c.abs().max()) == 0


def test_the_rate_is_a_warm_up_and_half_a_cosine():
    schedule = Schedule(steps=40, warmup=0.1)
    rates = [cosine_rate(step, schedule) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[22] == pytest.approx(0.5)
    assert rates[39] == pytest.approx(0.5 * (1 + math.cos(math.pi * 35 / 36)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert cosine_rate(0, Schedule(steps=1)) == 1.0


def test_a_start_is_peft_s(base):
    """B zero, A Kaiming-uniform with a = √5 (bound 1/√d_in), zero beyond the rank and outside the targets."""
    out = start_factors(base.projections, PLANS, [1, 2, 3])
    for module, (b, a) in out.items():
        d_in = base.projections[module][1]
        assert b.shape == (3, base.projections[module][0], 6)
        assert float(b.abs().max()) == 0
        for g, plan in enumerate(PLANS):
            own = a[g, : plan.rank]
            if not plan.has(module):
                assert float(a[g].abs().max()) == 0
                continue
            assert float(a[g, plan.rank :].abs().sum()) == 0
            assert 0.8 / math.sqrt(d_in) < float(own.abs().max()) <= 1 / math.sqrt(d_in)
    alone = start_factors(base.projections, PLANS[1:2], [2])
    for module, (_, a) in alone.items():
        assert torch.equal(a[0], out[module][1][1, :2])
    assert NEW_ADAPTER.batch == 8
    assert Plan(16, 2.0, rslora=True).scale == pytest.approx(8.0)  # α = 32, √16 = 4


@pytest.mark.parametrize("plan", [Plan(4, 2.0, targets=PROJECTIONS), Plan(8, 1.0, True, ("q_proj", "down_proj"))])
def test_a_new_adapter_is_the_one_that_peft_trains(base, plan):
    """peft's model with the same start, torch's AdamW, the same minibatches, schedule and clipping."""
    from peft import LoraConfig, get_peft_model

    rows, schedule, seed = some_examples(base, 7, 3), Schedule(steps=5, lr=3e-3, batch=4, clip=0.15), 11
    (mine,), curves = train_fresh(base, ["mine"], [rows], None, schedule, seeds=[seed], plans=[plan])
    alpha = plan.ratio * plan.rank
    config = LoraConfig(
        r=plan.rank, lora_alpha=alpha, use_rslora=plan.rslora, target_modules=list(plan.targets), lora_dropout=0.0
    )
    with peft_s_own_warnings():
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
    start = start_factors(base.projections, [plan], [seed])
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert set(layers) == set(mine.modules)
    with torch.no_grad():
        for module, layer in layers.items():
            layer.lora_A["default"].weight.copy_(start[module][1][0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=schedule.lr, betas=(0.9, 0.999), weight_decay=0.0)
    norms = []
    for step, batch in enumerate(minibatches(rows, 4, 5, seed)):
        width = max(map(len, batch))
        ids, labels = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor([*row.prompt, *row.answer])
            labels[i, len(row.prompt) : len(row)] = torch.tensor(row.answer)
        loss = model(
            input_ids=ids,
            attention_mask=(torch.arange(width) < torch.tensor([[len(r)] for r in batch])).long(),
            labels=labels,
        ).loss
        assert loss.item() == pytest.approx(float(curves.train[step, 0]), rel=1e-3)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, schedule.clip)))
        optimiser.param_groups[0]["lr"] = schedule.lr * cosine_rate(step, schedule)
        optimiser.step()
    assert max(norms) > schedule.clip
    for module, layer in layers.items():
        factors = mine.modules[module]
        assert relative(factors.A, layer.lora_A["default"].weight.detach()) < 1e-3
        assert relative(factors.raw_B, layer.lora_B["default"].weight.detach()) < 1e-3
        assert relative(factors.delta(), layer.get_delta_weight("default").detach()) < 1e-3


def test_training_helps_and_saves_to_peft(base, tmp_path):
    rows = some_examples(base, 8, 9)
    (adapter,), curves = train_fresh(base, ["a"], [rows], [rows], Schedule(steps=30, lr=1e-2, batch=8), seeds=[0])
    assert curves.best < 0.9 * curves.validation[0]
    got = score(base, [rows], grouped([adapter])).loss.mean()
    assert float(got) == pytest.approx(float(curves.best), rel=1e-4)
    assert re.fullmatch("[0-9a-f]{64}", adapter.digest())
    assert adapter.base == "tiny"


@pytest.mark.parametrize("sizes", [[3, 8, 11], [1], [5, 5]])
def test_minibatches_are_shuffled_epochs_one_after_the_other(base, sizes):
    schedule, first = Schedule(steps=7, batch=5), 0
    drawn, real = gradient.minibatches(sizes, schedule, [7, 8, 9][: len(sizes)])
    for i, size in enumerate(sizes):
        examples, own = some_examples(base, size, i), min(5, size)
        for rows, at in zip(minibatches(examples, own, 7, 7 + i), drawn[:, i], strict=True):
            assert [examples[place - first] for place in at[:own]] == rows
            assert set(at[own:]) <= {at[0]}
        assert real[i].tolist() == [place < own for place in range(min(5, max(sizes)))]
        first += size
    assert gradient.minibatches([3], Schedule(steps=0), [0])[0].shape == (0, 1, 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "Gemma3"])
def test_checkpoints_give_the_same_fit(kind, stack, base):
    """Bit for bit, and each layer is run twice a step; nothing is left on the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    own = {"llama": lambda: base, "gpt2": tiny_gpt2, "t5": tiny_t5}.get(kind, lambda: tiny_causal(kind))()
    train = [some_examples(own, n, n) for n in (3, 6)]
    schedule = Schedule(steps=3, lr=1e-2, batch=4)
    layers = [layer for layer in own.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    calls, found = [], []
    seen = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    inner = [next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__)
             for layer in layers]  # fmt: skip
    inner = [norm.register_forward_pre_hook(lambda *_: calls.append(0)) for norm in inner]
    for again in (False, True):
        calls.clear()
        (one, two), curves = train_fresh(
            own, ["a", "b"], train, None, replace(schedule, checkpoint=again), seeds=[0, 1]
        )
        found.append([curves.train, *(t for a in (one, two) for f in a.modules.values() for t in (f.A, f.B))])
        assert calls.count(1) == 3 * len(layers)
        assert calls.count(0) == 3 * len(layers) * (1 + again)
    for handle in seen + inner:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any("forward" in vars(layer) for layer in layers)
    assert hook_count(own.model) == 0


def test_checkpoints_hold_less(base, stack):
    """What the graph holds between the passes, in numbers: the layers' inputs instead of all that is in them."""
    batch, held = Packed(some_examples(base, 6, 0), base).batch(np.arange(6)), []
    c = torch.full((1, len(stack.modules), len(stack)), 0.1, requires_grad=True)
    for again in (False, True):
        sizes = []
        with (
            compose(base.model, shared(stack, c)),
            gradient.checkpointed(base.model) if again else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t),
        ):
            base.logits(batch)
        held.append(sum(sizes))
    assert held[1] < 0.5 * held[0]


def test_what_was_set_on_a_layer_before_checkpoints_is_there_after(base):
    layer = base.model.model.layers[0]
    layer.forward = own = layer.forward
    try:
        with pytest.raises(KeyError), gradient.checkpointed(base.model):
            raise KeyError
        assert vars(layer)["forward"] is own
    finally:
        del layer.forward
