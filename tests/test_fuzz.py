"""Damaged headers and configurations: each is refused with a reason, or read as peft and safetensors themselves read it.

The damage is done to bytes (flips, cuts, splices) and to what they mean (values of other types, renamed keys, nesting,
numbers beyond all measure); hypothesis adds its own. Nothing may raise, hang, or take memory that is not there.
"""

import json
import math
import random
import resource
import struct
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import tiny_base, write_raw
from workbench.adapters import Adapter
from workbench.plain import MAX_STEPS, looked_up, steps, tame
from workbench.rules import RULES
from workbench.screen import screen

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ["tiny"]
Q, V, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"
hostile = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def layers():
    return tiny_base().layers


def factors(module, shape, r, dtype=torch.float32, embedding=False):
    """Random A and B of a module under peft's names."""
    g = torch.Generator().manual_seed(r)
    a, b = (torch.randn(size, generator=g).to(dtype) / 9 for size in ((r, shape[1]), (shape[0], r)))
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return {f"base_model.model.{module}.{kind.format(side)}": t for side, t in (("A", a), ("B", b))}


class Seeds(list):
    def __repr__(self) -> str:  # of a failing example kilobytes of weights say nothing
        return f"{len(self)} seeds"


@pytest.fixture(scope="module")
def seeds(layers, tmp_path_factory):
    """The files of five sound adapters: (configuration, weights), as bytes."""
    home = tmp_path_factory.mktemp("seeds")
    plain = {"base_model_name_or_path": "tiny", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    both = factors(Q, layers[Q], 3) | factors(V, layers[V], 3)
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.v_proj": 5, "layers.0.self_attn.q_proj": 0.5}}
    looked = plain | {"target_modules": ["q_proj", "embed_tokens"], "r": 2}
    made = [
        write_raw(home / "plain", both, **plain),
        write_raw(home / "patterns", factors(Q, layers[Q], 2) | factors(V, layers[V], 3), **plain | patterns),
        write_raw(
            home / "rslora", factors(Q, layers[Q], 3, torch.bfloat16), **plain, use_rslora=True, peft_version="0.1"
        ),
        write_raw(
            home / "looked",
            factors(EMBEDDING, layers[EMBEDDING], 2, embedding=True) | factors(Q, layers[Q], 2),
            **looked,
        ),
        write_raw(
            home / "chosen", factors(Q, layers[Q], 3), **plain, layers_to_transform=[0], exclude_modules=["up_proj"]
        ),
    ]
    return Seeds(((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()) for folder in made)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


# -- the two outcomes ------------------------------------------------------------------------------------------------


def judged(folder, layers, config, weights):
    """The verdict on these files, held to what a verdict is, and where it accepts to the oracle."""
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    start = time.thread_time()
    verdict = screen(folder, layers, NAMES)
    assert time.thread_time() - start < 1
    assert verdict.accepted == (verdict.rule == "") == (verdict.reason == "")
    assert verdict.reason.isprintable()
    assert len(verdict.reason) <= 501
    assert verdict.accepted or verdict.rule in RULES
    assert "could not be checked" not in verdict.reason, verdict.reason
    json.dumps(verdict.facts).encode()
    if verdict.accepted:
        adapter = Adapter.load(folder, shapes=layers)
        assert adapter.digest() == verdict.adapter.digest()
        oracle(adapter, json.loads(config), weights, layers)
    return verdict


def oracle(adapter, config, weights, layers):
    """B, A and s from the raw tensors and settings, by safetensors' own reading and peft's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    tensors = safetensors.torch.load(weights)
    sides = {}
    for key, tensor in tensors.items():
        module, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        if module:
            sides.setdefault(module, {})[side.removeprefix("embedding_")[0]] = tensor
    places = {
        next(layer for layer in layers if layer.endswith("." + m) or m.endswith("." + layer) or layer == m): m
        for m in sides
    }
    assert places.keys() == adapter.modules.keys()
    assert config["peft_type"] == "LORA"
    for place, module in places.items():
        a, b = sides[module]["A"].float(), sides[module]["B"].float()
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        assert ranks.get(get_pattern_key(ranks, place), config.get("r", 8)) == a.shape[0]
        alpha = alphas.get(get_pattern_key(alphas, place), config.get("lora_alpha", 8))
        s = alpha / math.sqrt(a.shape[0]) if config.get("use_rslora") else alpha / a.shape[0]
        got = adapter.modules[place]
        assert torch.equal(got.A, a)
        assert torch.equal(got.B, b * s)
        assert got.scale == s
        assert got.B.isfinite().all()
        wanted = config.get("target_modules")
        run, pattern = [wanted, config.get("exclude_modules")], config.get("layers_pattern") or []
        run = [each for each in run if isinstance(each, str) and each] + (
            [pattern] if isinstance(pattern, str) else pattern
        )
        known = all(tame(each) and each != "all-linear" for each in run)
        if known and wanted is not None and not config.get("ensure_weight_tying"):
            keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
            assert check_target_module_exists(SimpleNamespace(**{key: config.get(key) for key in keys}), place)


# -- damage ----------------------------------------------------------------------------------------------------------

VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        -1,
        4,
        0.5,
        -0.0,
        1e-320,
        1e29,
        1e308,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**400,
        10**4000,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "3",
        "F32",
        "BF16",
        "I64",
        "tiny",
        "LORA",
        "q_proj",
        "all-linear",
        "none",
        "\x1b[31m",
    ),
    *(
        "\u202e",
        "\ud800",
        "x" * 5000,
        "(a+)+b",
        ".*",
        "<script>",
        [],
        [0],
        [3, 32],
        [32, 3],
        [0, 384],
        [True],
        [[]],
        {},
    ),
    *({"a": 1}, {"q_proj": 3}, {"q_proj": "x"}, {".*": 0.5}, {"(": 1}, ["q_proj"], ["v_proj", 1], [1.0, 2.0], [-1, 5]),
]
KEYS = [
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "bias"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *(
        "init_lora_weights",
        "use_dora",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "lora_bias",
        "use_x",
        "x",
        "eva_config",
    ),
]
ENTRY = ["dtype", "shape", "data_offsets", "x"]


def bitten(rng, data):
    """Bytes flipped, cut out, cut off, doubled, overwritten or put in between."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
        piece = bytes(rng.choice((0, 255, 34, 44, 91, 123, 125, 49, rng.randrange(256))) for _ in range(n))
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + n]
        elif how == 2:
            del data[at:]
        elif how == 3:
            data[at:at] = data[at : at + n]
        elif how == 4:
            data[at : at + n] = piece
        else:
            data[at:at] = piece
    return bytes(data)


def twisted(rng, found, keys):
    """An object with other values, other keys, fewer, or nested ones."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice([*found, *keys])
        how = rng.randrange(6)
        if how == 0 and key in found:
            del found[key]
        elif how == 1 and key in found:
            found[rng.choice([*keys, key.upper(), key + "\n", key + "x", key[1:]])] = found.pop(key)
        elif how == 2:
            found[key] = deep(rng.choice((2, 20, 500)), rng.choice(VALUES))
        elif how == 3 and isinstance(found.get(key), int | float) and abs(found[key]) < 1e200:
            found[key] *= rng.choice((-1, 2, 0.5, 2**40, 1e100, 10**100))
        else:
            found[key] = rng.choice(VALUES)
    return found


def deep(n, value):
    for _ in range(n):
        value = [value] if n % 3 else {"a": value}
    return value


def dumped(rng, found):
    """JSON text of an object; now and then with a key twice, more nesting than any parser takes, or other bytes."""
    text = json.dumps(found, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    how = rng.randrange(25)
    if how == 0 and len(found):
        return text[:-1] + b", " + json.dumps(rng.choice(list(found))).encode("utf-8", "surrogatepass") + b": 1}"
    if how == 1:
        return text[:-1] + b', "y": ' + b"[" * 50_000 + b"}"
    if how == 2:
        return text.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if how == 3:
        return text.replace(b"3", b"3" * rng.choice((20, 400, 5000)))
    return text


def damaged_config(rng, config):
    how = rng.randrange(3)
    return bitten(rng, config) if how == 0 else dumped(rng, twisted(rng, json.loads(config), KEYS))


def damaged_weights(rng, weights, others):
    how, length = rng.randrange(6), struct.unpack("<Q", weights[:8])[0]
    text, data = weights[8 : 8 + length], weights[8 + length :]
    if how == 0:
        return bitten(rng, weights[: 8 + length]) + data
    if how == 1:
        return bitten(rng, weights)
    if how == 2:
        other = rng.choice(others)
        return weights[: rng.randrange(len(weights))] + other[rng.randrange(len(other)) :]
    if how == 3:
        text = bitten(rng, text)
    else:
        header = json.loads(text)
        names = [key for key in header if key != "__metadata__"]
        if how == 4:
            key = rng.choice(names)
            header[key] = twisted(rng, header[key], ENTRY)
        else:
            a, b = rng.choice(names), rng.choice(names)
            header[a], header[b] = header[b], header[a]
            header = twisted(
                rng, header, [*names, "__metadata__", "x.lora_A.weight", names[0].replace(".lora", ".lora.lora")]
            )
        text = dumped(rng, header)
    said = (
        rng.choice((0, 2, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1)) if rng.random() < 0.1 else len(text)
    )
    return struct.pack("<Q", said) + text + data


def fuzz(folder, layers, seeds, count, seed):
    """Screen `count` damaged adapters; how many each rule refused, '' for those read."""
    rng, found = random.Random(seed), {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        config, weights = rng.choice(seeds)
        part = rng.randrange(5)
        if part < 3:
            config = damaged_config(rng, config)
        if part > 1:
            weights = damaged_weights(rng, weights, [w for _, w in seeds])
        rule = judged(folder, layers, config, weights).rule
        found[rule] = found.get(rule, 0) + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    return found


def test_the_seeds_are_read(folder, layers, seeds):
    for config, weights in seeds:
        verdict = judged(folder, layers, config, weights)
        assert verdict.accepted, verdict.reason


def test_a_thousand_damaged_adapters(folder, layers, seeds):
    found = fuzz(folder, layers, seeds, 1200, seed=0)
    assert found[""] > 40
    assert found["header"] > 150
    assert len(found) > 14


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_ten_thousand_damaged_adapters(folder, layers, seeds, seed):
    found = fuzz(folder, layers, seeds, 2500, seed)
    assert found[""] > 100
    assert len(found) > 16


# -- hypothesis's own ------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
expressions = st.text("aq_proj.*+?|()[]{}\\d^$1,-", max_size=30)


@hostile
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), anything, max_size=4), st.integers(0, 4))
def test_any_settings(folder, layers, seeds, changes, which):
    config, weights = seeds[which]
    text = json.dumps(json.loads(config) | changes).encode("utf-8", "surrogatepass")
    judged(folder, layers, text, weights)


@hostile
@given(
    st.dictionaries(expressions, st.sampled_from([1, 2, 3, 0.5, -4]), max_size=4),
    st.sampled_from(["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "layers_pattern"]),
)
def test_any_expressions(folder, layers, seeds, patterns, key):
    config, weights = seeds[0]
    value = patterns if key.endswith("_pattern") and key != "layers_pattern" else next(iter(patterns), "")
    judged(
        folder, layers, json.dumps(json.loads(config) | {key: value, "layers_to_transform": [0, 1]}).encode(), weights
    )


@hostile
@given(
    st.dictionaries(st.sampled_from(ENTRY), anything, max_size=3),
    st.dictionaries(st.text(max_size=12) | st.just("__metadata__"), anything, max_size=2),
    st.integers(0, 4),
)
def test_any_header(folder, layers, seeds, entry, more, which):
    config, weights = seeds[which]
    length = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + length])
    key = sorted(header)[0]
    header = header | {key: header[key] | entry} | more
    text = json.dumps(header).encode()
    judged(folder, layers, config, struct.pack("<Q", len(text)) + text + weights[8 + length :])


wild_pieces = st.sampled_from(
    [".*", ".+", ".", "a", r"\.", r"\d+", "[a-c]", "(a|.)", "(?:a.|b)", "|", "^", "$", "_", r"\d"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(wild_pieces, min_size=1, max_size=9).map("".join), st.sampled_from(["a", "a.", "1", "aab.", "_.1"]))
def test_no_expression_that_is_run_runs_for_long(pattern, piece):
    """On names as long as the budget of steps allows, made of what the expression is made of and ending otherwise."""
    if not tame(pattern):
        return
    name = max((piece * n + "!" for n in (5, 20, 60, 120, 240) if steps([pattern], [piece * n]) <= MAX_STEPS), key=len)
    start = time.thread_time()
    looked_up({pattern: 1}, name[:500], 0)
    assert time.thread_time() - start < 1
