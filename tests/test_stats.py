"""The cluster bootstrap against enumeration, closed forms and its coverage in a simulation; pairs of recipes."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.stats import bootstrap, paired


def table(values, clusters, **columns):
    return pd.DataFrame({"recipe": "r", "accuracy": values, "operation": clusters, **columns})


def interval(frame, by=("recipe",), **settings):
    (row,) = bootstrap(frame, by, **settings).to_dict("records")
    return row


def test_one_cluster_has_no_interval():
    row = interval(table([0.1, 0.5, 0.9], "a"))
    assert row["mean"] == pytest.approx(0.5)
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert (row["rows"], row["clusters"]) == (3, 1)


def test_equal_values_have_an_interval_of_no_width():
    row = interval(table([0.3] * 6, list("aabbbc")))
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([0.3] * 3)


def test_two_clusters_by_enumeration():
    """Clusters {1, 1, 1} and {0}: drawn with replacement the mean is 1, 0 (¼ each) or 3/4 (½)."""
    frame = table([1.0, 1.0, 1.0, 0.0], list("aaab"))
    row = interval(frame, level=0.95)
    assert (row["mean"], row["low"], row["high"]) == (0.75, 0.0, 1.0)
    half = interval(frame, level=0.4)  # quantiles 0.3 and 0.7 lie within the middle half
    assert (half["low"], half["high"]) == (0.75, 0.75)
    assert row["clusters"] == 2


@given(
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=5), min_size=2, max_size=4),
    st.sampled_from([0.5, 0.8, 0.95]),
)
def test_every_draw_enumerated(groups, level):
    """The quantiles of all nⁿ equally likely resamplings, against 20,000 draws of them."""
    values = [v for group in groups for v in group]
    names = [i for i, group in enumerate(groups) for _ in group]
    row = interval(table(values, names), draws=20_000, level=level)
    means = sorted(
        sum(sum(groups[i]) for i in draw) / sum(len(groups[i]) for i in draw)
        for draw in itertools.product(range(len(groups)), repeat=len(groups))
    )
    assert row["mean"] == pytest.approx(sum(values) / len(values))
    for got, share in ((row["low"], (1 - level) / 2), (row["high"], (1 + level) / 2)):
        low, high = np.quantile(means, [max(0, share - 0.02), min(1, share + 0.02)], method="inverted_cdf")
        assert low - 1e-9 <= got <= high + 1e-9


def test_coverage_where_tasks_of_one_operation_go_together():
    """Twenty operations, each with its own effect, twelve tasks each: ≈95 % by clusters, far fewer by rows."""
    rng, covered, naive, rounds = np.random.default_rng(0), 0, 0, 300
    clusters = np.repeat(np.arange(20), 12)
    for _ in range(rounds):
        values = 0.5 + rng.normal(0, 0.2, 20)[clusters] + rng.normal(0, 0.1, len(clusters))
        frame = table(values, clusters, row=np.arange(len(clusters)))
        by_cluster, by_row = (interval(frame, cluster=c, draws=400) for c in ("operation", "row"))
        covered += by_cluster["low"] <= 0.5 <= by_cluster["high"]
        naive += by_row["low"] <= 0.5 <= by_row["high"]
    assert 0.88 <= covered / rounds <= 0.98
    assert naive / rounds < 0.6


def test_groups_seeds_and_levels():
    rng = np.random.default_rng(1)
    frame = table(rng.random(40), np.arange(40) % 7)
    frame["recipe"] = np.where(np.arange(40) % 2, "x", "y")
    frame["n_train"] = np.where(np.arange(40) < 20, 10, 80)
    out = bootstrap(frame, ["recipe", "n_train"])
    assert list(out.columns) == ["recipe", "n_train", "mean", "low", "high", "rows", "clusters"]
    assert [tuple(r) for r in out[["recipe", "n_train"]].to_numpy()] == [("y", 10), ("x", 10), ("y", 80), ("x", 80)]
    for row in out.to_dict("records"):
        part = frame[(frame.recipe == row["recipe"]) & (frame.n_train == row["n_train"])]
        assert row["mean"] == pytest.approx(part.accuracy.mean())
        assert row["low"] < row["mean"] < row["high"]
        assert row["rows"] == len(part) == 10
        alone = interval(part, ["recipe", "n_train"])
        assert (alone["low"], alone["high"]) == (row["low"], row["high"])
    shuffled = bootstrap(frame.sample(frac=1, random_state=0), ["recipe", "n_train"])
    both = out.merge(shuffled, on=["recipe", "n_train"])
    np.testing.assert_allclose(both.low_x, both.low_y)
    pd.testing.assert_frame_equal(out, bootstrap(frame, ["recipe", "n_train"]))
    assert not np.allclose(out.low, bootstrap(frame, ["recipe", "n_train"], seed=1).low)
    narrow = bootstrap(frame, ["recipe", "n_train"], level=0.5)
    assert (narrow.high - narrow.low < out.high - out.low).all()
    state = np.random.get_state()[1].copy()
    whole = interval(frame, ())
    assert whole["mean"] == pytest.approx(frame.accuracy.mean())
    assert whole["rows"] == 40
    assert np.array_equal(state, np.random.get_state()[1])


def test_what_is_missing_is_said():
    frame = table([0.1, 0.2, 0.3], list("aab"))
    with pytest.raises(WorkbenchError, match="no column 'loss'; it has recipe, accuracy, operation"):
        bootstrap(frame, ["recipe"], "loss")
    with pytest.raises(WorkbenchError, match="no column 'kind', 'domain'"):
        bootstrap(frame, ["kind"], cluster="domain")
    for column in ("accuracy", "operation", "recipe"):
        holed = frame.astype({"accuracy": object})
        holed.loc[1, column] = None
        with pytest.raises(WorkbenchError, match=f"1 of 3 rows have no {column}"):
            bootstrap(holed, ["recipe"])


def runs():
    """Two tasks × two seeds × two sizes of three recipes; recipe b lacks one row, c is not asked for."""
    rows = []
    for (t, task), seed, n in itertools.product(enumerate(["p", "q", "r"]), (0, 1), (10, 80)):
        for recipe, value in (("a", 0.5 + 0.1 * t + 0.01 * seed), ("b", 0.4 + 0.001 * n / 10), ("c", 0.0)):
            if (recipe, task, seed, n) != ("b", "q", 1, 80):
                rows.append({"task": task, "seed": seed, "n_train": n, "recipe": recipe, "accuracy": value, "kind": "k" + str(t // 2), "operation": f"o{t}"})  # fmt: skip
    return pd.DataFrame(rows).sample(frac=1, random_state=3)


def test_pairs_are_of_one_task_seed_and_size():
    frame = runs()
    (row,) = paired(frame, "a", "b").to_dict("records")
    a, b = (frame[frame.recipe == r].set_index(["task", "seed", "n_train"]).accuracy for r in "ab")
    want = (a - b).dropna()
    assert len(want) == 11
    assert row["mean"] == pytest.approx(want.mean())
    assert row["rows"] == 11
    assert row["clusters"] == 3
    assert row["pair"] == "a − b"
    assert row["low"] < row["mean"] < row["high"]
    (turned,) = paired(frame, "b", "a").to_dict("records")
    assert turned["mean"] == pytest.approx(-row["mean"])
    assert turned["low"] == pytest.approx(-row["high"], abs=1e-9)


def test_pairs_per_group_and_by_another_cluster():
    out = paired(runs(), "a", "b", by=["n_train"]).set_index("n_train")
    assert out.rows.to_dict() == {10: 6, 80: 5}
    assert out.loc[10, "mean"] == pytest.approx(0.605 - 0.401)
    by_kind = paired(runs(), "a", "b", cluster="kind", draws=100)
    assert by_kind.clusters.tolist() == [2]
    other = runs().rename(columns={"recipe": "who", "accuracy": "loss"})
    assert paired(other, "a", "b", column="who", value="loss")["mean"][0] == paired(runs(), "a", "b")["mean"][0]


def test_pairing_gains_over_two_intervals():
    """A difference that is the same everywhere has no width, however much the tasks differ."""
    frame = runs()
    frame["accuracy"] = frame.operation.str[1].astype(int) * 0.3 + (frame.recipe == "a") * 0.05
    (row,) = paired(frame, "a", "c").to_dict("records")
    assert row["low"] == pytest.approx(0.05)
    assert row["high"] == pytest.approx(0.05)
    assert interval(frame[frame.recipe == "a"])["high"] - interval(frame[frame.recipe == "a"])["low"] > 0.3


def test_no_pair():
    frame = runs()
    with pytest.raises(WorkbenchError, match="no task and seed have both 'a' and 'z'; there are a, b, c"):
        paired(frame, "a", "z")
    apart = frame[((frame.recipe == "a") & (frame.seed == 0)) | ((frame.recipe == "b") & (frame.seed == 1))]
    with pytest.raises(WorkbenchError, match="no task and seed have both"):
        paired(apart, "a", "b")
    with pytest.raises(WorkbenchError, match="no column 'loss'"):
        paired(frame, "a", "b", value="loss")
    with pytest.raises(WorkbenchError, match="no column 'who'"):
        paired(frame, "a", "b", column="who")
    with pytest.raises(WorkbenchError, match="no column 'domain'"):
        paired(frame, "a", "b", cluster="domain")
    holed = frame.copy()
    holed.loc[holed.recipe == "b", "accuracy"] = np.nan
    with pytest.raises(WorkbenchError, match="rows have no accuracy"):
        paired(holed, "a", "b")
    assert len(paired(holed, "a", "c")) == 1
