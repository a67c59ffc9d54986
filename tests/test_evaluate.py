"""Losses against one plain forward pass each; exact match against transformers' own greedy `generate`."""

import copy
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import (
    comes_out,
    dense_model,
    generate,
    hook_count,
    random_adapter,
    relative,
    tiny_base,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
    worded_base,
)
from workbench import tasks
from workbench.base import Base
from workbench.compose import LowRank, grouped, shared
from workbench.errors import MergeError, TaskError
from workbench.evaluate import Encoded, Packed, encode, encode_all, encode_task, evaluate, row_losses, score
from workbench.nano import world
from workbench.stack import Stack

HERE = sys.modules["workbench.evaluate"]  # the name is the function's in the package


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


SPECS = [world.Spec("first", "digits"), world.Spec("double", "letters"), world.Spec("count", "animals")]


@pytest.fixture(scope="module")
def trained():
    """A base that has learned 24 examples of three tasks almost by heart, so that its arg-maxes are no accident."""
    base = tiny_base()
    learned = [world.make_task(spec, n_train=8) for spec in SPECS]
    rows = [row for task in learned for row in encode_task(base, task, task.train)]
    batch = Packed(rows, base).batch(np.arange(len(rows)))
    base.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(base.model.parameters(), lr=1e-2)
    for _ in range(60):
        sums, counts = row_losses(base.logits(batch), batch.labels)
        loss = sums.sum() / counts.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Base(base.model, base.tokenizer, "trained")


def examples(base, n, seed=0):
    """Examples of many lengths."""
    rng = random.Random(seed)
    letters = "abcdefghij ,"
    word = lambda a, b: "".join(rng.choice(letters) for _ in range(rng.randint(a, b)))  # noqa: E731
    return [encode(base, word(1, 40), word(1, 12)) for _ in range(n)]


@torch.no_grad()
def one_by_one(model, rows):
    """Mean cross-entropy over the answer's tokens, each example by itself."""
    out = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        out.append(cross_entropy(logits, torch.tensor(row.answer)))
    return torch.stack(out)


BUDGETS = [1, 137, 400, None]


@pytest.mark.parametrize("budget", BUDGETS)
def test_losses_are_those_of_one_plain_forward_each(base, budget):
    groups = [examples(base, 7, seed) for seed in range(3)]
    scores = score(base, groups, max_tokens=budget)
    for g, group in enumerate(groups):
        torch.testing.assert_close(scores.loss[g], one_by_one(base.model, group), rtol=1e-4, atol=1e-5)
    assert scores.tokens == sum(len(row) for group in groups for row in group)
    assert scores.match.shape == scores.loss.shape == (3, 7)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", ["shared", "grouped", "one"])
def test_every_group_is_scored_under_its_own_update(base, budget, form):
    adapters = [random_adapter(base, 1 + i, i, name=f"a{i}") for i in range(4)]
    c = torch.tensor([[1.0, 0, 0, 0], [0.5, -0.5, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    if form == "shared":
        stack = Stack.of(adapters)
        updates = shared(stack, c)
        models = [dense_model(base, {m: u.delta(c[k][u.owner]) for m, u in stack}) for k in range(4)]
    else:
        updates = grouped(adapters if form == "grouped" else adapters[:1])
        models = [dense_model(base, {m: f.delta() for m, f in a.modules.items()}) for a in adapters]
    groups = [examples(base, 5, seed) for seed in range(4)]
    scores = score(base, groups, updates, max_tokens=budget)
    for g, group in enumerate(groups):
        model = models[0] if form == "one" else models[g]
        torch.testing.assert_close(scores.loss[g], one_by_one(model, group), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_population_on_one_list_equals_each_candidate_alone(base, budget):
    stack = Stack.of([random_adapter(base, 2, i, name=f"a{i}") for i in range(3)])
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    rows = examples(base, 6)
    together = score(base, [rows] * 5, shared(stack, c), max_tokens=budget)
    for k in range(5):
        alone = score(base, [rows], shared(stack, c[k : k + 1]))
        torch.testing.assert_close(together.loss[k], alone.loss[0], rtol=1e-4, atol=1e-5)
    assert together.tokens == 5 * sum(map(len, rows))
    twice = score(base, [rows, rows, rows[::-1], rows[::-1]], shared(stack, c[:2]), max_tokens=budget)
    torch.testing.assert_close(twice.loss[0], together.loss[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice.loss[1], together.loss[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice.loss[2], together.loss[1].flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_modules_split_at_different_groups(base, budget):
    """One module with 2 candidates, another with 3, one stacked and one for all: 6 groups."""
    names = list(base.projections)[:4]
    generator = torch.Generator().manual_seed(0)

    def low(module, stacks, candidates):
        (d_out, d_in), lead = base.projections[module], (stacks,) if stacks else ()
        draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.2  # noqa: E731
        return LowRank(draw(*lead, d_out, 2), draw(*lead, 2, d_in), 5 * draw(candidates, 2) if candidates else None)

    updates = {m: low(m, *form) for m, form in zip(names, [(0, 2), (0, 3), (3, 6), (0, 1)], strict=True)}
    groups = [examples(base, 4, seed) for seed in range(6)]
    got = score(base, groups, updates, max_tokens=budget)
    for g, group in enumerate(groups):
        dense = {}
        for module, u in updates.items():
            n = 1 if u.c is None else len(u.c)
            B, A = (t[g * len(t) // 6] if t.ndim == 3 else t for t in (u.B, u.A))
            dense[module] = (B * u.c[g * n // 6]) @ A
        want = one_by_one(dense_model(base, dense), group)
        torch.testing.assert_close(got.loss[g], want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_scored_is_refused(base):
    rows = examples(base, 3)
    for groups in ([], [[]], [rows, rows[:2]]):
        with pytest.raises(MergeError, match="equally many examples"):
            score(base, groups)
    updates = grouped([random_adapter(base, 1, i, name=str(i)) for i in range(2)])
    with pytest.raises(MergeError, match="3 groups of examples cannot be split among 2 candidates"):
        score(base, [rows] * 3, updates)


def test_packed_batches_hold_what_went_in(base):
    rows = examples(base, 9)
    packed = Packed(rows, base)
    assert packed.width == max(map(len, rows))
    for index in (np.array([3]), np.array([8, 0, 0, 5]), np.arange(9)):
        batch = packed.batch(index)
        ids = batch.ids
        assert batch.mask is batch.decoder is None
        assert batch.labels.shape == (len(index), batch.keep)
        full = torch.full(ids.shape, -100)
        full[:, ids.shape[1] - batch.keep :] = batch.labels
        for i, row in enumerate(rows[j] for j in index):
            assert ids[i, : len(row)].tolist() == [*row.prompt, *row.answer]
            start = len(row.prompt) - 1
            assert full[i, start : start + len(row.answer)].tolist() == list(row.answer)
            assert int((full[i] != -100).sum()) == len(row.answer)


# Exact match


def as_encoded(base, prompt, target, limit):
    """What `encode` makes of token ids."""
    stop = (base.stop_ids[0],) if len(target) < limit else ()
    inside = bool(set(target) & set(base.stop_ids))
    return Encoded(tuple(prompt), (*target, *stop), len(target) <= limit and not inside)


def check_against_generate(base, prompts, limit, updates=None, model=None):
    """Targets made from the model's own generation, and spoilt ones, scored; returns the outcomes."""
    rows, want, vocabulary = [], [], len(base.tokenizer)
    for prompt, made in zip(prompts, generate(base, prompts, limit, model), strict=True):
        body = made[:-1] if made[-1] in base.stop_ids else made
        own = body or made
        for target in (own, [*own[:-1], (own[-1] + 7) % vocabulary], [*own, own[-1]], own[:-1], own[1:]):
            if target:
                rows.append(as_encoded(base, prompt, target, limit))
                want.append(comes_out(base, made, target, limit))
    assert score(base, [rows], updates, max_tokens=200).match[0].tolist() == want
    return want


KINDS = ["tiny", "trained", "byte-bpe", "unigram"]


@pytest.fixture(scope="module")
def bases(base, trained):
    return {"tiny": base, "trained": trained} | {kind: worded_base(kind) for kind in KINDS[2:]}


TEXTS = ["the cat", "sort the animals: bat cow", "a dog and the list", "jan feb mar", "count them", "swap", "e", "done"]


def prompts_of(base):
    if base.name == "trained":
        tasks_ = [world.make_task(spec, n_train=8) for spec in SPECS]
        return [row.prompt for task in tasks_ for row in encode_task(base, task, task.train[:2] + task.test[:1])]
    return [tuple(base.tokenizer(t)["input_ids"]) for t in TEXTS]


@pytest.mark.parametrize("limit", [1, 3, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_match_is_what_generate_produces(bases, kind, limit):
    base = bases[kind]
    outcomes = check_against_generate(base, prompts_of(base), limit)
    assert True in outcomes
    assert False in outcomes


@pytest.mark.parametrize("kind", ["trained", "byte-bpe"])
def test_match_is_what_generate_produces_under_an_adapter(bases, kind):
    base = bases[kind]
    adapter = random_adapter(base, 2, 5, size=0.3)
    model = dense_model(base, {m: f.delta() for m, f in adapter.modules.items()})
    outcomes = check_against_generate(base, prompts_of(base), 6, grouped([adapter]), model)
    assert True in outcomes
    assert False in outcomes


def biased(base, favourite):
    """A copy of the base that produces one token id wherever it can."""
    model = copy.deepcopy(base.model)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.copy_(base.model.get_output_embeddings().weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[favourite] = 1e3
    return Base(model, base.tokenizer, base.name)


@pytest.mark.parametrize("kind", ["byte-bpe", "unigram"])
def test_any_stop_token_ends_an_answer(bases, kind):
    """The model ends with its second stop token; the answer was encoded with the first."""
    base = bases[kind]
    assert len(base.stop_ids) == 2
    prompt, body = (
        base.tokenizer("the cat")["input_ids"],
        base.tokenizer("the", add_special_tokens=False)["input_ids"][:1],
    )

    for favourite in base.stop_ids:
        eager = biased(base, favourite)
        assert generate(eager, [prompt], 5) == [[favourite]]
        rows = [as_encoded(eager, prompt, body, 5), as_encoded(eager, prompt, body, 1)]
        assert score(eager, [rows]).match.tolist() == [[False, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_inside_a_target_never_comes_out(bases, kind):
    base = bases[kind]
    stop = base.stop_ids[-1]
    eager = biased(base, stop)
    prompt = prompts_of(base)[0]
    assert generate(eager, [prompt], 4) == [[stop]]
    text = base.tokenizer.decode([stop, stop])
    encoded = encode(eager, "the cat", text, 4)
    assert set(encoded.answer) & set(base.stop_ids)
    assert not encoded.reachable
    rows = [as_encoded(eager, prompt, [stop] * n, 4) for n in (1, 3, 4)] + [encoded]
    assert score(eager, [rows]).match.tolist() == [[False] * 4]


def test_the_limit_decides_about_the_stop_token(base):
    assert encode(base, "ab", "cd", 3).answer == (*base.tokenizer("cd")["input_ids"], base.stop_ids[0])
    assert encode(base, "ab", "cd", 2).answer == tuple(base.tokenizer("cd")["input_ids"])
    assert encode(base, "ab", "cd", 2).reachable
    assert not encode(base, "ab", "cd", 1).reachable
    favourite = base.tokenizer("c")["input_ids"][0]
    endless = biased(base, favourite)
    for limit, target, want in ((3, "ccc", True), (3, "cc", False), (3, "cccc", False), (4, "ccc", False)):
        row = encode(endless, "ab", target, limit)
        assert score(endless, [[row]]).match.item() is want
        made = generate(endless, [row.prompt], limit)[0]
        assert comes_out(endless, made, base.tokenizer(target)["input_ids"], limit) is want


def test_what_cannot_be_encoded_is_refused(base):
    with pytest.raises(ValueError, match="argument"):
        encode_all(base, ["a", "b"], ["c"])
    for prompt, target, said in (("", "a", "prompt"), ("a", "", "target"), ("a", "ä", "does not know every character")):
        with pytest.raises(TaskError, match=said):
            encode(base, prompt, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_tokenised_apart_from_its_prompt(bases, kind):
    base = bases[kind]
    row = encode(base, "sort the an", "imals")
    assert list(row.prompt) == base.tokenizer("sort the an")["input_ids"]
    assert list(row.answer[:-1]) == base.tokenizer("imals", add_special_tokens=False)["input_ids"]
    assert row.reachable
    assert len(row) == len(row.prompt) + len(row.answer)


def test_a_stop_token_at_the_end_of_a_prompt_is_left_out():
    """Tokenizers such as T5's end every text with one."""
    from tokenizers import processors

    base = worded_base("unigram")
    plain = base.tokenizer("the cat")["input_ids"]
    base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", base.tokenizer.eos_token_id)]
    )
    assert base.tokenizer("the cat")["input_ids"] == [*plain, base.tokenizer.eos_token_id]
    assert list(encode(base, "the cat", "sat").prompt) == plain


def test_demonstrations_come_from_the_training_split(base):
    task = tasks.load("nano/mirror-months", n_train=6, n_validation=2, n_test=5)
    rows = encode_task(base, task, task.test, shots=3, seed=1)
    assert rows == encode_task(base, task, task.test, shots=3, seed=1)
    assert rows != encode_task(base, task, task.test, shots=3, seed=2)
    for row, example in zip(rows, task.test, strict=True):
        text = base.tokenizer.decode(row.prompt)
        *shown, asked = text.split("\n")
        assert asked == f"{example.input} = "
        assert set(shown) <= {f"{e.input} = {e.target}" for e in task.train}
        assert len(set(shown)) == 3
    zero = encode_task(base, task, task.test)[0]
    assert base.tokenizer.decode(zero.prompt) == f"{task.instruction}: {task.test[0].input} = "
    with pytest.raises(TaskError, match="7 demonstrations asked for, but only 6"):
        encode_task(base, task, task.test, shots=7)


def test_evaluate_scores_the_split_for_every_candidate(base):
    task = tasks.load("nano/mirror-months", n_train=6, n_validation=3, n_test=5)
    adapters = [random_adapter(base, 2, i, name=str(i)) for i in range(2)]
    scores = evaluate(base, task, grouped(adapters))
    assert scores.loss.shape == (2, 5)
    assert evaluate(base, task, split="validation").loss.shape == (1, 3)
    alone = evaluate(base, task, grouped(adapters[1:]))
    torch.testing.assert_close(scores.loss[1], alone.loss[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.accuracy, scores.match.float().mean(1))
    shown = evaluate(base, task, shots=2, seed=3)
    assert shown.tokens == sum(map(len, encode_task(base, task, task.test, shots=2, seed=3)))


def test_accuracy_is_what_decoding_to_text_gives(trained):
    """On a learned task: some right, some wrong, and the same ones in the text that is generated."""
    task = world.make_task(SPECS[0], n_train=8, n_test=8)
    both = replace(task, test=task.train + task.test)
    prompts = [trained.tokenizer(both.prompt(e))["input_ids"] for e in both.test]
    said = [trained.tokenizer.decode(ids) for ids in generate(trained, prompts, both.max_new_tokens)]
    match = evaluate(trained, both).match[0].tolist()
    assert match == [text == e.target + "\n" for text, e in zip(said, both.test, strict=True)]
    assert True in match
    assert False in match


# Logits at answers alone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_at_each_row_s_own_answer(base, kind):
    base = base if kind == "llama" else tiny_gpt2()
    rows = examples(base, 9)
    packed, hooks = Packed(rows, base), hook_count(base.model)
    for index in (np.arange(9), np.array([4]), np.array([8, 0, 0, 5])):
        wide, tight = packed.batch(index), packed.batch(index, tight=True)
        longest = max(len(rows[i].answer) for i in index)
        assert tight.labels.shape == (len(index), tight.keep)
        assert tight.keep == longest + (len(index) == 1)  # one row's last columns are its answer
        a, b = base.next_token_logits(wide), base.next_token_logits(tight)
        assert b.shape[:2] == tight.labels.shape
        for i, row in enumerate(rows[j] for j in index):
            n = len(row.answer)
            assert tight.labels[i, :n].tolist() == list(row.answer)
            assert (tight.labels[i, n:] == -100).all()
            assert relative(b[i, :n], a[i][wide.labels[i] != -100]) < 1e-5
    assert hook_count(base.model) == hooks


@pytest.mark.parametrize("form", ["none", "grouped", "head"])
def test_scores_do_not_depend_on_where_logits_are_taken(base, monkeypatch, form):
    rows, seen, plain = examples(base, 9), [], base.next_token_logits
    targets = ["lm_head"] if form == "head" else None
    updates = None if form == "none" else grouped([random_adapter(base.layers, 2, i, targets) for i in range(2)])
    want = score(base, [rows] * 2, updates)
    monkeypatch.setattr(base, "next_token_logits", lambda batch: seen.append(batch) or plain(batch))
    monkeypatch.setattr(HERE, "_SMALL", 10)
    got = score(base, [rows] * 2, updates)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.match, want.match)
    assert all(batch.at is not None for batch in seen)
    one = score(base, [rows[:1]])
    assert seen[-1].at is None
    torch.testing.assert_close(one.loss[0], score(base, [rows]).loss[0, :1], rtol=1e-4, atol=1e-5)


# Prefixes read once


def alike(base, n, length, seed=0):
    """Examples of many lengths whose prompts begin with the same tokens."""
    rng = random.Random(seed)
    start = tuple(rng.randrange(3, 90) for _ in range(length))
    rows = examples(base, n, seed)
    return [replace(row, prompt=(*start, *row.prompt[:20])) for row in rows]


@pytest.mark.parametrize("budget", [1, 1500, None])
@pytest.mark.parametrize("form", ["none", "shared", "grouped", "gpt2", "tight"])
def test_what_prompts_begin_with_is_read_once(base, monkeypatch, budget, form):
    base = tiny_gpt2() if form == "gpt2" else base
    if form == "tight":
        monkeypatch.setattr(HERE, "_SMALL", 10)
    adapters = [random_adapter(base, 1 + i, i, name=f"a{i}") for i in range(3)]
    groups = [alike(base, 5, 120 + 9 * seed, seed) for seed in range(3)]
    c = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.5, -0.5, 1]])
    updates, models = None, [base.model] * 3
    if form == "shared":
        updates = shared(stack := Stack.of(adapters), c)
        models = [dense_model(base, {m: u.delta(c[k][u.owner]) for m, u in stack}) for k in range(3)]
    elif form != "none":
        updates = grouped(adapters)
        models = [dense_model(base, {m: f.delta() for m, f in a.modules.items()}) for a in adapters]
    read, prefixes, plain, prefix = [], [], base.next_token_logits, base.prefix
    monkeypatch.setattr(base, "next_token_logits", lambda batch: read.append(batch) or plain(batch))
    monkeypatch.setattr(base, "prefix", lambda ids: prefixes.append(ids) or prefix(ids))
    scores = score(base, groups, updates, max_tokens=budget)
    for g, group in enumerate(groups):
        torch.testing.assert_close(scores.loss[g], one_by_one(models[g], group), rtol=1e-4, atol=1e-5)
    assert scores.tokens == sum(len(row) for group in groups for row in group)
    assert sum(map(len, prefixes)) == 3  # each group's once
    assert all(ids.shape[1] == 120 for ids in prefixes)  # the shortest of the three
    assert all(batch.prefix is not None and batch.ids.shape[1] < 70 for batch in read)


def test_a_prefix_is_the_same_list_s_under_each_candidate(base):
    rows = alike(base, 4, 90)
    stack = Stack.of([random_adapter(base, 2, i, name=f"a{i}", size=0.3) for i in range(3)])
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    together = score(base, [rows] * 5, shared(stack, c))
    for k in range(5):
        model = dense_model(base, {m: u.delta(c[k][u.owner]) for m, u in stack})
        torch.testing.assert_close(together.loss[k], one_by_one(model, rows), rtol=1e-4, atol=1e-5)
    assert relative(together.loss[0], together.loss[1]) > 1e-2


def test_prefixes_are_shared_where_it_pays_and_can_be(base, monkeypatch):
    """At least 64 tokens, two thirds of the longest row, never a prompt's last token, never of one example alone."""
    seen, plain = [], Base.prefix
    monkeypatch.setattr(Base, "prefix", lambda self, ids: seen.append(ids.shape[1]) or plain(self, ids))
    for rows, want in (
        (alike(base, 4, 63), []),
        (alike(base, 4, 64), [64]),
        (alike(base, 4, 64)[:1], []),
        (examples(base, 4), []),
        ([Encoded((5,) * 70, (6,)), Encoded((5,) * 71, (7,) * 30)], [69]),
        ([Encoded((5,) * 70, (6,)), Encoded((5,) * 71, (7,) * 40)], []),
        ([Encoded((5,) * 70, (6,)), Encoded((5,) * 60 + (6,) * 10, (7,))], []),
        ([Encoded((5,) * 70, (6,)), Encoded((5,) * 70, (6,))], [69]),
    ):
        seen.clear()
        got = score(base, [rows])
        assert seen == want
        torch.testing.assert_close(got.loss[0], one_by_one(base.model, rows), rtol=1e-4, atol=1e-5)
    seen.clear()
    score(base, [alike(base, 4, 100), examples(base, 4)])
    assert seen == []
    sliding = tiny_causal("Mistral")
    sliding.model.config.sliding_window = 40
    rows = alike(sliding, 4, 100)
    torch.testing.assert_close(score(sliding, [rows]).loss[0], one_by_one(sliding.model, rows), rtol=1e-4, atol=1e-5)
    assert sliding.prefix(torch.ones(1, 5).long()) is None
    assert tiny_t5().prefix(torch.ones(1, 5).long()) is None
    stretched = tiny_base()
    stretched.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert stretched.prefix(torch.ones(1, 5).long()) is None


def test_demonstrations_drawn_once(base):
    task = tasks.load("nano/mirror-months", n_train=9, n_validation=2, n_test=6)
    rows = encode_task(base, task, task.test, shots=5, seed=1, once=True)
    ends = [base.tokenizer.decode(row.prompt).rpartition("\n") for row in rows]
    assert [end for _, _, end in ends] == [f"{e.input} = " for e in task.test]
    assert len({shown for shown, _, _ in ends}) == 1
    assert len(set(ends[0][0].split("\n"))) == 5
    assert (
        ends[0][0]
        == base.tokenizer.decode(encode_task(base, task, task.test, shots=5, seed=1)[0].prompt).rpartition("\n")[0]
    )  # those of the first example otherwise
    scores = evaluate(base, task, shots=5, seed=1, once=True)
    torch.testing.assert_close(scores.loss[0], one_by_one(base.model, rows), rtol=1e-4, atol=1e-5)
    assert scores.tokens == sum(map(len, rows))


# Memory that runs out


def scarce(base, room, seen):
    """A loss that fails for more than `room` rows at a time, as a GPU does whose memory runs out."""

    def loss(logits, labels):
        if len(logits) > room:
            raise torch.cuda.OutOfMemoryError("made up")
        seen.append(len(logits))
        return row_losses(logits, labels)

    return loss


@pytest.mark.parametrize("room", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("form", ["shared", "none", "prefix"])
def test_batches_are_halved_until_they_fit(base, room, form):
    base = Base(base.model, base.tokenizer, "scarce")
    rows = alike(base, 7, 90) if form == "prefix" else examples(base, 7)
    stack = Stack.of([random_adapter(base, 2, i, name=f"a{i}") for i in range(3)])
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    updates, seen = None if form == "none" else shared(stack, c), []
    want = score(base, [rows] * 5, updates)
    assert base.held == {}
    got = score(base, [rows] * 5, updates, loss=scarce(base, room, seen))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.match, want.match)
    assert got.tokens == want.tokens == 5 * sum(map(len, rows))
    assert sum(seen) == 35  # nothing is counted twice
    assert hook_count(base.model) == 0
    if room < 35:
        width = max(map(len, rows))
        assert room * width // 4 <= base.held["score"] < 2 * (room + 1) * width
        again = []
        score(base, [rows] * 5, updates, loss=lambda z, y: again.append(len(z)) or row_losses(z, y))
        assert max(again) <= room
    else:
        assert base.held == {}


def test_where_nothing_fits_memory_runs_out(base):
    rows, seen = examples(base, 4), []
    updates = grouped([random_adapter(base, 1, i, name=str(i)) for i in range(2)])
    with pytest.raises(torch.cuda.OutOfMemoryError, match="made up"):
        score(base, [rows] * 2, updates, loss=scarce(base, 0, seen))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="made up"):
        score(base, [rows] * 4, updates, loss=scarce(base, 1, seen))  # two groups to an adapter are not split
    assert seen == []
    assert hook_count(base.model) == 0
    base.held.clear()
    with pytest.raises(RuntimeError, match="another"):
        score(base, [rows], loss=lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    assert base.held == {}
