"""The screening rules: each a small function that gives '' for an adapter that passes, or the reason why it does not.

They run in the order of `RULES`, cheap and safe ones first. `DEFAULT` is this package's set, `STUDY` that of the
recycling study ("The Appeal and Reality of Recycling LoRAs with Adaptive Merging", arXiv 2602.12323).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from workbench.errors import AdapterError
from workbench.header import MAX_TENSORS, WIDTH
from workbench.keys import targeted
from workbench.plain import CONFIG, MAX_CONFIG, WEIGHTS, looked_up, objections, scaling, show, toilsome

if TYPE_CHECKING:
    from workbench.screen import Candidate

__all__ = ["DEFAULT", "RULES", "STUDY", "Rule"]

MAX_WEIGHTS = 2**34  # bytes
MAX_RANK = 4096
MAX_NORM = 1000.0  # recycling study: 1 < ‖ΔW‖_F ≤ 1000 over all modules


@dataclass(frozen=True)
class Rule:
    """A named check: '' where a candidate passes, or the reason why not. `required` rules cannot be switched off."""

    name: str
    why: str
    check: Callable[[Candidate], str]
    stage: str  # "config", "header" or "values": what has to be read for it
    required: bool = False
    sets: tuple[str, ...] = ()


RULES: dict[str, Rule] = {}


def rule(stage: str, *, required: bool = False, sets: Sequence[str] = ("default", "study")):
    """Register a check under its function's name, with its docstring as the explanation."""

    def register(check):
        name = check.__name__.strip("_").replace("_", "-")
        RULES[name] = Rule(name, check.__doc__.rstrip("."), check, stage, required, tuple(sets))
        return check

    return register


def _objection(c: Candidate, rule: str) -> str:
    return next((reason for which, reason in objections(c.config) if which == rule), "")


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
    return "" if CONFIG in c.files else f"no {CONFIG}"


@rule("config", required=True)
def config_json(c: Candidate) -> str:
    """`adapter_config.json` is a JSON object of at most 1 MiB, its names texts."""
    size = c.size(CONFIG)
    if size > MAX_CONFIG:
        return f"{CONFIG} has {size:,} bytes, expected at most {MAX_CONFIG:,}"
    try:
        config = c.config
    except (ValueError, RecursionError) as error:
        return f"{CONFIG} is not JSON ({str(error)[:100]})"
    if not isinstance(config, dict):
        return f"{CONFIG} holds a {type(config).__name__}, expected an object"
    return _objection(c, "config-json")


@rule("config", required=True)
def peft_type(c: Candidate) -> str:
    """peft_type is LORA."""
    return _objection(c, "peft-type")


@rule("config", required=True)
def dora(c: Candidate) -> str:
    """No DoRA, which also trains a magnitude."""
    return _objection(c, "dora")


@rule("config", required=True)
def modules_to_save(c: Candidate) -> str:
    """No whole layers beside the LoRA."""
    return _objection(c, "modules-to-save")


@rule("config", required=True)
def bias(c: Candidate) -> str:
    """No trained biases."""
    return _objection(c, "bias")


@rule("config", required=True)
def init(c: Candidate) -> str:
    """No initialisation that altered the base's own weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)."""
    return _objection(c, "init")


@rule("config", required=True)
def variant(c: Candidate) -> str:
    """None of the LoRA variants that compute something other than s·B·A, and no setting that is not known."""
    return _objection(c, "variant")


@rule("config", required=True)
def alpha(c: Candidate) -> str:
    """lora_alpha is a number other than 0."""
    return _objection(c, "alpha")


@rule("config", required=True)
def pattern_form(c: Candidate) -> str:
    """rank_pattern and alpha_pattern are simple: module names, at most a few wildcards, numbers."""
    return _objection(c, "pattern-form")


@rule("config", sets=("study",))
def eva(c: Candidate) -> str:
    """Not initialised by EVA."""
    value = c.config.get("init_lora_weights")
    return f"init_lora_weights = {show(value)}" if isinstance(value, str) and value.lower() == "eva" else ""


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
    if WEIGHTS in c.files:
        return ""
    found = sorted(name for name in c.files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    return f"its weights are a pickle ({found[0]}), which can run code and is never opened" if found else ""


@rule("header", required=True)
def weights_file(c: Candidate) -> str:
    """There is an `adapter_model.safetensors`, of at most 16 GiB."""
    if WEIGHTS not in c.files:
        return f"no {WEIGHTS}"
    size = c.size(WEIGHTS)
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
def keys(c: Candidate) -> str:
    """Every tensor is a LoRA factor of a layer, or the base's own weight of such a layer; at most 20,000 of them."""
    if len(c.header) > MAX_TENSORS:
        return f"the file holds {len(c.header):,} tensors, expected at most {MAX_TENSORS:,}"
    if not c.header:
        return "the file holds no tensor"
    return c.layout.problem or toilsome(c.config, c.pairs)


@rule("header", required=True)
def dtype(c: Candidate) -> str:
    """Tensors are fp64, fp32, fp16 or bf16."""
    odd = {key: entry["dtype"] for key, entry in c.header.items() if entry["dtype"] not in WIDTH}
    return (
        f"{show(next(iter(odd)))} is of type {show(next(iter(odd.values())))}, expected {', '.join(WIDTH)}"
        if odd
        else ""
    )


@rule("header", required=True)
def pairs(c: Candidate) -> str:
    """Every A has its B."""
    for module, pair in c.pairs.items():
        if len(pair) != 2:
            return f"{module} has lora_{next(iter(pair))} only, expected a pair of A (r, d_in) and B (d_out, r)"
    return ""


@rule("header", required=True)
def shapes(c: Candidate) -> str:
    """A is (r, d_in) and B (d_out, r), with one r of at least 1 and at most 4,096."""
    for module, pair in c.pairs.items():
        a, b = pair["A"], pair["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            return f"{module} has A {a} and B {b}, expected (r, d_in) and (d_out, r) with one r ≥ 1"
        if a[0] > MAX_RANK:
            return f"{module} has rank {a[0]:,}, expected at most {MAX_RANK:,}"
    return ""


@rule("header")
def rank(c: Candidate) -> str:
    """The tensors' ranks are the configuration's, without which the scale α/r is ambiguous."""
    patterns, common = c.config.get("rank_pattern"), c.config.get("r", 8)
    for module, pair in c.pairs.items():
        r, place = pair["A"][0], c.places.get(module, module)
        told = looked_up(patterns, module, common)
        if type(told) is not int or told != r:
            return f"{module} has rank {r}, but {CONFIG} says {show(told)}"
        if looked_up(patterns, place, common) != told or scaling(c.config, place, r) != scaling(c.config, module, r):
            return f"{CONFIG} has a rank or α for {place}, the base's name for {module}, and another for that"
    return ""


@rule("header")
def targets(c: Candidate) -> str:
    """target_modules, where it is a list, names every module in the file, and no other setting leaves one out."""
    kept = targeted(c.config, {*c.pairs, *c.places.values()})
    lost = [m for m in c.pairs if m not in kept and c.places.get(m) not in kept]
    if c.config.get("ensure_weight_tying"):  # which adds the layer tied to a target
        lost = [m for m in lost if any(part.isdecimal() for part in m.split("."))]
    if not lost:
        return ""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    said = ", ".join(f"{key} = {show(c.config[key])}" for key in keys if c.config.get(key) is not None)
    return f"under {said} peft has no place for {len(lost)} of {len(c.pairs)} modules, such as {lost[0]}"


@rule("header")
def base_layers(c: Candidate) -> str:
    """Every module is a layer of the base, by its name or by one that can only mean that layer."""
    lost = [module for module in c.pairs if module not in c.places]
    if not lost:
        return ""
    return (
        f"{len(lost)} of {len(c.pairs)} modules are not in the base: {', '.join(map(show, lost[:5]))}"
        f"{', …' if len(lost) > 5 else ''}; the base has layers such as {next(iter(c.shapes), None)!r}"
    )


@rule("header")
def base_shape(c: Candidate) -> str:
    """Every module has the shape of the base's layer."""
    for module, pair in c.pairs.items():
        got = pair["B"][0], pair["A"][1]
        want = c.shapes.get(c.places.get(module)) if c.shapes is not None else None
        if want is not None and got != tuple(want):
            other = (
                "the vocabulary was resized, or it is"
                if got[0] == want[0] and module in c.layout.embeddings
                else "it is"
            )
            return f"{module} is {got[0]}×{got[1]}, the base's is {want[0]}×{want[1]}: {other} of another base"
    return ""


@rule("header", sets=("study",))
def embeddings(c: Candidate) -> str:
    """No LoRA on an embedding."""
    found = sorted(c.layout.embeddings)
    return f"{len(found)} modules are embeddings, such as {show(found[0])}" if found else ""


@rule("values", required=True)
def finite(c: Candidate) -> str:
    """No NaN and no infinity, in the files or once scaled."""
    try:
        if math.isfinite(c.norm):
            return ""
        bad = next((module for module, f in c.source if not torch.isfinite(f.B).all()), "")
        return f"{bad} is not finite once it is multiplied by its scale" if bad else ""
    except AdapterError:
        bad = list(_unfinished(c))
        return f"{len(bad)} tensors hold NaN or infinite values, such as {min(bad)}" if bad else ""


def _unfinished(c: Candidate) -> Iterator[str]:
    """Names of the tensors that are not finite in fp32; none, where the file cannot be read."""
    try:
        with safe_open(c.folder / WEIGHTS, framework="pt") as file:
            yield from (key for key in file.keys() if not torch.isfinite(file.get_tensor(key).float()).all())  # noqa: SIM118
    except (SafetensorError, OSError):
        return


@rule("values", required=True)
def readable(c: Candidate) -> str:
    """Whatever else the reader of adapters objects to."""
    try:
        c.measured  # noqa: B018
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
