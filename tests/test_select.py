"""Selection: rankings against one adapter at a time, windows of them, and what is refused."""

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import dense_model, generate, random_adapter, tiny_base
from workbench import select
from workbench.compose import grouped
from workbench.errors import AdapterError, SelectionError, TaskError
from workbench.evaluate import encode, evaluate
from workbench.pool import Pool
from workbench.select import SELECTIONS, choose, rank_adapters, selection
from workbench.tasks import Example, Task

LIMIT = 2
SKILLED = "n3"  # the targets are what this adapter makes the base say


class Untouchable(tuple):
    """Examples that must not be looked at."""

    def _never(self, *_):
        raise AssertionError("a split that is not for training was looked at")

    __iter__ = __getitem__ = __len__ = __hash__ = __eq__ = __bool__ = _never


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=20.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    """Seven adapters of unequal ranks and targets; n5 and n6 are the same."""
    folder = tmp_path_factory.mktemp("pool")
    for i in range(7):
        targets = ["q_proj", "v_proj"] if i == 2 else None
        random_adapter(base, (2, 5, 3, 4, 1, 3, 3)[i], min(i, 5), targets, name=f"n{i}").save(folder / f"n{i}")
    return Pool.open(folder)


@pytest.fixture(scope="module")
def task(pool, base):
    """Fourteen examples that n3 answers, and six that nobody need answer."""
    adapter = pool.adapter(SKILLED)
    model = dense_model(base, {m: f.delta() for m, f in adapter.modules.items()})
    rng = random.Random(0)
    draft = Task("own", "say", (), Untouchable(), Untouchable(), max_new_tokens=LIMIT)
    known = []
    while len(known) < 14:
        example = Example("".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 12))).strip() or "a", "a")
        prompt = encode(base, draft.prompt(example), "a").prompt
        (said,) = generate(base, [prompt], LIMIT, model)
        text = base.tokenizer.decode(said)
        if len(text) == LIMIT and "\n" not in text and base.tokenizer(text)["input_ids"] == said:
            known.append(Example(example.input, text))
    hard = [Example(f"{i} {i}", "zz") for i in range(6)]
    return replace(draft, train=tuple(known + hard))


def one_by_one(pool, task, base):
    """The oracle: each adapter by itself, on the training examples as if they were a test set."""
    rows = []
    for name in pool.names:
        result = evaluate(base, replace(task, test=task.train), grouped([pool.adapter(name)]))
        rows.append((name, float(result.accuracy), float(result.loss.mean())))
    return pd.DataFrame(rows, columns=["name", "accuracy", "loss"]).set_index("name")


def test_ranking_against_one_adapter_at_a_time(pool, task, base):
    table = rank_adapters(pool, task, base)
    oracle = one_by_one(pool, task, base)
    assert list(table.columns) == ["name", "accuracy", "loss"]
    assert sorted(table["name"]) == sorted(pool.names)
    got = table.set_index("name").loc[oracle.index]
    assert got["accuracy"].tolist() == pytest.approx(oracle["accuracy"].tolist())
    assert got["loss"].tolist() == pytest.approx(oracle["loss"].tolist(), rel=1e-4)
    assert oracle.loc[SKILLED, "accuracy"] > 0.65
    assert table["name"][0] == SKILLED
    rest = list(zip(-table["accuracy"], table["loss"].round(6), table["name"], strict=True))
    assert rest == sorted(rest)
    places = table["name"].tolist()
    assert places.index("n6") == places.index("n5") + 1  # the same adapter twice: by name


def test_small_groups_rank_as_large_ones(pool, task, base, monkeypatch):
    whole = rank_adapters(pool, task, base)
    chunks = select._chunks
    monkeypatch.setattr(select, "_chunks", lambda pool, _: chunks(pool, 1))
    pool.rankings.clear()
    alone = rank_adapters(pool, task, base)
    pool.rankings.clear()
    assert alone["name"].tolist() == whole["name"].tolist()
    assert alone["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=1e-4)


@given(st.integers(1, 400_000))
def test_groups_hold_every_adapter_within_the_budget(pool, budget):
    chunks = select._chunks(pool, budget)
    assert sorted(name for chunk in chunks for name in chunk) == sorted(pool.names)
    for chunk in chunks:
        built = grouped([pool.adapter(name) for name in chunk])
        size = sum(4 * (update.A.numel() + update.B.numel()) for update in built.values())
        assert size <= budget or len(chunk) == 1


def test_asking_again_scores_nothing_and_gives_a_copy(pool, task, base, monkeypatch):
    first = rank_adapters(pool, task, base)
    first.loc[0, "name"] = "spoilt"
    monkeypatch.setattr(select, "score", None)
    assert rank_adapters(pool, task, base)["name"][0] == SKILLED
    with pytest.raises(TypeError):
        rank_adapters(pool, replace(task, train=task.train[:3]), base)  # other examples are scored anew


def test_evaluation_takes_the_best(pool, task, base):
    ranking = tuple(rank_adapters(pool, task, base)["name"])
    assert pool.select("evaluation", 3, task=task, base=base).names == ranking[:3]
    assert pool.select("evaluation", 2, task=task, base=base, skip=4).names == ranking[4:6]
    assert pool.select("evaluation", len(pool), task=task, base=base).names == ranking


def test_random_is_seeded_and_grows(pool):
    assert pool.select("random", 3, seed=1).names == pool.select("random", 5, seed=1).names[:3]
    assert pool.select("random", 2, seed=1, skip=3).names == pool.select("random", 5, seed=1).names[3:]
    assert len({pool.select("random", 5, seed=seed).names for seed in range(8)}) > 4
    random.seed(0)
    before, torch_before = random.getstate(), torch.get_rng_state()
    chosen = pool.select("random", 4, seed=3).names
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    random.seed(1)
    assert pool.select("random", 4, seed=3).names == chosen


def test_every_adapter_is_as_likely(pool):
    """Each of 7 adapters is among the first 2 in 2/7 of the seeds, within five standard errors."""
    seeds = 2000
    counts = dict.fromkeys(pool.names, 0)
    for seed in range(seeds):
        for name in choose(pool, "random", 2, seed=seed):
            counts[name] += 1
    share = 2 / 7
    for count in counts.values():
        assert abs(count - seeds * share) < 5 * (seeds * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("how", "k", "options", "message"),
    [
        ("random", 0, {}, "k is 0 and skip is 0"),
        ("random", 1, {"skip": -1}, "skip is -1"),
        ("random", 8, {}, "8 adapters asked for, but pool .* has 7"),
        ("random", 5, {"skip": 3}, "5 adapters asked for after the first 3, but pool .* has 7"),
        ("evalution", 2, {}, "no selection method 'evalution'; did you mean evaluation?"),
        ("zzz", 2, {}, "choose one of evaluation, random"),
    ],
)
def test_what_cannot_be_selected(pool, how, k, options, message):
    with pytest.raises(SelectionError, match=message):
        pool.select(how, k, **options)


def test_evaluation_needs_a_task_with_examples_and_a_base(pool, task, base):
    with pytest.raises(SelectionError, match="needs a task"):
        pool.select("evaluation", 2, base=base)
    with pytest.raises(SelectionError, match="needs a base"):
        pool.select("evaluation", 2, task=task)
    with pytest.raises(TaskError, match="own has no training examples"):
        pool.select("evaluation", 2, task=replace(task, train=()), base=base)


def test_another_base_is_named_with_the_adapter(pool, task, base):
    small = tiny_base()
    del small.model.model.layers[1]
    with pytest.raises(AdapterError, match=r"n\d: the base has no layer model\.layers\.1\."):
        rank_adapters(pool, task, small)


def test_nothing_accepted_cannot_be_ranked(tmp_path, task, base):
    random_adapter(base, 2).times(0.0).save(tmp_path / "pool" / "zero")
    with pytest.raises(SelectionError, match="no accepted adapter"):
        rank_adapters(Pool.open(tmp_path / "pool"), task, base)


def test_methods_can_be_added(pool, monkeypatch):
    monkeypatch.setattr(select, "SELECTIONS", dict(SELECTIONS))

    @selection("by name, backwards")
    def backwards(pool, **_):
        return sorted(pool.names, reverse=True)

    assert pool.select("by name, backwards", 2).names == ("n6", "n5")
    assert "by name, backwards" not in SELECTIONS
