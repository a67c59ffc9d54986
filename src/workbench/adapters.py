"""Adapters in and out: PEFT folders read into factors, checked, and written so that plain peft loads them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.card import model_card
from workbench.errors import AdapterError
from workbench.keys import tensor_names
from workbench.plain import CONFIG, WEIGHTS, read_config, scaling
from workbench.source import Factors, Source, feed, squared

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Factors", "check_free", "read_config", "scaled", "scaling"]

# peft's task types under which it adds no head of its own, which a plain LoRA could not bring along.
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Adapter:
    """A named factored update: module path in the base → `Factors`.

    What a PEFT folder holds, and what every factored merge returns. `info` says where it came from: the file's
    config for one that was read, method, options and sources for one that was made.
    """

    name: str
    modules: dict[str, Factors]
    base: str = ""
    info: dict = field(default_factory=dict)

    @classmethod
    def load(
        cls, folder: str | Path, name: str | None = None, *, shapes: Mapping[str, tuple[int, int]] | None = None
    ) -> Adapter:
        """Read a PEFT folder (safetensors only, never a pickle).

        Args:
            shapes: the base's layers (`Base.layers`), where they are known. Modules are then brought to its names
                (`model.model.…`, `language_model.model.…` or no prefix at all for `model.…`, where only one layer can be
                meant), and those that it lacks are left out.

        Returns:
            The adapter; `info["left_out"]` (name → reason) has the modules left out, and copies of the base's own frozen
            weights that the file holds besides.

        Raises:
            AdapterError: naming the folder, and the module where one is at fault: missing or truncated files, not a
                plain LoRA, unpaired factors, ranks that disagree, values that are not finite, no module of the base.
        """
        source = Source(folder, name, shapes=shapes)
        return cls(source.name, dict(source), source.base, source.info)

    def save(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        card: str | None = None,
    ) -> Path:
        """Write a PEFT folder that plain peft loads: s is folded in, so `lora_alpha = r` and rslora is off.

        Modules of unequal rank get `rank_pattern` and `alpha_pattern`. The folder appears whole or not at all.

        Raises:
            AdapterError: there is nothing to write, the target exists (unless `overwrite`), or a value is not finite.
        """
        folder = Path(folder)
        if not self.modules:
            raise AdapterError(f"{self.name}: holds no module, so there is nothing to save")
        check_free(folder, overwrite)
        tensors = {}
        for module, factors in self.modules.items():
            keys = tensor_names(module, factors.embedding)
            for side, tensor in (("A", factors.A), ("B", factors.B)):
                stored = tensor.detach().to("cpu", dtype).contiguous().clone()
                if not torch.isfinite(stored).all():
                    raise AdapterError(
                        f"{self.name}: {module} holds values that are not finite in {dtype}; nothing was written"
                    )
                tensors[keys[side]] = stored
        files = {
            CONFIG: json.dumps(self.peft_config(), indent=2, sort_keys=True) + "\n",
            "README.md": card or model_card(self),
        }
        _write_folder(folder, files, lambda path: save_file(tensors, path / WEIGHTS, metadata={"format": "pt"}))
        return folder

    def push(self, repo_id: str, **settings) -> str:
        """Save this adapter and upload it to the Hub in one commit; settings (private, overwrite, …) as in `push.push`."""
        from workbench.push import push

        return push(self, repo_id, **settings)

    def peft_config(self) -> dict:
        """The `adapter_config.json` under which peft computes exactly Σ B A of these factors."""
        ranks = {module: factors.rank for module, factors in self.modules.items()}
        common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        unequal = {module: rank for module, rank in ranks.items() if rank != common}
        config = self.info.get("config") or {}
        return {
            "peft_type": "LORA",
            "task_type": config["task_type"] if config.get("task_type") in _TASKS else "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": {re.escape(module): rank for module, rank in unequal.items()},
            "alpha_pattern": {re.escape(module): rank for module, rank in unequal.items()},
            "target_modules": sorted(ranks),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "inference_mode": True,
        }

    @property
    def rank(self) -> int:
        """The largest rank over modules."""
        return max((factors.rank for factors in self.modules.values()), default=0)

    def norm(self) -> float:
        """‖ΔW‖_F over all modules, from the factors alone, in fp64."""
        total = sum(map(squared, self.modules.values()))
        return math.sqrt(0.0 if total < 0 else total)  # NaN stays NaN

    def times(self, weight: float) -> Adapter:
        """This update multiplied by a number, λ ΔW (the sign included)."""
        return replace(
            self,
            modules={
                m: replace(f, B=f.B * weight, scale=f.scale * weight if weight else 1.0)
                for m, f in self.modules.items()
            },
            info=scaled(self.info, weight),
        )

    def digest(self) -> str:
        """A content hash (sha256, hex) of modules, shapes, values and scales: independent of name and folder."""
        total = hashlib.sha256()
        for module in sorted(self.modules):
            feed(total, module, self.modules[module])
        return total.hexdigest()


def scaled(info: Mapping, weight: float) -> dict:
    """What an update says of itself once it is multiplied by a number: λ is multiplied too."""
    options = info.get("options", {})
    return {**info, "options": {**options, "scale": options["scale"] * weight}} if "scale" in options else dict(info)


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Check, before anything is computed for it, that an adapter may be written to a folder.

    Raises:
        AdapterError: a file of that name, a folder in use (unless `overwrite`), or one whose content is no adapter.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; choose another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise AdapterError(f"{folder} exists already; choose another folder or pass overwrite=True")
    if not (folder / CONFIG).exists():
        raise AdapterError(f"{folder} holds no {CONFIG}, so it is not an adapter's to overwrite; choose another folder")


def _write_folder(folder: Path, files: Mapping[str, str], write_weights) -> None:
    """Write a folder beside its place and move it there; a folder that it replaces stays until then, and on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_weights(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
