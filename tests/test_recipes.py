"""Recipes beyond the plain ones: the target's own adapter, windows, every control, tuning, and each baseline."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from helpers import random_adapter, six_adapters, solved_task, tiny_base
from workbench import runs
from workbench.adapt import ADAPTIVE, fit_many
from workbench.adapt.fitted import fold
from workbench.adapt.fresh import NEW_ADAPTER, train_fresh
from workbench.adapters import Adapter
from workbench.baselines import BASELINES
from workbench.compose import grouped
from workbench.controls import CONTROLS, MATCHES, random_like, shuffled
from workbench.errors import MergeError, SelectionError
from workbench.evaluate import encode_task, score
from workbench.experiment import Recipe, compare
from workbench.runs import OWN, Case, Workplace, run
from workbench.select import CLOSENESS, rank_adapters
from workbench.spectra import singular_values, stable_ranks
from workbench.stack import Stack

FAST = {"steps": 3, "every": 1, "batch": 4}


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=12.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    return six_adapters(base, tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def tasks(base, pool):
    return [replace(solved_task(base, pool.adapter(f"n{i}"), i, (6, 4, 8)), name=name, labels={"operation": name}) for i, name in ((1, "one"), (3, "two"))]  # fmt: skip


@pytest.fixture(scope="module")
def owned(base, tasks):
    """The targets' own adapters under seed 0, one by one."""
    found = []
    for task in tasks:
        train, validation = ([encode_task(base, task, split)] for split in (task.train, task.validation))
        found += train_fresh(base, [OWN], train, validation, NEW_ADAPTER, seeds=[0])[0]
    return found


@pytest.fixture
def quick(monkeypatch):
    """The targets' own adapters in few steps."""
    from workbench import baselines

    trainer = baselines._TRAINERS["new adapter"]
    monkeypatch.setitem(baselines._TRAINERS, "new adapter", replace(trainer, schedule=replace(NEW_ADAPTER, **FAST)))


def cases(tasks, seeds=(0,)):
    return [Case(task, seed) for task in tasks for seed in seeds]


def close(one: Adapter, other: Adapter):
    assert sorted(one.modules) == sorted(other.modules)
    for module, factors in one.modules.items():
        torch.testing.assert_close(factors.delta(), other.modules[module].delta(), rtol=1e-3, atol=1e-5)


# The target's own adapter, windows and controls


def test_the_targets_own_adapter_comes_first(base, pool, tasks, quick):
    place = Workplace(base, pool)
    recipe = Recipe("average", k=2, own=True)
    stacks = place.stacks(recipe, cases(tasks))
    bare = place.stacks(Recipe("average", k=2), cases(tasks))
    for task, stack, without in zip(tasks, stacks, bare, strict=True):
        assert stack.names == (OWN, *without.names)
        train, validation = ([encode_task(base, task, split)] for split in (task.train, task.validation))
        (want,), _ = train_fresh(base, [OWN], train, validation, replace(NEW_ADAPTER, **FAST), seeds=[0])
        close(stack.adapter(0), want)
        close(stack.adapter(1), without.adapter(0))
    again = place.stacks(Recipe("sum", k=1, own=True), cases(tasks))
    assert torch.equal(again[0].adapter(0).modules["model.layers.0.mlp.up_proj"].A, stacks[0].adapter(0).modules["model.layers.0.mlp.up_proj"].A)  # fmt: skip


@pytest.mark.parametrize("control", [c for c in CONTROLS if c != "shuffled"])
def test_controls_replace_all_or_all_but_the_own(base, pool, tasks, quick, control):
    place, real = Workplace(base, pool), Recipe("coefficients", k=2, own=True)
    (before,), (after,) = (place.stacks(recipe, cases(tasks[:1])) for recipe in (real, real.against(control)))
    keeps = control.endswith("but own")
    assert (after.names[0] == OWN) == keeps
    assert all(name.startswith("random-") for name in after.names[1:])
    if keeps:
        close(after.adapter(0), before.adapter(0))
        rest = random_like(before.choose([1, 2]), control.removesuffix(" but own"), seed=0)
    else:
        rest = random_like(before, control, seed=0).choose([1, 2])
    for i in range(2):
        close(after.adapter(i + 1), rest.adapter(i))


def test_keeping_all_or_an_unknown_adapter():
    shapes = {"a.q_proj": (8, 6)}
    stack = Stack.of([random_adapter(shapes, 2, i, name=f"n{i}") for i in range(3)])
    assert random_like(stack, seed=0, keep=[0, "n1", 2]).digest() == stack.digest()
    mixed = random_like(stack, "norm", seed=0, keep=["n1"])
    assert [name.startswith("random") for name in mixed.names] == [True, False, True]
    torch.testing.assert_close(mixed.norms(), stack.norms())
    with pytest.raises(SelectionError, match="no adapter 'x'"):
        random_like(stack, seed=0, keep=["x"])


def test_shuffled_coefficients_move_within_their_module_only():
    shapes = {"a.q_proj": (8, 6), "b.q_proj": (8, 6)}
    adapters = [random_adapter(shapes, 2, i, name=f"n{i}") for i in range(5)]
    adapters[2] = random_adapter({"b.q_proj": (8, 6)}, 2, 2, name="n2")
    stack = Stack.of(adapters)
    given = torch.arange(10.0).view(2, 5)
    got = shuffled(stack, given, seed=3)
    assert got[0, 2] == given[0, 2]  # it does not have the first module
    assert [sorted(row) for row in got.tolist()] == given.tolist()
    assert not torch.equal(got, given)
    assert torch.equal(got, shuffled(stack, given, seed=3))
    assert len({tuple(shuffled(stack, given, seed=s)[1].tolist()) for s in range(9)}) > 3
    units = {m: torch.arange(float(len(u))) for m, u in stack}
    moved = shuffled(stack, given, units, seed=0)
    assert all(sorted(moved[m].tolist()) == units[m].tolist() for m in units)
    assert not torch.equal(moved["b.q_proj"], units["b.q_proj"])
    with pytest.raises(MergeError, match=r"expected coefficients \(2, 5\), got \(5,\)"):
        shuffled(stack, torch.ones(5), seed=0)


@pytest.mark.parametrize("granularity", ["module", "unit"])
def test_the_shuffled_control_scores_the_real_fit_with_its_coefficients_moved(base, pool, tasks, granularity):
    recipe = Recipe("coefficients", k=3, granularity=granularity, start="normal", **FAST)
    place = Workplace(base, pool)
    (real,), (moved,) = (run(place, r, cases(tasks[:1])) for r in (recipe, recipe.against("shuffled")))
    stack = place.stacks(recipe, cases(tasks[:1]))[0]
    train, validation = ([encode_task(base, tasks[0], s)] for s in (tasks[0].train, tasks[0].validation))
    (fit,) = fit_many(base, [stack], train, validation, "coefficients", seeds=[0], **dict(recipe.options))
    by_hand = fold(stack, shuffled(stack, fit.coefficients, fit.units, seed=0), "x")
    rows = encode_task(base, tasks[0], tasks[0].test)
    assert moved.facts["loss"] == pytest.approx(float(score(base, [rows], grouped([by_hand])).loss.mean()), rel=1e-4)
    assert moved.facts["coefficient_norm"] == pytest.approx(real.facts["coefficient_norm"])
    assert abs(moved.facts["loss"] - real.facts["loss"]) > 1e-4
    assert moved.chosen == real.chosen


def test_windows_leave_out_the_best(base, pool, tasks):
    place = Workplace(base, pool)
    order = rank_adapters(pool, tasks[0], base)["name"].tolist()
    for skip in (0, 2, 4):
        recipe = Recipe("average", select="evaluation", k=2, skip=skip)
        assert list(place.stacks(recipe, cases(tasks[:1]))[0].names) == order[skip : skip + 2]
    with pytest.raises(SelectionError, match="2 adapters asked for after the first 5, but pool"):
        compare(base, pool, tasks[:1], [Recipe("average", k=2, skip=5)], baselines=())


@pytest.mark.parametrize("how", sorted(CLOSENESS))
def test_closeness_is_to_the_targets_own_adapter(base, pool, tasks, quick, how):
    place = Workplace(base, pool)
    stacks = place.stacks(Recipe("average", select=how, k=3), cases(tasks))
    for stack, target, case in zip(stacks, place.own(cases(tasks)), cases(tasks), strict=True):
        want = wb.Pool.select(pool, how, 3, task=case.task, base=base, seed=0, target=target)
        assert stack.names == want.names


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("control 'sigma but own' keeps the target's own adapter", {"control": "sigma but own"}),
        ("control 'but own' is unknown; choose one of sigma, norm", {"control": "but own"}),
        ("start 'target' begins at the target's own adapter", {"start": "target"}),
        ("coefficients: lr is tuned over 0.1, expected a list of values", {"tune": {"lr": 0.1}}),
        ("coefficients: lr is tuned over", {"tune": {"lr": []}}),
        ("coefficients: lr is both set and tuned", {"lr": 0.1, "tune": {"lr": [0.1]}}),
        (r"coefficients has no option 'step' \(did you mean 'steps'", {"tune": {"step": [1]}}),
        ("coefficients: granularity is 'modul', expected one of 'expert'", {"granularity": "modul"}),
        ("coefficients: steps is -1, expected a whole number ≥ 0", {"tune": {"steps": [1, -1]}}),
        ("lr is 0, expected above 0", {"lr": 0}),
    ],
)
def test_recipes_that_cannot_be(said, given):
    with pytest.raises(MergeError, match=said):
        Recipe("coefficients", **given)


@pytest.mark.parametrize("method", ["ties", "pi_tuning", "arrow", "prior"])
def test_what_has_no_coefficients_cannot_be_shuffled(method):
    with pytest.raises(
        MergeError, match=f"{method} has no coefficients over a fixed stack to shuffle; coefficients, lorahub"
    ):
        Recipe(method, control="shuffled")
    assert Recipe("lorahub", control="shuffled").label == "lorahub, random 10, shuffled"
    with pytest.raises(MergeError, match="lorahub has no coefficients over a fixed stack"):
        Recipe("lorahub", control="shuffled", space="factor")


def test_labels_and_keys_tell_every_setting_apart():
    recipes = [
        Recipe("coefficients", skip=skip, own=own, tune=tune, control=control)
        for skip in (0, 5)
        for own in (False, True)
        for tune in ({}, {"lr": [0.1, 0.2]}, {"lr": [0.1]})
        for control in ("", *CONTROLS)
        if own or not control.endswith("but own")
    ]
    assert len({r.label for r in recipes}) == len(set(recipes)) == len(recipes)
    assert recipes[-1].label == "coefficients, random 10, after 5, own, lr of 0.1, shuffled"
    assert recipes[0].against("norm").against("") == recipes[0]


# Tuning


@pytest.mark.parametrize(
    "recipe", [Recipe("coefficients", k=2, steps=2, every=1), Recipe("new adapter", steps=2, every=1, rank=2)]
)
def test_tuning_keeps_the_least_validation_loss_and_counts_all(base, pool, tasks, recipe):
    place, values = Workplace(base, pool), [1e-4, 0.3, 0.05]
    tuned = Recipe(recipe.method, k=2, options=dict(recipe.options), tune={"lr": values, "batch": [2, 6]})
    found = run(place, tuned, cases(tasks, (0, 1)))
    tried = [
        (
            lr,
            batch,
            run(place, Recipe(recipe.method, k=2, lr=lr, batch=batch, **dict(recipe.options)), cases(tasks, (0, 1))),
        )
        for batch in (2, 6)
        for lr in values
    ]
    kept = set()
    for i, outcome in enumerate(found):
        lr, batch, best = min(tried, key=lambda one, i=i: one[2][i].facts["validation_loss"])
        assert json.loads(outcome.facts["tuned"]) == {"lr": lr, "batch": batch}
        assert outcome.facts["loss"] == pytest.approx(best[i].facts["loss"], rel=1e-4)
        for what in ("passes", "tokens"):
            assert outcome.facts[what] == sum(one[i].facts[what] for _, _, one in tried)
        kept.add(lr)
    assert kept != {1e-4}


# Baselines


def test_every_trained_baseline_is_its_function_by_hand(base, pool, tasks):
    from workbench import baselines

    for name, trainer in baselines._TRAINERS.items():
        shape = {"rank": 2} if trainer.plan else {}
        shape |= {"dimension": 20} if name == "random subspace" else {}
        (outcome,) = run(Workplace(base, pool), Recipe(name, **FAST, **shape), cases(tasks[:1], [3]))
        train, validation = ([encode_task(base, tasks[0], s)] for s in (tasks[0].train, tasks[0].validation))
        more = {"dimension": 20} if name == "random subspace" else {}
        if trainer.plan:
            plan = replace(trainer.plan, rank=2)
            more |= {"plans": [plan]} if name == "new adapter" else {"plan": plan}
        schedule = replace(trainer.schedule, **FAST)
        (adapter,), curves = trainer.function(base, ["x"], train, validation, schedule, seeds=[3], **more)
        rows = encode_task(base, tasks[0], tasks[0].test)
        want = float(score(base, [rows], grouped([adapter])).loss.mean())
        assert outcome.facts["loss"] == pytest.approx(want, rel=1e-4), name
        assert outcome.facts["passes"] == 3 * 4 + 4 * 4
        assert outcome.facts["tokens"] == int(curves.tokens[0]) + 4 * sum(map(len, validation[0]))
        want = adapter.info.get("parameters") or sum(
            2 * (f.A.shape[1] + f.B.shape[0]) for f in adapter.modules.values()
        )
        assert outcome.facts["parameters"] == want
        assert not outcome.facts["diverged"]


def test_the_best_single_adapter_and_the_best_of_random_ones(base, pool, tasks):
    case = cases(tasks[:1], [2])
    (outcome,) = run(Workplace(base, pool), Recipe("best single"), case)
    first = rank_adapters(pool, tasks[0], base).iloc[0]
    rows = encode_task(base, tasks[0], tasks[0].test)
    assert outcome.chosen == [first["name"]]
    assert outcome.facts["train_accuracy"] == pytest.approx(first["accuracy"])
    want = score(base, [rows], grouped([pool.adapter(first["name"])]))
    assert outcome.facts["loss"] == pytest.approx(float(want.loss.mean()), rel=1e-5)
    assert outcome.facts["passes"] == len(pool) * len(tasks[0].train)
    (other,) = run(Workplace(base, pool), Recipe("best single", among="random"), case)
    stack = random_like(pool.stack(), seed=2)
    train = encode_task(base, tasks[0], tasks[0].train)
    each = [score(base, [train], grouped([stack.adapter(i)])) for i in range(len(stack))]
    order = sorted(range(6), key=lambda i: (-float(each[i].accuracy[0]), float(each[i].loss.mean()), stack.names[i]))
    assert other.chosen == [stack.names[order[0]]]
    want = score(base, [rows], grouped([stack.adapter(order[0])]))
    assert other.facts["loss"] == pytest.approx(float(want.loss.mean()), rel=1e-5)
    both = run(Workplace(base, pool), Recipe("best single", among="random"), cases(tasks[:1], [2, 5]))
    assert both[0].chosen == other.chosen
    assert both[0].facts["loss"] != both[1].facts["loss"]


def test_baselines_check_their_options():
    for name, baseline in BASELINES.items():
        with pytest.raises(MergeError, match=f"{name} has no option 'nonsense'"):
            baseline.check({"nonsense": 1})
    for name, options, said in (
        ("new adapter", {"rank": 0}, "rank is 0"),
        ("in-context", {"shots": 0}, "shots is 0"),
        ("best single", {"among": "all"}, "among is 'all'"),
        ("random subspace", {"dimension": 0}, "dimension is 0"),
        ("full fine-tuning", {"lr": -1.0}, "lr is -1.0"),
    ):
        with pytest.raises(MergeError, match=said):
            Recipe(name, **options)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_adaptive_method_is_a_recipe_and_runs_side_by_side(base, pool, tasks, method):
    small = {"steps": 2, "merge_steps": 2, "every": 1, "rank": 2, "budget": 8}
    options = {name: value for name, value in small.items() if name in ADAPTIVE[method].options}
    recipe = Recipe(method, k=3, options=options)
    place = Workplace(base, pool)
    together = run(place, recipe, cases(tasks, (0, 1)))
    for case, outcome in zip(cases(tasks, (0, 1)), together, strict=True):
        (alone,) = run(Workplace(base, pool), recipe, [case])
        assert outcome.facts["loss"] == pytest.approx(alone.facts["loss"], rel=1e-3, abs=1e-4)
        for what in ("passes", "tokens", "parameters"):
            assert outcome.facts[what] == alone.facts[what]
        assert len(outcome.chosen) == 3
    table = compare(base, pool, tasks[:1], [recipe], baselines=())
    assert table["control"].tolist() == ["", "sigma"]


# Spectra


def test_spectra_against_dense_svd(base):
    adapters = [
        random_adapter(base, rank, rank, ["q_proj", "down_proj"][: 1 + rank % 2], size=0.1) for rank in (1, 4, 7)
    ]
    got = stable_ranks(grouped(adapters))
    for adapter, stable in zip(adapters, got.tolist(), strict=True):
        values = {m: torch.linalg.svdvals(f.delta().double()) for m, f in adapter.modules.items()}
        assert stable == pytest.approx(np.mean([float((s**2).sum() / s[0] ** 2) for s in values.values()]), rel=1e-3)
        table = singular_values(adapter)
        for module, s in values.items():
            own = table[table["module"] == module]
            np.testing.assert_allclose(own["value"], s[: len(own)], rtol=1e-4, atol=1e-6)
            assert own["place"].tolist() == list(range(1, adapter.modules[module].rank + 1))
    nothing = adapters[0].times(0.0)
    assert torch.isnan(stable_ranks(grouped([nothing])))[0]
    with pytest.raises(MergeError, match="grouped updates"):
        stable_ranks({})
    assert set(MATCHES) < set(CONTROLS)


def test_norms_of_grouped_adapters_are_each_one_s(base):
    """Unequal ranks and modules, one that is zero and one that is not finite."""
    adapters = [random_adapter(base, r, r, t, name=f"n{r}") for r, t in ((1, ["q_proj"]), (4, None), (3, ["v_proj"]))]
    adapters += [adapters[0].times(0.0), adapters[1].times(float("nan"))]
    found = runs._norms(grouped(adapters)).tolist()
    assert found[:4] == pytest.approx([adapter.norm() for adapter in adapters[:4]], rel=1e-12)
    assert math.isnan(found[4])
