"""Estimates against closed forms worked out by hand from a made-up benchmark, and medians of earlier runs."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from workbench.errors import WorkbenchError
from workbench.experiment import ZERO_SHOT, Recipe
from workbench.sweep import Experiment, Multitask, Notebook, Sweep
from workbench.sweep.estimate import estimate, total

ROOT = Path(__file__).parents[1]
EX = "5 examples of 100 tokens"  # 500 tokens
LINES = [  # area, work, way, each, seconds, adapters, rank
    ("population", f"12 candidates of 10 adapters of rank 16, {EX}", "bare model, same rows", 0.5, 6.0, None, None),
    ("population", f"12 candidates of 10 adapters of rank 16, {EX}", "all candidates in one pass", 1.0, 12.0, 10, None),
    ("population", f"12 candidates of 20 adapters of rank 16, {EX}", "all candidates in one pass", 1.5, 18.0, 20, None),
    ("population", f"20 adapters of rank 16, {EX}", "all adapters side by side", 0.65, 13.0, None, None),
    ("coefficients", f"10 adapters of rank 16 to 64, {EX}", "one stack", 5.0, 5.0, 10, None),
    ("coefficients", f"30 adapters of rank 16 to 64, {EX}", "one stack", 10.0, 10.0, 30, None),
    ("coefficients", f"30 adapters of rank 16 to 64, {EX}", "one stack, checkpointed", 15.0, 15.0, None, None),
    ("matching", "40 prompts of 128 tokens, 30 to write in batches of 40", "generate, batches of 40", 0.728, 29.12, None, None),
    ("matching", "40 prompts of 128 tokens, 30 to write in batches of 40", "teacher forcing", 0.2, 8.0, None, None),
    ("matching", "40 prompts of 128 tokens behind 640 of demonstrations, 30 to score", "demonstrations read once", 0.3, 12.0, None, None),
    ("similarity", "100 adapters of rank 16 in 224 modules, from files of 83.9 MB", "a lazy stack's modules", 0.25, 25.0, None, None),
    ("similarity", "cosine of 100 adapters of rank 16 to a target in 4 modules", "the stack at once", 0.01, 1.0, None, None),
    ("merging", "ties: 30 adapters, 224 modules", "ours", 0.1, 60.0, None, None),
    ("merging", "average: 30 adapters, 224 modules", "ours", 0.01, 15.0, None, None),
]  # fmt: skip
BENCHMARK = pd.DataFrame(LINES, columns=["area", "work", "way", "each", "seconds", "adapters", "rank"]).assign(
    device="X"
)
ASSUMED = {"scale": "8B", "tokens": 10, "answer": 2, "written": 0.5, "pool_size": 7, "rank": 16}

BARE, READ = 0.5 / 500, 0.25  # seconds a token; an adapter
WRITE = (0.728 - 128 * BARE) / 30
T, V, S, t = 8, 4, 20, 10


def forward(units):  # 1.0 at 160, 1.5 at 320, 0.5 at 0 per 500 tokens: along the line
    return (0.5 + units / 320) / 500


def scoring(n, rate):
    return n * (t * rate + 0.5 * (t * rate + 2 * WRITE))


def run(recipe, task="nano/second-days", seed=0, **more):
    about = {"n_train": T, "n_validation": V, "n_test": S} | more
    return Experiment("p", None, {}, task, seed, recipe=recipe, **about)


def table(*runs, earlier=None, **assumed):
    sweep = Sweep("t", "r", runs, assumed=ASSUMED | assumed)
    return estimate(sweep, earlier, benchmark=BENCHMARK).set_index("kind")


def seconds(recipe, **more):
    return table(run(recipe), **more).seconds[recipe.label]


def test_zero_shot_and_in_context():
    assert seconds(ZERO_SHOT) == pytest.approx(scoring(T + V + S, BARE))
    want = scoring(V + S, BARE) * (1 + 0.5 * 3 / 5)  # five demonstrations cost half more
    assert seconds(Recipe("in-context", shots=3)) == pytest.approx(want)


def test_new_adapter():
    recipe = Recipe("new adapter", steps=25, batch=4, every=10, rank=8)
    train = 25 * 4 * t * (5.0 / 500) + 3 * V * t * forward(8)  # a step as of the fewest adapters measured
    assert seconds(recipe) == pytest.approx(train + scoring(T + V + S, forward(8)))


def test_coefficients_between_two_measured_numbers():
    recipe = Recipe("coefficients", k=25, steps=20, checkpoint=True)
    units = 25 * 16  # 400: where ten adapters of mean rank 40 were measured
    train = 20 * 8 * t * (5.0 / 500) * 1.5 + 2 * V * t * forward(units)
    assert seconds(recipe) == pytest.approx(25 * READ + train + scoring(T + V + S, forward(units)))
    wide = Recipe("coefficients", k=50, steps=20)  # 800 units: half way to 30 × 40
    train = 20 * 8 * t * (7.5 / 500) + 2 * V * t * forward(800)
    assert seconds(wide) == pytest.approx(50 * READ + train + scoring(T + V + S, forward(800)))


def test_lorahub_and_tuned():
    recipe = Recipe("lorahub", k=10, budget=40)
    want = 10 * READ + 40 * T * t * forward(160) + scoring(T + V + S, forward(160))
    assert seconds(recipe) == pytest.approx(want)
    assert seconds(Recipe("lorahub", k=10, tune={"budget": [40, 40]})) == pytest.approx(2 * want)


def test_merges_dense_and_not():
    tuned = 12 * V * t
    average = 10 * READ + 15.0 / 3 + tuned * forward(160) + scoring(S + T + V + S, forward(160))
    assert seconds(Recipe("average", k=10)) == pytest.approx(average)
    wide = forward(4096)  # a dense update is as wide as the model
    ties = 10 * READ + 60.0 / 3 + tuned * wide + scoring(S + T + V + S, wide)
    assert seconds(Recipe("ties", k=10)) == pytest.approx(ties)


def test_what_is_shared_counts_once():
    recipes = [Recipe("average", select="evaluation", k=k) for k in (2, 3)]
    runs = [run(recipe, seed=seed) for recipe in recipes for seed in (0, 1)]
    found = table(*runs).loc["once for all that ask: the pool ranked by evaluation"]
    place = 0.65 - 500 * forward(16)
    assert found.runs == 2
    assert found.seconds == pytest.approx(7 * (READ + place + scoring(T, forward(16))))
    fixed = table(*(run(recipe, seed=seed, draw=0) for recipe in recipes for seed in (0, 1)))
    assert fixed.loc["once for all that ask: the pool ranked by evaluation"].runs == 1
    other = table(*runs, pools={"p": 70}).loc["once for all that ask: the pool ranked by evaluation"]
    assert other.seconds == pytest.approx(10 * found.seconds)


def test_closeness():
    found = table(run(Recipe("average", select="cosine_mean", k=2)))
    assert found.seconds["once for all that ask: the pool ranked by closeness"] == pytest.approx(
        7 * (READ + 0.01 * 224 / 4)
    )
    own = 400 * 8 * t * (5.0 / 500) + 40 * V * t * forward(8)
    assert found.seconds["once for all that ask: the target's own adapter"] == pytest.approx(own)


def test_other_sizes_are_scaled():
    whole = table(run(ZERO_SHOT), parameters=8.03e9 / 2)
    assert whole.seconds.iloc[0] == pytest.approx(scoring(T + V + S, BARE) / 2)
    assert whole.source.iloc[0] == "benchmark 8B on X, × 0.5 for 4.02e+09 parameters"


def test_multitask():
    merge = Multitask("p", None, {}, ("a", "b"), ("nano/second-days",) * 2, "average", 0, T, V, S)
    beside = 2 * S * t * (BARE + forward(16)) + 2 * READ
    want = beside + 15.0 * 2 / 30 + (13 * 2 * V + 2 * 2 * S) * t * forward(32)
    assert table(merge).seconds.iloc[0] == pytest.approx(want)


def test_unknown_is_said_and_counted():
    found = table(run(Recipe("ridge", k=2)), run(ZERO_SHOT), Notebook("notebooks/03_x.ipynb"))
    assert found.seconds.isna().tolist() == [True, False, True]
    assert found.source.iloc[0] == "unknown: the benchmark has no line for ridge"
    text = total(found.reset_index())
    assert text.startswith("3 runs: about ")
    assert "2 runs of 2 kinds nothing is known" in text
    bare = estimate(Sweep("t", "r", (run(ZERO_SHOT),)), benchmark="no such folder")
    assert math.isnan(bare.seconds[0])
    assert "no benchmark no such folder/bench_8B_gpu.parquet" in bare.source[0]


def test_earlier_runs_come_first():
    mine, other = run(ZERO_SHOT, seed=5), run(ZERO_SHOT, n_test=S + 1)
    rows = [(mine, 2.0, "cuda"), (mine, 4.0, "cuda"), (mine, 9.0, "cuda"), (mine, 50.0, "cpu"), (other, 70.0, "cuda")]
    earlier = pd.DataFrame(
        {"run": json.dumps(one.parameters | {"seed": i}), "seconds": s, "device": device}
        for i, (one, s, device) in enumerate(rows)
    )
    found = table(run(ZERO_SHOT), run(ZERO_SHOT, task="nano/first-days"), earlier=earlier)
    assert found.seconds.tolist() == [4.0]
    assert found.runs.tolist() == [2]
    assert found.hours.tolist() == [8.0 / 3600]
    assert found.source.tolist() == ["median of 3 earlier runs (cuda)"]


def test_earlier_rows_that_no_sweep_made_and_of_notebooks():
    old = pd.DataFrame({"recipe": ["zero-shot"] * 2, "n_train": [T, T + 1], "seconds": [3.0, 99.0], "device": "cuda"})
    assert table(run(ZERO_SHOT), earlier=old).seconds.tolist() == [3.0]
    book = Notebook("notebooks/03_x.ipynb", {"k": 1})
    told = json.dumps(Notebook("elsewhere/03_x.ipynb", {"k": 2}).parameters)
    assert table(book, earlier=pd.DataFrame({"run": [told], "seconds": [8.0]})).seconds.tolist() == [8.0]


def test_only_what_is_left():
    sweep = Sweep("t", "r", [run(ZERO_SHOT, seed=seed) for seed in range(4)], assumed=ASSUMED)
    assert estimate(sweep, runs=sweep.runs[2:], benchmark=BENCHMARK).runs.tolist() == [2]


@pytest.mark.parametrize(
    ("assumed", "match"),
    [
        ({"token": 3}, r"estimate\.token: no such field \(did you mean 'tokens'"),
        ({"scale": "9B"}, "expected one of"),
        ({"written": 2}, r"written is 2"),
        ({"pools": {"x": 0}}, r"estimate\.pools\.x is 0"),
    ],
)
def test_assumptions_are_checked(assumed, match):
    with pytest.raises(WorkbenchError, match=match):
        table(run(ZERO_SHOT), **assumed)


@pytest.mark.parametrize("name", ["recycling", "lorahub", "lego"])
def test_real_studies_have_hours_from_the_stored_benchmarks(name):
    frame = estimate(Sweep.load(ROOT / "studies" / f"{name}.yaml"), benchmark=ROOT / "figures")
    assert not frame.seconds.isna().any()
    assert "GPU hours, one run at a time" in total(frame)
