"""Names in adapter files: which tensor is whose factor, and which layer of a base a module's name means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from workbench.plain import show, steps, tame

__all__ = ["Layout", "layout", "locate", "targeted", "tensor_names"]

MAX_LOOKED_UP = 10**7  # steps (`plain.steps`) of one expression on all modules
MAX_NAME = 500  # characters; the longest seen in libraries' models have 150
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?:(?P<linear>[AB])(?:\.default)?\.weight|embedding_(?P<lookup>[AB])(?:\.default)?)"
)
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.(?:weight|bias)")
# What frameworks and multi-modal models wrap a language model in, which its name may or may not say, once or twice.
_WRAPPERS = ("base_model", "model", "language_model", "text_model", "transformer", "gpt_neox")
_MARKERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


@dataclass(frozen=True)
class Layout:
    """What the tensors of an adapter file are: `pairs` is module → side ("A", "B") → the tensor's name.

    `embeddings` are the modules whose factors are looked up by token; `copies` the base's own weights of layers that
    have factors, which peft stores beside them (they are frozen, so nothing is lost without them). `problem` says what
    is wrong with the names, '' for nothing.
    """

    pairs: dict[str, dict[str, str]]
    embeddings: frozenset[str]
    copies: tuple[str, ...]
    problem: str


def layout(names: Iterable[str]) -> Layout:
    """Sort out a file's tensors by their names."""
    pairs: dict[str, dict[str, str]] = {}
    kinds: dict[str, bool] = {}
    others, problem = [], ""
    for name in sorted(names):
        if len(name) > MAX_NAME or not name.isprintable():
            problem = problem or f"a tensor's name is not printable, or longer than {MAX_NAME}: {show(name, 120)}"
            continue
        match = _FACTOR.fullmatch(name)
        if not match:
            others.append(name)
            continue
        module, side = match["module"], match["linear"] or match["lookup"]
        if side in pairs.setdefault(module, {}):
            problem = problem or f"{module} has lora_{side} twice, as {show(name, 120)} too"
        elif kinds.setdefault(module, bool(match["lookup"])) != bool(match["lookup"]):
            problem = problem or f"{module} has factors of a linear layer and of an embedding"
        pairs[module][side] = name
    copies = [name for name in others if (match := _COPY.fullmatch(name)) and match["module"] in pairs]
    strange = sorted(set(others) - set(copies))
    if strange and not problem:
        whole = " (a layer stored whole, so trained or resized beside the LoRA)" * strange[0].endswith(".weight")
        problem = f"{len(strange)} tensors are not LoRA factors of a layer, such as {show(strange[0], 120)}{whole}"
    return Layout(pairs, frozenset(module for module, lookup in kinds.items() if lookup), tuple(copies), problem)


def tensor_names(module: str, embedding: bool) -> dict[str, str]:
    """Side → the name under which plain peft stores that factor."""
    if embedding:
        return {side: f"{_PREFIX}{module}.lora_embedding_{side}" for side in "AB"}
    return {side: f"{_PREFIX}{module}.lora_{side}.weight" for side in "AB"}


def locate(modules: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """Module → the base's layer that it means, of those that it certainly means.

    A name that the base has is itself. Any other is compared without what it and the base's are wrapped in (`model.`
    once, twice or not at all, `language_model.`, …), and counts where exactly one layer and no other module is left.
    """
    modules, layers = list(modules), dict.fromkeys(layers)
    cores: dict[str, list[str]] = {}
    for layer in layers:
        cores.setdefault(_core(layer), []).append(layer)
    found = {}
    for module in modules:
        meant = [module] if module in layers else cores.get(_core(module), [])
        if len(meant) == 1:
            found[module] = meant[0]
    claims = Counter(found.values())
    return {module: layer for module, layer in found.items() if claims[layer] == 1}


def _core(path: str) -> str:
    parts = [part for part in path.split(".") if part not in _MARKERS]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def targeted(config: Mapping, modules: Collection[str]) -> set[str]:
    """The modules of these names that peft would give a LoRA under a configuration; those too of which it cannot be told.

    As peft's `check_target_module_exists`, without running a stranger's intricate regular expressions.
    """
    wanted, spared = config.get("target_modules"), config.get("exclude_modules")
    kept = set(modules) if wanted is None else _named(wanted, modules, set(modules))
    kept -= _named(spared, modules, set()) if spared else set()
    layers, known = config.get("layers_to_transform"), config.get("layers_pattern")
    before = known if isinstance(known, list) else [known] if known else []
    if not isinstance(wanted, list) or layers in (None, []):
        return kept
    if not all(map(tame, before)) or steps(before, modules) > MAX_LOOKED_UP:
        return kept
    exactly, numbers = set(wanted), set(layers if isinstance(layers, list) else [layers])
    return {m for m in kept if m in exactly or _layer(m, before) in numbers}


def _named(names, modules: Collection[str], otherwise: set[str]) -> set[str]:
    """The modules that a list of names, or one regular expression, names; `otherwise` where it is not run."""
    if isinstance(names, list):
        known = set(names)
        return {m for m in modules if not known.isdisjoint(_suffixes(m))}
    if names == "all-linear" or (names and not (tame(names) and steps([names], modules) <= MAX_LOOKED_UP)):
        return otherwise
    return {m for m in modules if re.fullmatch(names, m)}


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _layer(module: str, before: Collection[str]) -> int | None:
    """The number of the layer that a module is in: after what the first fitting pattern names, or after any one name."""
    tried = (re.match(rf"(?:^|.*?\.){name}\.(?P<number>\d+)\.", module) for name in before or (r"[^.]*",))
    found = next((match["number"] for match in tried if match), None)
    return None if found is None else int(found)
