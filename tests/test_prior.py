"""A new adapter on top of a merge: against `train_fresh`, against dense autograd with torch's own AdamW, and each alone."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from helpers import dense_model, hook_logits, logits_of, random_adapter, relative, some_examples, some_ids, tiny_base
from workbench.adapt.coefficients import ACTIVATIONS, learn_coefficients
from workbench.adapt.fitted import fold
from workbench.adapt.fresh import Plan, start_factors, train_fresh
from workbench.adapt.gradient import Schedule, cosine_rate
from workbench.adapt.prior import PRIOR, _OnTop, prior
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank, grouped, slice_groups
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.evaluate import encode, score
from workbench.stack import Stack

SHORT = Schedule(steps=6, lr=2e-2, batch=4, every=2)
MERGE = {"merge_steps": 5, "merge_lr": 0.2}


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture(scope="module")
def stacks(base):
    """Three stacks of two adapters: unequal ranks and targets; the first also changes embedding and head."""
    embedding = Factors(*draw(32, len(base.tokenizer), 2, 7), embedding=True)
    head = {"lm_head": Factors(*draw(len(base.tokenizer), 32, 2, 8))}
    odd = random_adapter(base, 2, 9, ["q_proj"], name="odd", size=0.2)
    odd = replace(odd, modules=odd.modules | head | {"model.embed_tokens": embedding})
    second = [random_adapter(base, 3, 10 + i, ["v_proj", "up_proj"][: i + 1], name=f"b{i}", size=0.2) for i in range(2)]
    third = [random_adapter(base, 4, 20 + i, alpha=3, rslora=i == 1, name=f"c{i}", size=0.2) for i in range(2)]
    return [Stack.of([odd, random_adapter(base, 5, 1, name="a", size=0.2)]), Stack.of(second), Stack.of(third)]


@pytest.fixture(scope="module")
def data(base):
    return [some_examples(base, n, n) for n in (3, 9, 6)], [some_examples(base, 4, 50 + n) for n in range(3)]


def draw(d_out, d_in, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, rank, generator=generator) * 0.1, torch.randn(rank, d_in, generator=generator) * 0.1


def same_adapter(got, want, exact=False):
    assert list(got.modules) == list(want.modules)
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for module, factors in got.modules.items():
        torch.testing.assert_close(factors.A, want.modules[module].A, **close)
        torch.testing.assert_close(factors.B, want.modules[module].B, **close)
        assert factors.embedding == want.modules[module].embedding


def test_without_a_merge_it_is_a_new_adapter_exactly(base, stacks, data):
    got = prior(base, stacks, *data, SHORT, seeds=[3, 4, 5], merge_steps=0, rank=3, ratio=1.5)
    want, curves = train_fresh(base, ["x"] * 3, *data, SHORT, seeds=[3, 4, 5], plans=[Plan(3, 1.5)] * 3)
    for g in range(3):
        same_adapter(got[g].adapter, want[g], exact=True)
        assert torch.equal(got[g].curves.train, curves.train[:, g])
        assert torch.equal(got[g].curves.validation, curves.validation[:, g])
        assert not got[g].coefficients.any()
        assert got[g].coefficients.shape == (len(stacks[g].modules), 2)
        assert (got[g].passes, got[g].tokens) == curves.spent(g, data[0][g], data[1][g], SHORT.batch)
        assert got[g].parameters == sum(f.A.numel() + f.B.numel() for f in want[g].modules.values())
    assert (PRIOR.steps, PRIOR.lr) == (400, 3e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_fits_side_by_side_equal_each_alone(base, stacks, data, joint):
    settings = MERGE | {"joint": joint, "rank": 2}
    together = prior(base, stacks, *data, SHORT, seeds=[5, 6, 7], names=["x", "y", "z"], **settings)
    for g, fitted in enumerate(together):
        alone = prior(
            base,
            stacks[g : g + 1],
            data[0][g : g + 1],
            data[1][g : g + 1],
            SHORT,
            seeds=[5 + g],
            names=["xyz"[g]],
            **settings,
        )[0]
        same_adapter(fitted.adapter, alone.adapter)
        torch.testing.assert_close(fitted.coefficients, alone.coefficients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.curves.train, alone.curves.train, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.curves.validation, alone.curves.validation, rtol=1e-4, atol=1e-5)
        assert (fitted.passes, fitted.tokens, fitted.curves.at) == (alone.passes, alone.tokens, alone.curves.at)
        assert fitted.parameters == alone.parameters
        assert fitted.adapter.name == "xyz"[g]


@pytest.mark.parametrize("joint", [False, True])
def test_the_adapter_is_the_merge_and_the_new_units_behind_it(base, stacks, data, joint):
    """Its logits are those of Σ c ΔW + B A added to the weights, its loss the one that was kept."""
    train, validation = data[0], [rows[:3] for rows in data[0]]
    fits = prior(base, stacks, train, validation, SHORT, seeds=[1, 2, 3], joint=joint, fallback=False, rank=3, **MERGE)
    losses = score(base, validation, grouped([fitted.adapter for fitted in fits])).loss.mean(1)
    for g, (stack, fitted) in enumerate(zip(stacks, fits, strict=True)):
        merged = fold(stack, fitted.coefficients, "")
        assert float(fitted.coefficients.abs().max()) > 0.05
        deltas = {}
        for module, factors in fitted.adapter.modules.items():
            new = factors.B[:, -3:] @ factors.A[-3:] if module in base.projections else 0.0
            deltas[module] = (merged.modules[module].delta() if module in merged.modules else 0.0) + new
        deltas = {m: d.T if m == "model.embed_tokens" else d for m, d in deltas.items()}
        ids = some_ids(base)
        want = logits_of(dense_tied(base, deltas), ids)
        assert relative(hook_logits(base, fitted.adapter, ids), want) < 1e-4
        torch.testing.assert_close(losses[g], fitted.curves.best, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fitted.curves.best, fitted.curves.validation[-4:].min(), rtol=0, atol=0)
        assert set(fitted.adapter.modules) == set(base.projections) | set(stack.modules)
    assert fits[0].adapter.modules["model.embed_tokens"].embedding


def dense_tied(base, deltas):
    """`dense_model` whose embedding and head no longer share a weight."""
    import copy

    model = copy.deepcopy(base.model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for module, delta in deltas.items():
            layers[module].weight = torch.nn.Parameter(layers[module].weight + delta, requires_grad=False)
    return model


def test_the_merge_alone_stays_where_more_does_not_help(base, stacks, data):
    """A second stage in giant steps: what comes out is the learned coefficients' adapter."""
    wild = replace(SHORT, lr=1e4, warmup=0)
    fits = prior(base, stacks, *data, wild, seeds=[1, 2, 3], fallback=False, **MERGE)
    first = learn_coefficients(base, stacks, *data, replace(wild, steps=5, lr=0.2), seeds=[1, 2, 3])
    for fitted, merged in zip(fits, first, strict=True):
        assert torch.equal(fitted.coefficients, merged.coefficients)
        assert fitted.curves.best == fitted.curves.validation[len(merged.curves.at)]
        for module, factors in fitted.adapter.modules.items():
            if module in merged.adapter.modules:
                torch.testing.assert_close(
                    factors.delta(), merged.adapter.modules[module].delta(), rtol=1e-5, atol=1e-6
                )
            else:
                assert not factors.delta().any()
        assert fitted.curves.at == (0, 2, 4, 5, 5, 7, 9, 11)
        assert torch.equal(fitted.curves.train[:5], merged.curves.train)
        assert len(fitted.curves.train) == 11
        assert not float(fitted.curves.validation[-1]) <= float(fitted.curves.best) + 0.01  # NaN, where steps overflow


def test_joint_training_equals_a_plain_loop(base, stacks, data):
    """ΔW added to the weights, autograd through it, torch's AdamW with two rates, one clipping for both."""
    stack, rows = stacks[2], data[0][2][:4]
    schedule = Schedule(steps=5, lr=1e-2, batch=4, clip=0.5)
    settings = {
        "seeds": [4],
        "joint": True,
        "merge_steps": 0,
        "merge_lr": 0.3,
        "fallback": False,
        "rank": 2,
        "ratio": 3.0,
    }
    (fitted,) = prior(base, [stack], [rows], None, schedule, **settings)
    theta = torch.zeros(len(stack.modules), 2, requires_grad=True)
    factors = {
        m: [t[0].requires_grad_() for t in pair] for m, pair in start_factors(base.projections, [Plan(2)], [4]).items()
    }
    new = [tensor for pair in factors.values() for tensor in pair]
    optimiser = torch.optim.AdamW([{"params": [theta], "rate": 30.0}, {"params": new, "rate": 1.0}], weight_decay=0.0)
    norms = []
    for step in range(schedule.steps):
        value, weights = ACTIVATIONS["leaky_relu"](theta), {}
        for i, (module, units) in enumerate(stack):
            b, a = factors[module]
            merged = sum(value[i, n] * units.of(n).delta() for n in range(2))
            weights[f"{module}.weight"] = base.model.get_submodule(module).weight + merged + 3.0 * b @ a
        loss, count = 0.0, sum(len(row.answer) for row in rows)
        for row in rows:
            ids = torch.tensor([row.prompt + row.answer])
            logits = functional_call(base.model, weights, kwargs={"input_ids": ids}).logits
            start = len(row.prompt) - 1
            loss = loss + cross_entropy(logits[0, start:-1], ids[0, start + 1 :], reduction="sum") / count
        torch.testing.assert_close(fitted.curves.train[step], loss.detach(), rtol=1e-4, atol=1e-5)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([theta, *new], 0.5)))
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * cosine_rate(step, schedule) * group["rate"]
        optimiser.step()
    assert max(norms) > 0.5
    torch.testing.assert_close(fitted.coefficients, ACTIVATIONS["leaky_relu"](theta).detach(), rtol=2e-3, atol=1e-4)
    for module, (b, a) in factors.items():
        got = fitted.adapter.modules[module]
        torch.testing.assert_close(got.B[:, -2:] @ got.A[-2:], (3.0 * b @ a).detach(), rtol=2e-3, atol=2e-5)


def test_joint_training_goes_on_from_what_the_merge_learned(base, stacks, data):
    """Negative coefficients come through the leaky ReLU and back; no step taken, nothing changes."""
    first = learn_coefficients(base, stacks, data[0], None, replace(SHORT, steps=5, lr=0.2), seeds=[1, 2, 3])
    fits = prior(
        base, stacks, data[0], None, replace(SHORT, steps=0), seeds=[1, 2, 3], joint=True, fallback=False, **MERGE
    )
    for merged, fitted in zip(first, fits, strict=True):
        assert float(merged.coefficients.min()) < 0
        torch.testing.assert_close(fitted.coefficients, merged.coefficients, rtol=1e-5, atol=1e-7)


def solved_by(base, adapter, n, seed):
    """Examples whose answer is what the base says under an adapter."""
    from workbench.evaluate import Encoded

    model, out = dense_model(base, {m: f.delta() for m, f in adapter.modules.items()}), []
    for row in some_examples(base, n, seed):
        with torch.no_grad():
            out.append(
                Encoded(row.prompt, (model(input_ids=torch.tensor([row.prompt])).logits[0, -1].argmax().item(),))
            )
    return out


def test_the_fallback_keeps_the_better_of_both(base, stacks):
    """Of these two fits the one is better off without the merge, the other with it."""
    strong = random_adapter(base, 4, 30, name="solver", size=0.2)
    stack = Stack.of([strong, random_adapter(base, 4, 31, name="other", size=0.2)])
    said = [solved_by(base, strong, n, n) for n in (6, 8)]
    fixed = [[encode(base, word, "zz") for word in "abcdef"], [encode(base, word, "zz") for word in "ghijklmn"]]
    train, validation = [said[0], fixed[0]], [said[1], fixed[1]]
    settings = {"merge_steps": 20, "merge_lr": 0.1, "seeds": [1, 2], "rank": 2}
    held = [stack, stack]
    kept = prior(base, held, train, validation, SHORT, **settings)
    above = prior(base, held, train, validation, SHORT, fallback=False, **settings)
    alone, curves = train_fresh(base, ["x", "y"], train, validation, SHORT, seeds=[1, 2], plans=[Plan(2)] * 2)
    assert float(above[0].curves.best) > float(curves.best[0]) + 1e-2
    assert float(above[1].curves.best) < float(curves.best[1]) - 1e-2
    same_adapter(kept[0].adapter, alone[0], exact=True)
    same_adapter(kept[1].adapter, above[1].adapter, exact=True)
    assert not kept[0].coefficients.any()
    assert torch.equal(kept[1].coefficients, above[1].coefficients)
    assert float(kept[1].coefficients.abs().max()) > 0.05
    assert torch.equal(kept[0].curves.validation, curves.validation[:, 0])
    assert kept[1].parameters == kept[0].parameters + 14 * 2
    for g in range(2):
        spent = curves.spent(g, train[g], validation[g], SHORT.batch)
        assert (kept[g].passes, kept[g].tokens) == (above[g].passes + spent[0], above[g].tokens + spent[1])


def test_every_example_fed_forward_is_counted(base, stacks, data, monkeypatch):
    fed, logits = [], Base.logits
    monkeypatch.setattr(Base, "logits", lambda self, batch: (fed.append(len(batch.ids)), logits(self, batch))[1])
    (fitted,) = prior(base, stacks[1:2], data[0][1:2], data[1][1:2], SHORT, seeds=[0], **MERGE)
    assert fitted.passes == sum(fed) == (5 + 6 + 6) * 4 + (4 + 4 + 4) * 4
    one = [row for row in data[0][1] if len(row) == len(data[0][1][0])][:1]
    (same,) = prior(base, stacks[1:2], [one], [one], SHORT, seeds=[0], **MERGE)
    assert same.tokens == same.passes * len(one[0])


def test_the_watcher_sees_all_stages_as_one_and_can_end_them(base, stacks, data):
    said = []

    def watch(step, steps, loss):
        said.append((step, steps))
        assert loss > 0
        return step == 7

    fitted = prior(base, stacks, *data, SHORT, seeds=[1, 2, 3], watch=watch, **MERGE)
    assert said == [(step, 17) for step in range(1, 8)]
    assert all(len(one.curves.train) == 7 for one in fitted if one.coefficients.any())
    said.clear()
    (whole,) = prior(
        base,
        stacks[:1],
        data[0][:1],
        None,
        SHORT,
        seeds=[1],
        fallback=False,
        watch=lambda *a: said.append(a[:2]),
        **MERGE,
    )
    assert said == [(step, 11) for step in range(1, 12)]
    assert len(whole.curves.train) == 11
    stopped = prior(
        base, stacks[:1], data[0][:1], data[1][:1], SHORT, seeds=[1], fallback=False, watch=lambda *_: True, **MERGE
    )
    assert len(stopped[0].curves.train) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": [1, 2]}, MergeError, "3 stacks, 3 lists of examples, 2 seeds"),
        ({"names": ["x"]}, MergeError, "and 1 names"),
        ({"rank": 0}, AdapterError, "rank is 0"),
        ({"merge_steps": -1}, MergeError, "merge_steps is -1"),
        ({"merge_lr": 0.0}, MergeError, "merge_lr 0.0"),
        ({"validation": None}, MergeError, "fallback=False"),
        ({"schedule": replace(SHORT, lr=0.0)}, MergeError, "lr is 0.0"),
    ],
)
def test_what_cannot_be_fitted_is_said(base, stacks, data, change, error, message):
    given = {"validation": data[1], "schedule": SHORT, "seeds": [1, 2, 3]} | change
    with pytest.raises(error, match=message):
        prior(base, stacks, data[0], given.pop("validation"), given.pop("schedule"), **given)


def test_adapters_of_another_base_are_refused(base, data):
    stranger = Stack.of([Adapter("s", {"model.layers.9.mlp.up_proj": Factors(*draw(48, 32, 2, 1))})])
    with pytest.raises(BaseError, match="not in this base"):
        prior(base, [stranger], data[0][:1], data[1][:1], SHORT, seeds=[1])


@pytest.mark.parametrize("gradients", [False, True])
def test_one_update_on_top_of_another_is_their_units_together(gradients):
    """Also moved, and cut to some of the groups."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own, lower, c = (draw(4, 5, 2), draw(4, 2, 6)), (draw(4, 5, 3), draw(4, 3, 6)), draw(4, 3)
    update = _OnTop(*own, b=lower[0], a=lower[1], w=c)
    ones = torch.cat([c, torch.ones(4, 2, dtype=torch.float64)], 1)
    both = LowRank(torch.cat([lower[0], own[0]], 2), torch.cat([lower[1], own[1]], 1), ones)
    x, y = draw(8, 3, 6), draw(8, 3, 5)
    part = slice_groups({"m": update}, 1, 3, 4)["m"]
    with torch.set_grad_enabled(gradients):
        want = both.apply(x, y.clone())
        torch.testing.assert_close(update.to("cpu").apply(x, y.clone()), want)
        torch.testing.assert_close(part.apply(x[2:6], y[2:6].clone()), want[2:6])
    assert update.groups == 4
