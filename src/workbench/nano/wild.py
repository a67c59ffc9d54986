"""Adapters as they are found in the wild: made by code, one for each way to be broken.

    expected = make("out/wild")       # folder name → the screening rule that refuses it ('' for those that are sound)

Each is a sound random adapter with one thing wrong, so that a screening rule that lets it pass is seen at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.adapters import CONFIG, WEIGHTS
from workbench.base import Base
from workbench.nano.shelf import BASE
from workbench.screen import base_shapes

__all__ = ["BREAKAGES", "NAME", "STUDY_ONLY", "make"]

NAME = "workbench/nano-base"  # what the bundled pool's configurations call their base
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


def make(folder: str | Path, base: Base | str | Path | None = None, *, seed: int = 0) -> dict[str, str]:
    """Write every broken adapter under `folder`.

    Args:
        base: what they pretend to be of: a `Base`, the folder of one, or None for the bundled one.

    Returns:
        Folder name → name of the screening rule that refuses it under the default rules, '' for the sound ones.
    """
    folder = Path(folder)
    shapes = base.layers if isinstance(base, Base) else base_shapes(str(base or BASE))
    name = NAME if base is None else base.name if isinstance(base, Base) else str(base)
    layers = {m: s for m, s in shapes.items() if ".layers." in m}
    for i, (key, (_, change)) in enumerate(BREAKAGES.items()):
        draft = _sound(layers, name, torch.Generator().manual_seed(1000 * seed + i))
        draft.embedding = shapes[EMBEDDING]
        change(draft)
        target = folder / key
        target.mkdir(parents=True)
        save_file({k: t.contiguous() for k, t in draft.tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        (target / CONFIG).write_text(json.dumps(draft.config, indent=2), encoding="utf-8")
        (target / "README.md").write_text(draft.card, encoding="utf-8")
        draft.after(target)
    return {key: rule for key, (rule, _) in BREAKAGES.items()}


def _sound(shapes: dict[str, tuple[int, int]], base: str, generator: torch.Generator) -> Draft:
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, d_in, generator=generator) / math.sqrt(d_in)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, RANK, generator=generator) / math.sqrt(d_out)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shapes}),
        "bias": "none",
        "inference_mode": True,
    }
    return Draft(config, tensors)


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
    for key in d.keys("A"):
        d.tensors[key] = torch.cat([d.tensors[key], d.tensors[key]], 1)


@broken("base-layers")
def deeper_base(d: Draft) -> None:
    d.rename(".layers.0.", ".layers.99.")


@broken("base-layers")
def unknown_targets(d: Draft) -> None:
    d.rename("_proj.lora", "_projection.lora")
    d.config["target_modules"] = [t.replace("_proj", "_projection") for t in d.config["target_modules"]]


@broken("base-name")
def other_base_name(d: Draft) -> None:
    d.config["base_model_name_or_path"] = "someone/another-model"


# -- files ---------------------------------------------------------------------------------------------------------


@broken("weights-file")
def no_weights(d: Draft) -> None:
    d.after = lambda folder: (folder / WEIGHTS).unlink()


@broken("config-file")
def no_config(d: Draft) -> None:
    d.after = lambda folder: (folder / CONFIG).unlink()


@broken("config-json")
def config_not_json(d: Draft) -> None:
    d.after = lambda folder: (folder / CONFIG).write_text("r: 4\nlora_alpha: 8\n")


@broken("config-json")
def config_a_list(d: Draft) -> None:
    d.after = lambda folder: (folder / CONFIG).write_text("[]")


@broken("config-json")
def config_too_deep(d: Draft) -> None:
    d.after = lambda folder: (folder / CONFIG).write_text("[" * 100_000)


@broken("config-json")
def config_too_large(d: Draft) -> None:
    d.config["comment"] = "x" * 2**21


@broken("pickle")
def only_a_pickle(d: Draft) -> None:
    def after(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        # A protocol-0 pickle that would create a file where it was loaded.
        (folder / "adapter_model.bin").write_bytes(b"cbuiltins\nopen\n(S'opened.txt'\nS'w'\ntR.")

    d.after = after


@broken("header")
def truncated(d: Draft) -> None:
    d.after = lambda folder: _rewrite(folder, lambda data: data[: len(data) * 2 // 3])


@broken("header")
def huge_header(d: Draft) -> None:
    d.after = lambda folder: _rewrite(folder, lambda data: struct.pack("<Q", 2**40) + data[8:])


@broken("header")
def header_not_json(d: Draft) -> None:
    d.after = lambda folder: _rewrite(folder, lambda data: data[:8] + b"!" + data[9:])


@broken("header")
def empty_file(d: Draft) -> None:
    d.after = lambda folder: _rewrite(folder, lambda data: b"")


@broken("symlink")
def link_to_outside(d: Draft) -> None:
    def after(folder: Path) -> None:
        elsewhere = folder.parent / ".elsewhere.safetensors"
        (folder / WEIGHTS).rename(elsewhere)
        (folder / WEIGHTS).symlink_to(elsewhere)

    d.after = after


# -- not a plain LoRA ----------------------------------------------------------------------------------------------


@broken("peft-type")
def ia3(d: Draft) -> None:
    d.config["peft_type"] = "IA3"
    d.tensors = {key.replace("lora_A.weight", "ia3_l"): d.tensors[key][:1] for key in d.keys("A")}


@broken("keys")
def ia3_in_disguise(d: Draft) -> None:
    d.tensors = {key.replace("lora_A.weight", "ia3_l"): d.tensors[key][:1] for key in d.keys("A")}


@broken("dora")
def dora(d: Draft) -> None:
    d.config["use_dora"] = True


@broken("keys")
def dora_in_disguise(d: Draft) -> None:
    for key in d.keys("B"):
        d.tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(d.tensors[key].shape[0])


@broken("modules-to-save")
def whole_head(d: Draft) -> None:
    d.config["modules_to_save"] = ["lm_head"]


@broken("bias")
def biases(d: Draft) -> None:
    d.config["bias"] = "lora_only"


@broken("init")
def pissa(d: Draft) -> None:
    d.config["init_lora_weights"] = "pissa_niter_16"


@broken("variant")
def replicated_layers(d: Draft) -> None:
    d.config["layer_replication"] = [[0, 2], [1, 2]]


@broken("init")
def unheard_of_start(d: Draft) -> None:
    d.config["init_lora_weights"] = "singular_start"


@broken("variant")
def unheard_of_variant(d: Draft) -> None:
    d.config["use_twisted_lora"] = True


@broken("keys")
def whole_embedding(d: Draft) -> None:
    d.tensors[f"base_model.model.{EMBEDDING}.weight"] = torch.zeros(d.embedding[::-1])


@broken("base-shape")
def resized_vocabulary(d: Draft) -> None:
    """An embedding of one token more, its tensors and configuration in order."""
    width, vocabulary = d.embedding
    _embed(d, (width, vocabulary + 1))


def _embed(d: Draft, shape: tuple[int, int]) -> None:
    width, vocabulary = shape
    d.tensors[f"base_model.model.{EMBEDDING}.lora_embedding_A"] = torch.ones(RANK, vocabulary) / 100
    d.tensors[f"base_model.model.{EMBEDDING}.lora_embedding_B"] = torch.ones(width, RANK) / 100
    d.config["target_modules"] = [*d.config["target_modules"], "embed_tokens"]


# -- factors and configuration that do not go together -------------------------------------------------------------


@broken("shapes")
def ranks_disagree(d: Draft) -> None:
    key = d.keys("B")[0]
    d.tensors[key] = d.tensors[key][:, :-1]


@broken("shapes")
def rank_zero(d: Draft) -> None:
    a, b = d.keys("A")[0], d.keys("B")[0]
    d.tensors[a], d.tensors[b] = d.tensors[a][:0], d.tensors[b][:, :0]


@broken("shapes")
def three_dimensions(d: Draft) -> None:
    key = d.keys("A")[0]
    d.tensors[key] = d.tensors[key][None]


@broken("pairs")
def unpaired(d: Draft) -> None:
    del d.tensors[d.keys("B")[0]]


@broken("dtype")
def integers(d: Draft) -> None:
    d.tensors = {key: (100 * tensor).to(torch.int8) for key, tensor in d.tensors.items()}


@broken("rank")
def other_rank_in_config(d: Draft) -> None:
    d.config["r"] = 2 * RANK


@broken("targets")
def untargeted(d: Draft) -> None:
    d.config["target_modules"] = ["c_attn"]


@broken("alpha")
def no_scale(d: Draft) -> None:
    d.config["lora_alpha"] = 0


@broken("pattern-form")
def endless_pattern(d: Draft) -> None:
    d.config["alpha_pattern"] = {"([a-z._0-9]+)+!": 1}


# -- sound, though they do not look it -----------------------------------------------------------------------------


@broken(study="patterns")
def patterns(d: Draft) -> None:
    key = d.keys("A")[0]
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    partner = key.replace("lora_A", "lora_B")
    d.tensors[key], d.tensors[partner] = d.tensors[key][:2], d.tensors[partner][:, :2]
    d.config |= {"rank_pattern": {module.replace(".", r"\."): 2}, "alpha_pattern": {module.replace(".", r"\."): 16}}


@broken(study="embeddings")
def embedding(d: Draft) -> None:
    """A LoRA on the embedding too, with the frozen embedding itself beside it, as peft saves it."""
    _embed(d, d.embedding)
    d.tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"] = torch.zeros(d.embedding[::-1])


@broken(study="eva")
def eva(d: Draft) -> None:
    d.config["init_lora_weights"] = "eva"


@broken()
def prefix_doubled(d: Draft) -> None:
    d.rename("base_model.model.model.", "base_model.model.base_model.model.model.")


@broken()
def no_prefix(d: Draft) -> None:
    d.rename("base_model.model.model.", "")


@broken(study="task-type")
def no_task_type(d: Draft) -> None:
    d.config["task_type"] = None


@broken()
def float64(d: Draft) -> None:
    d.tensors = {key: tensor.double() for key, tensor in d.tensors.items()}


@broken(name="<script>alert(1)<script>")
def script_in_its_name(d: Draft) -> None:
    d.config["note"] = "the weights are sound; the name must be shown escaped"


@broken()
def script_in_its_card(d: Draft) -> None:
    d.card = "# Nice adapter\n\n<script>alert(document.cookie)</script> $\\href{javascript:alert(1)}{x}$\n"


def _rewrite(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
