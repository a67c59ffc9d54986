"""Screening: every way to be broken is seen by its rule, sound adapters pass, and nothing is executed."""

import json
import os
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import random_adapter, tiny_base, tiny_gpt2, write_peft
from workbench.adapters import Adapter
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.nano import wild
from workbench.plain import tame
from workbench.screen import DEFAULT, RULES, STUDY, Candidate, base_shapes, counts, printable, read_header, screen

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
hostile = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def jungle(tmp_path_factory, base):
    """A folder of wild adapters and what is expected of each."""
    folder = tmp_path_factory.mktemp("wild")
    return folder, wild.make(folder, base)


@pytest.fixture
def sound(tmp_path, base):
    """A folder with one sound adapter."""
    return random_adapter(base, 3, name="sound").save(tmp_path / "sound")


def change(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", list(wild.BREAKAGES))
def test_wild_adapters(jungle, base, name):
    folder, expected = jungle
    verdict = screen(folder / name, base.layers, ["tiny"])
    assert verdict.rule == expected[name], verdict.reason
    assert verdict.accepted == (verdict.rule == "") == (verdict.reason == "")
    assert verdict.reason.isprintable()
    assert (verdict.adapter is not None) == verdict.accepted
    assert verdict.name == name


def test_every_required_rule_but_the_catch_all_has_its_wild_adapter():
    covered = {rule for rule, _ in wild.BREAKAGES.values()} | set(wild.STUDY_ONLY.values())
    assert set(RULES) - covered == {"name", "readable"}
    assert len(wild.BREAKAGES) >= 20


def test_the_study_s_rules(jungle, base):
    folder, expected = jungle
    found = {name: screen(folder / name, base.layers, ["tiny"], STUDY).rule for name in expected}
    assert found == expected | wild.STUDY_ONLY
    assert set(DEFAULT) < set(STUDY)
    assert set(STUDY) - set(DEFAULT) == set(wild.STUDY_ONLY.values())


def test_nothing_is_executed_and_no_pickle_is_opened(jungle, base, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a pickle was opened")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, never)
    monkeypatch.chdir(tmp_path)
    folder, expected = jungle
    for name in expected:
        screen(folder / name, base.layers, ["tiny"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alone", [(), ("zero-norm",)])
def test_rules_can_be_switched_off_by_name(jungle, base, alone):
    folder, _ = jungle
    assert screen(folder / "exploded", base.shapes, ["tiny"], alone).accepted
    assert screen(folder / "other-base-name", base.shapes, ["tiny"], alone).accepted
    assert screen(folder / "never-trained", base.shapes, ["tiny"], alone).accepted == ("zero-norm" not in alone)
    assert screen(folder / "nan-value", base.shapes, ["tiny"], alone).rule == "finite"  # the reader needs it
    with pytest.raises(SelectionError, match="no screening rule 'larg-norm'; the rules are"):
        screen(folder / "exploded", rules=["larg-norm"])


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "ratio"), [(4, 8, False, 2.0), (8, 4, False, 0.5), (4, 12, True, 3.0)]
)
def test_facts_against_dense_float64(tmp_path, base, rank, alpha, rslora, ratio):
    targets = ["v_proj", "q_proj", "down_proj"]
    write_peft(base, tmp_path / "a", r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=targets)
    change(tmp_path / "a", base_model_name_or_path="tiny")
    verdict = screen(tmp_path / "a", base.shapes, ["tiny"])
    assert verdict.accepted, verdict.reason
    squares = count = 0
    for module in Adapter.load(tmp_path / "a").modules.values():
        squares += float((module.B.double() @ module.A.double()).square().sum())
        count += rank * (module.B.shape[0] + module.A.shape[1])
    assert verdict.facts["norm"] == pytest.approx(squares**0.5, rel=1e-5)
    assert verdict.facts["alpha_over_r"] == pytest.approx(ratio)
    assert verdict.facts == verdict.facts | {
        "rank": rank,
        "mean_rank": rank,
        "rslora": rslora,
        "targets": "q_proj,v_proj,down_proj",
        "modules": 6,
        "parameters": count,
        "size": (tmp_path / "a" / WEIGHTS).stat().st_size,
        "base": "tiny",
    }


def test_what_plain_peft_writes_with_patterns_passes(tmp_path, base):
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"q_proj": 16}}
    write_peft(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **patterns)
    verdict = screen(tmp_path / "a", base.shapes)
    assert verdict.accepted, verdict.reason
    assert (verdict.facts["rank"], verdict.facts["mean_rank"]) == (5, 3.25)
    assert screen(tmp_path / "a", base.shapes, rules=STUDY).rule == "patterns"


def test_a_conv1d_base(tmp_path):
    gpt2 = tiny_gpt2()
    write_peft(gpt2, tmp_path / "a", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    assert screen(tmp_path / "a", gpt2.shapes).accepted
    turned = {module: shape[::-1] for module, shape in gpt2.shapes.items()}
    assert screen(tmp_path / "a", turned).rule == "base-shape"


def test_base_shapes_need_no_weights(tmp_path, base):
    for model, name in ((base, "llama"), (tiny_gpt2(), "gpt2")):
        model.model.config.save_pretrained(tmp_path / name)
        assert base_shapes(str(tmp_path / name)) == model.layers
    with pytest.raises(BaseError, match=r"no layer shapes could be had for the base .*nowhere"):
        base_shapes(str(tmp_path / "nowhere"))


def test_base_names(sound, base):
    assert screen(sound, base.shapes, ["tiny"]).accepted
    refused = screen(sound, base.shapes, ["other/base"])
    assert (refused.rule, refused.reason) == ("base-name", "its base is 'tiny', expected 'other/base'")
    change(sound, base_model_name_or_path=None)
    assert screen(sound, base.shapes, ["tiny"]).accepted  # the shapes speak for it
    assert screen(sound, None, ["tiny"]).rule == "base-name"  # nothing does


def test_links(tmp_path, sound, base):
    (tmp_path / "linked").symlink_to(sound)
    assert screen(tmp_path / "linked", base.shapes).accepted  # the owner's own arrangement
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/0123").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (sound / name).rename(cache / "blobs" / name)
        (cache / "snapshots/0123" / name).symlink_to(f"../../blobs/{name}")
    assert screen(cache / "snapshots/0123", base.shapes).accepted
    (cache / "snapshots/0123" / CONFIG).unlink()
    (cache / "snapshots/0123" / CONFIG).symlink_to("/etc/hostname")
    verdict = screen(cache / "snapshots/0123", base.shapes)
    assert (verdict.rule, verdict.facts) == ("symlink", {})


def test_a_pipe_is_not_waited_for(tmp_path, sound, base):
    (sound / WEIGHTS).unlink()
    os.mkfifo(sound / WEIGHTS)
    assert screen(sound, base.shapes).rule == "weights-file"


def test_stages(sound, base):
    (sound / WEIGHTS).unlink()
    early = screen(sound, base.shapes, ["tiny"], until="config")
    assert early.accepted
    assert early.adapter is None
    assert screen(sound, base.shapes, ["tiny"]).rule == "weights-file"


def test_partial_fit_is_refused_with_numbers(tmp_path, base):
    shapes = dict(base.projections)
    lost = shapes.pop("model.layers.1.mlp.up_proj")
    random_adapter(base, 2).save(tmp_path / "a")
    reason = screen(tmp_path / "a", shapes).reason
    assert reason.startswith("1 of 14 modules are not in the base: 'model.layers.1.mlp.up_proj'")
    reason = screen(tmp_path / "a", base.shapes | {"model.layers.1.mlp.up_proj": (lost[0] + 1, lost[1])}).reason
    assert f"{lost[0]}×{lost[1]}" in reason
    assert f"{lost[0] + 1}×{lost[1]}" in reason


def test_alpha_that_overflows(sound, base):
    change(sound, lora_alpha=1e29)
    assert screen(sound, base.shapes).rule == "large-norm"
    assert screen(sound, base.shapes, rules=()).accepted
    path = sound / CONFIG
    path.write_text(path.read_text().replace("1e+29", "1" + "0" * 400))
    assert screen(sound, base.shapes).rule == "alpha"
    path.write_text(path.read_text().replace("1" + "0" * 400, "NaN"))
    assert screen(sound, base.shapes).rule == "alpha"


def test_names(sound, base):
    for name in ("a\nb", "a\x1b[31m", "", "x" * 201):
        assert screen(sound, base.shapes, name=name or "\u202e").rule == "name"
    assert screen(sound, base.shapes, name="ünï—<b>").accepted


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"model\.layers\.0\.self_attn\.q_proj", r"layers\.\d+\.mlp", ".*down_proj", "q_proj|v_proj", "^a$"],
)
def test_ordinary_patterns_are_run(pattern):
    assert tame(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*)*x", "a{99}{99}", "(", "(?=a)", "x" * 400, ".*.*.*.*x", "(a|a)" * 30, r"(a)\1"],
)
def test_intricate_patterns_are_not(pattern):
    assert not tame(pattern)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab.*+|()[]\\d^$_", max_size=40))
def test_whatever_is_run_ends(pattern):
    import re

    if tame(pattern):
        start = time.perf_counter()
        re.match(rf"(.*\.)?({pattern})$", "a" * 60 + ".b" * 20 + "!")
        assert time.perf_counter() - start < 2


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "init_lora_weights",
    "bias",
    "modules_to_save",
)


@hostile
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_no_configuration_stops_the_screening(sound, base, settings):
    before = (sound / CONFIG).read_text()
    try:
        change(sound, **settings)
        verdict = screen(sound, base.shapes, ["tiny"], STUDY)
    finally:
        (sound / CONFIG).write_text(before)
    assert verdict.accepted == (verdict.adapter is not None)
    assert verdict.reason.isprintable()
    verdict.reason.encode()


@hostile
@given(st.binary(max_size=60), anything)
def test_no_header_stops_the_screening(sound, base, junk, entry):
    before = (sound / WEIGHTS).read_bytes()
    header = json.dumps({"a.lora_A.weight": entry, "a.lora_B.weight": entry}).encode()
    try:
        for data in (junk, struct.pack("<Q", len(header)) + header + junk, before[: 8 + len(junk)], before + junk):
            (sound / WEIGHTS).write_bytes(data)
            verdict = screen(sound, base.shapes)
            assert verdict.accepted == (data == before)
            assert verdict.reason.isprintable()
    finally:
        (sound / WEIGHTS).write_bytes(before)


def test_the_header_is_read_before_the_weights(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "x", metadata={"k": "v"})
    header = read_header(tmp_path / "x")
    assert {key: (e["dtype"], e["shape"]) for key, e in header.items()} == {"a": ("F32", [2, 3]), "b": ("BF16", [4])}
    with (tmp_path / "x").open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        AdapterError, match=r"x is damaged: it has [\d,]+ bytes, its header says [\d,]+; fetch it again"
    ):
        read_header(tmp_path / "x")
    with (tmp_path / "big").open("wb") as file:  # claims a header of 10 GB, in a sparse file of that size
        file.write(struct.pack("<Q", 10**10))
        file.truncate(2 * 10**10)
    with pytest.raises(AdapterError, match="claims a header of 10,000,000,000"):
        read_header(tmp_path / "big")
    assert "config" not in Candidate(tmp_path).__dict__


def test_counts(jungle, base):
    import pandas as pd

    folder, expected = jungle
    verdicts = [screen(folder / name, base.layers, ["tiny"]) for name in expected]
    table = counts(pd.DataFrame([{"accepted": v.accepted, "rule": v.rule} for v in verdicts]))
    want = pd.Series([rule for rule in expected.values() if rule]).value_counts()
    assert dict(zip(table["rule"], table["count"], strict=True)) == want.to_dict()
    assert table["count"].is_monotonic_decreasing
    assert table["why"].str.len().gt(5).all()


def test_printable():
    assert printable("a\nb\x1b\ud800é") == "a\\nb\\x1b\\ud800é"
    assert printable("x" * 600) == "x" * 500 + "…"
