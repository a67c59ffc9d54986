"""Any mix: adapters written by plain peft for several architectures, merged by every method, back in plain peft."""

import copy
import dataclasses
import json
import warnings
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (
    dense_model,
    hook_logits,
    logits_of,
    peft_logits,
    peft_model,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_ids,
    some_statistics,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
    write_peft,
    write_raw,
)
from merging import deltas
from workbench.adapt.fitted import fold, side_by_side
from workbench.adapters import Adapter, Factors, read_config
from workbench.base import Base, check_fits
from workbench.compose import LowRank, compose, grouped, shared
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.merge import Dense, merge, methods
from workbench.screen import STUDY, base_shapes, screen
from workbench.stack import Stack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBED = "model.embed_tokens"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASES = {
    "llama": (lambda: tiny_causal("Llama"), LLAMA),
    "qwen2": (lambda: tiny_causal("Qwen2"), LLAMA),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"]),
    "t5": (tiny_t5, ["q", "v", "o", "wi", "wo"]),
}
WEIGHTED = [1.0, -0.5, 2.0]


@cache
def base_of(kind):
    return BASES[kind][0]()


def restore(folder, dtype):
    """Store a folder's tensors in another type."""
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixes(tmp_path_factory):
    """Kind of base → three folders of plain peft: unequal ranks, targets, α, rslora, patterns, and types of number."""

    @cache
    def folders(kind):
        base, targets, home = base_of(kind), BASES[kind][1], tmp_path_factory.mktemp(kind)
        turned = {"fan_in_fan_out": True} if kind == "gpt2" else {}
        patterns = {
            "rank_pattern": {targets[2]: 2, rf".*\.1\..*{targets[1]}": 7},
            "alpha_pattern": {rf"0\..*{targets[1]}": 1, targets[2]: 24},
        }
        write_peft(base, home / "all", 1, r=4, lora_alpha=8, target_modules=targets, **turned)
        write_peft(base, home / "few", 2, r=3, lora_alpha=5, use_rslora=True, target_modules=targets[:2], **turned)
        write_peft(base, home / "patterns", 3, r=5, lora_alpha=3, target_modules=targets[1:4], **patterns, **turned)
        types = {"all": torch.bfloat16, "few": torch.float64, "patterns": torch.float16}
        return [restore(home / name, dtype) for name, dtype in types.items()]

    return folders


def file_deltas(base, folder):
    """ΔW (d_out, d_in) per module in float64: the file's own numbers, the scale that plain peft gives the layer."""
    from peft import PeftModel

    with peft_s_own_warnings():
        model = PeftModel.from_pretrained(copy_of(base), str(folder))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    out = {}
    for key, a in load_file(folder / WEIGHTS).items():
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            b = load_file(folder / WEIGHTS)[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            module = key.removeprefix("base_model.model.").split(".lora_")[0]
            out[module] = layers[module].scaling["default"] * (b.double() @ a.double())
    return out


def copy_of(base):
    return copy.deepcopy(base.model)


def unloaded_logits(base, folder, ids):
    """Logits after plain peft has merged the adapter into the weights."""
    from peft import PeftModel

    with peft_s_own_warnings():
        model = PeftModel.from_pretrained(copy_of(base), str(folder)).merge_and_unload()
    return logits_of(model.eval(), ids)


def dense_logits(base, found, ids):
    """The oracle: float64, ΔW added to the weights."""
    return logits_of(dense_model(Base(copy_of(base).double(), base.tokenizer, base.name), found), ids)


# Every method on every base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(methods()))
@pytest.mark.parametrize("kind", list(BASES))
def test_every_method_on_peft_s_folders_of_every_base(kind, name, mixes, tmp_path):
    base, record = base_of(kind), methods()[name]
    ids = some_ids(base, rows=2)
    adapters = [Adapter.load(folder) for folder in mixes(kind)][: record.takes]
    known = {"statistics": some_statistics(adapters)} if record.needs else {}
    update = merge(adapters, name, weights=WEIGHTED[: len(adapters)], **known)
    want = dense_logits(base, deltas(update), ids)
    assert relative(logits_of(base.model, ids), want) > 1e-3  # the merge does something
    if isinstance(update, Dense):
        with update.applied(base.model) as model:
            assert relative(logits_of(model, ids), want) < 1e-4
        update = update.truncate()
    assert relative(hook_logits(base, update, ids), want) < 1e-4
    update.save(tmp_path / "merged")
    assert relative(peft_logits(base, tmp_path / "merged", ids), want) < 1e-4
    assert relative(unloaded_logits(base, tmp_path / "merged", ids), want) < 1e-4
    config = read_config(tmp_path / "merged")
    assert (config["fan_in_fan_out"], config["use_rslora"]) == (kind == "gpt2", False)
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM")


@pytest.mark.parametrize("kind", list(BASES))
def test_the_sum_of_peft_s_folders_is_the_sum_of_what_peft_computes(kind, mixes):
    base = base_of(kind)
    found = [file_deltas(base, folder) for folder in mixes(kind)]
    update = merge([Adapter.load(folder) for folder in mixes(kind)], "sum", weights=WEIGHTED)
    assert set(update.modules) == set().union(*found)
    assert any(shape[0] != shape[1] for shape in Stack.of([update]).shapes().values())
    assert len({frozenset(one) for one in found}) == 3
    for module, factors in update.modules.items():
        want = sum(w * one[module] for w, one in zip(WEIGHTED, found, strict=True) if module in one)
        assert relative(factors.delta(), want) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("kind", list(BASES))
def test_one_adapter_at_weight_one_keeps_its_logits(kind, which, mixes, tmp_path):
    base, folder = base_of(kind), mixes(kind)[which]
    ids = some_ids(base, rows=2)
    want = peft_logits(base, folder, ids)
    adapter = Adapter.load(folder)
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    merge([adapter], "sum").save(tmp_path / "same")
    assert relative(peft_logits(base, tmp_path / "same", ids), want) < 1e-4


@pytest.mark.parametrize("kind", ["Mistral", "Qwen3"])
def test_other_architectures_of_llama_s_names(kind, tmp_path):
    base = tiny_causal(kind)
    ids = some_ids(base, rows=2)
    write_peft(base, tmp_path / "a", 1, r=2, lora_alpha=3, target_modules=LLAMA)
    write_peft(base, tmp_path / "b", 2, r=5, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "lm_head"])
    update = merge([Adapter.load(tmp_path / name) for name in "ab"], "average")
    want = dense_logits(base, deltas(update), ids)
    update.save(tmp_path / "merged")
    for got in (hook_logits(base, update, ids), peft_logits(base, tmp_path / "merged", ids)):
        assert relative(got, want) < 1e-4


# Embeddings and heads -------------------------------------------------------------------------------------------------


def embedding_folder(base, folder, seed=0, **config):
    plain = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}
    write_peft(base, folder, seed, **plain | config)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_embeddings_and_heads_tied_or_not(kind, tied, tmp_path):
    base = tiny_causal(kind, tied=tied)
    ids, vocabulary = some_ids(base, rows=2), len(base.tokenizer)
    folder = embedding_folder(base, tmp_path / "a")
    want, bare = peft_logits(base, folder, ids), logits_of(base.model, ids)
    adapter = Adapter.load(folder)
    factors = adapter.modules[EMBED]
    assert factors.embedding
    assert (tuple(factors.B.shape), tuple(factors.A.shape)) == ((32, 3), (3, vocabulary))
    assert not adapter.modules["lm_head"].embedding
    assert relative(factors.delta(), file_deltas(base, folder)[EMBED]) < 1e-5
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    assert relative(dense_logits(base, deltas(adapter), ids), want) < 1e-4  # which unties what it changes
    for module in (EMBED, "lm_head"):  # each of the two counts
        one = Adapter("one", {module: adapter.modules[module]})
        assert relative(hook_logits(base, one, ids), bare) > 1e-2
        assert relative(hook_logits(base, one, ids), dense_logits(base, deltas(one), ids)) < 1e-4
    merge([adapter], "sum").save(tmp_path / "b")
    stored = load_file(tmp_path / "b" / WEIGHTS)
    assert stored.keys() == load_file(folder / WEIGHTS).keys()
    assert f"base_model.model.{EMBED}.lora_embedding_A" in stored
    assert relative(peft_logits(base, tmp_path / "b", ids), want) < 1e-4
    if not tied:
        assert relative(unloaded_logits(base, tmp_path / "b", ids), want) < 1e-4


@pytest.fixture(scope="module")
def embedding_adapters(tmp_path_factory):
    base, home = base_of("llama"), tmp_path_factory.mktemp("embeddings")
    read = [
        Adapter.load(embedding_folder(base, home / "one", 1)),
        Adapter.load(embedding_folder(base, home / "two", 2, r=2, target_modules=["embed_tokens", "q_proj"])),
        random_adapter(base, 4, 3, ["lm_head", "q_proj"]),
    ]
    return [dataclasses.replace(adapter, base="") for adapter in read]


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_merges_embeddings_and_heads(name, embedding_adapters, tmp_path):
    base, record = base_of("llama"), methods()[name]
    ids = some_ids(base, rows=2)
    adapters = embedding_adapters[: record.takes]
    known = {"statistics": some_statistics(adapters)} if record.needs else {}
    update = merge(adapters, name, weights=WEIGHTED[: len(adapters)], **known)
    want = dense_logits(base, deltas(update), ids)
    if isinstance(update, Dense):
        assert update.embeddings == {EMBED}
        before = base.model.get_input_embeddings().weight.clone()
        with update.applied(base.model) as model:
            assert relative(logits_of(model, ids), want) < 1e-4
        assert torch.equal(base.model.get_input_embeddings().weight, before)
        update = update.truncate()
    assert [module for module, factors in update.modules.items() if factors.embedding] == [EMBED]
    assert relative(hook_logits(base, update, ids), want) < 1e-4
    update.save(tmp_path / "merged")
    assert relative(peft_logits(base, tmp_path / "merged", ids), want) < 1e-4


def some_embedding_adapters(base):
    shapes = {m: s for m, s in base.layers.items() if m in (EMBED, "lm_head") or m.endswith("v_proj")}
    made = [random_adapter(shapes, r, r, name=f"a{r}") for r in (2, 3, 1)]
    made[2] = random_adapter({m: s for m, s in shapes.items() if m != EMBED}, 4, 9, name="without")
    return [
        dataclasses.replace(a, modules={m: dataclasses.replace(f, embedding=m == EMBED) for m, f in a.modules.items()})
        for a in made
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_groups_and_candidates_at_an_embedding(kind, grad):
    base = tiny_causal(kind)
    adapters, ids = some_embedding_adapters(base), some_ids(base, rows=6)
    stack, c = Stack.of(adapters), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad), compose(base.model, grouped(adapters)):
        got = base.model(input_ids=ids).logits.detach()
    for g, adapter in enumerate(adapters):
        rows = slice(2 * g, 2 * g + 2)
        assert relative(got[rows], dense_logits(base, deltas(adapter), ids[rows])) < 1e-4
    with torch.set_grad_enabled(grad), compose(base.model, shared(stack, c)):
        got = base.model(input_ids=ids).logits.detach()
    for k in range(3):
        rows = slice(2 * k, 2 * k + 2)
        folded = fold(stack, c[k], "folded")
        assert folded.modules[EMBED].embedding
        assert relative(got[rows], dense_logits(base, deltas(folded), ids[rows])) < 1e-4
    pieces = side_by_side([stack, stack.choose([2, 0])], base)  # two stacks, one candidate of each
    weights = [c[0], torch.tensor([0.7, -0.2])]
    updates = {}
    for module, (B, A, owner) in pieces.items():
        full = torch.stack([w[o.clamp_max(len(w) - 1)] for w, o in zip(weights, owner, strict=True)])
        updates[module] = LowRank(B, A, full)
    with torch.set_grad_enabled(grad), compose(base.model, updates):
        got = base.model(input_ids=ids).logits.detach()
    for g, folded in enumerate([fold(stack, weights[0], "x"), fold(stack.choose([2, 0]), weights[1], "y")]):
        rows = slice(3 * g, 3 * g + 3)
        assert relative(got[rows], dense_logits(base, deltas(folded), ids[rows])) < 1e-4


def test_gradients_at_an_embedding():
    """Against autograd through the dense weight W + (B diag(c) A)ᵀ, in float64, of each of two groups."""
    base = tiny_causal("Llama")
    model, ids = copy_of(base).double(), some_ids(base, rows=4)
    g = torch.Generator().manual_seed(0)
    width, vocabulary = base.layers[EMBED]
    shapes = {"grouped": [(2, width, 3), (2, 3, vocabulary), (2, 3)], "shared": [(width, 3), (3, vocabulary), (2, 3)]}
    for form, sizes in shapes.items():
        leaves = [torch.randn(size, generator=g).double().requires_grad_() for size in sizes]
        with compose(model, {EMBED: LowRank(*leaves)}):
            loss = model(input_ids=ids).logits.square().sum()
        total = 0.0
        for k in range(2):
            B, A, c = (leaf[k] if form == "grouped" or i == 2 else leaf for i, leaf in enumerate(leaves))
            moved = {f"{EMBED}.weight": model.get_input_embeddings().weight + ((B * c) @ A).T}
            rows = ids[2 * k : 2 * k + 2]
            total = total + torch.func.functional_call(model, moved, kwargs={"input_ids": rows}).logits.square().sum()
        for mine, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(total, leaves), strict=True):
            assert float(want.abs().max()) > 0
            assert relative(mine, want) < 1e-5


def test_an_embedding_in_half_precision():
    base = tiny_causal("Llama")
    half = Base(copy_of(base).bfloat16(), base.tokenizer, "half")
    adapters, ids = some_embedding_adapters(base), some_ids(base, rows=3)
    with torch.no_grad(), compose(base.model, grouped(adapters)):
        want = base.model(input_ids=ids).logits
    with torch.no_grad(), compose(half.model, grouped(adapters)):
        got = half.model(input_ids=ids).logits
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 5e-2


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["relative_attention_bias", "q"], ["shared", "k"]])
def test_every_look_up_of_t5(targets, tmp_path):
    base = base_of("t5")
    ids = some_ids(base, rows=2)
    write_peft(base, tmp_path / "a", r=2, lora_alpha=6, target_modules=targets, size=0.4)
    adapter = Adapter.load(tmp_path / "a")
    want = peft_logits(base, tmp_path / "a", ids)
    assert relative(logits_of(base.model, ids), want) > 1e-3
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    merge([adapter], "sum").save(tmp_path / "b")
    assert relative(peft_logits(base, tmp_path / "b", ids), want) < 1e-4
    if targets[0] == "embed_tokens":  # two groups of rows, by their own tokens
        other = adapter.times(-2.0)
        with torch.no_grad(), compose(base.model, grouped([adapter, other])):
            got = logits_of(base.model, ids)
        for g, one in enumerate((adapter, other)):
            assert relative(got[g : g + 1], hook_logits(base, one, ids[g : g + 1])) < 1e-4


def test_look_ups_of_something_other_than_the_rows_tokens():
    base = base_of("gpt2")
    ids, adapter = some_ids(base, rows=2), random_adapter({"transformer.wpe": (32, 256)}, 2)
    want = dense_logits(base, deltas(adapter), ids)
    assert relative(logits_of(base.model, ids), want) > 1e-3
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    with (
        pytest.raises(MergeError, match=r"transformer\.wpe does not look the rows' tokens up, so 2 groups"),
        compose(base.model, grouped([adapter, adapter.times(2)])),
    ):
        pass

    class Shifted(torch.nn.Embedding):
        def forward(self, mask):
            return super().forward(mask.cumsum(1) + 2)

    odd = torch.nn.Sequential(Shifted(9, 4))
    odd.get_input_embeddings = lambda: torch.nn.Embedding(3, 3)
    with (
        pytest.raises(BaseError, match="0 is a Shifted, which does more than look its input up"),
        compose(odd, {"0": LowRank(torch.ones(4, 1), torch.ones(1, 9))}),
    ):
        pass


def test_a_dense_update_of_a_tied_embedding_is_refused():
    base = tiny_causal("Llama", tied=True)
    with (
        pytest.raises(BaseError, match=rf"lm_head shares its weight with {EMBED}"),
        merge(some_embedding_adapters(base), "ties").applied(base.model),
    ):
        pass


def test_a_resized_vocabulary_is_refused_with_both_shapes(tmp_path):
    base = base_of("llama")
    width, vocabulary = base.layers[EMBED]
    said = rf"{EMBED} is {width}×{vocabulary + 1}, the base's is {width}×{vocabulary}"
    for module, shape in ((EMBED, (width, vocabulary + 1)), ("lm_head", (vocabulary + 1, width))):
        adapter = random_adapter({module: shape}, 2, name="resized")
        adapter.modules[module] = dataclasses.replace(adapter.modules[module], embedding=module == EMBED)
        verdict = screen(adapter.save(tmp_path / module), base.layers)
        assert verdict.rule == "base-shape"
        assert f"{shape[0]}×{shape[1]}" in verdict.reason
        with pytest.raises(AdapterError, match="resized" if module == EMBED else module):
            check_fits(adapter, base.layers)
        with pytest.raises(AdapterError, match=f"{shape[0]}×{shape[1]}"), compose(base.model, grouped([adapter])):
            pass
    assert said in screen(tmp_path / EMBED, base.layers).reason
    assert "the vocabulary was resized, or" in screen(tmp_path / EMBED, base.layers).reason


def test_a_frozen_copy_of_the_base_s_weight_is_left_out_by_name(tmp_path):
    """Which plain peft stores by default beside the factors of embeddings and heads."""
    base = base_of("llama")
    ids = some_ids(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        peft_model(base, r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]).save_pretrained(tmp_path / "a")
    copies = {f"base_model.model.{module}.base_layer.weight" for module in (EMBED, "lm_head")}
    assert copies < load_file(tmp_path / "a" / WEIGHTS).keys()
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.info["left_out"].keys() == copies
    assert relative(hook_logits(base, adapter, ids), peft_logits(base, tmp_path / "a", ids)) < 1e-4
    report = merge([adapter], "sum").info["report"].set_index("module")
    assert set(report.loc[sorted(copies), "status"]) == {"left out"}
    assert "frozen" in report.loc[min(copies), "reason"]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for strange in (f"base_model.model.{EMBED}.weight", "base_model.model.model.norm.base_layer.weight"):
        write_raw(tmp_path / strange, tensors | {strange: torch.ones(2, 2)})
        with pytest.raises(AdapterError, match=r"such as .* \(a layer stored whole"):
            Adapter.load(tmp_path / strange)


def test_tied_factors_of_peft_come_as_the_two_layers_that_they_are(tmp_path):
    base = tiny_causal("Llama", tied=True)
    ids = some_ids(base)
    write_peft(base, tmp_path / "a", r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter = Adapter.load(tmp_path / "a")
    assert list(adapter.modules) == ["lm_head", EMBED]
    torch.testing.assert_close(adapter.modules["lm_head"].delta(), adapter.modules[EMBED].delta().T)
    assert relative(hook_logits(base, adapter, ids), peft_logits(base, tmp_path / "a", ids)) < 1e-4
    assert screen(tmp_path / "a", base.layers).accepted
    adapter.save(tmp_path / "b")
    assert relative(peft_logits(base, tmp_path / "b", ids), peft_logits(base, tmp_path / "a", ids)) < 1e-4


def test_embeddings_are_screened(tmp_path):
    base = base_of("llama")
    folder = embedding_folder(base, tmp_path / "a")
    assert screen(folder, base.layers).accepted
    verdict = screen(folder, base.layers, rules=STUDY)
    assert (verdict.rule, verdict.reason) == ("embeddings", f"1 modules are embeddings, such as '{EMBED}'")
    assert verdict.facts["parameters"] == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    tensors = load_file(folder / WEIGHTS)
    both = tensors | {f"base_model.model.{EMBED}.lora_B.weight": torch.ones(32, 3)}
    both.pop(f"base_model.model.{EMBED}.lora_embedding_B")
    with pytest.raises(AdapterError, match=f"{EMBED} has factors of a linear layer and of an embedding"):
        Adapter.load(write_raw(tmp_path / "both", both))


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM"),
        ("FEATURE_EXTRACTION", "FEATURE_EXTRACTION"),
        ("SEQ_CLS", "CAUSAL_LM"),  # under which peft would look for a head
        ("DIFFUSION", "CAUSAL_LM"),
        (None, "CAUSAL_LM"),
    ],
)
def test_the_task_type_is_carried_over_where_a_plain_lora_can_have_it(said, written, tmp_path):
    base = base_of("t5")
    adapters = [random_adapter(base, 2, i, ["q"]) for i in range(2)]
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / str(i))
        path = tmp_path / str(i) / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": said}))
    loaded = [Adapter.load(tmp_path / str(i)) for i in range(2)]
    for update in (loaded[0], merge(loaded, "sum"), merge(loaded, "ties", rank=2)):
        assert update.peft_config()["task_type"] == written
        folder = update.save(tmp_path / "out", overwrite=True)
        assert relative(peft_logits(base, folder, some_ids(base)), hook_logits(base, update, some_ids(base))) < 1e-4


def test_a_task_type_that_is_no_text_is_refused(tmp_path):
    base = base_of("llama")
    folder = random_adapter(base, 2).save(tmp_path / "a")
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": ["CAUSAL_LM"]}))
    with pytest.raises(AdapterError, match=r"a: task_type is \['CAUSAL_LM'\], expected a text"):
        Adapter.load(folder)


# Encoder–decoders -----------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_loaded_merged_and_composed(tmp_path, mixes):
    made = base_of("t5")
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    base = Base.load(tmp_path / "base", device="cpu")
    assert base.digest == made.digest
    assert base.layers == made.layers == base_shapes(str(tmp_path / "base"))
    assert base.shapes == {
        m: s for m, s in base.layers.items() if m != "shared" and "embed" not in m and "bias" not in m
    }
    assert "lm_head" not in base.projections
    assert base.stop_ids
    for folder in mixes("t5"):
        assert screen(folder, base.layers, None).accepted
    update = merge([Adapter.load(folder, shapes=base.layers) for folder in mixes("t5")], "average")
    check_fits(update, base.layers)
    ids = some_ids(base)
    assert relative(hook_logits(base, update, ids), dense_logits(base, deltas(update), ids)) < 1e-4


def test_candidates_and_groups_in_an_encoder_decoder():
    base = base_of("t5")
    adapters = [random_adapter(base, r, r, name=f"a{r}") for r in (1, 2)]
    ids = some_ids(base, rows=4)
    with torch.no_grad(), compose(base.model, grouped(adapters)):
        got = logits_of(base.model, ids)
    for g, adapter in enumerate(adapters):
        rows = slice(2 * g, 2 * g + 2)
        assert relative(got[rows], dense_logits(base, deltas(adapter), ids[rows])) < 1e-4


def test_factors_of_a_stack_stay_embeddings():
    base = base_of("llama")
    adapters = some_embedding_adapters(base)
    stack = Stack.of(adapters)
    assert [m for m, units in stack if units.embedding] == [EMBED]
    assert stack.adapter(0).modules[EMBED].embedding
    assert stack.choose([1]).modules[EMBED].embedding
    assert adapters[0].times(2).modules[EMBED].embedding
    swapped = Adapter("linear", {EMBED: Factors(torch.ones(32, 1), torch.ones(1, base.layers[EMBED][1]))})
    with pytest.raises(AdapterError, match=f"{EMBED} is an embedding in one of linear and a2"):
        Stack.of([adapters[0], swapped])
