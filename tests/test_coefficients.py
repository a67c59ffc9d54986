"""Learned coefficients: side by side against alone, against dense autograd, against plain peft and `merge`."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

import workbench as wb
from fitting import answers_loss, plain_fit
from helpers import (
    hook_logits,
    peft_logits,
    random_adapter,
    relative,
    some_examples,
    some_ids,
    three_splits,
    three_stacks,
    tiny_base,
)
from workbench.adapt.coefficients import (
    ACTIVATIONS,
    GRANULARITIES,
    STARTS,
    _Theta,
    adamerging,
    entropy,
    learn_coefficients,
    slots,
)
from workbench.adapt.fitted import fold, side_by_side, unit_means
from workbench.adapt.gradient import Schedule
from workbench.compose import LowRank, compose, shared
from workbench.errors import AdapterError, BaseError, MergeError, SelectionError
from workbench.evaluate import Encoded, score
from workbench.stack import Stack

SHORT = Schedule(steps=5, lr=0.1, batch=4, every=2)
COARSE = GRANULARITIES[:-1]  # all but units: one coefficient per adapter in a slot


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stacks(base):
    return three_stacks(base)


@pytest.fixture(scope="module")
def data(base):
    return three_splits(base)


def same_fit(got, want):
    torch.testing.assert_close(got.coefficients, want.coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.train, want.curves.train, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.validation, want.curves.validation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.curves.best, want.curves.best, rtol=1e-4, atol=1e-5)
    assert (got.passes, got.tokens, got.curves.at) == (want.passes, want.tokens, want.curves.at)
    assert got.parameters == want.parameters
    assert (got.units is None) == (want.units is None)
    for module, own in (got.units or {}).items():
        torch.testing.assert_close(own, want.units[module], rtol=1e-4, atol=1e-5)
    assert list(got.adapter.modules) == list(want.adapter.modules)
    for module, factors in got.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), want.adapter.modules[module].delta(), rtol=1e-4, atol=1e-5)


SETTINGS = [
    {},
    {"granularity": "layer", "activation": "softmax", "start": "normal"},
    {"activation": "linear", "start": "uniform", "l1": 0.1, "l2": 0.2, "sparsity": 0.3},
    {"granularity": "sublayer", "activation": "sigmoid", "start": "target", "target": 1, "l1": 1.0},
    {"granularity": "unit", "activation": "softmax", "start": "normal", "l2": 1.0},
    {"granularity": "unit", "start": "uniform", "l1": 0.1, "l2": 0.2, "sparsity": 0.3},
    {"granularity": "unit", "activation": "sigmoid", "start": 0.3, "l1": 1.0, "objective": "entropy"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "plain")
def test_fits_over_different_stacks_equal_each_alone(base, stacks, data, settings):
    together = learn_coefficients(base, stacks, *data, SHORT, seeds=[5, 6, 7], names=["x", "y", "z"], **settings)
    for g, fitted in enumerate(together):
        (alone,) = learn_coefficients(base, [stacks[g]], [data[0][g]], [data[1][g]], SHORT, seeds=[5 + g], **settings)
        same_fit(fitted, alone)
        assert fitted.coefficients.shape == (len(stacks[g].modules), 3)
        assert fitted.adapter.name == "xyz"[g]
        assert float((fitted.curves.validation[1:] - fitted.curves.validation[0]).abs().max()) > 1e-4


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


def plainly(base, stack, seed, granularity="module", activation="leaky_relu", start="zero", target=None):
    """θ in float64 and a function of it: module → coefficients (R,), written out from the formulas."""
    order, k, generator = (
        [m for m in base.layers if m in stack.modules],
        len(stack),
        torch.Generator().manual_seed(seed),
    )
    unit = granularity == "unit"
    slot = list(range(len(order))) if unit else slots(order, granularity)
    sizes = [(len(stack.modules[m]),) for m in order] if unit else [(max(slot) + 1, k)]
    own = [stack.modules[m].owner == target for m in order] if unit else [torch.arange(k) == target]
    thetas = []
    for size, mine in zip(sizes, own, strict=True):
        value = {
            "zero": lambda size, _: torch.zeros(size),
            "uniform": lambda size, _: torch.rand(size, generator=generator),
            "normal": lambda size, _: torch.randn(size, generator=generator) / 2,
            "equal": lambda size, _: torch.ones(size) / k**0.5,
            "target": lambda size, mine: mine.float().expand(size).clone(),
            "0.3": lambda size, _: 0.3 * torch.ones(size),
        }[str(start)](size, mine)
        thetas.append(value.double().requires_grad_())

    def f(theta):
        e = theta.exp()
        return {
            "leaky_relu": lambda: torch.where(theta > 0, theta, 0.01 * theta),
            "linear": lambda: theta * 1,
            "squared": lambda: theta * theta,
            "softmax": lambda: e / e.sum(-1, keepdim=True),
            "sigmoid": lambda: e / (1 + e),
        }[activation]()

    def coefficients():
        if not unit:
            return {m: f(thetas[0])[slot[i]][stack.modules[m].owner] for i, m in enumerate(order)}
        of_all = {m: len(stack.modules[m]) / k if activation == "softmax" else 1.0 for m in order}
        return {m: of_all[m] * f(theta) for m, theta in zip(order, thetas, strict=True)}

    def deltas():
        return {m: (stack.modules[m].B.double() * c) @ stack.modules[m].A.double() for m, c in coefficients().items()}

    def penalty(l1, l2):
        slot_costs = []
        if unit:
            for m, c in coefficients().items():
                slot_costs.append(sum(l1 * abs(x) + l2 * x**2 for x in c) * k / len(stack.modules[m]))
        else:
            for row in f(thetas[0]):
                slot_costs.append(sum(l1 * abs(x) + l2 * x**2 for x in row))
        return sum(slot_costs) / len(slot_costs)

    def project(by):
        """argmin ½‖x − θ‖² + by √n ‖x‖ for every group of n numbers."""
        for theta, m in zip(thetas, order, strict=False):
            groups = [theta.view(-1)[i : i + 1] for i in range(theta.numel())]
            if unit:
                groups = [theta[stack.modules[m].owner == i] for i in range(k)]
            shrunk = [x * max(0.0, 1 - by * len(x) ** 0.5 / max(float(x.norm()), 1e-300)) for x in groups]
            if unit:
                for i, x in enumerate(shrunk):
                    theta[stack.modules[m].owner == i] = x
            else:
                theta.copy_(torch.cat(shrunk).view(theta.shape))

    return SimpleNamespace(thetas=thetas, coefficients=coefficients, deltas=deltas, penalty=penalty, project=project)


def coefficients_of(fitted, stack):
    """module → (R,) of a fit, whatever its granularity."""
    if fitted.units is not None:
        return fitted.units
    return {m: fitted.coefficients[i][units.owner] for i, (m, units) in enumerate(stack)}


def same_path(base, stack, rows, schedule, seed, settings, *, extra=(0.0, 0.0, 0.0), loss=answers_loss, tolerance=2e-4):
    """Fit by `learn_coefficients` and by the plain loop; the fit and the loop's gradient norms."""
    oracle, (l1, l2, sparsity) = plainly(base, stack, seed, **settings), extra
    (fitted,) = learn_coefficients(
        base, [stack], [rows], None, schedule, seeds=[seed], l1=l1, l2=l2, sparsity=sparsity,
        objective="loss" if loss is answers_loss else "entropy", **settings,
    )  # fmt: skip
    losses, norms, _ = plain_fit(
        base, oracle.thetas, oracle.deltas, rows, schedule, seed, loss=loss,
        penalty=(lambda: oracle.penalty(l1, l2)) if l1 or l2 else None,
        project=(lambda rate: oracle.project(rate * sparsity)) if sparsity else None,
    )  # fmt: skip
    torch.testing.assert_close(fitted.curves.train, torch.tensor(losses), rtol=1e-4, atol=1e-5)
    got, want = coefficients_of(fitted, stack), oracle.coefficients()
    assert set(got) == set(want) == set(stack.modules)
    for module, c in got.items():
        torch.testing.assert_close(c, want[module].detach().float(), rtol=0, atol=tolerance)
    return fitted, norms


@pytest.mark.parametrize("granularity", ["module", "unit", "layer"])
@pytest.mark.parametrize("activation", ["leaky_relu", "softmax", "squared"])
def test_one_step_follows_the_dense_gradient(base, stacks, data, activation, granularity):
    """The gradient handed to AdamW, and its first step, lr · g / (|g| + ε)."""
    stack, rows, seen = stacks[2], data[0][1][:4], []
    schedule = Schedule(steps=1, lr=1e-3, batch=4, clip=None, warmup=0)
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.extend(p.grad[0].clone() for p in self.param_groups[0]["params"])
        return step(self, *args, **kwargs)

    settings = {"granularity": granularity, "activation": activation, "start": "uniform"}
    oracle = plainly(base, stack, 4, **settings)
    start = [theta.detach().clone() for theta in oracle.thetas]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        (fitted,) = learn_coefficients(base, [stack], [rows], None, schedule, seeds=[4], **settings)
    _, _, want = plain_fit(base, oracle.thetas, oracle.deltas, rows, schedule, 4)
    assert len(seen) == len(want) == (14 if granularity == "unit" else 1)
    largest = max(float(gradient.abs().max()) for gradient in want)
    for got, gradient in zip(seen, want, strict=True):
        assert float((got - gradient).abs().max()) < 1e-4 * largest
    with torch.no_grad():
        for theta, before, gradient in zip(oracle.thetas, start, want, strict=True):
            theta.copy_(before - schedule.lr * gradient / (gradient.abs() + 1e-8))
    for module, c in oracle.coefficients().items():
        torch.testing.assert_close(coefficients_of(fitted, stack)[module], c.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "activation", "start", "clip"),
    [
        ("module", "leaky_relu", "zero", 1e-3),
        ("module", "linear", "equal", 0.1),
        ("module", "softmax", "zero", 0.02),
        ("layer", "squared", "uniform", 0.1),
        ("module", "sigmoid", "normal", 0.02),
        ("expert", "linear", "target", 0.1),
        ("unit", "leaky_relu", "zero", 1e-3),
        ("unit", "softmax", "normal", 0.02),
        ("unit", "linear", "target", 0.1),
        ("sublayer", "linear", 0.3, 0.1),
    ],
)
def test_some_steps_follow_a_plain_loop(base, stacks, data, granularity, activation, start, clip):
    """Dense weights in float64, torch's AdamW, warm-up and cosine, a limit that clips."""
    schedule = Schedule(steps=4, lr=0.05, batch=4, clip=clip, warmup=0.5)
    settings = {"granularity": granularity, "activation": activation, "start": start}
    settings |= {"target": 1} if start == "target" else {}
    fitted, norms = same_path(base, stacks[2], data[0][1], schedule, 4, settings)
    assert max(norms) > clip
    assert fitted.coefficients.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["module", "layer", "unit"])
@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
@pytest.mark.parametrize("extra", [(0.5, 0.0, 0.0), (0.0, 0.7, 0.0), (0.1, 0.2, 0.4)])
def test_penalties_follow_the_written_formula(base, stacks, data, granularity, activation, extra):
    schedule = Schedule(steps=3, lr=0.05, batch=4, clip=0.1, warmup=0)
    settings = {"granularity": granularity, "activation": activation, "start": "normal"}
    fitted, _ = same_path(base, stacks[2], data[0][1], schedule, 4, settings, extra=extra)
    (free,) = learn_coefficients(base, [stacks[2]], [data[0][1]], None, schedule, seeds=[4], **settings)
    assert fitted.curves.train[0] == free.curves.train[0]  # a penalty is no part of the curves
    assert float((fitted.coefficients - free.coefficients).abs().max()) > 1e-3


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


@pytest.mark.parametrize("granularity", COARSE)
def test_modules_of_one_slot_share_their_coefficients(base, stacks, data, granularity):
    (fitted,) = learn_coefficients(
        base, stacks[:1], data[0][:1], data[1][:1], SHORT, seeds=[0], granularity=granularity, start="normal"
    )
    slot = slots(list(stacks[0].modules), granularity)
    rows = [[fitted.coefficients[i] for i, s in enumerate(slot) if s == place] for place in sorted(set(slot))]
    assert all(torch.equal(row, own[0]) for own in rows for row in own)
    number = {"expert": 1, "layer": 2, "sublayer": 4, "module": 14}[granularity]
    assert len({tuple(own[0].tolist()) for own in rows}) == len(rows) == number
    assert fitted.parameters == 3 * number


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


@pytest.mark.parametrize("granularity", ["module", "unit"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("start", [*STARTS, 0.3])
def test_every_activation_with_every_start_begins_where_it_says(base, stacks, data, activation, start, granularity):
    settings = {"granularity": granularity, "activation": activation, "start": start, "target": 1}
    (fitted,) = learn_coefficients(base, stacks[:1], data[0][:1], None, Schedule(steps=0), seeds=[3], **settings)
    want = plainly(base, stacks[0], 3, **settings).coefficients()
    for module, c in coefficients_of(fitted, stacks[0]).items():
        torch.testing.assert_close(c, want[module].detach().float())


def test_the_target_is_found_by_name_or_place(base, stacks, data):
    """Each stack has it where it has it; nobody else weighs anything."""
    turned = stacks[0].choose(["a2", "a1", "a0"])
    both, rows = [stacks[0], turned], data[0][:2]
    for granularity in ("module", "unit"):
        settings = {"granularity": granularity, "start": "target", "seeds": [0, 1]}
        named = learn_coefficients(base, both, rows, None, Schedule(steps=0), target="a2", **settings)
        assert [fitted.coefficients[0].tolist() for fitted in named] == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        placed = learn_coefficients(base, both, rows, None, Schedule(steps=0), target=2, **settings)
        assert [fitted.coefficients[0].tolist() for fitted in placed] == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
        own, ids = stacks[0].adapter("a2"), some_ids(base)
        for fitted in (*named, placed[0]):
            assert relative(hook_logits(base, fitted.adapter, ids), hook_logits(base, own, ids)) < 1e-5
    for target, said in (("b0", "no adapter 'b0' in this stack of 3"), (3, "no adapter 3"), (-1, "no adapter -1")):
        with pytest.raises(SelectionError, match=said):
            learn_coefficients(base, both, rows, None, seeds=[0, 1], start="target", target=target)
    with pytest.raises(MergeError, match="start 'target' needs to know which adapter"):
        learn_coefficients(base, both, rows, None, seeds=[0, 1], start="target")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("which", [0, 1])
def test_softmax_from_zero_is_the_average_at_every_granularity(base, stacks, data, granularity, which):
    stack = stacks[which]
    settings = {"granularity": granularity, "activation": "softmax"}
    together = [stack, stacks[2]]  # the other stack has more units and more modules
    fitted, _ = learn_coefficients(base, together, data[0][:2], None, Schedule(steps=0), seeds=[0, 1], **settings)
    for c in coefficients_of(fitted, stack).values():
        torch.testing.assert_close(c, torch.full_like(c, 1 / 3))
    average = wb.merge(stack, "sum", weights=torch.full((3,), 1 / 3))
    for module, factors in fitted.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), average.modules[module].delta())


def test_draws_keep_their_order_beside_others(base):
    """Of a layer's modules a fit may lack the first, so that its slots come in another order than all together's."""
    names = ["l.0.mlp.gate", "l.0.mlp.experts.0.up", "l.0.mlp.shared"]
    model = SimpleNamespace(get_submodule=lambda name: torch.nn.Linear(4, 4))
    place = SimpleNamespace(layers=dict.fromkeys(names, (4, 4)), device=torch.device("cpu"), model=model)
    whole = Stack.of([random_adapter(place.layers, 2, i) for i in range(2)])
    part = Stack.of([random_adapter(dict.fromkeys(names[1:], (4, 4)), 2, i) for i in range(2)])
    together, alone = _Theta([whole, part], place, "sublayer", "linear"), _Theta([part], place, "sublayer", "linear")
    together.begin([whole, part], [1, 2], "normal", None)
    alone.begin([part], [2], "normal", None)
    for module in names[1:]:
        i, j = together.modules.index(module), alone.modules.index(module)
        owner = torch.tensor([[0, 0, 1, 1]])
        assert torch.equal(together.values(i, owner.expand(2, -1))[1], alone.values(j, owner)[0])


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


@pytest.mark.parametrize("which", [0, 1, 2])
def test_fold_by_units(stacks, which):
    stack = stacks[which]
    generator = torch.Generator().manual_seed(2)
    units = {module: torch.randn(len(own), generator=generator) for module, own in stack}
    for module, factors in fold(stack, units, "f").modules.items():
        own = stack.modules[module]
        want = sum(
            c.double() * torch.outer(own.B[:, j].double(), own.A[j].double()) for j, c in enumerate(units[module])
        )
        assert relative(factors.delta(), want) < 1e-5
    means = unit_means(stack, units)
    assert means.shape == (len(stack.modules), 3)
    for i, (module, own) in enumerate(stack):
        for n in range(3):
            mine = [float(c) for c, owner in zip(units[module], own.owner, strict=True) if owner == n]
            assert float(means[i, n]) == pytest.approx(sum(mine) / len(mine) if mine else 0.0, abs=1e-6)


def test_units_of_a_fit(base, stacks, data, tmp_path):
    """One coefficient each, and the adapter that they make; in plain peft too."""
    stack = stacks[0]
    (fitted,) = learn_coefficients(
        base, [stack], data[0][:1], data[1][:1], SHORT, seeds=[0], granularity="unit", start="uniform"
    )
    assert {m: len(c) for m, c in fitted.units.items()} == {m: len(units) for m, units in stack}
    assert fitted.parameters == sum(len(units) for _, units in stack) == 14 * (2 + 5 + 1)
    assert torch.equal(fitted.coefficients, unit_means(stack, fitted.units))
    assert any(
        len(c[units.owner == 1].unique()) > 1 for (_, units), c in zip(stack, fitted.units.values(), strict=True)
    )
    ids = some_ids(base)
    updates = {m: LowRank(units.B, units.A, fitted.units[m][None]) for m, units in stack}
    with torch.no_grad(), compose(base.model, updates):
        hooked = base.model(input_ids=ids).logits
    assert relative(hook_logits(base, fitted.adapter, ids), hooked) < 1e-5
    fitted.adapter.save(tmp_path / "a")
    assert relative(peft_logits(base, tmp_path / "a", ids), hooked) < 1e-5
    got = score(base, data[1][:1], updates).loss.mean()
    torch.testing.assert_close(got, fitted.curves.best, rtol=1e-5, atol=1e-6)


def test_fold_refuses_coefficients_of_the_wrong_length(stacks):
    with pytest.raises(MergeError, match=r"expected coefficients \(3,\) or \(14, 3\), got \(4,\)"):
        fold(stacks[0], torch.ones(4), "f")
    with pytest.raises(MergeError, match=r"got \(3, 14\)"):
        fold(stacks[0], torch.ones(3, 14), "f")
    units = {module: torch.ones(len(own)) for module, own in stacks[0]}
    first = next(iter(units))
    for wrong in (units | {first: torch.ones(3)}, {first: units[first]}, units | {"x": torch.ones(8)}):
        with pytest.raises(MergeError, match=r"one coefficient a unit of 14 modules, got shapes \[\("):
            fold(stacks[0], wrong, "f")


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
        ({"start": "ones"}, "start 'ones' is unknown; choose one of zero, uniform, normal, equal, target"),
        ({"granularity": "rank"}, "granularity 'rank' is unknown; choose one of expert, layer, sublayer, module, unit"),
        ({"objective": "supervised"}, "objective 'supervised' is unknown; choose one of loss, entropy"),
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


@pytest.mark.parametrize("granularity", ["module", "sublayer", "unit"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "linear"])
def test_a_penalty_is_of_what_a_fit_has_itself(base, stacks, activation, granularity):
    """Not of the modules of others, nor of the places that are filled up; and those get no gradient."""
    theta = _Theta(stacks, base, granularity, activation)
    theta.begin(stacks, [3, 4, 5], "normal", None)
    for tensor in theta.tensors:
        tensor.requires_grad_()
    got = theta.penalty(0.3, 0.7)
    for g, stack in enumerate(stacks):
        settings = {"granularity": granularity, "activation": activation, "start": "normal"}
        want = plainly(base, stack, 3 + g, **settings).penalty(0.3, 0.7)
        assert got[g].item() == pytest.approx(want.item(), rel=1e-5)
    got.sum().backward()
    alone = _Theta(stacks[1:2], base, granularity, activation)
    assert sum(int(t.grad[1].ne(0).sum()) for t in theta.tensors) == sum(t.numel() for t in alone.tensors)


@pytest.mark.parametrize("by", [0.2, 0.4])
def test_the_soft_threshold_in_closed_form(base, stacks, by):
    """One number: sign(θ) max(|θ| − t, 0). A group of n: θ max(1 − t √n / ‖θ‖, 0); filled-up places stay out of it."""
    together = stacks[:2]
    for granularity in ("module", "unit"):
        theta = _Theta(together, base, granularity, "leaky_relu")
        theta.begin(together, [0, 1], "normal", None)
        before = [tensor.clone() for tensor in theta.tensors]
        theta.shrink(by)
        if granularity == "module":
            want = before[0].sign() * (before[0].abs() - by).clamp_min(0)
            torch.testing.assert_close(theta.tensors[0], want)
            assert 0.05 < float((theta.tensors[0][0] == 0).float().mean()) < 0.9
            continue
        zeroed = []
        for i, module in enumerate(theta.modules):
            for g, stack in enumerate(together):
                units = stack.modules.get(module, ())
                assert not theta.tensors[i][g, len(units) :].any()
                for n in range(3) if len(units) else ():
                    own = [j for j in range(len(units)) if units.owner[j] == n]
                    old, new = before[i][g, own], theta.tensors[i][g, own]
                    if own:
                        keep = max(0.0, 1 - by * len(own) ** 0.5 / float(old.norm()))
                        torch.testing.assert_close(new, old * keep, rtol=1e-5, atol=1e-6)
                        zeroed.append(not new.any())
        assert 0 < sum(zeroed) < len(zeroed)


@pytest.mark.parametrize("granularity", ["layer", "unit"])
def test_sparsity_switches_adapters_off_exactly(base, stacks, data, granularity):
    """A moderate one leaves some groups at exactly 0 and others not; a huge one leaves the base."""
    settings = {"seeds": [0], "granularity": granularity, "start": "normal"}
    schedule = Schedule(steps=6, lr=0.05, batch=4)
    (some,) = learn_coefficients(base, stacks[:1], data[0][1:2], None, schedule, sparsity=2.0, **settings)
    off = some.coefficients == 0
    assert 0.1 < float(off.float().mean()) < 0.9
    if granularity == "unit":
        for (_, units), c, row in zip(stacks[0], some.units.values(), off, strict=True):
            assert all(bool((c[units.owner == n] == 0).all()) == bool(row[n]) for n in range(3))
    (free,) = learn_coefficients(base, stacks[:1], data[0][1:2], None, schedule, **settings)
    assert not (free.coefficients == 0).any()
    (none,) = learn_coefficients(base, stacks[:1], data[0][1:2], None, schedule, sparsity=1e6, **settings)
    assert not none.coefficients.any()
    ids = some_ids(base)
    assert torch.equal(hook_logits(base, none.adapter, ids), base.model(input_ids=ids).logits)


def test_adamerging_supervised_is_linear_from_equal(base, stacks, data):
    settings = {"seeds": [3, 4]}
    got = adamerging(base, stacks[:2], data[0][:2], data[1][:2], SHORT, **settings)
    want = learn_coefficients(
        base, stacks[:2], data[0][:2], data[1][:2], SHORT, activation="linear", start="equal", **settings
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.coefficients, other.coefficients)
        assert torch.equal(one.curves.train, other.curves.train)
        assert one.adapter.name == "adamerging-of-3"
    start, _ = adamerging(base, stacks[:2], data[0][:2], None, Schedule(steps=0), seeds=[3, 4], names=["p", "q"])
    torch.testing.assert_close(start.coefficients, torch.full((14, 3), 3**-0.5))
    assert start.adapter.name == "p"
    with pytest.raises(MergeError, match="objective 'loss' is unknown; choose one of supervised, entropy"):
        adamerging(base, stacks[:1], data[0][:1], None, seeds=[0], objective="loss")


def test_the_entropy_is_scipy_s_where_the_answer_begins():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 1, 2, -100], [3, -100, -100, -100, -100], [-100, -100, -100, 0, 6]])
    sums, counts = entropy(logits.bfloat16().float(), labels)
    p = logits.bfloat16().double()[torch.arange(3), [2, 0, 3]].softmax(-1).numpy()
    torch.testing.assert_close(sums, torch.tensor(scipy.stats.entropy(p, axis=1)).float())
    assert counts.tolist() == [1, 1, 1]
    assert entropy(logits.bfloat16(), labels)[0].dtype == torch.float32
    even, _ = entropy(torch.zeros(1, 5, 7), labels[:1])
    assert float(even) == pytest.approx(float(torch.tensor(7.0).log()))


def plain_entropy(logits, rows):
    """Mean over rows of −Σ p log p of the prediction behind each prompt."""
    last = torch.stack([own[len(row.prompt) - 1] for own, row in zip(logits, rows, strict=True)])
    p = last.exp() / last.exp().sum(1, keepdim=True)
    return -(p * p.log()).sum(1).mean()


@pytest.mark.parametrize("granularity", ["module", "unit"])
def test_entropy_steps_follow_a_plain_loop(base, stacks, data, granularity):
    schedule = Schedule(steps=4, lr=0.05, batch=4, clip=0.01, warmup=0)
    settings = {"granularity": granularity, "activation": "linear", "start": 0.3}
    fitted, norms = same_path(base, stacks[2], data[0][1], schedule, 4, settings, loss=plain_entropy)
    assert max(norms) > 0.01
    (same,) = adamerging(
        base, stacks[2:], data[0][1:2], None, schedule, seeds=[4], objective="entropy", granularity=granularity
    )
    assert torch.equal(same.coefficients, fitted.coefficients)
    (start,) = adamerging(base, stacks[2:], data[0][1:2], None, Schedule(steps=0), seeds=[4], objective="entropy")
    assert (start.coefficients == 0.3).all()


def relabelled(base, examples, seed, longer):
    """The same prompts with other answers, of the same lengths or longer."""
    rng = random.Random(seed)
    ids = range(3, len(base.tokenizer))
    return [
        Encoded(row.prompt, tuple(rng.choices(ids, k=len(row.answer) + longer * rng.randint(1, 9)))) for row in examples
    ]


def test_entropy_never_looks_at_a_label(base, stacks, data):
    train, validation = data[0][1], data[1][1]

    def fitted(rows, checked, objective="entropy"):
        return adamerging(base, stacks[:1], [rows], [checked], SHORT, seeds=[1], objective=objective)[0]

    first = fitted(train, validation)
    other = fitted(relabelled(base, train, 1, False), relabelled(base, validation, 2, False))
    assert torch.equal(first.coefficients, other.coefficients)
    assert torch.equal(first.curves.train, other.curves.train)
    assert torch.equal(first.curves.validation, other.curves.validation)
    longer = fitted(relabelled(base, train, 1, True), relabelled(base, validation, 2, True))
    torch.testing.assert_close(longer.coefficients, first.coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer.curves.validation, first.curves.validation, rtol=1e-5, atol=1e-6)
    labelled = [fitted(rows, validation, "supervised") for rows in (train, relabelled(base, train, 1, False))]
    assert not torch.allclose(labelled[0].coefficients, labelled[1].coefficients, atol=1e-2)
    assert float(first.curves.best) < float(first.curves.validation[0])


@pytest.mark.parametrize("granularity", ["module", "unit"])
def test_a_base_in_bf16_learns_coefficients_in_fp32(stacks, granularity):
    base = tiny_base(spread=2)
    base.model.bfloat16()
    rows = some_examples(base, 8, 3)
    schedule = Schedule(steps=15, lr=0.2, batch=8, every=5)
    (fitted,) = learn_coefficients(
        base, stacks[:1], [rows], [rows], schedule, seeds=[0], granularity=granularity, start=0.1
    )
    c = coefficients_of(fitted, stacks[0])
    assert {tensor.dtype for tensor in (*c.values(), fitted.coefficients, fitted.curves.train)} == {torch.float32}
    assert any(not torch.equal(own, own.bfloat16().float()) for own in c.values())
    assert fitted.curves.best < fitted.curves.validation[0] - 0.1
    assert {f.B.dtype for f in fitted.adapter.modules.values()} == {torch.float32}
    assert not any(p.requires_grad for p in base.model.parameters())


def test_frozen_factors_are_held_in_the_type_of_their_layer(stacks):
    """Filled up with zeros as the others, one stack's without a copy; a layer of another type keeps its own."""
    base = tiny_base()
    whole = side_by_side(stacks, base)
    base.model.bfloat16()
    base.model.model.layers[0].mlp.down_proj.float()
    held = side_by_side(stacks, base, frozen=True)
    assert list(held) == list(whole)
    for module, (b, a, owner) in held.items():
        dtype = torch.float32 if module == "model.layers.0.mlp.down_proj" else torch.bfloat16
        assert torch.equal(b, whole[module][0].to(dtype))
        assert torch.equal(a, whole[module][1].to(dtype))
        assert torch.equal(owner, whole[module][2])
        assert (b.dtype, a.dtype) == (dtype, dtype)
    for module, (b, a, owner) in side_by_side(stacks[:1], tiny_base(), frozen=True).items():
        units = stacks[0].modules[module]
        assert torch.equal(b[0], units.B)
        assert torch.equal(a[0], units.A)
        assert torch.equal(owner[0], units.owner)
