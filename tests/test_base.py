"""Loading: types of number, devices, quantisation, and what is refused, on folders of tiny models."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import (
    hook_logits,
    logits_of,
    peft_logits,
    random_adapter,
    relative,
    some_examples,
    some_ids,
    tiny_base,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
    write_peft,
)
from workbench.adapt.coefficients import learn_coefficients
from workbench.adapt.gradient import Schedule
from workbench.base import Base, Batch, free_memory
from workbench.compose import LowRank, Routed, compose, computes_on, grouped, shared
from workbench.errors import BaseError
from workbench.evaluate import encode, score
from workbench.loading import choose_dtype, kind_of_device
from workbench.merge import merge
from workbench.stack import Stack


def gpus(number):
    """A mark: skipped where there are not so many."""
    return pytest.mark.skipif(torch.cuda.device_count() < number, reason=f"needs {number} GPUs")


def saved(base, folder, **changes):
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def made():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return saved(made, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(made):
    return [random_adapter(made, 2 + i, i, name=f"a{i}", size=0.2) for i in range(3)]


# Types of number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(stored, tmp_path):
    base = tiny_base()
    base.model.to(stored)
    saved(base, tmp_path)
    assert Base.load(tmp_path, device="cpu").dtype == torch.float32
    assert Base.load(tmp_path, device="cpu", dtype="auto").dtype == stored
    assert Base.load(tmp_path, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    on_gpu = torch.bfloat16 if stored.itemsize == 2 else stored
    assert choose_dtype(base.model.config, "cuda", None) == choose_dtype(base.model.config, "mps", None) == on_gpu
    assert choose_dtype(base.model.config, "cpu", None) == torch.float32
    assert choose_dtype(base.model.config, "cuda", torch.float16) == torch.float16
    base.model.config.dtype = None
    assert choose_dtype(base.model.config, "cuda", None) == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, "automatic", 16])
def test_what_is_no_type_of_number_is_refused(folder, dtype):
    with pytest.raises(BaseError, match=r"expected None, 'auto' or a floating-point torch\.dtype"):
        Base.load(folder, device="cpu", dtype=dtype)


# Devices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "device_map", "kind"),
    [
        ("cpu", None, "cpu"),
        ("cuda:1", None, "cuda"),
        (torch.device("mps"), None, "mps"),
        ("cpu", "cuda:0", "cuda"),
        ("cuda", "cpu", "cpu"),
        ("cuda", {"": "cpu"}, "cpu"),
        ("cuda", {"a": "cpu", "b": "disk"}, "cpu"),
        ("cpu", {"a": "cpu", "b": 1}, "cuda"),
        ("cpu", {"a": 0, "b": "cpu"}, "cuda"),
        ("cpu", {"": torch.device("cuda")}, "cuda"),
    ],
)
def test_the_device_that_computes_decides_about_the_type(device, device_map, kind):
    assert kind_of_device(device, device_map) == kind


def spread(base, folder):
    """The base with its second layer and its head on disk, brought in by accelerate when they compute."""
    places = {name: "cpu" for name, _ in base.model.model.named_children()}
    places = {f"model.{name}": place for name, place in places.items() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    return places


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    base = tiny_causal("Llama")
    return base, saved(base, tmp_path_factory.mktemp("untied") / "base")


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "spread"])
def test_device_maps(untied, device_map):
    base, folder = untied
    own = spread(base, folder) if device_map == "spread" else device_map
    loaded = Base.load(folder, device_map=own)
    adapters = [
        random_adapter(base, 2 + i, i, [*base.projections, "lm_head"], name=f"a{i}", size=0.2) for i in range(3)
    ]
    rows, stack = some_examples(base, 6, 0), Stack.of(adapters)
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() and device_map == "auto" else "cpu")
    for updates in (None, grouped(adapters), shared(stack, torch.eye(3))):
        want, got = (score(b, [rows] * (3 if updates else 1), updates) for b in (base, loaded))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    fits = [
        learn_coefficients(b, [stack], [rows], [rows], Schedule(steps=4, lr=0.1, batch=4), seeds=[0])[0]
        for b in (base, loaded)
    ]
    torch.testing.assert_close(fits[1].coefficients, fits[0].coefficients, rtol=1e-3, atol=1e-4)
    if device_map == "spread":
        assert loaded.model.lm_head.weight.is_meta
        assert computes_on(loaded.model.lm_head) == torch.device("cpu")
        with pytest.raises(BaseError, match=r"has no digest: .* is offloaded; load it whole, on one device"):
            _ = loaded.digest
        with pytest.raises(BaseError, match="no floating-point weight"), merge(adapters, "ties").applied(loaded.model):
            pass
    else:
        assert loaded.digest == base.digest


def test_one_of_device_and_device_map(folder):
    with pytest.raises(BaseError, match="device='cpu' and device_map='auto' exclude each other"):
        Base.load(folder, device="cpu", device_map="auto")
    with pytest.raises(BaseError, match="no base model could be loaded from"):
        Base.load(folder, device_map="everywhere")


class Ferry(nn.Linear):
    """A layer on the "meta" device that, as under accelerate, brings its input over itself."""

    def forward(self, x):
        return super().forward(x.to(self.weight.device))


def test_factors_go_to_each_layer_s_own_device():
    """ "meta" stands for a second device: shapes and places are computed, numbers are not."""
    model = nn.Sequential(nn.Linear(4, 4), Ferry(4, 6, device="meta"), nn.Linear(6, 3, device="meta")).requires_grad_(
        False
    )
    c = torch.ones(2, 1, requires_grad=True)
    updates = {
        "0": LowRank(torch.ones(4, 1), torch.ones(1, 4), c),
        "1": LowRank(torch.ones(6, 1), torch.ones(1, 4), c),
        "2": Routed(torch.ones(3, 2), torch.ones(2, 6), owner=torch.tensor([0, 1]), prototypes=torch.ones(2, 6)),
    }
    seen = {}
    for name, update in updates.items():
        own = update.to(computes_on(model[int(name)]))
        seen[name] = {t.device.type for t in vars(own).values() if isinstance(t, torch.Tensor)}
        assert own.to(own.B.device) is own
    assert seen == {"0": {"cpu"}, "1": {"meta"}, "2": {"meta"}}
    assert all(u.B.device.type == "cpu" for u in updates.values())  # what the caller holds stays where it is
    updates["2"] = LowRank(torch.ones(3, 1), torch.ones(1, 6), c)
    with compose(model, updates):
        y = model(torch.ones(2, 5, 4))
    assert y.shape == (2, 5, 3)
    assert y.is_meta
    assert y.requires_grad
    assert computes_on(nn.ReLU()) is None
    hooks = pytest.importorskip("accelerate.hooks")
    for hook in (hooks.AlignDevicesHook("cpu"), hooks.SequentialHook(hooks.AlignDevicesHook("cpu"))):
        layer = nn.Linear(4, 4, device="meta")
        layer._hf_hook = hook
        assert computes_on(layer) == torch.device("cpu")


# Quantised layers ------------------------------------------------------------------------------------------------------


class Int8(nn.Linear):
    """Whole numbers and a scale per row, read back in `forward`, as quantised layers of any make do."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.weight.shape
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def dense(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


class Packed4(nn.Module):
    """No nn.Linear and no `weight`: two numbers of 4 bits in a byte, as GPTQ's layers have them in their buffers."""

    def __init__(self, layer):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("scale", layer.weight.abs().amax(1, keepdim=True) / 7)
        q = (layer.weight / self.scale).round().to(torch.int16) + 8
        self.register_buffer("qweight", (q[:, ::2] * 16 + q[:, 1::2]).to(torch.uint8))

    def dense(self):
        q = torch.stack([self.qweight // 16, self.qweight % 16], 2).flatten(1).to(torch.float32)
        return (q - 8) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype))


def quantised(make, kind, dtype=torch.float32):
    """A base whose projections are quantised, and the dense base of the same numbers."""
    bases = [make(), make()]
    for base in bases:
        base.model.to(dtype)
        for name in base.projections:
            parent, _, last = name.rpartition(".")
            layer = kind(getattr(base.model.get_submodule(parent), last))
            if base is bases[1]:
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
                dense.weight = nn.Parameter(layer.dense().to(dtype), requires_grad=False)
                layer = dense
            setattr(base.model.get_submodule(parent), last, layer)
    return Base(bases[0].model, bases[0].tokenizer, "quantised"), Base(bases[1].model, bases[1].tokenizer, "dense")


QUANTISED = {
    "llama-int8": (lambda: tiny_base(spread=4), Int8),
    "llama-packed": (lambda: tiny_base(spread=4), Packed4),
    "t5-int8": (tiny_t5, Int8),  # transformers' T5 asks its layers for their `weight`
}


@pytest.mark.parametrize(("make", "kind"), QUANTISED.values(), ids=QUANTISED)
def test_everything_composes_on_a_quantised_base(make, kind):
    base, dense = quantised(make, kind)
    assert (base.layers, base.projections, base.dtype) == (dense.layers, dense.projections, torch.float32)
    assert base.device == torch.device("cpu")
    adapters = [random_adapter(dense, 2 + i, i, name=f"a{i}", size=0.2) for i in range(3)]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    rows, stack = some_examples(base, 6, 0), Stack.of(adapters)
    for updates in (None, grouped(adapters), shared(stack, torch.eye(3))):
        want, got = (score(b, [rows] * (3 if updates else 1), updates) for b in (dense, base))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.match, want.match)
    schedule = Schedule(steps=8, lr=0.1, batch=4)
    want, got = (learn_coefficients(b, [stack], [rows], [rows], schedule, seeds=[0])[0] for b in (dense, base))
    torch.testing.assert_close(got.coefficients, want.coefficients, rtol=1e-3, atol=1e-4)
    assert got.curves.best < got.curves.validation[0]
    assert before.keys() == base.model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert base.digest == quantised(make, kind)[0].digest != dense.digest  # of the numbers as they are held


@pytest.mark.parametrize("kind", [Int8, Packed4])
def test_gradients_reach_the_coefficients_in_bf16(kind):
    base, dense = quantised(lambda: tiny_base(spread=4), kind, torch.bfloat16)
    assert base.dtype == torch.bfloat16
    stack = Stack.of([random_adapter(dense, 2, i, name=f"a{i}", size=0.2) for i in range(3)])
    ids, grads = some_ids(base, rows=2), []
    for one in (base, dense):
        c = torch.full((1, 3), 0.5, requires_grad=True)
        with compose(one.model, shared(stack, c)):
            logits_of_grad = one.model(input_ids=ids).logits.float().log_softmax(-1).square().mean()
        grads.append(torch.autograd.grad(logits_of_grad, c)[0])
    assert grads[1].abs().min() > 0
    assert relative(grads[0], grads[1]) < 0.05  # bf16 has 8 bits: the packed scale is rounded elsewhere


@pytest.mark.parametrize("kind", [Int8, Packed4])
def test_what_adds_to_the_weights_is_refused(kind, adapters):
    base, _ = quantised(lambda: tiny_base(spread=4), kind)
    with (
        pytest.raises(
            BaseError,
            match="has no floating-point weight to add to; truncate the update to a rank and compose it instead",
        ),
        merge(adapters, "ties").applied(base.model),
    ):
        pass
    factored = merge(adapters, "ties").truncate(4)
    assert relative(hook_logits(base, factored, some_ids(base)), logits_of(base.model, some_ids(base))) > 1e-3


@pytest.mark.parametrize("held", ["float8", "packed in bf16"])
def test_numbers_that_are_not_a_plain_matrix_are_not_added_to(held, adapters):
    """8-bit floats, and 4-bit numbers kept in a type that says it is floating-point."""
    base = tiny_base(spread=4)
    layer = base.model.model.layers[0].self_attn.q_proj
    other = layer.weight.to(torch.float8_e4m3fn) if held == "float8" else layer.weight.reshape(-1, 1)[::4].bfloat16()
    layer.weight = nn.Parameter(other, requires_grad=False)
    if held == "float8":
        first = base.model.get_input_embeddings()
        first.weight = nn.Parameter(first.weight.to(torch.float8_e4m3fn), requires_grad=False)
        assert base.dtype == torch.float32  # no number is computed in 8 bits
    with (
        pytest.raises(BaseError, match=r"q_proj has no floating-point weight to add to"),
        merge(adapters, "ties").applied(base.model),
    ):
        pass


def test_bitsandbytes_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    for how in ("4bit", "8bit"):
        with pytest.raises(
            BaseError, match=f"quantise='{how}' needs bitsandbytes, which is not installed: pip install"
        ):
            Base.load(folder, device="cpu", quantise=how)
    with pytest.raises(BaseError, match="quantise is '2bit', expected None, '4bit' or '8bit'"):
        Base.load(folder, device="cpu", quantise="2bit")


def test_accelerate_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(BaseError, match="device_map needs accelerate, which is not installed: pip install accelerate"):
        Base.load(folder, device_map="auto")
    assert Base.load(folder, device="cpu").device.type == "cpu"


@pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:inner dimension", "ignore:.*torch.jit", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("how", ["4bit", "8bit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpus(1))])
def test_bitsandbytes(how, device, tmp_path):
    """Against the dense base: 8 bits change its losses little, 4 bits more; a fit lowers them. An update is plain peft's."""
    pytest.importorskip("bitsandbytes")
    dense = tiny_causal("Llama", spread=2.0)
    saved(dense, tmp_path / "base")
    settings = {"device": device, "dtype": torch.float32}
    base = Base.load(tmp_path / "base", quantise=how, **settings)
    assert (base.dtype, base.device.type) == (torch.float32, device)
    assert base.layers == dense.layers
    assert not base.model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    rows = some_examples(dense, 6, 0)
    want, got = (score(b, [rows]).loss.mean() for b in (dense, base))
    assert abs(got - want) / want < (0.2 if how == "4bit" else 0.05)
    stack = Stack.of([random_adapter(dense, 2 + i, i, name=f"a{i}", size=0.2) for i in range(3)])
    (own,) = learn_coefficients(base, [stack], [rows], [rows], Schedule(steps=8, lr=0.1, batch=6), seeds=[0])
    assert own.curves.best < own.curves.validation[0]
    assert base.digest == Base.load(tmp_path / "base", quantise=how, **settings).digest != dense.digest
    one, ids = random_adapter(dense, 4, 7, name="one", size=0.2), some_ids(dense, rows=4).to(base.device)
    one.save(tmp_path / "one")
    with torch.no_grad(), compose(base.model, grouped([one], base.device)):
        got = logits_of(base.model, ids)
    torch.testing.assert_close(got, peft_logits(base, tmp_path / "one", ids))
    base.model.save_pretrained(tmp_path / "stored")
    base.tokenizer.save_pretrained(tmp_path / "stored")
    again = Base.load(tmp_path / "stored", **settings)
    torch.testing.assert_close(score(again, [rows]).loss, score(base, [rows]).loss, rtol=1e-3, atol=1e-3)
    with pytest.raises(BaseError, match="is stored quantised already; load it without quantise='4bit'"):
        Base.load(tmp_path / "stored", device=device, quantise="4bit")


@gpus(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_cards_give_what_one_gives(dtype, tmp_path):
    dense = tiny_causal("Llama", spread=2.0)
    saved(dense, tmp_path / "base")
    bases = [
        Base.load(tmp_path / "base", dtype=dtype, **how) for how in ({"device": "cuda"}, {"device_map": "balanced"})
    ]
    found, rows = [], some_examples(dense, 6, 0)
    for base in bases:
        stack = Stack.of([random_adapter(dense, 2 + i, i, name=f"a{i}", size=0.2) for i in range(3)])
        (fit,) = learn_coefficients(base, [stack], [rows], [rows], Schedule(steps=8, lr=0.1, batch=6), seeds=[0])
        found.append((score(base, [rows] * 3, shared(stack, torch.eye(3))).loss, fit.coefficients))
    assert {one.device.index for one in bases[1].model.parameters()} == {0, 1}
    assert bases[0].digest == bases[1].digest
    torch.testing.assert_close(found[1], found[0])


# Trust -----------------------------------------------------------------------------------------------------------------

CODE = "raise SystemExit('this was run')\n"


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change(path, **more):
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | more))


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_a_base_that_needs_its_own_code_is_refused(copied, part):
    (copied / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    if part == "config":
        change(copied / "config.json", model_type="unheard-of", auto_map=classes)
    elif part == "model":
        change(copied / "config.json", model_type="vit", auto_map=classes)
    else:
        (copied / "tokenizer.json").unlink()
        change(
            copied / "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
        )
    with pytest.raises(
        BaseError, match="only by running Python code that comes with it, which is never done here"
    ) as told:
        Base.load(copied, device="cpu")
    assert "trust_remote_code" not in str(told.value)


def test_code_beside_an_architecture_of_transformers_is_left_alone(copied, made):
    (copied / "own.py").write_text(CODE)
    change(copied / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert Base.load(copied, device="cpu").digest == made.digest
    assert "own" not in sys.modules


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_compiled_code_from_the_hub_is_refused(copied, key):
    change(copied / "config.json", **{key: "somebody/kernel"})
    with pytest.raises(
        BaseError, match="asks for 'somebody/kernel', compiled code from the Hub, which is never run here"
    ):
        Base.load(copied, device="cpu")


def test_a_pickle_is_not_opened(copied):
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    with pytest.raises(BaseError, match="no base model could be loaded from"):
        Base.load(copied, device="cpu")


@pytest.mark.parametrize("how", ["missing", "reshaped", "cut off"])
def test_weights_that_are_missing_are_not_made_up(copied, how):
    path, name = copied / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    if how == "missing":
        weights.pop(name)
    elif how == "reshaped":
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    said = (
        rf"lacks 1 of the model's weights, such as {name}; is the download complete"
        if how == "missing"
        else "no base model could|lacks 1 of"
    )
    with pytest.raises(BaseError, match=said):
        Base.load(copied, device="cpu")


def test_an_adapter_beside_the_weights_is_not_put_on_top(made, copied):
    write_peft(made, copied, r=2, target_modules=["q_proj"])
    change(copied / "adapter_config.json", base_model_name_or_path=str(copied))
    with pytest.raises(BaseError, match="holds an adapter beside the model's weights"):
        Base.load(copied, device="cpu")


def test_what_is_no_base_is_refused(tmp_path, copied):
    with pytest.raises(BaseError, match="no base model could be loaded from"):
        Base.load(tmp_path / "nowhere", device="cpu")
    (copied / "config.json").write_text("{")
    with pytest.raises(BaseError, match="no base model could be loaded from"):
        Base.load(copied, device="cpu")
    change_to = {"model_type": "vit"}
    (copied / "config.json").write_text(json.dumps(change_to))
    with pytest.raises(BaseError, match="no base model could be loaded from"):
        Base.load(copied, device="cpu")


def test_every_part_is_of_the_revision_asked_for(folder, monkeypatch):
    import transformers

    asked = []
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        part = getattr(transformers, name)
        monkeypatch.setattr(
            part, "from_pretrained", lambda *a, own=part.from_pretrained, **k: asked.append(k) or own(*a, **k)
        )
    Base.load(folder, device="cpu", revision="v1.2")
    assert len(asked) >= 3
    assert {k.get("revision") for k in asked} == {"v1.2"}
    assert not any(k["trust_remote_code"] for k in asked)
    asked.clear()
    Base.load(folder, device="cpu")
    assert {k.get("revision") for k in asked} <= {None, "main"}


def test_options_reach_the_base(folder, made):
    base = Base.load(str(folder), device="cpu", max_length=99, chat=False)
    assert (base.max_length, base.chat, base.name) == (99, False, str(folder))
    assert base.digest != made.digest  # results under a cut are kept apart
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert encode(base, "ab", "c") == encode(made, "ab", "c")


# Room for a batch ------------------------------------------------------------------------------------------------------


def test_room_on_a_processor(made):
    base = Base(made.model, made.tokenizer, "tiny")
    assert base.room("score", 1.0) == base.room("generate", 0.1, units=999, cached=True) == 16_384
    base.held["score"] = 100
    assert base.room("score", 1.0) == 100
    assert base.room("generate", 1.0) == 16_384


def test_room_on_a_gpu(made, monkeypatch):
    """By hand: hidden 32, widest layer 64, 4 bytes a number; 2 layers of keys and values, 90 logits in 4 + 8 bytes."""
    base, free = Base(made.model, made.tokenizer, "tiny"), {"bytes": 10**6}
    monkeypatch.setattr(Base, "device", torch.device("cuda"))
    monkeypatch.setattr("workbench.base.free_memory", lambda device: free["bytes"])
    config = base.model.config
    token = 4 * (8 * 32 + 3 * 64)
    assert base.room("score", 0.0) == int(0.8e6 / token)
    assert base.room("score", 0.25, units=10) == int(0.8e6 / (token + 160 + 0.25 * 12 * config.vocab_size))
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * 32 // config.num_attention_heads
    assert base.room("generate", 0.0, cached=True) == int(0.8e6 / (token + cache))
    base.held["score"] = 77
    assert base.room("score", 0.0) == 77
    free["bytes"] = 10**12
    assert base.room("generate", 0.0) == 524_288
    free["bytes"] = 0
    assert base.room("generate", 0.0) == 1


def test_free_memory_counts_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_memory(torch.device("cuda")) == 140


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "gpt2"])
def test_rows_go_on_from_a_prefix(kind):
    """Two groups of three rows, each group from its own prefix: the logits of the rows read whole."""
    base = tiny_gpt2() if kind == "gpt2" else tiny_causal(kind)
    starts, ends = some_ids(base, 2, 9), some_ids(base, 6, 5, seed=1)
    whole = torch.cat([starts.repeat_interleave(3, 0), ends], 1)
    prefix = base.prefix(starts)
    got = base.next_token_logits(Batch(ends, ends, 4, prefix=prefix))
    assert relative(got, logits_of(base.model, whole)[:, -4:]) < 1e-5
    at = torch.tensor([[4, 0], [1, 1], [2, 3], [0, 0], [3, 4], [2, 1]])
    got = base.next_token_logits(Batch(ends, at, 2, at=at, prefix=prefix))
    want = logits_of(base.model, whole)[torch.arange(6)[:, None], 9 + at]
    assert relative(got, want) < 1e-5
    again = base.next_token_logits(Batch(ends, ends, 4, prefix=prefix))  # what is held is not added to
    assert relative(again, logits_of(base.model, whole)[:, -4:]) < 1e-5
