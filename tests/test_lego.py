"""LoRA-LEGO: scikit-learn, float64 dense algebra and degenerate cases as oracles."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from merging import as_on_a_gpu, gap
from workbench.adapters import Adapter, Factors
from workbench.canonical import CANONICAL, canonical
from workbench.errors import MergeError
from workbench.merge import merge
from workbench.merge.lego import cluster, features, inner_products
from workbench.stack import Stack, Units

PLAIN = {"parameter_reweighting": False, "output_reweighting": False}


def pool(n=4, rank=3, seed=0, ranks=None, shape=(7, 9)):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        r = ranks[i] if ranks else rank
        B, A = torch.randn(shape[0], r, generator=g).double(), torch.randn(r, shape[1], generator=g).double()
        out.append(Adapter(f"a{i}", {"m": Factors(B, A)}))
    return out


def delta(update):
    return update.modules["m"].delta()


def total(adapters, weights=None):
    return sum(w * delta(a) for w, a in zip(weights or [1] * len(adapters), adapters, strict=True))


def close(x, y, tolerance=1e-9):
    return float((x - y).norm()) <= tolerance * max(1.0, float(y.norm()))


def groups(n_groups=3, per=4, noise=1e-3, seed=0, shape=(7, 9)):
    """`per` adapters, each of one unit near each of `n_groups` far-apart centres, in shuffled order; and the centres."""
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(shape[0], n_groups, generator=g).double(), torch.randn(n_groups, shape[1], generator=g).double()
    adapters = []
    for i in range(per):
        order = torch.randperm(n_groups, generator=g)
        B = b[:, order] + noise * torch.randn(shape[0], n_groups, generator=g)
        A = a[order] + noise * torch.randn(n_groups, shape[1], generator=g)
        adapters.append(Adapter(f"a{i}", {"m": Factors(B, A)}))
    return adapters, b, a


# Degenerate cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CANONICAL)
def test_k_of_all_units_is_the_plain_sum_exactly(form):
    adapters = [*pool(3), replace(pool(1)[0], name="twin")]  # duplicates must not merge
    weights = [1.0, -0.5, 2.0, 1.0]
    for k in (12, None):
        source = adapters if k else adapters[:1]
        update = merge(source, "lego", k=k, canonical=form, weights=weights[: len(source)], **PLAIN)
        assert torch.equal(delta(update), delta(merge(source, "sum", weights=weights[: len(source)])))
    with_output = merge(adapters, "lego", k=12, canonical=form, weights=weights, parameter_reweighting=False)
    assert close(delta(with_output), total(adapters, weights) / 2)  # √(r / k) = √(3 / 12)


@pytest.mark.parametrize("form", CANONICAL)
def test_one_adapter_at_its_own_rank_is_itself_and_k_one_is_one_unit(form):
    adapter = pool(1)
    assert close(delta(merge(adapter, "lego", canonical=form)), delta(adapter[0]))
    assert merge(adapter, "lego", canonical=form, k=1).rank == 1
    assert merge(adapter, "lego", canonical=form, k=2).rank == 2  # pruning


def test_k_one_is_the_mean_unit_by_its_definition():
    adapters = pool()
    B = torch.cat([a.modules["m"].B for a in adapters], 1)
    A = torch.cat([a.modules["m"].A for a in adapters])
    b, a = B.mean(1), A.mean(0)
    assert close(delta(merge(adapters, "lego", k=1, **PLAIN)), torch.outer(b, a))
    v, each = torch.cat([a, b]), torch.cat([A, B.T], 1)
    for norm, order in (("2", 2), ("inf", float("inf"))):
        factor = each.norm(order, dim=1).mean() / v.norm(order)
        update = merge(adapters, "lego", k=1, norm=norm, output_reweighting=False)
        assert close(delta(update), torch.outer(b, a) * factor**2)
        assert torch.cat([update.modules["m"].A[0], update.modules["m"].B[:, 0]]).norm(order) == pytest.approx(
            float(each.norm(order, dim=1).mean())
        )
    both = merge(adapters, "lego", k=1)
    assert close(delta(both), 3**0.5 * delta(merge(adapters, "lego", k=1, output_reweighting=False)))


def test_k_one_of_outer_is_the_best_rank_one_of_the_mean_matrix():
    adapters = pool()
    u, s, vh = torch.linalg.svd(total(adapters) / 12, full_matrices=False)
    update = merge(adapters, "lego", k=1, canonical="outer", **PLAIN)
    assert close(delta(update), s[0] * torch.outer(u[:, 0], vh[0]))
    sizes = torch.cat([a.modules["m"].B.norm(dim=0) * a.modules["m"].A.norm(dim=1) for a in adapters])
    reweighted = merge(adapters, "lego", k=1, canonical="outer", output_reweighting=False)
    assert close(delta(reweighted), sizes.mean() * torch.outer(u[:, 0], vh[0]))
    largest = torch.cat([(a.modules["m"].B[:, :, None] * a.modules["m"].A).abs().amax((0, 2)) for a in adapters])
    reweighted = merge(adapters, "lego", k=1, canonical="outer", output_reweighting=False, norm="inf")
    assert float(delta(reweighted).abs().max()) == pytest.approx(float(largest.mean()))


@pytest.mark.parametrize("form", CANONICAL)
def test_duplicate_adapters_merge_into_the_adapter(form):
    """Each unit and its copies are one cluster: the centroid is that unit, neither reweighting changes it."""
    one = pool(1, rank=4)[0]
    copies = [replace(one, name=f"copy{i}") for i in range(3)]
    for options in ({}, PLAIN, {"norm": "inf"}, {"normalise": True}):
        assert close(delta(merge(copies, "lego", canonical=form, **options)), delta(one))


@pytest.mark.parametrize("form", CANONICAL)
def test_fewer_different_units_than_k_leave_no_empty_unit(form):
    one = pool(1, rank=2)[0]
    update = merge([replace(one, name=f"copy{i}") for i in range(4)], "lego", k=5, canonical=form, **PLAIN)
    assert update.rank == 2
    assert close(delta(update), delta(one))


def test_copies_of_another_scale_and_sign_are_the_same_units_to_outer():
    one = pool(1, rank=2)[0]
    copies = [
        one,
        *(
            replace(a, name=f"copy{i}")
            for i, x in enumerate((-3.0, 0.7, 1.9))
            for a in regauged([one], lambda r, g, x=x: x * torch.eye(r).double())
        ),
    ]
    update = merge(copies, "lego", k=5, canonical="outer", **PLAIN)
    assert update.rank == 2
    assert close(delta(update), delta(one))


@pytest.mark.parametrize("form", CANONICAL)
def test_zero_adapters_and_zero_weights(form):
    adapters = pool(3)
    silent = merge(adapters, "lego", canonical=form, weights=[1, 0, 2])
    assert close(delta(silent), delta(merge([adapters[0], adapters[2]], "lego", canonical=form, weights=[1, 2])))
    zero = [Adapter(f"z{i}", {"m": Factors(torch.zeros(7, 3), torch.zeros(3, 9))}) for i in range(2)]
    update = merge(zero, "lego", canonical=form)
    assert update.norm() == 0
    assert 1 <= update.rank <= 3
    assert torch.isfinite(delta(merge([*adapters, *zero], "lego", canonical=form))).all()


def test_weights_multiply_b_with_their_sign_before_clustering():
    adapters = pool(3)
    weights = [2.0, -1.0, 0.5]
    folded = [a.times(w) for a, w in zip(adapters, weights, strict=True)]
    for form in CANONICAL:
        update = merge(adapters, "lego", canonical=form, weights=weights)
        assert close(delta(update), delta(merge(folded, "lego", canonical=form)))
    negated = merge(adapters, "lego", canonical="outer", weights=[-1, -1, -1])
    assert close(delta(negated), -delta(merge(adapters, "lego", canonical="outer")))


# How large k is -----------------------------------------------------------------------------------------------------


def test_k_is_the_candidates_rank_and_the_rounded_mean_where_they_differ():
    assert merge(pool(rank=3), "lego").rank == 3
    assert merge(pool(rank=3), "lego").info["notes"] == []
    update = merge(pool(ranks=[2, 3, 8, 1]), "lego")  # mean 3.5
    assert update.rank == 4
    assert "ranks differ in 1 modules" in update.info["notes"][0]
    plain = merge(pool(ranks=[2, 3, 8, 1]), "lego", output_reweighting=False)
    assert close(delta(update), (3.5 / 4) ** 0.5 * delta(plain))


def test_the_mean_rank_is_over_adapters_that_have_the_module():
    adapters = [*pool(ranks=[2, 4, 4, 4]), Adapter("other", {"n": Factors(torch.ones(2, 1), torch.ones(1, 2))})]
    update = merge(adapters, "lego", weights=[0, 1, 1, 1, 1])
    assert update.modules["m"].rank == 4
    assert update.modules["n"].rank == 1


def test_k_beyond_one_module_is_noted_and_beyond_every_module_refused():
    small = Factors(torch.ones(2, 1).double(), torch.ones(1, 2).double())
    adapters = [replace(a, modules={**a.modules, "small": small}) for a in pool(2)]
    update = merge(adapters, "lego", k=5, **PLAIN)
    assert update.modules["m"].rank == 5
    assert update.modules["small"].rank == 2
    assert update.info["notes"] == ["k = 5 exceeds the units of 1 modules, such as small, which keep all of theirs"]
    assert merge(adapters, "lego", k=6).modules["m"].rank == 6
    with pytest.raises(MergeError, match="k is 7, but no module has more than 6 units"):
        merge(adapters, "lego", k=7)
    with pytest.raises(MergeError, match="no module has more than 3 units"):
        merge(adapters, "lego", k=6, weights=[1, 0])


# Clusters and centroids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CANONICAL)
@pytest.mark.parametrize("normalise", [False, True])
def test_well_separated_groups_are_found_and_their_centroids_returned(form, normalise):
    adapters, b, a = groups()
    want = b @ a
    update = merge(adapters, "lego", canonical=form, normalise=normalise, **PLAIN)
    assert update.rank == 3
    assert close(delta(update), want, 1e-2)
    exact = Stack.of(adapters).modules["m"]
    if form == "raw":  # the definition: the mean over each group, here found by the nearest centre
        nearest = torch.cdist(features(exact), torch.cat([a, b.T], 1)).argmin(1)
        parts = [exact[nearest == c] for c in range(3)]
        assert close(delta(update), sum(torch.outer(p.B.mean(1), p.A.mean(0)) for p in parts))


def test_centroids_of_raw_are_those_of_scikit_learn():
    adapters = groups(4, 6, noise=0.3)[0]
    units = Stack.of(adapters).modules["m"]
    labels = cluster(units, 4, starts=20)
    theirs = KMeans(4, n_init=20, random_state=1, tol=0.0).fit(features(units).numpy())
    assert adjusted_rand_score(labels, theirs.labels_) == 1.0
    want = sum(np.outer(c[9:], c[:9]) for c in theirs.cluster_centers_)
    assert close(delta(merge(adapters, "lego", k=4, starts=20, **PLAIN)), torch.from_numpy(want))


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 6), normalise=st.booleans())
def test_kernel_k_means_ends_where_lloyd_s_own_step_stays(seed, k, normalise):
    """Oracle: k-means on the matrices b a themselves; a partition that Lloyd's step leaves, no worse than 1.2 × the best."""
    units = canonical(Stack.of(pool(4, 3, seed)).modules["m"], "outer")
    x = torch.einsum("oj,ji->joi", units.B, units.A).flatten(1)
    x = torch.nn.functional.normalize(x) if normalise else x
    labels = cluster(units, k, outer=True, normalise=normalise, seed=seed)
    assert labels.unique().tolist() == list(range(k))
    centres = torch.stack([x[labels == c].mean(0) for c in range(k)])
    distance = torch.cdist(x, centres) ** 2
    own = distance.gather(1, labels[:, None])[:, 0]
    assert (own <= distance.min(1).values + 1e-9).all()
    best = KMeans(k, n_init=10, random_state=0).fit(x.numpy()).inertia_
    assert float(own.sum()) <= 1.2 * best


def test_kernel_k_means_finds_the_best_of_all_partitions():
    units = canonical(Stack.of(pool(2, 3)).modules["m"], "outer")
    inner = inner_products(units, outer=True)

    def inertia(labels):
        labels = torch.tensor(labels)
        parts = [(labels == c).nonzero().flatten() for c in labels.unique()]
        return float(inner.diagonal().sum() - sum(inner[p][:, p].sum() / len(p) for p in parts))

    best = min(inertia(labels) for labels in itertools.product(range(3), repeat=6) if len(set(labels)) == 3)
    assert inertia(cluster(units, 3, outer=True, starts=20).tolist()) == pytest.approx(best)


def test_inner_products_are_those_of_the_vectors_and_of_the_matrices():
    units = Stack.of(pool()).modules["m"]
    matrices = torch.einsum("oj,ji->joi", units.B, units.A).flatten(1)
    assert close(inner_products(units, outer=True), matrices @ matrices.T)
    unit = torch.nn.functional.normalize(matrices)
    assert close(inner_products(units, outer=True, normalise=True), unit @ unit.T)
    assert close(inner_products(units, outer=False), features(units) @ features(units).T)
    assert torch.allclose(features(units, normalise=True).square().sum(1), torch.full((12,), 2.0).double())


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), form=st.sampled_from(CANONICAL))
def test_the_order_of_units_decides_nothing(seed, form):
    units = canonical(Stack.of(pool(4, 3, seed)).modules["m"], form)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    labels = cluster(units, 4, outer=form == "outer", starts=1, seed=seed)
    assert torch.equal(cluster(units[order], 4, outer=form == "outer", starts=1, seed=seed), labels[order])


def test_the_seed_decides_where_k_means_begins_and_the_global_generators_are_left_alone():
    adapters = pool(8, 4)
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for form in ("raw", "outer"):
        runs = [delta(merge(adapters, "lego", canonical=form, seed=s, starts=1)) for s in (0, 0, *range(1, 6))]
        assert torch.equal(runs[0], runs[1])
        assert not all(close(runs[0], other) for other in runs[2:])
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


# What is not invariant ----------------------------------------------------------------------------------------------


def regauged(adapters, make):
    out = []
    for i, a in enumerate(adapters):
        f, m = a.modules["m"], make(a.modules["m"].rank, torch.Generator().manual_seed(i))
        out.append(replace(a, modules={"m": Factors(f.B @ m, torch.linalg.solve(m, f.A))}))
        assert close(delta(out[-1]), delta(a))
    return out


def any_matrix(r, g):
    return torch.randn(r, r, generator=g).double() + 2 * torch.eye(r).double()


def signs(r, g):
    return torch.diag(torch.where(torch.rand(r, generator=g) < 0.5, -1.0, 1.0).double())


@pytest.mark.parametrize(
    ("form", "make", "same"),
    [
        ("raw", any_matrix, False),
        ("raw", signs, False),
        ("balanced", any_matrix, False),
        ("outer", any_matrix, False),
        ("balanced", signs, True),
        ("outer", signs, True),
        ("svd", any_matrix, True),
    ],
)
def test_what_depends_on_how_an_adapter_was_factored(form, make, same):
    """Undeclared invariances really are absent: the same ΔW, factored otherwise, merges otherwise by far."""
    adapters = pool(5)
    first, second = (delta(merge(x, "lego", canonical=form)) for x in (adapters, regauged(adapters, make)))
    change = float((first - second).norm() / first.norm())
    assert change < 1e-8 if same else change > 0.1


def test_where_the_scale_goes_changes_raw_clusters_and_it_goes_into_b():
    """s in b or in a is the same adapter and another merge; reading puts it in b, and so do weights."""
    adapters = pool(4)
    s = [4.0, 0.25, 3.0, 0.5]
    in_b = [
        replace(a, modules={"m": Factors(f.B * x, f.A)})
        for a, x in zip(adapters, s, strict=True)
        for f in [a.modules["m"]]
    ]
    in_a = [
        replace(a, modules={"m": Factors(f.B, f.A * x)})
        for a, x in zip(adapters, s, strict=True)
        for f in [a.modules["m"]]
    ]
    first, second = (delta(merge(x, "lego", canonical="raw")) for x in (in_b, in_a))
    assert float((first - second).norm() / first.norm()) > 0.1
    assert close(delta(merge(adapters, "lego", canonical="raw", weights=s)), first)
    assert close(*(delta(merge(x, "lego", canonical="balanced")) for x in (in_b, in_a)))


# The canonical forms it relies on -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), form=st.sampled_from(CANONICAL))
def test_canonical_forms_leave_every_adapter_s_delta_alone(seed, form):
    stack = Stack.of(pool(3, 3, seed))
    units: Units = canonical(stack.modules["m"], form)
    for i in range(3):
        assert close(units.of(i).delta(), stack.modules["m"].of(i).delta())
    if form != "raw":
        assert torch.allclose(units.A.norm(dim=1), units.B.norm(dim=0))


# By inner products, as on a GPU ------------------------------------------------------------------------------------------


def inertia(x, labels):
    return sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in labels.unique())


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("k", [2, 5, 12])
def test_inner_products_cluster_vectors_as_well_as_scikit_learn(noise, k):
    ratios = []
    for seed in range(4):  # by chance either may end in the better optimum
        units = Stack.of(groups(8, 12, noise=noise, seed=seed, shape=(30, 40))[0]).modules["m"]
        x = features(units)
        with as_on_a_gpu():
            labels = cluster(units, k, seed=seed)
        ratios.append(inertia(x, labels) / inertia(x, cluster(units, k, seed=seed)))
        assert labels.unique().tolist() == list(range(k))
        centres = torch.stack([x[labels == c].mean(0) for c in range(k)])
        own = (x - centres[labels]).square().sum(1)
        assert (own <= torch.cdist(x, centres).square().min(1).values + 1e-9).all()  # Lloyd's step leaves it
    assert np.mean(ratios) <= 1.02


@pytest.mark.parametrize("normalise", [False, True])
def test_inner_products_find_what_is_far_apart_and_the_order_of_units_decides_nothing(normalise):
    adapters, _, _ = groups(5, 6)
    units = Stack.of(adapters).modules["m"]
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(1))
    want = cluster(units, 5, normalise=normalise)
    with as_on_a_gpu():
        got = cluster(units, 5, normalise=normalise)
        assert torch.equal(cluster(units[order], 5, normalise=normalise), got[order])
        assert gap(merge(adapters, "lego", normalise=normalise), merge(adapters, "lego", normalise=normalise)) == 0
    assert adjusted_rand_score(got, want) == 1.0


@pytest.mark.parametrize("form", CANONICAL)
def test_a_gpu_s_way_merges_the_same_where_groups_are_clear(form):
    adapters = groups()[0]
    with as_on_a_gpu():
        got = merge(adapters, "lego", canonical=form)
        copies = merge([replace(pool(1, rank=2)[0], name=f"copy{i}") for i in range(4)], "lego", k=5, canonical=form)
    assert gap(got, merge(adapters, "lego", canonical=form)) < 1e-9
    assert copies.rank == 2  # fewer different units than k
