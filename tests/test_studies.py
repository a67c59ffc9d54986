"""workbench.studies: reading published tables (a made-up study, and the real one where it is), and what is asked of them."""

import csv
import gc
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle
from statsmodels.stats.proportion import confint_proportions_2indep

from helpers import published as data
from workbench import stats, studies
from workbench.errors import WorkbenchError
from workbench.studies import questions, reading, runs, tables

PROJECTIONS = ["o_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"author{i % 3}/adapter-{i}" for i in range(40)]
SIZES = {"arc_easy": 97, "xnli_de": 89, "qasc": 83, "gsm8k": 101, "clinc_oos": 103, "masakhanews_swa": 79}
MERGED = [f"performance_{m}{end}" for m in ("agg", "tsv", "ties") for end in ("", "_wo_target")]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def counts(seed, sizes=SIZES, names=NAMES):
    """Right answers of every adapter on every task: task → list."""
    rng = np.random.default_rng(seed)
    return {task: rng.binomial(n, 0.3 + 0.4 * rng.random(len(names))).tolist() for task, n in sizes.items()}


def run_line(task="qasc", k=2, selection="random", **changed):
    names = NAMES[:k]
    row = {"task": task, "experts": k, "budget": 100, "data": 100, "with_target": False, "selection": selection}
    row |= {"test_accuracy": 0.5, "valid": 0.55, "weights": [0.25 * (i + 1) for i in range(k)], "adapters": names}
    return json.dumps(row | changed)


def config(rank=16, alpha=32, targets=("q_proj", "v_proj"), **more):
    return {"r": rank, "target_modules": list(targets), "lora_alpha": alpha, "lora_dropout": 0.05} | more


@pytest.fixture
def folder(tmp_path):
    """A small study as a clone: the same files in subfolders, with the published tables' quirks."""
    tests, earlier = counts(0), counts(1, dict.fromkeys(SIZES, 100))
    strangers = ["stranger/not-of-the-pool", *NAMES]  # scored, and not in the pool
    header = ["idx", "Model ID", "Mean", "arc_easy", "temporal_sequences", "intersect_geometry", "xnli_de", "qasc"]
    header += ["twitter_complaints", "medmcqa", "masakhanews_swa"]
    columns = ["arc_easy", "clinc_oos", None, "xnli_de", "qasc", "gsm8k", None, "masakhanews_swa"]
    rows = [header]
    for i, name in enumerate(strangers):
        right = {
            task: tests[task][i - 1] / SIZES[task] if i else 0.123 for task in SIZES
        }  # the stranger's fits no size
        cells = [f"{right[task]:.10f}" if task else "" for task in columns]
        rows.append([i, name, 17.5, *cells])
    rows[5][3] = " "  # one more blank cell: the fourth adapter on arc_easy
    write(tmp_path / "results" / "tables" / tables.SCORES["test"], rows)
    rows = [["idx", "Model ID", "Mean", "Mean", *SIZES]]
    rows += [[i, name, 1.3, 1.3, *(earlier[task][i] / 100 for task in SIZES)] for i, name in enumerate(NAMES)]
    write(tmp_path / "results" / "tables" / tables.SCORES["train+validation"], rows)
    zero = [
        ["task", "zero_shot"],
        ["arc_easy", 48 / 97],
        ["xnli_de", 0.5],
        ["qasc", 0.25],
        ["main", 0.75],
        ["swa", 0.4],
    ]
    zero += [["yor", ""], ["clinc_oos", 0.1], ["imbalanced", 0.2]]
    write(tmp_path / "results" / "tables" / tables.ZERO_SHOT, zero)
    merged = [["task", *MERGED], ["arc_easy", 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], ["qasc", 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]]
    merged += [["gsm8k", 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], ["masakhanews_swa", *[""] * 6]]
    write(tmp_path / "results" / "tables" / tables.MERGED, merged)
    base = [["task", "test_accuracy"], ["arc_easy", 0.7], ["qasc", 0.9], ["gsm8k", 0.8]]
    write(tmp_path / "results" / "tables" / "lora_baseline_10_results.csv", base)
    (tmp_path / "results" / "model_lists").mkdir()
    (tmp_path / "results" / "model_lists" / tables.IDS).write_text("\n".join(NAMES) + "\n")
    facts = {name: config() for name in NAMES}
    facts[NAMES[1]] = config("8", "16", PROJECTIONS)  # numbers as text
    facts[NAMES[2]] = config(64, 16, [*PROJECTIONS, "lm_head"])
    facts[NAMES[3]] = {}
    facts[NAMES[4]] = config(4, 4) | {"target_modules": r".*layers.*\.(v_proj|q_proj)$"}
    facts[NAMES[5]] = config(4, 2) | {"target_modules": "all-linear"}
    facts[NAMES[6]] = config(
        targets=["model.layers.30.self_attn.k_proj", "model.layers.31.self_attn.k_proj", "c$<attn"]
    )
    (tmp_path / "results" / "expert_info").mkdir()
    (tmp_path / "results" / "expert_info" / tables.FACTS).write_text(json.dumps(facts))
    lines = [run_line(), run_line("arc_easy", 3, "randomseed0", with_target=True, test_accuracy=0.6)]
    lines += ["", run_line("qasc", 2, "randomseed1", test_accuracy="0.7"), run_line("xnli_de", 2, adapters=NAMES[:1])]
    (tmp_path / "results" / runs.RUNS).write_text("\n".join(lines) + "\n")
    return tmp_path


def path_of(folder, name):
    return next(folder.rglob(name))


def edit(folder, name, old, new):
    path = path_of(folder, name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture
def study(folder):
    return studies.recycling(folder)


@pytest.fixture(scope="module")
def real():
    return studies.recycling(data("recycling"))


# Reading


def test_the_pool_has_pool_table_s_columns(study):
    pool = study.pool.set_index("name")
    assert list(pool.index) == NAMES
    assert pool.accepted.all()
    assert pool["rank"].iloc[:7].tolist() == [16, 8, 64, pd.NA, 4, 4, 16]
    np.testing.assert_array_equal(pool.alpha_over_r.iloc[:7], [2, 2, 0.25, np.nan, 1, 0.5, 2])
    seven = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert pool.targets.iloc[:7].tolist() == [
        "q_proj,v_proj", seven, f"{seven},lm_head", "", "q_proj,v_proj", seven, "k_proj,c__attn"
    ]  # fmt: skip
    families = [
        "attention",
        "attention,mlp",
        "attention,mlp,lm_head",
        "",
        "attention",
        "attention,mlp",
        "attention,other",
    ]
    assert pool.families.iloc[:7].tolist() == families
    assert pool.lm_head.iloc[:4].tolist() == [False, False, True, pd.NA]
    assert pool.author[NAMES[4]] == "author1"


def test_scores_are_the_pool_s_and_columns_get_their_own_names(study):
    tests, matrix = counts(0), study.matrix("test")
    assert list(matrix) == ["arc_easy", "clinc_oos", "xnli_de", "qasc", "gsm8k", "masakhanews_swa"]
    assert list(matrix.index) == NAMES
    for task in matrix:
        want = np.array(tests[task]) / SIZES[task]
        want[3] = np.nan if task == "arc_easy" else want[3]
        np.testing.assert_allclose(matrix[task], want, atol=1e-9)
    assert study.examples("test").to_dict() == SIZES
    published_as = study.scores.groupby("task").published_as.agg(set)
    assert published_as["clinc_oos"] == {"temporal_sequences", "clinc_oos"}  # on test, on train + validation
    assert "stranger/not-of-the-pool" not in set(study.scores["name"])
    earlier = study.matrix("train+validation")
    assert list(earlier) == list(SIZES)
    assert earlier.loc[NAMES[7], "qasc"] == counts(1, dict.fromkeys(SIZES, 100))["qasc"][7] / 100
    operations = study.scores.groupby("task").operation.first()
    assert operations.to_dict() == {
        task: task.split("_")[0] if "_" in task and task != "clinc_oos" else task for task in SIZES
    }
    with pytest.raises(WorkbenchError, match="no split 'validation'; there are test, train"):
        study.matrix("validation")


def test_columns_keep_their_names_where_nothing_says_otherwise(folder):
    edit(folder, tables.SCORES["test"], "temporal_sequences,intersect_geometry", "temporal_sequences,other")
    found = studies.recycling(folder).matrix()
    assert "temporal_sequences" in found
    assert "clinc_oos" not in found
    edit(folder, tables.SCORES["test"], "temporal_sequences,other", "qasc,other")
    with pytest.raises(WorkbenchError, match=r"hub_model_evaluation_test.csv has several columns qasc"):
        studies.recycling(folder)


def test_zero_shot_merged_and_baseline_tables(study):
    zero = study.zero_shot.set_index("task")
    assert set(zero.index) == {"arc_easy", "xnli_de", "qasc", "gsm8k", "masakhanews_swa", "clinc_oos", "imbalanced"}
    assert zero.loc["gsm8k"].tolist() == ["gsm8k", 0.75, "main"]
    assert zero.accuracy[["clinc_oos", "imbalanced"]].tolist() == [0.1, 0.2]  # both are there: no alias
    assert zero.operation["masakhanews_swa"] == "masakhanews"
    merged = study.merged.set_index(["method", "own", "task"]).accuracy
    assert len(merged) == 18
    assert merged["average", True, "arc_easy"] == 0.6
    assert merged["tsv", False, "qasc"] == 0.5
    assert merged["ties", True, "arc_easy"] == 0.2
    assert set(study.merged.k) == {30}
    assert study.baselines.values.tolist()[0] == ["new adapter", 10, "arc_easy", "arc", 0.7]


def test_lorahub_s_runs_and_their_weights(study):
    found = study.lorahub.set_index("run")
    assert found.task.tolist() == ["qasc", "arc_easy", "qasc", "xnli_de"]
    assert found.own.tolist() == [False, True, False, False]
    assert found.k.tolist() == [2, 3, 2, 2]
    assert found.accuracy.tolist() == [0.5, 0.6, 0.7, 0.5]
    assert set(found.validation_accuracy) == {0.55}
    assert json.loads(found.chosen[1]) == NAMES[:3]
    weights = study.weights
    assert weights[weights.run == 1][["place", "name", "weight"]].values.tolist() == [
        [i, NAMES[i], 0.25 * (i + 1)] for i in range(3)
    ]
    assert weights[weights.run == 3].name.isna().all()  # two weights, one name: whose they are is not known
    assert weights[weights.run == 3].weight.tolist() == [0.25, 0.5]


def test_a_clone_has_lorahub_s_runs_in_a_file_each(folder):
    want = studies.recycling(folder)
    path_of(folder, runs.RUNS).unlink()
    for inside, k, own, selection, valid in [
        ("lorahub", 2, False, "random", {"valid_accuracy": 0.55}),
        ("lorahub", 3, True, "randomseed0", {"train+valid_accuracy": 0.5}),
        ("lorahub_qwen", 2, False, "random", {"valid_accuracy": 0.1}),  # of another base
    ]:
        file = f"lorahub_grad_free_super_glue_wic_{k}expert_100iter_10datasize_{own}bestexp_{selection}_result.json"
        run = {"task": "super_glue_wic", "expert_name": NAMES[:k], "test_accuracy": 0.5, "weights": [0.5] * k} | valid
        (folder / "results" / inside).mkdir(exist_ok=True)
        (folder / "results" / inside / file).write_text(json.dumps(run))
    found = studies.recycling(folder).lorahub
    assert list(found) == list(want.lorahub)
    columns = ["task", "k", "own", "select", "budget", "examples", "accuracy", "validation_accuracy"]
    assert found[columns].values.tolist() == [
        ["super_glue_wic", 2, False, "random", 100, 10, 0.5, 0.55],
        ["super_glue_wic", 3, True, "randomseed0", 100, 10, 0.5, 0.5],
    ]
    (folder / "results" / "lorahub" / file).write_text('{"weights": [1]}')
    with pytest.raises(WorkbenchError, match=rf"{file}: no test_accuracy"):
        studies.recycling(folder)


def test_a_flat_folder_and_a_byte_order_mark(folder, tmp_path_factory, study):
    flat = tmp_path_factory.mktemp("flat")
    for path in folder.rglob("*"):
        if path.is_file():
            (flat / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = studies.recycling(str(flat))
    for name in ("pool", "scores", "zero_shot", "baselines", "merged", "lorahub", "weights"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(study, name))
    assert "40 adapters" in repr(found)


def test_hidden_folders_and_deeper_copies_are_left_alone(folder, study):
    for copy in (folder / ".git", folder / "results" / "tables" / "old"):
        copy.mkdir()
        (copy / tables.ZERO_SHOT).write_text("task,zero_shot\n")
    pd.testing.assert_frame_equal(studies.recycling(folder).zero_shot, study.zero_shot)


def test_missing_files_are_all_named(folder, tmp_path):
    for name in (tables.IDS, runs.RUNS, "lora_baseline_10_results.csv"):
        path_of(folder, name).unlink()
    with pytest.raises(WorkbenchError) as error:
        studies.recycling(folder)
    for word in (str(folder), tables.IDS, runs.RUNS, "lora_baseline_N_results.csv"):
        assert word in str(error.value)
    assert tables.MERGED not in str(error.value)
    with pytest.raises(WorkbenchError, match="found nothing"):
        studies.recycling(tmp_path / "nowhere")
    with pytest.raises(WorkbenchError, match="found a file"):
        studies.recycling(path_of(folder, tables.MERGED))


def test_a_file_that_is_there_twice_at_one_depth(folder):
    other = folder / "results" / "other"
    other.mkdir()
    (other / tables.MERGED).write_text("task\n")
    with pytest.raises(WorkbenchError, match=rf"{tables.MERGED} in results.other and results.tables"):
        studies.recycling(folder)


DAMAGE = [
    (tables.ZERO_SHOT, "xnli_de,0.5", "xnli_de", "damaged line 3; line 3: 1 cells, expected 2"),
    (tables.ZERO_SHOT, "xnli_de,0.5", "xnli_de,0.5,9", "line 3: 3 cells"),
    (tables.ZERO_SHOT, "xnli_de,0.5", "xnli_de,half", "line 3: 'half' is no number from 0 to 1"),
    (tables.ZERO_SHOT, "xnli_de,0.5", "xnli_de,1.5", "line 3: '1.5' is no number"),
    (tables.ZERO_SHOT, "xnli_de,0.5", "xnli_de,inf", "line 3: 'inf' is no number"),
    (tables.ZERO_SHOT, "xnli_de,0.5", "qasc,0.5", "line 4: 'qasc' is in line 3 too"),
    (tables.ZERO_SHOT, "xnli_de,0.5", " ,0.5", "line 3: no task"),
    (tables.ZERO_SHOT, "xnli_de,0.5", 'xnli_de,"0.5', "is damaged"),
    (tables.ZERO_SHOT, "task,zero_shot", "task,zero", "no column zero_shot; it has"),
    (tables.ZERO_SHOT, "task,zero_shot", "name,zero_shot", "no column 'task'"),
    (tables.MERGED, "performance_tsv,", "performance_tvs,", "no column performance_tsv"),
    (tables.IDS, NAMES[1], NAMES[0], f"line 2: '{NAMES[0]}' is in line 1 too"),
    (tables.FACTS, "{", "[", "is not JSON"),
    (tables.FACTS, '"r": 16', '"r": "many"', "r of 'author0/adapter-0' is 'many', expected a number"),
    (tables.FACTS, '"r": 16', '"r": 0', "r of 'author0/adapter-0' is 0"),
    (tables.FACTS, '"r": 16', '"r": 2.5', "is 2.5"),
    (tables.FACTS, '"r": 16', '"r": true', "is True"),
    (tables.FACTS, '"lora_alpha": 32', '"lora_alpha": -1', "lora_alpha of .* is -1"),
    (tables.FACTS, '["q_proj", "v_proj"]', "[1]", r"target_modules of .* is \[1\]"),
    (tables.FACTS, '["q_proj", "v_proj"]', "7", "target_modules of .* is 7"),
    (runs.RUNS, '{"task"', '"task"', "damaged line 1; line 1: no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "message"), DAMAGE)
def test_what_is_damaged_is_named(folder, name, old, new, message):
    edit(folder, name, old, new)
    with pytest.raises(WorkbenchError, match=message) as error:
        studies.recycling(folder)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", r"\[\] is no object"),
        ("{}", "no task, experts"),
        (run_line(weights=[1.0]), "expected 2 weights"),
        (run_line(weights=[1.0, float("nan")]), "not finite"),
        (run_line(weights=[1.0, None]), "NoneType"),
        (run_line(weights="12"), "expected 2 weights"),
        (run_line(with_target="perhaps"), "with_target"),
        (run_line(adapters=None), "a list of adapters"),
        (run_line(test_accuracy=7), "7 is no number from 0 to 1"),
        (run_line(budget=None), "NoneType"),
        (run_line()[:-9], "no JSON"),
    ],
)
def test_damaged_runs_are_named_by_line(folder, line, message):
    path = path_of(folder, runs.RUNS)
    good = path.read_text().splitlines()
    path.write_text("\n".join([good[0], line, good[1], line]))
    with pytest.raises(WorkbenchError, match=rf"{runs.RUNS}: damaged line 2, 4; line 2: .*{message}"):
        studies.recycling(folder)


def test_at_most_five_damaged_lines_are_named_and_bytes_that_are_no_text(folder):
    path = path_of(folder, runs.RUNS)
    path.write_bytes(b"\xff\xfe\n" * 8)
    with pytest.raises(WorkbenchError, match=r"damaged line 1, 2, 3, 4, 5 and 3 more; line 1: no JSON: 'utf-8'"):
        studies.recycling(folder)
    path.write_text(run_line())
    for name in (tables.ZERO_SHOT, tables.IDS):
        text = path_of(folder, name).read_bytes()
        path_of(folder, name).write_bytes(text + b"\xff\xff,1\n")
        with pytest.raises(WorkbenchError, match=rf"{name}.*utf-8"):
            studies.recycling(folder)
        path_of(folder, name).write_bytes(text)


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.sampled_from([10, 16]))
def test_the_number_of_examples_from_the_accuracies(n, seed, decimals):
    right = np.random.default_rng(seed).integers(0, n + 1, 60)
    found = tables.examples_behind([round(int(k) / n, decimals) for k in right])
    assert found == n // math.gcd(n, *right.tolist())


def test_the_number_of_examples_may_not_be_told():
    known = [k / 100 for k in range(100)]
    assert tables.examples_behind([*known, math.nan]) == 100
    assert tables.examples_behind([1 / 4999] * 30) == 4999
    assert math.isnan(tables.examples_behind(known[:29]))
    assert math.isnan(tables.examples_behind([*known, 0.123456789]))
    assert math.isnan(tables.examples_behind([k / 5003 for k in range(40)]))


@pytest.mark.parametrize("cell", ["", " ", None, "NaN", "None", "n/a", "-"])
def test_blank_cells(cell):
    assert math.isnan(reading.fraction(cell))


@pytest.mark.parametrize("cell", [True, [], "x", -0.1, "1.0001", float("inf"), {}])
def test_cells_that_are_no_fraction(cell):
    with pytest.raises(ValueError, match="is no number from 0 to 1"):
        reading.fraction(cell)


# Questions


def made(tests, earlier, zero, sizes, earlier_n=100):
    """A study of these accuracies (name × task); sizes: task → n."""
    parts = []
    for split, table in (("test", tests), ("train+validation", earlier)):
        long = table.rename_axis(index="name", columns="task").stack().rename("accuracy").reset_index()
        n = long["task"].map(sizes) if split == "test" else earlier_n
        parts.append(long.assign(split=split, operation=long["task"], n=n, published_as=long["task"]))
    base = pd.DataFrame({"task": list(zero), "operation": list(zero), "accuracy": list(zero.values())})
    empty = pd.DataFrame()
    return studies.Recycling(
        pd.DataFrame({"name": tests.index}), pd.concat(parts), base.assign(published_as=base.task), *[empty] * 4
    )


def drawn(rates, sizes, generator):
    """Accuracies of adapters (name × task) with these rates of success."""
    n = np.array([sizes[task] for task in rates])
    return pd.DataFrame(generator.binomial(n, rates) / n, rates.index, rates.columns)


def test_helpers_against_scipy_and_statsmodels(study):
    found = studies.helpers(study)
    assert set(found.task) == set(SIZES)
    assert len(found) == 40 * 6 - 1
    right = (found.accuracy * found.n).round().astype(int)
    base = (found.zero_shot * found.n).round().astype(int)
    n = found.n.astype(int)
    for i in found.index[::17]:
        table = [[right[i], n[i] - right[i]], [base[i], n[i] - base[i]]]
        assert found.p[i] == pytest.approx(oracle.fisher_exact(table, alternative="greater").pvalue, rel=1e-9)
    exact = found[found.task == "arc_easy"]  # the one whose zero-shot is a whole number of examples
    low, high = confint_proportions_2indep(
        (exact.accuracy * 97).round(), 97, np.full(39, 48), 97, method="newcomb", compare="diff"
    )
    np.testing.assert_allclose(exact[["low", "high"]], np.c_[low, high], atol=1e-8)
    np.testing.assert_allclose(found.gain, found.accuracy - found.zero_shot)
    for _, part in found.groupby("task"):
        np.testing.assert_allclose(part.holm, oracle_holm(part.p))


def oracle_holm(p):
    from statsmodels.stats.multitest import multipletests

    gc.freeze()  # it collects garbage each time, and all that the tests hold would be looked at
    try:
        return multipletests(p, method="holm")[1]
    finally:
        gc.unfreeze()


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=12))
def test_holm_is_statsmodels_and_leaves_gaps(values):
    p = pd.Series(values, range(3, 3 + len(values)), dtype=float)
    adjusted = stats.holm(p)
    known = p.dropna()
    assert list(adjusted.index) == list(p.index)
    assert adjusted.isna().equals(p.isna())
    if len(known):
        np.testing.assert_allclose(adjusted.dropna(), oracle_holm(known))


def test_what_is_not_known_of_unknown_sizes(study):
    scores = study.scores.assign(n=study.scores.n.where(study.scores.task != "qasc"))
    unknown = studies.Recycling(study.pool, scores, study.zero_shot, *[pd.DataFrame()] * 4)
    found = studies.helpers(unknown)
    gone = found.task == "qasc"
    assert found.loc[gone, ["n", "low", "high", "p", "holm"]].isna().all(axis=None)
    assert found.loc[gone, "gain"].notna().all()
    assert found[~gone].notna().all(axis=None)
    best = studies.best_single(unknown, draws=50).set_index("task")
    assert (
        best.loc["qasc", ["n", "low", "high", "p", "holm", "luck", "best_p", "best_holm", "validation_luck"]]
        .isna()
        .all()
    )
    assert best.loc["qasc", ["gain", "best_gain", "rank_p", "spearman"]].notna().all()
    assert best.drop("qasc").best_holm.notna().all()
    with pytest.raises(WorkbenchError, match="no task has a known number"):
        studies.concentration(found[gone])


def test_the_best_single_adapter_by_hand(study):
    found = studies.best_single(study, draws=200).set_index("task")
    tests, earlier = study.matrix(), study.matrix("train+validation")
    for task, row in found.iterrows():
        both = pd.DataFrame({"e": earlier[task], "t": tests[task]}).dropna()
        assert row.adapters == len(both)
        assert row["name"] == both.index[both.e.argmax()]
        assert row.tied == (both.e == both.e.max()).sum()
        assert row.accuracy == both.t[row["name"]]
        assert row.best_accuracy == both.t.max()
        assert row.validation_accuracy == both.e.max()
        assert row.rank_p == (both.t >= row.accuracy).sum() / len(both)
        assert row.spearman == pytest.approx(oracle.spearmanr(both.e, both.t).statistic)
    np.testing.assert_allclose(found.gain, found.accuracy - found.zero_shot)
    np.testing.assert_allclose(found.best_gain, found.best_accuracy - found.zero_shot)
    np.testing.assert_allclose(found.holm, oracle_holm(found.p))
    np.testing.assert_allclose(found.best_holm, oracle_holm(found.best_p))
    assert found.adapters["arc_easy"] == 39
    pd.testing.assert_frame_equal(found.reset_index(), studies.best_single(study, draws=200))
    helped = studies.helpers(study).set_index(["task", "name"])
    for task, row in found.iterrows():
        assert row[["low", "high", "p"]].tolist() == helped.loc[(task, row["name"]), ["low", "high", "p"]].tolist()


def test_no_task_of_both_splits(study):
    tests = study.scores[study.scores.split == "test"]
    with pytest.raises(WorkbenchError, match="no task has scores of both splits"):
        studies.best_single(studies.Recycling(study.pool, tests, study.zero_shot, *[pd.DataFrame()] * 4))


def test_the_best_of_many_by_luck_is_the_largest_of_as_many_binomials():
    rng = np.random.default_rng(0)
    luck = questions.chance_best(0.6, 200, 50, draws=4000, generator=np.random.default_rng(1))
    true = rng.beta(120.5, 80.5, 4000)
    want = (rng.binomial(200, true[:, None], (4000, 50)).max(1) - rng.binomial(200, true)) / 200
    assert oracle.ks_2samp(luck, want).pvalue > 0.01
    assert luck.mean() == pytest.approx(want.mean(), abs=0.004)
    none = questions.chance_best(
        0.0, 40, 50, draws=1000, generator=rng
    )  # no right answer of 40: the rate need not be 0
    assert none.mean() == pytest.approx(0.041, abs=0.008)
    assert np.isnan(questions.chance_best(0.6, math.nan, 50, draws=3, generator=rng)).all()


def test_a_pool_that_is_no_better_than_the_base_is_found_to_be_none():
    """Under the null, the pick's p and the corrected p of the best reject at most as often as they say."""
    rng, tasks = np.random.default_rng(2), [f"t{i}" for i in range(120)]
    sizes = dict.fromkeys(tasks, 300)
    rates = pd.DataFrame(np.tile(rng.uniform(0.2, 0.8, 120), (60, 1)), [f"a{i}" for i in range(60)], tasks)
    zero = drawn(rates.iloc[:1], sizes, rng).iloc[0].to_dict()
    study = made(drawn(rates, sizes, rng), drawn(rates, dict.fromkeys(tasks, 100), rng), zero, sizes)
    found = studies.best_single(study, draws=1000)
    assert (found.p < 0.05).mean() < 0.1
    assert (found.best_p < 0.05).mean() < 0.1
    assert (found.best_p < 0.5).mean() > 0.3  # and it is no p that never rejects
    assert (found.best_holm > 0.05).all()
    assert found.best_gain.mean() == pytest.approx(found.luck.mean(), abs=0.006)
    assert (found.validation_accuracy - found.zero_shot).mean() == pytest.approx(found.validation_luck.mean(), abs=0.02)
    assert abs(found.gain.mean()) < 0.01
    assert found.rank_p.mean() == pytest.approx(0.5, abs=0.08)
    assert abs(found.spearman.mean()) < 0.05
    assert (studies.helpers(study).holm < 0.05).sum() <= 12


def test_one_good_adapter_is_picked_and_found():
    rng, tasks = np.random.default_rng(3), [f"t{i}" for i in range(10)]
    sizes, names = dict.fromkeys(tasks, 500), [f"a{i}" for i in range(40)]
    rates = pd.DataFrame(0.4, names, tasks)
    rates.loc["a7", tasks[:5]] = 0.75
    study = made(
        drawn(rates, sizes, rng), drawn(rates, dict.fromkeys(tasks, 100), rng), dict.fromkeys(tasks, 0.4), sizes
    )
    found = studies.best_single(study, draws=500).set_index("task")
    assert (found["name"][:5] == "a7").all()
    assert (found.holm[:5] < 0.001).all()
    assert (found.best_p[:5] == 1 / 501).all()  # the least that 500 draws can say
    assert (found.rank_p[:5] == 1 / 40).all()
    assert (found.holm[5:] > 0.05).all()
    helped = studies.helpers(study)
    assert set(helped[helped.holm < 0.05]["name"]) == {"a7"}


def gains_frame(helps, gain):
    """What `helpers` gives, of who helps (bool, adapter × task) and how much."""
    names, tasks = [f"a{i}" for i in range(len(helps))], [f"t{i}" for i in range(helps.shape[1])]
    long = (
        pd.DataFrame(gain, names, tasks).rename_axis(index="name", columns="task").stack().rename("gain").reset_index()
    )
    return long.assign(holm=np.where(helps.ravel(), 0.01, 0.9))


def test_generalists_and_chance():
    rng = np.random.default_rng(4)
    random = rng.random((80, 20)) < 0.2
    found = studies.concentration(gains_frame(random, random + rng.normal(0, 0.1, random.shape)), draws=200)
    found = found.set_index("measure")
    assert ((found.value >= found.low) & (found.value <= found.high)).all()
    assert (found.p > 0.02).all()
    general = np.zeros((80, 20), bool)
    general[:8] = True  # a tenth of the adapters helps everywhere
    found = studies.concentration(gains_frame(general, general * 1.0), draws=100).set_index("measure")
    assert found.value.to_dict() == pytest.approx(
        {"helpers": 8, "most": 20, "gini": 0.9, "top_tenth": 1.0, "between": 1.0}
    )
    assert (found.p.drop("helpers") == 1 / 101).all()
    assert found.p["helpers"] == 1  # by chance more adapters help a little
    assert found.chance["between"] < 0.1
    assert found.chance["helpers"] > 60
    special = np.eye(20, dtype=bool).repeat(4, axis=0)  # each helps on one task
    found = studies.concentration(gains_frame(special, special * 1.0), draws=100).set_index("measure")
    assert found.value.to_dict() == pytest.approx(
        {"helpers": 80, "most": 1, "gini": 0, "top_tenth": 0.1, "between": 0}, abs=1e-9
    )
    assert found.p["gini"] == 1


def test_concentration_of_nobody_and_with_gaps():
    nobody = np.zeros((20, 5), bool)
    rng = np.random.default_rng(5)
    found = studies.concentration(gains_frame(nobody, rng.normal(size=nobody.shape)), draws=20).set_index("measure")
    assert found.value[["helpers", "most"]].tolist() == [0, 0]
    assert found.loc[["gini", "top_tenth"], ["value", "p"]].isna().all(axis=None)
    assert 0 < found.value["between"] < 1
    frame = gains_frame(rng.random((30, 6)) < 0.5, rng.normal(size=(30, 6))).drop(index=[0, 7, 33])
    gaps = studies.concentration(frame, draws=50, seed=1)
    pd.testing.assert_frame_equal(gaps, studies.concentration(frame, draws=50, seed=1))
    table = frame.assign(helps=frame.holm < 0.05).groupby("name").helps.sum().to_numpy()
    gini = np.abs(table[:, None] - table).mean() / (2 * table.mean())  # its definition
    value = gaps.set_index("measure").value
    assert value["gini"] == pytest.approx(gini)
    assert value["most"] == table.max()
    assert value["top_tenth"] == np.sort(table)[-3:].sum() / table.sum()


def test_published_rows_are_of_the_tasks_that_all_tables_share(study):
    rows = studies.published(study)
    assert set(rows.task) == {"arc_easy", "qasc"}
    assert set(studies.published(study, aliases=True).task) == {"arc_easy", "qasc", "gsm8k"}
    means = stats.bootstrap(rows, ["method", "own", "k", "examples"]).set_index(["method", "own", "k", "examples"])[
        "mean"
    ]
    assert means["zero-shot", False, 0, 0] == pytest.approx((48 / 97 + 0.25) / 2)
    assert means["average", True, 30, 0] == pytest.approx(0.7)
    assert means["ties", False, 30, 0] == pytest.approx(0.2)
    assert means["new adapter", False, 0, 10] == pytest.approx(0.8)
    assert means["lorahub", False, 2, 100] == pytest.approx(0.6)  # the mean of two runs on one task
    assert means["lorahub", True, 3, 100] == pytest.approx(0.6)


def test_clustered_puts_alike_beside_alike():
    rng = np.random.default_rng(6)
    block = np.kron([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.ones((5, 4)))
    table = pd.DataFrame(
        block + rng.normal(0, 0.05, block.shape), [f"r{i}" for i in range(15)], [f"c{i}" for i in range(12)]
    )
    mixed = table.iloc[rng.permutation(15), rng.permutation(12)]
    mixed.iloc[3, 4] = np.nan
    found = studies.clustered(mixed)
    pd.testing.assert_frame_equal(found.loc[mixed.index, mixed.columns], mixed)
    assert sum(a // 5 != b // 5 for a, b in zip(*two([int(n[1:]) for n in found.index]), strict=True)) == 2
    assert sum(a // 4 != b // 4 for a, b in zip(*two([int(n[1:]) for n in found]), strict=True)) == 2
    small = pd.DataFrame([[1.0, 2.0]], ["a"], ["x", "y"])
    pd.testing.assert_frame_equal(studies.clustered(small), small)


def two(numbers):
    return numbers[:-1], numbers[1:]


# The real one


def test_known_totals_of_the_published_pool(real):
    pool = real.pool
    assert len(pool) == 960
    assert {16: 285, 8: 274, 64: 199, 32: 136, 256: 29, 128: 24}.items() <= pool[
        "rank"
    ].value_counts().to_dict().items()
    assert {2: 497, 1: 260, 0.5: 115, 0.25: 55}.items() <= pool.alpha_over_r.value_counts().to_dict().items()
    targets = pool.targets.value_counts()
    assert targets[",".join(tables.SEVEN)] == 765
    assert targets["q_proj,v_proj"] == 90
    assert pool.lm_head.sum() == 41
    assert pool[pool["rank"].isna()].targets.tolist() == [""] * 5
    assert len(real.lorahub) == 1141
    assert (real.weights.groupby("run").size() == real.lorahub.set_index("run").k).all()
    assert real.weights.name.isna().sum() == 5  # of the one run that names four of its five


def test_known_means_of_the_published_tables(real):
    rows = studies.published(real)
    assert rows.groupby("method").task.nunique().to_dict() == dict.fromkeys(
        ["zero-shot", "average", "tsv", "ties", "lorahub", "new adapter"], 55
    )
    means = rows.groupby(["method", "own"]).accuracy.mean().round(3)
    known = {("zero-shot", False): 0.475, ("average", True): 0.579, ("average", False): 0.544, ("tsv", True): 0.5}
    known |= {("tsv", False): 0.502, ("ties", True): 0.459, ("ties", False): 0.462}
    assert {key: means[key] for key in known} == known


def test_misnamed_columns_are_what_they_are_said_to_be(real):
    """By the number of examples of all other tables, and by who does well on train + validation."""
    test, earlier = real.matrix(), real.matrix("train+validation")
    merged = real.lorahub.groupby("task").accuracy
    for (wrong, _), task in tables.MISNAMED.items():
        alike = earlier.corrwith(test[task])
        assert alike[task] > 0.75
        right = (real.examples()[task] * merged.get_group(task)).to_numpy()
        np.testing.assert_allclose(right, right.round(), atol=1e-6)
        if wrong in earlier:
            assert alike[task] > alike[wrong] + 0.2
            assert real.examples()[wrong] != real.examples()[task]
    assert real.scores.n.notna().all()
    assert real.examples("train+validation").value_counts().to_dict()[100] == 64


def test_the_real_best_single_adapters(real):
    found = studies.best_single(real, draws=500)
    assert len(found) == 54
    assert 0 < (found.holm < 0.05).sum() < 54
    assert (found.accuracy <= found.best_accuracy).all()
