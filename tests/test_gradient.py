"""Fits side by side against each alone, and against plain peft with torch's own AdamW."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import peft_s_own_warnings, random_adapter, relative, some_examples, tiny_base
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


def fit_coefficients(base, stack, train, validation, schedule, seeds, start=None):
    """Per-module coefficients (G, M, N) over one stack."""
    c = torch.zeros(len(train), len(stack.modules), len(stack)) if start is None else start.clone()
    return c, fit(base, [c], lambda: shared(stack, c), train, validation, schedule, seeds)


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
    ids, labels, keep = Packed(rows, "cpu").batch(np.arange(3))
    with compose(base.model, {m: LowRank(b * scales, a) for m, (b, a) in factors.items()}):
        sums, counts = row_losses(base.logits(ids, keep), labels)
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
        best = base.next_token_logits(torch.tensor([row.prompt]), 1).argmax().item()
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


def minibatches(examples, batch, steps, seed):
    """Shuffled epochs under the seed, one after the other."""
    generator, queue = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(queue) < batch:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in queue[:batch]]
        del queue[:batch]


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
