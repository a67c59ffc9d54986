"""Names in adapter files, brought to the base's; what the base lacks is refused, or left out by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import hook_logits, logits_of, random_adapter, relative, some_ids, tiny_base, tiny_causal, write_peft
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.errors import AdapterError
from workbench.keys import MAX_NAME, layout, locate, targeted
from workbench.merge import merge
from workbench.pool import Pool
from workbench.screen import screen

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    return tiny_causal("Llama")


NAMES = {
    "as peft writes them": "base_model.model.model.",
    "no prefix of peft's": "model.",
    "no prefix at all": "",
    "doubled": "base_model.model.model.model.",
    "wrapped twice by peft": "base_model.model.base_model.model.model.",
    "of a model of text and images": "base_model.model.language_model.model.",
    "of a later one": "base_model.model.model.language_model.",
    "compiled": "base_model.model._orig_mod.model.",
}


@pytest.mark.parametrize("prefix", NAMES.values(), ids=NAMES)
def test_names_are_brought_to_the_base_s(prefix, base, tmp_path):
    patterns = {"alpha_pattern": {"layers.1.self_attn.q_proj": 40}}
    write_peft(
        base, tmp_path / "a", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"], **patterns
    )
    want = Adapter.load(tmp_path / "a").modules
    stored = load_file(tmp_path / "a" / WEIGHTS)
    renamed = {key.replace("base_model.model.model.", prefix, 1): tensor for key, tensor in stored.items()}
    save_file(renamed, tmp_path / "a" / WEIGHTS)
    verdict = screen(tmp_path / "a", base.layers)
    assert verdict.accepted, verdict.reason
    for adapter in (Adapter.load(tmp_path / "a", shapes=base.layers), verdict.adapter):
        assert adapter.modules.keys() == want.keys()
        for module, factors in adapter.modules.items():
            assert torch.equal(factors.B, want[module].B)
            assert factors.embedding == want[module].embedding
        assert "left_out" not in adapter.info


def test_a_head_and_multimodal_names():
    layers = ["model.language_model.layers.0.q", "model.vision_tower.layers.0.q", "lm_head"]
    assert locate(["model.layers.0.q", "language_model.lm_head"], layers) == {
        "model.layers.0.q": layers[0],
        "language_model.lm_head": "lm_head",
    }
    assert locate(["vision_tower.layers.0.q"], layers) == {"vision_tower.layers.0.q": layers[1]}
    assert locate(["layers.1.q", "q", "0.q", "tower.layers.0.q"], layers) == {}
    assert locate(["h.0.attn.c_attn"], ["transformer.h.0.attn.c_attn"]) == {
        "h.0.attn.c_attn": "transformer.h.0.attn.c_attn"
    }


def test_no_name_is_guessed_where_two_layers_or_two_modules_fit():
    assert locate(["q"], ["model.q", "language_model.q"]) == {}
    assert locate(["model.q"], ["model.q", "language_model.q"]) == {"model.q": "model.q"}
    assert locate(["q", "model.model.q"], ["model.q"]) == {}
    assert locate(["q", "model.q"], ["model.q"]) == {}
    assert locate(["block.0.q"], ["encoder.block.0.q", "decoder.block.0.q"]) == {}
    assert locate(["encoder.block.0.q"], ["encoder.block.0.q", "decoder.block.0.q"]) == {
        "encoder.block.0.q": "encoder.block.0.q"
    }


def test_the_names_of_a_real_model_of_text_and_images():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = LlamaConfig(**size, vocab_size=50), CLIPVisionConfig(**size, image_size=8, patch_size=4)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    layers = Base(model, None).layers
    text_only = [m for m in tiny_base().layers if "layers.2" not in m and "layers.3" not in m]
    found = locate(text_only, layers)
    assert found.keys() == set(text_only)
    assert found["model.layers.1.self_attn.q_proj"] == "model.language_model.layers.1.self_attn.q_proj"
    old = {m: "language_model." + m for m in text_only}
    assert {m: locate(old.values(), layers)[name] for m, name in old.items()} == found


def test_partial_matches_are_refused_or_left_out_by_name_and_none_is_an_error(base, tmp_path):
    inside = "model.layers.0.self_attn.q_proj"
    adapter = random_adapter({inside: (32, 32), "model.layers.7.self_attn.q_proj": (32, 32)}, 2)
    adapter.save(tmp_path / "partly")
    verdict = screen(tmp_path / "partly", base.layers)
    assert (verdict.rule, verdict.adapter) == ("base-layers", None)
    assert "1 of 2 modules are not in the base: 'model.layers.7.self_attn.q_proj'" in verdict.reason
    for got in (
        screen(tmp_path / "partly", base.layers, rules=()).adapter,
        Adapter.load(tmp_path / "partly", shapes=base.layers),
    ):
        assert list(got.modules) == [inside]
        assert got.info["left_out"] == {"model.layers.7.self_attn.q_proj": "the base has no such layer"}
    report = merge([got], "sum").info["report"].set_index("module")
    assert report["status"].to_dict() == {inside: "used", "model.layers.7.self_attn.q_proj": "left out"}
    assert list(Adapter.load(tmp_path / "partly").modules) == list(adapter.modules)  # of no base in particular
    random_adapter({"model.layers.7.self_attn.q_proj": (32, 32)}, 2).save(tmp_path / "none")
    said = r"none of its 1 modules is in the base; it has such as 'model\.layers\.7"
    with pytest.raises(AdapterError, match=said):
        Adapter.load(tmp_path / "none", shapes=base.layers)
    assert screen(tmp_path / "none", base.layers).rule == "base-layers"
    assert screen(tmp_path / "none", base.layers, rules=()).rule == "readable"


def test_a_pool_reads_under_the_base_s_names_again_and_again(base, tmp_path, monkeypatch):
    base.model.save_pretrained(tmp_path / "base")
    for i in range(2):
        folder = random_adapter(base, 2, i, ["q_proj"], name=f"a{i}").save(tmp_path / "pool" / f"a{i}")
        stored = {key.replace("model.layers", "layers"): t for key, t in load_file(folder / WEIGHTS).items()}
        save_file(stored, folder / WEIGHTS)
    for room in (2**20, 0):
        monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", room)
        pool = Pool.open(tmp_path / "pool", base=tmp_path / "base", rules=())
        assert list(pool.stack().modules) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        assert (
            relative(hook_logits(base, merge(pool, "sum"), some_ids(base)), logits_of(base.model, some_ids(base))) > 0
        )


def test_the_layout_of_a_file():
    found = layout(["base_model.model.a.lora_A.default.weight", "a.lora_B.weight", "e.lora_embedding_A.default"])
    assert found.pairs["a"] == {"A": "base_model.model.a.lora_A.default.weight", "B": "a.lora_B.weight"}
    assert found.pairs["e"] == {"A": "e.lora_embedding_A.default"}
    assert (found.embeddings, found.copies, found.problem) == ({"e"}, (), "")
    assert "lora_A twice" in layout(["a.lora_A.weight", "a.lora_A.default.weight"]).problem
    for strange in ("e.lora_embedding_A.weight", "a.lora_A", "a.lora_magnitude_vector", "a.lora_A.other.weight"):
        assert repr(strange) in layout([strange]).problem
    for strange in (
        "a\n.lora_A.weight",
        "a.lora_A.weight\n",
        "a\u202e.lora_A.weight",
        "a" * MAX_NAME + ".lora_A.weight",
    ):
        assert "not printable, or longer than 500" in layout([strange]).problem


@pytest.mark.parametrize(
    "changes",
    [
        *({"target_modules": ["q"]}, {"target_modules": ["model.layers.0.q"]}, {"target_modules": r".*\.(q|v)"}),
        *({"exclude_modules": ["layers.1.v", "head"]}, {"exclude_modules": r".*\.1\..*"}, {"target_modules": ["oq"]}),
        *({"layers_to_transform": 1}, {"layers_to_transform": [0, 7]}, {"layers_to_transform": []}),
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "model.layers", "experts"]},
        {"layers_to_transform": [0], "layers_pattern": "experts"},
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q", "model.layers.0.v"]},
        {"layers_to_transform": [1], "layers_pattern": r"lay.*|h"},
    ],
)
def test_targeted_is_what_peft_targets(changes):
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save")
    config = {"target_modules": ["q", "v"], **dict.fromkeys(keys), **changes}
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q", "v", "oq", "experts.0.q")] + ["head.q"]
    want = {module for module in modules if check_target_module_exists(SimpleNamespace(**config), module)}
    assert targeted(config, modules) == want


def test_what_cannot_be_told_is_targeted():
    modules = ["layers.0.q", "h"]
    for wanted in ("all-linear", "(a+)+", None):
        assert targeted({"target_modules": wanted, "exclude_modules": "(a+)+q"}, modules) == set(modules)
    assert targeted({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(a+)+"}, modules) == {
        modules[0]
    }
    assert targeted({"target_modules": ""}, modules) == set()
