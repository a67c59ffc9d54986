"""Similarity tables against dense cosines, and evaluate_many against one adapter at a time."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import random_adapter, tiny_base
from workbench import Stack
from workbench.compose import grouped
from workbench.errors import SelectionError, TaskError
from workbench.evaluate import evaluate, evaluate_many
from workbench.similarity import by_layer, norm_profile, ordered, pairs, plane, similarity, tree
from workbench.spectra import singular_values, spectrum
from workbench.tasks import load


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def stack(base):
    adapters = [random_adapter(base, rank=2 + i, seed=i) for i in range(3)]
    near = random_adapter(base, rank=2, seed=0)
    return Stack.of([replace(a, name=f"a{i}") for i, a in enumerate([*adapters, near.times(-2.0)])])


def dense(stack, name):
    adapter = stack.adapter(name)
    return {module: adapter.modules[module].delta().double() for module in stack.modules}


def test_similarity_is_the_cosine_of_dense_updates(stack):
    found = similarity(stack)
    flat = {name: torch.cat([d.flatten() for d in dense(stack, name).values()]) for name in stack.names}
    for first in stack.names:
        for second in stack.names:
            expected = torch.nn.functional.cosine_similarity(flat[first], flat[second], dim=0)
            assert found.at[first, second] == pytest.approx(float(expected), abs=1e-5)
    assert found.at["a0", "a3"] == pytest.approx(-1.0, abs=1e-5)


def test_norm_profile_is_the_dense_norm_per_module(stack):
    profile = norm_profile(stack)
    for name in stack.names:
        for module, delta in dense(stack, name).items():
            assert profile.at[name, module] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_ordered_puts_like_ones_side_by_side_and_keeps_the_values():
    names = list("abcdef")
    group = np.array([0, 1, 0, 1, 0, 1])
    matrix = pd.DataFrame(np.where(group[:, None] == group, 0.9, 0.0) + 0.1 * np.eye(6), index=names, columns=names)
    found = ordered(matrix)
    assert list(found.index) == list(found.columns)
    assert {"".join(sorted(found.index[:3])), "".join(sorted(found.index[3:]))} == {"ace", "bdf"}
    assert found.at["a", "c"] == 0.9
    assert ordered(matrix.iloc[:2, :2]).equals(matrix.iloc[:2, :2])


def test_pairs_name_what_two_adapters_share():
    matrix = pd.DataFrame([[1, 0.5, 0.1], [0.5, 1, 0.2], [0.1, 0.2, 1]], index=list("xyz"), columns=list("xyz"))
    labels = pd.DataFrame(
        {"operation": ["sort", "sort", "first"], "domain": ["days", "days", "letters"]}, index=list("xyz")
    )
    table = pairs(matrix, labels).set_index(["first", "second"])
    assert len(table) == 6
    assert table.at[("x", "y"), "shared"] == "operation + domain"
    assert table.at[("x", "z"), "shared"] == "nothing"
    assert table.at[("y", "z"), "cosine"] == 0.2
    assert table.at[("z", "x"), "operation"] == "first"
    with pytest.raises(SelectionError, match="no labels, such as 'z'"):
        pairs(matrix, labels.iloc[:2])


def test_evaluate_many_equals_one_adapter_and_task_at_a_time(base, stack):
    tasks = [
        load(f"nano/{name}", n_train=1, n_validation=1, n_test=6) for name in ("has-repeat-fruits", "is-sorted-days")
    ]
    adapters = [stack.adapter(name).times(0.3) for name in stack.names[:3]]
    found = evaluate_many(base, adapters, tasks)
    assert found.shape == (3, 2)
    for adapter in adapters:
        for task in tasks:
            alone = float(evaluate(base, task, grouped([adapter])).accuracy)
            assert found.at[adapter.name, task.name] == pytest.approx(alone)
    with pytest.raises(TaskError, match="equally many test"):
        evaluate_many(base, adapters, [tasks[0], load("nano/mirror-months", n_test=3)])


def test_similarity_tells_how_far_it_is_and_can_be_stopped(stack):
    told = []
    assert similarity(stack, watch=lambda *a: told.append(a)).equals(similarity(stack))
    n = len(stack.modules)
    assert told == [(i, n, module) for i, module in enumerate(stack.modules)]
    with pytest.raises(SelectionError, match=f"stopped after 2 of {n} modules"):
        similarity(stack, watch=lambda done, *_: done == 2)


def test_the_plane_keeps_the_distances_of_what_is_flat():
    angles = np.array([0.1, 0.4, 2.0, 4.5, 5.9])
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    names = list("abcde")
    found = plane(pd.DataFrame(points @ points.T, index=names, columns=names))
    assert (list(found.index), list(found.columns)) == (names, ["x", "y"])
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert np.allclose(np.linalg.norm(found.to_numpy()[:, None] - found.to_numpy()[None], axis=2), apart)


def test_the_plane_of_one_adapter_and_of_equal_ones():
    assert plane(pd.DataFrame([[1.0]], index=["a"], columns=["a"])).to_numpy().tolist() == [[0.0, 0.0]]
    same = plane(pd.DataFrame(np.ones((3, 3)), index=list("abc"), columns=list("abc"))).to_numpy()
    assert np.allclose(same, 0)


def test_the_tree_joins_the_most_alike_first():
    matrix = pd.DataFrame([[1, 0.2, 0.9], [0.2, 1, 0.1], [0.9, 0.1, 1]], index=list("abc"), columns=list("abc"))
    for optimal in (True, False):
        found = tree(matrix, optimal=optimal)
        assert set(found[0, :2]) == {0, 2}
        assert found[:, 2] == pytest.approx([0.1, 0.85])
    with pytest.raises(SelectionError, match="two adapters or more, got 1"):
        tree(matrix.iloc[:1, :1])


def test_a_profile_by_layer_adds_squares():
    names = ["layers.10.q", "layers.2.q", "layers.2.v", "head"]
    found = by_layer(pd.DataFrame([[1.0, 3.0, 4.0, 2.0], [np.nan, 5.0, np.nan, 0.0]], columns=names))
    assert list(found.columns) == ["2", "10", "head"]
    assert found.to_numpy().tolist() == [[5.0, 1.0, 2.0], [5.0, 0.0, 0.0]]
    two = by_layer(pd.DataFrame([[1.0, 2.0, 3.0]], columns=["decoder.0.q", "encoder.0.q", "encoder.1.q"]))
    assert list(two.columns) == ["decoder.0", "encoder.0", "encoder.1"]


def test_a_spectrum_is_of_one_module_or_the_median(stack):
    values = singular_values(stack.adapter("a1"))
    module = next(iter(stack.modules))
    want = torch.linalg.svdvals(dense(stack, "a1")[module])[:3]
    assert spectrum(values, module).to_list() == pytest.approx(want.tolist(), rel=1e-4)
    every = torch.stack([torch.linalg.svdvals(d)[:3] for d in dense(stack, "a1").values()]).numpy()
    assert spectrum(values).to_list() == pytest.approx(np.median(every, 0).tolist(), rel=1e-4)
    assert spectrum(values, "no such module").empty
