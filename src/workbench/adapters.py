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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.card import model_card
from workbench.errors import AdapterError
from workbench.keys import layout, locate, tensor_names
from workbench.licences import stated
from workbench.plain import CONFIG, WEIGHTS, read_config, scaling, toilsome

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Factors", "read_config", "scaled", "scaling"]

# peft's task types under which it adds no head of its own, which a plain LoRA could not bring along.
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Factors:
    """One module's low-rank update ΔW = B A.

    B is (d_out, r) and A (r, d_in), both fp32; the file's scaling s is folded into B and kept in `scale`, so that
    `raw_B` gives back what the file held (LoraHub's factor space and the random control's σ are defined on that).
    An `embedding` is a linear layer on one-hot tokens: its A is (r, vocabulary), its B (width, r), as peft stores them.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def raw_B(self) -> Tensor:
        return self.B / self.scale

    def delta(self) -> Tensor:
        """ΔW, (d_out, d_in)."""
        return self.B @ self.A


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
        folder = Path(folder)
        config = read_config(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
            raise AdapterError(f"{folder.name}: no {WEIGHTS}{hint}")
        left_out, modules = {}, {}
        try:
            with safe_open(path, framework="pt") as file:
                found = layout(file.keys())
                if problem := found.problem or toilsome(config, found.pairs):
                    raise AdapterError(f"{folder.name}: {problem}")
                if not found.pairs:
                    raise AdapterError(f"{folder.name}: {WEIGHTS} holds no LoRA factors")
                left_out |= dict.fromkeys(found.copies, "a copy of the base's own weight, which a LoRA leaves frozen")
                places = {module: module for module in found.pairs}
                if shapes is not None:
                    places = _placed(folder.name, found.pairs, shapes)
                    left_out |= {m: "the base has no such layer" for m in found.pairs if m not in places}
                for module, place in places.items():
                    pair = {side: file.get_tensor(key) for side, key in found.pairs[module].items()}
                    factors = _factors(folder.name, module, pair, config)
                    modules[place] = replace(factors, embedding=module in found.embeddings)
        except SafetensorError as error:
            raise AdapterError(f"{folder.name}: {WEIGHTS} is damaged ({error}); fetch it again") from error
        info = {"config": config, **stated(folder)} | ({"left_out": left_out} if left_out else {})
        return cls(name or folder.name, modules, config.get("base_model_name_or_path") or "", info)

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
        if folder.exists() and not folder.is_dir():
            raise AdapterError(f"{folder} is a file; choose another folder")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise AdapterError(f"{folder} exists already; choose another folder or pass overwrite=True")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).exists():
            raise AdapterError(
                f"{folder} holds no {CONFIG}, so it is not an adapter's to overwrite; choose another folder"
            )
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
        """‖ΔW‖_F over all modules, from the factors alone: ‖BA‖² = Σ (BᵀB ∘ AAᵀ), in fp64, where no fp32 overflows."""
        pairs = [(f.B.double(), f.A.double()) for f in self.modules.values()]
        total = sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in pairs)
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
            factors = self.modules[module]
            scale = torch.tensor(factors.scale, dtype=torch.float32).item()  # fp32, as a stack keeps it
            total.update(f"{module}|{tuple(factors.B.shape)}|{tuple(factors.A.shape)}|{scale!r}|".encode())
            for tensor in (factors.B, factors.A):
                total.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return total.hexdigest()


def _placed(name: str, modules: Mapping, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    places = locate(modules, shapes)
    if not places:
        raise AdapterError(
            f"{name}: none of its {len(modules)} modules is in the base; it has such as {next(iter(modules))!r}, the base "
            f"{next(iter(shapes), None)!r}"
        )
    return places


def scaled(info: Mapping, weight: float) -> dict:
    """What an update says of itself once it is multiplied by a number: λ is multiplied too."""
    options = info.get("options", {})
    return {**info, "options": {**options, "scale": options["scale"] * weight}} if "scale" in options else dict(info)


def _factors(name: str, module: str, pair: Mapping[str, Tensor], config: Mapping) -> Factors:
    if set(pair) != {"A", "B"}:
        missing = ({"A", "B"} - set(pair)).pop()
        raise AdapterError(
            f"{name}: {module} has no lora_{missing}; expected a pair of factors A (r, d_in) and B (d_out, r)"
        )
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{name}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected (r, d_in) and (d_out, r) with one r ≥ 1"
        )
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{name}: {module} holds NaN or infinite values")
    scale = scaling(config, module, a.shape[0])
    return Factors((b * scale).contiguous(), a.contiguous(), scale)


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
