"""Sweeps' files: what they ask for, what is refused and how, and that every run comes back from its JSON."""

import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.experiment import NEW_ADAPTER, ZERO_SHOT, Recipe
from workbench.sweep import Experiment, Multitask, Notebook, Sweep, run_from
from workbench.sweep.settings import Settings

STUDIES = sorted(Path(__file__).parents[1].glob("studies/**/*.yaml"))
HEAD = "name: t\npool: nano\ntasks: [nano/second-days]\n"


def written(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(tmp_path, text, head=HEAD):
    return Sweep.load(written(tmp_path, head + text))


def back(run):
    return run_from(json.loads(json.dumps(run.parameters, allow_nan=False)))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_loads_with_the_runs_that_it_states(path):
    stated = int(re.search(r"# Runs: ([\d,]+)", path.read_text(encoding="utf-8"))[1].replace(",", ""))
    sweep = Sweep.load(path)
    assert len(sweep.runs) == len(set(sweep.runs)) == stated
    assert all(back(run) == run for run in sweep.runs[:: max(1, stated // 50)])
    merged = [
        run.recipe for run in sweep.runs if isinstance(run, Experiment) and run.recipe.k and not run.recipe.control
    ]
    controlled = {run.recipe.against("") for run in sweep.runs if isinstance(run, Experiment) and run.recipe.control}
    assert set(merged) <= controlled | {recipe for recipe in merged if recipe.own}  # no merge without its control


def test_studies_are_there():
    assert [f"{p.parent.name}/{p.stem}" for p in STUDIES] == [
        *("studies/lego", "studies/lorahub", "nano/lego", "nano/lorahub", "nano/recycling", "studies/recycling")
    ]


def test_order_and_what_stands_beside(tmp_path):
    sweep = loaded(tmp_path, "seeds: [0, 1]\nn_train: [10, 80]\nrecipes: [{method: ties, k: 5}]")
    ties = Recipe("ties", k=5)
    recipes = [ZERO_SHOT, NEW_ADAPTER, ties, ties.against("sigma")]
    want = [(n, seed, recipe) for n in (10, 80) for seed in (0, 1) for recipe in recipes]
    assert [(run.n_train, run.seed, run.recipe) for run in sweep.runs] == want
    assert (sweep.name, sweep.results, sweep.together) == ("t", Path("runs/t"), 1)


def test_grid_and_float_traps(tmp_path):
    recipes = "recipes: [{method: coefficients, lr: 1e-3, grid: {select: [evaluation, random], k: [5, 10]}}]"
    sweep = loaded(tmp_path, f"control: ''\nbaselines: []\n{recipes}")
    want = [Recipe("coefficients", select=how, k=k, lr=0.001) for how in ("evaluation", "random") for k in (5, 10)]
    assert [run.recipe for run in sweep.runs] == want


def test_tuned_numbers_written_as_text(tmp_path):
    sweep = loaded(tmp_path, "baselines: []\ncontrol: ''\nrecipes: [{method: ties, tune: {density: [1e-1, 0.5]}}]")
    assert sweep.runs[0].recipe == Recipe("ties", tune={"density": [0.1, 0.5]})


def test_blocks_inherit_and_override(tmp_path):
    text = "n_train: 80\nbaselines: []\ncontrol: ''\nblocks: [{recipes: [ties]}, {recipes: [average], n_train: 10, draw: 3}]"
    one, two = loaded(tmp_path, text).runs
    assert (one.recipe.method, one.n_train, one.draw) == ("ties", 80, None)
    assert (two.recipe.method, two.n_train, two.draw) == ("average", 10, 3)


def test_equal_runs_are_one(tmp_path):
    assert len(loaded(tmp_path, "seeds: [0, 0]\nrecipes: [ties, ties, {method: ties, k: 10}]").runs) == 4


def test_tasks_by_pattern_and_kind(tmp_path):
    head = 'pool: nano\ntasks: ["bbh/*", composition, nano/second-days, own.yaml#one]\n'
    tasks = [run.task for run in loaded(tmp_path, "baselines: [zero-shot]", head).runs]
    assert len(tasks) == 27 + 12 + 1 + 1
    assert tasks[0].startswith("bbh/")
    assert tasks[-1] == "own.yaml#one"


def test_merges(tmp_path):
    text = (
        "pool: nano\nmerges: [{adapters: 3, seeds: [0, 1], variants: [zero-shot, {method: lego, grid: {k: [4, 8]}}]}]"
    )
    runs = loaded(tmp_path, text, "").runs
    assert [(run.seed, run.method, dict(run.options), run.control) for run in runs[:6]] == [
        *((0, "zero-shot", {}, ""), (0, "lego", {"k": 4}, ""), (0, "lego", {"k": 4}, "sigma")),
        *((0, "lego", {"k": 8}, ""), (0, "lego", {"k": 8}, "sigma")),
        (0, "new adapter", {}, ""),  # beside every merge, unless it is told not to
    ]
    assert len(runs) == 12
    assert len(loaded(tmp_path, text.replace("adapters: 3", "baselines: [], adapters: 3"), "").runs) == 10


def test_notebook(tmp_path):
    book = Path(__file__).parents[1] / "notebooks" / "03_merge_experiments.ipynb"
    head = f"notebook: {book}\nparameters: {{n_test: 50}}\n"
    sweep = loaded(tmp_path, "grid: {k: [5, 10]}\nlist: [{methods: [ties]}, {methods: [average]}]", head)
    given = [dict(run.given) for run in sweep.runs]
    assert given == [{"k": k, "methods": [m], "n_test": 50} for m in ("ties", "average") for k in (5, 10)]
    assert all(back(run) == run for run in sweep.runs)
    with pytest.raises(WorkbenchError, match=r"grid\.kk: no such field \(did you mean 'k'\?\)"):
        loaded(tmp_path, "grid: {kk: [5]}", head)
    with pytest.raises(WorkbenchError, match=r"grid\.n_test: n_test is set beside the grid"):
        loaded(tmp_path, "grid: {n_test: [5]}", head)


REFUSED = {
    "recipes: [ties, {method: coefficients, grid: {selct: [random]}}]": r"recipes\[1\]\.grid\.selct: .*'select'",
    "recipes: [{method: ties, tune: {densty: [1]}}]": r"recipes\[0\]\.tune\.densty: .*'density'",
    "recipes: [{method: tis}]": r"recipes\[0\]\.method: no method 'tis' \(did you mean 'ties'",
    "recipes: [{method: ties, k: 3, grid: {k: [1]}}]": r"recipes\[0\]\.grid\.k: k is set beside the grid",
    "recipes: [{method: ties, grid: {k: []}}]": r"recipes\[0\]\.grid\.k: expected a list of values",
    "recipes: [{method: coefficients, lr: 1e-3x}]": r"recipes\[0\]: .*lr is '1e-3x', expected a finite number",
    "recipes: [{method: coefficients, lr: .nan}]": r"recipes\[0\]: lr: nan is no plain value",
    "recipes: [{method: average, weights: {a: 1}}]": r"recipes\[0\]: weights is a mapping",
    "recipes: [ties]\nseeds: [no]": r"seeds: expected a whole number, at least 0, got False",
    "recipes: [ties]\nseedz: 1": r"seedz: no such field \(did you mean 'seeds'",
    "recipes: [ties]\nload: {dtyp: x}": r"load\.dtyp: no such field \(did you mean 'dtype'",
    "recipes: [ties]\nestimate: {tokens: many}": r"estimate\.tokens is 'many'",
    "recipes: [ties]\nn_train: 0": r"n_train: expected a whole number, at least 1, got 0",
    "recipes: []\nbaselines: []": r"recipes: nothing to run",
    "recipes: [ties]\nblocks: [{recipes: [average]}]": r"recipes stands above the blocks, but each has its own",
    "blocks: [{recipes: [ties], nam: x}]": r"blocks\[0\]\.nam: no such field \(did you mean 'name'",
    "recipes: [ties]\nrecipes: [average]": r"line 5: 'recipes' stands twice",
    "merges: [{adapters: [a, a], variants: [ties]}]": r"merges\[0\]\.variants\[0\]: .*different names",
    "merges: [{adapters: [a, b], tasks: [nano/second-days], variants: [ties]}]": r"1 tasks for 2 adapters",
    "merges: [{adapters: 2, variants: [regmean]}]": r"regmean needs inputs",
    "? [a, b]\n: 3": r"is no YAML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_path_of_the_field(tmp_path, text):
    with pytest.raises(WorkbenchError, match=REFUSED[text]):
        loaded(tmp_path, text)


@pytest.mark.parametrize("text", ["", "[]", "name: t\n", "pool: nano\n"])
def test_nothing_to_run(tmp_path, text):
    with pytest.raises(WorkbenchError, match=r"expected the fields|nothing to run"):
        loaded(tmp_path, text, "")


def test_unknown_task_and_missing_file(tmp_path):
    with pytest.raises(
        WorkbenchError, match=r"tasks\[0\]: no task 'nano/second-day' \(did you mean 'nano/second-days'"
    ):
        loaded(tmp_path, "recipes: [ties]", "pool: nano\ntasks: [nano/second-day]\n")
    with pytest.raises(WorkbenchError, match="cannot be read"):
        Sweep.load(tmp_path / "none.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
RATE = st.floats(1e-6, 1.0)
RECIPES = st.one_of(
    st.builds(
        lambda k, skip, lr, steps, select, control: Recipe(
            "coefficients", k=k, skip=skip, select=select, control=control, lr=lr, steps=steps
        ),
        *(st.integers(1, 99), st.integers(0, 9), RATE, st.integers(0, 500)),
        *(st.sampled_from(["random", "evaluation", "qfim"]), st.sampled_from(["", "sigma", "shuffled"])),
    ),
    st.builds(lambda densities: Recipe("ties", tune={"density": densities}), st.lists(RATE, min_size=1, max_size=3)),
    st.builds(
        lambda k, weights: Recipe("average", k=k, weights=weights), st.integers(1, 9), st.lists(RATE, max_size=3)
    ),
    st.builds(lambda k, own: Recipe("lego", own=own, options={"k": k}), st.integers(1, 9), st.booleans()),
    st.sampled_from([ZERO_SHOT, NEW_ADAPTER]),
)


@settings(deadline=None, max_examples=20)
@given(
    RECIPES,
    st.dictionaries(st.text(), PLAIN, max_size=3),
    st.integers(0, 9),
    st.none() | st.just("same") | st.integers(1, 9),
)
def test_experiments_come_back_from_json(recipe, load, seed, validation):
    run = Experiment("nano", None, load, "nano/second-days", seed, 10, validation, None, recipe)
    assert back(run) == run
    assert hash(back(run)) == hash(run)
    assert pickle.loads(pickle.dumps(run)) == run


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_notebooks_come_back_from_json(parameters):
    run = Notebook("notebooks/x.ipynb", parameters)
    assert back(run) == run
    assert dict(back(run).given) == parameters


@pytest.mark.parametrize("options", [{}, {"k": 3, "canonical": "svd"}])
def test_merges_come_back_from_json(options):
    run = Multitask("nano", None, {}, ("a", "b"), (), "lego", 1, 80, 20, None, options, control="sigma", rank=4)
    assert back(run) == run
    assert run.variants() == [("lego", options)]


def test_settings_tell_numbers_from_truth():
    assert Settings({"a": 1}) != Settings({"a": True})
    assert Settings({"a": (1, 2)}) == Settings({"a": [1, 2]})
    fresh = Settings({"a": [1]})
    fresh["a"].append(2)
    assert fresh["a"] == [1]
    with pytest.raises(WorkbenchError, match="plain value"):
        Settings({"a": float("inf")})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"recipe": {"method": "ties", "kk": 1}}, "recipe has no field 'kk'"),
        ({"sed": 1}, r"Experiment has no field 'sed' \(did you mean 'seed'"),
        ({"seed": "0"}, "seed is '0'"),
        ({"n_test": 0}, "n_test is 0"),
    ],
)
def test_damaged_parameters(change, match):
    run = Experiment("nano", None, {}, "nano/second-days", 0, 10, 10, 10, ZERO_SHOT)
    with pytest.raises(WorkbenchError, match=match):
        run_from(run.parameters | change)
    with pytest.raises(WorkbenchError, match="lacks seed"):
        run_from({name: value for name, value in run.parameters.items() if name != "seed"})
