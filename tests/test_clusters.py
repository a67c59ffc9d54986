"""What clusters mean: scikit-learn, enumeration and planted structure as oracles."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

from workbench import clusters
from workbench.adapters import Adapter, Factors
from workbench.canonical import CANONICAL, canonical
from workbench.clusters import cluster_units, members, purity, sharing, unit_map
from workbench.errors import MergeError, SelectionError
from workbench.merge import merge
from workbench.merge.lego import cluster, features
from workbench.stack import Stack


def stack(n=5, rank=3, seed=0, modules=("m", "n")):
    g = torch.Generator().manual_seed(seed)
    adapters = []
    for i in range(n):
        pairs = {m: Factors(torch.randn(7, rank, generator=g), torch.randn(rank, 9, generator=g)) for m in modules}
        adapters.append(Adapter(f"a{i}", pairs if i else {modules[0]: pairs[modules[0]]}))
    return Stack.of(adapters)


def planted(n=12, kinds=3, noise=0.05, seed=0):
    """Adapters of `kinds` labels; those of a label have nearly the same two units."""
    g = torch.Generator().manual_seed(seed)
    centres = [(torch.randn(7, 2, generator=g), torch.randn(2, 9, generator=g)) for _ in range(kinds)]
    adapters = []
    for i in range(n):
        b, a = centres[i % kinds]
        noisy = (b + noise * torch.randn(7, 2, generator=g), a + noise * torch.randn(2, 9, generator=g))
        adapters.append(Adapter(f"a{i}", {"m": Factors(*noisy)}))
    return Stack.of(adapters), {f"a{i}": f"kind{i % kinds}" for i in range(n)}


def frame_of(rows):
    frame = pd.DataFrame(rows, columns=["module", "adapter", "cluster"])
    return frame.assign(unit=frame.groupby(["module", "adapter"]).cumcount(), norm=1.0)


# cluster_units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CANONICAL)
def test_one_row_per_unit_with_the_clusters_of_lego(form):
    pool = stack()
    frame = cluster_units(pool, 4, canonical=form)
    assert list(frame) == ["module", "adapter", "unit", "cluster", "norm"]
    assert len(frame) == 5 * 3 + 4 * 3
    for module, part in frame.groupby("module"):
        units = canonical(pool.modules[module], form)
        assert part["cluster"].tolist() == cluster(units, 4, outer=form == "outer").tolist()
        assert part["adapter"].tolist() == [pool.names[i] for i in units.owner.tolist()]
        assert np.allclose(part["norm"], units.A.norm(dim=1) * units.B.norm(dim=0))
        assert (part.groupby("adapter")["unit"].apply(list).map(lambda found: found == [0, 1, 2])).all()
        assert part["cluster"].nunique() == merge(pool, "lego", k=4, canonical=form).modules[module].rank


def test_modules_can_be_chosen_and_a_large_k_gives_each_unit_its_own():
    frame = cluster_units(stack(), 99, modules=["n"])
    assert frame["module"].unique().tolist() == ["n"]
    assert frame["cluster"].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2, "modules": ["x"]}, "no module 'x'"),
        ({"k": 2, "modules": []}, "nothing to cluster"),
        ({"k": 2, "canonical": "polar"}, "canonical form 'polar'"),
    ],
)
def test_senseless_arguments_are_refused(options, words):
    with pytest.raises(MergeError, match=words):
        cluster_units(stack(), **options)


# sharing ------------------------------------------------------------------------------------------------------------


def test_sharing_counts_adapters_and_its_chance_is_the_enumeration_s():
    owners, clusters = list("aabbbc"), [0, 0, 1, 1, 2, 2]
    found = sharing(frame_of([("m", o, c) for o, c in zip(owners, clusters, strict=True)]))
    assert found["units"].tolist() == [2, 2, 2]
    assert found["adapters"].tolist() == [1, 1, 2]
    assert found["shared"].tolist() == [False, False, True]
    dealt = [{*order[:2]} for order in itertools.permutations(owners)]
    assert np.allclose(found["expected"], np.mean([len(held) > 1 for held in dealt]))
    assert np.allclose(found["expected_adapters"], np.mean([len(held) for held in dealt]))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_randomly_dealt_units_share_as_often_as_chance_says(seed):
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(6).astype(str), rng.integers(1, 8, 6))
    sizes = rng.multinomial(len(owners) - 4, [0.25] * 4) + 1
    clusters = np.repeat(np.arange(4), sizes)
    runs = [
        sharing(frame_of([("m", o, c) for o, c in zip(rng.permutation(owners), clusters, strict=True)]))
        for _ in range(20)
    ]
    assert abs(np.mean([r["adapters"].mean() for r in runs]) - runs[0]["expected_adapters"].mean()) < 0.5
    assert abs(np.mean([r["shared"].mean() for r in runs]) - runs[0]["expected"].mean()) < 0.3
    singles = runs[0].query("units == 1")
    assert (singles["expected"] < 1e-9).all()
    assert np.allclose(singles["expected_adapters"], 1)


def test_planted_units_share_more_than_chance_and_lonely_ones_less():
    pool, _ = planted()
    found = sharing(cluster_units(pool, 6))
    assert found["adapters"].tolist() == [4] * 6  # four adapters of each kind, two units each
    lonely = sharing(frame_of([("m", f"a{i}", i) for i in range(5) for _ in range(4)]))
    assert lonely["shared"].mean() == 0
    assert lonely["expected"].mean() > 0.99


# members ------------------------------------------------------------------------------------------------------------


def test_members_by_hand():
    frame = frame_of([("n", *row) for row in [("a", 1), ("b", 0), ("b", 0), ("a", 0)]] + [("m", "c", 0)])
    frame.loc[0, "norm"] = 2.0
    found = members(frame, {"a": "x", "b": "y", "c": "x"})
    assert found[["module", "cluster", "units", "adapters", "which", "commonest"]].to_numpy().tolist() == [
        ["n", 0, 3, 2, ("b", "a"), "y"],
        ["n", 1, 1, 1, ("a",), "x"],
        ["m", 0, 1, 1, ("c",), "x"],
    ]
    np.testing.assert_allclose(found["norm_share"], [3 / 7, 4 / 7, 1])
    np.testing.assert_allclose(found["purity"], [2 / 3, 1, 1])
    assert "purity" not in members(frame)
    assert members(frame.assign(norm=0.0))["norm_share"].tolist() == [0, 0, 0]


def test_purity_is_the_members_mean_by_their_units():
    pool, labels = planted(noise=3.0)
    frame = cluster_units(pool, 5)
    table = members(frame, labels)
    assert table["units"].sum() == len(frame)
    want = purity(frame, labels, permutations=1).set_index(["module", "measure"])["value"]["m", "purity"].iloc[0]
    assert np.isclose((table["purity"] * table["units"]).sum() / len(frame), want)


# purity -------------------------------------------------------------------------------------------------------------


def test_purity_and_nmi_by_their_definitions():
    rng = np.random.default_rng(0)
    rows = [(m, f"a{rng.integers(6)}", rng.integers(4)) for m in ("m", "n") for _ in range(20 if m == "m" else 40)]
    frame = frame_of(rows)
    labels = {f"a{i}": "xyz"[i % 3] for i in range(6)}
    found = purity(frame, labels, permutations=3).set_index(["module", "measure", "control"])["value"]
    want = {}
    for module, part in frame.groupby("module"):
        truth = part["adapter"].map(labels)
        want[module] = (
            part.groupby("cluster")["adapter"].apply(lambda a: a.map(labels).value_counts().iloc[0]).sum() / len(part),
            normalized_mutual_info_score(truth, part["cluster"]),
        )
        assert found[module, "purity", "units"] == pytest.approx(want[module][0])
        assert found[module, "nmi", "adapters"] == pytest.approx(want[module][1])
    for j, measure in enumerate(("purity", "nmi")):
        assert found["all", measure, "units"] == pytest.approx((want["m"][j] + 2 * want["n"][j]) / 3)


def test_a_planted_label_is_found_and_a_random_one_is_not():
    pool, labels = planted()
    frame = cluster_units(pool, 6)
    found = purity(frame, labels, seed=1).query("module == 'all'")
    assert found.query("measure == 'purity'")["value"].eq(1).all()
    assert (found["p"] < 0.02).all()
    assert (found["mean"] < 0.8).all()
    assert (found["low"] <= found["mean"]).all()
    assert (found["mean"] <= found["high"]).all()
    assert (found["high"] < found["value"]).all()
    rng = np.random.default_rng(3)
    nonsense = dict(zip(labels, rng.permutation(list(labels.values())), strict=True))
    against = purity(frame, nonsense, seed=1).query("module == 'all' and control == 'adapters'")
    assert (against["p"] > 0.05).all()


def test_only_the_adapters_control_sees_through_units_that_merely_keep_to_their_adapter():
    """Every adapter a cluster of its own: no label is special, yet shuffling over units says each is."""
    frame = frame_of([("m", f"a{i}", i // 2) for i in range(12) for _ in range(6)])
    frame["cluster"] = frame["adapter"].str[1:].astype(int)
    labels = {f"a{i}": "xyz"[i % 3] for i in range(12)}
    found = purity(frame, labels).query("module == 'all'").set_index(["measure", "control"])
    assert found.loc[("purity", "adapters"), "p"] == 1.0
    assert found.loc[("purity", "adapters"), "mean"] == 1.0
    assert found.loc[("purity", "units"), "p"] < 0.02


def test_the_p_value_of_a_label_without_meaning_is_uniform():
    pool = stack(12, 2, modules=("m",))
    frame = cluster_units(pool, 5)
    rng = np.random.default_rng(0)
    names = pool.names
    values = []
    for seed in range(60):
        labels = dict(zip(names, rng.permutation(["x", "y", "z"] * 4), strict=True))
        found = purity(frame, labels, permutations=19, seed=seed).query("module == 'm' and measure == 'nmi'")
        values.append(found.set_index("control")["p"]["adapters"])
    assert 0.35 < np.mean(values) < 0.65
    assert np.mean(np.array(values) <= 0.1) < 0.25


def test_purity_is_seeded_and_one_label_or_lonely_clusters_are_no_surprise():
    frame = cluster_units(stack(), 4)
    labels = {f"a{i}": "xy"[i % 2] for i in range(5)}
    first, second, third = (purity(frame, labels, permutations=20, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert not first["mean"].equals(third["mean"])
    one = purity(frame, dict.fromkeys(labels, "x"), permutations=5)
    assert (one["p"] == 1).all()
    assert one.query("measure == 'purity'")["value"].eq(1).all()
    lonely = purity(cluster_units(stack(), 99), labels, permutations=5)
    assert (lonely.query("measure == 'purity'")["p"] == 1).all()


def test_purity_refuses_adapters_without_a_label():
    frame = cluster_units(stack(), 4)
    with pytest.raises(SelectionError, match="2 of 5 adapters have no label, such as a3"):
        purity(frame, {"a0": "x", "a1": "x", "a2": "y"})
    with pytest.raises(SelectionError, match="permutations is 0"):
        purity(frame, {f"a{i}": "x" for i in range(5)}, permutations=0)


# unit_map -----------------------------------------------------------------------------------------------------------


def test_the_flat_map_is_scikit_learn_s_pca():
    pool = stack()
    for form in ("raw", "balanced", "svd"):
        units = canonical(pool.modules["m"], form)
        want = PCA(2).fit_transform(features(units).numpy())
        found = unit_map(pool, "m", canonical=form)
        assert list(found) == ["x", "y", "adapter", "unit", "norm"]
        got = found[["x", "y"]].to_numpy()
        assert np.allclose(np.abs(got), np.abs(want), atol=1e-4)
        assert np.allclose(pdist(got), pdist(want), atol=1e-4)


def test_the_map_of_outer_is_the_pca_of_the_matrices():
    pool = stack()
    units = pool.modules["m"]
    want = PCA(2).fit_transform(torch.einsum("oj,ji->joi", units.B, units.A).flatten(1).numpy())
    got = unit_map(pool, "m", canonical="outer")[["x", "y"]].to_numpy()
    assert np.allclose(np.abs(got), np.abs(want), atol=1e-3)


@pytest.mark.parametrize("form", CANONICAL)
def test_a_map_of_many_units_has_the_same_two_directions(form, monkeypatch):
    pool = stack(n=9)
    want = unit_map(pool, "m", canonical=form)
    monkeypatch.setattr(clusters, "_EXACT", 10)
    monkeypatch.setattr(clusters, "inner_products", lambda *a, **k: pytest.fail("R × R"))
    found = unit_map(pool, "m", canonical=form)
    np.testing.assert_allclose(found[["x", "y"]], want[["x", "y"]], atol=1e-4)
    same = Stack.of([Adapter(f"a{i}", {"m": Factors(torch.ones(2, 1), torch.ones(1, 3))}) for i in range(12)])
    assert (unit_map(same, "m", canonical=form)[["x", "y"]] == 0).all(axis=None)


def test_tsne_is_seeded_and_keeps_planted_neighbours():
    pool, labels = planted(n=18)
    first, second = (unit_map(pool, "m", method="tsne", seed=0) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    kind = first["adapter"].map(labels) + first["unit"].astype(str)
    points = first[["x", "y"]].to_numpy()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(len(points), np.inf))
    assert np.mean(kind.to_numpy()[distance.argmin(1)] == kind) > 0.9


def test_maps_of_one_or_two_units_and_refusals():
    one = Stack.of([Adapter("a", {"m": Factors(torch.ones(2, 1), torch.ones(1, 3))})])
    for method in ("pca", "tsne"):
        assert unit_map(one, "m", method=method)[["x", "y"]].to_numpy().tolist() == [[0.0, 0.0]]
    with pytest.raises(MergeError, match="'umap'"):
        unit_map(one, "m", method="umap")
    with pytest.raises(MergeError, match="no module 'x'"):
        unit_map(one, "x")
