"""The screening rules: each a small function that gives '' for an adapter that passes, or the reason why it does not.

They run in the order of `RULES`, cheap and safe ones first. `DEFAULT` is this package's set, `STUDY` that of the
recycling study ("The Appeal and Reality of Recycling LoRAs with Adaptive Merging", arXiv 2602.12323).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from workbench.adapters import _ALTERING, _KEY, _VARIANTS, CONFIG, WEIGHTS
from workbench.errors import AdapterError

if TYPE_CHECKING:
    from workbench.screen import Candidate

__all__ = ["DEFAULT", "RULES", "STUDY", "WIDTH", "Rule", "show"]

MAX_CONFIG, MAX_WEIGHTS = 2**20, 2**34  # bytes
MAX_TENSORS, MAX_LOOKUPS = 20_000, 10**6
MAX_NORM = 1000.0  # recycling study: 1 < ‖ΔW‖_F ≤ 1000 over all modules
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What a stranger's regular expression may be made of: no quantifier on a group, so that matching cannot take for ever.
_TAME = re.compile(r"(?:[\w-]|\\[.\-d]\+?|\.[*+]?|[|^$)]|\[[\w-]+\]|\((?:\?:)?)+")


@dataclass(frozen=True)
class Rule:
    """A named check: '' where a candidate passes, or the reason why not. `required` rules cannot be switched off."""

    name: str
    why: str
    check: Callable[[Candidate], str]
    stage: str  # "config", "header" or "values": what has to be read for it
    required: bool
    sets: tuple[str, ...]


RULES: dict[str, Rule] = {}


def rule(stage: str, *, required: bool = False, sets: Sequence[str] = ("default", "study")):
    """Register a check under its function's name, with its docstring as the explanation."""

    def register(check):
        name = check.__name__.strip("_").replace("_", "-")
        RULES[name] = Rule(name, check.__doc__.rstrip("."), check, stage, required, tuple(sets))
        return check

    return register


def show(value, limit: int = 80) -> str:
    """A stranger's value as it may appear in a message: printable, and not too long."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


@rule("config", required=True)
def name(c: Candidate) -> str:
    """A printable name of at most 200 characters."""
    return "" if c.name.isprintable() and 0 < len(c.name) <= 200 else f"the name {show(c.name)} is not printable"


@rule("config", required=True)
def symlink(c: Candidate) -> str:
    """No file is a link to outside its folder."""
    for path in (c.folder / CONFIG, c.folder / WEIGHTS, c.folder / "README.md"):
        if path.is_symlink() and not path.resolve().is_relative_to(c.home):
            return f"{path.name} is a link to outside the adapter's folder"
    return ""


@rule("config", required=True)
def config_file(c: Candidate) -> str:
    """There is an `adapter_config.json`."""
    return "" if (c.folder / CONFIG).is_file() else f"no {CONFIG}"


@rule("config", required=True)
def config_json(c: Candidate) -> str:
    """`adapter_config.json` is a JSON object of at most 1 MiB."""
    size = (c.folder / CONFIG).stat().st_size
    if size > MAX_CONFIG:
        return f"{CONFIG} has {size:,} bytes, expected at most {MAX_CONFIG:,}"
    try:
        config = c.config
    except (ValueError, RecursionError) as error:
        return f"{CONFIG} is not JSON ({str(error)[:100]})"
    return "" if isinstance(config, dict) else f"{CONFIG} holds a {type(config).__name__}, expected an object"


@rule("config", required=True)
def peft_type(c: Candidate) -> str:
    """peft_type is LORA."""
    kind = c.config.get("peft_type")
    return "" if kind == "LORA" else f"peft_type is {show(kind)}, expected 'LORA'"


@rule("config", required=True)
def dora(c: Candidate) -> str:
    """No DoRA, which also trains a magnitude."""
    return "use_dora is set: DoRA also trains a magnitude" if c.config.get("use_dora") else ""


@rule("config", required=True)
def modules_to_save(c: Candidate) -> str:
    """No whole layers beside the LoRA."""
    saved = c.config.get("modules_to_save")
    return f"modules_to_save = {show(saved)}: whole layers were trained beside the LoRA" if saved else ""


@rule("config", required=True)
def bias(c: Candidate) -> str:
    """No trained biases."""
    value = c.config.get("bias", "none")
    return "" if value == "none" else f"bias = {show(value)}: biases of the base were trained"


@rule("config", required=True)
def init(c: Candidate) -> str:
    """No initialisation that altered the base's own weights (PiSSA, OLoRA, CorDA, EVA, LoftQ, LoRA-GA)."""
    value = c.config.get("init_lora_weights", True)
    altering = isinstance(value, str) and value.lower().startswith(_ALTERING)
    return f"init_lora_weights = {show(value)}: this initialisation altered the base's weights" if altering else ""


@rule("config", required=True)
def variant(c: Candidate) -> str:
    """None of the LoRA variants that compute something other than s·B·A."""
    used = [name for name in _VARIANTS if c.config.get(name)]
    return f"{', '.join(used)} is set: the update is not s·B·A" if used else ""


@rule("config", required=True)
def alpha(c: Candidate) -> str:
    """lora_alpha is a number other than 0."""
    value = c.config.get("lora_alpha", 8)
    return "" if _number(value) and value else f"lora_alpha is {show(value)}, expected a number other than 0"


@rule("config", required=True)
def pattern_form(c: Candidate) -> str:
    """rank_pattern and alpha_pattern are simple: module names, at most a few wildcards, numbers."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = c.config.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > 2000:
            return f"{key} is {show(patterns)}, expected an object with at most 2,000 entries"
        for pattern, value in patterns.items():
            if not _tame(pattern):
                return f"{key} holds the regular expression {show(pattern)}, which is too intricate to be run"
            if not _number(value) or value == 0:
                return f"{key} gives {show(value)} for {show(pattern)}, expected a number other than 0"
    return ""


def _tame(pattern: str) -> bool:
    if len(pattern) > 300 or not _TAME.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return pattern.count("*") + pattern.count("+") <= 3 and pattern.count("|") <= 8


@rule("config", sets=("study",))
def task_type(c: Candidate) -> str:
    """task_type is CAUSAL_LM."""
    value = c.config.get("task_type")
    return "" if value == "CAUSAL_LM" else f"task_type is {show(value)}, expected 'CAUSAL_LM'"


@rule("config", sets=("study",))
def patterns(c: Candidate) -> str:
    """Neither rank_pattern nor alpha_pattern."""
    used = [key for key in ("rank_pattern", "alpha_pattern") if c.config.get(key)]
    return f"{' and '.join(used)} is set: its modules have ranks or scales of their own" if used else ""


@rule("config")
def base_name(c: Candidate) -> str:
    """The base it names is the pool's."""
    said = c.config.get("base_model_name_or_path")
    if c.names is None or said in c.names or (not said and c.shapes is not None):
        return ""
    return f"its base is {show(said)}, expected {' or '.join(map(show, c.names))}"


@rule("header", required=True)
def pickle(c: Candidate) -> str:
    """The weights are not only there as a pickle, which can run code and is never opened."""
    if (c.folder / WEIGHTS).exists():
        return ""
    found = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt", "pkl") for p in c.folder.glob(f"*.{suffix}"))
    return f"its weights are a pickle ({found[0]}), which can run code and is never opened" if found else ""


@rule("header", required=True)
def weights_file(c: Candidate) -> str:
    """There is an `adapter_model.safetensors`, of at most 16 GiB."""
    path = c.folder / WEIGHTS
    if not path.is_file():
        return f"no {WEIGHTS}"
    size = path.stat().st_size
    return "" if size <= MAX_WEIGHTS else f"{WEIGHTS} has {size:,} bytes, expected at most {MAX_WEIGHTS:,}"


@rule("header", required=True)
def header(c: Candidate) -> str:
    """The header is sound and the file as long as the header says."""
    try:
        c.header  # noqa: B018
    except AdapterError as error:
        return str(error)
    return ""


@rule("header", required=True)
def embeddings(c: Candidate) -> str:
    """No LoRA on an embedding, whose factors are looked up by token."""
    found = [key for key in c.header if ".lora_embedding_" in key]
    return f"{len(found)} tensors are LoRA factors of an embedding, such as {show(found[0])}" if found else ""


@rule("header", required=True)
def keys(c: Candidate) -> str:
    """Every tensor is a LoRA factor of a linear layer, and there are at most 20,000."""
    if len(c.header) > MAX_TENSORS:
        return f"the file holds {len(c.header):,} tensors, expected at most {MAX_TENSORS:,}"
    lookups = len(c.pairs) * (len(c.config.get("rank_pattern") or ()) + len(c.config.get("alpha_pattern") or ()))
    if lookups > MAX_LOOKUPS:
        return f"{lookups:,} look-ups of patterns would be needed, expected at most {MAX_LOOKUPS:,}"
    strange = sorted(key for key in c.header if not _KEY.match(key))
    if strange:
        return f"{len(strange)} tensors are not LoRA factors of a linear layer, such as {show(strange[0])}"
    return "" if c.header else "the file holds no tensor"


@rule("header", required=True)
def dtype(c: Candidate) -> str:
    """Tensors are fp64, fp32, fp16 or bf16."""
    odd = {key: entry["dtype"] for key, entry in c.header.items() if entry["dtype"] not in WIDTH}
    return f"{show(next(iter(odd)))} is of type {next(iter(odd.values()))}, expected {', '.join(WIDTH)}" if odd else ""


@rule("header", required=True)
def pairs(c: Candidate) -> str:
    """Every A has its B."""
    for module, pair in c.pairs.items():
        if len(pair) != 2:
            return f"{module} has lora_{next(iter(pair))} only, expected a pair of A (r, d_in) and B (d_out, r)"
    return ""


@rule("header", required=True)
def shapes(c: Candidate) -> str:
    """A is (r, d_in) and B (d_out, r), with one r of at least 1."""
    for module, pair in c.pairs.items():
        a, b = pair["A"], pair["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            return f"{module} has A {a} and B {b}, expected (r, d_in) and (d_out, r) with one r ≥ 1"
    return ""


@rule("header")
def rank(c: Candidate) -> str:
    """The tensors' ranks are the configuration's, without which the scale α/r is ambiguous."""
    patterns = c.config.get("rank_pattern") or {}
    for module, pair in c.pairs.items():
        told = next((r for p, r in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), c.config.get("r", 8))
        if told != pair["A"][0]:
            return f"{module} has rank {pair['A'][0]}, but {CONFIG} says {show(told)}"
    return ""


@rule("header")
def targets(c: Candidate) -> str:
    """target_modules, where it is a list, names every module in the file."""
    wanted = c.config.get("target_modules")
    if not isinstance(wanted, list):
        return ""
    known = {target for target in wanted if isinstance(target, str)}
    lost = [m for m in c.pairs if known.isdisjoint(_suffixes(m))]
    if not lost:
        return ""
    return f"target_modules = {show(wanted)} does not name {len(lost)} of {len(c.pairs)} modules, such as {lost[0]}"


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


@rule("header")
def base_layers(c: Candidate) -> str:
    """Every module is a linear layer of the base."""
    lost = [module for module in c.pairs if c.shapes is not None and module not in c.shapes]
    if not lost:
        return ""
    return (
        f"{len(lost)} of {len(c.pairs)} modules are not in the base, such as {lost[0]!r}; "
        f"the base has layers such as {next(iter(c.shapes), None)!r}"
    )


@rule("header")
def base_shape(c: Candidate) -> str:
    """Every module has the shape of the base's layer."""
    for module, pair in c.pairs.items():
        got = pair["B"][0], pair["A"][1]
        if c.shapes is not None and module in c.shapes and got != tuple(c.shapes[module]):
            want = c.shapes[module]
            return f"{module} is {got[0]}×{got[1]}, the base's is {want[0]}×{want[1]}: it is of another base"
    return ""


@rule("values", required=True)
def finite(c: Candidate) -> str:
    """No NaN and no infinity, in the files or once scaled."""
    try:
        if math.isfinite(c.norm):
            return ""
        bad = [m for m, f in c.adapter.modules.items() if not torch.isfinite(f.B).all()]
        return f"{bad[0]} is not finite once it is multiplied by its scale" if bad else ""
    except AdapterError:
        bad = [key for key, t in load_file(c.folder / WEIGHTS).items() if not torch.isfinite(t.float()).all()]
        return f"{len(bad)} tensors hold NaN or infinite values, such as {min(bad)}" if bad else ""


@rule("values", required=True)
def readable(c: Candidate) -> str:
    """Whatever else the reader of adapters objects to."""
    try:
        c.adapter  # noqa: B018
    except AdapterError as error:
        return str(error).removeprefix(f"{c.folder.name}: ")
    return ""


@rule("values")
def zero_norm(c: Candidate) -> str:
    """ΔW is not zero."""
    return "" if c.norm else "ΔW is zero: it was never trained, or its file is blank"


@rule("values", sets=("study",))
def small_norm(c: Candidate) -> str:
    """‖ΔW‖ is above 1."""
    return "" if c.norm > 1 else f"‖ΔW‖ is {c.norm:.3g}, expected more than 1"


@rule("values")
def large_norm(c: Candidate) -> str:
    """‖ΔW‖ is at most 1000."""
    return "" if c.norm <= MAX_NORM else f"‖ΔW‖ is {c.norm:.3g}, expected at most {MAX_NORM:g}"


DEFAULT, STUDY = (tuple(r.name for r in RULES.values() if which in r.sets) for which in ("default", "study"))
