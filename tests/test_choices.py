"""Analysis of variance against sums of squares and dense algebra; the winner's curse by enumeration and in a simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from workbench.choices import importance, picked
from workbench.errors import WorkbenchError
from workbench.stats import holm


def design(rng, rows=400, tasks=12, levels=(3, 4, 2), **effects):
    """A random search: every row draws its options and its task; a is worth 0.1 a level, tasks differ by much."""
    frame = pd.DataFrame({name: rng.integers(0, n, rows) for name, n in zip("abc", levels, strict=True)})
    frame["task"], frame["seed"] = rng.integers(0, tasks, rows), rng.integers(0, 2, rows)
    hard = rng.normal(0, 1, (tasks, 2))[frame.task, frame.seed]
    frame["accuracy"] = hard + sum(size * frame[name] for name, size in effects.items()) + rng.normal(0, 0.3, rows)
    return frame


def residual(y, *columns):
    """Residual sum of squares of y on the dummies of the columns, by float64 least squares."""
    X = np.column_stack([np.ones(len(y)), *(pd.get_dummies(c, dtype=float).to_numpy() for c in columns)])
    return float(((y - X @ np.linalg.lstsq(X, y, rcond=None)[0]) ** 2).sum()), np.linalg.matrix_rank(X)


def test_two_balanced_factors_against_the_closed_form():
    rng, (na, nb, n) = np.random.default_rng(0), (3, 4, 5)
    y = rng.normal(size=(na, nb, n)) + np.arange(na)[:, None, None]
    a, b, _ = np.indices(y.shape)
    frame = pd.DataFrame({"a": [f"level {i}" for i in a.ravel()], "b": b.ravel() * 10, "loss": y.ravel()})
    out = importance(frame, ["a", "b"], "loss", block=(), interactions=True).set_index("term")
    by_a, by_b, cell = y.mean((1, 2)), y.mean((0, 2)), y.mean(2)
    want = {
        "a": nb * n * ((by_a - y.mean()) ** 2).sum(),
        "b": na * n * ((by_b - y.mean()) ** 2).sum(),
        "a × b": n * ((cell - by_a[:, None] - by_b + y.mean()) ** 2).sum(),
        "residual": ((y - cell[:, :, None]) ** 2).sum(),
    }
    assert out.sum_of_squares.to_dict() == pytest.approx(want)
    assert out.df.to_dict() == {"a": 2, "b": 3, "a × b": 6, "residual": 48}
    assert out.share.sum() == pytest.approx(1)  # balanced
    mse = want["residual"] / 48
    for term, df in (("a", 2), ("b", 3), ("a × b", 6)):
        row, f = out.loc[term], want[term] / df / mse
        assert (row.F, row.p) == pytest.approx((f, reference.f.sf(f, df, 48)))
        assert row.partial_eta2 == pytest.approx(want[term] / (want[term] + want["residual"]))
        assert row.omega2 == pytest.approx((want[term] - df * mse) / (want[term] + (60 - df) * mse))
    tested = out.drop("residual")
    np.testing.assert_allclose(tested.holm, holm(tested.p))
    assert out.index[0] == "a"
    assert out.index[-1] == "residual"
    assert out.loc["residual", ["F", "p", "holm", "partial_eta2", "omega2"]].isna().all()


def test_balanced_blocks_come_out_of_the_residual():
    """Randomised blocks: the block's sum of squares is neither a factor's nor the residual's."""
    y = np.random.default_rng(1).normal(size=(3, 2, 8)) + 5 * np.arange(8)
    a, b, t = np.indices(y.shape)
    frame = pd.DataFrame({"a": a.ravel(), "b": b.ravel(), "task": t.ravel(), "seed": 0, "accuracy": y.ravel()})
    out = importance(frame, ["a", "b"]).set_index("term")
    inside = y - y.mean((0, 1))
    by_a, by_b = inside.mean((1, 2)), inside.mean((0, 2))
    rest = ((inside - by_a[:, None, None] - by_b[None, :, None]) ** 2).sum()
    want = {"a": 16 * (by_a**2).sum(), "b": 24 * (by_b**2).sum(), "residual": rest}
    assert out.sum_of_squares.to_dict() == pytest.approx(want)
    assert out.df.to_dict() == {"a": 2, "b": 1, "residual": 48 - 8 - 3}
    assert out.share.to_dict() == pytest.approx({name: ss / (inside**2).sum() for name, ss in want.items()})


def test_one_factor_and_no_block_is_f_oneway():
    frame = design(np.random.default_rng(2), a=0.1)
    row = importance(frame, ["a"], block=()).iloc[0]
    want = reference.f_oneway(*(part.accuracy for _, part in frame.groupby("a")))
    assert (row.F, row.p, row.holm) == pytest.approx((want.statistic, want.pvalue, want.pvalue))


@pytest.mark.parametrize("rows", [90, 400])
def test_a_search_drawn_at_random_against_dense_algebra(rows):
    """Type II by differences of residual sums of squares: with the term, and without it and all that contains it."""
    frame = design(np.random.default_rng(rows), rows=rows, a=0.1)
    y, task = frame.accuracy.to_numpy(), frame.task.astype(str) + "/" + frame.seed.astype(str)
    cells = {"a": frame.a, "b": frame.b, "c": frame.c, "a × b": frame.a * 10 + frame.b}
    out = importance(frame.sample(frac=1, random_state=0), ["a", "b", "c"], interactions=[("a", "b")]).set_index("term")
    full, rank = residual(y, task, *cells.values())
    assert out.loc["residual", "sum_of_squares"] == pytest.approx(full)
    assert out.loc["residual", "df"] == rows - rank
    for term, others in {"a": "bc", "b": "ac", "c": ["a × b"], "a × b": "abc"}.items():
        without, low = residual(y, task, *(cells[name] for name in others))
        with_it, high = residual(y, task, cells[term], *(cells[name] for name in others))
        assert out.loc[term, "sum_of_squares"] == pytest.approx(without - with_it)
        assert out.loc[term, "df"] == high - low
        assert out.loc[term, "F"] == pytest.approx((without - with_it) / (high - low) / (full / (rows - rank)))
    plain = importance(frame, ["a", "b", "c"]).set_index("term")
    turned = importance(frame, ["c", "a", "b"]).set_index("term")
    twice = importance(frame, ["a", "b", "c"], interactions=[("b", "a"), ("a", "b")]).set_index("term")
    pd.testing.assert_frame_equal(twice, out)
    pd.testing.assert_frame_equal(plain.sort_index(), turned.sort_index())


def test_without_an_effect_p_is_uniform_and_omega2_about_zero():
    rng = np.random.default_rng(3)
    found = [importance(design(rng, rows=120, tasks=5, a=1.0), ["a", "b", "c"]).set_index("term") for _ in range(25)]
    for name in "bc":
        assert reference.kstest([out.p[name] for out in found], "uniform").pvalue > 0.01
        assert abs(np.mean([out.omega2[name] for out in found])) < 0.01
    assert all(out.index[0] == "a" and out.holm["a"] < 1e-6 for out in found)


def test_a_design_that_cannot_tell_is_refused():
    frame = design(np.random.default_rng(6), a=0.1)
    with pytest.raises(WorkbenchError, match="no column 'method'"):
        importance(frame, ["method"])
    with pytest.raises(WorkbenchError, match="1 of 400 rows have no b"):
        importance(frame.assign(b=frame.b.where(frame.index != 5)), ["a", "b"])
    with pytest.raises(WorkbenchError, match="factor 'c' has one level in all 400 rows"):
        importance(frame.assign(c=1), ["a", "c"])
    with pytest.raises(WorkbenchError, match="factor 'kind' never changes within a block of task, seed"):
        importance(frame.assign(kind=frame.task % 3), ["a", "kind"])
    with pytest.raises(WorkbenchError, match="factor 'b' settles factor 'twin'"):
        importance(frame.assign(twin=frame.b // 2), ["a", "b", "twin"])
    with pytest.raises(WorkbenchError, match="1 of 12 combinations of 'a' and 'b' never occur"):
        importance(frame[(frame.a != 2) | (frame.b != 3)], ["a", "b"], interactions=True)
    assert len(importance(frame[(frame.a != 2) | (frame.b != 3)], ["a", "b"])) == 3
    latin = pd.DataFrame(
        {"a": [0, 0, 1, 1] * 5, "b": [0, 1, 0, 1] * 5, "c": [0, 1, 1, 0] * 5, "accuracy": np.arange(20.0)}
    )
    with pytest.raises(WorkbenchError, match=r"cannot tell a, b, c, a × b apart: its 5 columns have rank 4"):
        importance(latin, ["a", "b", "c"], block=(), interactions=[("a", "b")])
    with pytest.raises(WorkbenchError, match="no variation left"):
        importance(frame.assign(accuracy=frame.a * 0.1), ["a", "b"])
    with pytest.raises(WorkbenchError, match="no variation left"):
        importance(frame.assign(accuracy=0.5), ["a", "b"])
    with pytest.raises(WorkbenchError, match="no variation left"):
        importance(pd.DataFrame({"a": [0, 1, 2], "accuracy": [0.1, 0.5, 0.2]}), ["a"], block=())
    for factors in ([], ["a", "a"], ["a", "task"]):
        with pytest.raises(WorkbenchError, match="expected different columns"):
            importance(frame, factors)
    for pairs in ([("a", "z")], [("a", "a")], [("a", "b", "c")]):
        with pytest.raises(WorkbenchError, match="interactions are pairs of the factors a, b, c"):
            importance(frame, ["a", "b", "c"], interactions=pairs)


def search(values, operations):
    """A table of values (recipes, tasks), its tasks of these operations."""
    values = np.asarray(values, float)
    recipe, task = np.indices(values.shape)
    return pd.DataFrame(
        {
            "recipe": [f"r{i}" for i in recipe.ravel()],
            "task": task.ravel(),
            "operation": np.array(list(operations))[task.ravel()],
            "accuracy": values.ravel(),
        }
    )


def test_two_halves_by_hand():
    """Operation a (tasks 0 and 1) prefers r0, operation b (task 2) prefers r1; each is judged by the other."""
    out = picked(search([[0.9, 0.7, 0.1], [0.5, 0.5, 0.7], [0.1, 0.3, 0.1]], "aab"), splits=50)
    assert set(out.pick) == {"r0", "r1"}
    for pick, shown, kept, best, rank in (("r0", 0.3, -0.2, 0.4, 2.5), ("r1", 0.4, 0.0, 0.3, 2)):
        rows = out[out.pick == pick]
        assert len(rows) > 5
        np.testing.assert_allclose(rows[["shown", "kept", "best", "rank"]], [[shown, kept, best, rank]] * len(rows))


def test_the_best_of_many_alike_shows_luck_and_keeps_nothing():
    rng = np.random.default_rng(0)
    tables = [search(rng.normal(size=(30, 24)), np.repeat(list("abcdefgh"), 3)) for _ in range(40)]
    means = pd.DataFrame([picked(table, splits=40).drop(columns="pick").mean() for table in tables])
    expected = np.sqrt(1 / 12) * np.mean(np.max(rng.normal(size=(20_000, 30)), axis=1))  # E of the largest of 30 means
    assert means.shown.mean() == pytest.approx(expected, rel=0.05)
    assert abs(means.kept.mean()) < 3 * means.kept.std() / np.sqrt(len(means))
    assert means["rank"].mean() == pytest.approx(15.5, abs=1.5)


def test_a_true_winner_keeps_what_it_shows():
    rng = np.random.default_rng(1)
    worth = np.linspace(0, 5, 10)[:, None]
    hard = 10 * np.repeat([0, 1, 2, 3, 4, 5], 2)
    out = picked(search(worth - hard + rng.normal(0, 0.05, (10, 12)), np.repeat(list("abcdef"), 2)))
    assert set(out.pick) == {"r9"}
    assert out.kept.mean() == pytest.approx(2.5, abs=0.05)
    assert out.shown.mean() == pytest.approx(2.5, abs=0.05)
    assert (out["rank"] == 1).all()
    pd.testing.assert_frame_equal(out, picked(search(worth - hard, np.repeat(list("abcdef"), 2))), atol=0.1)


def test_seeds_of_a_task_are_one_value_and_the_seed_draws_the_halves():
    rng = np.random.default_rng(2)
    one = search(rng.normal(size=(4, 10)), "abcdefghij")
    both = pd.concat([one.assign(seed=0, accuracy=one.accuracy - 1), one.assign(seed=1, accuracy=one.accuracy + 1)])
    pd.testing.assert_frame_equal(picked(one), picked(both.sample(frac=1, random_state=0)))
    assert not picked(one, seed=1).equals(picked(one))


def test_what_cannot_be_picked_is_said():
    table = search(np.eye(3), "abc")
    with pytest.raises(WorkbenchError, match="no column 'loss'"):
        picked(table, value="loss")
    with pytest.raises(WorkbenchError, match=r"1 of 9 pairs of recipe and task have no accuracy, such as 'r1' on 2"):
        picked(table[(table.recipe != "r1") | (table.task != 2)])
    with pytest.raises(WorkbenchError, match="1 of recipe and 3 of operation"):
        picked(table[table.recipe == "r0"])
    with pytest.raises(WorkbenchError, match="3 of recipe and 1 of operation"):
        picked(table.assign(operation="a"))
