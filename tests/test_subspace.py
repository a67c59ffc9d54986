"""Subspace merges against dense float64 oracles (NumPy, on ΔW, from the papers' formulas), and where they degenerate."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from merging import as_on_a_gpu, deltas, gap, pool, single, weighted_sum
from workbench.adapters import Adapter, Factors
from workbench.errors import MergeError
from workbench.merge import merge, methods
from workbench.merge.elementwise import fingerprints, mask_seed
from workbench.merge.subspace import NOISE, numerical_rank, polar
from workbench.stack import Stack

VARIANTS = [
    ("tsv", {}),
    ("tsv", {"per_adapter": 2}),
    ("iso_c", {}),
    ("iso_c", {"divide": "dimension"}),
    ("iso_cts", {}),
    ("iso_cts", {"common": 0.5, "divide": "dimension"}),
    ("knots_ties", {}),
    ("knots_ties", {"on": "V", "elect": "frequency", "divide": "weights"}),
    ("knots_dare", {}),
    ("core", {}),
    ("core", {"basis": "deltas"}),
    ("core", {"combine": "tsv"}),
    ("core", {"combine": "iso_c"}),
    ("core", {"combine": "sum", "basis": "deltas"}),
    ("core_dare", {}),
    ("core_dare", {"basis": "deltas"}),
]
IDS = [" ".join([name, *map(str, options.values())]) for name, options in VARIANTS]


@st.composite
def cases(draw):
    """(adapters, weights) of one module: Σ r below and above min(d_out, d_in), absent modules, weights of any sign and 0."""
    n = draw(st.integers(1, 5))
    shape = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    ranks = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    absent = {(i, "m") for i in draw(st.lists(st.integers(1, 4), max_size=2))}
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, -2.0, -0.25, 3.0, 0.0]), min_size=n, max_size=n))
    seed = draw(st.integers(0, 10_000))
    return pool(n, seed, ranks, absent, {"m": shape}), weights


def dense(adapters, weights):
    """[(index, weight, ΔW)] of those that take part."""
    return [
        (i, w, a.modules["m"].delta().double().numpy())
        for i, (w, a) in enumerate(zip(weights, adapters, strict=True))
        if w and "m" in a.modules
    ]


def agrees(got, want, tolerance=1e-7):
    got = got.modules["m"].delta().double().numpy()
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * max(1.0, np.linalg.norm(want)), np.linalg.norm(want)


def orthogonalised(x):
    """X (XᵀX)^(−1/2), the pseudo-inverse where columns are dependent."""
    values, vectors = np.linalg.eigh(x.T @ x)
    root = np.where(values > 1e-12, np.abs(values).clip(1e-300) ** -0.5, 0.0)
    return x @ (vectors * root) @ vectors.T


def triplets(x, k):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :k], s[:k], vt[:k].T


def whole(u, s, v):
    return orthogonalised(np.hstack(u)) @ np.diag(np.concatenate(s)) @ orthogonalised(np.hstack(v)).T


# TSV ----------------------------------------------------------------------------------------------------------------


def tsv_dense(parts, shape, ranks, asked):
    """Algorithm: SVD of each, truncated; concatenated, orthogonalised, multiplied."""
    room, ranks = min(shape), [min(r, *shape) for r in ranks]
    if asked is None:
        kept = [min(r, max(1, room // len(parts))) for r in ranks]
    else:
        fitting = [k for k in range(1, asked + 1) if sum(min(k, r) for r in ranks) <= room]
        kept = [min(r, max(fitting, default=1)) for r in ranks]
    found = [triplets(w * x, k) for (_, w, x), k in zip(parts, kept, strict=True)]
    if sum(kept) > room:  # one each is too many
        found = sorted(found, key=lambda t: -t[1][0])[:room]
    return whole(*zip(*found, strict=True))


@settings(max_examples=60)
@given(case=cases(), asked=st.sampled_from([None, 1, 2, 8]))
def test_tsv_is_the_orthogonalised_sum_of_singular_triplets(case, asked):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        shape, ranks = parts[0][2].shape, [adapters[i].modules["m"].rank for i, _, _ in parts]
        got = merge(adapters, "tsv", weights=weights, per_adapter=asked)
        agrees(got, tsv_dense(parts, shape, ranks, asked))
        assert got.rank <= min(shape)


def test_tsv_golden():
    """Two rank-one updates at 45°: the polar factor of [[1, √½], [0, √½]] turns both by 22.5° away from each other."""
    half = 0.5**0.5
    adapters = single([[2.0, 0.0], [0.0, 0.0]], [[half, 0.0], [half, 0.0]])
    a = np.pi / 8
    u = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    got = merge(adapters, "tsv").modules["m"].delta().numpy()
    # V is [[1, 1], [0, 0]]: dependent columns, both of which become (√½, 0)
    assert np.allclose(got, u @ np.diag([2.0, 1.0]) @ np.array([[half, 0], [half, 0]]))


def test_one_adapter_is_itself_to_tsv_even_where_its_rank_is_nominal():
    for rank in (1, 4, 9):
        adapter = pool(1, ranks=(rank,), shapes={"m": (7, 5)})
        for options in ({}, {"per_adapter": 20}):
            got = merge(adapter, "tsv", **options)
            assert gap(got, adapter[0]) < 1e-12
            assert got.info["notes"] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_come_out_of_tsv_as_the_mean_of_their_weights_times_one(dtype):
    """However each copy is factored; without the partial isometry an arbitrary rotation would come in."""
    g = torch.Generator().manual_seed(3)
    one = pool(1, ranks=(3,), shapes={"m": (40, 30)}, dtype=torch.float64)[0].modules["m"]
    copies = []
    for i in range(3):
        m = torch.randn(3, 3, generator=g).double() + 2 * torch.eye(3)
        copies.append(
            Adapter(f"copy{i}", {"m": Factors((one.B @ m).to(dtype), torch.linalg.solve(m, one.A).to(dtype))})
        )
    weights = [1.0, -0.5, 3.0]
    want = {"m": one.delta() * sum(weights) / 3}
    assert gap(merge(copies, "tsv", weights=weights), want) < (1e-10 if dtype == torch.float64 else 1e-4)
    identical = [Adapter(f"twin{i}", copies[0].modules) for i in range(2)]
    assert gap(merge(identical, "tsv"), {"m": one.delta()}) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_units_of_nothing_give_tsv_no_direction():
    one, other = pool(2, ranks=(3,), shapes={"m": (40, 30)})
    f, g = one.modules["m"], torch.Generator().manual_seed(2)
    empty = torch.randn(40, 2, generator=g).double(), torch.zeros(2, 30).double()
    padded = Adapter("padded", {"m": Factors(torch.cat([f.B, empty[0]], 1), torch.cat([f.A, empty[1]]))})
    assert gap(merge([padded, other], "tsv"), merge([one, other], "tsv")) < 1e-12


def test_tsv_keeps_as_many_as_fit_and_says_so():
    adapters = pool(8, ranks=(3, 1), shapes={"m": (6, 9), "large": (40, 50)})
    note = "not all singular triplets asked for fit in 1 modules, such as m (2 of each of 3 adapters in 6 dimensions)"
    assert merge(adapters[:3], "tsv", per_adapter=3).info["notes"] == [note]  # 2 + 1 + 2
    assert merge(adapters[:3], "tsv", per_adapter=2).info["notes"] == []
    assert merge(adapters[:2], "tsv", per_adapter=8).info["notes"] == []
    note = "not even one singular triplet of each adapter fits in 1 modules, such as m (the strongest 6 of 8)"
    for options in ({}, {"per_adapter": 1}, {"per_adapter": 10**12}):
        assert note in merge(adapters, "tsv", **options).info["notes"]
    assert merge(adapters, "tsv", weights=[1] * 6 + [0] * 2, per_adapter=1).info["notes"] == []


def test_of_too_many_adapters_tsv_keeps_the_strongest():
    adapters = pool(40, ranks=(2,), shapes={"m": (5, 8)})
    norms = {i: float(torch.linalg.matrix_norm(a.modules["m"].delta(), 2)) for i, a in enumerate(adapters)}
    strongest = sorted(norms, key=norms.get)[-5:]
    got = merge(adapters, "tsv")
    assert got.rank == 5
    assert gap(got, merge([adapters[i] for i in strongest], "tsv")) < 1e-12
    weights = [1.0] * 40
    weights[strongest[0]] = 1e-6
    assert gap(merge(adapters, "tsv", weights=weights), got) > 0.1


# Iso-C and Iso-CTS --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(case=cases(), divide=st.sampled_from(["rank", "dimension"]))
def test_iso_c_sets_the_singular_values_of_the_sum_to_their_mean(case, divide):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        x = sum(w * d for _, w, d in parts)
        r = np.linalg.matrix_rank(x, rtol=1e-11)
        u, s, v = triplets(x, r)
        want = s.sum() / (r if divide == "rank" else min(x.shape)) * u @ v.T
        got = merge(adapters, "iso_c", weights=weights, divide=divide)
        agrees(got, want)
        assert got.rank == r


def iso_cts_dense(parts, common, divide):
    x = sum(w * d for _, w, d in parts)
    r, n = np.linalg.matrix_rank(x, rtol=1e-11), len(parts)
    each = round((r - int(r * common)) / n)
    each = each if each * n <= r else r // n
    u, s, v = triplets(x, r - each * n)
    us, ss, vs = [u], [s], [v]
    for _, w, d in parts:
        rest = w * d - u @ u.T @ (w * d)
        own = triplets(rest, min(each, np.linalg.matrix_rank(rest, tol=1e-9)))
        for into, part in zip((us, ss, vs), own, strict=True):
            into.append(part)
    s = np.concatenate(ss)
    mean = s.sum() / (len(s) if divide == "rank" else min(x.shape))
    return mean * orthogonalised(np.hstack(us)) @ orthogonalised(np.hstack(vs)).T


@settings(max_examples=80)
@given(case=cases(), common=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), divide=st.sampled_from(["rank", "dimension"]))
def test_iso_cts_adds_each_adapter_s_own_directions(case, common, divide):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        agrees(
            merge(adapters, "iso_cts", weights=weights, common=common, divide=divide),
            iso_cts_dense(parts, common, divide),
            1e-6,
        )


def test_iso_golden():
    adapters = single([[3.0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, -1.0, 0]])
    flat = torch.tensor([[2.0, 0, 0], [0, -2.0, 0]]).double()
    assert torch.allclose(merge(adapters, "iso_c").modules["m"].delta(), flat)
    lone = merge(adapters[:1], "iso_c").modules["m"].delta()
    assert torch.allclose(lone, torch.tensor([[3.0, 0, 0], [0, 0, 0]]).double())  # rank 1: nothing to flatten
    lone = merge(adapters[:1], "iso_c", divide="dimension").modules["m"].delta()
    assert torch.allclose(lone, torch.tensor([[1.5, 0, 0], [0, 0, 0]]).double())
    # half of the two directions is common: e1, of 3; the first adapter has nothing besides, the second e2, of 1
    got = merge(adapters, "iso_cts", common=0.0)
    assert torch.allclose(got.modules["m"].delta(), flat)


def test_iso_cts_is_iso_c_for_one_adapter_where_all_is_common_and_where_the_adapters_are_too_many():
    adapters = pool(shapes={"m": (12, 9)})
    assert gap(merge(adapters[:1], "iso_cts"), merge(adapters[:1], "iso_c")) < 1e-12
    assert gap(merge(adapters, "iso_cts", common=1.0), merge(adapters, "iso_c")) < 1e-12
    assert merge(adapters, "iso_cts", common=1.0).info["notes"] == []
    assert gap(merge(adapters, "iso_cts", common=0.5), merge(adapters, "iso_c")) > 0.1
    many = pool(40, ranks=(6, 5), shapes={"m": (12, 9), "large": (300, 200)})
    update = merge(many, "iso_cts")
    assert torch.allclose(update.modules["m"].delta(), merge(many, "iso_c").modules["m"].delta())
    assert update.info["notes"] == [
        "1 modules, such as m, have no room for a direction of its own for each adapter (40 or more share it), so that "
        "the result is that of iso_c there"
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_cancels_is_no_direction(dtype):
    """ΔW − ΔW leaves rounding, of which a flat spectrum would make something as large as the rest."""
    one, other = pool(2, ranks=(3,), shapes={"m": (30, 20)}, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    m = torch.randn(3, 3, generator=g).to(dtype) + 2 * torch.eye(3, dtype=dtype)
    f = one.modules["m"]
    again = Adapter("again", {"m": Factors(f.B @ m, torch.linalg.solve(m, f.A))})
    for name in ("iso_c", "iso_cts"):
        assert merge([one, again], name, weights=[1, -1]).norm() == 0
    left = merge([one, again, other], "iso_c", weights=[1, -1, 1])
    assert left.rank == 3
    assert gap(left, merge([other], "iso_c")) < (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_within_the_common_subspace_adds_no_direction_of_rounding(dtype):
    """The gap between what is common and what is not blows rounding up: 7.1 and 6.8 of 8.1 here."""
    large, small = (torch.diag(torch.tensor(d, dtype=dtype)) for d in ([8.0, 7, 6.8, 5], [0.1, 0.1, 0, 0]))
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        q = torch.linalg.qr(torch.randn(4, 4, generator=g).to(dtype)).Q
        adapters = [Adapter(name, {"m": Factors(q @ x, q.T.contiguous())}) for name, x in (("l", large), ("s", small))]
        got = merge(adapters, "iso_cts", common=0.5)  # q1, q2 of the sum; of `large` q3; `small` is within q1 and q2
        assert got.rank == 3
        want = (8.1 + 7.1 + 6.8) / 3 * (q[:, :3] @ q[:, :3].T)
        assert torch.allclose(got.modules["m"].delta(), want, atol=1e-3 if dtype == torch.float32 else 1e-11)


# KnOTS --------------------------------------------------------------------------------------------------------------


def agreed(kept, weights, elect, divide):
    """Election and mean of matrices that are trimmed or dropped already."""
    x = np.stack([w * m for w, m in zip(weights, kept, strict=True)])
    if elect != "none":
        sign = np.sign((x if elect == "total" else np.sign(x)).sum(0))
        x = np.where(np.sign(x) == sign, x, 0.0)
    count = (x != 0) * np.abs(weights)[:, None, None] if divide == "weights" else (x != 0)
    return x.sum(0) / (1.0 if divide == "none" else np.where(count.sum(0) > 0, count.sum(0), 1.0))


def ties_dense(matrices, weights, density, elect, divide):
    kept = []
    for x in matrices:
        sizes = np.sort(np.abs(x).ravel())[::-1]
        keep = max(1, round(density * x.size))
        limit = np.inf if density == 0 else sizes[keep - 1]
        next_ = 0.0 if density in (0, 1) or keep == x.size else sizes[keep]
        assume(
            next_ < 1e-9 * sizes[0] or limit - next_ > 1e-9 * sizes[0]
        )  # V of one adapter, 2×2, is a rotation: a tie
        kept.append(np.where(np.abs(x) >= limit, x, 0.0))
    return agreed(kept, weights, elect, divide)


def masked(adapters, parts, matrices, density, rescale, seed):
    """DARE's masks by their definition: a generator seeded by (seed, module, the adapter's units up to sign)."""
    out = []
    for (i, _, _), x in zip(parts, matrices, strict=True):
        own = Stack.of([adapters[i]]).modules["m"]
        generator = torch.Generator().manual_seed(mask_seed(seed, "m", int(fingerprints(own)[0])))
        kept = (torch.rand(x.shape, generator=generator) < density).numpy()
        out.append(x * kept / (density if rescale and density else 1.0))
    return out


def knots_dense(parts):
    u, s, vt = np.linalg.svd(np.hstack([d for _, _, d in parts]), full_matrices=False)
    r = int((s > 1e-10 * s[0]).sum())
    return u[:, :r], s[:r], np.split(vt[:r], len(parts), axis=1)


DENSITY = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])


@settings(max_examples=60)
@given(
    case=cases(),
    on=st.sampled_from(["V", "SV"]),
    density=DENSITY,
    elect=st.sampled_from(["total", "frequency"]),
    divide=st.sampled_from(["count", "weights"]),
)
def test_knots_ties_merges_the_blocks_of_v(case, on, density, elect, divide):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        u, s, vs = knots_dense(parts)
        w = np.array([w for _, w, _ in parts])
        if on == "V":
            want = u @ np.diag(s) @ ties_dense(vs, w, density, elect, divide)
        else:
            want = u @ ties_dense([np.diag(s) @ v for v in vs], w, density, elect, divide)
        got = merge(adapters, "knots_ties", weights=weights, on=on, density=density, elect=elect, divide=divide)
        agrees(got, want)
        assert got.rank <= len(s)


def test_trimming_v_and_trimming_sv_differ_unless_nothing_is_trimmed():
    adapters = pool(5, shapes={"m": (40, 30)})
    assert gap(merge(adapters, "knots_ties", on="V"), merge(adapters, "knots_ties", on="SV")) > 0.3
    both = [merge(adapters, "knots_ties", on=on, density=1.0) for on in ("V", "SV")]
    assert gap(*both) < 1e-12


def test_knots_golden():
    """[X | Y] with X = diag(2, 1), Y = diag(4, 3): U = I, Σ V_1ᵀ = X, Σ V_2ᵀ = Y; Σ = diag(√20, √10)."""
    adapters = single([[2.0, 0], [0, 1]], [[4.0, 0], [0, 3]])
    got = merge(adapters, "knots_ties", density=0.25).modules["m"].delta()  # 2 and 4 stay
    assert torch.allclose(got, torch.tensor([[3.0, 0], [0, 0]]).double())
    got = merge(adapters, "knots_ties", density=0.25, on="V").modules["m"].delta()  # 2/√20 > 1/√10, but 4/√20 < 3/√10
    assert torch.allclose(got, torch.tensor([[2.0, 0], [0, 3]]).double())


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots_ties", "knots_dare", "core", "core_dare"])
def test_weight_0_takes_no_part_in_any_basis(name):
    adapters = pool(3, ranks=(2, 3, 4))
    got = merge(adapters, name, weights=[1.5, 0, -1])
    assert gap(got, merge([adapters[0], adapters[2]], name, weights=[1.5, -1])) < 1e-12


@settings(max_examples=40)
@given(
    case=cases(),
    density=DENSITY,
    rescale=st.booleans(),
    elect=st.sampled_from(["total", "frequency", "none"]),
    divide=st.sampled_from(["count", "weights", "none"]),
    seed=st.integers(0, 3),
)
def test_knots_dare_drops_entries_of_sv(case, density, rescale, elect, divide, seed):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        u, s, vs = knots_dense(parts)
        w = np.array([w for _, w, _ in parts])
        kept = masked(adapters, parts, [np.diag(s) @ v for v in vs], density, rescale, seed)
        options = {"density": density, "rescale": rescale, "elect": elect, "divide": divide, "seed": seed}
        agrees(merge(adapters, "knots_dare", weights=weights, **options), u @ agreed(kept, w, elect, divide))


# Core space ---------------------------------------------------------------------------------------------------------


def bases(adapters, parts, basis):
    """(U, V), orthonormal, from the factors or from the ΔW themselves."""
    factors = [adapters[i].modules["m"] for i, _, _ in parts]
    b, a = np.hstack([f.B.numpy() for f in factors]), np.vstack([f.A.numpy() for f in factors])
    r_u = r_v = sum(f.rank for f in factors)
    if basis == "deltas":
        b, a = np.hstack([d for _, _, d in parts]), np.vstack([d for _, _, d in parts])
        r_u, r_v = sum(min(f.rank, a.shape[1]) for f in factors), sum(min(f.rank, b.shape[0]) for f in factors)
    u, v = np.linalg.svd(b, full_matrices=False)[0], np.linalg.svd(a, full_matrices=False)[2].T
    return u[:, :r_u], v[:, :r_v]


BASIS = st.sampled_from(["factors", "deltas"])


@settings(max_examples=60)
@given(
    case=cases(),
    basis=BASIS,
    density=DENSITY,
    elect=st.sampled_from(["total", "frequency"]),
    divide=st.sampled_from(["count", "weights"]),
)
def test_core_merges_the_cores_by_ties(case, basis, density, elect, divide):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        u, v = bases(adapters, parts, basis)
        w = np.array([w for _, w, _ in parts])
        want = u @ ties_dense([u.T @ d @ v for _, _, d in parts], w, density, elect, divide) @ v.T
        options = {"basis": basis, "density": density, "elect": elect, "divide": divide}
        agrees(merge(adapters, "core", weights=weights, **options), want)


@settings(max_examples=30)
@given(case=cases(), basis=BASIS)
def test_nothing_is_lost_in_core_space(case, basis):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        agrees(
            merge(adapters, "core", combine="sum", basis=basis, weights=weights), sum(w * d for _, w, d in parts), 1e-12
        )


@pytest.mark.parametrize("basis", ["factors", "deltas"])
def test_nothing_is_lost_in_core_space_of_adapters_of_very_different_size(basis):
    """In fp32, where a direction below ε of the largest would be lost to an SVD that looked at all at once."""
    first, second, third = pool(3, ranks=(3,), shapes={"m": (12, 11)}, dtype=torch.float32)
    f = second.modules["m"]
    lopsided = Adapter("lopsided", {"m": Factors(f.B * 1e-8, f.A * 1e8)})
    tiny = third.times(1e-8)
    adapters, weights = [first, lopsided, tiny], [1.0, 1.0, 1e8]
    got = merge(adapters, "core", combine="sum", basis=basis, weights=weights)
    assert gap(got, weighted_sum(adapters, weights)) < 1e-5


@settings(max_examples=30)
@given(case=cases(), basis=BASIS)
def test_singular_values_do_not_depend_on_the_basis(case, basis):
    adapters, weights = case
    if dense(adapters, weights):
        for combine, options in (("tsv", {"per_adapter": 9}), ("iso_c", {})):
            got = merge(adapters, "core", combine=combine, basis=basis, weights=weights)
            agrees(got, deltas(merge(adapters, combine, weights=weights, **options))["m"].numpy())


def test_ties_in_core_space_depends_on_the_factors_as_published_and_not_with_the_deltas_basis():
    adapters = pool(4, shapes={"m": (40, 30)})
    g = torch.Generator().manual_seed(5)
    again = []
    for a in adapters:
        f = a.modules["m"]
        m = torch.randn(f.rank, f.rank, generator=g).double() + torch.eye(f.rank)
        again.append(Adapter(a.name, {"m": Factors(f.B @ m, torch.linalg.solve(m, f.A))}))
    published, mended = (
        gap(merge(again, "core", basis=basis), merge(adapters, "core", basis=basis)) for basis in ("factors", "deltas")
    )
    assert published > 0.3
    assert mended < 1e-9


@settings(max_examples=40)
@given(
    case=cases(),
    basis=BASIS,
    density=DENSITY,
    rescale=st.booleans(),
    elect=st.sampled_from(["total", "frequency", "none"]),
    divide=st.sampled_from(["count", "weights", "none"]),
)
def test_core_dare_drops_entries_of_the_cores(case, basis, density, rescale, elect, divide):
    adapters, weights = case
    parts = dense(adapters, weights)
    if parts:
        u, v = bases(adapters, parts, basis)
        w = np.array([w for _, w, _ in parts])
        kept = masked(adapters, parts, [u.T @ d @ v for _, _, d in parts], density, rescale, 0)
        options = {"basis": basis, "density": density, "rescale": rescale, "elect": elect, "divide": divide}
        agrees(merge(adapters, "core_dare", weights=weights, **options), u @ agreed(kept, w, elect, divide) @ v.T)


def test_core_tsv_says_where_not_all_triplets_fit():
    adapters = pool(3, ranks=(3,), shapes={"m": (6, 9)})
    note = "not all singular triplets asked for fit in 1 modules, such as m (2 of each of 3 adapters in 6 dimensions)"
    assert merge(adapters, "core", combine="tsv").info["notes"] == [note]
    assert merge(adapters, "core").info["notes"] == []


@pytest.mark.parametrize("name", ["knots_dare", "core_dare"])
def test_random_dropping_is_unbiased_when_rescaled(name):
    adapters = pool(2, ranks=(2,), shapes={"m": (4, 3)})
    want = weighted_sum(adapters, [1.0, -2.0])
    options = {"weights": [1.0, -2.0], "density": 0.5, "elect": "none", "divide": "none"}
    draws = torch.stack([deltas(merge(adapters, name, seed=s, **options))["m"] for s in range(400)])
    error, spread = (draws.mean(0) - want["m"]).abs(), draws.std(0) / 20
    assert (error <= 5 * spread + 1e-9).all()
    assert spread.max() > 0.01
    plain = merge(adapters, name, rescale=False, **options)
    assert gap(plain, {"m": 0.5 * deltas(merge(adapters, name, **options))["m"]}) < 1e-12


# All of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [nullcontext, as_on_a_gpu])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_fp32_is_close_to_fp64(name, options, way):
    shapes = {"low": (60, 50), "full": (12, 16)}  # Σ r below and above min(d_out, d_in)
    wide = pool(6, 11, shapes=shapes)
    narrow = [
        Adapter(a.name, {m: Factors(f.B.float(), f.A.float()) for m, f in a.modules.items()})
        for a in pool(6, 11, shapes=shapes)
    ]
    exact = [Adapter(a.name, {m: Factors(f.B.double(), f.A.double()) for m, f in a.modules.items()}) for a in narrow]
    weights = [1.0, -0.5, 2.0, 1.0, 0.25, -1.0]
    with way():
        got = merge(narrow, name, weights=weights, **options)
    assert all(f.B.dtype == f.A.dtype == torch.float32 for f in got.modules.values())
    assert gap(got, merge(exact, name, weights=weights, **options)) < 2e-4
    assert all(f.B.dtype == torch.float64 for f in merge(wide, name, weights=weights, **options).modules.values())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize(
    ("dtype", "way"), [(torch.float32, nullcontext), (torch.float64, nullcontext), (torch.float32, as_on_a_gpu)]
)
def test_zero_adapters_copies_opposites_and_single_rows_are_merged_quietly(name, options, dtype, way):
    with way():
        _quietly(name, options, dtype)


def _quietly(name, options, dtype):
    one = pool(1, ranks=(3,), shapes={"m": (7, 5)}, dtype=dtype)[0]
    zero = Adapter("zero", {"m": Factors(torch.zeros(7, 2, dtype=dtype), torch.zeros(2, 5, dtype=dtype))})
    untrained = Adapter("untrained", {"m": Factors(torch.zeros(7, 2, dtype=dtype), torch.ones(2, 5, dtype=dtype))})
    assert merge([zero, untrained], name, **options).norm() == 0
    f = one.modules["m"]
    padded = Factors(torch.cat([f.B, f.B], 1), torch.cat([f.A, torch.zeros_like(f.A)]))
    for other in (zero.modules, untrained.modules, one.modules, {"m": Factors(-f.B, f.A)}, {"m": padded}):
        got = merge([one, Adapter("other", other)], name, **options)
        assert got.norm() <= 10 * one.norm()
    for shape in ((1, 6), (6, 1), (1, 1)):
        assert merge(pool(3, shapes={"m": shape}, dtype=dtype), name, **options).modules["m"].delta().shape == shape


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if "gauge" in methods()[v[0]].invariant(**v[1])])
@pytest.mark.parametrize("way", [nullcontext, as_on_a_gpu])
def test_lopsided_factors_do_not_overflow(name, options, way):
    """B · 2⁸⁰ and A / 2⁸⁰, in fp32: BᵀB would be infinite."""
    adapters = pool(3, shapes={"m": (12, 11)}, dtype=torch.float32)
    far = [Adapter(a.name, {m: Factors(f.B * 2.0**80, f.A * 2.0**-80) for m, f in a.modules.items()}) for a in adapters]
    with way():
        assert gap(merge(far, name, **options), merge(adapters, name, **options)) < 1e-4


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_no_more_units_than_directions_for_any_number_of_adapters(name, options, n):
    shapes = {"narrow": (9, 70), "large": (90, 70)}
    adapters = pool(n, n, shapes=shapes, dtype=torch.float32)
    update = merge(adapters, name, **options)
    units = sum(a.modules["large"].rank for a in adapters)
    assert 0 < update.norm() < 100 * merge(adapters, "sum").norm()
    for module, f in update.modules.items():
        most = min(units, *shapes[module]) if "sum" not in options.values() else units
        assert f.rank <= most


@pytest.mark.parametrize("n", [4, 12, 40])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_gram_matrices_merge_as_lapack_does(name, options, n):
    """Ragged ranks, an absent module, a copy; Σ r above and below min(d_out, d_in)."""
    shapes = {"low": (90, 130), "full": (12, 16)}
    adapters = pool(n, 3, shapes=shapes, dtype=torch.float32, absent={(1, "full")})
    twin = {m: Factors(f.B.flip(1), f.A.flip(0)) for m, f in adapters[0].modules.items()}
    adapters = [*adapters, Adapter("twin", twin)]
    with as_on_a_gpu():
        got = merge(adapters, name, **options)
    exact = [Adapter(a.name, {m: Factors(f.B.double(), f.A.double()) for m, f in a.modules.items()}) for a in adapters]
    assert gap(got, merge(exact, name, **options)) < 1e-3


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_no_dense_update_is_formed_at_low_rank(name, options):
    adapters = pool(4, shapes={"m": (600, 500)}, dtype=torch.float32)  # ranks 3, 2, 4, 1
    with Largest() as largest:
        merge(adapters, name, **options)
    assert 0 < largest.entries <= 10 * 600


def test_the_numerical_rank_is_relative_and_knows_the_precision():
    for dtype in (torch.float32, torch.float64):
        epsilon = torch.finfo(dtype).eps
        s = torch.tensor([1.0, 2 * NOISE * epsilon, 0.5 * NOISE * epsilon], dtype=dtype)
        assert [numerical_rank(s * scale) for scale in (1.0, 1e-20, 1e20)] == [2, 2, 2]
        assert numerical_rank(s[1:]) == 2  # there the first is the largest
        assert numerical_rank(s[1:], s[0]) == 1
        assert numerical_rank(s[:0]) == numerical_rank(s * 0) == 0
        s = torch.tensor([1.0, 2 * epsilon**0.5, 0.5 * epsilon**0.5], dtype=dtype)
        assert numerical_rank(s) == 3
        assert numerical_rank(s, derived=True) == 2


def test_the_polar_factor_is_orthonormal_or_a_partial_isometry():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=g).double()
    assert torch.allclose(polar(x).T @ polar(x), torch.eye(4).double())
    h = polar(x).T @ x  # X = Q H, with H symmetric and positive
    assert torch.allclose(h, h.T)
    assert torch.linalg.eigvalsh(h).min() > 0
    assert torch.allclose(polar(torch.cat([x, x], 1)), torch.cat([polar(x), polar(x)], 1) / 2**0.5)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots_ties", "core"])
def test_what_overflows_is_refused(name):
    adapters = [
        Adapter(a.name, {"m": Factors(a.modules["m"].B * 1e30, a.modules["m"].A * 1e30)})
        for a in pool(2, shapes={"m": (4, 3)}, dtype=torch.float32)
    ]
    with pytest.raises(MergeError, match="lower the weights"):
        merge(adapters, name)


def test_subspace_methods_return_factors():
    for name in ("tsv", "iso_c", "iso_cts", "knots_ties", "knots_dare", "core", "core_dare"):
        assert not methods()[name].dense
