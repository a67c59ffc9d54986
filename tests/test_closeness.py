"""Closeness to a target against dense fp64 algebra, hand-made numbers and its invariances; the greedy order of `diversify`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import random_adapter
from workbench import closeness as module
from workbench.adapters import Adapter, Factors
from workbench.closeness import MEASURES, check_target, closeness, diversify
from workbench.errors import SelectionError
from workbench.stack import Stack

SHAPES = {"0.q": (6, 5), "0.v": (4, 5), "0.up": (9, 5), "1.q": (6, 5), "1.v": (4, 5)}
EVERY = [(how, mean) for how in MEASURES for mean in (False, True)]
every = pytest.mark.parametrize(("how", "mean"), EVERY)


@pytest.fixture
def target():
    return random_adapter(SHAPES, 3, 100, ["0.q", "0.v", "1.v"], alpha=7, name="target")


@pytest.fixture
def stack(target):
    """Unequal ranks, targets and scales; `apart` shares no module with the target, `like` is close to it."""
    some = [
        random_adapter(SHAPES, 2, 1, alpha=3, name="all"),
        random_adapter(SHAPES, 4, 2, ["0.q", "1.q"], rslora=True, name="queries"),
        random_adapter(SHAPES, {m: 1 + i for i, m in enumerate(SHAPES)}, 3, name="rising"),
        random_adapter(SHAPES, 5, 4, ["0.up"], name="apart"),
        moved(target, 0.5, 5, "like"),
    ]
    return Stack.of(some)


def moved(adapter, noise, seed, name):
    """An adapter of the same rank, its factors moved by relative noise."""
    g = torch.Generator().manual_seed(seed)

    def near(t):
        return t + noise * t.std() * torch.randn(t.shape, generator=g)

    modules = {m: replace(f, B=near(f.B), A=near(f.A)) for m, f in adapter.modules.items()}
    return replace(adapter, name=name, modules=modules)


def dense(stack, target, how, mean):
    """The oracle: every module's ΔW in fp64, the definitions as they are written."""
    wanted = {m: f.B.double() @ f.A.double() for m, f in target.modules.items()}
    out = []
    for name in stack.names:
        own = {m: f.B.double() @ f.A.double() for m, f in stack.adapter(name).modules.items()}
        rows = []
        for m in sorted({*own, *wanted}):
            x, t = (d.get(m, torch.zeros(SHAPES[m], dtype=torch.float64)) for d in (own, wanted))
            x, t = (x**2, t**2) if how == "qfim" else (x, t)
            product = {
                "cosine": (x * t).sum(),
                "qfim": (x * t).sum(),
                "clamp": (x * t)[x * t > 0].sum(),
                "abs": (x * t).abs().sum(),
                "clamp_pm": max((x * t).sum(), torch.tensor(0.0)),
            }[how]
            rows.append([float(product), float((x * x).sum()), float((t * t).sum())])
        p, xx, tt = np.array(rows).T
        if mean:
            ratios = [a / math.sqrt(b * c) if b * c else 0.0 for a, b, c in zip(p, xx, tt, strict=True)]
            value = sum(ratios) / len(ratios)
        else:
            value = p.sum() / math.sqrt(xx.sum() * tt.sum())
        out.append(math.sqrt(value) if how == "qfim" else value)
    return out


@every
def test_against_dense_algebra(stack, target, how, mean):
    found = closeness(stack, target, how, mean=mean)
    assert found.dtype == torch.float32
    assert found.shape == (len(stack),)
    oracle = dense(stack, target, how, mean)
    assert found.tolist() == pytest.approx(oracle, rel=2e-5, abs=1e-7)
    assert oracle[stack.index("apart")] == 0
    assert len({round(value, 4) for value in oracle}) == len(stack)


def test_the_measures_differ(stack, target):
    values = {(how, mean): closeness(stack, target, how, mean=mean) for how, mean in EVERY}
    for one in EVERY:
        for other in EVERY:
            assert one == other or not torch.allclose(values[one], values[other], atol=1e-3)


def full(name, **modules):
    """An adapter of the given dense updates."""
    return Adapter(
        name, {m: Factors(torch.tensor(d, dtype=torch.float32), torch.eye(len(d[0]))) for m, d in modules.items()}
    )


@pytest.mark.parametrize(
    ("how", "pooled", "mean"),
    [
        ("cosine", (4 - 2) / math.sqrt(12 * 14), (4 / 6 - 2 / math.sqrt(48)) / 2),
        ("clamp", 5 / math.sqrt(12 * 14), (5 / 6 + 0) / 2),
        ("abs", (6 + 2) / math.sqrt(12 * 14), (6 / 6 + 2 / math.sqrt(48)) / 2),
        ("clamp_pm", 4 / math.sqrt(12 * 14), (4 / 6 + 0) / 2),
        ("qfim", math.sqrt((18 + 4) / math.sqrt(36 * 50)), math.sqrt((18 / 18 + 4 / 24) / 2)),
    ],
)
def test_numbers_by_hand(how, pooled, mean):
    """Products 4, −1, 1 in module a, of norms √6 and √6; −2 in module b, of norms √6 and √8."""
    x = full("x", a=[[2, -1], [1, 0]], b=[[1, 0], [1, 2]])
    t = full("t", a=[[2, 1], [1, 0]], b=[[-2, 2], [0, 0]])
    assert float(closeness(Stack.of([x]), t, how)) == pytest.approx(pooled, rel=1e-6)
    assert float(closeness(Stack.of([x]), t, how, mean=True)) == pytest.approx(mean, rel=1e-6)


@every
def test_a_module_of_one_alone_counts_against_it(how, mean):
    """Half of the squared norm, and one of two modules, lies where the other has nothing; a module of ΔW = 0 is none."""
    one, other = [[1, 0], [0, 0]], [[0, 2], [0, 0]]
    expected = (0.5 if mean else math.sqrt(0.5)) ** (0.5 if how == "qfim" else 1)
    both, alone = full("both", a=one, b=one), full("alone", a=one, b=[[0, 0], [0, 0]])
    assert float(closeness(Stack.of([both]), alone, how, mean=mean)) == pytest.approx(expected, rel=1e-6)
    assert float(closeness(Stack.of([alone]), both, how, mean=mean)) == pytest.approx(expected, rel=1e-6)
    assert float(closeness(Stack.of([alone]), full("t", a=one), how, mean=mean)) == pytest.approx(1)
    crossed = closeness(Stack.of([alone]), full("t", a=other), how, mean=mean)
    assert float(crossed) == 0


@st.composite
def pools(draw):
    """Adapters over the same shapes, and one of them as the target, moved a little."""
    shapes = {f"m{i}": (draw(st.integers(2, 7)), draw(st.integers(2, 7))) for i in range(draw(st.integers(1, 3)))}
    parts = st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True)
    some = [
        random_adapter(
            shapes,
            draw(st.integers(1, 4)),
            draw(st.integers(0, 999)),
            draw(parts),
            alpha=draw(st.floats(0.1, 32)),
            rslora=draw(st.booleans()),
            name=f"a{i}",
        )
        for i in range(draw(st.integers(1, 5)))
    ]
    return shapes, some, moved(draw(st.sampled_from(some)), draw(st.floats(0.05, 2)), draw(st.integers(0, 999)), "t")


@given(pools())
def test_gram_cosine_is_dense_cosine(drawn):
    shapes, some, target = drawn

    def flat(adapter):
        parts = [
            adapter.modules[m].delta().double() if m in adapter.modules else torch.zeros(shapes[m]) for m in shapes
        ]
        return torch.cat([p.double().flatten() for p in parts])

    expected = [torch.nn.functional.cosine_similarity(flat(a), flat(target), dim=0).item() for a in some]
    assert closeness(Stack.of(some), target, "cosine").tolist() == pytest.approx(expected, abs=1e-5)


@given(pools(), st.sampled_from(EVERY))
def test_bounds_and_what_is_smaller_than_what(drawn, one):
    _, some, target = drawn
    how, mean = one
    stack = Stack.of(some)
    value = {h: closeness(stack, target, h, mean=mean) for h in MEASURES}
    assert (value[how].abs() <= 1).all()
    assert how == "cosine" or (value[how] >= 0).all()
    slack = 1e-5
    assert (value["cosine"] <= value["clamp_pm"] + slack).all()
    assert (value["clamp_pm"] <= value["clamp"] + slack).all()
    assert (value["clamp"] <= value["abs"] + slack).all()
    assert torch.allclose(2 * value["clamp"], value["abs"] + value["cosine"], atol=slack)


def test_cosine_and_clamp_pm_form_no_delta(stack, target, monkeypatch):
    monkeypatch.setattr(module, "_deltas", None)
    for how in ("cosine", "clamp_pm"):
        assert closeness(stack, target, how).tolist() == pytest.approx(dense(stack, target, how, False), rel=1e-5)
    with pytest.raises(TypeError):
        closeness(stack, target, "clamp")


@every
def test_dense_modules_are_few_at_a_time(stack, target, how, mean, monkeypatch):
    """All in one block, in whatever order their units lie; blocks of a few, and of one."""
    whole = closeness(stack, target, how, mean=mean)
    held, deltas = [], module._deltas

    def watched(*args):
        held.append((out := deltas(*args)).shape)
        return out

    monkeypatch.setattr(module, "_deltas", watched)
    many = Stack.of([replace(stack.adapter(i % 5), name=f"{i}") for i in range(133)])
    found = closeness(shuffled(many, 3), target, how, mean=mean)
    assert found.tolist() == pytest.approx(whole.repeat(27)[:133].tolist(), rel=1e-5, abs=1e-8)
    gram_only = how in ("cosine", "clamp_pm")
    assert not held if gram_only else max(shape[0] for shape in held) == (many.ranks() > 0).sum(0).max()
    held.clear()
    monkeypatch.setattr(module, "ENTRIES", 100)  # two of 9×5, three of 6×5
    assert closeness(stack, target, how, mean=mean).tolist() == pytest.approx(whole.tolist(), rel=1e-5, abs=1e-8)
    assert not held if gram_only else max(math.prod(shape) for shape in held) == 3 * 6 * 5
    held.clear()
    monkeypatch.setattr(module, "ENTRIES", 1)
    assert closeness(stack, target, how, mean=mean).tolist() == pytest.approx(whole.tolist(), rel=1e-5, abs=1e-8)
    assert {one[0] for one in held} <= {1}


def shuffled(stack, seed):
    """The same units in another order, the adapters' mixed."""
    g = torch.Generator().manual_seed(seed)
    return replace(stack, modules={m: u[torch.randperm(len(u), generator=g)] for m, u in stack})


def turned(adapter, seed):
    """The same ΔW, factored as B M and M⁻¹ A."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for m, f in adapter.modules.items():
        M = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64))[0] * 3
        M = M @ torch.diag(torch.rand(f.rank, generator=g, dtype=torch.float64) + 0.5)
        modules[m] = replace(f, B=(f.B.double() @ M).float(), A=torch.linalg.solve(M, f.A.double()).float())
    return replace(adapter, modules=modules)


@every
def test_how_it_was_factored_does_not_matter(stack, target, how, mean):
    found = closeness(stack, target, how, mean=mean)
    others = Stack.of([turned(stack.adapter(name), i) for i, name in enumerate(stack.names)])
    again = closeness(others, turned(target, 9), how, mean=mean)
    assert again.tolist() == pytest.approx(found.tolist(), rel=1e-4, abs=1e-6)
    again = closeness(shuffled(stack, 1), target, how, mean=mean)
    assert again.tolist() == pytest.approx(found.tolist(), rel=1e-6, abs=1e-8)


@every
@pytest.mark.parametrize("scale", [3.7, 1e-25, 1e22])
def test_scale_does_not_matter(stack, target, how, mean, scale):
    """Not even where fp32 would under- or overflow: the square of 1e-25, say."""
    found = closeness(stack, target, how, mean=mean).tolist()
    larger = Stack.of([stack.adapter(name).times(scale) for name in stack.names])
    assert closeness(larger, target, how, mean=mean).tolist() == pytest.approx(found, rel=1e-5, abs=1e-8)
    assert closeness(stack, target.times(scale), how, mean=mean).tolist() == pytest.approx(found, rel=1e-5, abs=1e-8)


@every
def test_the_target_itself_is_first_and_its_negative_last(stack, target, how, mean):
    itself, negative = replace(target, name="itself"), replace(target.times(-2.0), name="negative")
    found = closeness(Stack.of([stack.adapter(0), negative, itself, stack.adapter("like")]), target, how, mean=mean)
    assert float(found[2]) == pytest.approx(1, abs=1e-6)
    assert found[[0, 3]].max() < 0.99
    if how in ("abs", "qfim"):
        assert float(found[1]) == pytest.approx(1, abs=1e-6)  # no sign is left in them
    else:
        assert float(found[1]) == pytest.approx(-1 if how == "cosine" else 0, abs=1e-6)
        assert found.argmin() == 1


@every
def test_an_adapter_of_no_update_is_not_close(stack, target, how, mean):
    some = Stack.of([stack.adapter("like"), replace(stack.adapter("all").times(0.0), name="none")])
    found = closeness(some, target, how, mean=mean)
    assert float(found[1]) == 0
    assert float(found[0]) == pytest.approx(float(closeness(stack, target, how, mean=mean)[4]), rel=1e-6)


def test_nothing_is_changed(stack, target):
    before, same = stack.digest(), target.digest()
    for how, mean in EVERY:
        closeness(stack, target, how, mean=mean)
    assert (stack.digest(), target.digest()) == (before, same)


def broken(adapter, m, value):
    f = adapter.modules[m]
    A = f.A.clone()
    A[0, 0] = value
    return replace(adapter, modules={**adapter.modules, m: replace(f, A=A)})


def test_what_cannot_be_compared(stack, target):
    def refused(message, stack=stack, target=target, how="clamp"):
        with pytest.raises(SelectionError, match=message):
            closeness(stack, target, how)

    refused("no measure of closeness 'cosin'; choose one of cosine, clamp, abs, clamp_pm, qfim", how="cosin")
    refused("expected the target as an Adapter, got str; pool.adapter", target="all")
    refused("the target target: its update is 0, so nothing", target=target.times(0.0))
    refused("the target target: its update is not finite", target=broken(target, "0.v", math.nan))
    refused("the target target: its update is not finite", target=broken(target, "0.v", math.inf), how="cosine")
    alien = replace(target, modules={"model." + m: f for m, f in target.modules.items()})
    refused("target shares no module with the 5 adapters: it has such as 'model.0.q', they '0.q'", target=alien)
    wide = random_adapter(SHAPES | {"1.v": (4, 6)}, 2, targets=["0.q", "1.v"], name="wide")
    refused(r"the target wide: 1\.v is 4×6, but 4×5 in all; they are of different bases", target=wide)
    factors = {**target.modules, "0.v": replace(target.modules["0.v"], embedding=True)}
    refused(r"target: 0\.v is an embedding of 4×5, but 4×5 in all", target=replace(target, modules=factors))
    for how, m in (("cosine", "1.q"), ("abs", "0.q"), ("qfim", "1.q")):
        bad = Stack.of([stack.adapter("all"), broken(stack.adapter("queries"), m, math.nan)])
        refused("queries: its update is not finite", stack=bad, how=how)
    with pytest.raises(SelectionError, match="no measure of closeness 'macro'"):
        check_target(target, "macro")


def greedy(score, likeness, beta):
    """The rule, spelled out."""
    order = []
    while len(order) < len(score):
        rest = [i for i in range(len(score)) if i not in order]
        gains = [round(score[i] - beta * max((likeness[i][j] for j in order), default=0.0), 6) for i in rest]
        order.append(rest[gains.index(max(gains))])
    return order


@given(st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.0, 0.3, 1.0, 5.0]), st.integers(0, 2))
def test_greedy_order_against_the_rule(n, seed, beta, digits):
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=g, dtype=torch.float64).round(decimals=digits)  # with ties
    likeness = torch.rand(n, n, generator=g, dtype=torch.float64).round(decimals=2)
    likeness = torch.maximum(likeness, likeness.T)
    order = diversify(score, likeness, beta)
    assert sorted(order) == list(range(n))
    assert order == greedy(score.tolist(), likeness.tolist(), beta)
    if beta == 0:
        assert order == sorted(range(n), key=lambda i: (-score[i].item(), i))


def test_a_copy_waits():
    likeness = torch.eye(3) + torch.tensor([[0.0, 1.0, 0.1], [1.0, 0.0, 0.1], [0.1, 0.1, 0.0]])
    score = torch.tensor([1.0, 0.9, 0.2])
    assert diversify(score, likeness, 0.5) == [0, 1, 2]
    assert diversify(score, likeness, 1.0) == [0, 2, 1]
    assert diversify(score[:1], likeness[:1, :1], 1.0) == [0]
    assert diversify(torch.tensor([1.0, 0.5, 0.5 + 1e-7]), torch.eye(3), 1.0) == [0, 1, 2]  # a tie to six decimals
    assert diversify(torch.tensor([1.0, 0.5, 0.5 + 1e-5]), torch.eye(3), 1.0) == [0, 2, 1]
