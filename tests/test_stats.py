"""The cluster bootstrap against enumeration, closed forms and its coverage in a simulation; pairs of recipes; the report
against scipy's permutation test and Holm by hand.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from workbench.errors import WorkbenchError
from workbench.stats import _sign_flip, bootstrap, paired, report


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


RECIPES = (("ties", "evaluation", 10, "{}"), ("ties", "random", 10, "{}"), ("lego", "random", 5, '{"rank": 4}'))


def compared(operations=7, per=2, seeds=(0, 1), sizes=(10, 80), lift=0.1, controls=("sigma",), rng=0):
    """As from `compare`: three recipes, their controls and two baselines; each operation shifts all of its rows."""
    rng = np.random.default_rng(rng)
    effect = rng.normal(0, 0.1, operations)
    rows = []
    for o, t, seed, n in itertools.product(range(operations), range(per), seeds, sizes):
        same = {"task": f"task {o}-{t}", "operation": f"op{o}", "kind": f"kind{o % 2}", "seed": seed, "n_train": n}
        blank = {"select": "", "k": 0, "options": "{}", "control": ""}
        for name in ("zero-shot", "new adapter"):
            rows.append({**same, "recipe": name, "method": name, **blank, "accuracy": rng.uniform()})
        for i, (method, select, k, options) in enumerate(RECIPES):
            what = {"method": method, "select": select, "k": k, "options": options}
            label = f"{method}, {select} {k}"
            sham = rng.uniform()
            gain = i * lift + effect[o] + rng.normal(0, 0.05)
            rows.append({**same, "recipe": label, **what, "control": "", "accuracy": sham + gain})
            for shift, control in enumerate(controls):
                named = {"recipe": f"{label}, random ({control})", "control": control, "accuracy": sham + shift}
                rows.append({**same, **what, **named})
    return pd.DataFrame(rows).sample(frac=1, random_state=1, ignore_index=True)


def holm(p):
    """By hand: the i-th smallest of m times m − i + 1, never less than those before, at most 1."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return stepped[np.argsort(order)]


def test_a_report_is_the_paired_differences_with_scipy_s_p_and_holm_by_hand():
    frame = compared()
    out = report(frame)
    assert len(out) == 5 * 2
    assert set(out.recipe) == {"zero-shot", "new adapter", "ties, evaluation 10", "ties, random 10", "lego, random 5"}
    means = bootstrap(frame[frame.control == ""], ["n_train", "recipe"]).set_index(["n_train", "recipe"])
    for row in out.to_dict("records"):
        assert dict(means.loc[(row["n_train"], row["recipe"])]) == {name: row[name] for name in means.columns}
        part = frame[frame.n_train == row["n_train"]]
        for name, other in (("control", f"{row['recipe']}, random (sigma)"), ("new", "new adapter")):
            if (name == "control" and row["recipe"] in ("zero-shot", "new adapter")) or row["recipe"] == other:
                assert np.isnan([row[f"{name}_{c}"] for c in ("difference", "low", "high", "p", "holm")]).all()
                assert row[f"{name}_rows"] == 0
                continue
            (want,) = paired(part, row["recipe"], other).to_dict("records")
            got = [row[f"{name}_{c}"] for c in ("difference", "low", "high", "rows")]
            assert got == pytest.approx([want[c] for c in ("mean", "low", "high", "rows")])
            here, there = (part[part.recipe == r].groupby("operation").accuracy.mean() for r in (row["recipe"], other))
            scipys = reference.permutation_test(
                (here - there,), np.mean, permutation_type="samples", n_resamples=np.inf
            ).pvalue
            assert row[f"{name}_p"] == pytest.approx(scipys)
    for name, tests in (("control", 6), ("new", 8)):
        known = out[out[f"{name}_p"].notna()]
        assert len(known) == tests
        np.testing.assert_allclose(known[f"{name}_holm"], holm(known[f"{name}_p"]))
    assert out.control_p.min() == 2 / 2**7  # the gain of 0.2 shows in all seven operations: the least p that there is
    pd.testing.assert_frame_equal(out, report(frame))


def test_unequal_clusters_are_flipped_with_the_weight_that_they_have_in_the_mean():
    frame = compared(operations=6, seeds=(0,), sizes=(10,))
    frame = frame[~frame.task.isin(["task 0-1", "task 3-1", "task 4-1"])]
    (row,) = report(frame)[lambda t: t.recipe == "ties, evaluation 10"].to_dict("records")
    here, there = (
        frame[frame.recipe == "ties, evaluation 10" + end].set_index("task") for end in ("", ", random (sigma)")
    )
    sums = (here.accuracy - there.accuracy).groupby(here.operation).sum().to_numpy()
    means = np.array([np.dot(signs, sums) / 9 for signs in itertools.product((-1, 1), repeat=6)])
    assert row["control_rows"] == 9
    assert row["control_difference"] == pytest.approx(sums.sum() / 9)
    assert row["control_p"] == pytest.approx((abs(means) >= abs(sums.sum() / 9) - 1e-12).mean())
    assert row["control_p"] > 2 / 2**6


def test_many_clusters_are_flipped_at_random():
    """Eleven clusters have 1,024 flips up to sign: exact, or 1,000 drawn; eighty only drawn, never zero."""
    frame = compared(operations=11, per=1, seeds=(0,), sizes=(10,), lift=0.02)
    exact, drawn = (report(frame, permutations=n) for n in (1024, 1000))
    assert 0 < abs(exact.control_p - drawn.control_p).max() < 0.06
    assert (exact.control_p * 1024).dropna().tolist() == (exact.control_p * 1024).dropna().round().tolist()
    assert (drawn.control_p * 1001).dropna().tolist() == pytest.approx((drawn.control_p * 1001).dropna().round())
    assert not report(frame, permutations=1000, seed=1).control_p.equals(drawn.control_p)
    many = report(compared(operations=80, per=1, seeds=(0,), sizes=(10,), lift=1.0), permutations=500)
    assert many.control_p.min() == 1 / 501
    state = np.random.get_state()[1].copy()
    report(frame, permutations=500)
    assert np.array_equal(state, np.random.get_state()[1])


def simulated(frame, rounds, rng, mean, spread, noise):
    """Rounds of a comparison in one table: each operation gains its own amount, each row has its own noise."""
    many = pd.concat([frame.assign(round=i) for i in range(rounds)], ignore_index=True)
    each = many["round"].astype(str) + many.operation
    gains = dict(zip(each.unique(), rng.normal(mean, spread, each.nunique()), strict=True))
    many["accuracy"] = 0.5 + (many.control == "") * each.map(gains) + rng.normal(0, noise, len(many))
    return many.assign(row=many.task + many.seed.astype(str))


def test_p_is_uniform_where_there_is_no_difference():
    """Twelve operations of correlated tasks: rejected as often as said; tests by rows reject far more often."""
    frame = compared(operations=12, per=3, seeds=(0,), sizes=(10,))
    many = simulated(frame[frame.method == "lego"], 150, np.random.default_rng(4), 0, 0.2, 0.05)
    settings = {"by": ["round"], "reference": "", "draws": 10, "permutations": 2048}
    by_cluster, by_row = (report(many, cluster=c, **settings).control_p for c in ("operation", "row"))
    assert len(by_cluster) == 150
    assert reference.kstest(by_cluster, "uniform").pvalue > 0.01
    assert (by_row < 0.05).mean() > 0.15


def test_the_difference_s_interval_covers_the_truth_whatever_the_seeds():
    """Operations differ in what a recipe gains; four seeds a task are no more operations than one."""
    frame = compared(operations=16, per=2, seeds=(0, 1, 2, 3), sizes=(10,))
    many = simulated(frame[frame.method == "lego"], 120, np.random.default_rng(5), 0.1, 0.2, 0.1)
    settings = {"by": "round", "reference": "", "draws": 300, "permutations": 10}
    right, narrow = (report(many, cluster=c, **settings) for c in ("operation", "row"))
    assert 0.86 <= ((right.control_low <= 0.1) & (right.control_high >= 0.1)).mean() <= 0.99
    assert ((narrow.control_low <= 0.1) & (narrow.control_high >= 0.1)).mean() < 0.7


def test_repeating_a_seed_changes_neither_interval_nor_p():
    once = compared(seeds=(0,))
    more = pd.concat([once.assign(seed=seed) for seed in range(4)])
    a, b = report(once), report(more)
    columns = [c for c in a if c not in ("rows", "control_rows", "new_rows")]
    pd.testing.assert_frame_equal(a[columns], b[columns])
    assert (b.rows == 4 * a.rows).all()


def test_controls_are_found_by_what_a_recipe_is_and_not_by_its_label():
    frame = compared()
    want = report(frame)
    renamed = frame.copy()
    renamed.loc[renamed.control == "sigma", "recipe"] = (
        "control of " + renamed.method + renamed["select"] + renamed.options
    )
    pd.testing.assert_frame_equal(report(renamed), want)
    sham = frame.control == "sigma"
    holed = frame.assign(skip=np.where(sham, np.nan, 0), own=np.where(sham, None, False), k=frame.k.astype(float))
    holed = holed.assign(control=frame.control.where(sham).astype("category"), tune=np.where(sham, None, "{}"))
    pd.testing.assert_frame_equal(report(holed), want)
    holed["options"] = holed.options.where(holed.options != "{}", None)
    pd.testing.assert_frame_equal(report(holed), want)


@pytest.mark.parametrize(
    ("column", "value"), [("skip", 2), ("own", True), ("tune", '{"density": [0.1, 0.5]}'), ("k", 11)]
)
def test_recipes_that_differ_in_one_thing_have_their_own_controls(column, value):
    frame = compared().assign(skip=0, own=False, tune="{}")
    twin = frame[frame.method == "lego"].copy()
    twin[column] = value
    twin["recipe"] = "twin " + twin.recipe
    twin.loc[twin.control == "sigma", "accuracy"] -= 1
    out = report(pd.concat([frame, twin])).set_index(["n_train", "recipe"]).control_difference
    for n in (10, 80):
        assert out[n, "twin lego, random 5"] == pytest.approx(out[n, "lego, random 5"] + 1)
    lone = report(pd.concat([frame, twin[twin.control == ""]])).set_index("recipe").loc["twin lego, random 5"]
    assert lone.control_rows.tolist() == [0, 0]
    assert lone.control_p.isna().all()


def test_other_controls_references_groups_and_leaving_out():
    frame = compared(controls=("sigma", "sigma but own"))
    sigma, own = (report(frame, control=control) for control in ("sigma", "sigma but own"))
    np.testing.assert_allclose(own.control_difference, sigma.control_difference - 1)
    assert not [c for c in report(frame, control="") if c.startswith("control")]
    bare = report(frame.drop(columns=["method", "select", "k", "options"]).assign(**dict.fromkeys(["method", "select", "k", "options"], "")).loc[lambda t: t.control == ""].iloc[:0:-1].drop_duplicates(["task", "seed", "n_train"]), control="", reference="")  # fmt: skip
    assert list(bare.columns) == ["n_train", "recipe", "mean", "low", "high", "rows", "clusters"]
    zero = report(frame, reference="zero-shot", by=()).set_index("recipe")
    (want,) = paired(frame, "new adapter", "zero-shot").to_dict("records")
    assert zero.loc["new adapter", "new_difference"] == pytest.approx(want["mean"])
    assert (zero.loc["new adapter", "new_low"], zero.loc["new adapter", "new_rows"]) == (want["low"], 56)
    kinds = report(frame, by=["kind", "n_train"])
    assert len(kinds) == 20
    assert set(kinds.clusters) == {3, 4}
    alone = report(frame[frame.kind == "kind1"], by=["kind", "n_train"]).set_index(["n_train", "recipe"])
    whole = kinds[kinds.kind == "kind1"].set_index(["n_train", "recipe"])
    np.testing.assert_allclose(alone.control_low, whole.control_low)
    np.testing.assert_allclose(alone.new_p, whole.new_p)
    assert (whole.control_holm.dropna() >= alone.control_holm.dropna()).all()  # twice as many tests
    single = report(frame[frame.operation == "op1"], by="n_train")
    assert single.control_p.isna().all()
    assert single.control_difference.notna().sum() == 6


def test_what_cannot_be_reported_is_said():
    frame = compared()
    with pytest.raises(WorkbenchError, match="no column 'method', 'options'"):
        report(frame.drop(columns=["method", "options"]))
    with pytest.raises(WorkbenchError, match="no column 'seed'"):
        report(frame.drop(columns="seed"))
    with pytest.raises(WorkbenchError, match="no column 'stratum'"):
        report(frame, by=["stratum"])
    with pytest.raises(WorkbenchError, match="1 of 448 rows have no accuracy"):
        report(frame.assign(accuracy=frame.accuracy.where(frame.index != 3)))
    with pytest.raises(WorkbenchError, match="no row has control 'norm'; there are 'sigma'; control='' leaves"):
        report(frame, control="norm")
    with pytest.raises(WorkbenchError, match=r"no row has recipe 'old adapter'; there are .*'zero-shot'; reference=''"):
        report(frame, reference="old adapter")
    with pytest.raises(WorkbenchError, match="no recipe without a control"):
        report(frame[frame.control == "sigma"])
    for part in (frame[frame.control == ""], frame[frame.control == "sigma"]):
        again = pd.concat([frame, part.iloc[[0]], part.iloc[[0]]])
        where = f"task {part.task.iloc[0]}, seed {part.seed.iloc[0]}, n_train {part.n_train.iloc[0]}"
        with pytest.raises(WorkbenchError, match=f"3 rows are of .* with {where}, expected one; .* in `by`"):
            report(again)
        again["draw"] = np.maximum(0, np.arange(len(again)) - len(frame) + 1)
        assert len(report(again, by=["n_train", "draw"], reference="")) > len(report(frame)) - 1
    with pytest.raises(WorkbenchError, match=r"5 rows are of .* with task"):  # five labels of one recipe
        report(frame.assign(method="ties", select="random", k=10, options="{}"))
    apart = frame[(frame.seed == 0) == (frame.control == "sigma")]
    with pytest.raises(WorkbenchError, match="shares task, seed, n_train with a row of control 'sigma': no pairs"):
        report(apart, reference="")
    with pytest.raises(WorkbenchError, match="a row of recipe 'new adapter': no pairs"):
        report(frame[(frame.seed == 0) == (frame.recipe == "new adapter")], control="")


def test_the_optimism_of_a_picked_adapter_is_a_bootstrap():
    """Twenty adapters alike in truth: the best of them on eight examples looks better than it is, by the mean maximum."""
    rng, tasks, adapters, shown = np.random.default_rng(0), 200, 20, 8
    frame = pd.DataFrame({"task": np.repeat(np.arange(tasks), adapters), "operation": np.repeat(np.arange(tasks) % 40, adapters)})  # fmt: skip
    frame["apparent"] = rng.binomial(shown, 0.5, len(frame)) / shown
    frame["honest"] = rng.binomial(400, 0.5, len(frame)) / 400
    picked = frame.loc[frame.groupby("task").apparent.idxmax()]
    (row,) = bootstrap(picked.assign(optimism=picked.apparent - picked.honest), (), "optimism").to_dict("records")
    below = reference.binom(shown, 0.5).cdf(np.arange(shown)) ** adapters
    expected = (shown - below.sum()) / shown - 0.5  # E max = Σ P(max > i)
    assert row["low"] < expected < row["high"]
    assert row["low"] > 0.25
    assert (row["rows"], row["clusters"]) == (tasks, 40)


@pytest.mark.parametrize("seed", range(20))
def test_single_precision_loses_no_arrangement(seed):
    """The arrangement observed is always among those counted: p is at least one in 2^(clusters − 1)."""
    values = np.random.default_rng(seed).uniform(0.1, 1.0, 28).astype(np.float32)
    pairs = pd.DataFrame({"operation": list("abcdefg") * 4, "difference": values})
    assert _sign_flip(pairs, "operation", 20_000, 0) == 2**-6
