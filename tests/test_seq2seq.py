"""Encoder–decoders against plain transformers, its greedy `generate`, plain peft, hooks and autograd, one example at a time."""

import copy
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    _tiny,
    comes_out,
    dense_model,
    peft_model,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_examples,
    tiny_base,
    tiny_t5,
    worded_base,
    write_peft,
)
from workbench.adapt import adapt
from workbench.adapt.coefficients import learn_coefficients
from workbench.adapt.fresh import Plan, start_factors, train_fresh
from workbench.adapt.gradient import Schedule, cosine_rate, fit
from workbench.adapt.search import lorahub, population_losses
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank, grouped, shared
from workbench.errors import BaseError, MergeError, TaskError
from workbench.evaluate import (
    Encoded,
    Packed,
    encode,
    encode_all,
    encode_task,
    evaluate,
    evaluate_many,
    score,
)
from workbench.merge import collect, merge
from workbench.stack import Stack
from workbench.tasks import Example, Task

T5 = ["q", "k", "v", "o", "wi", "wo"]


def closing_tokenizer(opening=""):
    """A unigram tokenizer that, as T5's, ends every text with </s>; BART's opens it too."""
    from tokenizers import processors

    tokenizer = worded_base("unigram").tokenizer
    known = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A </s>".strip(), special_tokens=known
    )
    return tokenizer


def worded_t5():
    """An untied T5 with gated feed-forward layers (FLAN's), a tokenizer that adds </s>, two stop tokens, 2 + 3 layers."""
    tokenizer = closing_tokenizer()
    size = {"d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    special = {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": ends}
    return Base(
        _tiny("T5ForConditionalGeneration", "T5Config", tokenizer, 2.0, **size, **special, **more), tokenizer, "flan"
    )


def tiny_bart():
    """A BART of 2 + 2 layers: learned positions, biases, and a tokenizer that puts <s> before every text."""
    tokenizer = closing_tokenizer("<s>")
    size = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
    stop = tokenizer.eos_token_id
    special = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": stop, "eos_token_id": stop}
    made = _tiny("BartForConditionalGeneration", "BartConfig", tokenizer, 6.0, **size, **heads, **special)
    return Base(made, tokenizer, "bart")


MADE = {"tied": tiny_t5, "flan": worded_t5, "bart": tiny_bart, "llama": lambda: tiny_base(spread=4)}
KINDS = ["tied", "flan", "bart"]


@pytest.fixture(scope="module")
def bases():
    return {kind: make() for kind, make in MADE.items()}


@pytest.fixture(scope="module")
def t5(bases):
    return bases["tied"]


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "dog",
    "by",
    "door",
    "sort",
    "animals",
    "bat",
    "cow",
    "elk",
    "fox",
    "jan",
    "feb",
    "mar",
    "apr",
    "count",
    "them",
    "1",
    "2",
    "3",
    "list",
]


def examples(base, n, seed=0, longest=9):
    """Examples of many lengths, of words that every tokenizer here knows."""
    rng = random.Random(seed)
    some = lambda most: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))  # noqa: E731
    return [encode(base, some(longest), some(3)) for _ in range(n)]


def plain_loss(model, row):
    """Mean cross-entropy as transformers itself computes it from labels."""
    ids, labels = torch.tensor([row.prompt]), torch.tensor([row.answer])
    if not model.config.is_encoder_decoder:
        ids, labels = torch.tensor([row.prompt + row.answer]), torch.tensor([(-100,) * len(row.prompt) + row.answer])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


@torch.no_grad()
def one_by_one(model, rows):
    return torch.stack([plain_loss(model, row) for row in rows])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Encoding and packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_targets_are_the_tokenizer_s_own(bases, kind):
    base = bases[kind]
    row, own = encode(base, "sort the", "cat cow"), base.tokenizer(text_target="cat cow")["input_ids"]
    assert list(row.prompt) == base.tokenizer("sort the")["input_ids"]
    assert list(row.answer) == (own if kind != "tied" else [*own, base.stop_ids[0]])
    if kind != "tied":
        assert row.prompt[-1] == row.answer[-1] == base.tokenizer.eos_token_id
    size = len(row.answer) - 1
    assert encode(base, "sort the", "cat cow", size).answer == row.answer[:-1]
    assert encode(base, "sort the", "cat cow", size).reachable
    assert not encode(base, "sort the", "cat cow", size - 1).reachable
    for prompt, target, said in (
        ("", "cat", "the prompt of"),
        ("cat", "", "the target of"),
        ("cat", "ü", "every character"),
    ):
        if prompt or kind != "bart":  # which reads <s> even so, as causal models do that begin with one
            with pytest.raises(TaskError, match=said):
                encode(base, prompt, target)
    assert encode_all(base, [], []) == []


IDS = st.lists(st.integers(0, 60), min_size=1, max_size=9).map(tuple)
ROWS = st.lists(st.builds(Encoded, IDS, IDS), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, data=st.data())
@pytest.mark.parametrize("kind", ["tied", "flan", "llama"])
def test_batches_hold_what_went_in(bases, kind, rows, data):
    base = bases[kind]
    packed = Packed(rows, base)
    index = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))
    batch, own = packed.batch(index), [rows[i] for i in index]
    assert packed.lengths[index].tolist() == [len(row) for row in own]
    prompts, answers = ([len(getattr(row, part)) for row in own] for part in ("prompt", "answer"))
    assert batch.labels.shape == (len(own), batch.keep)
    if kind == "llama":
        assert batch.mask is batch.decoder is None
        assert batch.ids.shape[1] == max(map(len, own))
        assert packed.width == max(map(len, rows))
    else:
        assert batch.ids.shape[1] == max(prompts)
        assert batch.decoder.shape == batch.labels.shape == (len(own), max(answers))
        assert packed.width == max(len(row.prompt) for row in rows) + max(len(row.answer) for row in rows)
        assert batch.mask.sum(1).tolist() == prompts
        assert (batch.mask.long().diff() <= 0).all()
    for i, row in enumerate(own):
        assert batch.labels[i][batch.labels[i] != -100].tolist() == list(row.answer)
        if kind == "llama":
            assert batch.ids[i, : len(row)].tolist() == [*row.prompt, *row.answer]
        else:
            assert batch.ids[i, : prompts[i]].tolist() == list(row.prompt)
            assert batch.decoder[i, : answers[i]].tolist() == [base.decoder_start, *row.answer[:-1]]
            assert batch.labels[i, : answers[i]].tolist() == list(row.answer)
    assert int(batch.ids.min()) >= 0
    assert batch.decoder is None or int(batch.decoder.min()) >= 0


def test_the_decoder_s_start_is_the_model_s_or_asked_for(tmp_path):
    assert tiny_base().decoder_start is None
    made = worded_t5()
    assert made.decoder_start == 1
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    loaded, rows = Base.load(tmp_path / "base", device="cpu"), examples(made, 3)
    assert loaded.decoder_start == 1
    assert torch.equal(score(loaded, [rows]).loss, score(made, [rows]).loss)
    made.model.config.decoder_start_token_id = None
    assert Base(made.model, made.tokenizer, "x").decoder_start == 1  # what generation is configured with
    made.model.generation_config.decoder_start_token_id = None
    with pytest.raises(
        BaseError, match="bare is an encoder–decoder, but its configuration names no decoder_start_token_id"
    ):
        encode(Base(made.model, made.tokenizer, "bare"), "the cat", "sat")
    with pytest.raises(BaseError, match="names no decoder_start_token_id"):
        score(Base(made.model, made.tokenizer, "bare"), [rows])


# Losses ----------------------------------------------------------------------------------------------------------------

BUDGETS = [1, 90, None]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_transformers(bases, kind, budget):
    base = bases[kind]
    groups = [examples(base, 6, seed) for seed in range(2)]
    scores = score(base, groups, max_tokens=budget)
    for g, group in enumerate(groups):
        close(scores.loss[g], one_by_one(base.model, group))
    assert scores.tokens == sum(len(row.prompt) + len(row.answer) for group in groups for row in group)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(bases, kind):
    base, rows = bases[kind], examples(bases[kind], 8)
    together, alone = score(base, [rows]).loss, score(base, [rows], max_tokens=1).loss
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    batch = Packed(rows, base).batch(np.arange(8))
    assert not batch.mask.all()
    spoilt = replace(
        batch,
        ids=torch.where(batch.mask, batch.ids, 7),
        decoder=torch.where(batch.labels == -100, 7, batch.decoder),
    )
    want, got = base.next_token_logits(batch), base.next_token_logits(spoilt)
    there = batch.labels != -100
    assert relative(got[there], want[there]) < 1e-5
    assert relative(got[~there], want[~there]) > 1e-3


def test_batches_are_cut_by_the_tokens_of_both_stacks(t5, monkeypatch):
    rows, seen, plain = examples(t5, 9), [], t5.logits
    monkeypatch.setattr(t5, "logits", lambda batch: seen.append(batch) or plain(batch))
    widest = max(len(r.prompt) for r in rows) + max(len(r.answer) for r in rows)
    score(t5, [rows] * 2, max_tokens=5 * widest)
    assert max(len(batch.ids) for batch in seen) == 4  # two groups of two rows, not of five
    assert max(batch.ids.numel() + batch.decoder.numel() for batch in seen) <= 5 * widest


def some_adapters(base):
    """Of all projections, of the cross-attention alone, of the encoder, of the decoder's embedding: ranks 1 to 4."""
    of = lambda words: [m for m in base.projections if words in m]  # noqa: E731
    cross = of("EncDecAttention") or of("encoder_attn")
    made = [
        random_adapter(base, 1, 0, name="all", size=0.2),
        random_adapter(
            base, 2, 1, [m for m in cross if m[-1] in "kv" or "k_proj" in m or "v_proj" in m], name="cross", size=0.3
        ),
        random_adapter(base, 3, 2, of("encoder."), name="encoder", size=0.2),
        random_adapter(base, 4, 3, [m for m in of("decoder.") if m not in cross], name="decoder", size=0.2),
    ]
    assert all(adapter.modules for adapter in made)
    return made


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", ["shared", "grouped", "one"])
def test_every_group_is_scored_under_its_own_update(t5, budget, form):
    adapters = some_adapters(t5)
    c = torch.tensor([[1.0, 0, 0, 0], [0.5, -0.5, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    if form == "shared":
        stack = Stack.of(adapters)
        updates = shared(stack, c)
        models = [dense_model(t5, {m: u.delta(c[k][u.owner]) for m, u in stack}) for k in range(4)]
    else:
        updates = grouped(adapters if form == "grouped" else adapters[:1])
        models = [dense_model(t5, {m: f.delta() for m, f in a.modules.items()}) for a in adapters]
    groups = [examples(t5, 5, seed) for seed in range(4)]
    bare = score(t5, groups).loss
    scores = score(t5, groups, updates, max_tokens=budget)
    for g, group in enumerate(groups):
        close(scores.loss[g], one_by_one(models[0] if form == "one" else models[g], group))
        assert (form, g) == ("shared", 2) or (scores.loss[g] - bare[g]).abs().max() > 1e-3


def test_groups_in_bart_and_at_embeddings(bases):
    base = bases["bart"]
    adapters, groups = some_adapters(base)[:2], [examples(base, 4, seed) for seed in range(2)]
    got = score(base, groups, grouped(adapters), max_tokens=90).loss
    for g, adapter in enumerate(adapters):
        close(got[g], one_by_one(dense_model(base, {m: f.delta() for m, f in adapter.modules.items()}), groups[g]))
    base, g = bases["flan"], torch.Generator().manual_seed(0)
    groups = [examples(base, 4, seed) for seed in range(2)]
    adapters = [
        Adapter(
            stack,
            {
                m: Factors(
                    torch.randn(32, 2, generator=g), torch.randn(2, len(base.tokenizer), generator=g), embedding=True
                )
            },
        )
        for stack in ("encoder", "decoder")
        for m in [f"{stack}.embed_tokens"]
    ]
    bare, got = score(base, groups).loss, score(base, groups, grouped(adapters), max_tokens=90).loss
    for k, adapter in enumerate(adapters):
        deltas = {m: f.delta() for m, f in adapter.modules.items()}
        close(got[k], one_by_one(dense_model(base, deltas), groups[k]))
        assert (got[k] - bare[k]).abs().max() > 1e-3


def test_tasks_are_evaluated_with_and_without_demonstrations(bases):
    base = bases["flan"]
    rows = tuple(Example(f"the {a} and the {b}", a) for a in ("cat", "dog", "mat") for b in ("bat", "fox", "cow"))
    made = [Task(f"t{k}", "say", rows[:4], (), rows[k : k + 4], max_new_tokens=4) for k in (4, 5)]
    adapters = some_adapters(base)[:3]
    for shots in (0, 2):
        want = one_by_one(base.model, encode_task(base, made[0], made[0].test, shots=shots))
        close(evaluate(base, made[0], shots=shots).loss[0], want)
    table = evaluate_many(base, adapters, made)
    assert table.shape == (3, 2)
    for adapter in adapters:
        for task in made:
            assert table.loc[adapter.name, task.name] == pytest.approx(
                float(evaluate(base, task, grouped([adapter])).accuracy)
            )


# Exact match -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(base, prompts, limit, model=None):
    """Greedy answers by transformers' own `generate` under a neutral configuration, all stop ids; one at a time."""
    from transformers import GenerationConfig

    model, out = model or base.model, []
    neutral = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],
        decoder_start_token_id=base.decoder_start,
        use_cache=False,  # transformers 5 makes its cache for as many layers as the encoder has
    )
    own, model.generation_config = model.generation_config, neutral
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=neutral)[0].tolist()
            assert done[0] == base.decoder_start
            out.append(done[1:])
    finally:
        model.generation_config = own
    return out


def lively(kind):
    """A base whose answers differ with the prompt, and which has two stop tokens that it does produce."""
    base = MADE[kind]()
    g, model = torch.Generator().manual_seed(1), base.model
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
        model.lm_head = torch.nn.Linear(32, len(base.tokenizer))
        model.lm_head.weight.copy_(torch.randn(len(base.tokenizer), 32, generator=g) * 3)
        model.lm_head.bias.copy_(torch.randn(len(base.tokenizer), generator=g))
    model.requires_grad_(False)
    made = generate(base, [row.prompt for row in examples(base, 10, 8)], 8)  # the prompts of the test at limit 8
    inside = Counter(t for answer in made for t in set(answer[1:]) - {answer[0], *base.stop_ids})
    second = next(t for t, n in inside.most_common() if n <= 5 and any(len(a) == 8 and t not in a for a in made))
    model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, second]
    return Base(model, base.tokenizer, kind)


@pytest.fixture(scope="module")
def talkers():
    return {kind: lively(kind) for kind in KINDS[:2]}


@pytest.mark.parametrize(("limit", "adapted"), [(1, False), (3, False), (8, False), (5, True)])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_match_is_what_generate_produces(talkers, kind, limit, adapted):
    base, rng = talkers[kind], random.Random(limit)
    adapter = random_adapter(base, 2, 5, size=0.3)
    model = dense_model(base, {m: f.delta() for m, f in adapter.modules.items()}) if adapted else base.model
    prompts = [row.prompt for row in examples(base, 10, limit)]
    rows, want, ends = [], [], Counter()
    for prompt, made in zip(prompts, generate(base, prompts, limit, model), strict=True):
        ended = made[-1] in base.stop_ids
        body = made[:-1] if ended else made
        own = body or made
        ends[made[-1] if ended else "full"] += 1
        other = (own[-1] + 1 + rng.randrange(len(base.tokenizer) - 1)) % len(base.tokenizer)
        for target in (own, [*own[:-1], other], [*own, own[-1]], own[:-1], own[1:], [*own, *[own[0]] * limit]):
            if target:
                stop = (base.stop_ids[0],) if len(target) < limit else ()
                inside = bool(set(target) & set(base.stop_ids))
                rows.append(Encoded(tuple(prompt), (*target, *stop), len(target) <= limit and not inside))
                want.append(comes_out(base, made, target, limit))
    assert score(base, [rows], grouped([adapter]) if adapted else None, max_tokens=150).match[0].tolist() == want
    assert True in want
    assert False in want
    assert ends["full"]
    if limit == 8 and not adapted:
        assert ends[base.stop_ids[1]]  # ended by a stop token other than the one encoded


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_limit_decides(talkers, kind):
    base = talkers[kind]
    favourite = base.tokenizer("cat", add_special_tokens=False)["input_ids"][-1]
    endless = copy.deepcopy(base.model)
    endless.lm_head.bias[favourite] = 1e4
    endless = Base(endless, base.tokenizer, base.name)
    prompt = encode(base, "the cat", "mat").prompt
    for limit, size, matches in (
        (3, 3, True),
        (3, 2, False),
        (3, 4, False),
        (4, 3, False),
        (1, 1, True),
        (1, 2, False),
    ):
        stop = (base.stop_ids[0],) if size < limit else ()
        row = Encoded(prompt, (favourite,) * size + stop, size <= limit)
        made = generate(endless, [prompt], limit)[0]
        assert score(endless, [[row]]).match.item() is matches is comes_out(endless, made, [favourite] * size, limit)


# Fitting ---------------------------------------------------------------------------------------------------------------


def minibatches(rows, batch, steps, seed):
    """Shuffled epochs under the seed, one after the other."""
    generator, queue = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(queue) < batch:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in queue[:batch]]
        del queue[:batch]


def batch_loss(model, rows):
    """Cross-entropy over all answer tokens of padded rows, by transformers itself."""
    pad = lambda parts, value: torch.tensor([[*p, *[value] * (max(map(len, parts)) - len(p))] for p in parts])  # noqa: E731
    prompts, labels = [r.prompt for r in rows], pad([r.answer for r in rows], -100)
    mask = pad([[1] * len(p) for p in prompts], 0)
    return model(input_ids=pad(prompts, 0), attention_mask=mask, labels=labels).loss


def test_coefficients_are_those_of_a_plain_autograd_loop(t5):
    stack = Stack.of(some_adapters(t5))
    train = [examples(t5, 7, 1, 5), examples(t5, 3, 2, 5)]
    schedule = Schedule(steps=6, lr=0.05, batch=4)
    fitted = learn_coefficients(t5, [stack] * 2, train, None, schedule, seeds=[3, 4], activation="linear")
    weights = dict(t5.model.named_parameters())
    for rows, seed, own in zip(train, (3, 4), fitted, strict=True):
        theta = torch.zeros(len(stack.modules), len(stack)).requires_grad_()
        optimiser = torch.optim.AdamW([theta], lr=0.05, weight_decay=0)
        spent = 0
        for step, batch in enumerate(minibatches(rows, min(4, len(rows)), 6, seed)):
            moved = {
                f"{m}.weight": weights[f"{m}.weight"] + (u.B * theta[i][u.owner]) @ u.A
                for i, (m, u) in enumerate(stack)
            }
            call = lambda **inputs: torch.func.functional_call(t5.model, moved, kwargs=inputs)  # noqa: B023, E731
            loss = batch_loss(call, batch)
            assert loss.item() == pytest.approx(float(own.curves.train[step]), rel=1e-4)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([theta], 1.0)
            optimiser.param_groups[0]["lr"] = 0.05 * cosine_rate(step, schedule)
            optimiser.step()
            spent += sum(map(len, batch))
        torch.testing.assert_close(own.coefficients, theta.detach(), rtol=1e-3, atol=1e-4)
        assert own.tokens == spent


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_lower_the_loss(bases, kind):
    base = bases[kind]
    stack, rows = Stack.of(some_adapters(base)), examples(base, 6, 8)
    (own,) = learn_coefficients(base, [stack], [rows], [rows], Schedule(steps=20, lr=0.2, batch=6), seeds=[0])
    before, after = score(base, [rows]).loss.mean(), score(base, [rows], grouped([own.adapter])).loss.mean()
    assert float(own.curves.best) == pytest.approx(float(after), rel=1e-4)
    assert after < 0.97 * before


def test_new_adapters_are_those_that_peft_trains(t5):
    """peft's model with the same start, torch's AdamW, the same minibatches, schedule and clipping; two at a time."""
    from peft import LoraConfig, get_peft_model

    schedule, seeds = Schedule(steps=5, lr=1e-2, batch=4, clip=0.2), [11, 12]
    plans, train = (
        [Plan(2, targets=tuple(T5)), Plan(3, 1.0, True, ("k", "wo"))],
        [examples(t5, 6, s, 5) for s in (1, 2)],
    )
    adapters, curves = train_fresh(t5, ["a", "b"], train, None, schedule, seeds=seeds, plans=plans)
    assert set(adapters[0].modules) == set(t5.projections)
    assert {m.split(".")[0] for m in adapters[0].modules} == {"encoder", "decoder"}
    assert {m.rsplit(".", 1)[1] for m in adapters[0].modules} == set(T5)
    start = start_factors(t5.projections, plans, seeds)
    for g, plan in enumerate(plans):
        config = LoraConfig(
            r=plan.rank,
            lora_alpha=plan.ratio * plan.rank,
            use_rslora=plan.rslora,
            target_modules=list(plan.targets),
            task_type="SEQ_2_SEQ_LM",
        )
        with peft_s_own_warnings():
            model = get_peft_model(copy.deepcopy(t5.model), config).eval()
        layers = {n.removeprefix("base_model.model."): x for n, x in model.named_modules() if hasattr(x, "lora_A")}
        assert set(layers) == set(adapters[g].modules)
        with torch.no_grad():
            for module, layer in layers.items():
                layer.lora_A["default"].weight.copy_(start[module][1][g, : plan.rank])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=0.0)
        for step, batch in enumerate(minibatches(train[g], 4, 5, seeds[g])):
            loss = batch_loss(model.base_model.model, batch)
            assert loss.item() == pytest.approx(float(curves.train[step, g]), rel=1e-3)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, schedule.clip)
            optimiser.param_groups[0]["lr"] = schedule.lr * cosine_rate(step, schedule)
            optimiser.step()
        for module, layer in layers.items():
            assert relative(adapters[g].modules[module].delta(), layer.get_delta_weight("default").detach()) < 1e-3


def test_new_adapters_learn(bases):
    base = bases["flan"]
    train = [examples(base, 6, s) for s in range(2)]
    adapters, curves = train_fresh(base, ["a", "b"], train, train, Schedule(steps=12, lr=2e-2, batch=4), seeds=[0, 1])
    assert set(adapters[0].modules) == set(base.projections)
    assert "decoder.block.2.layer.1.EncDecAttention.v" in base.projections
    assert "encoder.block.1.layer.1.DenseReluDense.wi_1" in base.projections
    assert "lm_head" not in base.projections
    torch.testing.assert_close(score(base, train, grouped(adapters)).loss.mean(1), curves.best, rtol=1e-4, atol=1e-5)
    assert (curves.best < 0.7 * curves.validation[0]).all()


@pytest.mark.parametrize(("kind", "targets"), [("tied", T5), ("nano", ["q_proj", "v_proj", "down_proj"])])
def test_lorahub_in_factor_space_mixes_the_state_dicts(tmp_path, kind, targets):
    """Plain peft with lora_A = Σ w lora_A,i and lora_B = Σ w lora_B,i, as the published code mixes them."""
    base = tiny_t5() if kind == "tied" else tiny_base(spread=4)
    config = {"r": 3, "lora_alpha": 5, "target_modules": targets}
    states = [
        {n: p for n, p in write_peft(base, tmp_path / f"a{i}", i, 0.3, **config).named_parameters() if "lora_" in n}
        for i in range(3)
    ]
    stack = Stack.of([Adapter.load(tmp_path / f"a{i}", shapes=base.layers) for i in range(3)])
    rows, model = some_examples(base, 5, 0), peft_model(base, **config)

    def mixed(weights):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(sum(w * state[name] for w, state in zip(weights, states, strict=True)))
        return one_by_one(model, rows)

    weights = torch.tensor([[[1.0, 0, 0], [0.7, -0.4, 1.2], [0.0, 0, 0], [-1.5, 1.5, 0.5]]])
    losses = population_losses(base, [stack], weights, [rows], "factor")[0]
    bare = one_by_one(base.model, rows)
    for w, got in zip(weights[0], losses, strict=True):
        torch.testing.assert_close(got, mixed(w.tolist()), rtol=1e-4, atol=1e-5)
        assert (relative(got, bare) > 1e-3) is bool(w.any())
    assert relative(population_losses(base, [stack], weights, [rows], "delta")[0, 1], losses[1]) > 1e-3
    (own,) = lorahub(base, [stack], [rows], seeds=[0], space="factor", budget=8)
    found = score(base, [rows], grouped([own.adapter])).loss[0]
    torch.testing.assert_close(found, mixed(own.coefficients[0].tolist()), rtol=1e-4, atol=1e-5)
    assert own.tokens == 8 * sum(map(len, rows))


# The least and the most ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flan", "llama"])
def test_one_training_example_is_enough_and_no_test_example_is_not(bases, kind):
    base = bases[kind]
    adapters = [random_adapter(base, 2, i, name=f"a{i}", size=0.2) for i in range(2)]
    task = Task("one", "say", (Example("the cat", "cat"),), (), (), max_new_tokens=9)
    row = encode_task(base, task, task.train)[0]
    own = adapt(base, adapters, task, "coefficients", steps=6, lr=0.1, batch=8)
    assert own.passes == 6
    assert own.tokens == 6 * len(row)
    assert float(own.curves.train[0]) == pytest.approx(float(plain_loss(base.model, row)), rel=1e-4)
    assert own.curves.train[-1] < own.curves.train[0]
    assert adapt(base, adapters, task, "lorahub", budget=4).tokens == 4 * len(row)
    (_,), curves = train_fresh(base, ["n"], [[row]], [[row]], Schedule(steps=5, lr=1e-2, batch=8), seeds=[0])
    assert curves.best < curves.validation[0]
    collect(base, adapters, task)
    for call in (lambda: evaluate(base, task), lambda: evaluate_many(base, adapters, [task])):
        with pytest.raises(MergeError, match=r"equally many examples, got sizes \[0\]"):
            call()
    with pytest.raises(TaskError, match="one has no training examples"):
        adapt(base, adapters, replace(task, train=()), "coefficients", steps=1)


@pytest.mark.parametrize("kind", ["flan", "llama"])
def test_a_target_beyond_the_limit_is_learned_in_full_and_never_matches(bases, kind):
    base = bases[kind]
    task = Task("long", "say", (), (), (Example("the cat", "cat mat"),), max_new_tokens=2)
    row = encode_task(base, task, task.test)[0]
    body = base.tokenizer("cat mat", add_special_tokens=False)["input_ids"]
    assert len(body) > 2
    assert list(row.answer) == body  # whole, and no stop token behind it
    assert not row.reachable
    (adapter,), _ = train_fresh(base, ["n"], [[row]], None, Schedule(steps=20, lr=2e-2), seeds=[0])
    got = evaluate(base, task, grouped([adapter]))
    close(got.loss[0], one_by_one(dense_model(base, {m: f.delta() for m, f in adapter.modules.items()}), [row]))
    assert not got.match.any()
    assert score(base, [[replace(row, reachable=True)]], grouped([adapter])).match.all()


@pytest.mark.parametrize("kind", ["flan", "llama"])
def test_coefficients_stay_fp32_on_a_bf16_base(tmp_path, kind):
    made = MADE[kind]()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    half = Base.load(tmp_path / "base", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    adapters = [random_adapter(made, 2, i, name=f"a{i}", size=0.3) for i in range(3)]
    stack, rows = Stack.of(adapters), examples(made, 6, 8)
    theta, norms = torch.zeros(1, len(stack.modules), 3), []

    def updates():
        return {m: LowRank(u.B, u.A, theta[:, i][:, u.owner]) for i, (m, u) in enumerate(stack)}

    def watch(*_):
        assert theta.grad.dtype == torch.float32
        norms.append(float(theta.grad.norm()))

    curves = fit(half, [theta], updates, [rows], [rows], Schedule(steps=12, lr=0.2, batch=4), [0], watch=watch)
    assert theta.dtype == torch.float32
    assert len(norms) == 12
    assert 0 < min(norms) <= max(norms) < float("inf")
    assert curves.best < 0.95 * curves.validation[0]
    want = score(made, [rows], updates()).loss.mean()
    assert float(curves.best) == pytest.approx(float(want), rel=0.05)
    (own,) = learn_coefficients(half, [stack], [rows], [rows], Schedule(steps=4, lr=0.1, batch=4), seeds=[0])
    assert own.coefficients.dtype == torch.float32
    assert {f.B.dtype for f in own.adapter.modules.values()} == {torch.float32}
    assert own.curves.best < own.curves.validation[0]


# Statistics ------------------------------------------------------------------------------------------------------------


def observed(base, adapter, modules, row):
    """One example alone through base + ΔW: module → (its inputs, −∂ log p(answer | prompt) / ∂ its weight), with which stack."""
    model = dense_model(base, {m: f.B.double() @ f.A.double() for m, f in adapter.modules.items()})
    layers, inputs = dict(model.named_modules()), {}
    for module in modules:
        layers[module].weight = torch.nn.Parameter(layers[module].weight.detach().clone())
        layers[module].register_forward_pre_hook(
            lambda _, args, module=module: inputs.update({module: args[0].detach()[0]})
        )
    grads = torch.autograd.grad(plain_loss(model, row) * len(row.answer), [layers[m].weight for m in modules])
    return {
        m: (inputs[m], g.T if isinstance(layers[m], torch.nn.Embedding) else g)
        for m, g in zip(modules, grads, strict=True)
    }


def embedding_adapter(base, seed):
    """Of both stacks' embeddings and of the head, beside two projections."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.2  # noqa: E731
    size = len(base.tokenizer)
    modules = {f"{s}.embed_tokens": Factors(draw(32, 2), draw(2, size), embedding=True) for s in ("encoder", "decoder")}
    modules |= {"lm_head": Factors(draw(size, 2), draw(2, 32))}
    more = random_adapter(base, 2, seed, ["EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention.k", "wi_0"])
    return Adapter("embedding", modules | dict(more.modules))


@pytest.fixture(scope="module")
def known():
    """A base in fp64, adapters of either stack, of cross-attention, embeddings and the head; their examples; one by one."""
    base = worded_t5()
    base.model.double()
    adapters = [*some_adapters(base), embedding_adapter(base, 9)]
    rows = {a.name: examples(base, (3, 5, 2, 4, 3)[i], 20 + i, 5) for i, a in enumerate(adapters)}
    level = rows["all"][0]
    rows["all"].append(Encoded(level.prompt[:4], (*level.prompt[:3], base.stop_ids[0])))  # both stacks read 4 tokens
    rows["encoder"] = [Encoded(r.prompt[:3], r.prompt[1:4]) for r in rows["encoder"]]
    modules = list(Stack.of(adapters).modules)
    alone = {a.name: [observed(base, a, modules, row) for row in sorted(rows[a.name], key=len)] for a in adapters}
    return base, adapters, rows, alone


def reads_prompt(module):
    return module.startswith("encoder.") or module.endswith(("EncDecAttention.k", "EncDecAttention.v"))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("budget", [1, 70, None])
def test_rows_are_what_plain_hooks_and_autograd_say(known, gradients, budget):
    base, adapters, examples_, alone = known
    statistics = collect(base, adapters, examples_, gradients=gradients, max_tokens=budget)
    assert statistics.names == tuple(a.name for a in adapters)
    for name, own in alone.items():
        assert list(statistics.rows[name]) == list(Stack.of(adapters).modules)
        for module, rows in statistics.rows[name].items():
            part = "prompt" if reads_prompt(module) else "answer"
            assert len(rows) == sum(len(getattr(row, part)) for row in examples_[name]), module
            want = torch.cat([seen[module][0] for seen in own])
            assert torch.equal(rows.x, want) if rows.ids else relative(rows.x, want) < 1e-9, (name, module)
            if not gradients:
                assert rows.g is None
                continue
            fisher = sum(seen[module][1].square() for seen in own) / len(own)
            got = rows.fisher(torch.zeros((), dtype=torch.float64), fisher.shape[1])
            assert relative(got, fisher) < 1e-5, (name, module)  # the loss is fp32


def test_tokens_are_drawn_from_each_stack(known):
    base, adapters, examples_, _ = known
    full, capped = collect(base, adapters, examples_), collect(base, adapters, examples_, tokens=6)
    for name, modules in capped.rows.items():
        for module, rows in modules.items():
            every = full.rows[name][module]
            assert len(rows) == min(6, len(every))
            if not rows.ids:
                gaps = torch.cdist(rows.x, every.x, compute_mode="donot_use_mm_for_euclid_dist")
                assert gaps.amin(1).max() < 1e-9
    assert min(len(r) for r in full.rows["all"].values()) > 6


def test_layers_that_read_one_tensor_share_what_is_kept(known):
    base, adapters, examples_, _ = known
    rows = collect(base, adapters[:1], examples_).rows["all"]
    cross = [rows[f"decoder.block.{i}.layer.1.EncDecAttention.{x}"].x for i in range(3) for x in "kv"]
    assert len({x.data_ptr() for x in cross}) == 1
    assert rows["decoder.block.0.layer.1.EncDecAttention.q"].x.data_ptr() != cross[0].data_ptr()


def test_what_sees_no_tokens_cannot_be_observed(known):
    """A relative position bias looks distances up: also where there are as many of them as tokens."""
    base, _, examples_, _ = known
    module = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    width, buckets = base.layers[module]
    adapter = Adapter("bias", {module: Factors(torch.ones(width, 1), torch.ones(1, buckets), embedding=True)})
    row = examples_["encoder"][0]
    assert len(row.prompt) == 3
    for count in (1, 2, 4):
        with pytest.raises(MergeError, match="only a layer that sees every token of every row"):
            collect(base, [adapter], [Encoded(row.prompt[:count], row.answer)] * count)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_merges_by_examples_run_on_both_stacks(known, method):
    base, adapters, examples_, alone = known
    adapters = adapters[:4]
    statistics = collect(base, adapters, examples_, gradients=method == "fisher")
    got = merge(adapters, method, statistics=statistics)
    module = "decoder.block.1.layer.1.EncDecAttention.k"
    delta = {
        a.name: a.modules[module].B.double() @ a.modules[module].A.double() for a in adapters if module in a.modules
    }
    zero = torch.zeros(base.layers[module]).double()
    up, down = torch.zeros_like(zero), 0
    if method == "regmean":
        for a in adapters:
            x = torch.cat([seen[module][0] for seen in alone[a.name]])
            gram = x.T @ x / len(x)
            gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
            up, down = up + delta.get(a.name, zero) @ gram, down + gram
        want, made = up @ torch.linalg.inv(down), got.modules[module].delta()
        assert relative(made.double(), want) < 1e-3
        assert relative(sum(delta.values()) / 4, want) > 0.02
    else:
        for a in adapters:
            mine = {
                m: sum(seen[m][1].square() for seen in alone[a.name]) / len(alone[a.name])
                for m in Stack.of(adapters).modules
            }
            size = sum(float(f.square().sum()) for f in mine.values()) ** 0.5
            up, down = up + mine[module] / size * delta.get(a.name, zero), down + mine[module] / size
        assert relative(got.modules[module].double() * down, up) < 1e-2
