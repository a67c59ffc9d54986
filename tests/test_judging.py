"""Tasks scored by their own metric, against generating every answer one at a time and against each choice alone."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy

import workbench as wb
from helpers import dense_model, generate, random_adapter, six_adapters, tiny_base, tiny_t5, worded_base
from workbench.adapt.arrow import Router, prototypes, routed
from workbench.baselines import _best_of
from workbench.compose import grouped, shared
from workbench.errors import TaskError
from workbench.evaluate import encode_task, evaluate, evaluate_many, score
from workbench.generation import decode
from workbench.judging import judged
from workbench.metrics import METRICS, find
from workbench.pool import Pool
from workbench.select import rank_adapters
from workbench.stack import Stack
from workbench.tasks import Example, Task

TEXT = [name for name, metric in METRICS.items() if metric.judges == "text"]
OVER, PER_TOKEN = "accuracy over choices", "accuracy over choices per token"


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=6)


def adapters_of(base, n=3):
    return [random_adapter(base, 2, i, name=f"a{i}", size=0.25) for i in range(n)]


def models_of(base, adapters):
    return [dense_model(base, {m: f.delta() for m, f in a.modules.items()}) for a in adapters]


@cache
def models_of_all(base):
    return models_of(base, adapters_of(base))


@cache
def said(base, prompt, limit, model=None):
    """What the base, or another model, writes."""
    return decode(base, generate(base, [base.tokenizer(prompt)["input_ids"]], limit, model)[0])


def written_task(base, seed, n=12, limit=6):
    """Answers that are what the base writes, respelt, cut short, or something else."""
    rng, draft = random.Random(seed), Task(f"w{seed}", "say", (), (), (), max_new_tokens=limit)
    rows: dict[str, Example] = {}
    while len(rows) < n:
        given = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(2, 9))).strip() or "a"
        text = said(base, draft.prompt(Example(given, "")), limit)
        kind = len(rows) % 4
        text = (text, f" {text.upper()}.", text[: max(1, len(text) // 2)], "gold")[kind]
        if any(c.isalnum() for c in text):
            rows[given] = Example(
                given, text if text.strip() else "gold", references=(text, "gold") if kind == 0 else ()
            )
    every = tuple(rows.values())
    return replace(draft, train=every[:3], validation=every[3:5], test=every)


@pytest.mark.parametrize("name", TEXT)
def test_text_metrics_are_those_of_answers_generated_one_at_a_time(base, name):
    """Settling by teacher forcing what can be settled changes nothing."""
    if name == "rouge-2":
        task = Task(
            "two", "say", (), (), tuple(Example(g, f"{g} {g} b") for g in "abcdef"), max_new_tokens=6, metric=name
        )
    else:
        task = replace(written_task(base, 1), metric=name)
        if name.startswith(("squad", "rouge")):
            task = replace(
                task,
                test=tuple(
                    replace(e, target="gold b", references=()) if not e.target.strip(" .Aa,") else e for e in task.test
                ),
            )
    found = evaluate(base, task, grouped(adapters_of(base)))
    alone = evaluate(base, task)
    metric = find(name)
    for scores, models in ((found, models_of_all(base)), (alone, [base.model])):
        for g, model in enumerate(models):
            want = [metric.score(said(base, task.prompt(e), 6, model), e.answers) for e in task.test]
            assert scores.match[g].float().tolist() == pytest.approx(want)
        assert scores.match.dtype == (torch.float32 if metric.graded else torch.bool)
        torch.testing.assert_close(scores.accuracy, scores.match.float().mean(1))
    assert torch.equal(alone.loss, evaluate(base, replace(task, metric="exact match")).loss)
    if name in ("normalised match", "lorahub match"):
        exact = evaluate(base, replace(task, metric="exact match")).match
        assert 0 < int(exact.sum()) < int(alone.match.sum()) < len(task.test)  # respelt answers count here
        assert bool((alone.match | ~exact).all())


def test_tokens_count_what_is_generated(base):
    task = replace(written_task(base, 1), metric="normalised match")
    plain = evaluate(base, replace(task, metric="exact match"))
    rows = encode_task(base, task, task.test)
    lost = [row for row, right in zip(rows, plain.match[0].tolist(), strict=True) if not right]
    spent = sum(len(row.prompt) + len(generate(base, [row.prompt], task.max_new_tokens)[0]) for row in lost)
    assert evaluate(base, task).tokens == plain.tokens + spent


@pytest.mark.parametrize("kind", ["nano", "byte-bpe", "unigram", "t5"])
def test_other_tokenizers_and_an_encoder_decoder(kind):
    base = {"nano": lambda: tiny_base(spread=6), "t5": tiny_t5}.get(kind, lambda: worded_base(kind))()
    some = ("the cat", "dog", "a list", "done", "swap two")
    task = Task(
        "t",
        "say",
        (),
        (),
        tuple(Example(f"the {x}", x.upper() if kind == "byte-bpe" else x) for x in some),
        max_new_tokens=5,
    )
    for name in ("normalised match", "squad f1"):
        found = evaluate(base, replace(task, metric=name))
        for e, got in zip(task.test, found.match[0].tolist(), strict=True):
            row = encode_task(base, task, [e])[0]
            if base.decoder_start is None:
                text = decode(base, generate(base, [row.prompt], 5)[0])
            else:
                model, ids = base.model, torch.tensor([row.prompt])
                out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=list(base.stop_ids))
                text = decode(base, out[0, 1:].tolist())
            assert got == pytest.approx(find(name).score(text, e.answers))


def chosen_alone(base, model, row, texts, per_token):
    """The likeliest choice, each by a plain forward pass of its own."""
    costs = []
    for text in texts:
        body = base.tokenizer(text, add_special_tokens=False)["input_ids"] + [base.stop_ids[0]]
        ids = torch.tensor([[*row.prompt, *body]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        costs.append(cross_entropy(logits, torch.tensor(body), reduction="mean" if per_token else "sum"))
    return int(torch.stack(costs).argmin())


def choice_task(name, n=14, own=False):
    rng, words = random.Random(3), ["ant", "bee", "cow", "goat", "hens!"]
    rows = []
    for i in range(n):
        some = tuple(rng.sample(words, 2 + i % 3)) if own else ()
        rows.append(Example(f"q {i}", (some or words)[i % len(some or words)], choices=some))
    return Task("c", "pick", tuple(rows[:4]), tuple(rows[4:6]), tuple(rows), metric=name, choices=tuple(words))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", [OVER, PER_TOKEN])
def test_the_likeliest_choice_is_taken(base, name, own):
    task, adapters = choice_task(name, own=own), adapters_of(base, 4)
    found = evaluate(base, task, grouped(adapters), shots=1, seed=2)
    rows = encode_task(base, task, task.test, shots=1, seed=2)
    picked = []
    for g, model in enumerate(models_of(base, adapters)):
        picked += [
            chosen_alone(base, model, r, task.choices_of(e), name == PER_TOKEN)
            for r, e in zip(rows, task.test, strict=True)
        ]
        want = [task.choices_of(e)[i] == e.target for e, i in zip(task.test, picked[-len(rows) :], strict=True)]
        assert found.match[g].tolist() == want
    assert len(set(picked)) > 1
    assert found.match.dtype == torch.bool
    tried = sum(len(task.choices_of(e)) for e in task.test)
    assert found.tokens > 4 * (sum(map(len, rows)) + tried)


def test_long_choices_lose_unless_their_tokens_are_averaged(base):
    longer = [letter * 12 for letter in "abcdefgh"]
    rows = tuple(Example(f"q {word[0]}", word, choices=("a", word)) for word in longer)
    task = Task("c", "pick", (), (), rows)
    assert not evaluate(base, replace(task, metric=OVER)).match.any()
    assert evaluate(base, replace(task, metric=PER_TOKEN)).match.any()


def test_tasks_of_several_metrics_side_by_side(base):
    tasks = [
        choice_task(OVER, 6),
        replace(written_task(base, 2, 6), metric="normalised match"),
        replace(written_task(base, 3, 6, limit=3), metric="squad f1"),
        written_task(base, 4, 6),
    ]
    splits = [task.test for task in tasks]
    rows = [encode_task(base, task, task.test) for task in tasks]
    adapters = adapters_of(base, 4)
    stack, c = Stack.of(adapters), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for updates, part in (
        (grouped(adapters), lambda g: grouped(adapters[g : g + 1])),
        (shared(stack, c), lambda g: shared(stack, c[g // 2 : g // 2 + 1])),
        (None, lambda g: None),
    ):
        together = judged(base, tasks, splits, rows, updates)
        assert together.match.dtype == torch.float32
        for g, task in enumerate(tasks):
            alone = evaluate(base, task, part(g))
            torch.testing.assert_close(together.match[g], alone.match[0].float())
            torch.testing.assert_close(together.loss[g], alone.loss[0])


def test_routed_updates_generate_too(base):
    task = replace(written_task(base, 5), metric="normalised match")
    stacks = [Stack.of(adapters_of(base)), Stack.of(adapters_of(base, 4)[1:])]
    routers = [Router("r", stack, prototypes(stack), 2, 1.0) for stack in stacks]
    rows = encode_task(base, task, task.test)
    both = judged(base, [task] * 2, [task.test] * 2, [rows] * 2, routed(routers))
    for g, router in enumerate(routers):
        assert torch.equal(both.match[g], evaluate(base, task, routed([router])).match[0])


def test_an_exact_match_is_what_it_was(base):
    task = written_task(base, 1)
    rows, updates = encode_task(base, task, task.test), grouped(adapters_of(base))
    want, got = score(base, [rows] * 3, updates), evaluate(base, task, updates)
    assert torch.equal(got.match, want.match)
    assert got.match.dtype == torch.bool
    assert got.tokens == want.tokens


def test_a_metric_that_does_not_fit_is_refused_before_anything_is_generated(base):
    task = Task("t", "say", (), (), (Example("a", "b"), Example("c", "...")), metric="normalised match")
    with pytest.raises(TaskError, match=r"t: the metric 'normalised match' does not fit the target '\.\.\.'"):
        evaluate(base, task)
    with pytest.raises(TaskError, match="needs at least two choices"):
        evaluate(base, replace(task, metric=OVER))


def test_every_adapter_on_tasks_of_several_metrics(base):
    tasks = [replace(written_task(base, 2), metric="bleu"), choice_task(OVER, 12), written_task(base, 4)]
    adapters = adapters_of(base)
    table = evaluate_many(base, adapters, tasks)
    assert list(table.index) == ["a0", "a1", "a2"]
    for task in tasks:
        assert table[task.name].tolist() == pytest.approx(evaluate(base, task, grouped(adapters)).accuracy.tolist())
    with pytest.raises(TaskError, match=r"equally many test examples, got \[12, 3\]"):
        evaluate_many(base, adapters, [tasks[0], replace(tasks[1], test=tasks[1].test[:3])])


def test_the_best_single_adapter_is_best_by_the_task_s_metric(base):
    """Answers that one adapter writes, respelt: no adapter's are right token by token."""
    adapters, picked = adapters_of(base), []
    for i, model in enumerate(models_of_all(base)):
        draft = Task("d", "say", (), (), (), max_new_tokens=4, metric="normalised match")
        given = [Example(f"q {letter}", "") for letter in "abcdef"]
        rows = tuple(replace(e, target=f".. .. {said(base, draft.prompt(e), 4, model).upper()} .. ..") for e in given)
        task = replace(draft, train=tuple(e for e in rows if e.target.strip(" .")))
        encoded = encode_task(base, task, task.train)
        assert _best_of(base, Stack.of(adapters), task, encoded) == i
        picked.append(_best_of(base, Stack.of(adapters), replace(task, metric="exact match"), encoded))
    assert picked != [0, 1, 2]


def test_a_comparison_is_by_the_task_s_metric_throughout(base, tmp_path):
    pool = six_adapters(base, tmp_path / "pool")
    own = Pool.open(tmp_path / "pool")
    task = replace(written_task(base, 6, n=16), metric="normalised match")
    task = replace(task, train=task.test[:8], validation=task.test[8:10], test=task.test[10:])
    recipes = [
        wb.Recipe("average", select="evaluation", k=2),
        wb.Recipe("best single"),
        wb.Recipe("best single", among="random"),
    ]
    plain = replace(task, metric="exact match")
    quick = {"baselines": (wb.Recipe("zero-shot"), wb.Recipe("in-context", shots=2)), "control": ""}
    rows = wb.compare(base, pool, [task], recipes, results=tmp_path / "rows", **quick)
    other = wb.compare(base, own, [plain], recipes, results=tmp_path / "rows", **quick)
    assert set(rows.metric) == {"normalised match"}
    assert set(other.metric) == {"exact match"}
    assert not set(rows.key) & set(other.key)
    by = rows.set_index("recipe")
    for split, column in (("test", "accuracy"), ("train", "train_accuracy"), ("validation", "validation_accuracy")):
        want = evaluate(base, task, split=split).accuracy.item()
        assert by.loc["zero-shot", column] == pytest.approx(want)
    assert by.loc["zero-shot", "train_accuracy"] > other.set_index("recipe").loc["zero-shot", "train_accuracy"]
    shown = evaluate(base, task, shots=2, seed=0).accuracy.item()
    assert by.filter(like="in-context", axis=0)["accuracy"].item() == pytest.approx(shown)
    ranking = rank_adapters(pool, task, base).set_index("name").accuracy
    for name in pool.names:
        want = evaluate(base, task, grouped([pool.adapter(name)]), split="train").accuracy.item()
        assert ranking[name] == pytest.approx(want)
    assert by.loc["best single", "train_accuracy"] == pytest.approx(ranking.max())
