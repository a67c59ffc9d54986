"""The ways in which adapters found in the wild are broken: one change to a sound draft each, with the rule that sees it.

    rule, change = BREAKAGES["nan-value"]       # the screening rule that should see it ('' for none), and the change
    change(draft)

Here are values, bases and files; `nano.odd` has those that are no plain LoRA, or only look broken. `wild.make` writes all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench.adapters import CONFIG, WEIGHTS

__all__ = ["BREAKAGES", "EMBEDDING", "RANK", "STUDY_ONLY", "Draft", "broken"]

RANK = 4
EMBEDDING = "model.embed_tokens"


@dataclass
class Draft:
    """An adapter about to be written: its configuration, tensors, card, and what is done to the folder afterwards.

    `embedding` is the base's own: (width, vocabulary).
    """

    config: dict
    tensors: dict[str, torch.Tensor]
    card: str = "A perfectly ordinary adapter.\n"
    after: Callable[[Path], None] = lambda folder: None
    embedding: tuple[int, int] = (0, 0)

    def keys(self, side: str) -> list[str]:
        """The tensors' names of one side, A or B."""
        return [key for key in self.tensors if f".lora_{side}." in key]

    def rename(self, old: str, new: str) -> None:
        """Replace part of every tensor's name."""
        self.tensors = {key.replace(old, new): tensor for key, tensor in self.tensors.items()}


BREAKAGES: dict[str, tuple[str, Callable[[Draft], None]]] = {}
STUDY_ONLY: dict[str, str] = {}  # sound by our own rules, refused by the recycling study's: folder name → its rule


def broken(rule: str = "", *, name: str = "", study: str = ""):
    """Register a way to be broken with the rule that should see it ('' for what only looks broken)."""

    def register(change):
        key = name or change.__name__.replace("_", "-")
        BREAKAGES[key] = (rule, change)
        if study:
            STUDY_ONLY[key] = study
        return change

    return register


# -- values --------------------------------------------------------------------------------------------------------


@broken("finite")
def nan_value(d: Draft) -> None:
    """One NaN in a B."""
    d.tensors[d.keys("B")[0]][0, 0] = math.nan


@broken("finite")
def infinite_value(d: Draft) -> None:
    """One infinity in an A."""
    d.tensors[d.keys("A")[-1]][-1, -1] = -math.inf


@broken("finite")
def overflow_in_float64(d: Draft) -> None:
    """Values that fp64 holds and fp32 does not."""
    key = d.keys("A")[0]
    d.tensors[key] = d.tensors[key].double() * 1e200


@broken("zero-norm")
def never_trained(d: Draft) -> None:
    """Every B zero, as at the start of training."""
    for key in d.keys("B"):
        d.tensors[key].zero_()


@broken("large-norm")
def exploded(d: Draft) -> None:
    """A norm far above 1000."""
    for key in d.keys("B"):
        d.tensors[key] *= 1e4


@broken(study="small-norm")
def faint(d: Draft) -> None:
    """A norm below the study's limit of 1."""
    for key in d.keys("B"):
        d.tensors[key] *= 1e-3


# -- another base --------------------------------------------------------------------------------------------------


@broken("base-shape")
def wider_base(d: Draft) -> None:
    """Its layers take twice as many inputs as the base's."""
    for key in d.keys("A"):
        d.tensors[key] = torch.cat([d.tensors[key], d.tensors[key]], 1)


@broken("base-layers")
def deeper_base(d: Draft) -> None:
    """Its first layer is a hundredth, which the base does not have."""
    d.rename(".layers.0.", ".layers.99.")


@broken("base-layers")
def unknown_targets(d: Draft) -> None:
    """Its modules have names that the base's layers do not have."""
    d.rename("_proj.lora", "_projection.lora")
    d.config["target_modules"] = [t.replace("_proj", "_projection") for t in d.config["target_modules"]]


@broken("base-name")
def other_base_name(d: Draft) -> None:
    """Its configuration names another base."""
    d.config["base_model_name_or_path"] = "someone/another-model"


# -- files ---------------------------------------------------------------------------------------------------------


@broken("weights-file")
def no_weights(d: Draft) -> None:
    """No weights at all."""
    d.after = lambda folder: (folder / WEIGHTS).unlink()


@broken("config-file")
def no_config(d: Draft) -> None:
    """No configuration."""
    d.after = lambda folder: (folder / CONFIG).unlink()


@broken("config-json")
def config_not_json(d: Draft) -> None:
    """A configuration in YAML."""
    d.after = lambda folder: (folder / CONFIG).write_text("r: 4\nlora_alpha: 8\n")


@broken("config-json")
def config_a_list(d: Draft) -> None:
    """A configuration that is a list."""
    d.after = lambda folder: (folder / CONFIG).write_text("[]")


@broken("config-json")
def config_too_deep(d: Draft) -> None:
    """A configuration of a hundred thousand brackets, which a parser would nest its calls for."""
    d.after = lambda folder: (folder / CONFIG).write_text("[" * 100_000)


@broken("config-json")
def config_too_large(d: Draft) -> None:
    """A configuration of 2 MB."""
    d.config["comment"] = "x" * 2**21


@broken("pickle")
def only_a_pickle(d: Draft) -> None:
    """Weights that run code when they are read, and no others."""

    def after(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        # A protocol-0 pickle that would create a file where it was loaded.
        (folder / "adapter_model.bin").write_bytes(b"cbuiltins\nopen\n(S'opened.txt'\nS'w'\ntR.")

    d.after = after


@broken("header")
def truncated(d: Draft) -> None:
    """The last third of the weights is missing."""
    d.after = lambda folder: _rewrite(folder, lambda data: data[: len(data) * 2 // 3])


@broken("header")
def huge_header(d: Draft) -> None:
    """The weights claim a header of a terabyte."""
    d.after = lambda folder: _rewrite(folder, lambda data: struct.pack("<Q", 2**40) + data[8:])


@broken("header")
def header_not_json(d: Draft) -> None:
    """One byte of the header is wrong."""
    d.after = lambda folder: _rewrite(folder, lambda data: data[:8] + b"!" + data[9:])


@broken("header")
def empty_file(d: Draft) -> None:
    """Weights of no bytes."""
    d.after = lambda folder: _rewrite(folder, lambda data: b"")


@broken("symlink")
def link_to_outside(d: Draft) -> None:
    """The weights are a link to a file of somewhere else."""

    def after(folder: Path) -> None:
        elsewhere = folder.parent / ".elsewhere.safetensors"
        (folder / WEIGHTS).rename(elsewhere)
        (folder / WEIGHTS).symlink_to(elsewhere)

    d.after = after


def _rewrite(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
