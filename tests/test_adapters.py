"""Adapters in and out: plain peft is the oracle, both ways."""

import copy
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch

from helpers import (
    hook_logits,
    peft_logits,
    random_adapter,
    relative,
    some_ids,
    tiny_base,
    tiny_gpt2,
    write_peft,
    write_raw,
)
from workbench import adapters as module_under_test
from workbench.adapters import Adapter, Factors, read_config
from workbench.errors import AdapterError
from workbench.stack import Stack

Q0, V1, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "alpha below rank": {"r": 8, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "rank 1": {"r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]},
    "one layer": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "target regex": {"r": 2, "lora_alpha": 32, "target_modules": r".*layers\.0\..*(q|down)_proj"},
    "rank pattern": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 6}},
    "alpha pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 40, "q_proj": 1, "^model.layers.0.mlp.down_proj": 24},
    },
    "both patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {r".*layers\.0\.self_attn\.[qk]_proj": 3, "mlp.up_proj": 5},
        "alpha_pattern": {"self_attn.k_proj": 2, r"1\.mlp\.up_proj": 11},
    },
}


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def ids(base):
    return some_ids(base)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_peft_gives_peft_s_logits_and_so_does_its_copy(base, ids, tmp_path, config):
    model = write_peft(base, tmp_path / "theirs", **config)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert relative(want, base.model(input_ids=ids).logits) > 1e-2  # the adapter does something
    adapter = Adapter.load(tmp_path / "theirs")
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    adapter.save(tmp_path / "ours")
    assert relative(peft_logits(base, tmp_path / "ours", ids), want) < 1e-4
    assert relative(hook_logits(base, Adapter.load(tmp_path / "ours"), ids), want) < 1e-4


def test_rslora_with_patterns_scales_as_peft_does(base, ids, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    model = write_peft(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=ALL, use_rslora=True, **patterns)
    adapter = Adapter.load(tmp_path / "a")
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    for module, factors in adapter.modules.items():
        assert factors.scale == pytest.approx(layers[module].scaling["default"])
    with torch.no_grad():
        assert relative(hook_logits(base, adapter, ids), model(input_ids=ids).logits) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stored_in_half_precision_are_read_exactly(base, ids, tmp_path, dtype):
    model = write_peft(base, tmp_path / "full", r=4, lora_alpha=8, target_modules=ALL)
    stored = {k: v.to(dtype) for k, v in load(tmp_path / "full").items()}
    write_raw(tmp_path / "half", stored, r=4, lora_alpha=8, target_modules=ALL)
    adapter = Adapter.load(tmp_path / "half")
    key = f"base_model.model.{V1}.lora_"
    assert adapter.modules[V1].A.dtype == adapter.modules[V1].B.dtype == torch.float32
    assert torch.equal(adapter.modules[V1].A, stored[key + "A.weight"].float())
    assert torch.equal(adapter.modules[V1].raw_B, stored[key + "B.weight"].float())
    assert relative(hook_logits(base, adapter, ids), peft_logits(base, tmp_path / "half", ids)) < 1e-4
    with torch.no_grad():
        assert relative(hook_logits(base, adapter, ids), model(input_ids=ids).logits) < 5e-2


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saving_in_a_dtype_stores_it_and_keeps_the_logits(base, ids, tmp_path, dtype):
    adapter = random_adapter(base, 4, seed=1)
    adapter.save(tmp_path / "a", dtype=dtype)
    assert {v.dtype for v in load(tmp_path / "a").values()} == {dtype}
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert relative(hook_logits(base, Adapter.load(tmp_path / "a"), ids), hook_logits(base, adapter, ids)) < tolerance


def test_unequal_ranks_and_missing_modules_reload_in_plain_peft(base, ids, tmp_path):
    ranks = {module: 1 + i % 7 for i, module in enumerate(base.projections)}
    some = [module for i, module in enumerate(base.projections) if i % 3]
    adapter = random_adapter(base, ranks, seed=2, targets=some)
    adapter.save(tmp_path / "a")
    assert relative(peft_logits(base, tmp_path / "a", ids), hook_logits(base, adapter, ids)) < 1e-4
    config = read_config(tmp_path / "a")
    assert config["target_modules"] == sorted(some)
    assert not config["use_rslora"]
    assert {m: f.rank for m, f in Adapter.load(tmp_path / "a").modules.items()} == {m: ranks[m] for m in some}


@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(1, 5, False), (4, 1, False), (8, 16, True), (3, 7, True)])
def test_one_adapter_at_weight_one_is_the_identity_in_logits(base, ids, tmp_path, rank, alpha, rslora):
    write_peft(base, tmp_path / "a", r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=ALL)
    want = peft_logits(base, tmp_path / "a", ids)
    adapter = Adapter.load(tmp_path / "a").times(1.0)
    adapter.save(tmp_path / "b")
    assert relative(peft_logits(base, tmp_path / "b", ids), want) < 1e-4
    config = read_config(tmp_path / "b")
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (rank, rank, False)


def test_conv1d_layers_are_kept_as_d_out_by_d_in(tmp_path):
    base = tiny_gpt2()
    ids = some_ids(base)
    model = write_peft(base, tmp_path / "a", r=3, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    adapter = Adapter.load(tmp_path / "a")
    factors = adapter.modules["transformer.h.0.attn.c_attn"]
    assert (tuple(factors.B.shape), tuple(factors.A.shape)) == ((96, 3), (3, 32))
    assert base.shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert relative(hook_logits(base, adapter, ids), want) < 1e-4
    adapter.save(tmp_path / "b")
    assert relative(peft_logits(base, tmp_path / "b", ids), want) < 1e-4
    Stack.of([adapter]).adapter(0).save(tmp_path / "c")
    assert relative(peft_logits(base, tmp_path / "c", ids), want) < 1e-4


def test_the_delta_of_one_module_is_what_peft_computes(base, tmp_path):
    model = write_peft(base, tmp_path / "a", **CONFIGS["both patterns"])
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    for module, factors in Adapter.load(tmp_path / "a").modules.items():
        torch.testing.assert_close(factors.delta(), layers[module].get_delta_weight("default"), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(factors.raw_B, layers[module].lora_B["default"].weight, rtol=1e-6, atol=0)


def test_norm_times_and_rank(base):
    adapter = random_adapter(base, {m: 1 + i % 5 for i, m in enumerate(base.projections)}, seed=3)
    want = math.sqrt(sum(float(f.delta().double().square().sum()) for f in adapter.modules.values()))
    assert adapter.norm() == pytest.approx(want, rel=1e-5)
    assert adapter.rank == 5
    tripled = adapter.times(-3)
    assert tripled.norm() == pytest.approx(3 * want, rel=1e-5)
    torch.testing.assert_close(tripled.modules[Q0].delta(), -3 * adapter.modules[Q0].delta())
    torch.testing.assert_close(tripled.modules[Q0].raw_B, adapter.modules[Q0].raw_B)
    assert adapter.times(0).norm() == 0
    assert torch.isfinite(adapter.times(0).modules[Q0].raw_B).all()


def test_the_digest_knows_content_only(base, tmp_path):
    write_peft(base, tmp_path / "one", r=8, lora_alpha=16, use_rslora=True, target_modules=ALL)
    first = Adapter.load(tmp_path / "one")
    copied = tmp_path / "elsewhere" / "two"
    copied.parent.mkdir()
    shutil.copytree(tmp_path / "one", copied)
    second = Adapter.load(copied, name="another name")
    assert first.name == "one"
    assert second.name == "another name"
    assert first.digest() == second.digest()
    backwards = replace(first, modules=dict(reversed(first.modules.items())), base="x", info={})
    assert backwards.digest() == first.digest()
    f = first.modules[V1]
    changes = [
        replace(f, B=f.B + 1e-3 * (torch.arange(f.B.numel()) == 0).view(f.B.shape)),
        replace(f, A=-f.A),
        replace(f, scale=1.0),
        Factors(f.B[:, :-1], f.A[:-1], f.scale),
    ]
    digests = {replace(first, modules=first.modules | {V1: other}).digest() for other in changes}
    digests.add(replace(first, modules={m: f for m, f in first.modules.items() if m != V1}).digest())
    assert len(digests | {first.digest()}) == 6


# Refusals


def pair(module=Q0, r=2, d_out=32, d_in=32, **other):
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.ones(r, d_in),
        f"base_model.model.{module}.lora_B.weight": torch.ones(d_out, r),
    }
    return tensors | other


def refusal(folder):
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    return str(caught.value)


def test_a_plain_handmade_folder_loads(tmp_path):
    adapter = Adapter.load(write_raw(tmp_path / "good", pair()))
    assert adapter.modules[Q0].scale == 2.0
    torch.testing.assert_close(adapter.modules[Q0].delta(), torch.full((32, 32), 4.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' is 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is None"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"alpha_pattern": {"(q_proj": 3}}, "(q_proj"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_with_the_reason(tmp_path, config, said):
    message = refusal(write_raw(tmp_path / "stranger", pair(), **config))
    assert message.startswith("stranger: ")
    assert said in message


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_harmless_initialisations_are_accepted(tmp_path, init):
    assert Q0 in Adapter.load(write_raw(tmp_path / "a", pair(), init_lora_weights=init)).modules


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({k: v for k, v in pair().items() if "lora_A" in k}, f"{Q0} has no lora_B"),
        ({k: v for k, v in pair().items() if "lora_B" in k}, f"{Q0} has no lora_A"),
        (pair(r=2) | {f"base_model.model.{Q0}.lora_B.weight": torch.ones(32, 3)}, f"{Q0} has A (2, 32) and B (32, 3)"),
        (pair() | {f"base_model.model.{Q0}.lora_A.weight": torch.ones(2, 4, 4)}, f"{Q0} has A (2, 4, 4)"),
        (pair(r=0), f"{Q0} has A (0, 32)"),
        (pair() | {f"base_model.model.{Q0}.lora_A.weight": torch.full((2, 32), float("nan"))}, f"{Q0} holds NaN"),
        (pair() | {f"base_model.model.{Q0}.lora_B.weight": torch.full((32, 2), float("inf"))}, f"{Q0} holds NaN"),
        (pair() | {"base_model.model.lm_head.weight": torch.ones(3, 3)}, "base_model.model.lm_head.weight"),
        (
            pair() | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)},
            "model.embed_tokens has no lora_B",
        ),
        (pair() | {f"{Q0}.lora_A.weight": torch.ones(2, 32)}, f"{Q0} has lora_A twice"),
        ({}, "no LoRA factors"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, tensors, said):
    message = refusal(write_raw(tmp_path / "stranger", tensors))
    assert message.startswith("stranger: ")
    assert said in message


def test_missing_damaged_and_dangerous_files(tmp_path):
    assert "nothing" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "a file" in refusal(tmp_path / "file")
    folder = write_raw(tmp_path / "broken", pair())
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, said = weights.read_bytes(), config.read_text()
    for bad in (whole[:-5], whole[:40], b"", b"\xff" * 64):
        weights.write_bytes(bad)
        assert "broken: adapter_model.safetensors is damaged" in refusal(folder)
    weights.unlink()
    assert refusal(folder) == "broken: no adapter_model.safetensors"
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert "adapter_model.bin is a pickle" in refusal(folder)
    weights.write_bytes(whole)
    for bad in ("{", "", "\x00", "[" * 100_000):
        config.write_text(bad)
        assert "broken: adapter_config.json is not JSON" in refusal(folder)
    config.write_bytes(b"\xff\xfe{}")
    assert "is not JSON" in refusal(folder)
    config.write_text("[1]")
    assert "holds a list" in refusal(folder)
    config.unlink()
    assert "broken: no adapter_config.json" in refusal(folder)
    config.write_text(said)
    assert Adapter.load(folder).rank == 2


# Saving


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_saving_refuses_what_it_should(base, tmp_path):
    adapter = random_adapter(base, 2, name="mine")
    with pytest.raises(AdapterError, match="mine: holds no module"):
        Adapter("mine", {}).save(tmp_path / "empty")
    f = adapter.modules[V1]
    broken = replace(adapter, modules=adapter.modules | {V1: replace(f, B=f.B * float("nan"))})
    with pytest.raises(AdapterError, match=f"mine: {V1} holds values that are not finite"):
        broken.save(tmp_path / "nan")
    large = replace(adapter, modules=adapter.modules | {V1: replace(f, B=f.B * 1e8)})
    with pytest.raises(AdapterError, match=f"mine: {V1} .* torch.float16"):
        large.save(tmp_path / "large", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    adapter.save(tmp_path / "there")
    before = files(tmp_path / "there")
    with pytest.raises(AdapterError, match="exists already"):
        adapter.times(2).save(tmp_path / "there")
    assert files(tmp_path / "there") == before
    adapter.times(2).save(tmp_path / "there", overwrite=True)
    assert Adapter.load(tmp_path / "there").norm() == pytest.approx(2 * adapter.norm(), rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="not an adapter's to overwrite"):
        adapter.save(tmp_path / "thesis", overwrite=True)
    assert files(tmp_path / "thesis") == {"chapter.txt": b"years of work"}
    (tmp_path / "note").write_text("x")
    with pytest.raises(AdapterError, match="is a file"):
        adapter.save(tmp_path / "note", overwrite=True)
    assert (tmp_path / "note").read_text() == "x"


@pytest.mark.parametrize("fault", ["weights", "moving in", "moving out"])
def test_a_failing_save_leaves_the_old_folder_and_nothing_else(base, tmp_path, monkeypatch, fault):
    old = random_adapter(base, 2, seed=1)
    old.save(tmp_path / "a")
    before = files(tmp_path / "a")
    real = os.replace
    calls = []

    def full(*args, **kwargs):
        raise OSError("disk is full")

    def stubborn(source, target):
        calls.append(source)
        if len(calls) == (1 if fault == "moving out" else 2):
            raise OSError("disk is full")
        real(source, target)

    if fault == "weights":
        monkeypatch.setattr(module_under_test, "save_file", full)
    else:
        monkeypatch.setattr(module_under_test.os, "replace", stubborn)
    with pytest.raises(OSError, match="disk is full"):
        random_adapter(base, 2, seed=2).save(tmp_path / "a", overwrite=True)
    assert files(tmp_path / "a") == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failing_first_save_leaves_nothing(base, tmp_path, monkeypatch):
    def half(tensors, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module_under_test, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        random_adapter(base, 2).save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_written_and_escapes_names(base, tmp_path):
    adapter = random_adapter(base, 2, name="<script>alert(1)</script>")
    adapter.save(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "<script>" not in card
    assert "14 modules, rank up to 2" in card
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    adapter.save(tmp_path / "b", card="my own words")
    assert (tmp_path / "b" / "README.md").read_text() == "my own words"


def test_saving_does_not_change_the_adapter(base, tmp_path):
    adapter = random_adapter(base, 2)
    before = copy.deepcopy(adapter)
    adapter.save(tmp_path / "a", dtype=torch.bfloat16)
    assert adapter.digest() == before.digest()
