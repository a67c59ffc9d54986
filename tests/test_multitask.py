"""Merges for many tasks, the reweightings' measures and the study over them, against each part by hand."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from helpers import dense_model, random_adapter, solved_task, tiny_base
from workbench import multitask as module
from workbench.adapt.fresh import Plan, train_fresh
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import grouped
from workbench.controls import random_like
from workbench.errors import MergeError, TaskError, WorkbenchError
from workbench.evaluate import encode_task, evaluate, score
from workbench.multitask import multitask, score_at, tune
from workbench.nano import lego_grid, lego_study, world
from workbench.reweighting import norm_decay, variances
from workbench.runs import SCALES
from workbench.stack import Stack

VARIANTS = {"sum": ("sum", {}), "ties": ("ties", {"density": 0.5}), "lego": [("lego", {"k": k}) for k in (1, 3, 9)]}
STEPS = Schedule(steps=3, lr=3e-3, every=1)


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=12.0)


@pytest.fixture(scope="module")
def stack(base):
    """Three adapters of unequal ranks and targets."""
    ranks, targets = (2, 5, 3), (None, None, ["q_proj", "v_proj"])
    return Stack.of([random_adapter(base, ranks[i], i, targets[i], name=f"n{i}", size=0.08) for i in range(3)])


@pytest.fixture(scope="module")
def tasks(base, stack):
    """Own tasks of unequal test size, the last adapter's left out, and one that no adapter of the stack was made for."""
    return {
        "n1": solved_task(base, stack.adapter("n1"), 1),
        "n0": solved_task(base, stack.adapter("n0"), 2, (6, 3, 12)),
        "other": solved_task(base, random_adapter(base, 4, 9, size=0.08), 3, (7, 4, 6)),
    }


@pytest.fixture(scope="module")
def frame(base, stack, tasks):
    return multitask(base, stack, tasks, VARIANTS, rank=4, fresh=(2, 6), schedule=STEPS, seed=5)


def by_hand(base, update, tasks):
    """λ of least validation loss over all tasks, that loss, and per task accuracy and loss at λ and at 1: dense, in turn."""
    deltas = update.modules if isinstance(update, wb.Dense) else {m: f.delta() for m, f in update.modules.items()}

    def scores(scale, split):
        bare = Base(dense_model(base, {m: d * scale for m, d in deltas.items()}), base.tokenizer, "dense")
        return [evaluate(bare, task, split=split) for task in tasks.values()]

    losses = {scale: float(torch.cat([s.loss[0] for s in scores(scale, "validation")]).mean()) for scale in SCALES}
    scale = min(losses, key=losses.get)
    rows = [[(float(s.accuracy), float(s.loss.mean())) for s in scores(one, "test")] for one in (scale, 1.0)]
    return scale, losses[scale], rows


def check(part, found):
    scale, loss, (tuned, plain) = found
    assert part.scale.unique().tolist() == [scale]
    np.testing.assert_allclose(part.validation_loss, loss, rtol=1e-4)
    np.testing.assert_allclose(part[["accuracy", "loss"]], tuned, rtol=1e-4)
    np.testing.assert_allclose(part[["accuracy_unscaled", "loss_unscaled"]], plain, rtol=1e-4)


@pytest.mark.parametrize("control", ["", "sigma"])
@pytest.mark.parametrize("limit", [0, 4])
def test_merges_by_hand(base, stack, tasks, frame, control, limit):
    """Every merge, its random control and its cut against dense weights, and the best of several by validation."""
    source = random_like(stack, "sigma", seed=5) if control else stack
    for name, choices in VARIANTS.items():
        part = frame[(frame.variant == name) & (frame.control == control) & (frame.limit == limit)]
        assert part.adapter.tolist() == list(tasks)
        choices = [choices] if isinstance(choices, tuple) else choices
        merged = [wb.merge(source, method, rank=limit or None, **options) for method, options in choices]
        found = [by_hand(base, one, tasks) for one in merged]
        best = min(range(len(found)), key=lambda i: found[i][1])
        check(part, found[best])
        np.testing.assert_allclose(part.norm, merged[best].norm(), rtol=1e-4)
        assert part.options.map(json.loads).tolist() == [choices[best][1]] * 3
        assert part.k.unique().tolist() == [choices[best][1].get("k", 0)]
        assert part["rank"].max() <= (limit or 32)
    assert frame[frame.variant == "sum"].accuracy.nunique() > 2  # the tasks tell merges apart


def test_a_wide_merge_stays_exact(base, tasks):
    """More units than a module has dimensions (32) are multiplied out, to the same update."""
    wide = Stack.of([random_adapter(base, 20, i, name=f"w{i}", size=0.05) for i in range(3)])
    own = {"w0": tasks["n0"]}
    part = multitask(base, wide, own, {"sum": ("sum", {})}, controls=(), fresh=())
    check(part[part.variant == "sum"], by_hand(base, wb.merge(wide, "sum"), own))
    assert part[part.variant == "sum"]["rank"].tolist() == [32]


def test_one_k_by_itself_and_without_the_best_single_adapter_is_the_same(base, stack, tasks):
    """What an explorer does to fill a curve in: one variant at a time."""
    ks = {f"k{k}": ("lego", {"k": k}) for k in (1, 3)}
    whole = multitask(base, stack, tasks, ks, fresh=(), seed=5)
    parts = [multitask(base, stack, tasks, {name: ks[name]}, fresh=(), single=False, seed=5) for name in ks]
    assert "best single" in set(whole.variant)
    assert "best single" not in set(parts[0].variant)
    keys = ["variant", "control", "task"]
    both = pd.concat(parts).drop_duplicates(keys).set_index(keys).sort_index()
    want = whole[whole.variant != "best single"].set_index(keys).sort_index()
    columns = ["accuracy", "accuracy_unscaled", "scale", "k", "own"]
    pd.testing.assert_frame_equal(both[columns], want[columns])


def test_baselines_by_hand(base, stack, tasks, frame):
    alone = frame[frame.variant == "alone"]
    assert alone.adapter.tolist() == ["n1", "n0"]
    for name in ("n1", "n0"):
        found = evaluate(base, tasks[name], grouped([stack.adapter(name)]))
        row = alone[alone.adapter == name].iloc[0]
        np.testing.assert_allclose(
            [row.accuracy, row.loss], [float(found.accuracy), float(found.loss.mean())], rtol=1e-5
        )
        assert row.own == row.accuracy == row.accuracy_unscaled > 0.5
        assert (frame[frame.adapter == name].own == row.own).all()
    assert alone.own_rank.tolist() == [5, 2]
    zero = frame[frame.variant == "zero-shot"]
    assert zero.accuracy.tolist() == [float(evaluate(base, task).accuracy) for task in tasks.values()]
    assert (zero.loss == zero.loss_unscaled).all()
    singles = {name: by_hand(base, stack.adapter(name), tasks) for name in stack.names}
    best = min(singles, key=lambda name: singles[name][1])
    check(frame[frame.variant == "best single"], singles[best])
    assert json.loads(frame[frame.variant == "best single"].options.iloc[0]) == {"of": best}


@pytest.mark.parametrize("n", [2, 6])
def test_new_adapters_by_hand(base, tasks, frame, n):
    train = [row for task in tasks.values() for row in encode_task(base, task, task.train[:n])]
    validation = [row for task in tasks.values() for row in encode_task(base, task, task.validation)]
    (new,), _ = train_fresh(base, ["new"], [train], [validation], STEPS, seeds=[5], plans=[Plan(rank=4)])
    part = frame[frame.variant == f"new adapter, {n} examples"]
    check(part, by_hand(base, new, tasks))
    assert part["rank"].unique().tolist() == [4]


def test_columns(frame, tasks):
    assert len(frame) == 3 * (3 * 2 * 2 + 2 + 1 + 1) + 2
    assert frame[["accuracy", "accuracy_unscaled", "loss", "loss_unscaled"]].notna().all(axis=None)
    assert set(frame.columns) >= {"task", "operation", "kind", "domain", "format", "seconds", "seed", "method"}
    assert frame.adapters.unique().tolist() == [3]
    told = frame[["adapter", "task", "n_validation", "n_test"]].drop_duplicates().to_numpy().tolist()
    assert told == [["n1", "t1", 4, 9], ["n0", "t2", 3, 12], ["other", "t3", 4, 6]]
    known = frame[frame.adapter != "other"]
    np.testing.assert_allclose(known.relative, known.accuracy / known.own)
    assert frame[frame.adapter == "other"][["own", "relative"]].isna().all(axis=None)
    assert (frame.seconds.dropna() >= 0).all()


def test_relative_needs_an_adapter_that_knows_its_task(base, stack, tasks, frame):
    strict = multitask(base, stack, tasks, {"sum": ("sum", {})}, controls=(), fresh=(), floor=1.01)
    assert strict.relative.isna().all()
    same = strict[strict.variant == "sum"].accuracy.tolist()
    assert same == frame[(frame.variant == "sum") & (frame.control == "") & (frame.limit == 0)].accuracy.tolist()


def test_a_mixed_stream_is_the_mean_over_tasks(base, stack, tasks):
    """Inputs of all tasks shuffled into one stream, answered in one pass: no input's answer hangs on its neighbours."""
    equal = {name: replace(task, test=task.test[:6]) for name, task in tasks.items()}
    found = multitask(base, stack, equal, {"ties": ("ties", {})}, controls=(), fresh=())
    found = found[found.variant == "ties"]
    stream = [row for task in equal.values() for row in encode_task(base, task, task.test)]
    random.Random(0).shuffle(stream)
    merged = wb.merge(stack, "ties").truncate().times(found.scale.iloc[0])
    assert float(score(base, [stream], grouped([merged])).accuracy) == pytest.approx(found.accuracy.mean())


def test_errors(base, stack, tasks):
    with pytest.raises(TaskError, match="at least one task"):
        multitask(base, stack, {}, VARIANTS)
    with pytest.raises(TaskError, match="validation and test"):
        multitask(base, stack, {"n0": replace(tasks["n0"], validation=())}, VARIANTS)
    with pytest.raises(TaskError, match="t1: a new adapter from 7 training examples asked for, it has 6"):
        multitask(base, stack, tasks, {"sum": ("sum", {})}, controls=(), fresh=(7,))
    with pytest.raises(MergeError, match="no merging method 'tise'"):
        multitask(base, stack, tasks, {"a": ("tise", {})})


def test_updates_of_unlike_rank_in_several_passes(base, tasks, monkeypatch):
    """Passes are filled by rank; each update keeps its own examples, λ and place."""
    monkeypatch.setitem(module._TOGETHER, "cpu", 2)
    adapters = [random_adapter(base, rank, seed, size=0.1) for seed, rank in enumerate((7, 1, 4, 1, 9))]
    given = [encode_task(base, t, t.validation) for t in (tasks["n1"], tasks["other"])]
    rows = [given[i % 2] for i in range(5)]
    scales, losses = tune(base, adapters, rows)
    assert len(set(scales)) > 1
    for i, one in enumerate(adapters):
        each = {s: float(score(base, [rows[i]], grouped([one.times(s)])).loss.mean()) for s in SCALES}
        assert scales[i] == min(each, key=each.get)
        assert losses[i] == pytest.approx(each[scales[i]], rel=1e-4)
    found = score_at(base, adapters, scales, rows)
    alone = [score(base, [r], grouped([a.times(s)])) for a, s, r in zip(adapters, scales, rows, strict=True)]
    torch.testing.assert_close(found.loss, torch.cat([one.loss for one in alone]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.match, torch.cat([one.match for one in alone]))
    assert found.tokens == sum(one.tokens for one in alone)


# Norm decay and variance


def orthogonal(n, copies=1, d=8):
    """n adapters of one unit each, [a ; b] orthogonal and of one norm, each `copies` times."""
    eye = torch.eye(d)
    modules = [{"m": Factors(2 * eye[:, i : i + 1], 3 * eye[i : i + 1])} for i in range(n) for _ in range(copies)]
    return Stack.of([Adapter(f"a{i}", own) for i, own in enumerate(modules)])


@pytest.mark.parametrize(("form", "left"), [("raw", 4**-0.5), ("balanced", 4**-0.5), ("svd", 4**-0.5), ("outer", 0.25)])
def test_norm_decay_of_orthogonal_units(form, left):
    found = norm_decay(orthogonal(4), 1, canonical=form)
    assert found.units.tolist() == [4]
    np.testing.assert_allclose(found[["ratio", "orthogonal"]], left, rtol=1e-5)
    apart = norm_decay(orthogonal(4), 4, canonical=form)
    assert apart.units.tolist() == [1] * 4
    np.testing.assert_allclose(apart[["ratio", "orthogonal"]], 1.0, rtol=1e-6)


@pytest.mark.parametrize("form", ["raw", "balanced", "outer"])
def test_copies_lose_no_norm(form):
    found = norm_decay(orthogonal(2, copies=3), 2, canonical=form)
    assert found.units.tolist() == [3, 3]
    np.testing.assert_allclose(found.ratio, 1.0, rtol=1e-5)
    assert (found.orthogonal < 0.6).all()


@pytest.mark.parametrize("form", ["raw", "balanced", "svd", "outer"])
def test_norm_decay_is_what_the_parameter_reweighting_mends(stack, form):
    found = norm_decay(stack, 3, canonical=form)
    off, on = (
        wb.merge(stack, "lego", k=3, canonical=form, parameter_reweighting=p, output_reweighting=False)
        for p in (False, True)
    )
    sizes = [
        [
            f.B.norm(dim=0) * f.A.norm(dim=1) if form == "outer" else torch.cat([f.A.T, f.B]).norm(dim=0)
            for f in one.modules.values()
        ]
        for one in (off, on)
    ]
    want = torch.cat(sizes[0]) / torch.cat(sizes[1])
    np.testing.assert_allclose(found.ratio, want, rtol=1e-4)
    assert found.ratio.max() < 1 + 1e-6
    assert list(found.module.unique()) == list(stack.modules)
    with pytest.raises(MergeError, match="k is 0"):
        norm_decay(stack, 0, canonical=form)


def test_variances_in_double_precision(stack):
    generator = torch.Generator().manual_seed(0)
    inputs = {m: torch.randn(50, u.shape[1], generator=generator) * 3 + 5 for m, u in stack}
    adapters = [stack.adapter(name) for name in stack.names]
    real, gauss = variances(adapters, inputs), variances(adapters)
    assert real.index.tolist() == gauss.index.tolist() == list(stack.names)
    for adapter in adapters:
        for m in stack.modules:
            if m not in adapter.modules:
                assert np.isnan(real.loc[adapter.name, m])
                assert np.isnan(gauss.loc[adapter.name, m])
                continue
            delta = adapter.modules[m].B.double() @ adapter.modules[m].A.double()
            outputs = inputs[m].double().numpy() @ delta.numpy().T
            assert real.loc[adapter.name, m] == pytest.approx(outputs.var(0, ddof=1).mean(), rel=1e-4)
            assert gauss.loc[adapter.name, m] == pytest.approx(
                float(torch.trace(delta @ delta.T)) / len(delta), rel=1e-4
            )
    with pytest.raises(MergeError, match="n0: no inputs for"):
        variances(adapters, {})


def test_the_reweightings_restore_the_variance_of_independent_units():
    """The claim of §3 where its premise holds, units drawn independently: the merge has the variance of one adapter."""
    shapes = {"m": (40, 60)}
    stack = Stack.of([random_adapter(shapes, 8, i, name=f"r{i}") for i in range(6)])
    single = variances([stack.adapter(name) for name in stack.names]).to_numpy().mean()
    both, parameter = lego_study.REWEIGHTINGS["both"], lego_study.REWEIGHTINGS["parameter"]
    for k in (4, 8, 16, 48):
        restored = variances([wb.merge(stack, "lego", k=k, **both)]).to_numpy().item() / single
        grown = variances([wb.merge(stack, "lego", k=k, **parameter)]).to_numpy().item() / single
        assert restored == pytest.approx(1.0, abs=0.2)
        assert grown == pytest.approx(k / 8 * restored, rel=1e-4)


# The study


@pytest.fixture(scope="module")
def pool():
    return wb.Pool.open("nano")


@pytest.mark.parametrize(("stratum", "n"), list(lego_grid.SIZES["full"].draws))
def test_draws(pool, stratum, n):
    draws = [lego_study.draw(pool, stratum, n, seed) for seed in range(4)]
    for stack in draws:
        ranks = stack.ranks().amax(1).tolist()
        assert len(stack) == n
        assert len({name.removesuffix("-v2") for name in stack.names}) == n
        assert set(ranks) == ({8} if stratum == "equal" else {2, 4, 8, 16, 32})
    assert draws[0].names == lego_study.draw(pool, stratum, n, 0).names
    assert len({frozenset(stack.names) for stack in draws}) == 4


def test_parts_of_compositions_have_their_operations(pool):
    for spec in world.TARGETS:
        if spec.kind == "composition":
            found = [world.find(name) for name in lego_study.parts_of(spec)]
            assert [up.operation for up in found] == list(spec.parts)
            assert {up.domain for up in found} == {spec.domain}
            assert {up.slug for up in found} <= set(pool.names)


def test_what_tasks_need():
    needed = {
        "rotate-right-letters": "new operation",
        "reverse-digits-quotes": "new format",
        "swap-pairs-digits-quotes": "both",
        "sort-then-drop-last-digits": "two operations",
        "second-then-first-thrice-digits": "composition",
    }
    for name, need in needed.items():
        assert lego_study.needs(wb.tasks.load(f"nano/{name}", n_train=1, n_validation=1, n_test=1)) == need


def test_numbers_of_clusters():
    assert lego_study.clusters(56) == [1, 2, 4, 8, 16, 32, 56]
    assert lego_study.clusters(64, 4) == [1, 4, 16, 64]
    assert lego_study.clusters(1) == [1]


def test_variants_are_known_and_fit(pool):
    stack = pool.stack(["rotate-right-letters", "sort-animals-quotes"])
    variants = lego_study._variants(lego_study._width(stack), lego_study._most(stack))
    for choices in variants.values():
        for method, options in [choices] if isinstance(choices, tuple) else choices:
            wb.merge.methods()[method].settings(options)
            assert options.get("k", 0) <= lego_study._most(stack)
    assert {"average", "ties", "dare_ties", "tsv", "knots_ties", "lego"} < set(variants)


def test_cuts_of_one_adapter(base):
    """Each has k units; the random ones are the adapter's own, and differ by seed."""
    adapter = random_adapter(base, 8, 0)
    found = list(lego_study._cuts(adapter))
    assert found[0] == ("alone", 8, adapter)
    assert found[1][:2] == ("zero-shot", 0)
    assert found[1][2].norm() == 0
    assert [k for name, k, _ in found if name == "lego"] == [1, 2, 4]
    assert {(k, one.rank) for _, k, one in found[2:]} == {(1, 1), (2, 2), (4, 4)}
    drawn = [one for name, k, one in found if (name, k) == ("random units", 4)]
    rows = {m: {tuple(row) for row in torch.cat([f.A, f.B.T], 1).tolist()} for m, f in adapter.modules.items()}
    for one in drawn:
        assert all(
            {tuple(row) for row in torch.cat([f.A, f.B.T], 1).tolist()} < rows[m] for m, f in one.modules.items()
        )
    assert len({one.digest() for one in drawn}) == 3


def test_jobs_differ_and_every_study_has_some():
    for size in lego_grid.SIZES.values():
        found = lego_grid.jobs(size)
        assert len(set(found)) == len(found)
        assert {job.study for job in found} == set(lego_study.STUDIES)


def test_parts_resume_and_gather(tmp_path, monkeypatch, capsys):
    """Three shares do each job once; what is stored is not run again, and other settings are other jobs."""
    size, ran = replace(lego_grid.SIZES["tiny"], forms=("raw",)), []

    def stand_in(base, pool, job, examples):
        ran.append(job)
        task = f"nano/{job.stratum}" if job.study == "composition" else "nano/rotate-right-letters"
        scores = {"accuracy": 1 / 3, "control": None, "limit": 0, "k": 2, "rank": 8, "own_rank": 8, "seed": 0}
        return pd.DataFrame([{"task": task, "n_validation": 1, "n_test": 1, **scores}])

    for name in lego_study.STUDIES:
        monkeypatch.setitem(lego_study.STUDIES, name, stand_in)
    monkeypatch.setitem(lego_grid.SIZES, "tiny", size)
    every = lego_grid.jobs(size)
    lego_grid.run(tmp_path / "runs", size, part=0, parts=3)
    with pytest.raises(WorkbenchError, match=f"of {len(every)} jobs are not stored"):
        lego_grid.gather(tmp_path / "runs", tmp_path / "out", size)
    for part in (1, 2):
        lego_grid.run(tmp_path / "runs", size, part=part, parts=3)
    assert sorted(map(repr, ran)) == sorted(map(repr, every))
    arguments = ["--size", "tiny", "--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    lego_grid.main(arguments)
    assert len(ran) == len(every)
    assert str(tmp_path / "out" / "grid_lego.parquet") in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "out" / "grid_lego.parquet")
    assert table.study.tolist() == [job.study for job in every]
    assert set(table[table.study == "composition"].needs) == {"composition"}
    assert set(table[table.study == "merge"].needs) == {"new operation"}
    assert table.accuracy.dtype == "float32"
    assert table.k.dtype == "int32"
    assert (table.control == "").all()
    lego_grid.run(tmp_path / "runs", replace(size, examples=replace(size.examples, test=11)), studies=("prune",))
    assert len(ran) == len(every) + 1


def test_the_stored_grid_is_whole(pool):
    """The rows that notebook 05 draws: of every job at full size, and of the bundled pool."""
    path = Path(__file__).parents[1] / "figures" / "grid_lego.parquet"
    table = pd.read_parquet(path)
    found = table[["study", "stratum", "adapters", "draw"]].drop_duplicates()
    every = {(job.study, job.stratum, job.n, job.draw) for job in lego_grid.jobs(lego_grid.SIZES["full"])}
    assert set(found.itertuples(index=False, name=None)) == every
    assert set(table[table.study.isin(["sweep", "scale"])].canonical) == {"raw", "balanced", "svd", "outer"}
    assert table[table.study != "scale"][["accuracy", "accuracy_unscaled", "loss"]].notna().all(axis=None)
    assert table[table.study == "scale"].value.notna().all()
    assert set(table.pool) == {pool.digest}
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
def test_every_study_on_the_bundled_pool(tmp_path, monkeypatch):
    variants = {"average": ("average", {}), "lego": [("lego", {"k": k}) for k in (2, 6)]}
    monkeypatch.setattr(lego_study, "_variants", lambda width, most: variants)
    monkeypatch.setattr(lego_study, "_PRUNED", 1)
    size = replace(
        lego_grid.SIZES["tiny"],
        forms=("raw",),
        compositions=1,
        examples=lego_study.Examples(4, 2, 6, 3),
        draws={("mixed", 2): 1},
    )
    lego_grid.run(tmp_path / "runs", size, device="cpu", say=lambda line: None)
    table = pd.read_parquet(lego_grid.gather(tmp_path / "runs", tmp_path, size))
    for study in ("merge", "composition"):
        part = table[table.study == study]
        assert {"average", "lego", "best single", "new adapter, 4 examples", "zero-shot"} <= set(part.variant)
        assert set(part.control) == {"", "sigma"}
        assert part[["accuracy", "accuracy_unscaled", "loss"]].notna().all(axis=None)
    assert (table[(table.study == "merge") & (table.variant == "alone")].accuracy > 0.5).all()
    sweep = table[table.study == "sweep"]
    assert set(sweep.reweighting) == set(lego_study.REWEIGHTINGS)
    assert set(sweep.k) == {1, 2, 4, 8, 16}
    scale = table[(table.study == "scale") & (table.k == 16)]  # all units: nothing is clustered
    np.testing.assert_allclose(scale[scale.measure.str.startswith("norm decay")].value, 1.0, rtol=1e-5)
    plain = scale[scale.reweighting == "none"].value
    np.testing.assert_allclose(scale[scale.reweighting == "both"].value, plain / 2, rtol=1e-4)
    prune = table[table.study == "prune"].set_index(["variant", "k"]).sort_index()
    full = int(prune.own_rank.iloc[0])
    assert prune.loc[("alone", full), "accuracy_unscaled"].item() == prune.own.iloc[0]
    assert prune.loc[("truncated svd", full // 2), "accuracy"].item() > prune.loc[("zero-shot", 0), "accuracy"].item()
    assert len(prune.loc[("random units", 1)]) == 3
