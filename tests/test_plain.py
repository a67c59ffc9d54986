"""What a plain LoRA is: every setting of the installed peft judged, and no stranger's pattern run without end."""

import dataclasses
import time

import pytest
import torch

from helpers import hook_logits, peft_logits, relative, some_ids, tiny_causal, write_peft, write_raw
from workbench.adapters import Adapter
from workbench.errors import AdapterError
from workbench.plain import SETTINGS, looked_up, objections, show, tame
from workbench.screen import screen


def pair(module, r=2, d_out=4, d_in=4):
    return {
        f"base_model.model.{module}.lora_A.weight": torch.ones(r, d_in),
        f"base_model.model.{module}.lora_B.weight": torch.ones(d_out, r),
    }


def test_every_setting_of_the_installed_peft_is_known():
    """A field that a later peft adds has to be judged before strangers use it: does ΔW stay s·B·A?"""
    from peft import LoraConfig

    harmless = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
    fitting = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 3, "base_model_name_or_path": "a/b"}
    fitting |= {"target_modules": "a", "exclude_modules": ["a"], "layers_to_transform": 3, "layers_pattern": "a"}
    set_to = {"bias": "all", "init_lora_weights": "pissa"}
    plain = {"peft_type": "LORA"}
    assert not list(objections(plain))
    for field in dataclasses.fields(LoraConfig):
        assert field.name in SETTINGS, (
            f"peft has a new setting {field.name}: is ΔW still s·B·A under it? Say so in plain"
        )
        if field.name in harmless:
            value = fitting.get(field.name, {"a": 1})
            assert not list(objections(plain | {field.name: value})), field.name
        else:
            (rule, reason), *_ = objections(plain | {field.name: set_to.get(field.name, ["x"])})
            assert rule in ("dora", "variant", "modules-to-save", "bias", "init")
            assert field.name in reason


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_mora": True}, "'use_mora' is set and not known here"),
        ({"twist_config": {"a": 1}}, "'twist_config' is set and not known here"),
        ({"lora_gate": "sigmoid"}, "'lora_gate' is set and not known here: the update may not be s·B·A"),
        ({"enable_lora": [True, False, True]}, "'enable_lora' is set and not known here"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a'], expected a text"),
        ({"task_type": 1}, "task_type is 1, expected a text"),
        ({"init_lora_weights": "Pissa_niter_8"}, "altered the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "altered the base's weights"),
        ({"init_lora_weights": "svd_start"}, "not known here, so it may have altered"),
        ({"init_lora_weights": ["pissa"]}, "not known here, so it may have altered"),
    ],
)
def test_unknown_variants_and_initialisations_are_refused(config, said, tmp_path):
    folder = write_raw(tmp_path / "a", pair("m"), **config)
    with pytest.raises(AdapterError, match="a: ") as caught:
        Adapter.load(folder)
    assert said in str(caught.value)
    assert said in screen(folder).reason


@pytest.mark.parametrize(
    "config",
    [
        *(
            {"use_mora": False},
            {"twist_config": None},
            {"note": "use_mora"},
            {"use_rslora": 1},
            {"_name_or_path": "a/b"},
        ),
        {
            "enable_lora": None,
            "merge_weights": True,
            "lora_dtype": "bf16",
            "lorap_emb_lr": 1e-6,
        },  # as others write them
    ],
)
def test_what_is_not_set_or_only_noted_is_accepted(config, tmp_path):
    assert Adapter.load(write_raw(tmp_path / "a", pair("m"), **config)).rank == 2


def test_mica_is_a_plain_lora(tmp_path):
    base = tiny_causal("Llama")
    write_peft(base, tmp_path / "a", r=2, init_lora_weights="mica", target_modules=["q_proj", "embed_tokens"])
    ids = some_ids(base)
    assert relative(hook_logits(base, Adapter.load(tmp_path / "a"), ids), peft_logits(base, tmp_path / "a", ids)) < 1e-4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alpha_pattern": {"([a-z._0-9]+)+!": 1}}, "too intricate"),
        ({"rank_pattern": {"(a|a)*b": 1}}, "too intricate"),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(2001)}}, "at most 2,000"),
    ],
)
def test_the_reader_runs_no_intricate_pattern(config, said, tmp_path):
    folder = write_raw(tmp_path / "a", pair("a" * 60), **config)
    with pytest.raises(AdapterError, match=said):
        Adapter.load(folder)
    assert screen(folder).rule == "pattern-form"


def test_the_reader_runs_no_pattern_on_endless_names(tmp_path):
    folder = write_raw(tmp_path / "a", pair("a." * 200), alpha_pattern={".*a.*a.*b": 1})
    with pytest.raises(AdapterError, match=r"looking 1 patterns up for 1 modules may take [\d,]+ steps"):
        Adapter.load(folder)
    assert screen(folder).rule == "keys"


def test_looked_up_is_what_peft_finds():
    from peft.utils.other import get_pattern_key

    for patterns in ({"q": 1, ".*_proj": 2}, {"layers.1": 3}, {r"^model\..*q": 4, "k|q": 5}, {"x": 6}, {r"\d+\.q": 7}):
        assert all(map(tame, patterns))
        for module in ("model.layers.1.q", "layers.1", "q", "k_proj", "model.layers.12.q_proj", "x"):
            assert looked_up(patterns, module, 0) == patterns.get(get_pattern_key(patterns, module), 0)
    assert looked_up(None, "q", 8) == looked_up({}, "q", 8) == 8


def test_many_patterns_are_looked_up_in_time(tmp_path):
    """A pattern for each of 1,000 modules, more than `re` remembers."""
    modules = [f"model.layers.{i}.q_proj" for i in range(1000)]
    tensors = {key: tensor for module in modules for key, tensor in pair(module).items()}
    patterns = {module: i % 7 + 1 for i, module in enumerate(modules)}
    folder = write_raw(tmp_path / "a", tensors, alpha_pattern=patterns, rank_pattern=dict.fromkeys(patterns, 2))
    start = time.thread_time()
    verdict = screen(folder)
    assert time.thread_time() - start < 5
    assert verdict.accepted, verdict.reason
    assert [verdict.adapter.modules[m].scale for m in modules] == [(i % 7 + 1) / 2 for i in range(1000)]


def test_what_cannot_be_shown_is_named():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert show(deep) == "a list too intricate to be shown"
    assert show(10**5000) == "a int too intricate to be shown"
    assert show("\x1b\u202e") == r"'\x1b\u202e'"
