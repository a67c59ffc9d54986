"""Names in adapter files: which tensor is whose factor, and which layer of a base a module's name means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.plain import show

__all__ = ["Layout", "layout", "locate", "tensor_names"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?:(?P<linear>[AB])(?:\.default)?\.weight|embedding_(?P<lookup>[AB])(?:\.default)?)$"
)
_COPY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.(?:weight|bias)$")
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
        match = _FACTOR.match(name)
        if not match:
            others.append(name)
            continue
        module, side = match["module"], match["linear"] or match["lookup"]
        if side in pairs.setdefault(module, {}):
            problem = problem or f"{module} has lora_{side} twice, as {show(name, 120)} too"
        elif kinds.setdefault(module, bool(match["lookup"])) != bool(match["lookup"]):
            problem = problem or f"{module} has factors of a linear layer and of an embedding"
        pairs[module][side] = name
    copies = [name for name in others if (match := _COPY.match(name)) and match["module"] in pairs]
    strange = [name for name in others if name not in copies]
    if strange:
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
