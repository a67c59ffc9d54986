"""Arrow: prototypes against dense SVD, routing against plain loops and peft's own, fits side by side against alone."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch

from helpers import (
    hook_count,
    logits_of,
    peft_model,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_examples,
    some_ids,
    three_splits,
    three_stacks,
    tiny_base,
    tiny_t5,
)
from test_compose import double, routed_by_hand, some_prototypes
from workbench.adapt.arrow import ARROW, Router, arrow, mean_weights, prototypes, routed
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import compose, shared, slice_groups
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.evaluate import score
from workbench.stack import Stack

SHORT = Schedule(steps=6, lr=0.1, batch=4, every=2)
UP0, DOWN1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def stacks(base):
    return three_stacks(base)


@pytest.fixture(scope="module")
def data(base):
    return three_splits(base)


def run(base, updates, ids):
    with torch.no_grad(), compose(base.model, updates):
        return base.model(input_ids=ids).logits


def test_prototypes_are_the_top_right_singular_vectors(stacks):
    wide = random_adapter({"m": (5, 4)}, 6, 30, name="wide")  # a rank above both sides
    for stack in (*stacks, Stack.of([wide, random_adapter({"m": (5, 4)}, 1, 31, name="thin")])):
        found = prototypes(stack)
        assert list(found) == list(stack.modules)
        for module, units in stack:
            assert found[module].shape == (len(stack), units.shape[1])
            assert found[module].dtype == torch.float32
            for i, v in enumerate(found[module]):
                if not len(units.of(i)):
                    assert not v.any()
                    continue
                _, s, vh = torch.linalg.svd(units.of(i).delta().double())
                assert s[0] > 1.01 * s[1]
                assert float((v.double() @ vh[0]).abs()) == pytest.approx(1, abs=1e-4)
                assert float(v.norm()) == pytest.approx(1, abs=1e-5)


def test_what_changes_nothing_has_no_direction():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=generator), torch.randn(6, 3, generator=generator)
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    dead = {
        "new": Factors(torch.zeros(6, 3), a),
        "gone": Factors(b, torch.zeros(3, 7)),
        "cancels": Factors(b[:, [0, 0]] * torch.tensor([1.0, -1.0]), a[[0, 0]]),
        "apart": Factors(b @ q * torch.tensor([1.0, 1.0, 0.0]), q.T @ a * torch.tensor([0.0, 0.0, 1.0])[:, None]),
        "tiny": Factors(b * 1e-9, a * 1e-6),
        "faint": Factors(b[:, [0, 0]] * torch.tensor([1.0, -1.0]), a[[0, 0]] * torch.tensor([1.0, 1.001])[:, None]),
        "live": Factors(b, a),
    }
    stack = Stack.of([Adapter(name, {"m": factors}) for name, factors in dead.items()])
    p = prototypes(stack)["m"]
    assert p.ne(0).any(1).tolist() == [False] * 4 + [True] * 3
    torch.testing.assert_close(p[4].abs(), p[6].abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p[5].abs(), a[0].abs() / a[0].norm(), rtol=1e-3, atol=1e-3)
    weights = Router("r", stack, {"m": p}, top=7).updates()["m"].weights(torch.randn(5, 7, generator=generator))
    assert not weights[:, :4].any()
    assert (weights[:, 4:] > 0.01).all()


def test_a_router_is_arrow_by_hand(base, stacks):
    ids = some_ids(base, 3, 7)
    for stack in stacks:
        router = Router("r", stack, prototypes(stack), top=2, temperature=0.3)
        with torch.no_grad(), routed_by_hand((wide := double(base)).model, stack, router.prototypes, 2, 0.3):
            want = wide.model(input_ids=ids).logits
        assert relative(run(base, router.updates(), ids), want) < 1e-4
        flipped = replace(router, prototypes={m: -p for m, p in router.prototypes.items()})
        assert torch.equal(run(base, flipped.updates(), ids), run(base, router.updates(), ids))


@pytest.mark.parametrize(("top", "temperature"), [(1, 1.0), (2, 0.5), (4, 1.0)])
def test_peft_s_own_arrow(base, tmp_path, top, temperature):
    """peft asks for one rank and the same targets, and finds v by 15 power iterations: here σ₂ ≪ σ₁."""
    from peft import create_arrow_model
    from peft.tuners.lora import ArrowConfig

    for i, alpha in enumerate((2, 6, 3, 9)):
        model = peft_model(base, i, r=3, lora_alpha=alpha, target_modules=["q_proj", "down_proj", "up_proj"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_A" in name:
                    p[0] *= 12
        model.save_pretrained(tmp_path / f"a{i}")
    folders = [str(tmp_path / f"a{i}") for i in range(4)]
    config = ArrowConfig(top_k=top, router_temperature=temperature, rng_seed=0)
    with peft_s_own_warnings():
        theirs = create_arrow_model(copy.deepcopy(base.model), folders, config).eval()
    ids = some_ids(base, 3, 9)
    want = logits_of(theirs, ids)
    stack = Stack.of([Adapter.load(folder) for folder in folders])
    router = Router("r", stack, prototypes(stack), top, temperature)
    got = run(base, router.updates(), ids)
    assert relative(got, want) < 1e-3
    assert relative(run(base, shared(stack, torch.full((1, 4), 0.25)), ids), want) > 1e-2
    v = theirs.base_model.model.model.layers[0].mlp.up_proj.lora_arrow["arrow_router"].prototypes
    torch.testing.assert_close(v.abs(), router.prototypes[UP0].abs(), rtol=1e-3, atol=1e-4)


def test_routers_side_by_side_equal_each_alone(base, stacks):
    """Stacks of 3, 3 and 2 adapters with unequal units; groups cut apart equal the whole."""
    few = [*stacks[:2], stacks[2].choose([1, 2])]
    routers = [Router(f"r{g}", stack, prototypes(stack), 2, 0.2) for g, stack in enumerate(few)]
    ids = some_ids(base, 6, 8)
    updates = routed(routers)
    whole = run(base, updates, ids)
    for g, router in enumerate(routers):
        rows = slice(2 * g, 2 * g + 2)
        assert relative(whole[rows], run(base, router.updates(), ids[rows])) < 1e-5
        assert relative(run(base, slice_groups(updates, g, g + 1, 3), ids[rows]), whole[rows]) < 1e-5
        assert relative(run(base, routed([router]), ids[rows]), whole[rows]) < 1e-5
    weights = updates[DOWN1].weights(torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0)))
    assert not weights[1].any()  # the second stack has no such module
    assert weights[2, :, :2].any()
    assert not weights[2, :, 2].any()  # nor the third one a third adapter


def test_scores_of_routers(base, stacks, data):
    """Many groups in small batches, against each router's own."""
    routers = [Router(f"r{g}", stack, prototypes(stack), 2, 0.2) for g, stack in enumerate(stacks)]
    validation = data[1]
    together = score(base, validation, routed(routers), max_tokens=30)
    for g, router in enumerate(routers):
        alone = score(base, validation[g : g + 1], router.updates(base.device))
        torch.testing.assert_close(together.loss[g], alone.loss[0], rtol=1e-4, atol=1e-5)
        assert float((alone.loss - score(base, validation[g : g + 1]).loss).abs().max()) > 1e-3
    assert hook_count(base.model) == 0


def by_hand_means(base, router, rows):
    """Mean weights over tokens: example by example, through the loops."""
    seen, model = {}, double(base).model
    with routed_by_hand(model, router.stack, router.prototypes, router.top, router.temperature, seen), torch.no_grad():
        for row in rows:
            if model.config.is_encoder_decoder:
                start = (model.config.decoder_start_token_id, *row.answer[:-1])
                model(input_ids=torch.tensor([row.prompt]), decoder_input_ids=torch.tensor([start]))
            else:
                model(input_ids=torch.tensor([row.prompt + row.answer]))
    return torch.stack([torch.tensor(seen[module]).mean(0) for module in router.stack.modules])


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_mean_weights_over_all_tokens(base, kind):
    """Examples of unequal lengths, in one batch or in many; the head and the embedding too."""
    base = base if kind == "causal" else tiny_t5()
    every = base.layers if kind == "causal" else base.shapes
    adapters = [random_adapter(every, 2, i, name=f"a{i}", size=0.2) for i in range(2)]
    stack = Stack.of([*adapters, random_adapter(every, 2, 7, ["q_proj", "q"], name="a2")])
    router = Router("r", stack, prototypes(stack), 2, 0.2)
    rows = some_examples(base, 5, 3)
    assert len({len(row) for row in rows}) > 2
    want = by_hand_means(base, router, rows)
    assert float(want.std(0).max()) > 0.01
    for limit in (None, 40):
        got = mean_weights(base, router, rows, max_tokens=limit)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got)))
    assert hook_count(base.model) == 0


def test_fixed_prototypes_are_not_fitted(base, stacks, data):
    rows = [data[0][0], data[0][1], []]
    fits = arrow(base, [stacks[0], stacks[1], stacks[0]], rows, None, seeds=[0, 1, 2], top=2, names=["x", "y", "z"])
    for fitted, stack, own in zip(fits, (stacks[0], stacks[1], stacks[0]), rows, strict=True):
        router = fitted.adapter
        assert (fitted.curves, fitted.passes, fitted.tokens, fitted.parameters) == (None, 0, 0, 0)
        assert (router.top, router.temperature, router.stack) == (2, 1.0, stack)
        for module, p in prototypes(stack).items():
            assert torch.equal(router.prototypes[module], p)
        assert fitted.coefficients.shape == (len(stack.modules), 3)
        if own:
            torch.testing.assert_close(fitted.coefficients, by_hand_means(base, router, own), rtol=1e-4, atol=1e-5)
    assert not fits[2].coefficients.any()
    assert [fitted.adapter.name for fitted in fits] == ["x", "y", "z"]
    (one,) = arrow(base, stacks[:1], data[0][:1], None, seeds=[0])
    assert (one.adapter.name, one.adapter.top) == ("arrow-of-3", 4)


def test_trained_prototypes_side_by_side_equal_each_alone(base, stacks, data):
    settings = {"trained": True, "top": 2, "temperature": 0.5}
    together = arrow(base, stacks, *data, SHORT, seeds=[5, 6, 7], names=["x", "y", "z"], **settings)
    for g, fitted in enumerate(together):
        start = prototypes(stacks[g])
        (alone,) = arrow(base, [stacks[g]], [data[0][g]], [data[1][g]], SHORT, seeds=[5 + g], **settings)
        torch.testing.assert_close(fitted.curves.train, alone.curves.train, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted.curves.validation, alone.curves.validation, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted.coefficients, alone.coefficients, rtol=1e-3, atol=1e-3)
        assert (fitted.passes, fitted.tokens, fitted.parameters) == (alone.passes, alone.tokens, alone.parameters)
        assert fitted.passes == 6 * min(4, len(data[0][g])) + 4 * 4
        assert fitted.parameters == sum(
            int((stacks[g].modules[m].ranks(3) > 0).sum()) * p.shape[1] for m, p in start.items()
        )
        assert list(fitted.adapter.prototypes) == list(stacks[g].modules)
        moved = 0.0
        for module, p in fitted.adapter.prototypes.items():
            assert not p.requires_grad
            absent = stacks[g].modules[module].ranks(3) == 0
            assert not p[absent].any()
            torch.testing.assert_close(p, alone.adapter.prototypes[module], rtol=1e-2, atol=1e-3)
            moved = max(moved, float((p - start[module]).abs().max()))
        restored = score(base, [data[1][g]], fitted.adapter.updates(base.device)).loss.mean()
        torch.testing.assert_close(restored, fitted.curves.best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.curves.best, fitted.curves.validation.min(), rtol=0, atol=0)
        assert (moved > 0.01) == (float(fitted.curves.best) < float(fitted.curves.validation[0]))
    assert any(float(f.curves.best) < float(f.curves.validation[0]) for f in together)


def test_training_lowers_the_loss_and_starts_at_the_fixed_router(base, stacks, data):
    train = [data[0][0]]
    settings = {"seeds": [0], "top": 2, "temperature": 0.1}
    (fixed,) = arrow(base, stacks[:1], train, None, **settings)
    (still,) = arrow(base, stacks[:1], train, train, replace(ARROW, steps=0), trained=True, **settings)
    assert all(torch.equal(p, fixed.adapter.prototypes[m]) for m, p in still.adapter.prototypes.items())
    before = score(base, train, fixed.adapter.updates()).loss.mean()
    torch.testing.assert_close(still.curves.validation[0], before, rtol=1e-5, atol=1e-6)
    (moved,) = arrow(base, stacks[:1], train, None, replace(ARROW, steps=20), trained=True, **settings)
    assert float(score(base, train, moved.adapter.updates()).loss.mean()) < float(before) - 0.01
    steps = []
    arrow(
        base,
        stacks[:1],
        train,
        None,
        SHORT,
        trained=True,
        watch=lambda *told: steps.append(told) or len(steps) == 2,
        **settings,
    )
    assert [step[:2] for step in steps] == [(1, 6), (2, 6)]


def test_a_bf16_base_trains_fp32_prototypes(base, stacks, data):
    half = Base(copy.deepcopy(base.model).bfloat16(), base.tokenizer, "half")
    (fitted,) = arrow(
        half, stacks[:1], data[0][:1], data[1][:1], replace(SHORT, lr=1e-3), seeds=[0], trained=True, top=2
    )
    (want,) = arrow(base, stacks[:1], data[0][:1], data[1][:1], replace(SHORT, lr=1e-3), seeds=[0], trained=True, top=2)
    assert all(p.dtype == torch.float32 for p in fitted.adapter.prototypes.values())
    torch.testing.assert_close(fitted.curves.train, want.curves.train, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(fitted.coefficients, want.coefficients, rtol=0, atol=0.1)


def test_a_routed_model_is_no_adapter(base, stacks, tmp_path):
    router = Router("mine", replace(stacks[0], base="tiny"), prototypes(stacks[0]))
    for call in (router.save, router.push):
        with pytest.raises(AdapterError, match=r"mine routes each token among 3 adapters .* no adapter to save"):
            call(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
    assert router.base == "tiny"
    assert replace(router, info={"method": "arrow"}).info == {"method": "arrow"}


def test_what_cannot_be_routed_is_refused(base, stacks, data):
    one = {"seeds": [0]}
    for wrong, message in (
        ({"top": 0}, "top is 0, expected a whole number"),
        ({"top": 2.0}, r"top is 2\.0, expected a whole number"),
        ({"temperature": 0.0}, r"temperature is 0\.0, expected a number above 0"),
        ({"seeds": [0, 1]}, "1 stacks, 1 lists of examples, 2 seeds and 1 names"),
        ({"names": ["a", "b"]}, "1 seeds and 2 names"),
    ):
        with pytest.raises(MergeError, match=message):
            arrow(base, stacks[:1], data[0][:1], None, **one | wrong)
    unequal = [stacks[0], stacks[1].choose([0, 1])]
    with pytest.raises(MergeError, match="equally many adapters"):
        arrow(base, unequal, data[0][:2], None, seeds=[0, 1])
    far = Stack.of([random_adapter({"model.layers.9.q": (32, 32)}, name="far")])
    with pytest.raises(BaseError, match=r"such as 'model\.layers\.9\.q'"):
        arrow(base, [far], data[0][:1], None, **one)
    odd = Stack.of([random_adapter({UP0: (64, 31)}, 2, name="odd")])
    with pytest.raises(AdapterError, match=rf"odd: {UP0} is 64×31, the base's is 64×32"):
        arrow(base, [odd], data[0][:1], None, **one)
    routers = [Router(f"r{g}", stack, prototypes(stack)) for g, stack in enumerate((stacks[1], odd))]
    with pytest.raises(AdapterError, match=rf"r1: {UP0} is 64×31, but 64×32 in r0"):
        routed(routers)
    with pytest.raises(MergeError, match=r"one top and one temperature, got \[\(2, 1\.0\), \(4, 1\.0\)\]"):
        routed([routers[0], replace(routers[0], top=2)])
    for prototype in ({}, prototypes(odd), some_prototypes(stacks[0]) | {"m": torch.zeros(3, 2)}):
        with pytest.raises(MergeError, match=r"here: expected prototypes .* in .*, got "):
            Router("here", stacks[0], prototype)
    with pytest.raises(MergeError, match="temperature is -1"):
        Router("here", stacks[0], some_prototypes(stacks[0]), temperature=-1)


def test_what_the_module_offers():
    module = importlib.import_module("workbench.adapt.arrow")
    assert module.__all__ == ["ARROW", "Router", "arrow", "mean_weights", "prototypes", "routed"]
    assert (ARROW.steps, ARROW.lr, ARROW.batch, ARROW.every) == (100, 1e-2, 8, 10)
