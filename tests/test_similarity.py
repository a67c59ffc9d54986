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
from workbench.similarity import norm_profile, ordered, pairs, similarity
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
