"""Learned coefficients: side by side against alone, against dense autograd, against plain peft and `merge`."""

import random
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import workbench as wb
from helpers import hook_logits, peft_logits, random_adapter, relative, some_examples, some_ids, tiny_base
from workbench.adapt import ADAPTIVE, fit_many, options_of
from workbench.adapt.coefficients import (
    ACTIVATIONS,
    GRANULARITIES,
    STARTS,
    fold,
    learn_coefficients,
    side_by_side,
    slots,
)
from workbench.adapt.gradient import Schedule
from workbench.compose import compose, shared
from workbench.errors import AdapterError, BaseError, MergeError, SelectionError
from workbench.evaluate import encode, score
from workbench.stack import Stack
from workbench.tasks import Example, Task

SHORT = Schedule(steps=6, lr=0.1, batch=4, every=2)


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stacks(base):
    """Three stacks of three adapters: unequal ranks, scalings and targets; the second lacks most modules."""
    first = [random_adapter(base, (2, 5, 1)[i], i, name=f"a{i}", size=0.2) for i in range(3)]
    second = [random_adapter(base, 3, 10 + i, ["v_proj", "up_proj"][: i + 1], name=f"b{i}", size=0.2) for i in range(3)]
    third = [random_adapter(base, 4, 20 + i, alpha=3, rslora=i == 1, name=f"c{i}", size=0.2) for i in range(3)]
    return [Stack.of(first), Stack.of(second), Stack.of(third[:2] + first[:1])]


@pytest.fixture(scope="module")
def data(base):
    return [some_examples(base, n, n) for n in (3, 9, 6)], [some_examples(base, 4, 50 + n) for n in range(3)]


def same_fit(got, want):
    torch.testing.assert_close(got.coefficients, want.coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.train, want.curves.train, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.validation, want.curves.validation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.best, want.curves.best, rtol=1e-4, atol=1e-5)
    assert (got.passes, got.tokens, got.curves.at) == (want.passes, want.tokens, want.curves.at)
    assert list(got.adapter.modules) == list(want.adapter.modules)
    for module, factors in got.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), want.adapter.modules[module].delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "activation", "start"),
    [("module", "leaky_relu", "zero"), ("layer", "softmax", "normal"), ("module", "linear", "uniform")],
)
def test_fits_over_different_stacks_equal_each_alone(base, stacks, data, granularity, activation, start):
    settings = {"granularity": granularity, "activation": activation, "start": start}
    together = learn_coefficients(base, stacks, *data, SHORT, seeds=[5, 6, 7], names=["x", "y", "z"], **settings)
    for g, fitted in enumerate(together):
        (alone,) = learn_coefficients(base, [stacks[g]], [data[0][g]], [data[1][g]], SHORT, seeds=[5 + g], **settings)
        same_fit(fitted, alone)
        assert fitted.coefficients.shape == (len(stacks[g].modules), 3)
        assert float((fitted.curves.train[0] - fitted.curves.train[-1]).abs()) > 1e-4
        assert fitted.adapter.name == "xyz"[g]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fits_over_one_stack_equal_each_alone_and_the_other_path(base, stacks, data, granularity):
    """One stack held once (the shared form), against the same stack held three times (the grouped form)."""
    settings = {"granularity": granularity, "start": "uniform"}
    one = [stacks[1]] * 3
    together = learn_coefficients(base, one, *data, SHORT, seeds=[1, 2, 3], **settings)
    copies = [replace(stacks[1]) for _ in range(3)]
    held_apart = learn_coefficients(base, copies, *data, SHORT, seeds=[1, 2, 3], **settings)
    for g, fitted in enumerate(together):
        same_fit(fitted, held_apart[g])
        (alone,) = learn_coefficients(base, [stacks[1]], [data[0][g]], [data[1][g]], SHORT, seeds=[1 + g], **settings)
        same_fit(fitted, alone)


def test_zero_start_is_the_base_at_step_zero(base, stacks, data):
    (fitted,) = learn_coefficients(base, stacks[:1], data[0][:1], data[1][:1], Schedule(steps=1, every=1), seeds=[0])
    bare = score(base, data[1][:1]).loss.mean()
    torch.testing.assert_close(fitted.curves.validation[0], bare, rtol=0, atol=0)
    (still,) = learn_coefficients(base, stacks[:1], data[0][:1], None, Schedule(steps=0), seeds=[0])
    assert not still.coefficients.any()
    assert still.adapter.norm() == 0.0
    ids = some_ids(base)
    assert torch.equal(hook_logits(base, still.adapter, ids), base.model(input_ids=ids).logits)


def dense_gradient(base, stack, rows, theta, activation):
    """∂ loss / ∂θ (M, N) in float64, through ΔW added to the weights themselves; the loss is per answer token."""
    theta = theta.double().requires_grad_()
    model, weights = base.model, {}
    value = ACTIVATIONS[activation](theta)
    for i, (module, units) in enumerate(stack):
        weight = model.get_submodule(module).weight.double()
        for n in range(len(stack)):
            own = units.of(n)
            weight = weight + value[i, n] * (own.B.double() @ own.A.double())
        weights[f"{module}.weight"] = weight
    others = {name: p.double() for name, p in model.named_parameters() if name not in weights}
    sums, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        logits = functional_call(model, weights | others, kwargs={"input_ids": ids}).logits
        start = len(row.prompt) - 1
        sums = sums + cross_entropy(logits[0, start:-1], ids[0, start + 1 :], reduction="sum")
        count += len(row.answer)
    (sums / count).backward()
    return theta.grad


@pytest.mark.parametrize("activation", ["leaky_relu", "softmax", "squared"])
def test_one_step_follows_the_dense_gradient(base, stacks, data, activation):
    """The gradient handed to AdamW, and its first step, lr · g / (|g| + ε)."""
    stack, rows, seen = stacks[2], data[0][1][:4], []
    schedule = Schedule(steps=1, lr=1e-3, batch=4, clip=None, warmup=0)
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["params"][0].grad.clone())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        (fitted,) = learn_coefficients(
            base, [stack], [rows], None, schedule, seeds=[4], activation=activation, start="uniform"
        )
    order = [list(stack.modules).index(module) for module in base.shapes if module in stack.modules]
    start = torch.empty(14, 3)  # drawn in the base's order of modules
    start[order] = torch.rand((14, 3), generator=torch.Generator().manual_seed(4))
    want = dense_gradient(base, stack, rows, start, activation)
    assert relative(seen[0][0], want[order]) < 1e-4
    moved = start - schedule.lr * (want / (want.abs() + 1e-8)).float()
    torch.testing.assert_close(fitted.coefficients, ACTIVATIONS[activation](moved), rtol=0, atol=1e-5)


MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("expert", [0, 0, 0, 0, 0, 0]),
        ("layer", [0, 0, 0, 1, 2, 3]),
        ("sublayer", [0, 0, 1, 2, 3, 4]),
        ("module", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_slots(granularity, expected):
    assert slots(MODULES, granularity) == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_modules_of_one_slot_share_their_coefficients(base, stacks, data, granularity):
    (fitted,) = learn_coefficients(
        base, stacks[:1], data[0][:1], data[1][:1], SHORT, seeds=[0], granularity=granularity, start="normal"
    )
    slot = slots(list(stacks[0].modules), granularity)
    rows = [[fitted.coefficients[i] for i, s in enumerate(slot) if s == place] for place in sorted(set(slot))]
    assert all(torch.equal(row, own[0]) for own in rows for row in own)
    assert (
        len({tuple(own[0].tolist()) for own in rows})
        == len(rows)
        == {"expert": 1, "layer": 2, "sublayer": 4, "module": 14}[granularity]
    )


def test_activations():
    t = torch.tensor([[-2.0, 0.0, 3.0]])
    value = {name: function(t)[0] for name, function in ACTIVATIONS.items()}
    e = torch.tensor([-2.0, 0.0, 3.0]).exp()
    torch.testing.assert_close(value["leaky_relu"], torch.tensor([-0.02, 0.0, 3.0]))
    torch.testing.assert_close(value["linear"], t[0])
    torch.testing.assert_close(value["squared"], torch.tensor([4.0, 0.0, 9.0]))
    torch.testing.assert_close(value["softmax"], e / e.sum())
    torch.testing.assert_close(value["sigmoid"], e / (1 + e))
    assert len(value) == 5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("start", STARTS)
def test_every_activation_with_every_start_begins_where_it_says(base, stacks, data, activation, start):
    (fitted,) = learn_coefficients(
        base, stacks[:1], data[0][:1], None, Schedule(steps=0), seeds=[3], activation=activation, start=start
    )
    generator = torch.Generator().manual_seed(3)
    first = {
        "zero": torch.zeros(14, 3),
        "equal": torch.full((14, 3), 3**-0.5),
        "uniform": torch.rand(14, 3, generator=generator) if start == "uniform" else None,
        "normal": torch.randn(14, 3, generator=generator) / 2 if start == "normal" else None,
    }[start]
    want = dict(zip((m for m in base.shapes if m in stacks[0].modules), ACTIVATIONS[activation](first), strict=True))
    torch.testing.assert_close(fitted.coefficients, torch.stack([want[module] for module in stacks[0].modules]))


def test_starts_are_the_fit_s_own(base, stacks, data):
    """Another fit beside it, or another place in the list, changes nothing; another seed does."""
    fits = learn_coefficients(
        base, [stacks[0]] * 3, [data[0][0]] * 3, None, Schedule(steps=0), seeds=[1, 2, 1], start="normal"
    )
    assert torch.equal(fits[0].coefficients, fits[2].coefficients)
    assert not torch.equal(fits[0].coefficients, fits[1].coefficients)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_fold_equals_the_sum_by_merge(stacks, which):
    stack = stacks[which]
    weights = torch.tensor([0.7, -1.3, 0.0])
    folded, summed = fold(stack, weights, "f"), wb.merge(stack, "sum", weights=weights)
    assert list(folded.modules) == list(stack.modules)
    for module, factors in folded.modules.items():
        torch.testing.assert_close(factors.delta(), summed.modules[module].delta())
    per_module = torch.randn(len(stack.modules), 3, generator=torch.Generator().manual_seed(1))
    folded = fold(stack, per_module, "f")
    for i, (module, units) in enumerate(stack):
        want = sum(per_module[i, n].double() * units.of(n).B.double() @ units.of(n).A.double() for n in range(3))
        assert relative(folded.modules[module].delta(), want) < 1e-5


def test_fold_refuses_coefficients_of_the_wrong_length(stacks):
    with pytest.raises(MergeError, match=r"expected coefficients \(3,\) or \(14, 3\), got \(4,\)"):
        fold(stacks[0], torch.ones(4), "f")
    with pytest.raises(MergeError, match=r"got \(3, 14\)"):
        fold(stacks[0], torch.ones(3, 14), "f")


def test_the_fitted_adapter_says_the_same_in_plain_peft(base, stacks, data, tmp_path):
    """Hooks under the learned coefficients, the folded adapter, and the saved one loaded by peft."""
    (fitted,) = learn_coefficients(base, stacks[2:], data[0][2:], data[1][2:], SHORT, seeds=[0], start="uniform")
    ids = some_ids(base)
    with torch.no_grad(), compose(base.model, shared(stacks[2], fitted.coefficients[None])):
        hooked = base.model(input_ids=ids).logits
    fitted.adapter.save(tmp_path / "a")
    assert relative(peft_logits(base, tmp_path / "a", ids), hooked) < 1e-5
    assert relative(hook_logits(base, fitted.adapter, ids), hooked) < 1e-5
    assert relative(base.model(input_ids=ids).logits, hooked) > 1e-2


def test_the_best_step_is_kept_and_the_spending_counted(base, stacks, data):
    (fitted,) = learn_coefficients(
        base, stacks[:1], data[0][1:2], data[1][:1], Schedule(steps=7, lr=0.3, batch=4, every=3), seeds=[0]
    )
    assert fitted.curves.at == (0, 3, 6, 7)
    got = score(base, data[1][:1], shared(stacks[0], fitted.coefficients[None])).loss.mean()
    torch.testing.assert_close(got, fitted.curves.validation.min(), rtol=1e-5, atol=1e-6)
    assert fitted.passes == 7 * 4 + 4 * 4
    assert fitted.tokens == int(fitted.curves.tokens) + 4 * sum(map(len, data[1][0]))
    (unchecked,) = learn_coefficients(base, stacks[:1], data[0][1:2], None, Schedule(steps=7, batch=4), seeds=[0])
    assert unchecked.passes == 28
    assert unchecked.tokens == int(unchecked.curves.tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "relu"}, "activation 'relu' is unknown; choose one of leaky_relu, linear"),
        ({"start": "ones"}, "start 'ones' is unknown; choose one of zero, uniform, normal, equal"),
        ({"granularity": "unit"}, "granularity 'unit' is unknown; choose one of expert, layer, sublayer, module"),
    ],
)
def test_unknown_words(base, stacks, data, options, said):
    with pytest.raises(MergeError, match=said):
        learn_coefficients(base, stacks[:1], data[0][:1], None, seeds=[0], **options)


def test_stacks_that_do_not_go_together(base, stacks, data):
    two = stacks[0].choose([0, 1])
    with pytest.raises(MergeError, match=r"equally many adapters, got \[2, 3\]"):
        learn_coefficients(base, [stacks[0], two], data[0][:2], None, seeds=[0, 1])
    with pytest.raises(MergeError, match="expected 1 fits throughout"):
        learn_coefficients(base, stacks[:1], data[0][:1], None, seeds=[0, 1])
    strange = Stack.of([random_adapter({"model.layers.9.self_attn.q_proj": (32, 32)}, 2)])
    with pytest.raises(BaseError, match=r"1 of 1 modules are not in this base, such as 'model\.layers\.9"):
        learn_coefficients(base, [strange], data[0][:1], None, seeds=[0])
    wide = Stack.of([random_adapter({"model.layers.0.self_attn.q_proj": (48, 32)}, 2)])
    with pytest.raises(
        AdapterError, match=r"random-0: model\.layers\.0\.self_attn\.q_proj is 48×32, the base's is 32×32"
    ):
        side_by_side([wide, wide], base)


def own_task(base, validation=3):
    rng = random.Random(1)
    made = tuple(Example("".join(rng.choice("abc") for _ in range(n % 5 + 1)) + f" {n}", "ab") for n in range(12))
    return Task("own", "say", made[:6], made[6 : 6 + validation], made[9:])


def test_adapt_by_name(base, stacks):
    task = own_task(base)
    fitted = wb.adapt(base, stacks[0], task, "coefficients", seed=3, steps=4, granularity="expert", every=2)
    train, validation = ([encode(base, task.prompt(e), e.target) for e in s] for s in (task.train, task.validation))
    (want,) = learn_coefficients(
        base, stacks[:1], [train], [validation], Schedule(steps=4, every=2), seeds=[3], granularity="expert"
    )
    same_fit(fitted, want)
    info = fitted.adapter.info
    assert info["method"] == "coefficients"
    assert info["task"] == "own"
    assert info["options"] == {"steps": 4, "granularity": "expert", "every": 2}
    assert info["sources"] == pytest.approx(dict(zip(stacks[0].names, want.coefficients[0].tolist(), strict=True)))
    adapters = [stacks[0].adapter(i) for i in range(3)]
    again = wb.adapt(base, adapters, task, seed=3, steps=4, granularity="expert", every=2)
    assert torch.equal(again.coefficients, fitted.coefficients)


def test_adapt_without_validation_examples_keeps_the_last_step(base, stacks):
    task = own_task(base, validation=0)
    fitted = wb.adapt(base, stacks[0], task, steps=3)
    train = [encode(base, task.prompt(e), e.target) for e in task.train]
    (want,) = learn_coefficients(base, stacks[:1], [train], None, Schedule(steps=3), seeds=[0])
    assert torch.equal(fitted.coefficients, want.coefficients)
    assert fitted.coefficients.any()


def test_adapt_errors(base, stacks):
    task = own_task(base)
    with pytest.raises(MergeError, match="no adaptive method 'coeficients' \\(did you mean 'coefficients'\\?\\)"):
        wb.adapt(base, stacks[0], task, "coeficients")
    with pytest.raises(MergeError, match="choose one of coefficients, lorahub"):
        wb.adapt(base, stacks[0], task, "xyz")
    with pytest.raises(
        MergeError, match=r"coefficients has no option 'budget'; it takes activation, granularity, start, steps"
    ):
        wb.adapt(base, stacks[0], task, budget=3)
    with pytest.raises(
        MergeError, match=r"lorahub has no option 'steps'; it takes budget, objective, optimiser, space$"
    ):
        fit_many(base, stacks[:1], [[]], [[]], "lorahub", seeds=[0], steps=3)
    with pytest.raises(SelectionError, match="empty"):
        wb.adapt(base, [], task)


def test_options_of_every_adaptive_method():
    for method in ADAPTIVE:
        assert not {"seeds", "names"} & set(options_of(method))
    assert set(options_of("coefficients")) == {
        "activation", "granularity", "start", "steps", "lr", "batch", "every", "clip", "weight_decay", "warmup",
    }  # fmt: skip
