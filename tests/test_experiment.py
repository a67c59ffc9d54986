"""Recipes and `compare`: rows against each part by hand, side by side against alone, what is stored and what is read."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from helpers import dense_model, random_adapter, six_adapters, solved_task, tiny_base, train_briefly
from workbench import experiment, runs
from workbench.adapt import ADAPTIVE, fit_many
from workbench.adapt.fresh import NEW_ADAPTER, Plan, train_fresh
from workbench.again import again
from workbench.base import Base
from workbench.compose import grouped
from workbench.controls import random_like
from workbench.errors import MergeError, SelectionError, TaskError, WorkbenchError
from workbench.evaluate import encode_task, evaluate, score
from workbench.experiment import Recipe, compare
from workbench.pool import Pool
from workbench.results import Results
from workbench.runs import SCALES, Case, run
from workbench.select import rank_adapters
from workbench.sweep import spec
from workbench.tasks import Example
from workbench.usage import device_name

BASELINES = (Recipe("zero-shot"), Recipe("new adapter", steps=3, rank=2, batch=4))
FAMILIES = [
    Recipe("zero-shot"),
    Recipe("in-context", shots=2),
    Recipe("new adapter", steps=3, rank=2, every=1),
    Recipe("coefficients", k=3, steps=3, every=1),
    Recipe("coefficients", select="evaluation", k=2, steps=3, granularity="layer", start="uniform"),
    Recipe("lorahub", k=3, budget=9),
    Recipe("average", k=3),
    Recipe("ties", select="evaluation", k=2, rank=4),
    Recipe("lego", select="evaluation", k=3, control="sigma"),
]
SCORES = ["accuracy", "loss", "train_accuracy", "train_loss", "validation_accuracy", "validation_loss"]


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=12.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    return six_adapters(base, tmp_path_factory.mktemp("pool"))


def make_task(base, pool, name, seed, sizes=(6, 4, 8), **labels):
    return replace(solved_task(base, pool.adapter(f"n{seed % 6}"), seed, sizes), name=name, labels=labels)


@pytest.fixture(scope="module")
def tasks(base, pool):
    first = make_task(base, pool, "one", 1, kind="own", operation="x", domain="d", format="f")
    return [first, make_task(base, pool, "two", 3), make_task(base, pool, "three", 4, sizes=(4, 3, 5))]


def deltas(adapter, scale=1.0):
    return {m: scale * f.B.double() @ f.A.double() for m, f in adapter.modules.items()}


def scored(base, model, task, split):
    result = score(Base(model, base.tokenizer), [encode_task(base, task, getattr(task, split))])
    return float(result.accuracy[0]), float(result.loss.mean())


# Recipes


def test_an_option_that_is_called_like_an_argument_goes_into_options(base, pool):
    recipe = Recipe("lego", k=3, options={"k": 2}, seed=1)
    assert (recipe.k, recipe.options) == (3, (("k", 2), ("seed", 1)))
    assert recipe.against().options == recipe.options
    assert recipe.label == "lego, random 3, k=2, seed=1"
    place = runs.Workplace(base, pool)
    assert place.merged(recipe, pool.stack(pool.names[:3])).rank == 2
    with pytest.raises(MergeError, match="k is 0"):
        Recipe("lego", k=3, options={"k": 0})


def test_recipes_are_values():
    one = Recipe("ties", select="evaluation", k=5, density=0.3, elect="frequency")
    same = Recipe("ties", k=5, select="evaluation", elect="frequency", density=0.3)
    assert one == same
    assert hash(one) == hash(same)
    assert one != Recipe("ties", select="evaluation", k=5, density=0.2, elect="frequency")
    assert len({one, same, one.against(), one.against("norm"), one.against("norm")}) == 3
    assert one.against("norm") == Recipe("ties", select="evaluation", k=5, control="norm", **dict(one.options))
    with pytest.raises(AttributeError):
        one.k = 3


def test_options_hash_and_key_alike_wherever_they_come_from():
    plain = Recipe("new adapter", targets=("q_proj", "v_proj"), lr=0.5, steps=3)
    strange = Recipe("new adapter", targets=["q_proj", "v_proj"], lr=np.float64(0.5), steps=np.int64(3))
    assert plain == strange
    assert hash(plain) == hash(strange)
    assert json.dumps(plain.options) == json.dumps(strange.options)
    assert json.dumps(Recipe("average", k=np.int64(3)).k) == "3"


def test_labels():
    assert Recipe("zero-shot").label == "zero-shot"
    assert Recipe("in-context", shots=5).label == "in-context, shots=5"
    assert Recipe("lego", select="evaluation", k=10, control="sigma").label == "lego, evaluation 10, random (sigma)"
    assert Recipe("coefficients", k=20, steps=400).label == "coefficients, random 20, steps=400"
    every = {
        Recipe(method, select=select, k=k, control=control, **options)
        for method, options in [
            *((m, {}) for m in [*wb.merge.methods(), *ADAPTIVE, *runs.BASELINES]),
            ("ties", {"density": 0.1}),
            ("ties", {"density": 0.1, "rank": 4}),
            ("coefficients", {"steps": 10}),
            ("coefficients", {"start": "uniform"}),
            ("new adapter", {"rank": 4}),
        ]
        for select in ("random", "evaluation")
        for k in (1, 10, 11)
        for control in ("", "sigma", "norm", "spectrum")
    }
    assert len({recipe.label for recipe in every}) == len(every) > 200
    assert Recipe("zero-shot", select="evaluation", k=3, control="sigma") == Recipe("zero-shot")


def test_versions():
    assert Recipe("zero-shot").version == runs.BASELINES["zero-shot"].version
    assert Recipe("lorahub").version == ADAPTIVE["lorahub"].version
    assert Recipe("lego").version == wb.merge.methods()["lego"].version


@pytest.mark.parametrize(
    ("error", "said", "given"),
    [
        (MergeError, "no method 'tie'; did you mean ties", {"method": "tie"}),
        (MergeError, "no method 'new adaptor'; did you mean new adapter", {"method": "new adaptor"}),
        (MergeError, "no method 'qqq'; there are sum, cat, average", {"method": "qqq"}),
        (MergeError, "control 'sigm' is unknown; choose one of sigma", {"method": "ties", "control": "sigm"}),
        (SelectionError, "no selection method 'evaluaton'; did you mean 'evaluation'", {"method": "ties", "select": "evaluaton"}),
        (MergeError, r"ties has no option 'densty' \(did you mean 'density'\?\)", {"method": "ties", "densty": 0.2}),
        (MergeError, r"ties: density is 7, expected a finite number in \[0, 1\]", {"method": "ties", "density": 7}),
        (MergeError, r"coefficients has no option 'step' \(did you mean 'steps'\?\)", {"method": "coefficients", "step": 2}),
        (MergeError, "lorahub has no option 'lr'; it takes space, optimiser", {"method": "lorahub", "lr": 2}),
        (MergeError, r"new adapter has no option 'rnk' \(did you mean 'rank'\?\)", {"method": "new adapter", "lr": 1, "rnk": 2}),
        (MergeError, r"in-context has no option 'shot' \(did you mean 'shots'\?\); it takes shots", {"method": "in-context", "shot": 2}),
        (MergeError, "zero-shot has no option 'shots'; it takes none", {"method": "zero-shot", "shots": 2}),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(error, said, given):
    with pytest.raises(error, match=said):
        Recipe(**given)


def test_options_of_every_merge_are_allowed():
    assert dict(Recipe("ties", rank=4, scale=2.0, density=0.1).options) == {"rank": 4, "scale": 2.0, "density": 0.1}


# Rows


def test_baselines_and_controls_are_there_unless_told_not_to_be(base, pool, tasks):
    recipes = [Recipe("average", k=2), Recipe("sum", k=2, control="norm"), Recipe("in-context", shots=1)]
    table = compare(base, pool, tasks[:1], recipes, baselines=BASELINES, seeds=(0, 1))
    labels = ["zero-shot", BASELINES[1].label, "average, random 2", "average, random 2, random (sigma)"]
    labels += ["sum, random 2, random (norm)", "in-context, shots=1"]
    assert table["recipe"].tolist() == [label for label in labels for _ in range(2)]
    assert table["seed"].tolist() == [0, 1] * 6
    other = compare(base, pool, tasks[:1], recipes[:1], baselines=(), control="spectrum")
    assert other["recipe"].tolist() == ["average, random 2", "average, random 2, random (spectrum)"]
    bare = compare(base, pool, tasks[:1], recipes[:1] * 2, baselines=(), control="")
    assert bare["recipe"].tolist() == ["average, random 2"]
    assert experiment.ZERO_SHOT in compare.__kwdefaults__["baselines"]
    assert experiment.NEW_ADAPTER in compare.__kwdefaults__["baselines"]
    assert compare.__kwdefaults__["control"] == "sigma"


def test_columns(base, pool, tasks):
    table = compare(base, pool, tasks[:2], [FAMILIES[3], FAMILIES[6]], baselines=BASELINES[:1])
    facts = table.iloc[0]
    assert {c: facts[c] for c in ("task", "kind", "operation", "domain", "format")} == {"task": "one", "kind": "own", "operation": "x", "domain": "d", "format": "f"}  # fmt: skip
    assert table["operation"].tolist() == ["x", "two"] * 5
    assert set(table["n_train"]) == {6}
    assert set(table["n_validation"]) == {4}
    assert set(table["n_test"]) == {8}
    assert table["key"].is_unique
    assert table["method"].tolist() == ["zero-shot"] * 2 + ["coefficients"] * 4 + ["average"] * 4
    assert table["k"].tolist() == [0] * 2 + [3] * 8
    assert table["control"].tolist() == [""] * 4 + ["sigma"] * 2 + [""] * 2 + ["sigma"] * 2
    assert json.loads(table["options"][2]) == {"steps": 3, "every": 1}
    assert table["scale"].isna().tolist() == [True] * 6 + [False] * 4
    assert table["rank"][0] == table["norm"][0] == table["tokens"][0] == table["passes"][0] == 0
    assert (table["norm"][2:] > 0).all()
    assert set(table["pool"]) == {pool.digest}
    assert set(table["base"]) == {base.digest}
    assert table["split"].tolist() == [t.digest() for t in tasks[:2]] * 5
    assert set(table["dtype"]) == {"float32"}
    assert set(table["device"]) == {"cpu"}
    assert {"commit", "versions", "platform", "seconds", "tokens_per_example", "coefficient_mean"} < set(table)
    assert [len(json.loads(c)) for c in table["chosen"]] == [0] * 2 + [3] * 8
    assert all(n.startswith("random-0-n") for n in [json.loads(table["chosen"][4])[0]])


def test_rows_by_hand(base, pool, tasks):
    """Zero-shot, in-context, a new adapter, coefficients over a selection by evaluation, and their random control."""
    task = tasks[0]
    fitted = Recipe("coefficients", select="evaluation", k=2, steps=3, every=1, batch=2, start="normal")
    table = compare(base, pool, [task], [fitted, FAMILIES[1]], baselines=BASELINES, seeds=[4]).set_index("recipe")
    train, validation = ([encode_task(base, task, s)] for s in (task.train, task.validation))

    def check(label, model, shots=0):
        for split, prefix in (("test", ""), ("train", "train_"), ("validation", "validation_")):
            if not (shots and split == "train"):
                own = Base(model, base.tokenizer)
                result = evaluate(own, replace(task, name="one"), split=split, shots=shots, seed=4)
                assert table.loc[label, f"{prefix}accuracy"] == pytest.approx(float(result.accuracy))
                assert table.loc[label, f"{prefix}loss"] == pytest.approx(float(result.loss.mean()), rel=1e-4)

    check("zero-shot", base.model)
    check("in-context, shots=2", base.model, shots=2)
    assert np.isnan(table.loc["in-context, shots=2", "train_loss"])
    schedule = replace(NEW_ADAPTER, steps=3, batch=4)
    (new,), curves = train_fresh(base, ["x"], train, validation, schedule, seeds=[4], plans=[Plan(2)])
    check(BASELINES[1].label, dense_model(base, deltas(new)))
    assert table.loc[BASELINES[1].label, "rank"] == 2
    assert table.loc[BASELINES[1].label, "passes"] == 3 * 4 + 2 * 4
    assert table.loc[BASELINES[1].label, "tokens"] == int(curves.tokens[0]) + 2 * sum(map(len, validation[0]))
    best = rank_adapters(pool, task, base)["name"].tolist()[:2]
    for recipe in (fitted, fitted.against()):
        stack = random_like(pool.stack(best), "sigma", seed=4) if recipe.control else pool.stack(best)
        (fit,) = fit_many(
            base, [stack], train, validation, "coefficients", seeds=[4], steps=3, every=1, batch=2, start="normal"
        )
        check(recipe.label, dense_model(base, deltas(fit.adapter)))
        row = table.loc[recipe.label]
        assert json.loads(row["chosen"]) == list(stack.names)
        assert row["coefficient_norm"] == pytest.approx(float(fit.coefficients.norm()), rel=1e-4)
        assert row["norm"] == pytest.approx(fit.adapter.norm(), rel=1e-4)
        assert (row["passes"], row["tokens"]) == (fit.passes, fit.tokens)
    assert table["loss"].nunique() == 5
    prompts = [base.tokenizer(task.prompt(e))["input_ids"] for e in task.test]
    assert table.loc["zero-shot", "tokens_per_example"] == pytest.approx(np.mean([len(p) + 1 for p in prompts]))
    assert table["tokens_per_example"].max() == table.loc["in-context, shots=2", "tokens_per_example"]
    assert 0 < table["train_accuracy"].max() <= 1


@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("control", ["", "norm"])
def test_lambda_is_the_arg_min_of_the_validation_loss(base, pool, tasks, method, control):
    recipe = Recipe(method, k=3, control=control)
    table = compare(base, pool, tasks[:2], [recipe], baselines=(), control="", seeds=[2])
    stack = pool.select("random", 3, seed=2)
    stack = random_like(stack, control, seed=2) if control else stack
    merged = wb.merge(stack, method)
    for row, task in zip(table.to_dict("records"), tasks, strict=False):
        dense = {m: d.double() for m, d in merged.modules.items()} if method == "ties" else deltas(merged)
        losses = [
            scored(base, dense_model(base, {m: s * d for m, d in dense.items()}), task, "validation")[1] for s in SCALES
        ]
        assert row["scale"] == SCALES[int(np.argmin(losses))]
        assert row["validation_loss"] == pytest.approx(min(losses), rel=1e-4)
        best = dense_model(base, {m: row["scale"] * d for m, d in dense.items()})
        assert (row["accuracy"], row["loss"]) == pytest.approx(scored(base, best, task, "test"), rel=1e-4)
        assert row["accuracy_unscaled"] == pytest.approx(scored(base, dense_model(base, dense), task, "test")[0])
        assert row["norm"] == pytest.approx(row["scale"] * merged.norm(), rel=1e-4)
        assert row["passes"] == len(SCALES) * 4
    assert 1.0 in SCALES
    assert list(SCALES) == sorted(set(SCALES))


def test_a_lambda_that_overflows_is_not_the_least(base, tasks):
    """Queries and keys so large that their products are infinite from some λ on, and attention NaN."""
    adapter = random_adapter(base, 2, 0, ["q_proj", "k_proj"], size=1e9)
    rows = encode_task(base, tasks[0], tasks[0].validation)
    losses = torch.stack([score(base, [rows], grouped([adapter.times(s)])).loss.mean() for s in SCALES])
    assert losses.isfinite().any()
    assert losses.isnan().any()
    (scale,) = runs.tune_scales(base, [adapter], [rows])
    assert scale == SCALES[int(np.nanargmin(losses))]


def test_lambda_differs_between_tasks(base, pool, tasks):
    """Otherwise the test above could not tell one task's λ from another's."""
    table = compare(base, pool, tasks, [Recipe("sum", k=3), Recipe("sum", k=1)], baselines=(), seeds=(0, 1, 2))
    assert table["scale"].nunique() > 1


@pytest.mark.parametrize("recipe", FAMILIES, ids=lambda r: r.label)
def test_side_by_side_equals_alone(base, pool, tasks, recipe):
    """Three tasks, the middle one of other sizes, under two seeds, against one call each; the order stays."""
    settings, tasks = {"recipes": [recipe], "baselines": (), "control": ""}, [tasks[0], tasks[2], tasks[1]]
    together = compare(base, pool, tasks, seeds=(0, 3), **settings)
    assert together[["task", "seed"]].to_numpy().tolist() == [[t.name, s] for t in tasks for s in (0, 3)]
    for i, (task, seed) in enumerate((t, s) for t in tasks for s in (0, 3)):
        (alone,) = compare(base, pool, [task], seeds=[seed], **settings).to_dict("records")
        row = together.iloc[i]
        for column in [c for c in SCORES if c in alone]:
            assert row[column] == pytest.approx(alone[column], rel=1e-4, abs=1e-5), column
        for column in ("key", "chosen", "passes", "tokens", "rank", "tokens_per_example"):
            assert row[column] == alone[column], column
    assert set(together["n_test"]) == {8, 5}


def test_parts_of_a_long_list_keep_their_order(base, pool, tasks):
    place = runs.Workplace(base, pool)
    cases = [Case(task, seed) for task in tasks for seed in (0, 1)]
    whole = run(place, FAMILIES[3], cases)
    place.side_by_side = 1
    parts = run(place, FAMILIES[3], cases)
    for one, other in zip(whole, parts, strict=True):
        assert one.chosen == other.chosen
        assert one.facts == pytest.approx(other.facts, rel=1e-4)


def test_where_memory_runs_out_half_as_many_run_side_by_side(base, pool, tasks, monkeypatch):
    place, asked, plain = runs.Workplace(base, pool), [], runs._one

    def one(place, recipe, cases):
        asked.append(len(cases))
        if len(cases) > most:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return plain(place, recipe, cases)

    monkeypatch.setattr(runs, "_one", one)
    cases, most = [Case(task, seed) for task in tasks[:2] for seed in (0, 1, 2)], 2
    found = run(place, FAMILIES[3], cases)
    assert asked == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.undo()
    for got, want in zip(found, run(runs.Workplace(base, pool), FAMILIES[3], cases), strict=True):
        assert got.chosen == want.chosen
        assert got.facts == pytest.approx(want.facts, rel=1e-4)
    monkeypatch.setattr(runs, "_one", one)
    most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(place, FAMILIES[3], cases)


def test_the_order_by_closeness_is_measured_once(base, pool, tasks, monkeypatch):
    """Windows and sizes of one order, each as it is when measured alone."""
    measured, plain = [], runs.choose
    monkeypatch.setattr(runs, "choose", lambda pool, how, *a, **k: measured.append(how) or plain(pool, how, *a, **k))
    recipes = [Recipe("coefficients", select="cosine", k=k, skip=skip, steps=1) for k, skip in ((2, 0), (1, 1), (2, 1))]
    case = Case(tasks[0], 0)

    def place():
        """Where the target's own adapter, what the others are close to, need not be trained."""
        one = runs.Workplace(base, pool)
        one.keep_own([case], [random_adapter(base, seed=9)])
        return one

    shared = place()
    orders = [run(shared, recipe, [case])[0].chosen for recipe in recipes]
    assert measured == ["cosine"]
    assert orders == [run(place(), recipe, [case])[0].chosen for recipe in recipes]
    assert len(measured) == 4
    assert orders[2][0] == orders[1][0] == orders[0][1]


@pytest.mark.parametrize("recipe", [r for r in FAMILIES if r.method not in ("zero-shot", "in-context")], ids=lambda r: r.label)  # fmt: skip
def test_the_test_split_decides_nothing(base, pool, tasks, recipe):
    other = replace(
        tasks[0], test=tuple(Example(e.input + " b", "zz"[: i % 2 + 1]) for i, e in enumerate(tasks[1].test))
    )
    settings = {"recipes": [recipe], "baselines": (), "control": "", "seeds": [1]}
    (one,), (two,) = (compare(base, pool, [t], **settings).to_dict("records") for t in (tasks[0], other))
    same = ["chosen", "norm", "rank", "passes", "tokens", "train_loss", "validation_loss", "train_accuracy"]
    same += [c for c in ("scale", "coefficient_norm", "coefficient_mean") if c in one]
    assert {c: one[c] for c in same} == {c: two[c] for c in same}
    assert one["loss"] != two["loss"]
    assert one["key"] != two["key"]


@pytest.mark.parametrize("recipe", [FAMILIES[4], FAMILIES[5], FAMILIES[7]], ids=lambda r: r.label)
def test_the_validation_split_selects_no_adapter(base, pool, tasks, recipe):
    other = replace(tasks[0], validation=tasks[1].validation)
    settings = {"recipes": [recipe], "baselines": (), "control": "", "seeds": [1]}
    (one,), (two,) = (compare(base, pool, [t], **settings).to_dict("records") for t in (tasks[0], other))
    assert one["chosen"] == two["chosen"]
    assert one["validation_loss"] != two["validation_loss"]
    if recipe.method == "lorahub":
        assert one["norm"] == two["norm"]
        assert one["loss"] == two["loss"]


def test_seeds_draw_adapters_and_examples(base, pool):
    table = compare(
        base, pool, ["nano/mirror-months"], [Recipe("average", k=2)], seeds=range(3), n_train=3, n_validation=2, n_test=4,
        baselines=(), control="",
    )  # fmt: skip
    assert table["chosen"].nunique() > 1
    assert table["split"].nunique() == 3
    assert table["n_train"].tolist() == [3] * 3
    assert table["operation"].tolist() == ["mirror"] * 3
    assert table["task"].tolist() == ["nano/mirror-months"] * 3


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        (FAMILIES[0], {"template": "{input} ? "}),
        (FAMILIES[0], {"instruction": "tell"}),
        (FAMILIES[0], {"max_new_tokens": 9}),
        (FAMILIES[1], {"bare": "{input} : "}),
        (FAMILIES[1], {"separator": " ; "}),
    ],
)
def test_tasks_of_one_name_are_told_apart(base, pool, tasks, recipe, change):
    """Another wording of the same examples, beside the first: its own scores, not the first's."""
    other = replace(tasks[0], **change)
    both = compare(base, pool, [tasks[0], other], [recipe], baselines=())
    alone = compare(base, pool, [other], [recipe], baselines=())
    assert both["loss"][1] == pytest.approx(alone["loss"][0])
    assert both["loss"][0] != pytest.approx(both["loss"][1])
    assert both["key"].nunique() == 2


def test_merges_of_one_stack_are_told_apart(base, pool, tasks):
    """Two settings of one method, and real adapters and two controls, over the same selection."""
    recipes = [Recipe("ties", k=3, density=0.1), Recipe("ties", k=3, density=0.9)]
    recipes += [recipes[0].against("sigma"), recipes[0].against("norm")]
    both = compare(base, pool, tasks[:1], recipes, baselines=(), control="")
    for i, recipe in enumerate(recipes):
        (alone,) = compare(base, pool, tasks[:1], [recipe], baselines=(), control="")["loss"]
        assert both["loss"][i] == pytest.approx(alone)
    assert both["loss"].nunique() == 4


# Stored results


def test_what_is_stored_is_read_and_not_run_again(base, pool, tasks, tmp_path, monkeypatch):
    recipes = [FAMILIES[3], FAMILIES[6]]
    settings = {"baselines": BASELINES[:1], "results": tmp_path / "runs"}
    said = []
    first = compare(base, pool, tasks[:2], recipes, **settings, say=said.append)
    assert len(list((tmp_path / "runs").iterdir())) == len(first) == 10
    assert [re_count(line) for line in said] == [(2, 0)] * 5

    def never(*_):
        raise AssertionError("ran again")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", never)
        patch.setattr(experiment, "provenance", lambda: {"commit": "another"})
        said.clear()
        second = compare(base, pool, tasks[:2], recipes, **settings, say=said.append)
        assert [re_count(line) for line in said] == [(0, 2)] * 5
        some = compare(base, pool, tasks[1::-1], recipes[1:], **settings)
        with pytest.raises(AssertionError, match="ran again"):
            compare(base, pool, tasks[:2], recipes, **settings, seeds=[1])
    pd.testing.assert_frame_equal(first, second)
    assert some["task"].tolist() == ["two", "one"] * 3
    more = compare(base, pool, tasks, recipes, **settings)
    assert len(list((tmp_path / "runs").iterdir())) == len(more) == 15
    same = more[more["task"] != "three"].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, first, check_like=True)
    fresh = compare(base, pool, tasks[:2], recipes, baselines=BASELINES[:1])
    differ, added = ["seconds", "peak_memory"], ["schema", "written"]
    assert set(first) - set(fresh) == set(added)
    pd.testing.assert_frame_equal(fresh.drop(columns=differ), first.drop(columns=differ + added), check_dtype=False, check_like=True)  # fmt: skip


def test_gathered_rows_are_not_run_again_and_the_folder_is_looked_at_once_a_recipe(
    base, pool, tasks, tmp_path, monkeypatch
):
    settings = {"baselines": BASELINES[:1], "results": tmp_path / "runs"}
    first = compare(base, pool, tasks[:2], [Recipe("average", k=2)], **settings)
    for path in (tmp_path / "runs").iterdir():  # as before rows had schemas
        old = pd.read_parquet(path).drop(columns=["schema", "written", "peak_memory", "device_name", "version"])
        old.to_parquet(path.with_name(f"{path.name.partition('.')[0]}.parquet"), index=False)
        path.unlink()
    Results(tmp_path / "runs").compact()
    looked, real = [], Results.keys
    monkeypatch.setattr(Results, "keys", lambda self: looked.append(1) or real(self))
    monkeypatch.setattr(experiment, "run", None)
    second = compare(base, pool, tasks[:2], [Recipe("average", k=2)], **settings)
    assert second["key"].tolist() == first["key"].tolist()
    assert second["loss"].tolist() == first["loss"].tolist()
    assert len(looked) == 3


def test_what_a_row_says_of_its_cost_and_coefficients(base, pool, tasks, monkeypatch):
    held = iter([5 << 20, 7 << 20])
    monkeypatch.setattr(experiment, "Peak", lambda device: SimpleNamespace(rise=next(held), highest=-1))
    recipe = Recipe("coefficients", k=3, steps=4, every=1, activation="squared", start="uniform")
    table = compare(base, pool, tasks[:2], [recipe], baselines=BASELINES[:1], control="")
    assert table["peak_memory"].tolist() == [5 << 20] * 2 + [7 << 20] * 2
    assert table["side_by_side"].tolist() == [2] * 4
    assert (
        table["version"].tolist() == [runs.BASELINES["zero-shot"].version] * 2 + [ADAPTIVE["coefficients"].version] * 2
    )
    assert table["device_name"].tolist() == [device_name("cpu")] * 4
    place = runs.Workplace(base, pool)
    case = Case(tasks[0], 0)
    train, validation = ([place.encoded(case, split)] for split in ("train", "validation"))
    (fit,) = fit_many(
        base, place.stacks(recipe, [case]), train, validation, "coefficients", seeds=[0], **dict(recipe.options)
    )
    row = table.iloc[2]
    wanted = {"mean": fit.coefficients.mean(), "norm": fit.coefficients.norm(), "min": fit.coefficients.min(), "max": fit.coefficients.max(), "zeros": 0.0}  # fmt: skip
    for name, value in wanted.items():
        assert row[f"coefficient_{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
    assert row["coefficient_min"] < row["coefficient_max"]
    assert runs._summary(torch.tensor([[0.0, 2.0], [0.0, -4.0]])) == {
        "coefficient_mean": -0.5,
        "coefficient_norm": pytest.approx(20**0.5),
        "coefficient_min": -4.0,
        "coefficient_max": 2.0,
        "coefficient_zeros": 0.5,
    }


def test_the_lines_that_run_a_row_again(base, pool, tasks, monkeypatch):
    train_briefly(monkeypatch)
    recipes = [
        Recipe("coefficients", select="evaluation", k=3, skip=1, control="norm", steps=3, tune={"lr": [0.1, 0.2]}),
        Recipe("lego", k=3, own=True, options={"k": 2}),
        Recipe("new adapter", steps=2, rank=2, targets=("q_proj", "v_proj")),
    ]
    table = compare(base, pool, tasks[1:2], recipes, baselines=(), control="", seeds=[2])
    sizes = {"seed": 2, "n_train": 6, "n_validation": 4, "n_test": 8, "folder": None}
    monkeypatch.setattr(experiment, "load_task", lambda name, **given: tasks[1] if given == sizes else None)
    for row in table.to_dict("records"):
        names = {"base": base, "pool": pool}
        exec(again({name: value for name, value in row.items() if not pd.isna(value)}), names)
        (found,) = names["table"].to_dict("records")
        assert {n: found[n] for n in ("key", "recipe", *SCORES)} == {n: row[n] for n in ("key", "recipe", *SCORES)}


def test_what_else_is_run_again(monkeypatch):
    assert again({"key": "k", "accuracy": 0.5}) == again({"run": "no JSON", "task": "t"}) == ""
    line = again({"run": json.dumps({"notebook": "notebooks/03_a.ipynb", "given": {"text": "it's"}})})
    assert shlex.split(line) == ["papermill", "--cwd", "notebooks", "notebooks/03_a.ipynb", "runs/again.ipynb", "-y", '{"text": "it\'s"}']  # fmt: skip
    hostile = again({"method": "ties", "task": "a'\nraise SystemExit #", "pool": "\nraise SystemExit", "seed": 0})
    assert not any(line.startswith("raise") for line in hostile.splitlines())
    wanted = spec.Experiment(
        "nano", None, {"dtype": "float32"}, "nano/mirror-months", 3, 10, None, None, Recipe("ties", k=2)
    )
    row = {"method": "ties", "task": "nano/mirror-months", "seed": 3, "run": json.dumps(wanted.parameters)}
    assert "\npool = wb.Pool.open('nano')\nbase = wb.Base.load(pool.base, dtype='float32')\n" in again(row)
    ran = []
    monkeypatch.setattr("workbench.sweep.work.carry_out", lambda runs, folder: ran.append((runs, folder)))
    exec(again({**row, "run": json.dumps(replace(wanted, draw=1).parameters)}), {})
    assert ran == [([replace(wanted, draw=1)], Path("runs/again"))]


def re_count(line):
    """(runs, stored) out of a line of progress."""
    words = line.split(": ", 1)[1].split()
    return int(words[0]), int(words[2].removeprefix("("))


def test_asking_twice_in_one_call(base, pool, tasks, tmp_path):
    for results in (None, tmp_path / "runs"):
        table = compare(base, pool, [tasks[0]] * 2, [], baselines=BASELINES[:1], results=results)
        assert table["task"].tolist() == ["one", "one"]
        assert table["loss"].nunique() == 1


def test_what_a_key_depends_on(base, pool, tasks, monkeypatch):
    recipe = Recipe("coefficients", k=3, steps=5)
    stand_in = SimpleNamespace(digest="b", dtype=torch.float32, device=torch.device("cpu"))
    pools = [SimpleNamespace(digest=d) for d in "pq"]

    def key(base=stand_in, pool=pools[0], task=tasks[0], seed=0, recipe=recipe):
        return experiment.key_of(base, pool, Case(task, seed), recipe)

    keys = {
        "": key(),
        "pool": key(pool=pools[1]),
        "base": key(base=SimpleNamespace(**{**vars(stand_in), "digest": "c"})),
        "dtype": key(base=SimpleNamespace(**{**vars(stand_in), "dtype": torch.bfloat16})),
        "device": key(base=SimpleNamespace(**{**vars(stand_in), "device": torch.device("cuda")})),
        "task": key(task=tasks[1]),
        "name": key(task=replace(tasks[0], name="other")),
        "wording": key(task=replace(tasks[0], template="{input} ")),
        "train": key(task=replace(tasks[0], train=tasks[0].train[1:])),
        "test": key(task=replace(tasks[0], test=tasks[0].test[1:])),
        "seed": key(seed=1),
        "method": key(recipe=Recipe("lorahub", k=3)),
        "select": key(recipe=Recipe("coefficients", select="evaluation", k=3, steps=5)),
        "k": key(recipe=Recipe("coefficients", k=4, steps=5)),
        "control": key(recipe=recipe.against()),
        "other control": key(recipe=recipe.against("norm")),
        "option": key(recipe=Recipe("coefficients", k=3, steps=6)),
        "more options": key(recipe=Recipe("coefficients", k=3, steps=5, lr=0.1)),
    }
    present = ADAPTIVE["coefficients"]
    with monkeypatch.context() as patch:
        patch.setitem(ADAPTIVE, "coefficients", replace(present, version=present.version + 1))
        keys["version"] = key()
    assert len(set(keys.values())) == len(keys)
    monkeypatch.setattr(experiment, "provenance", lambda: {"commit": "another"})
    assert key() == keys[""]
    numbered = compare(base, pool, tasks[:1], [], seeds=np.arange(2), baselines=BASELINES[:1])
    plain = compare(base, pool, tasks[:1], [], seeds=(0, 1), baselines=BASELINES[:1])
    assert numbered["key"].tolist() == plain["key"].tolist()
    zero = Recipe("zero-shot")
    assert key(recipe=zero) == key(recipe=zero, pool=pools[1])  # no pool in it


def test_a_run_that_breaks_leaves_whole_rows_and_is_taken_up_again(base, pool, tasks, tmp_path, monkeypatch):
    recipes, settings = [Recipe("average", k=2), Recipe("sum", k=2)], {"baselines": (), "control": "", "results": tmp_path / "runs"}  # fmt: skip
    real, ran = experiment.run, []

    def breaks(place, recipe, cases):
        ran.append(recipe.method)
        if recipe.method == "sum":
            raise KeyboardInterrupt
        return real(place, recipe, cases)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            compare(base, pool, tasks, recipes, **settings)
    assert Results(tmp_path / "runs").read()["method"].tolist() == ["average"] * 3
    assert all(path.suffix == ".parquet" for path in (tmp_path / "runs").iterdir())
    monkeypatch.setattr(experiment, "run", lambda place, recipe, cases: ran.append(recipe.method) or real(place, recipe, cases))  # fmt: skip
    table = compare(base, pool, tasks, recipes, **settings)
    assert ran == ["average", "sum", "sum"]
    assert table["method"].tolist() == ["average"] * 3 + ["sum"] * 3


@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (TaskError, "give at least one task and one seed", {"tasks": []}),
        (TaskError, "give at least one task and one seed", {"seeds": ()}),
        (TaskError, "no task 'nano/miror-months'; did you mean nano/mirror-months", {"tasks": ["nano/miror-months"]}),
        (TaskError, "expected a sequence of tasks, got the single task 'nano/mirror-months'", {"tasks": "nano/mirror-months"}),
        (TaskError, "n_test is 3000, expected 1 to 2000", {"tasks": ["nano/mirror-months"], "n_test": 3000}),
        (SelectionError, "7 adapters asked for, but pool .* has 6", {"recipes": [Recipe("average", k=7)]}),
        (SelectionError, "k is 0", {"recipes": [Recipe("average", k=0)]}),
        (MergeError, "control 'no' is unknown", {"control": "no"}),
        (MergeError, "give at least one recipe or baseline", {"recipes": [], "baselines": ()}),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_before_anything_is_written(base, pool, tasks, tmp_path, error, said, changes):
    given = {"tasks": tasks[:1], "recipes": [Recipe("average", k=2)], "results": tmp_path / "runs"} | changes
    with pytest.raises(error, match=said):
        compare(base, pool, given.pop("tasks"), given.pop("recipes"), **given)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_task_that_lacks_a_split(base, pool, tasks, split):
    with pytest.raises(TaskError, match="one: comparing needs training, validation and test examples"):
        compare(base, pool, [tasks[1], replace(tasks[0], **{split: ()})], [], baselines=BASELINES[:1])


def test_an_error_in_the_middle_leaves_whole_rows_only(base, pool, tasks, tmp_path):
    store = Results(tmp_path / "runs")
    with pytest.raises(WorkbenchError, match="factor space needs"):
        compare(base, pool, tasks[:1], [Recipe("lorahub", k=2, space="factor")], baselines=BASELINES[:1], results=store.folder)  # fmt: skip
    assert store.read()["method"].tolist() == ["zero-shot"]
    with pytest.raises(TaskError, match="9 demonstrations asked for, but only 6"):
        compare(base, pool, tasks[:1], [Recipe("in-context", shots=9)], baselines=(), results=store.folder)
    with pytest.raises(WorkbenchError, match="factor space needs"):
        compare(base, pool, tasks[:1], [Recipe("lorahub", k=3, space="factor")], baselines=(), results=store.folder)
    assert [path.suffix for path in store.folder.iterdir()] == [".parquet"]


def test_on_the_bundled_pool():
    """The real thing, small: a relative in the pool is found by evaluation and does better than the bare base."""
    pool = Pool.open("nano")
    base = Base.load(pool.base, device="cpu")
    recipe = Recipe("average", select="evaluation", k=1)
    table = compare(
        base, pool, ["nano/rotate-right-months"], [recipe], n_train=4, n_validation=4, n_test=40, baselines=BASELINES[:1]
    )  # fmt: skip
    accuracy = dict(zip(table["recipe"], table["accuracy"], strict=True))
    assert accuracy[recipe.label] > accuracy["zero-shot"] + 0.2
    assert accuracy[recipe.label] > accuracy[recipe.against().label] + 0.2


def test_five_hundred_test_examples_or_all_there_are_where_none_are_asked_for(base, pool, tmp_path):
    rows = [{"given": f"{i} cats", "said": str(i)} for i in range(40)]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    (tmp_path / "few.yaml").write_text(
        "name: few\nfile: few.json\ninstruction: count\ninput: '{given}'\ntarget: said\n"
    )
    sizes = {"n_train": 4, "n_validation": 2, "baselines": (Recipe("zero-shot"),), "control": ""}
    table = compare(base, pool, ["nano/mirror-months", str(tmp_path / "few.yaml")], [], **sizes)
    assert table.set_index("task")["n_test"].to_dict() == {"nano/mirror-months": 500, "few": 20}
