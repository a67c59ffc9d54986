"""Selection: rankings against oracles that take one adapter at a time, windows of them, leaks, and what is refused."""

import math
import random
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import dense_model, generate, random_adapter, tiny_base
from workbench import select
from workbench.adapt.fresh import train_fresh
from workbench.closeness import MEASURES, closeness
from workbench.compose import grouped
from workbench.errors import AdapterError, SelectionError, TaskError
from workbench.evaluate import encode, encode_task, evaluate
from workbench.pool import Pool
from workbench.select import (
    SELECTIONS,
    choose,
    rank_adapters,
    rank_by_closeness,
    rank_diverse,
    selection,
    train_target,
)
from workbench.similarity import similarity
from workbench.tasks import Example, Task

LIMIT = 2
SKILLED = "n3"  # the targets are what this adapter makes the base say
CLOSE = [measure + mean for measure in MEASURES for mean in ("", "_mean")]
close = pytest.mark.parametrize("how", CLOSE)


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


def test_a_pool_larger_than_memory_ranks_alike(pool, task, base, monkeypatch):
    """Read module by module, and never an adapter as a whole."""
    whole = rank_adapters(pool, task, base)
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(Pool, "adapter", None)
    large = Pool.open(pool._folders["n0"].parent)
    assert rank_adapters(large, task, base).equals(whole)
    chunks, built = select._chunks, []
    monkeypatch.setattr(select, "_chunks", lambda pool, _: built.append(chunks(pool, 40_000)) or built[-1])
    alone = rank_adapters(Pool.open(pool._folders["n0"].parent), task, base)
    assert 1 < len(built[0]) < 7
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
    monkeypatch.setattr(select, "judged", None)
    assert rank_adapters(pool, task, base)["name"][0] == SKILLED
    with pytest.raises(TypeError):
        rank_adapters(pool, replace(task, train=task.train[:3]), base)  # other examples are scored anew
    with pytest.raises(TypeError):
        rank_adapters(pool, replace(task, metric="normalised match"), base)  # and so is another metric


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
        ("zzz", 2, {}, "choose one of abs, abs_mean, clamp, .* evaluation, .* random, rank"),
        ("cosin", 2, {}, "no selection method 'cosin'; did you mean cosine,"),
        ("cosine", 3, {"skip": 5}, "3 adapters asked for after the first 5"),  # before anything is trained
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
    with pytest.raises(SelectionError, match="selection by diverse needs a task"):
        pool.select("diverse", 2, base=base)
    with pytest.raises(SelectionError, match="selection by diverse needs a base"):
        pool.select("diverse", 2, task=task)


def test_another_base_is_named_with_the_adapter(pool, task, base):
    small = tiny_base()
    del small.model.model.layers[1]
    with pytest.raises(AdapterError, match=r"n\d: the base has no layer model\.layers\.1\."):
        rank_adapters(pool, task, small)


def test_nothing_accepted_cannot_be_ranked(tmp_path, task, base):
    random_adapter(base, 2).times(0.0).save(tmp_path / "pool" / "zero")
    empty = Pool.open(tmp_path / "pool")
    with pytest.raises(SelectionError, match="no accepted adapter"):
        rank_adapters(empty, task, base)
    with pytest.raises(SelectionError, match="no accepted adapter"):
        rank_diverse(empty, task, base)
    with pytest.raises(SelectionError, match="no accepted adapter"):
        rank_by_closeness(empty, random_adapter(base, 2), "cosine")


def test_methods_can_be_added(pool, monkeypatch):
    monkeypatch.setattr(select, "SELECTIONS", dict(SELECTIONS))

    @selection("by name, backwards")
    def backwards(pool, **_):
        return sorted(pool.names, reverse=True)

    assert pool.select("by name, backwards", 2).names == ("n6", "n5")
    assert "by name, backwards" not in SELECTIONS


def test_what_there_is():
    added = {name for name in SELECTIONS if name.startswith("dial ")}  # by the laboratory, once it is imported
    assert set(SELECTIONS) - added == {"random", "evaluation", "rank", "diverse", *CLOSE}
    assert {"cosine", "clamp", "abs", "clamp_pm", "qfim", "qfim_mean"} <= set(CLOSE)
    assert sorted(select.CLOSENESS) == sorted(CLOSE)


def test_by_rank(pool):
    assert pool.select("rank", 7).names == ("n1", "n3", "n2", "n5", "n6", "n0", "n4")  # 5, 4, 3, 3, 3, 2, 1
    assert pool.select("rank", 2, skip=2, seed=4).names == ("n2", "n5")


@pytest.fixture(scope="module")
def target(pool):
    """n1 moved some way towards n4, in three of its modules."""
    modules = {}
    for m in list(pool.adapter("n1").modules)[:3]:
        f, g = (pool.adapter(name).modules[m] for name in ("n1", "n4"))
        modules[m] = replace(f, B=torch.cat([f.B, 0.7 * g.B], 1), A=torch.cat([f.A, g.A]))
    return replace(pool.adapter("n1"), name="goal", modules=modules, base="")


def by_value(pool, target, how):
    """The oracle: the whole pool as one stack in another order, sorted by value, then by name."""
    measure, _, mean = how.partition("_m")
    names = sorted(pool.names, key=lambda name: name[::-1], reverse=True)
    values = closeness(pool.stack(names), target, measure, mean=bool(mean)).double()
    return sorted(names, key=lambda name: (-round(float(values[names.index(name)]), 6), name))


@close
def test_closeness_takes_the_closest(pool, target, how, monkeypatch):
    ranking = by_value(pool, target, how)
    assert ranking[0] == "n1"
    assert ranking.index("n6") == ranking.index("n5") + 1  # the same adapter twice: by name
    assert list(pool.select(how, 3, target=target).names) == ranking[:3]
    assert list(pool.select(how, 2, target=target, skip=4).names) == ranking[4:6]
    assert choose(pool, how, len(pool), target=target, seed=5) == ranking
    chunks = select._chunks
    monkeypatch.setattr(select, "_chunks", lambda pool, _: chunks(pool, 1)[::-1])
    assert choose(pool, how, len(pool), target=target) == ranking  # one adapter at a time


def test_equal_but_for_rounding_is_by_name(tmp_path, target):
    """One update at several scales, in several factorings and ranks: as close as each other, but for the last digits."""
    for i, name in enumerate("fcaebd"):
        modules = {}
        for m, f in target.modules.items():
            M = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(i)))[0]
            padding = torch.zeros(f.B.shape[0], i)
            A = torch.cat([M.T @ f.A, torch.zeros(i, f.A.shape[1])])
            modules[m] = replace(f, B=torch.cat([f.B @ M * (1 + i), padding], 1), A=A)
        replace(target, modules=modules, name=name).save(tmp_path / "pool" / name)
    pool = Pool.open(tmp_path / "pool")
    goal = random_adapter({m: (f.B.shape[0], f.A.shape[1]) for m, f in target.modules.items()}, 3, 77)
    raw = 0
    for how in CLOSE:
        assert choose(pool, how, 6, target=goal) == list("abcdef")
        values = closeness(pool.stack(), goal, how.split("_m")[0], mean="_m" in how)
        raw += values.unique().numel() > 1
    assert raw > 0  # values alone would order them otherwise


def test_measures_choose_differently(pool, target):
    assert len({tuple(choose(pool, how, len(pool), target=target)) for how in CLOSE}) > 2


def test_an_adapter_of_the_pool_as_target_comes_first_and_its_negative_last(pool):
    for how in CLOSE:
        assert choose(pool, how, 1, target=pool.adapter("n4")) == ["n4"]
        assert choose(pool, how, 2, target=pool.adapter("n6")) == ["n5", "n6"]
    for how in ("cosine", "cosine_mean", "clamp", "clamp_mean"):
        assert choose(pool, how, 7, target=pool.adapter("n4").times(-0.3))[-1] == "n4"


@close
def test_one_without_a_common_module_is_at_nought(pool, how, monkeypatch):
    """n2 has q and v alone; whether it has a chunk to itself does not matter."""
    goal = random_adapter(tiny_base(), 2, 50, ["up_proj", "o_proj"], name="goal")
    ranking = by_value(pool, goal, how)
    assert ranking == choose(pool, how, 7, target=goal)
    chunks = select._chunks
    monkeypatch.setattr(select, "_chunks", lambda pool, _: chunks(pool, 1))
    assert ranking == choose(pool, how, 7, target=goal)
    assert how.startswith(("cosine", "clamp_pm")) or ranking[-1] == "n2"
    alien = replace(goal, modules={"model." + m: f for m, f in goal.modules.items()})
    with pytest.raises(SelectionError, match="target goal shares no module"):
        choose(pool, how, 2, target=alien)


def test_what_cannot_be_a_target(pool, target, base):
    with pytest.raises(SelectionError, match="expected the target as an Adapter, got str"):
        pool.select("clamp", 2, target="n3")
    with pytest.raises(SelectionError, match="target goal: its update is 0"):
        pool.select("cosine_mean", 2, target=target.times(0.0))
    other = random_adapter({m: (a + 1, b) for m, (a, b) in base.projections.items()}, 2, name="wider")
    with pytest.raises(SelectionError, match=r"target wider: model\S+ is 33×32, but 32×32 in n\d"):
        pool.select("qfim", 2, target=other)


@close
def test_closeness_without_a_target_needs_a_task_and_a_base(pool, task, base, how):
    with pytest.raises(SelectionError, match=rf"selection by {how} needs a task \(or the adapter .*target=…\): pool"):
        pool.select(how, 2, base=base)
    with pytest.raises(SelectionError, match=f"selection by {how} needs a base"):
        pool.select(how, 2, task=task)
    with pytest.raises(TaskError, match="own has no training examples to train a target"):
        pool.select(how, 2, task=replace(task, train=()), base=base)


@pytest.fixture
def short(monkeypatch):
    """Training of a few steps, counted."""
    schedule, calls = replace(select.NEW_ADAPTER, steps=6, every=2), []

    def counted(*args, **settings):
        calls.append(args[1])
        return train_fresh(*args, **settings)

    monkeypatch.setattr(select, "NEW_ADAPTER", schedule)
    monkeypatch.setattr(select, "train_fresh", counted)
    return schedule, calls


def splits(task):
    """The same training examples under other validation and test examples."""
    words = [Example(f"{word} {i}", word) for i, word in enumerate("abcdefgh")]
    return replace(task, validation=tuple(words[:4]), test=tuple(words[4:]))


def test_a_target_is_trained_on_the_training_examples(pool, task, base, short):
    schedule, calls = short
    pool.rankings.clear()
    task = replace(task, validation=task.train[:5])  # its test split is untouchable
    train, validation = encode_task(base, task, task.train), encode_task(base, task, task.validation)
    (goal,), curves = train_fresh(base, ["x"], [train], [validation], schedule, seeds=[3])
    assert curves.validation.argmin() > 0
    before, torch_before = random.getstate(), torch.get_rng_state()
    for how in ("cosine", "qfim_mean"):
        assert choose(pool, how, 7, task=task, base=base, seed=3) == choose(pool, how, 7, target=goal)
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert calls == [["target-own"]]  # once, for both
    assert train_target(pool, task, base, seed=3).digest() == goal.digest()
    assert train_target(pool, task, base, seed=4).digest() != goal.digest()
    assert len(calls) == 2
    other = replace(task, train=task.train[:9])
    assert train_target(pool, other, base, seed=3).digest() != goal.digest()
    assert choose(pool, "cosine", 7, task=task, base=base, target=pool.adapter("n4"))[0] == "n4"
    assert len(calls) == 3
    pool.rankings.clear()


def test_validation_picks_the_step_and_nothing_more(pool, task, base, short):
    """Without validation the last step's adapter; with it one of the steps checked, on the same way."""
    schedule, _ = short
    train = [encode_task(base, task, task.train)]
    last, _ = train_fresh(base, ["x"], train, None, schedule, seeds=[0])
    assert train_target(pool, replace(task, validation=()), base).digest() == last[0].digest()
    chosen = set()
    for validation in (task.train[:5], splits(task).validation):
        rows = [encode_task(base, task, validation)]
        (expected,), curves = train_fresh(base, ["x"], train, rows, schedule, seeds=[0])
        found = train_target(pool, replace(task, validation=validation), base).digest()
        assert found == expected.digest()
        assert (found == last[0].digest()) == (int(curves.validation.argmin()) == len(curves.at) - 1)
        chosen.add(found)
    assert len(chosen) == 2
    pool.rankings.clear()


def test_a_target_that_training_left_at_nought_is_refused(pool, task, base, monkeypatch):
    monkeypatch.setattr(select, "NEW_ADAPTER", replace(select.NEW_ADAPTER, steps=0))
    with pytest.raises(SelectionError, match="target target-own: its update is 0"):
        pool.select("abs", 2, task=splits(task), base=base, seed=8)
    pool.rankings.clear()


def test_validation_and_test_examples_choose_nothing(pool, task, base, target):
    """`task` has splits that fail when looked at; the others have examples that each adapter answers differently."""
    for how in ("random", "rank", "evaluation", "diverse", *CLOSE):
        options = {"base": base, "target": target, "seed": 2}
        pool.rankings.clear()
        first = choose(pool, how, 7, task=task, **options)
        pool.rankings.clear()
        assert choose(pool, how, 7, task=splits(task), **options) == first
        assert choose(pool, how, 7, task=replace(task, validation=task.train, test=task.train), **options) == first


def greedy(pool, task, base, beta):
    """The oracle: the rule as it is written, over the similarity table."""
    table = rank_adapters(pool, task, base)
    names, accuracy = table["name"].tolist(), table["accuracy"]
    z = ((accuracy - accuracy.mean()) / accuracy.std(ddof=0)).tolist()
    alike = similarity(pool.stack(names)).abs().to_numpy().astype(float)
    order = []
    while len(order) < len(names):
        rest = [i for i in range(len(names)) if i not in order]
        gains = [round(z[i] - beta * max((alike[i, j] for j in order), default=0.0), 5) for i in rest]
        order.append(rest[gains.index(max(gains))])
    return [names[i] for i in order]


def test_diverse_against_the_rule(pool, task, base, monkeypatch):
    evaluation = rank_adapters(pool, task, base)["name"].tolist()
    default = choose(pool, "diverse", 7, task=task, base=base)
    assert default == rank_diverse(pool, task, base) == rank_diverse(pool, task, base, beta=1.0)
    assert rank_diverse(pool, task, base, beta=0.0) == evaluation
    found = {beta: rank_diverse(pool, task, base, beta=beta) for beta in (0.2, 1.0, 50.0)}
    for beta, order in found.items():
        assert order == greedy(pool, task, base, beta)
        assert order[0] == evaluation[0] == SKILLED
    assert found[50.0] != evaluation
    assert found[50.0][-1] in ("n5", "n6")  # a copy is the most alike of all
    assert pool.select("diverse", 2, task=task, base=base, skip=3).names == tuple(default[3:5])
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(pool, "adapter", None)  # then no adapter is read whole
    assert {beta: rank_diverse(pool, task, base, beta=beta) for beta in found} == found
    monkeypatch.undo()
    table = similarity(pool.stack(evaluation)).to_numpy()
    assert select._cosines(pool, evaluation, base.device).numpy() == pytest.approx(table, abs=1e-6)


def test_diverse_where_all_are_equally_accurate(pool, task, base):
    """Then the loss is the score; and where that is equal too, likeness alone decides behind the first."""
    hopeless = replace(task, train=tuple(Example(f"{i}", "zz") for i in range(3)))
    table = rank_adapters(pool, hopeless, base)
    assert table["accuracy"].max() == 0
    names, alike = table["name"].tolist(), similarity(pool.stack()).abs()
    z = ((table["loss"].mean() - table["loss"]) / table["loss"].std(ddof=0)).tolist()
    gains = [z[i] - alike.at[names[0], names[i]] for i in range(1, 7)]
    assert rank_diverse(pool, hopeless, base)[:2] == [names[0], names[1 + gains.index(max(gains))]]
    assert rank_diverse(pool, hopeless, base, beta=1e-5) == names
    (known,) = [one for one in pool.rankings[base].values() if isinstance(one, pd.DataFrame) and one.equals(table)]
    known["loss"] = 1.0
    order = rank_diverse(pool, hopeless, base)
    pool.rankings.clear()
    assert order[0] == names[0]
    assert order[1] == alike.loc[order[0]].idxmin()


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_beta_is_a_finite_number(pool, task, base, beta):
    with pytest.raises(SelectionError, match=r"β is .*, expected a finite number ≥ 0"):
        rank_diverse(pool, task, base, beta=beta)


def test_a_thousand_are_ordered_fast():
    n = 1000
    g = torch.Generator().manual_seed(0)
    start = time.process_time()
    order = select.diversify(torch.randn(n, generator=g), torch.rand(n, n, generator=g), 1.0)
    assert sorted(order) == list(range(n))
    assert time.process_time() - start < 5  # a loop over pairs takes minutes
