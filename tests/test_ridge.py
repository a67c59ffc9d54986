"""Ridge on linearised logits: against autograd, dense algebra in float64, SciPy on a linear model, and each alone."""

from importlib import import_module

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import (
    hook_logits,
    random_adapter,
    relative,
    some_examples,
    some_ids,
    tiny_base,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
)
from workbench.adapt.coefficients import slots
from workbench.adapt.fitted import fold
from workbench.adapt.ridge import normal_equations, ridge, solve
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import compose, grouped, shared
from workbench.errors import BaseError, MergeError
from workbench.evaluate import Encoded, Packed, score
from workbench.stack import Stack

module = import_module("workbench.adapt.ridge")  # its name in the package is the function's
FEW = {"penalties": (1.0, 0.1, 0.01), "lengths": (1.0, 0.5)}


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stack(base):
    """Three adapters of unequal rank, one of them in a few modules only."""
    targets = (None, ["v_proj", "up_proj"], None)
    return Stack.of([random_adapter(base, (2, 3, 1)[i], i, targets[i], name=f"a{i}", size=0.3) for i in range(3)])


@pytest.fixture(scope="module")
def data(base):
    return [some_examples(base, n, n) for n in (3, 7, 5)], [some_examples(base, 4, 50 + n) for n in range(3)]


@pytest.fixture(scope="module")
def heads(base):
    """Adapters of the head alone: the logits are linear in their coefficients."""
    rows, columns = base.layers["lm_head"]
    generator = torch.Generator().manual_seed(1)

    def one() -> Factors:
        return Factors(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator))

    return Stack.of([Adapter(f"h{i}", {"lm_head": one()}, base.name) for i in range(4)])


def answer_logits(base, stack, rows, slot):
    """θ (slots, K) → logits (T, V) at all answer tokens, one example after the other and unpadded; and their labels."""
    packs = [Packed([row], base).batch(np.array([0])) for row in rows]
    labels = torch.cat([batch.labels[batch.labels != -100] for batch in packs])

    def logits(theta):
        with compose(base.model, shared(stack, theta[slot][None])):
            return torch.cat([base.logits(batch)[batch.labels != -100] for batch in packs])

    return logits, labels


def dense(base, stack, rows, slot, theta):
    """A, b and the loss by their definitions, in float64, J by reverse-mode autograd."""
    logits, labels = answer_logits(base, stack, rows, slot)
    z = logits(theta).detach().double()
    with sdpa_kernel(SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(logits, theta, vectorize=True).double().flatten(2)
    A, b = torch.zeros(J.shape[2], J.shape[2], dtype=torch.float64), torch.zeros(J.shape[2], dtype=torch.float64)
    p = z.softmax(1)
    for t in range(len(z)):
        y = torch.nn.functional.one_hot(labels[t], z.shape[1]).double()
        A += J[t].T @ (p[t].diag() - torch.outer(p[t], p[t])) @ J[t]
        b += J[t].T @ (y - p[t])
    return A / len(z), b / len(z), float(torch.nn.functional.cross_entropy(z, labels)), J


def random_theta(slot, k, seed=0):
    return torch.randn(max(slot) + 1, k, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("granularity", ["expert", "layer", "sublayer", "module"])
def test_normal_equations_equal_dense_autograd(base, stack, data, granularity):
    slot = slots(list(stack.modules), granularity)
    theta = random_theta(slot, 3)
    got, fed = normal_equations(base, stack, theta, data[0][0], slot)
    A, b, loss, _ = dense(base, stack, data[0][0], slot, theta)
    assert relative(got.A, A) < 1e-4
    assert relative(got.b, b) < 1e-4
    assert got.loss == pytest.approx(loss, rel=1e-5)
    assert got.A.dtype == got.b.dtype == torch.float64
    assert fed == theta.numel() * sum(map(len, data[0][0]))


@pytest.mark.parametrize("make", [lambda: tiny_causal("Qwen3"), lambda: tiny_causal("Gemma3"), tiny_gpt2, tiny_t5])
def test_derivatives_equal_autograd_on_other_architectures(make):
    base = make()
    stack = Stack.of([random_adapter(base, 2, i, name=f"a{i}", size=0.2) for i in range(2)])
    rows = some_examples(base, 3, 1)
    slot = slots(list(stack.modules), "layer")
    theta = random_theta(slot, 2)
    *_, want = dense(base, stack, rows, slot, theta)
    packed = Packed(rows, base)
    where = (packed.batch(np.arange(3)).labels != -100).nonzero()
    z, J = module._linearised(base, stack, theta, slot, packed, np.arange(3), where)
    logits, _ = answer_logits(base, stack, rows, slot)
    assert relative(J, want) < 1e-3
    assert relative(z, logits(theta)) < 1e-5


@pytest.mark.parametrize(("space", "tokens"), [(1, 1), (20_000, 300), (150_000, 80)])
def test_little_memory_changes_nothing(base, stack, data, monkeypatch, space, tokens):
    """J in one piece, against one answer token and one direction at a time, and steps between."""
    slot = slots(list(stack.modules), "layer")
    theta = random_theta(slot, 3)
    whole, fed = normal_equations(base, stack, theta, data[0][0], slot)
    passes, derivative = [], module._derivative
    monkeypatch.setattr(module, "_BYTES", {"cpu": space})
    monkeypatch.setattr(module, "_TOKENS", {"cpu": tokens})
    monkeypatch.setattr(
        module,
        "_derivative",
        lambda *a: (passes.append((len(a[3]), len(a[4].ids), a[4].ids.numel())), derivative(*a))[1],
    )
    pieces, more = normal_equations(base, stack, theta, data[0][0], slot)
    assert relative(pieces.A, whole.A) < 1e-5
    assert relative(pieces.b, whole.b) < 1e-5
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert more >= fed
    assert len(passes) > 2
    assert all(length <= tokens for c, _, length in passes if c > 1)
    if space == 1:
        answers = sum(len(row.answer) for row in data[0][0])
        assert len(passes) == answers * theta.numel()
        assert {c for c, *_ in passes} == {1}


def test_solving_equals_numpy(base, stack, data):
    slot = slots(list(stack.modules), "module")
    theta = random_theta(slot, 3)
    normal, _ = normal_equations(base, stack, theta, data[0][0], slot)
    penalties = (10.0, 0.1, 1e-3)
    A, b, start = normal.A.numpy(), normal.b.numpy(), theta.double().flatten().numpy()
    for penalty, got in zip(penalties, solve(normal, theta, penalties), strict=True):
        want = np.linalg.solve(A + penalty * np.eye(len(A)), A @ start + b)
        assert relative(got.flatten(), torch.from_numpy(want)) < 1e-6
    still = solve(normal, torch.zeros_like(theta), (1e12,))
    assert float(still.abs().max()) < 1e-9


def test_on_a_linear_model_it_is_newton_s_method(base, heads, data):
    """Repeated, it reaches the minimum of mean cross-entropy + λ/2 ‖θ‖² that SciPy finds from the dense features."""
    rows, slot, penalty = data[0][2], [0], 0.02
    theta = torch.zeros(1, 4, dtype=torch.float64)
    *_, J = dense(base, heads, rows, slot, torch.zeros(1, 4))
    logits, labels = answer_logits(base, heads, rows, slot)
    z = logits(torch.zeros(1, 4)).detach().double()

    def objective(value):
        value = torch.tensor(value, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(z + J @ value, labels) + penalty / 2 * value.square().sum()
        loss.backward()
        return loss.item(), value.grad.numpy()

    want = minimize(objective, np.zeros(4), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9}).x
    for _ in range(12):
        theta = solve(normal_equations(base, heads, theta, rows, slot)[0], theta, [penalty])[0]
    assert np.abs(want).max() > 0.02
    np.testing.assert_allclose(theta[0].numpy(), want, rtol=1e-3, atol=1e-4)


def test_the_loss_falls_along_the_step_as_the_gradient_says(base, stack, data):
    """d loss / ds at s = 0 is −b · (θ(λ) − θ₀), below zero, for every λ."""
    rows, slot = data[0][1], slots(list(stack.modules), "module")
    theta = random_theta(slot, 3).double()
    normal, _ = normal_equations(base, stack, theta, rows, slot)
    lengths = torch.tensor([len(row.answer) for row in rows], dtype=torch.float64)

    def loss(at):
        losses = score(base, [rows], shared(stack, at[slot][None].float())).loss[0].double()
        return float((losses * lengths).sum() / lengths.sum())

    for penalty, ahead in zip((10.0, 1.0, 0.1), solve(normal, torch.zeros_like(theta), (10.0, 1.0, 0.1)), strict=True):
        step, s = ahead * (1e-2 / float(ahead.norm())), 1.0
        slope = (loss(theta + s * step) - loss(theta - s * step)) / (2 * s)
        assert slope < 0, penalty
        assert slope == pytest.approx(-float(normal.b @ step.flatten()), rel=0.05)


def test_the_zero_shot_adapter_stays_where_nothing_helps(base, stack, data):
    """Held out: what the base already says, surer than any step leaves it."""
    said = []
    for row in some_examples(base, 5, 5):
        with torch.no_grad():
            best = base.model(input_ids=torch.tensor([row.prompt])).logits[0, -1].argmax().item()
        said.append(Encoded(row.prompt, (best,)))
    worst = [Encoded(row.prompt, ((row.answer[0] + 7) % 50 + 3,)) for row in said]
    (fitted,) = ridge(base, [stack], [worst], [said], seeds=[0], granularity="module", **FEW)
    assert not fitted.coefficients.any()
    assert fitted.adapter.norm() == 0.0
    assert fitted.adapter.info["lengths"] == [0.0]
    assert len(fitted.curves.train) == 1
    ids = some_ids(base)
    assert torch.equal(hook_logits(base, fitted.adapter, ids), base.model(input_ids=ids).logits)
    (tied,) = ridge(base, [stack], data[0][:1], data[1][:1], seeds=[0], penalties=(1e9,), lengths=(1.0,))
    assert float(tied.coefficients.abs().max()) < 1e-7
    assert relative(hook_logits(base, tied.adapter, ids), base.model(input_ids=ids).logits) < 1e-6


@pytest.mark.parametrize("granularity", ["expert", "module"])
def test_every_iteration_takes_the_best_candidate(base, stack, data, granularity):
    """The same by hand, from `normal_equations` and `solve`, each candidate folded and scored by itself."""
    slot, few = slots(list(stack.modules), granularity), FEW | {"lengths": (0.4, 0.2)}
    theta, rows, held = torch.zeros(max(slot) + 1, 3, dtype=torch.float64), data[0][1], data[0][1][:4]
    (fitted,) = ridge(base, [stack], [rows], [held], seeds=[0], granularity=granularity, iterations=2, **few)
    lowest = float(score(base, [held]).loss.mean())
    assert fitted.curves.validation[0] == pytest.approx(lowest, rel=1e-5)
    for i in range(2):
        normal, _ = normal_equations(base, stack, theta, rows, slot)
        assert fitted.curves.train[i] == pytest.approx(normal.loss, rel=1e-5)
        origin, found = theta, (0.0, 0.0)
        for penalty, ahead in zip(few["penalties"], solve(normal, origin, few["penalties"]), strict=True):
            for length in few["lengths"]:
                candidate = origin + length * (ahead - origin)
                adapter = fold(stack, candidate[slot].float(), "c")
                loss = float(score(base, [held], grouped([adapter])).loss.mean())
                if loss < lowest - 1e-6:
                    lowest, theta, found = loss, candidate, (penalty, length)
        assert (fitted.adapter.info["penalties"][i], fitted.adapter.info["lengths"][i]) == found
        assert fitted.curves.validation[i + 1] == pytest.approx(lowest, rel=1e-5)
    assert fitted.adapter.info["lengths"][0] > 0
    torch.testing.assert_close(fitted.coefficients, theta[slot].float(), rtol=1e-3, atol=1e-5)
    assert fitted.coefficients.shape == (len(stack.modules), 3)
    assert fitted.parameters == theta.numel()
    got = score(base, [held], grouped([fitted.adapter])).loss.mean()
    torch.testing.assert_close(got, fitted.curves.best, rtol=1e-5, atol=1e-6)


def test_without_validation_the_penalty_is_cross_validated(base, stack, data):
    """Parts of the training examples held out in turn; the same by hand, and what is chosen solved on all of them."""
    rows = data[0][2]
    (fitted,) = ridge(base, [stack], [rows], None, seeds=[3], granularity="layer", iterations=1, folds=2, **FEW)
    slot = slots(list(stack.modules), "layer")
    zero = torch.zeros(max(slot) + 1, 3)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    options = [(penalty, length) for penalty in FEW["penalties"] for length in FEW["lengths"]]
    total, start = dict.fromkeys(options, 0.0), 0.0
    for part in (order[0::2], order[1::2]):
        normal, _ = normal_equations(base, stack, zero, [rows[i] for i in range(5) if i not in part], slot)
        held = [rows[i] for i in part]
        start += float(score(base, [held]).loss.sum()) / 5
        for penalty, length in options:
            value = length * solve(normal, zero, [penalty])[0]
            total[penalty, length] += (
                float(score(base, [held], shared(stack, value[slot][None].float())).loss.sum()) / 5
            )
    best = min(total, key=total.get)
    assert total[best] < start
    assert (fitted.adapter.info["penalties"], fitted.adapter.info["lengths"]) == ([best[0]], [best[1]])
    want = best[1] * solve(normal_equations(base, stack, zero, rows, slot)[0], zero, [best[0]])[0]
    torch.testing.assert_close(fitted.coefficients, want[slot].float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fitted.curves.validation, torch.tensor([start, total[best]]), rtol=1e-4, atol=1e-5)
    (leave_one_out,) = ridge(base, [stack], [rows], None, seeds=[3], granularity="layer", iterations=1, folds=50, **FEW)
    assert leave_one_out.passes == (5 * 4 + 5) * zero.numel() + 5 * (1 + len(options))


def test_fits_side_by_side_equal_each_alone(base, stack, heads, data):
    other = Stack.of([random_adapter(base, 2, 40 + i, ["q_proj"], name=f"o{i}", size=0.3) for i in range(2)])
    stacks, settings = [stack, heads, other], {"granularity": "module", "iterations": 2, **FEW}
    told = []
    together = ridge(
        base, stacks, *data, seeds=[0, 1, 2], names=["x", "y", "z"], watch=lambda *a: told.append(a), **settings
    )
    for g, fitted in enumerate(together):
        (alone,) = ridge(base, stacks[g : g + 1], data[0][g : g + 1], data[1][g : g + 1], seeds=[g], **settings)
        torch.testing.assert_close(fitted.coefficients, alone.coefficients, rtol=0, atol=0)
        assert torch.equal(fitted.curves.validation, alone.curves.validation)
        assert (fitted.passes, fitted.tokens) == (alone.passes, alone.tokens)
        assert fitted.adapter.name == "xyz"[g]
    assert [step[:2] for step in told] == [(1, 2), (2, 2)]
    assert told[0][2] == pytest.approx(np.mean([float(fitted.curves.train[0]) for fitted in together]), rel=1e-5)
    stopped = ridge(base, stacks, *data, seeds=[0, 1, 2], watch=lambda *_: True, **settings)
    assert all(len(fitted.curves.train) == 1 for fitted in stopped)


def test_every_example_fed_forward_is_counted(base, stack, data, monkeypatch):
    fed, logits = [], Base.logits
    monkeypatch.setattr(Base, "logits", lambda self, batch: (fed.append(len(batch.ids)), logits(self, batch))[1])
    rows, held = [data[0][0][0]] * 3, [data[0][0][0]] * 2
    (fitted,) = ridge(base, [stack], [rows], [held], seeds=[0], granularity="layer", iterations=2, **FEW)
    assert fitted.passes == sum(fed) == 2 * (6 * 3 + 7 * 2)
    assert fitted.tokens == sum(fed) * len(rows[0])


def test_another_start(base, heads, data):
    """The penalty draws to zero from wherever it starts."""
    settings = {"penalties": (1.0,), "lengths": (1.0,), "iterations": 1}
    (fitted,) = ridge(base, [heads], data[0][:1], data[0][:1], seeds=[0], start=0.02, **settings)
    start = torch.full((1, 4), 0.02)
    want = solve(normal_equations(base, heads, start, data[0][0], [0])[0], start, [1.0])[0]
    assert float(fitted.curves.validation[1]) < float(fitted.curves.validation[0])
    torch.testing.assert_close(fitted.coefficients, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "2 stacks and 1 seeds"),
        ({"names": ["x"]}, "2 stacks and 1 names"),
        ({"penalties": (1.0, 0.0)}, "penalties are"),
        ({"penalties": ()}, "penalties are"),
        ({"lengths": (float("nan"),)}, "lengths are"),
        ({"iterations": 0}, "iterations is 0"),
        ({"folds": 1}, "folds 1"),
        ({"granularity": "unit"}, "expert, layer, sublayer, module"),
    ],
)
def test_what_cannot_be_fitted_is_said(base, stack, data, change, message):
    with pytest.raises(MergeError, match=message):
        ridge(base, [stack] * 2, data[0][:2], data[1][:2], **{"seeds": [1, 2]} | change)


def test_too_few_examples_are_said(base, stack, data):
    with pytest.raises(MergeError, match="fit 0 of 1 has 1 training examples and 0"):
        ridge(base, [stack], [data[0][0][:1]], None, seeds=[0])
    with pytest.raises(MergeError, match="fit 0 of 1 has 3 training examples and 0"):
        ridge(base, [stack], data[0][:1], [[]], seeds=[0])


def test_an_operation_without_a_derivative_is_said(stack, data):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    base = tiny_base(spread=2)
    base.model.model.norm.register_forward_hook(lambda layer, args, y: Doubled.apply(y))
    with pytest.raises(BaseError, match="forward-mode derivative"):
        ridge(base, [stack], data[0][:1], data[1][:1], seeds=[0])


def test_an_adapter_without_a_finite_loss_is_said(base, stack, data):
    broken = random_adapter(base, 2, 0, name="broken", size=1e30)
    with pytest.raises(MergeError, match="no finite loss"):
        ridge(base, [Stack.of([broken])], data[0][:1], data[1][:1], seeds=[0], start=1.0)
