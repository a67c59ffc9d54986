"""What a plain LoRA is: the settings under which a layer changes by s·B·A and by nothing else, and the scale s.

Everything is read from `adapter_config.json`, a stranger's file: nothing in it is run unless it is known to end.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from workbench.errors import AdapterError

__all__ = ["CONFIG", "WEIGHTS", "objections", "read_config", "scaling", "show", "tame", "toilsome"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_PATTERNS, MAX_STEPS = 2000, 10**9
# Initialisations that leave the base's own weights as they are (peft docs, LoraConfig.init_lora_weights). Of those that
# do not, s·B·A is only a part of what was learnt; peft can convert them (`path_initial_model_for_weight_conversion`).
_HARMLESS = ("gaussian", "orthogonal", "eva", "mica")
_ALTERING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of LoRA variants that compute something else, or train more, than s·B·A.
_VARIANTS = (
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Settings of the same look that change how a LoRA starts or trains, not what it computes.
_TRAINING = (
    "use_dora",  # has its own objection
    "use_rslora",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "megatron_config",
    "runtime_config",
)
# What a stranger's regular expression may be made of: no quantifier on a group, so that matching cannot take for ever.
_TAME = re.compile(r"(?:[\w-]|\\[.\-d]\+?|\.[*+]?|[|^$)]|\[[\w-]+\]|\((?:\?:)?)+")


def show(value, limit: int = 80) -> str:
    """A stranger's value as it may appear in a message: printable, and not too long."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def scaling(config: Mapping, module: str, rank: int) -> float:
    """The factor s that peft puts before B A for one module: α/r, or α/√r with rslora; α from alpha_pattern."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_config(folder: str | Path) -> dict:
    """Read and check `adapter_config.json`.

    Raises:
        AdapterError: the folder or file is missing, is not JSON, or asks for something that is not plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected an adapter folder, found {'a file' if folder.exists() else 'nothing'}")
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder.name}: no {CONFIG}; a PEFT folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder.name}: {CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder.name}: {CONFIG} holds a {type(config).__name__}, expected an object")
    for _, reason in objections(config):
        raise AdapterError(f"{folder.name}: {reason}")
    return config


def objections(config: Mapping) -> Iterator[tuple[str, str]]:
    """(screening rule, reason) for each setting that makes an adapter other than, or more than, s·B·A with a known s."""
    if config.get("peft_type") != "LORA":
        yield "peft-type", f"peft_type is {show(config.get('peft_type'))}, expected 'LORA'"
    if config.get("use_dora"):
        yield "dora", "use_dora is set: DoRA also trains a magnitude, so ΔW is not s·B·A"
    if config.get("modules_to_save"):
        yield (
            "modules-to-save",
            f"modules_to_save = {show(config['modules_to_save'])}: whole layers were trained beside the LoRA",
        )
    if config.get("bias", "none") != "none":
        yield "bias", f"bias = {show(config['bias'])}: biases of the base were trained"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_ALTERING):
        yield "init", f"init_lora_weights = {show(start)}: this initialisation altered the base's weights"
    elif not (start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _HARMLESS)):
        yield (
            "init",
            f"init_lora_weights = {show(start)} is not known here, so it may have altered the base's weights; "
            f"known not to are True, False, {', '.join(map(repr, _HARMLESS))}",
        )
    for name in _VARIANTS:
        if config.get(name):
            yield "variant", f"{name} is set: the update is not s·B·A"
    for name in sorted(config):
        switch = name.startswith("use_") or name.endswith("_config")
        if switch and config[name] and name not in _VARIANTS + _TRAINING:
            yield "variant", f"{show(name)} is set and not known here: the update may not be s·B·A"
    if not _number(config.get("lora_alpha", 8)):
        yield "alpha", f"lora_alpha is {show(config['lora_alpha'])}, expected a finite number other than 0"
    for key in ("rank_pattern", "alpha_pattern"):
        if reason := _pattern(key, config.get(key) or {}):
            yield "pattern-form", reason
    if not isinstance(config.get("task_type"), str | None):
        yield "readable", f"task_type is {show(config['task_type'])}, expected a text"


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < 1e30


def _pattern(key: str, patterns) -> str:
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        return f"{key} is {show(patterns)}, expected an object with at most {MAX_PATTERNS:,} entries"
    for pattern, value in patterns.items():
        if not tame(pattern):
            return f"{key} holds the regular expression {show(pattern)}, which is too intricate to be run"
        if not _number(value):
            return f"{key} of {show(pattern)} is {show(value)}, expected a finite number other than 0"
    return ""


def tame(pattern: str) -> bool:
    """Whether a stranger's regular expression may be run: a name, with a few wildcards."""
    if len(pattern) > 300 or not _TAME.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return _wildcards(pattern) <= 3 and pattern.count("|") <= 8


def _wildcards(pattern: str) -> int:
    return pattern.count("*") + pattern.count("+")


def toilsome(config: Mapping, modules: Collection[str]) -> str:
    """'' where the patterns can be looked up for these modules in good time, or the reason why not.

    k wildcards in a row, peft's own leading one counted, can be laid over a name of n letters in C(n + k, k) ways; that is
    what one match may cost.
    """
    patterns = [p for key in ("rank_pattern", "alpha_pattern") for p in config.get(key) or {}]
    kinds = Counter((1 + p.count("|"), 1 + _wildcards(p)) for p in patterns)
    lengths = Counter(map(len, modules))
    steps = sum(
        count * ways * times * math.comb(n + k, k) for (ways, k), count in kinds.items() for n, times in lengths.items()
    )
    if steps <= MAX_STEPS:
        return ""
    return (
        f"looking {len(patterns):,} patterns up for {len(modules):,} modules may take {steps:,} steps, "
        f"expected at most {MAX_STEPS:,}"
    )
