"""π-tuning: against autograd written out on copies, side by side against alone, and in plain peft."""

import pytest
import torch

from fitting import plain_fit
from helpers import hook_logits, peft_logits, random_adapter, relative, some_examples, some_ids, tiny_base
from workbench.adapt.coefficients import slots
from workbench.adapt.gradient import Schedule
from workbench.adapt.pi_tuning import PI_TUNING, pi_tuning
from workbench.compose import grouped
from workbench.errors import MergeError
from workbench.evaluate import score
from workbench.stack import Stack

SHORT = Schedule(steps=4, lr=3e-3, batch=4, every=2, clip=0.3, warmup=0)


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stacks(base):
    """Unequal ranks and scalings; the second lacks most modules."""
    first = [random_adapter(base, (2, 5)[i], i, name=f"a{i}", size=0.2, alpha=3) for i in range(2)]
    second = [random_adapter(base, 3, 10 + i, ["v_proj", "up_proj"][: i + 1], name=f"b{i}", size=0.2) for i in range(2)]
    return [Stack.of(first), Stack.of(second)]


@pytest.fixture(scope="module")
def data(base):
    return [some_examples(base, n, n) for n in (3, 9)], [some_examples(base, 4, 50 + n) for n in range(2)]


def start_of(base, stack, seed, **settings):
    """The adapter at step 0 and, of each module, c, B, A and owner before any training; the fresh adapter's owner is K."""
    (fitted,) = pi_tuning(base, [stack], [some_examples(base, 2, 0)], None, Schedule(steps=0), seeds=[seed], **settings)
    k = len(stack) + settings.get("fresh", True)
    out = {}
    for module, factors in fitted.adapter.modules.items():
        own = stack.modules.get(module)
        rest = factors.rank - (len(own) if own is not None else 0)
        owner = torch.cat([own.owner if own is not None else torch.zeros(0).long(), torch.full((rest,), len(stack))])
        out[module] = (factors.B.double() * k, factors.A.double(), owner)
    return fitted, out


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_the_start(base, stacks, which, fresh):
    """The adapters as they are under equal weights; the fresh one is in every projection, B = 0 and A of σ 0.01."""
    stack = stacks[which]
    fitted, pieces = start_of(base, stack, 7, fresh=fresh, rank=16)
    k = 2 + fresh
    torch.testing.assert_close(fitted.coefficients, torch.full((len(stack.modules), 2), 1 / k))
    assert set(pieces) == set(base.projections if fresh else stack.modules)
    drawn = []
    for module, (B, A, owner) in pieces.items():
        own = stack.modules.get(module)
        n = 0 if own is None else len(own)
        assert len(owner) == n + 16 * fresh
        if n:
            torch.testing.assert_close(B[:, :n], own.B.double())
            torch.testing.assert_close(A[:n], own.A.double())
        assert not B[:, n:].any()
        drawn.append(A[n:].flatten())
    if fresh:
        values = torch.cat(drawn)
        assert len(values) == 16 * sum(d_in for _, d_in in base.projections.values())
        assert float(values.std()) == pytest.approx(0.01, rel=0.03)
        assert abs(float(values.mean())) < 0.01 * 4 / len(values) ** 0.5
        assert float((values.abs() < 0.01).double().mean()) == pytest.approx(0.6827, abs=0.02)  # normal, not uniform
        again, other = (start_of(base, stack, seed, rank=16)[1] for seed in (7, 8))
        last = next(reversed(pieces))
        assert torch.equal(again[last][1], pieces[last][1])
        assert not torch.equal(other[last][1], pieces[last][1])


@pytest.mark.parametrize(
    ("granularity", "fresh", "which"), [("expert", True, 0), ("module", True, 1), ("layer", False, 1)]
)
def test_steps_follow_autograd_on_copies(base, stacks, data, granularity, fresh, which):
    """θ, all A and all B in float64 under one clipped AdamW, softmax over K + 1."""
    stack, rows, settings = stacks[which], data[0][1], {"granularity": granularity, "fresh": fresh, "rank": 3}
    start, pieces = start_of(base, stack, 4, **settings)
    order = [module for module in base.projections if module in pieces]
    slot = slots(order, granularity)
    theta = torch.zeros(max(slot) + 1, 2 + fresh, dtype=torch.float64).requires_grad_()
    copies = {m: (pieces[m][0].clone().requires_grad_(), pieces[m][1].clone().requires_grad_()) for m in order}

    def weights():
        e = theta.exp()
        return (e / e.sum(1, keepdim=True))[slot]

    def deltas():
        c = weights()
        return {m: (copies[m][0] * c[i][pieces[m][2]]) @ copies[m][1] for i, m in enumerate(order)}

    parameters = [theta, *(tensor for pair in copies.values() for tensor in pair)]
    for steps in (1, 4):
        schedule = Schedule(steps=steps, lr=3e-3, batch=4, clip=0.3, warmup=0)
        with torch.no_grad():
            for p, first in zip(
                parameters, [torch.zeros_like(theta), *(t for m in order for t in pieces[m][:2])], strict=True
            ):
                p.copy_(first)
        (fitted,) = pi_tuning(base, [stack], [rows], None, schedule, seeds=[4], **settings)
        losses, norms, _ = plain_fit(base, parameters, deltas, rows, schedule, 4)
        assert max(norms) > 0.3
        torch.testing.assert_close(fitted.curves.train, torch.tensor(losses), rtol=1e-4, atol=1e-4)
        want, moved = weights().detach().float(), deltas()
        places = [order.index(module) for module in stack.modules]
        torch.testing.assert_close(fitted.coefficients, want[places][:, :2], rtol=0, atol=1e-5)
        assert set(fitted.adapter.modules) == set(order)
        for module, factors in fitted.adapter.modules.items():
            change = moved[module].detach() - start.adapter.modules[module].delta().double()
            got = factors.delta().double() - start.adapter.modules[module].delta().double()
            assert float(change.abs().max()) > 1e-5
            assert float((got - change).abs().max()) < 0.02 * float(change.abs().max())
    if fresh:
        assert all(float(copies[m][0].detach()[:, pieces[m][2] == 2].abs().max()) > 1e-3 for m in order)  # B has left 0


@pytest.mark.parametrize("settings", [{}, {"granularity": "sublayer", "rank": 2}, {"fresh": False}])
def test_fits_side_by_side_equal_each_alone(base, stacks, data, settings):
    together = pi_tuning(base, stacks, *data, SHORT, seeds=[5, 6], names=["x", "y"], **settings)
    for g, fitted in enumerate(together):
        (alone,) = pi_tuning(base, [stacks[g]], [data[0][g]], [data[1][g]], SHORT, seeds=[5 + g], **settings)
        torch.testing.assert_close(fitted.coefficients, alone.coefficients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fitted.curves.train, alone.curves.train, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.curves.validation, alone.curves.validation, rtol=1e-4, atol=1e-5)
        assert (fitted.passes, fitted.tokens, fitted.parameters) == (alone.passes, alone.tokens, alone.parameters)
        assert list(fitted.adapter.modules) == list(alone.adapter.modules)
        for module, factors in fitted.adapter.modules.items():
            assert factors.rank == alone.adapter.modules[module].rank
            torch.testing.assert_close(factors.delta(), alone.adapter.modules[module].delta(), rtol=1e-3, atol=1e-5)
        assert fitted.adapter.name == "xy"[g]
        assert alone.adapter.name == f"pi_tuning-of-{2 + settings.get('fresh', True)}"
        assert float((fitted.curves.validation - fitted.curves.validation[0]).abs().max()) > 1e-3


def test_fits_over_one_stack_train_their_own_copies(base, stacks, data):
    digests = [stacks[0].digest()]
    one, other = pi_tuning(base, [stacks[0]] * 2, *data, SHORT, seeds=[5, 6], rank=2)
    (alone,) = pi_tuning(base, stacks[:1], data[0][1:], data[1][1:], SHORT, seeds=[6], rank=2)
    torch.testing.assert_close(other.coefficients, alone.coefficients, rtol=1e-4, atol=1e-6)
    module = next(iter(one.adapter.modules))
    assert relative(one.adapter.modules[module].A, other.adapter.modules[module].A) > 1e-3
    assert digests == [stacks[0].digest()]  # the stack itself stays as it was


def test_what_comes_back_is_the_best_step_and_runs_in_plain_peft(base, stacks, data, tmp_path):
    rows, checked = data[0][1], data[1][1]
    (fitted,) = pi_tuning(
        base, stacks[1:], [rows], [checked], Schedule(steps=6, lr=5e-3, batch=4, every=2), seeds=[1], rank=4
    )
    got = score(base, [checked], grouped([fitted.adapter])).loss.mean()
    torch.testing.assert_close(got, fitted.curves.best, rtol=1e-5, atol=1e-5)
    assert fitted.curves.best < fitted.curves.validation[0]
    fitted.adapter.save(tmp_path / "a")
    ids = some_ids(base)
    assert relative(peft_logits(base, tmp_path / "a", ids), hook_logits(base, fitted.adapter, ids)) < 1e-5
    assert fitted.passes == 6 * 4 + 4 * 4
    assert fitted.tokens == int(fitted.curves.tokens) + 4 * sum(map(len, checked))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("granularity", ["expert", "module"])
def test_trained_numbers_are_counted(base, stacks, data, fresh, granularity):
    (fitted,) = pi_tuning(
        base, stacks[1:], data[0][1:], None, Schedule(steps=0), seeds=[1], granularity=granularity, fresh=fresh, rank=3
    )
    sizes = {name: sum(base.projections[name]) for name in base.projections}
    own = sum(len(units) * sizes[module] for module, units in stacks[1])
    modules = 14 if fresh else 4
    weights = (2 + fresh) * (1 if granularity == "expert" else modules)
    assert fitted.parameters == weights + own + (3 * sum(sizes.values()) if fresh else 0)


def test_defaults_are_the_study_s():
    assert (PI_TUNING.lr, PI_TUNING.steps, PI_TUNING.batch, PI_TUNING.every) == (1e-4, 100, 8, 10)


def test_what_does_not_go_is_refused(base, stacks, data):
    with pytest.raises(MergeError, match="π-tuning trains the units themselves"):
        pi_tuning(base, stacks, *data, seeds=[0, 1], granularity="unit")
    with pytest.raises(MergeError, match="granularity 'all' is unknown"):
        pi_tuning(base, stacks, *data, seeds=[0, 1], granularity="all")
    with pytest.raises(MergeError, match="2 stacks and 1 seeds"):
        pi_tuning(base, stacks, *data, seeds=[0])
    with pytest.raises(MergeError, match=r"equally many adapters, got \[2, 3\]"):
        pi_tuning(base, [stacks[0].choose([0]), stacks[1]], *data, seeds=[0, 1])
