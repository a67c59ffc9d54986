"""Greedy generation against transformers' own, one prompt at a time, in fp32; under adapters against weights written out."""

import pytest
import torch
from transformers import GenerationConfig

from helpers import (
    dense_model,
    hook_count,
    random_adapter,
    some_examples,
    tiny_base,
    tiny_gpt2,
    tiny_t5,
    worded_base,
)
from helpers import generate as one_by_one
from test_seq2seq import tiny_bart
from workbench.compose import grouped, shared
from workbench.errors import MergeError, TaskError
from workbench.evaluate import encode, score
from workbench.generation import decode, generate
from workbench.stack import Stack


def lively(base, spread=4.0):
    """Weights that make a random model write more than one token over and over."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in base.model.named_parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) * 0.02 * spread)
            elif name.endswith("bias"):
                p.mul_(0.1)
    return base


BASES = {
    "llama": lambda: tiny_base(spread=6),
    "gpt2": lambda: lively(tiny_gpt2(), 8),  # learnt positions: padding must not shift them
    "t5": lambda: lively(tiny_t5(), 8),
    "bart": lambda: lively(tiny_bart(), 15),  # learnt positions in the encoder
    "byte-bpe": lambda: worded_base("byte-bpe"),  # two stop tokens
}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return BASES[request.param]()


def one_by_one_decoded(base, model, prompts, limit):
    """The same of an encoder–decoder, without its start token."""
    special = {"pad_token_id": 0, "decoder_start_token_id": base.decoder_start, "eos_token_id": list(base.stop_ids)}
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, **special)
    own, model.generation_config = model.generation_config, settings
    try:
        return [model.generate(torch.tensor([list(p)]), generation_config=settings)[0, 1:].tolist() for p in prompts]
    finally:
        model.generation_config = own


def alone(base, prompts, limit, model=None):
    if base.decoder_start is None:
        return one_by_one(base, prompts, limit, model)
    return one_by_one_decoded(base, model or base.model, prompts, limit)


def prompts_of(base, n, seed):
    return [row.prompt for row in some_examples(base, n, seed)]


@pytest.mark.parametrize("budget", [1, 150])
def test_prompts_side_by_side_get_what_each_gets_alone(base, budget):
    groups = [prompts_of(base, n, n) for n in (7, 3, 5)]
    want = [alone(base, group, 9) for group in groups]
    assert generate(base, groups, 9, max_tokens=budget) == want
    written = [tuple(ids) for group in want for ids in group]
    assert len(set(written)) > 5
    assert {len(ids) for ids in written} <= set(range(1, 10))


def test_each_group_is_continued_under_its_own_adapter(base):
    adapters = [random_adapter(base, 1 + i, i, name=f"a{i}", size=0.3) for i in range(3)]
    groups = [prompts_of(base, n, 10 + n) for n in (4, 6, 2)]
    models = [dense_model(base, {m: f.delta() for m, f in a.modules.items()}) for a in adapters]
    want = [alone(base, group, 6, model) for group, model in zip(groups, models, strict=True)]
    assert generate(base, groups, 6, grouped(adapters)) == want
    assert generate(base, groups[:1], 6, grouped(adapters[:1])) == want[:1]
    assert want != [alone(base, group, 6) for group in groups]
    stack = Stack.of(adapters)
    c = torch.tensor([[1.0, 0, 0], [0.5, -0.5, 1]])
    mixed = [dense_model(base, {m: u.delta(c[k][u.owner]) for m, u in stack}) for k in range(2)]
    twice = [groups[0], groups[2], groups[1], groups[1]]  # two groups a candidate
    found = generate(base, twice, 5, shared(stack, c), max_tokens=200)
    assert found == [alone(base, group, 5, mixed[g // 2]) for g, group in enumerate(twice)]
    assert hook_count(base.model) == 0


def test_generation_and_teacher_forcing_agree(base):
    """A target that is what the model writes is a match, and one that is not, is none."""
    rows = some_examples(base, 6, 3)
    (written,) = generate(base, [[row.prompt for row in rows]], 5)
    for row, ids in zip(rows, written, strict=True):
        own = type(row)(row.prompt, tuple(ids))
        assert score(base, [[own]]).match.item()
        other = type(row)(row.prompt, (*ids[:-1], (ids[-1] + 1) % 90))
        assert score(base, [[other]]).match.item() == (other.answer[-1] in base.stop_ids and ids[-1] in base.stop_ids)


def test_a_group_may_be_empty_and_nothing_is_left_behind():
    base = tiny_base(spread=6)
    some = prompts_of(base, 3, 1)
    own = base.model.generation_config
    found = generate(base, [[], some, []], 4)
    assert found == [[], alone(base, some, 4), []]
    assert generate(base, [[], []], 4) == [[], []]
    assert generate(base, [], 4) == []
    assert base.model.generation_config is own
    updates = grouped([random_adapter(base, seed=i, size=0.3) for i in range(3)])
    assert (
        generate(base, [[], some, []], 4, updates)[1]
        == generate(base, [some], 4, grouped([random_adapter(base, seed=1, size=0.3)]))[0]
    )


def test_a_model_s_own_settings_do_not_matter():
    """Sampling, penalties, a shorter limit and forced tokens in the model's own configuration are left aside."""
    base = tiny_base(spread=6)
    some = prompts_of(base, 4, 2)
    want = generate(base, [some], 6)
    base.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=1.8,
        max_new_tokens=2,
        eos_token_id=base.stop_ids[0],
        num_beams=3,
    )
    assert generate(base, [some], 6) == want
    assert base.model.generation_config.num_beams == 3


def test_generation_ends_at_any_stop_token():
    base = worded_base("byte-bpe")
    (written,) = generate(base, [prompts_of(base, 40, 5)], 40)
    ends = {ids[-1] for ids in written if len(ids) < 40}
    assert ends <= set(base.stop_ids)
    first = written[0][0]  # make a token that is written first a stop token: the answer is that token alone
    base.__dict__["stop_ids"] = (*base.stop_ids, first)
    (again,) = generate(base, [prompts_of(base, 40, 5)], 40)
    for ids, before in zip(again, written, strict=True):
        at = before.index(first) + 1 if first in before else len(before)
        assert ids == before[:at]
    assert again[0] == [first]


def test_text_of_an_answer():
    base = worded_base("unigram")
    for text in ("the cat sat", "done", "bat cow"):
        row = encode(base, "swap", text)
        assert row.answer[-1] in base.stop_ids
        assert decode(base, row.answer) == text
        assert decode(base, row.answer[:-1]) == text
    assert decode(base, []) == ""
    nano = tiny_base()
    assert decode(nano, encode(nano, "q", "a  b").answer) == "a  b"
    assert decode(nano, nano.stop_ids) == ""


def test_what_cannot_be_generated_is_refused():
    base = tiny_base()
    with pytest.raises(TaskError, match="limit is 0"):
        generate(base, [[[5]]], 0)
    with pytest.raises(TaskError, match="no tokens"):
        generate(base, [[[5], []]], 3)
    with pytest.raises(MergeError, match="3 groups of prompts cannot be split among 2"):
        generate(base, [[[5]]] * 3, 3, grouped([random_adapter(base, seed=i) for i in range(2)]))


@pytest.mark.parametrize("room", [1, 2, 3, 7, 100])
def test_batches_are_halved_until_they_fit(monkeypatch, room):
    """A model that fails for more than `room` prompts of each of two groups, as a GPU does whose memory runs out."""
    base, seen, held = tiny_base(spread=6), [], {"prompts": room}
    groups = [prompts_of(base, 7, 1), prompts_of(base, 5, 2)]
    want, plain = generate(base, groups, 5), base.model.generate

    def scarce(input_ids, **more):
        if len(input_ids) > 2 * held["prompts"]:
            raise torch.cuda.OutOfMemoryError("made up")
        seen.append(len(input_ids))
        return plain(input_ids=input_ids, **more)

    monkeypatch.setattr(base.model, "generate", scarce)
    assert base.held == {}
    own = base.model.generation_config
    assert generate(base, groups, 5) == want
    assert sum(seen) == 14
    assert ("generate" in base.held) is (room < 7)
    base.held.clear()
    held["prompts"] = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="made up"):
        generate(base, groups, 5)
    assert base.model.generation_config is own
