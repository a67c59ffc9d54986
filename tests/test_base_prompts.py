"""Chat templates against transformers' own `apply_chat_template` and `generate`; prompts that are too long; odd tokenizers."""

import copy
import logging
import re

import pytest
import torch

from helpers import _tiny, comes_out, generate, random_adapter, tiny_t5, worded_base
from workbench.base import Base
from workbench.compose import grouped
from workbench.errors import BaseError, TaskError
from workbench.evaluate import Encoded, encode, encode_all, encode_task, evaluate, score, word
from workbench.prompts import render, tokenise, turn_end
from workbench.tasks import Example, Task

LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "no thought\n{% endif %}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
STRICT = "{% if messages | length > 1 %}{{ raise_exception('one turn at most') }}{% endif %}[{{ messages[0].content }}]"
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML}


def chat_base(template, *, bos=True, listed=True, **more):
    """A tiny random Llama whose tokenizer has a template and, but for `bos`, puts <s> before every text as Llama's does."""
    from tokenizers import processors

    base = worded_base("byte-bpe")
    tokenizer, start = base.tokenizer, len(base.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|eot|>"], "bos_token": "<s>"})
    if bos:
        opening = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=opening
        )
    tokenizer.chat_template = template
    torch.manual_seed(1)
    base.model.resize_token_embeddings(start + 2, mean_resizing=False)
    base.model.requires_grad_(False)
    with torch.no_grad():
        base.model.get_input_embeddings().weight[start:].normal_(std=0.12)
        base.model.lm_head.weight[start:].normal_(std=0.12)
        words = [
            i for i in range(start) if tokenizer(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] == [i]
        ]
        base.model.lm_head.weight[words] *= 3  # so that some answers are words,
        base.model.lm_head.weight[-1] *= 3  # and some end
    ends = [tokenizer.eos_token_id] + [tokenizer.convert_tokens_to_ids("<|eot|>")] * listed
    base.model.generation_config.eos_token_id = base.model.config.eos_token_id = ends
    return Base(base.model, tokenizer, "chatty", **more)


def token(base, text):
    return base.tokenizer.convert_tokens_to_ids(text)


def dated(base):
    """The template with a day written into it."""
    return {"chat_template": base.tokenizer.chat_template.replace("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024")}


def plain_ids(base, turns, **more):
    """What transformers itself makes of the turns, with what the package tells every template."""
    return base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **more)


SHOWN = tuple(Example(f"the {a}", a) for a in ("cat", "dog", "mat", "door"))
TASK = Task(
    "t", "say it", SHOWN, (), (Example("the cow", "cow"), Example("the elk and the fox", "fox")), max_new_tokens=6
)


@pytest.fixture(scope="module")
def bases():
    return {name: chat_base(template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_prompts_are_transformers_own(bases, name):
    base = bases[name]
    assert base.chat
    day = dated(base) | {"enable_thinking": False}
    for row, example in zip(encode_task(base, TASK, TASK.test), TASK.test, strict=True):
        turns = [{"role": "user", "content": f"say it: {example.input} = "}]
        assert list(row.prompt) == plain_ids(base, turns, **day)
        assert row.prompt.count(token(base, "<s>")) == (name == "llama3")  # the template's, and none more
        body = base.tokenizer(example.target, add_special_tokens=False)["input_ids"]
        assert list(row.answer) == [*body, token(base, "<|eot|>")]
        assert row.reachable
    text = base.tokenizer.decode(encode(base, "hello", "cat").prompt)
    assert ("Today: 26 Jul 2024" in text) is (name == "llama3")
    assert text.endswith("no thought\n") is (name == "chatml")
    assert list(encode(base, "hello", "cat").prompt) == plain_ids(base, [{"role": "user", "content": "hello"}], **day)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_demonstrations_are_earlier_turns(bases, name):
    base = bases[name]
    (first, _), (row, _) = (
        word(base, TASK, TASK.test, shots=2, seed=3),
        encode_task(base, TASK, TASK.test, shots=2, seed=3),
    )
    assert [turn["role"] for turn in first] == ["user", "assistant", "user", "assistant", "user"]
    assert first[-1]["content"] == "say it: the cow = "
    for asked, answered in (first[:2], first[2:4]):
        assert asked["content"] == f"say it: the {answered['content']} = "
    assert first[0] != first[2]
    day = dated(base) | {"enable_thinking": False}
    assert list(row.prompt) == plain_ids(base, first, **day)
    assert first == word(base, TASK, TASK.test, shots=2, seed=3)[0] != word(base, TASK, TASK.test, shots=2, seed=4)[0]
    plain = Base(base.model, base.tokenizer, "plain", chat=False)
    bare = Task.prompt(
        TASK,
        TASK.test[0],
        [Example(t["content"].split(": ")[1][:-3], u["content"]) for t, u in (first[:2], first[2:4])],
    )
    assert word(plain, TASK, TASK.test, shots=2, seed=3)[0] == bare
    assert list(encode_task(plain, TASK, TASK.test, shots=2, seed=3)[0].prompt) == base.tokenizer(bare)["input_ids"]


@pytest.mark.parametrize("limit", [1, 4, 12])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_match_is_what_generate_produces_in_a_chat(bases, name, limit):
    """On answers that the model itself gives to transformers' own prompts, and on spoilt ones; as texts where they are some."""
    base, rows, want, ended, worded = bases[name], [], [], 0, 0
    texts = [
        f"{a} the {b}" for a in ("sort", "count", "swap", "drop") for b in ("cat", "animals", "list", "end", "rat yak")
    ]
    day = dated(base) | {"enable_thinking": False}
    heads = [plain_ids(base, [{"role": "user", "content": text}], **day) for text in texts]
    for text, head, made in zip(texts, heads, generate(base, heads, limit), strict=True):
        body = made[:-1] if made[-1] in base.stop_ids else made
        ended += made[-1] == base.stop_ids[0]
        for target in (body, [*body, body[-1] if body else 9], body[:-1]):
            if not target:
                continue
            said = base.tokenizer.decode(target)
            if base.tokenizer(said, add_special_tokens=False)["input_ids"] == target:
                worded += target == body
                rows.append(encode(base, text, said, limit))
                assert list(rows[-1].prompt) == head
            else:
                stop = (base.stop_ids[0],) * (len(target) < limit)
                rows.append(Encoded(tuple(head), (*target, *stop), len(target) <= limit))
            want.append(comes_out(base, made, target, limit))
    assert score(base, [rows], max_tokens=300).match[0].tolist() == want
    assert True in want
    assert False in want
    assert worded or limit > 1
    assert ended or limit < 12


@pytest.mark.parametrize("listed", [True, False])
def test_the_turn_s_end_stops_an_answer(listed):
    """Also where neither the tokenizer nor the generation's configuration lists it."""
    base = chat_base(LLAMA3, listed=listed)
    end = token(base, "<|eot|>")
    assert turn_end(base) == base.stop_ids[0] == end
    assert base.tokenizer.eos_token_id in base.stop_ids
    assert len(set(base.stop_ids)) == len(base.stop_ids)
    plain = Base(base.model, base.tokenizer, "plain", chat=False)
    assert plain.stop_ids[0] == base.tokenizer.eos_token_id
    assert (end in plain.stop_ids) is listed
    assert encode(plain, "hello", "cat").answer[-1] == base.tokenizer.eos_token_id
    eager = copy.deepcopy(base.model)
    eager.lm_head = torch.nn.Linear(32, len(base.tokenizer))
    torch.nn.init.zeros_(eager.lm_head.weight)
    for favourite in (end, base.tokenizer.eos_token_id):
        torch.nn.init.zeros_(eager.lm_head.bias)
        eager.lm_head.bias.data[favourite] = 9.0
        talker = Base(eager, base.tokenizer, "eager")
        assert generate(talker, [encode(talker, "a", "b").prompt], 5) == [[favourite]]
        row = encode(talker, "a", "b")
        assert row.answer[-1] == end
        assert not score(talker, [[row]]).match.item()


def test_a_template_without_an_end_of_its_own():
    base = chat_base(PLAIN)
    assert turn_end(base) is None
    assert base.stop_ids[0] == base.tokenizer.eos_token_id
    assert encode(base, "hello", "cat").answer[-1] == base.tokenizer.eos_token_id
    assert render(base, "hello") == "user: hello\nassistant: "
    assert encode(base, "hello", "cat").prompt[0] != base.tokenizer.bos_token_id


def test_chat_is_chosen(tmp_path):
    base = chat_base(CHATML)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    loaded = {chat: Base.load(tmp_path / "base", device="cpu", chat=chat) for chat in (None, True, False)}
    assert [one.chat for one in loaded.values()] == [True, True, False]
    assert encode(loaded[None], "hello", "cat") == encode(base, "hello", "cat")
    assert loaded[None].digest == loaded[True].digest == base.digest != loaded[False].digest
    base.tokenizer.chat_template = LLAMA3
    assert Base(base.model, base.tokenizer, "x").digest != loaded[None].digest
    plain = worded_base("byte-bpe")
    assert not plain.chat
    with pytest.raises(BaseError, match=r"byte-bpe: chat=True, but its tokenizer has no chat template"):
        Base(plain.model, plain.tokenizer, "byte-bpe", chat=True)
    with pytest.raises(TaskError, match="used without a chat template, and a prompt came as turns"):
        encode(plain, [{"role": "user", "content": "a"}], "b")


def test_a_template_that_fails_is_named():
    base = chat_base(STRICT)
    assert turn_end(base) is None
    row = encode_task(base, TASK, TASK.test)[0]
    assert base.tokenizer.decode(row.prompt).strip() == "[say it: the cow = ]"
    assert row.answer[-1] == base.tokenizer.eos_token_id
    with pytest.raises(
        BaseError, match="the chat template of chatty fails: one turn at most; chat=False leaves it out"
    ):
        encode_task(base, TASK, TASK.test, shots=1)


def test_a_chat_is_evaluated_under_adapters(bases):
    base = bases["llama3"]
    adapters = [random_adapter(base, 2, i, size=0.3, name=f"a{i}") for i in range(2)]
    scores = evaluate(base, TASK, grouped(adapters), shots=1)
    rows = encode_task(base, TASK, TASK.test, shots=1)
    for g, adapter in enumerate(adapters):
        torch.testing.assert_close(
            scores.loss[g], score(base, [rows], grouped([adapter])).loss[0], rtol=1e-4, atol=1e-5
        )


# Length ----------------------------------------------------------------------------------------------------------------

LONG = "sort the animals: " + "bat cat cow dog elk fox hen owl pig rat yak " * 60 + "and the last"


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_its_length(bases, chat):
    base = Base(bases["llama3"].model, bases["llama3"].tokenizer, "long", chat=chat)
    (ids,) = tokenise(base, ["the cat"], [9])
    assert base.positions == 512
    whole = Base(base.model, base.tokenizer, "any", chat=chat)
    whole.positions = None
    long = len(tokenise(whole, [LONG], [0])[0])
    assert long > 600
    said = f"a prompt of {long} tokens, ending in .*and the last', is longer than the 502 that long can read beside an answer of 10"
    with pytest.raises(TaskError, match=re.escape(said).replace(r"\.\*", ".*") + ".*max_length=512"):
        encode(base, LONG, "cat", 10)
    assert encode(base, "the cat", "cat", 9).prompt == tuple(ids)


@pytest.mark.parametrize("room", [0, 1])
def test_what_just_fits_is_read_whole(bases, room):
    base = bases["chatml"]
    text = "the cat"
    (ids,) = tokenise(base, [text], [0])
    for most in (len(ids) + 9 - room, len(ids) + 9):
        own = Base(base.model, base.tokenizer, "fits", max_length=most)
        (read,) = tokenise(own, [text], [9])
        assert (read == ids) is (most == len(ids) + 9)
    strict = Base(base.model, base.tokenizer, "strict")
    strict.positions = len(ids) + 9 - room
    if room:
        with pytest.raises(TaskError, match=f"a prompt of {len(ids)} tokens"):
            tokenise(strict, [text], [9])
    else:
        assert tokenise(strict, [text], [9]) == [ids]


@pytest.mark.parametrize("most", [70, 97, 512])
@pytest.mark.parametrize("kind", ["plain", "chat", "t5"])
def test_a_cut_keeps_the_end_of_the_prompt(bases, kind, most):
    if kind == "t5":
        made = tiny_t5()
        base, prefix, suffix = Base(made.model, made.tokenizer, "t5", max_length=most), "", ""
        long = LONG
    else:
        source = bases["llama3"]
        base = Base(source.model, source.tokenizer, kind, chat=kind == "chat", max_length=most)
        prefix, suffix = render(base, "§").split("§") if base.chat else ("<s>", "")
        long = LONG
    limit = 10
    row = encode(base, long, "cat", limit)
    first, last = (base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prefix, suffix))
    assert list(row.prompt[: len(first)]) == first
    assert list(row.prompt[len(row.prompt) - len(last) :]) == last
    kept = base.tokenizer.decode(row.prompt[len(first) : len(row.prompt) - len(last)])
    assert len(kept) > 12
    assert long.endswith(kept)
    room = most - (0 if kind == "t5" else limit)
    assert room - 3 <= len(row.prompt) <= room  # as long as it may be
    assert encode(base, long, "cat dog", limit).prompt == row.prompt  # whatever the target
    assert encode_all(base, ["the cat", long], ["cat", "cat"], limit)[1] == row
    assert (
        encode_all(base, ["the cat", long], ["cat", "cat"], limit)[0].prompt
        == encode(Base(base.model, base.tokenizer, "whole", chat=base.chat), "the cat", "cat", limit).prompt
    )


def test_old_demonstrations_go_first(bases):
    source = bases["chatml"]
    whole = encode_task(source, TASK, TASK.test[:1], shots=4)[0]
    turns = word(source, TASK, TASK.test[:1], shots=4)[0]
    for dropped in range(5):
        fits = len(tokenise(source, [turns[2 * dropped :]], [0])[0]) + TASK.max_new_tokens
        base = Base(source.model, source.tokenizer, "cut", max_length=fits)
        row = encode_task(base, TASK, TASK.test[:1], shots=4)[0]
        assert (
            list(row.prompt)
            == base.tokenizer(render(base, turns[2 * dropped :]), add_special_tokens=False)["input_ids"]
        )
        assert (row.prompt == whole.prompt) is (dropped == 0)


def test_lengths_that_make_no_sense_are_refused(bases):
    base = bases["llama3"]
    for most in (0, -3, 513):
        with pytest.raises(
            BaseError, match=f"max_length is {most}, expected 1 to 512, all that the model has positions for"
        ):
            Base(base.model, base.tokenizer, "x", max_length=most)
    t5 = tiny_t5()
    with pytest.raises(BaseError, match=r"max_length is 0, expected 1$"):
        Base(t5.model, t5.tokenizer, "x", max_length=0)
    for most in (9, 12):
        small = Base(base.model, base.tokenizer, "small", max_length=most)
        with pytest.raises(
            TaskError, match=rf"max_length={most} leaves {max(0, most - 10)} tokens for a prompt beside an answer of 10"
        ):
            encode(small, LONG, "cat", 10)


def test_a_target_beyond_the_limit_has_its_room(bases):
    base = Base(bases["llama3"].model, bases["llama3"].tokenizer, "x", max_length=100)
    row = encode(base, LONG, "the cat sat on the mat and the dog sat by the door", 3)
    assert not row.reachable
    assert 97 <= len(row) <= 100


def test_t5_has_no_limit_and_others_have_theirs():
    base = tiny_t5()
    base.tokenizer.model_max_length = 5
    base.model.config.n_positions = 7  # as in t5-small's configuration, which nothing reads
    base = Base(base.model, base.tokenizer, "t5")
    assert base.positions is None
    assert len(encode(base, "the cat sat on the mat", "cat").prompt) > 7
    tokenizer = worded_base("byte-bpe").tokenizer
    made = Base(
        _tiny("BloomForCausalLM", "BloomConfig", tokenizer, 1.0, hidden_size=32, n_layer=1, n_head=2), tokenizer
    )
    for said, most in ((10**30, None), (77, 77)):
        made.tokenizer.model_max_length = said
        assert Base(made.model, made.tokenizer, "x").positions == most


def test_each_part_of_an_encoder_decoder_has_its_own_limit():
    tokenizer = worded_base("byte-bpe").tokenizer
    size = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 16}
    special = {
        "pad_token_id": 0,
        "bos_token_id": 0,
        "decoder_start_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
    }
    made = _tiny("BartForConditionalGeneration", "BartConfig", tokenizer, 6.0, **size, **heads, **special)
    base, text = Base(made, tokenizer, "bart"), "the cat sat on the mat"
    ids = tokenizer(text)["input_ids"]
    answer = encode(base, "the", text, 99).answer
    for most in (len(ids), len(ids) - 1):
        base.positions = most
        if most == len(ids):
            assert list(encode(base, text, "the", 99).prompt) == ids
        else:
            with pytest.raises(
                TaskError, match=f"a prompt of {len(ids)} tokens, .* than the {most} that bart can read; shorten"
            ):
                encode(base, text, "the", 99)
    for most in (len(answer), len(answer) - 1):
        base.positions = most
        if most == len(answer):
            assert encode(base, "the", text, 99).answer == answer
        else:
            with pytest.raises(TaskError, match=f"is {len(answer)} tokens, more than the {most} that bart can write"):
                encode(base, "the", text, 99)


# Tokenizers' own settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "byte-bpe"])
def test_padding_side_pad_token_and_truncation_of_a_tokenizer_change_nothing(kind, tmp_path, caplog):
    base = worded_base(kind)
    texts, targets = ["the cat sat on the mat", "a", "sort the list from its end"], ["cat", "the dog", "list"]
    want, losses = encode_all(base, texts, targets), score(base, [encode_all(base, texts, targets)]).loss
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    changes = [{"padding_side": "left"}, {"pad_token": "</s>", "padding_side": "left"}, {"truncation_side": "left"}]
    for change in [*changes, {"model_max_length": 4}]:
        loaded = Base.load(tmp_path / "base", device="cpu")
        for name, value in change.items():
            setattr(loaded.tokenizer, name, value)
        loaded.tokenizer.backend_tokenizer.enable_truncation(3)
        loaded.tokenizer.backend_tokenizer.enable_padding(length=9, direction="left")
        with caplog.at_level(logging.WARNING, "transformers"):
            logging.getLogger("transformers").propagate = True
            assert encode_all(loaded, texts, targets) == want
            torch.testing.assert_close(score(loaded, [want]).loss, losses)
        assert not caplog.records
    assert base.tokenizer.pad_token is None


def test_no_warning_of_long_texts_leaks(bases, caplog):
    base = bases["chatml"]
    base.tokenizer.model_max_length, own = 4, base.tokenizer.model_max_length
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").propagate = True
        for chat in (True, False):
            encode_all(
                Base(base.model, base.tokenizer, "x", chat=chat),
                ["the cat and the dog sat"],
                ["the cat sat on the mat"],
            )
            turn_end(base)
    base.tokenizer.model_max_length = own
    assert not caplog.records
