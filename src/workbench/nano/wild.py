"""Adapters as they are found in the wild: made by code, one for each way to be broken.

    expected = make("out/wild")       # folder name → the screening rule that refuses it ('' for those that are sound)

Each is a sound random adapter with one thing wrong (`broken`, `odd`), so that a screening rule that lets it pass is seen
at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.adapters import CONFIG, WEIGHTS
from workbench.base import Base
from workbench.nano import odd  # noqa: F401  # registers its own
from workbench.nano.broken import BREAKAGES, EMBEDDING, RANK, STUDY_ONLY, Draft
from workbench.nano.shelf import BASE, NAME
from workbench.screen import base_shapes

__all__ = ["BREAKAGES", "NAME", "STUDY_ONLY", "make", "sound", "write"]


def make(folder: str | Path, base: Base | str | Path | None = None, *, seed: int = 0) -> dict[str, str]:
    """Write every broken adapter under `folder`.

    Args:
        base: what they pretend to be of: a `Base`, the folder of one, or None for the bundled one.

    Returns:
        Folder name → name of the screening rule that refuses it under the default rules, '' for the sound ones.
    """
    shapes = base.layers if isinstance(base, Base) else base_shapes(str(base or BASE))
    name = NAME if base is None else base.name if isinstance(base, Base) else str(base)
    for i, (key, (_, change)) in enumerate(BREAKAGES.items()):
        draft = sound(shapes, name, seed=1000 * seed + i)
        change(draft)
        write(draft, Path(folder) / key)
    return {key: rule for key, (rule, _) in BREAKAGES.items()}


def sound(shapes: Mapping[str, tuple[int, int]], base: str, *, seed: int = 0) -> Draft:
    """A random adapter with nothing wrong, of all projections in a base's layers (module → (d_out, d_in))."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    layers = {module: shape for module, shape in shapes.items() if ".layers." in module}
    for module, (d_out, d_in) in layers.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, d_in, generator=generator) / math.sqrt(d_in)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, RANK, generator=generator) / math.sqrt(d_out)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in layers}),
        "bias": "none",
        "inference_mode": True,
    }
    return Draft(config, tensors, embedding=shapes[EMBEDDING])


def write(draft: Draft, folder: Path) -> None:
    """Write a draft as a PEFT folder, and do to it what is to be done afterwards."""
    folder.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in draft.tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(draft.config, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(draft.card, encoding="utf-8")
    draft.after(folder)
