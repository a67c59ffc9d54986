"""Architectures of transformers, tiny real ones stored and loaded: scores, hooks, exact match and a fit, in fp32 and bf16.

Tolerances, relative: fp32 1e-4, bf16 (8 bits of precision; batches of other shapes round elsewhere) 3e-2.
"""

import copy
from functools import cache

import pytest
import torch

from helpers import (
    _tiny,
    comes_out,
    logits_of,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_examples,
    some_ids,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
)
from workbench.adapt.coefficients import learn_coefficients
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.compose import compose, grouped
from workbench.evaluate import Encoded, evaluate, score
from workbench.nano.shelf import make_tokenizer
from workbench.stack import Stack
from workbench.tasks import Example, Task

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}


def made_of(kind, spread=4.0, **size):
    tokenizer = make_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    names = f"{kind}ForCausalLM", f"{kind}Config"
    return Base(_tiny(*names, tokenizer, spread, **WIDTH | special | size), tokenizer, f"tiny-{kind.lower()}")


def tiny_flan():
    """Gated feed-forward layers and an untied head, as FLAN-T5 has them."""
    tokenizer = make_tokenizer()
    size = {"d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "num_layers": 2}
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    return Base(_tiny("T5ForConditionalGeneration", "T5Config", tokenizer, 2.0, **size, **more, **special), tokenizer)


LLAMA = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "llama": (lambda: tiny_causal("Llama"), LLAMA),
    "qwen2": (lambda: tiny_causal("Qwen2", tied=True), LLAMA),
    "qwen3": (lambda: tiny_causal("Qwen3", tied=True), LLAMA),
    "mistral": (lambda: tiny_causal("Mistral"), LLAMA),
    "gemma3": (lambda: tiny_causal("Gemma3", tied=True), LLAMA),
    "phi": (lambda: made_of("Phi", intermediate_size=48), ["q_proj", "v_proj", "fc2"]),
    "opt": (lambda: made_of("OPT", ffn_dim=48, word_embed_proj_dim=32), ["q_proj", "v_proj", "fc2"]),
    "neox": (lambda: made_of("GPTNeoX", 12.0, intermediate_size=48), ["query_key_value", "dense_4h_to_h"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj"]),
    "t5": (tiny_t5, ["q", "v", "wo"]),
    "flan": (tiny_flan, ["q", "v", "wi_1"]),
}
TYPES = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 3e-2)}
FEW = ("llama", "gpt2", "t5", "flan")  # those whose bf16 is always tested
everywhere = pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(kind, number, marks=[pytest.mark.slow] * (number == "bf16" and kind not in FEW))
        for kind in KINDS
        for number in TYPES
    ],
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @cache
    def loaded(kind, number):
        made, folder = KINDS[kind][0](), tmp_path_factory.mktemp(kind)
        made.model.to(TYPES[number][0]).save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        base = Base.load(folder, device="cpu", dtype="auto")
        assert base.dtype == TYPES[number][0]
        assert base.positions == (
            None if "T5" in type(base.model).__name__ else base.model.config.max_position_embeddings
        )
        # transformers gives some architectures (Qwen2) the pre-tokeniser of their own, whatever was stored
        return Base(base.model, made.tokenizer, kind)

    return loaded


def own_loss(model, row):
    """Mean cross-entropy as transformers computes it from labels."""
    ids, labels = [row.prompt + row.answer], [(-100,) * len(row.prompt) + row.answer]
    if model.config.is_encoder_decoder:
        ids, labels = [row.prompt], [row.answer]
    return model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss.float()


@everywhere
def test_scores_are_transformers_own_losses(load, kind, number):
    base, rows = load(kind, number), some_examples(load(kind, number), 7, 1)
    with torch.no_grad():
        want = torch.stack([own_loss(base.model, row) for row in rows])
    for budget in (40, None):
        got = score(base, [rows], max_tokens=budget)
        assert relative(got.loss[0], want) < TYPES[number][1]
    assert want.std() > 0.01


@everywhere
def test_hooks_compute_what_peft_computes(load, kind, number, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, targets = load(kind, number), KINDS[kind][1]
    task = "SEQ_2_SEQ_LM" if base.decoder_start is not None else "CAUSAL_LM"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type=task, fan_in_fan_out=kind == "gpt2")
    with peft_s_own_warnings():
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(tmp_path)).eval()
    ids = some_ids(base)
    own, bare = logits_of(model, ids).float(), logits_of(base.model, ids).float()
    adapter = Adapter.load(tmp_path, shapes=base.layers)
    with torch.no_grad(), compose(base.model, grouped([adapter])):
        got = logits_of(base.model, ids).float()
    want = logits_of(model.float(), ids)  # of the same numbers
    assert relative(got, want) < max(TYPES[number][1], 2 * relative(own, want))  # rounded about as peft itself
    assert relative(bare, want) > 3 * relative(got, want)


@torch.no_grad()
def generated(base, prompt, limit):
    """A greedy answer by transformers' own `generate`, all stop ids."""
    ids = torch.tensor([prompt])
    out = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=0,
    )[0].tolist()
    return out[1:] if base.decoder_start is not None else out[len(prompt) :]


@torch.no_grad()
def margin(base, row):
    """How far the likeliest token is ahead of the next at the answer's places, at least."""
    ids = {"input_ids": torch.tensor([row.prompt + row.answer])}
    if base.decoder_start is not None:
        decoder = torch.tensor([(base.decoder_start, *row.answer[:-1])])
        ids = {"input_ids": torch.tensor([row.prompt]), "decoder_input_ids": decoder}
    best = base.model(**ids).logits[0].float().topk(2).values
    best = best if base.decoder_start is not None else best[len(row.prompt) - 1 : -1]
    return float((best[:, 0] - best[:, 1]).min())


@everywhere
def test_exact_match_is_what_generate_produces(load, kind, number):
    base, limit, rows, want = load(kind, number), 4, [], []
    for example in some_examples(base, 12, 3):
        made = generated(base, example.prompt, limit)
        body = made[:-1] if made[-1] in base.stop_ids else made
        other = [*body[:-1], (body[-1] + 7) % len(base.tokenizer)] if body else [9]
        for target in (body, other, body[:-1]):
            stop = (base.stop_ids[0],) * (len(target) < limit)
            row = Encoded(example.prompt, (*target, *stop))
            if target and (number == "fp32" or margin(base, row) > 0.05):  # bf16 may decide a tie otherwise
                rows.append(row)
                want.append(comes_out(base, made, target, limit))
    assert score(base, [rows], max_tokens=60).match[0].tolist() == want
    assert len(rows) >= 12
    assert {True, False} <= set(want)


@everywhere
def test_a_short_fit_improves_the_loss(load, kind, number):
    base = load(kind, number)
    stack = Stack.of([random_adapter(base, 2 + i, i, name=f"a{i}", size=0.2) for i in range(3)])
    rows = some_examples(base, 6, 4)
    (own,) = learn_coefficients(base, [stack], [rows], [rows], Schedule(steps=16, lr=0.1, batch=6), seeds=[0])
    before, after = score(base, [rows]).loss.mean(), score(base, [rows], grouped([own.adapter])).loss.mean()
    assert own.coefficients.dtype == torch.float32
    assert float(own.curves.best) == pytest.approx(float(after), rel=TYPES[number][1])
    assert after < 0.985 * before


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tasks_in_bf16_agree_with_fp32(load, kind):
    words = tuple(Example(f"the {a}", a) for a in ("cat", "dog", "hen", "rat"))
    task = Task("t", "say", words[:2], (), words, max_new_tokens=5)
    exact, half = (evaluate(load(kind, number), task, shots=1).loss for number in TYPES)
    assert relative(half, exact) < TYPES["bf16"][1]
