"""What a plain LoRA is: the settings under which a layer changes by s·B·A and by nothing else, and the scale s.

Everything is read from `adapter_config.json`, a stranger's file: nothing in it is run unless it is known to end.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from workbench.errors import AdapterError

__all__ = [
    "CONFIG",
    "MAX_CONFIG",
    "SETTINGS",
    "WEIGHTS",
    "looked_up",
    "objections",
    "read_config",
    "scaling",
    "show",
    "steps",
    "tame",
    "toilsome",
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG = 2**20  # bytes
MAX_PATTERNS, MAX_STEPS = 2000, 5 * 10**8  # steps of matching: a processor takes some 10⁹ a second
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
# The other settings of peft's LoraConfig up to 0.21: they have an objection or a rule of their own, enter the scale,
# or change how a LoRA starts, trains and runs, not what it computes.
_OTHERS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_dropout",
        "fan_in_fan_out",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("use_dora", "modules_to_save", "bias", "init_lora_weights", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config"),
    "runtime_config",
)
SETTINGS = frozenset(_VARIANTS + _OTHERS)
# What training frameworks and people write beside peft's own settings, and peft does not read.
_REMARKS = (
    *("merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_type", "transformers_version"),
    *("name", "version", "author", "date", "license", "url", "description", "comment", "note", "notes", "tags"),
    *("dataset", "datasets", "metadata", "training"),
)
# What settings that are read here beside the scale's may be, where they are set.
_FORMS: dict[str, tuple[str, Callable]] = {
    key: (said, fits)
    for said, fits, keys in (
        ("a text", lambda v: isinstance(v, str), ("base_model_name_or_path", "task_type")),
        (
            "a text or a list of texts",
            lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(each, str) for each in v)),
            ("target_modules", "exclude_modules", "layers_pattern"),
        ),
        (
            "a number or a list of numbers",
            lambda v: all(type(each) is int for each in (v if isinstance(v, list) else [v])),
            ("layers_to_transform",),
        ),
    )
    for key in keys
}
# What a stranger's regular expression may be made of: no quantifier on a group, so that matching cannot take for ever.
_TAME = re.compile(r"(?:[\w-]|\\[.\-d]\+?|\.[*+]?|[|^$)]|\[[\w-]+\]|\((?:\?:)?)+")


def show(value, limit: int = 80) -> str:
    """A stranger's value as it may appear in a message: printable, and not too long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__} too intricate to be shown"
    return text if len(text) <= limit else text[:limit] + "…"


def scaling(config: Mapping, module: str, rank: int) -> float:
    """The factor s that peft puts before B A for one module: α/r, or α/√r with rslora; α from alpha_pattern."""
    alpha = looked_up(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def looked_up(patterns: Mapping | None, module: str, otherwise):
    """What peft finds in a rank_pattern or an alpha_pattern for a module: the value of the first pattern that fits."""
    first = _first(tuple(patterns), module) if patterns else None
    return otherwise if first is None else patterns[first]


@lru_cache(2**14)
def _first(patterns: tuple[str, ...], module: str) -> str | None:
    return next((pattern for pattern in patterns if _compiled(pattern).match(module)), None)


@lru_cache(2 * MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern:
    """As peft asks for a pattern; `re` itself remembers 512 only, and an adapter's patterns are asked for in turn."""
    return re.compile(rf"(.*\.)?({pattern})$")


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
    if (size := path.stat().st_size) > MAX_CONFIG:
        raise AdapterError(f"{folder.name}: {CONFIG} has {size:,} bytes, expected at most {MAX_CONFIG:,}")
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
        if config[name] and name not in SETTINGS and name not in _REMARKS and not name.startswith("_"):
            yield "variant", f"{show(name)} is set and not known here: the update may not be s·B·A"
    if not _number(config.get("lora_alpha", 8)):
        yield "alpha", f"lora_alpha is {show(config['lora_alpha'])}, expected a finite number other than 0"
    for key in ("rank_pattern", "alpha_pattern"):
        if reason := _pattern(key, config.get(key) or {}):
            yield "pattern-form", reason
    for key, (said, fits) in _FORMS.items():
        if config.get(key) is not None and not fits(config[key]):
            yield "config-json", f"{key} is {show(config[key])}, expected {said}"


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


@lru_cache(2 * MAX_PATTERNS)
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


def steps(patterns: Iterable[str], modules: Iterable[str]) -> int:
    """What looking tame patterns up for modules may cost.

    k wildcards in a row, peft's own leading one counted, can be laid over a name of n letters in C(n + k, k) ways; that is
    what one match may cost; 300, and 40 for each dot that peft's wildcard may end at, is what each costs at least.
    """
    kinds = Counter((1 + p.count("|"), 1 + _wildcards(p)) for p in patterns)
    names = Counter((len(m), m.count(".")) for m in modules)
    return sum(
        count * times * (300 + 40 * dots + ways * math.comb(n + k, k))
        for (ways, k), count in kinds.items()
        for (n, dots), times in names.items()
    )


def toilsome(config: Mapping, modules: Collection[str]) -> str:
    """'' where the patterns can be looked up for these modules in good time, or the reason why not."""
    patterns = [p for each in {tuple(config.get(key) or ()) for key in ("rank_pattern", "alpha_pattern")} for p in each]
    cost = steps(patterns, modules)
    if cost <= MAX_STEPS:
        return ""
    return (
        f"looking {len(patterns):,} patterns up for {len(modules):,} modules may take {cost:,} steps, "
        f"expected at most {MAX_STEPS:,}"
    )
