"""The benchmark of merging: its lines, and that what is compared computes the same."""

from collections import Counter

import pytest
import torch
from sklearn.cluster import KMeans

from helpers import peft_s_own_warnings
from workbench.bench import merging, random_adapters
from workbench.merge import merge, methods
from workbench.merge.lego import features
from workbench.stack import Stack


def stack(shape=(24, 20), number=3, rank=4, dtype=torch.float32):
    return Stack.of(random_adapters({"m": shape}, number, rank, dtype=dtype))


def test_lines_of_every_method_and_of_what_each_is_compared_to():
    with peft_s_own_warnings():
        lines = list(merging.lines("nano", "cpu", quick=True))
    assert {line.area for line in lines} == {"merging"}
    assert {line.work.partition(":")[0] for line in lines} >= set(methods())
    ways = {}
    for line in lines:
        assert line.timing.seconds > 0
        assert line.way not in ways.setdefault(line.work, [])
        ways[line.work].append(line.way)
    assert all(line.against in ways[line.work] for line in lines)
    compared = {work.partition(":")[0] for work, some in ways.items() if "ours" in some and len(some) > 1}
    assert compared >= {"ties", "dare_linear", "dare_ties", "magnitude_prune", "svd", "tsv", "lego"}
    lego = [line for line in lines if line.error is not None]
    assert [line.work.partition(":")[0] for line in lego] == ["lego"]
    assert abs(lego[0].error) < 0.1


def test_a_model_s_time_is_that_of_its_shapes_by_their_number(monkeypatch):
    seen = Counter()
    plain = merge

    def watched(some, name, **options):
        seen[some.modules["m"].shape if isinstance(some, Stack) else "adapters"] += 1
        return plain(some, name, **options)

    monkeypatch.setattr(merging, "merge", watched)
    shapes = Counter({(24, 20): 3, (12, 20): 2})
    lines = list(merging._whole(shapes, stack, "cpu"))
    assert {line.work.partition(":")[0] for line in lines} == {
        name for name, record in methods().items() if not record.needs and name != "cat"
    }
    assert all(line.per == 5 and line.unit == "module" for line in lines)
    assert set(seen) == {(24, 20), (12, 20), "adapters"}
    errors = {line.work.partition(":")[0]: line.error for line in lines}
    assert {name for name, error in errors.items() if error is not None} == set(merging.EXACT)
    assert max(errors[name] for name in merging.EXACT) < 1e-3


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
def test_peft_s_functions_compute_the_same_of_all_deltas(name):
    some = stack()
    ours = merge(some, name).modules["m"]
    assert torch.allclose(merging.peft_dense(some, name), ours, atol=1e-6)


def test_peft_s_svd_computes_the_same_and_its_ties_do_not():
    some = stack()
    with peft_s_own_warnings():
        runs = [merging.peft_merge(some, name) for name in ("svd", "ties")]
        theirs, ties = (run() for run in runs)
        assert torch.equal(theirs, runs[0]())
    assert torch.allclose(theirs, merge(some, "svd", of="sum").modules["m"].delta(), atol=1e-5)
    dense = merge(some, "ties").modules["m"]
    assert float((ties - dense).norm() / dense.norm()) > 0.3


def test_inertia_is_scikit_learn_s():
    units = stack().modules["m"]
    theirs = KMeans(4, n_init=4, random_state=0, tol=0.0).fit(features(units).numpy())
    assert merging.inertia(units, torch.from_numpy(theirs.labels_).long()) == pytest.approx(theirs.inertia_, rel=1e-4)
    run, found = merging.measured_kmeans(units, 4, 4)
    assert found == pytest.approx(theirs.inertia_, rel=1e-4)
    assert (run().labels_ == theirs.labels_).all()
