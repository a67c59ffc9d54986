"""The stack's algebra against dense float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import random_adapter, tiny_base
from workbench import factored
from workbench.adapters import Adapter, Factors
from workbench.canonical import CANONICAL, canonical
from workbench.compose import grouped
from workbench.errors import AdapterError, MergeError, SelectionError
from workbench.singular import factored_svd
from workbench.stack import Stack, Units, cosine, gram, squares

SHAPES = {"model.layers.10.q": (7, 5), "model.layers.9.q": (5, 9), "model.layers.9.down": (6, 6)}
careful = settings(max_examples=25, deadline=None, derandomize=True)


def few(n=4, shapes=SHAPES):
    """Adapters of unequal ranks, scales and targets."""
    out = []
    for i in range(n):
        targets = [m for j, m in enumerate(shapes) if n == 1 or (i + j) % 4]
        ranks = {m: 1 + (i + j) % 3 for j, m in enumerate(shapes)}
        out.append(random_adapter(shapes, ranks, 10 + i, targets, alpha=3 + i, rslora=i % 2 == 1, name=f"a{i}", size=1))
    return out


def dense(adapters, module):
    """ΔW of each adapter in one module, float64 (N, d_out, d_in); zero where absent."""
    d_out, d_in = SHAPES[module]
    zero = torch.zeros(d_out, d_in, dtype=torch.float64)
    return torch.stack(
        [a.modules[module].B.double() @ a.modules[module].A.double() if module in a.modules else zero for a in adapters]
    )


def test_adapters_come_out_as_they_went_in():
    adapters = few()
    stack = Stack.of(adapters)
    assert len(stack) == 4
    for i, adapter in enumerate(adapters):
        for which in (i, adapter.name):
            back = stack.adapter(which)
            assert set(back.modules) == set(adapter.modules)
            assert back.digest() == adapter.digest()
            for module, factors in adapter.modules.items():
                assert torch.equal(back.modules[module].B, factors.B)
                torch.testing.assert_close(back.modules[module].raw_B, factors.raw_B)
    assert stack.digest() == Stack.of([replace(a, name=a.name + "x") for a in adapters]).digest()
    assert stack.digest() != Stack.of(adapters[::-1]).digest()


def test_owner_scale_and_ranks_tell_whose_a_unit_is():
    adapters = few()
    stack = Stack.of(adapters)
    ranks = torch.tensor([[a.modules[m].rank if m in a.modules else 0 for m in stack.modules] for a in adapters])
    assert torch.equal(stack.ranks(), ranks)
    for module, units in stack:
        assert units.owner.dtype == torch.int64
        assert units.scale.dtype == torch.float32
        owners = [i for i, a in enumerate(adapters) if module in a.modules for _ in range(a.modules[module].rank)]
        assert units.owner.tolist() == owners
        torch.testing.assert_close(units.scale, torch.tensor([adapters[i].modules[module].scale for i in owners]))
        assert units.shape == SHAPES[module] == stack.shapes()[module]
        assert len(units) == len(owners)
    whole = Stack.of([Adapter("int", {"m": Factors(torch.ones(2, 1), torch.ones(1, 2), 2)})])
    assert whole.modules["m"].scale.dtype == torch.float32


def test_layers_are_in_natural_order():
    assert list(Stack.of(few(1)).modules) == ["model.layers.9.down", "model.layers.9.q", "model.layers.10.q"]


def test_concatenating_is_summing_and_coefficients_weigh():
    adapters = few()
    stack = Stack.of(adapters)
    weights = torch.tensor([0.5, -2.0, 0.0, 3.0])
    for module, units in stack:
        each = dense(adapters, module)
        torch.testing.assert_close(units.delta().double(), each.sum(0), rtol=1e-5, atol=1e-5)
        got = units.delta(weights[units.owner]).double()
        torch.testing.assert_close(got, (weights.double()[:, None, None] * each).sum(0), rtol=1e-5, atol=1e-5)
        shuffled = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))]
        torch.testing.assert_close(shuffled.delta(), units.delta(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(units.of(1).delta().double(), each[1], rtol=1e-5, atol=1e-5)


def test_choose_keeps_the_order_given():
    stack = Stack.of(few())
    some = stack.choose(["a2", 0])
    assert some.names == ("a2", "a0")
    assert some.adapter("a0").digest() == stack.adapter(0).digest()
    assert set(some.modules["model.layers.9.q"].owner.tolist()) <= {0, 1}
    for wrong in ([], ["nobody"], [4], [-1]):
        with pytest.raises(SelectionError, match=r"empty|no adapter"):
            stack.choose(wrong)
    with pytest.raises(SelectionError, match=r"more than once: a1"):
        stack.choose([1, "a1"])
    for wrong in ("a9", 4, -1):
        with pytest.raises(SelectionError, match=f"no adapter {wrong!r} in this stack of 4"):
            stack.adapter(wrong)


def test_what_cannot_be_stacked_is_refused():
    one, two = few(2)
    with pytest.raises(SelectionError, match="empty"):
        Stack.of([])
    with pytest.raises(SelectionError, match="more than once: a0"):
        Stack.of([one, two, one])
    with pytest.raises(AdapterError, match=r"(?=.*a0 is of 'x')(?=.*a1 is of 'y')"):
        Stack.of([replace(one, base="x"), replace(two, base="y")])
    assert Stack.of([replace(one, base="x"), two]).base == "x"
    wide = random_adapter({"model.layers.9.q": (5, 8)}, 2, name="wide")
    with pytest.raises(AdapterError, match=r"wide: model\.layers\.9\.q is 5×8, but 5×9 in a0"):
        Stack.of([one, wide])


def test_weights():
    stack = Stack.of(few())
    assert torch.equal(stack.weights(None), torch.ones(4))
    assert torch.equal(stack.weights([1, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(stack.weights({"a3": 0.5, "a1": -1}), torch.tensor([0, -1, 0, 0.5]))
    for wrong, said in (
        ([1, 2], r"expected 4 weights, one per adapter \(a0, a1, a2…\), got shape \(2,\)"),
        (torch.ones(1, 4), "got shape"),
        ({"b": 1.0}, "not in the stack: b"),
        ([0, 1, float("nan"), 0], "the weight of a2 is not finite"),
    ):
        with pytest.raises(MergeError, match=said):
            stack.weights(wrong)


def test_gram_norms_and_cosines_are_the_dense_ones():
    adapters = few()
    stack = Stack.of(adapters)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for module, units in stack:
        flat = dense(adapters, module).flatten(1)
        torch.testing.assert_close(gram(units, 4).double(), flat @ flat.T, rtol=1e-5, atol=1e-4)
        total += flat @ flat.T
    torch.testing.assert_close(stack.gram().double(), total, rtol=1e-5, atol=1e-4)
    norms = total.diagonal().sqrt()
    torch.testing.assert_close(stack.norms().double(), norms, rtol=1e-5, atol=1e-5)
    assert stack.norms().tolist() == pytest.approx([a.norm() for a in adapters], rel=1e-5)
    torch.testing.assert_close(cosine(stack.gram()).double(), total / norms[:, None] / norms, rtol=1e-4, atol=1e-5)
    silent = replace(adapters[0].times(0), name="silent")
    table = cosine(Stack.of([*adapters, silent]).gram())
    assert table[4].tolist() == [0, 0, 0, 0, 1]
    assert torch.isfinite(table).all()


def ragged(seed, dtype=torch.float32):
    """Units of 40 adapters of rank 0 to 6 of a 9×7 module, in no order; the last has none."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.arange(40).repeat_interleave(torch.cat([torch.randint(0, 7, (39,), generator=g), torch.tensor([0])]))
    owner = owner[torch.randperm(len(owner), generator=g)]
    B, A = torch.randn(9, len(owner), generator=g), torch.randn(len(owner), 7, generator=g)
    return Units(B.to(dtype), A.to(dtype), owner, torch.ones(len(owner)))


def flat(units, n):
    """ΔW of each adapter, float64 (n, d_out d_in), added up unit by unit."""
    each = (units.B.double().T[:, :, None] * units.A.double()[:, None]).flatten(1)
    return torch.zeros(n, each.shape[1], dtype=torch.float64).index_add_(0, units.owner, each)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 16, 37, 10_000])
def test_gram_matrices_in_blocks_against_dense_ones(dtype, block, monkeypatch):
    """Of half precision only the inputs: products, sums and outcome are fp32."""
    monkeypatch.setattr("workbench.factored.BLOCK", block)
    for seed in range(3):
        some = ragged(seed, dtype)
        want = flat(some, 40) @ flat(some, 40).T
        got = gram(some, 40)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float((got - want).abs().max() / want.abs().max()) < (1e-14 if dtype == torch.float64 else 1e-6)
        assert torch.equal(got, got.T)
        assert not got[39].any()
    assert torch.equal(gram(some[:0], 4), torch.zeros(4, 4, dtype=got.dtype))


def test_products_of_two_blocks_are_held_and_no_more(monkeypatch):
    """Whatever the number of units."""
    sizes, product = [], factored._product

    def watched(x, y):
        sizes.append((out := product(x, y)).numel())
        return out

    monkeypatch.setattr(factored, "_product", watched)
    monkeypatch.setattr(factored, "BLOCK", 16)
    some = ragged(0)
    gram(some, 40)
    blocks = -(-len(some) // 16)
    assert max(sizes) == 16 * 16
    assert len(sizes) == 2 * blocks * (blocks + 1) / 2


@pytest.mark.parametrize("entries", [1, 300, 10**6])
def test_squares_and_padded_factors_against_dense_ones(entries, monkeypatch):
    monkeypatch.setattr(factored, "ENTRIES", entries)
    for some in (ragged(0), ragged(1, torch.bfloat16), ragged(2)[:0]):
        want = flat(some, 40)
        found = squares(some, 40)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, want.square().sum(1), rtol=1e-10, atol=0)
        B, A = some.padded(40)
        assert (B.dtype, A.dtype) == (some.B.dtype, some.A.dtype)
        r = int(some.ranks(40).max())
        assert (B.shape, A.shape) == ((40, 9, r), (40, r, 7))
        torch.testing.assert_close((B.double() @ A.double()).flatten(1), want)
    huge = replace(ragged(0), A=ragged(0).A * 1e25)
    torch.testing.assert_close(squares(huge, 40), flat(huge, 40).square().sum(1), rtol=1e-6, atol=0)


def test_padded_factors_are_what_compose_groups():
    adapters = few()
    for module, update in grouped(adapters).items():
        B, A = Stack.of(adapters).modules[module].padded(4)
        assert torch.equal(B, update.B)
        assert torch.equal(A, update.A)
        assert B.is_contiguous()


@pytest.mark.parametrize("most", [1, 3, 100])
def test_blocks_of_adapters(most):
    some = ragged(0)
    left = {i: some.of(i) for i in some.owner.unique().tolist()}
    for adapters, block in some.blocks(most):
        assert len(adapters) <= most
        assert torch.equal(block.owner, block.owner.sort().values)
        for place, adapter in enumerate(adapters.tolist()):
            assert torch.equal(block.of(place).A, left[adapter].A)
            assert torch.equal(block.of(place).B, left.pop(adapter).B)
    assert not left
    assert list(some[:0].blocks(most)) == []


def test_one_line_says_what_a_stack_is():
    stack = Stack.of(few())
    total = int(stack.ranks().sum())
    assert repr(stack) == f"Stack(4 adapters, 3 modules, {total} units, rank 1–3, cpu)"
    one = Stack.of([random_adapter({"q": (1500, 2)}, 1200, name="a")])
    assert repr(one) == "Stack(1 adapter, 1 module, 1,200 units, rank 1200, cpu)"
    units = one.modules["q"]
    assert repr(units) == "Units(q, 1500×2, 1,200 units of 1 adapter, rank 1200, float32, cpu)"
    bare = replace(units, module="", A=units.A.bfloat16(), B=units.B.bfloat16())[:0]
    assert repr(bare) == "Units(1500×2, 0 units of 0 adapters, rank 0, bfloat16, cpu)"
    assert "3 units of 1 adapter, rank 3," in repr(stack.modules["model.layers.9.q"].of(1))


@pytest.mark.parametrize(("d_out", "rank", "d_in"), [(9, 3, 6), (6, 3, 9), (5, 5, 8), (5, 12, 8), (8, 7, 4), (6, 1, 6)])
def test_the_factored_svd_is_the_dense_one(d_out, rank, d_in):
    generator = torch.Generator().manual_seed(rank)
    B, A = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    u, s, vh = factored_svd(B, A)
    q = min(d_out, rank, d_in)
    assert (tuple(u.shape), tuple(s.shape), tuple(vh.shape)) == ((d_out, q), (q,), (q, d_in))
    want = B.double() @ A.double()
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(want)[:q], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(((u * s) @ vh).double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(q), rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, torch.eye(q), rtol=0, atol=1e-5)


@st.composite
def units(draw):
    """Units of 1–3 adapters, of very unequal sizes, some of them dead."""
    seed, n, d_out, d_in = (draw(st.integers(*r)) for r in ((0, 10_000), (1, 3), (1, 6), (1, 6)))
    ranks = [draw(st.integers(1, 5)) for _ in range(n)]
    generator = torch.Generator().manual_seed(seed)
    R = sum(ranks)
    size = 10.0 ** torch.randint(-4, 4, (R,), generator=generator).float()
    B, A = torch.randn(d_out, R, generator=generator) * size, torch.randn(R, d_in, generator=generator) / size[:, None]
    if draw(st.booleans()):
        A[draw(st.integers(0, R - 1))] = 0
    if draw(st.booleans()):
        B[:, draw(st.integers(0, R - 1))] = 0
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(ranks))
    return Units(B, A, owner, torch.ones(R))


@given(units(), st.sampled_from(CANONICAL))
@careful
def test_every_canonical_form_keeps_every_adapter_s_update(before, form):
    after = canonical(before, form)
    assert torch.equal(after.owner, before.owner)
    for i in before.owner.unique().tolist():
        want = before.of(i).B.double() @ before.of(i).A.double()
        scale = float((before.of(i).B.double().norm(dim=0) * before.of(i).A.double().norm(dim=1)).sum())
        torch.testing.assert_close(after.of(i).delta().double(), want, rtol=0, atol=1e-5 * scale + 1e-12)
    if form != "raw":
        torch.testing.assert_close(after.A.norm(dim=1), after.B.norm(dim=0), rtol=1e-4, atol=1e-6)


@given(units(), st.integers(0, 1000), st.sampled_from(["balanced", "outer"]))
@careful
def test_balanced_units_are_free_of_sign_and_scale(before, seed, form):
    generator = torch.Generator().manual_seed(seed)
    c = torch.exp(torch.randn(len(before), generator=generator) * 2)
    c *= torch.randint(0, 2, (len(before),), generator=generator) * 2 - 1
    other = replace(before, A=before.A * c[:, None], B=before.B / c)
    one, two = canonical(before, form), canonical(other, form)
    torch.testing.assert_close(two.A, one.A, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(two.B, one.B, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 4))
@careful
def test_svd_units_do_not_depend_on_the_factoring(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(6, rank, generator=generator))[0] for _ in "uv")
    s = torch.tensor([8.0, 4.0, 2.0, 1.0])[:rank]  # distinct
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0] @ torch.diag(torch.linspace(0.5, 2, rank))
    owner, ones = torch.zeros(rank, dtype=torch.long), torch.ones(rank)
    one = canonical(Units(u * s, v.T, owner, ones), "svd")
    two = canonical(Units((u * s) @ mix, torch.linalg.inv(mix) @ v.T, owner, ones), "svd")
    gap = (v.abs().amax(0) * 0.5 - v.abs()).abs().min()
    if gap > 1e-3:  # no entry so near half the largest that rounding could change the one that leads
        torch.testing.assert_close(two.A, one.A, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(two.B, one.B, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.A.norm(dim=1).square(), s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", CANONICAL)
def test_dead_units_stay_finite(form):
    B, A = torch.zeros(4, 3), torch.zeros(3, 5)
    B[:, 1], A[2] = 1.0, 1.0  # each unit lacks one side or both
    out = canonical(Units(B, A, torch.zeros(3, dtype=torch.long), torch.ones(3)), form)
    assert torch.isfinite(out.A).all()
    assert torch.isfinite(out.B).all()
    assert float(out.delta().abs().max()) == 0


def test_an_unknown_form_is_refused():
    with pytest.raises(MergeError, match=r"'polar' is unknown; choose one of raw, balanced, svd, outer"):
        canonical(Stack.of(few()).modules["model.layers.9.q"], "polar")


def test_a_stack_of_a_real_base():
    base = tiny_base()
    stack = Stack.of([random_adapter(base, 4, i) for i in range(3)])
    assert stack.base == "tiny"
    assert stack.shapes() == {m: base.projections[m] for m in stack.modules}
    assert stack.to("cpu").digest() == stack.digest()
