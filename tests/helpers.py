"""Tiny models and random adapters for the tests; everything is built offline and seeded."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import socket
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import compose, grouped
from workbench.evaluate import Encoded, encode
from workbench.merge.statistics import Rows, Statistics
from workbench.nano.forge import PRESETS, new_model
from workbench.nano.shelf import make_tokenizer
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.tasks import Example, Task

SENTENCES = (
    "the cat sat on the mat and the dog sat by the door",
    "a reverse of the list is the list from its end to its start",
    "sort the animals: bat cat cow dog elk fox hen owl pig rat yak",
    "months of the year are jan feb mar apr may jun jul aug sep oct nov dec",
    "swap the first two, then drop the last one = done",
    "how many items are in the list? count them: 1 2 3 4 5 6 7 8 9 10",
)


def free_port() -> int:
    """A port that nothing listens on, below those that systems hand out, so that nobody gets it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def train_briefly(monkeypatch, steps: int = 3, every: int = 1, batch: int = 4) -> None:
    """New adapters, targets' own among them, are trained in few steps."""
    from workbench import baselines
    from workbench.adapt.fresh import NEW_ADAPTER

    schedule = replace(NEW_ADAPTER, steps=steps, every=every, batch=batch)
    trainer = replace(baselines._TRAINERS["new adapter"], schedule=schedule)
    monkeypatch.setitem(baselines._TRAINERS, "new adapter", trainer)


def tiny_base(seed: int = 0, spread: float = 1.0) -> Base:
    """A Llama of 2 layers, hidden 32, random weights; `spread` multiplies its matrices, which makes its output lively."""
    tokenizer = make_tokenizer()
    model = new_model(PRESETS["tiny"], tokenizer)
    if seed or spread != 1.0:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02 * spread)
    return Base(model, tokenizer, "tiny")


def tiny_gpt2() -> Base:
    """A GPT-2 of 2 layers, hidden 32 (Conv1D layers, which store Wᵀ; attn.c_attn is 96×32)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    stop = tokenizer.eos_token_id
    size = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(vocab_size=len(tokenizer), **size, bos_token_id=None, eos_token_id=stop, pad_token_id=0)
    return Base(GPT2LMHeadModel(config), tokenizer, "tiny-gpt2")


def _tiny(model_class: str, config_class: str, tokenizer, spread: float, **config) -> nn.Module:
    """A random model of transformers from its configuration, its matrices multiplied by `spread`, its biases not zero."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(vocab_size=len(tokenizer), **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(spread)
            elif name.endswith("bias"):
                p.normal_()
    return model


def tiny_t5() -> Base:
    """A T5 of 2 + 2 layers, hidden 32, feed-forward 48 and 4 heads of 6, so that q is 24×32 and o 32×24; tied as T5 is."""
    tokenizer = make_tokenizer()
    size = {"d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    model = _tiny("T5ForConditionalGeneration", "T5Config", tokenizer, 1.0, **size, **special)
    return Base(model, tokenizer, "tiny-t5")


def tiny_causal(kind: str, *, tied: bool = False, spread: float = 4.0) -> Base:
    """A "Llama", "Mistral", "Qwen2" (q, k and v with a bias), "Qwen3" or "Gemma3" (scaled embedding) of 2 layers."""
    tokenizer = make_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "tie_word_embeddings": tied}
    names = f"{kind}ForCausalLM", f"{kind}{'Text' * (kind == 'Gemma3')}Config"
    return Base(_tiny(*names, tokenizer, spread, **size, **special, **more), tokenizer, f"tiny-{kind.lower()}")


def unigram_pieces(special: Sequence[str], size: int = 90) -> list[tuple[str, float]]:
    """Pieces and log probabilities of a unigram model, by counting: the library's own trainer gives others each time."""
    words = ["▁" + word for sentence in SENTENCES for word in sentence.split()]
    counts = Counter(w[i:j] for w in words for i in range(len(w)) for j in range(i + 1, min(i + 6, len(w)) + 1))
    best = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * len(piece), piece))[: size - len(special)]
    return [(piece, 0.0) for piece in special] + [(p, math.log(counts[p] / counts.total())) for p in best]


def worded_base(kind: str, seed: int = 0, spread: float = 6.0) -> Base:
    """A tiny random Llama with a "byte-bpe" or a "unigram" tokenizer trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    if kind == "byte-bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=special[1:], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    else:
        tokenizer = Tokenizer(models.Unigram(unigram_pieces(special), unk_id=0))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>" if kind == "unigram" else None,
        clean_up_tokenization_spaces=False,
    )
    wrapped.name_or_path = kind
    ends = [wrapped.eos_token_id, wrapped.convert_tokens_to_ids("<|end|>")]
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(spread)
    return Base(model, wrapped, kind)


def random_adapter(
    base: Base | Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int] = 4,
    seed: int = 0,
    targets: Iterable[str] | None = None,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    name: str | None = None,
    size: float = 0.1,
) -> Adapter:
    """Random A and B in a base's projections (or in the shapes given).

    Args:
        rank: one for all modules, or per module path.
        targets: module paths, or their last parts; None takes all.
        alpha: α; None takes twice the rank.
        size: standard deviation of the raw factors.
    """
    shapes = base.projections if isinstance(base, Base) else dict(base)
    wanted = None if targets is None else set(targets)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, (d_out, d_in) in shapes.items():
        if wanted is not None and module not in wanted and module.rsplit(".", 1)[-1] not in wanted:
            continue
        r = rank if isinstance(rank, int) else rank[module]
        a = 2 * r if alpha is None else alpha
        s = a / math.sqrt(r) if rslora else a / r
        B = torch.randn(d_out, r, generator=generator) * size
        modules[module] = Factors(B * s, torch.randn(r, d_in, generator=generator) * size, s)
    return Adapter(name or f"random-{seed}", modules, base.name if isinstance(base, Base) else "")


@contextmanager
def peft_s_own_warnings() -> Iterator[None]:
    """peft 0.21 asks transformers 5 for a property under its old name, and warns of every tied layer; no more is let pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part of")
        yield


def peft_model(base: Base, seed: int = 0, size: float = 0.1, **config) -> nn.Module:
    """A copy of the base wrapped by plain peft, its factors random (B too); `config` goes to LoraConfig."""
    from peft import LoraConfig, get_peft_model

    task_type = "SEQ_2_SEQ_LM" if base.model.config.is_encoder_decoder else "CAUSAL_LM"
    with peft_s_own_warnings():
        model = get_peft_model(copy.deepcopy(base.model), LoraConfig(**{"task_type": task_type} | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model


def write_peft(base: Base, folder: Path, seed: int = 0, size: float = 0.1, **config) -> nn.Module:
    """Write a folder with plain peft itself; returns the peft model that was written."""
    model = peft_model(base, seed, size, **config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def write_raw(folder: Path, tensors: Mapping[str, Tensor], **config) -> Path:
    """Write an adapter folder by hand: these tensors under these keys, this config over a plain one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config), encoding="utf-8")
    return folder


def some_ids(base: Base, rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(base.tokenizer), (rows, length), generator=generator)


@torch.no_grad()
def some_examples(base: Base, n: int, seed: int) -> list[Encoded]:
    """n encoded examples of random letters."""
    rng = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(rng.choice("abcdefg ") for _ in range(rng.randint(1, longest)))

    return [encode(base, word(14), word(6)) for _ in range(n)]


def some_statistics(
    adapters: Stack | Sequence[Adapter], seed: int = 0, *, gradients: bool = True, tokens: int = 12
) -> Statistics:
    """Random inputs (and gradients, of 3 examples) at every module of the adapters, drawn by each one's name."""
    stack = adapters if isinstance(adapters, Stack) else Stack.of(adapters)
    rows: dict[str, dict[str, Rows]] = {name: {} for name in stack.names}
    for name in stack.names:
        for module, units in stack:
            d_out, d_in = units.shape
            digest = hashlib.sha256(f"{seed}|{name}|{module}".encode()).digest()
            g = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            draw = {"generator": g, "dtype": torch.promote_types(units.A.dtype, torch.float32)}
            ids = torch.randint(d_in, (tokens,), generator=g)
            x, back = torch.randn(tokens, d_in, **draw), torch.randn(tokens, d_out, **draw)
            example = torch.arange(tokens) % 3
            kept = (back, example) if gradients else (None, None)
            rows[name][module] = Rows(ids if units.embedding else x, *kept, examples=3)
    return Statistics(rows, gradients)


def peft_logits(base: Base, folder: Path, ids: Tensor) -> Tensor:
    """Logits of a copy of the base with a folder loaded by plain peft."""
    from peft import PeftModel

    with peft_s_own_warnings():
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)).eval()
    return logits_of(model, ids)


@torch.no_grad()
def hook_logits(base: Base, adapter: Adapter, ids: Tensor) -> Tensor:
    """Logits of the base with one adapter at weight 1, through `compose`."""
    with compose(base.model, grouped([adapter])):
        return logits_of(base.model, ids)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits over ids (rows, T); the decoder of an encoder–decoder reads the same ids backwards."""
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
    return model(input_ids=ids).logits


def dense_model(base: Base, deltas: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the base with ΔW (d_out, d_in) added to the weights themselves: the oracle for every composition.

    A tied weight is cloned first, so that only the module named changes.
    """
    model = copy.deepcopy(base.model)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for module, delta in deltas.items():
            layer = layers[module]
            delta = delta if isinstance(layer, nn.Linear) else delta.T
            layer.weight = nn.Parameter(layer.weight + delta.to(layer.weight), requires_grad=False)
    return model


def hook_count(model: nn.Module) -> int:
    """How many forward hooks the model's modules hold."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def relative(got: Tensor, want: Tensor) -> float:
    """max|Δ| / max|want|."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@torch.no_grad()
def generate(
    base: Base, prompts: Sequence[Sequence[int]], limit: int, model: nn.Module | None = None
) -> list[list[int]]:
    """Greedy continuations by transformers' own `generate` under a neutral configuration, all stop ids; nothing padded.

    Prompts of one length go together.
    """
    from transformers import GenerationConfig

    model = model or base.model
    neutral = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],
        use_cache=True,
    )
    alike, out = {}, [[]] * len(prompts)
    for i, prompt in enumerate(prompts):
        alike.setdefault(len(prompt), []).append(i)
    own, model.generation_config = model.generation_config, neutral
    try:
        for length, places in alike.items():
            ids = torch.tensor([list(prompts[i]) for i in places])
            done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=neutral)
            for i, made in zip(places, done[:, length:].tolist(), strict=True):
                end = next((at for at, token in enumerate(made) if token in base.stop_ids), limit)
                out[i] = made[: end + 1]
    finally:
        model.generation_config = own
    return out


def comes_out(base: Base, generated: Sequence[int], target: Sequence[int], limit: int) -> bool:
    """Did a greedy generation produce exactly these token ids (its stop token left out)?"""
    body, ended = list(generated), False
    if body and body[-1] in base.stop_ids:
        body, ended = body[:-1], True
    return body == list(target) and (ended or len(body) == limit)


def solved_task(base: Base, adapter: Adapter, seed: int, sizes: Sequence[int] = (6, 4, 9)) -> Task:
    """One-letter answers: what the base says under the adapter, and every third time another letter."""
    rng = random.Random(seed)
    model = dense_model(base, {m: f.delta() for m, f in adapter.modules.items()})
    labels = {"kind": "made", "operation": f"op{seed % 2}", "domain": "letters", "format": "plain"}
    draft = Task(f"t{seed}", f"say {seed}", (), (), (), max_new_tokens=1, labels=labels)
    made = {}
    while len(made) < sum(sizes):
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(2, 9))).strip() or "a"
        ids = torch.tensor([base.tokenizer(draft.prompt(Example(text, "a")))["input_ids"]])
        with torch.no_grad():
            said = base.tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax().item())
        if len(said) == 1 and said != "\n":
            made[text] = Example(text, "abc"[len(made) % 3] if len(made) % 3 == 0 else said)
    rows, a, b = list(made.values()), sizes[0], sizes[0] + sizes[1]
    return replace(draft, train=tuple(rows[:a]), validation=tuple(rows[a:b]), test=tuple(rows[b:]))


def three_stacks(base: Base) -> list[Stack]:
    """Three stacks of three adapters: unequal ranks, scalings and targets; the second lacks most modules."""
    first = [random_adapter(base, (2, 5, 1)[i], i, name=f"a{i}", size=0.2) for i in range(3)]
    second = [random_adapter(base, 3, 10 + i, ["v_proj", "up_proj"][: i + 1], name=f"b{i}", size=0.2) for i in range(3)]
    third = [random_adapter(base, 4, 20 + i, alpha=3, rslora=i == 1, name=f"c{i}", size=0.2) for i in range(3)]
    return [Stack.of(first), Stack.of(second), Stack.of(third[:2] + first[:1])]


def three_splits(base: Base) -> tuple[list[list[Encoded]], list[list[Encoded]]]:
    """Training examples of three fits, 3, 9 and 6 of them, and four validation examples each."""
    return [some_examples(base, n, n) for n in (3, 9, 6)], [some_examples(base, 4, 50 + n) for n in range(3)]


def six_adapters(base: Base, folder: Path) -> Pool:
    """A pool of six adapters of unequal ranks, the third with attention's q and v alone."""
    for i in range(6):
        targets = ["q_proj", "v_proj"] if i == 2 else None
        random_adapter(base, (2, 5, 3, 4, 1, 3)[i], i, targets, name=f"n{i}", size=0.08).save(folder / f"n{i}")
    return Pool.open(folder)


def published(name: str) -> Path:
    """The folder of a published data set ("bbh", "recycling"), which is not ours to ship; the test is skipped without it.

    WORKBENCH_DATA names the folder that holds them; by default ../shared/data beside the repository.
    """
    import pytest

    folder = Path(os.environ.get("WORKBENCH_DATA") or Path(__file__).parents[2] / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not on this machine; WORKBENCH_DATA names the folder that holds it")
    return folder


def many_adapters(n: int, *, refused: int = 0) -> Pool:
    """A pool of n accepted adapters held in memory (rank 1 to 4 in four modules of 16×16), and some refused ones."""
    from workbench.screen import Verdict

    layers = [f"model.layers.{i}.self_attn.{side}_proj" for i in (0, 1) for side in "qv"]
    shapes, found = dict.fromkeys(layers, (16, 16)), []
    for i in range(n):
        adapter = random_adapter(shapes, 1 + i % 4, seed=i, name=f"adapter-{i:04}")
        facts = {"rank": 1 + i % 4, "mean_rank": 1.0 + i % 4, "alpha_over_r": 2.0, "modules": 4, "parameters": 512}
        facts |= {
            "targets": "q_proj,v_proj",
            "norm": adapter.norm(),
            "author": f"author {i % 7}",
            "downloads": 7 * i % 1000,
        }
        found.append(Verdict(adapter.name, True, "", "", facts, adapter))
    found += [Verdict(f"refused-{i:04}", False, "finite", "NaN in 3 tensors", {"rank": 4}) for i in range(refused)]
    return Pool(f"{n} adapters", "tiny", found, {verdict.name: Path(verdict.name) for verdict in found}, None)


def strange_pool(folder, base, names, *, narrow=(), refused=""):
    """A pool of adapters of ranks 2, 3, …, those at `narrow` of two projections only, and one that is refused."""
    for i, name in enumerate(names):
        targets = ["q_proj", "v_proj"] if i in narrow else None
        random_adapter(base, 2 + i, seed=i, targets=targets, name=name).save(folder / name)
    if refused:
        (folder / refused).mkdir()
        (folder / refused / "adapter_config.json").write_text("{")
    return Pool.open(folder)
