"""Frugal fits against each alone, plain autograd on dense weights, plain peft's VeRA, closed forms, and their own counts."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fitting import plain_fit
from helpers import (
    dense_model,
    hook_logits,
    logits_of,
    peft_logits,
    peft_s_own_warnings,
    relative,
    some_examples,
    some_ids,
    tiny_base,
    tiny_gpt2,
    tiny_t5,
)
from workbench.adapt import frugal
from workbench.adapt.fresh import PROJECTIONS, Plan, start_factors
from workbench.adapt.frugal import (
    degrees_of_freedom,
    train_core,
    train_full,
    train_subspace,
    train_vectors,
)
from workbench.adapt.gradient import Schedule, cosine_rate
from workbench.base import Base
from workbench.compose import LowRank, compose, grouped
from workbench.controls import orthonormal
from workbench.errors import AdapterError, MergeError
from workbench.evaluate import score

# label → (fit, options, a learning rate that moves it)
FITS = {
    "subspace": (train_subspace, {"dimension": 30, "plan": Plan(3), "projection": 5}, 5e-2),
    "core": (train_core, {"plan": Plan(4, 0.5), "projection": 6}, 5e-2),
    "core-svd": (train_core, {"plan": Plan(4), "frozen": "svd"}, 5e-2),
    "vectors": (train_vectors, {"plan": Plan(40, 1.5), "projection": 7}, 2e-2),
    "full": (train_full, {}, 1e-3),
}
NARROW = {"q_proj", "down_proj"}


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=2)


@pytest.fixture
def seen(monkeypatch):
    """What a call handed to `fit`: its parameters and its updates."""
    kept, own = {}, frugal.fit

    def fit(base, parameters, updates, *rest, **options):
        kept.update(parameters=parameters, updates=updates)
        return own(base, parameters, updates, *rest, **options)

    monkeypatch.setattr(frugal, "fit", fit)
    return kept


def apart(got, want):
    """‖Δ‖ / ‖want‖."""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("label", FITS)
def test_side_by_side_equals_each_alone(base, label):
    """Training sets of 3, 8 and 11 examples, batches of 5: one fit's batch is its whole set."""
    train_it, options, lr = FITS[label]
    train = [some_examples(base, n, n) for n in (3, 8, 11)]
    validation = [rows[:3] for rows in train]
    names, seeds = ["x", "y", "z"], [7, 8, 9]
    schedule = Schedule(steps=7, lr=lr, batch=5, every=4, clip=0.5)
    before = torch.get_rng_state()
    together, curves = train_it(base, names, train, validation, schedule, seeds=seeds, **options)
    assert torch.equal(before, torch.get_rng_state())
    for g, adapter in enumerate(together):
        own = [it[g : g + 1] for it in (names, train, validation)]
        (alone,), curve = train_it(base, *own, schedule, seeds=seeds[g : g + 1], **options)
        assert adapter.name == alone.name == names[g]
        assert adapter.base == "tiny"
        assert adapter.info == alone.info
        assert list(adapter.modules) == list(alone.modules) == list(base.projections)
        assert alone.norm() > 1e-3
        for module, factors in adapter.modules.items():
            assert apart(factors.delta(), alone.modules[module].delta()) < 1e-3
        torch.testing.assert_close(curves.train[:, g], curve.train[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(curves.validation[:, g], curve.validation[:, 0], rtol=1e-4, atol=1e-5)
        assert curves.best[g] < curves.validation[0, g]
    assert curves.at == (0, 4, 7)
    assert apart(together[0].modules[module].delta(), together[1].modules[module].delta()) > 1e-2


def by_hand(base, rows, schedule, seed, parameters, deltas):
    """Adam's steps on `parameters` under dense weights W + ΔW, torch's own AdamW and clipping."""
    trained = [p.double().requires_grad_() for p in parameters]

    def moved():
        return deltas([p.float() for p in trained])

    losses, norms, _ = plain_fit(
        base, trained, lambda: {m: d.double() for m, d in moved().items()}, rows, schedule, seed
    )
    assert max(norms) > schedule.clip
    with torch.no_grad():
        return {m: delta.detach() for m, delta in moved().items()}, losses


def subspace_by_hand(base, shapes):
    plan, start = Plan(2, 1.5, targets=tuple(NARROW)), start_factors(shapes, [Plan(2)], [11])
    sizes = {m: 2 * (d_out + d_in) for m, (d_out, d_in) in shapes.items()}
    p = orthonormal(sum(sizes.values()), 12, torch.Generator().manual_seed(3))

    def deltas(parameters):
        out, theta = {}, (p @ parameters[0]).split(list(sizes.values()))
        for own, (module, (d_out, d_in)) in zip(theta, shapes.items(), strict=True):
            b, a = own[: 2 * d_out].view(d_out, 2), own[2 * d_out :].view(2, d_in)
            out[module] = 1.5 * b @ (start[module][1][0] + a)
        return out

    return {"dimension": 12, "plan": plan, "projection": 3}, [torch.zeros(12)], deltas


def core_by_hand(base, shapes):
    draw = torch.Generator().manual_seed(4)
    frozen = {m: [orthonormal(d, 3, draw) for d in shape] for m, shape in shapes.items()}

    def deltas(parameters):
        return {m: 0.5 * u @ r @ v.T for (m, (u, v)), r in zip(frozen.items(), parameters, strict=True)}

    plan = Plan(3, 0.5, targets=tuple(NARROW))
    return {"plan": plan, "projection": 4}, [torch.zeros(3, 3) for _ in shapes], deltas


def svd_by_hand(base, shapes):
    frozen = {}
    for module in shapes:
        u, s, v = np.linalg.svd(base.model.get_submodule(module).weight.double().numpy())
        frozen[module] = torch.tensor(u[:, :3] * s[:3]).float(), torch.tensor(v[:3]).float()

    def deltas(parameters):
        return {m: u @ r @ v for (m, (u, v)), r in zip(frozen.items(), parameters, strict=True)}

    return {"plan": Plan(3, 1.0, targets=tuple(NARROW)), "frozen": "svd"}, [torch.zeros(3, 3) for _ in shapes], deltas


def vectors_by_hand(base, shapes):
    draw = torch.Generator().manual_seed(2)
    tall, wide = max(d_out for d_out, _ in shapes.values()), max(d_in for _, d_in in shapes.values())
    a = (2 * torch.rand(5, wide, generator=draw) - 1) * math.sqrt(6 / wide)
    b = (2 * torch.rand(tall, 5, generator=draw) - 1) * math.sqrt(6 / 5)

    def deltas(parameters):
        return {
            m: 1.5 * torch.diag(x) @ b[:d_out] @ torch.diag(d) @ a[:, :d_in]
            for (m, (d_out, d_in)), x, d in zip(shapes.items(), parameters[::2], parameters[1::2], strict=True)
        }

    start = [t for d_out, _ in shapes.values() for t in (torch.zeros(d_out), torch.full((5,), 0.1))]
    return {"plan": Plan(5, 1.5, targets=tuple(NARROW)), "projection": 2}, start, deltas


@pytest.mark.parametrize(
    ("train_it", "hand", "lr"),
    [
        (train_subspace, subspace_by_hand, 5e-2),
        (train_core, core_by_hand, 5e-2),
        (train_core, svd_by_hand, 5e-2),
        (train_vectors, vectors_by_hand, 2e-2),
    ],
)
def test_a_fit_is_its_formula_under_plain_autograd(base, train_it, hand, lr):
    shapes = {m: s for m, s in base.projections.items() if m.rsplit(".", 1)[-1] in NARROW}
    rows, schedule = some_examples(base, 7, 3), Schedule(steps=6, lr=lr, batch=4, clip=0.004)
    options, start, deltas = hand(base, shapes)
    (mine,), curves = train_it(base, ["mine"], [rows], None, schedule, seeds=[11], **options)
    want, losses = by_hand(base, rows, schedule, 11, start, deltas)
    assert list(mine.modules) == list(want)
    for module, delta in want.items():
        assert float(delta.norm()) > 1e-3
        assert relative(mine.modules[module].delta(), delta) < 1e-4
    assert curves.train[:, 0].tolist() == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("targets", [("down_proj",), None])
def test_full_fine_tuning_is_torch_s(base, targets):
    """A copy of the model whose own weights are trained."""
    rows, schedule, seed = some_examples(base, 7, 3), Schedule(steps=5, lr=1e-3, batch=7, clip=0.15), 5
    (mine,), curves = train_full(base, ["mine"], [rows], None, schedule, seeds=[seed], targets=targets)
    model = copy.deepcopy(base.model)
    weights = {m: model.get_submodule(m).weight for m in base.projections if Plan(targets=targets).has(m)}
    assert list(mine.modules) == list(weights)
    for weight in weights.values():
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights.values(), lr=schedule.lr, betas=(0.9, 0.999), weight_decay=0.0)
    width = max(map(len, rows))
    ids, labels = torch.zeros(7, width, dtype=torch.long), torch.full((7, width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor([*row.prompt, *row.answer])
        labels[i, len(row.prompt) : len(row)] = torch.tensor(row.answer)
    norms = []
    for step in range(schedule.steps):
        loss = model(input_ids=ids, labels=labels).loss
        assert loss.item() == pytest.approx(float(curves.train[step, 0]), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), schedule.clip)))
        optimiser.param_groups[0]["lr"] = schedule.lr * cosine_rate(step, schedule)
        optimiser.step()
    assert max(norms) > schedule.clip
    for module, weight in weights.items():
        delta = (weight - base.model.get_submodule(module).weight).detach()
        assert apart(mine.modules[module].delta(), delta) < 1e-3
        assert mine.modules[module].rank == min(base.projections[module])
    dense = dense_model(base, {m: f.delta() for m, f in mine.modules.items()})
    torch.testing.assert_close(logits_of(dense, ids), logits_of(model, ids).detach(), rtol=1e-3, atol=1e-4)


def test_vectors_are_peft_s_vera(base):
    """peft's own model on the same pair, its d and b set to the trained ones, says the same; its start says what the base does."""
    from peft import VeraConfig, get_peft_model

    rows, plan = some_examples(base, 7, 3), Plan(12, 1.0, targets=PROJECTIONS)
    config = VeraConfig(r=12, target_modules=list(PROJECTIONS), projection_prng_key=1, vera_dropout=0.0, d_initial=0.1)
    with peft_s_own_warnings():
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "vera_lambda_b")}
    held = next(iter(layers.values()))
    draw, size = torch.Generator().manual_seed(9), 2 * math.sqrt(6)
    with torch.no_grad():
        for pair, fan in ((held.vera_A, held.vera_A["default"].shape[1]), (held.vera_B, 12)):
            drawn = torch.rand(pair["default"].shape, generator=draw)
            pair["default"].copy_((drawn - 0.5) * size / math.sqrt(fan))
    ids = some_ids(base)
    torch.testing.assert_close(logits_of(model, ids), logits_of(base.model, ids))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == degrees_of_freedom("vectors", base, plan)
    schedule = Schedule(steps=5, lr=2e-2, batch=7, warmup=0.0, clip=None)
    (mine,), curves = train_vectors(base, ["v"], [rows], None, schedule, seeds=[0], plan=plan, projection=9)
    optimiser = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=0.0)
    for step in range(schedule.steps):
        total = torch.zeros(())
        for row in rows:
            logits = model(input_ids=torch.tensor([[*row.prompt, *row.answer]])).logits[0, len(row.prompt) - 1 : -1]
            total = total + cross_entropy(logits, torch.tensor(row.answer), reduction="sum")
        loss = total / sum(len(row.answer) for row in rows)
        assert loss.item() == pytest.approx(float(curves.train[step, 0]), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = schedule.lr * cosine_rate(step, schedule)
        optimiser.step()
    assert set(layers) == set(mine.modules)
    for module, layer in layers.items():
        assert relative(mine.modules[module].delta(), layer.get_delta_weight("default").detach()) < 1e-3


@given(st.integers(1, 30), st.integers(0, 10), st.integers(0, 2**31))
def test_orthonormal_columns(width, more, seed):
    p = orthonormal(width + more, width, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(p.T @ p, torch.eye(width), rtol=0, atol=1e-5)
    if not more:
        torch.testing.assert_close(p @ p.T, torch.eye(width), rtol=0, atol=1e-5)


def test_orthonormal_columns_are_uniform():
    """Each of a column's entries is as often negative as positive (QR alone is not: its first entry is), of variance 1/height."""
    draws = torch.stack([orthonormal(6, 2, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert float(draws.mean(0).abs().max()) < 5 / math.sqrt(6 * 2000)
    torch.testing.assert_close(draws.square().mean(0), torch.full((6, 2), 1 / 6), rtol=0.15, atol=0)


def moved(base, adapter, plan, seed):
    """θ − θ₀ of an adapter from `train_subspace`."""
    start = start_factors({m: base.projections[m] for m in adapter.modules}, [plan], [seed])
    parts = [(f.raw_B.flatten(), (f.A - start[m][1][0]).flatten()) for m, f in adapter.modules.items()]
    return torch.cat([t for pair in parts for t in pair])


def test_the_subspace_is_the_projection_s(base):
    """Adam's first step is ± lr in each coordinate: its length is lr √dimension where columns are orthonormal. It lies in P."""
    plan, rows = Plan(2, targets=("q_proj",)), some_examples(base, 4, 1)
    for dimension in (1, 9, 256):  # 256 are all: P's span is the whole space
        assert degrees_of_freedom("lora", base, plan) == 256
        steps = {}
        for projection, seeds in ((0, [3, 4]), (1, [3, 5])):
            options = {"plan": plan, "dimension": dimension, "projection": projection, "seeds": seeds}
            adapters, _ = train_subspace(base, ["a", "b"], [rows] * 2, None, Schedule(1, 1e-2, warmup=0), **options)
            p = orthonormal(256, dimension, torch.Generator().manual_seed(projection))
            for adapter, seed in zip(adapters, seeds, strict=True):
                step = steps[projection, seed] = moved(base, adapter, plan, seed)
                assert float(step.norm()) == pytest.approx(1e-2 * math.sqrt(dimension), rel=1e-3)
                torch.testing.assert_close(p @ (p.T @ step), step, rtol=0, atol=1e-6)
        inside = p @ (p.T @ steps[0, 3])
        assert (float((inside - steps[0, 3]).abs().max()) < 1e-6) == (dimension == 256)


@pytest.mark.parametrize("label", FITS)
def test_the_adapter_is_what_was_trained(base, seen, label, tmp_path):
    """Its logits are the hooks' at the final parameters, plain peft's once saved, and its validation loss the best."""
    train_it, options, lr = FITS[label]
    rows = [some_examples(base, 6, 2), some_examples(base, 6, 3)]
    schedule = Schedule(steps=8, lr=lr, batch=6, every=3)
    adapters, curves = train_it(base, ["a", "b"], rows, rows, schedule, seeds=[0, 1], **options)
    ids = some_ids(base, rows=2)
    with torch.no_grad(), compose(base.model, seen["updates"]()):
        hooked = logits_of(base.model, ids)
    for g, adapter in enumerate(adapters):
        got = hook_logits(base, adapter, ids[g : g + 1])
        torch.testing.assert_close(got[0], hooked[g], rtol=1e-4, atol=1e-5)
        adapter.save(tmp_path / adapter.name)
        torch.testing.assert_close(
            peft_logits(base, tmp_path / adapter.name, ids[g : g + 1]), got, rtol=1e-4, atol=1e-5
        )
        assert relative(got, logits_of(base.model, ids[g : g + 1])) > 1e-3
        for module, factors in adapter.modules.items():
            assert factors.rank <= min(base.projections[module])
    best = score(base, rows, grouped(adapters)).loss.mean(1)
    torch.testing.assert_close(best, curves.best, rtol=1e-4, atol=1e-5)
    assert (curves.best < 0.99 * curves.validation[0]).all()


@pytest.mark.parametrize("label", FITS)
def test_the_numbers_trained_are_counted(base, seen, label):
    train_it, options, _ = FITS[label]
    rows = some_examples(base, 3, 2)
    adapters, _ = train_it(base, ["a", "b"], [rows] * 2, None, Schedule(steps=1), seeds=[0, 1], **options)
    count = sum(p[0].numel() for p in seen["parameters"])
    sizes = {k: v for k, v in options.items() if k == "dimension"}
    assert [a.info for a in adapters] == [{"parameters": count}] * 2
    assert degrees_of_freedom(label.split("-")[0], base, options.get("plan", Plan()), **sizes) == count


def test_the_numbers_of_a_lora_and_of_coefficients(base):
    plan = Plan(3, targets=("q_proj", "down_proj"))
    start = start_factors({m: s for m, s in base.projections.items() if plan.has(m)}, [plan], [0])
    assert degrees_of_freedom("lora", base, plan) == sum(t.numel() for pair in start.values() for t in pair)
    assert degrees_of_freedom("coefficients", base, plan, adapters=7) == 7 * 4
    assert degrees_of_freedom("coefficients", base) == 10 * 14
    assert degrees_of_freedom("subspace", base) == 280
    assert degrees_of_freedom("core", base) == 14 * 64


def test_layers_that_store_their_weight_transposed(seen):
    """GPT-2's Conv1D: the factors are its weight's own, and ΔW is (d_out, d_in)."""
    base = tiny_gpt2()
    rows, schedule = [some_examples(base, 4, 1)], Schedule(steps=3, lr=3e-2, batch=4)
    ids = some_ids(base, rows=1)
    for train_it, options in ((train_core, {"plan": Plan(5), "frozen": "svd"}), (train_full, {})):
        (adapter,), _ = train_it(base, ["a"], rows, None, schedule, seeds=[0], **options)
        module = "transformer.h.0.attn.c_attn"
        assert adapter.modules[module].delta().shape == (96, 32)
        dense = logits_of(dense_model(base, {m: f.delta() for m, f in adapter.modules.items()}), ids)
        torch.testing.assert_close(hook_logits(base, adapter, ids), dense, rtol=1e-4, atol=1e-4)
        if train_it is train_core:
            u, s, _ = np.linalg.svd(base.model.get_submodule(module).weight.double().numpy().T)
            got = adapter.modules[module].raw_B.double()
            want = torch.tensor(u[:, :5] * s[:5])
            torch.testing.assert_close(got @ got.T, want @ want.T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_update_is_a_linear_layer_of_each_group(dtype):
    draw = torch.Generator().manual_seed(0)
    delta, x, y = (torch.randn(s, generator=draw) for s in ((2, 5, 3), (6, 4, 3), (6, 4, 5)))
    x, y = x.to(dtype), y.to(dtype)
    update = frugal._Whole(delta, torch.eye(3).expand(2, -1, -1))
    got = update.apply(x, y.clone())
    want = torch.stack([y[i] + x[i] @ delta[i // 3].to(dtype).T for i in range(6)])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(LowRank(update.B, update.A).apply(x, y.clone()), want)
    with pytest.raises(RuntimeError):
        update.apply(x[:5], y[:5])


def test_a_frozen_pair_is_shared_and_drawn_by_the_projection(base):
    rows = some_examples(base, 4, 1)
    for train_it, plan in ((train_core, Plan(4)), (train_vectors, Plan(5))):
        first, again, other = (
            train_it(base, ["a"], [rows], None, Schedule(2, 1e-2), seeds=[0], plan=plan, projection=p)[0][0]
            for p in (0, 0, 1)
        )
        assert first.digest() == again.digest()
        for module in first.modules:
            assert relative(first.modules[module].delta(), other.modules[module].delta()) > 0.1


def test_no_steps_change_nothing(base):
    rows = [some_examples(base, 3, 1)]
    for train_it, options, _ in FITS.values():
        (adapter,), _ = train_it(base, ["a"], rows, rows, Schedule(steps=0), seeds=[0], **options)
        assert adapter.norm() == 0
    start = start_factors(base.projections, [Plan(3)], [0])
    (adapter,), _ = train_subspace(base, ["a"], rows, rows, Schedule(steps=0), seeds=[0], plan=Plan(3))
    for module, factors in adapter.modules.items():
        assert torch.equal(factors.A, start[module][1][0])


@pytest.mark.parametrize("train_it", [train_subspace, train_core, train_vectors, train_full])
def test_what_does_not_agree_is_refused(base, train_it):
    rows = [some_examples(base, 3, s) for s in range(2)]
    schedule = Schedule(steps=1)
    for names, train, seeds in (
        (["a"], rows, [0, 1]),
        (["a", "b"], rows[:1], [0, 1]),
        (["a", "b"], rows, [0]),
        ([], [], []),
    ):
        with pytest.raises(MergeError, match=f"one of each per adapter, got {len(names)} names, {len(train)} lists"):
            train_it(base, names, train, None, schedule, seeds=seeds)
    with pytest.raises(MergeError, match="expected 2 fits throughout"):
        train_it(base, ["a", "b"], rows, rows[:1], schedule, seeds=[0, 1])
    nowhere = {"targets": ("wq", "wk")} if train_it is train_full else {"plan": Plan(2, targets=("wq", "wk"))}
    with pytest.raises(
        AdapterError, match=r"odd: the base has no layer named wq or wk; its layers are such as model\.lay"
    ):
        train_it(base, ["odd"], rows[:1], None, schedule, seeds=[0], **nowhere)
    if train_it is not train_full:
        with pytest.raises(AdapterError, match="odd: rank is 0, expected at least 1"):
            train_it(base, ["odd"], rows[:1], None, schedule, seeds=[0], plan=Plan(0))


def test_numbers_out_of_range_are_refused(base):
    rows, schedule = [some_examples(base, 3, 0)], Schedule(steps=1)
    plan = Plan(1, targets=("q_proj",))
    for dimension in (0, -3, 129, 2.5):
        with pytest.raises(MergeError, match=f"dimension is {dimension}, expected from 1 to 128"):
            train_subspace(base, ["a"], rows, None, schedule, seeds=[0], dimension=dimension, plan=plan)
    for frozen in ("random", "svd"):
        with pytest.raises(AdapterError, match=r"a: rank 17 is above the smaller side of .*k_proj, 16×32"):
            train_core(base, ["a"], rows, None, schedule, seeds=[0], plan=Plan(17), frozen=frozen)
    with pytest.raises(MergeError, match="frozen 'gaussian' is unknown; choose random or svd"):
        train_core(base, ["a"], rows, None, schedule, seeds=[0], frozen="gaussian")
    with pytest.raises(MergeError, match="'heads' are unknown; choose one of lora, coefficients, subspace"):
        degrees_of_freedom("heads", base)
    with pytest.raises(AdapterError, match="no layer named wq"):
        degrees_of_freedom("lora", base, Plan(targets=("wq",)))


def test_svd_factors_need_a_weight_of_numbers(base):
    """A layer whose weight is packed bytes, as quantised ones are."""
    packed = Base(copy.deepcopy(base.model), base.tokenizer, "packed")
    layer = packed.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    rows = [some_examples(base, 3, 0)]
    with pytest.raises(AdapterError, match="whose weight cannot be read as numbers; use frozen='random'"):
        train_core(packed, ["a"], rows, None, Schedule(steps=1), seeds=[0], frozen="svd")


@pytest.mark.parametrize("label", ["subspace", "core-svd", "full"])
def test_encoder_decoders(label, tmp_path):
    """T5, whose q is 24×32 and o 32×24: side by side as alone, the best validation loss the adapter's own, in peft too."""
    train_it, options, lr = FITS[label]
    base = tiny_t5()
    rows, ids = [some_examples(base, n, n) for n in (3, 5)], some_ids(base, rows=1)
    validation, schedule = [own[:3] for own in rows], Schedule(steps=6, lr=lr, batch=4, every=2)
    adapters, curves = train_it(base, ["a", "b"], rows, validation, schedule, seeds=[0, 1], **options)
    (alone,), own = train_it(base, ["b"], rows[1:], validation[1:], schedule, seeds=[1], **options)
    torch.testing.assert_close(curves.validation[:, 1], own.validation[:, 0], rtol=1e-4, atol=1e-5)
    assert (curves.best < 0.993 * curves.validation[0]).all()
    torch.testing.assert_close(
        score(base, validation, grouped(adapters)).loss.mean(1), curves.best, rtol=1e-4, atol=1e-5
    )
    assert list(alone.modules) == list(base.projections)
    for module, factors in alone.modules.items():
        assert apart(adapters[1].modules[module].delta(), factors.delta()) < 1e-3
    alone.save(tmp_path / "a")
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "a", ids), hook_logits(base, alone, ids), rtol=1e-4, atol=1e-5
    )
