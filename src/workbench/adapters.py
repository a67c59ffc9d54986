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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.card import model_card
from workbench.errors import AdapterError

__all__ = ["Adapter", "Factors", "read_config", "scaling"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Initialisations that subtract something from the base's own weights (peft docs, LoraConfig.init_lora_weights):
# without that altered base, s·B·A alone is not the fine-tuned model.
_ALTERING = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
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
    for reason in _not_plain(config):
        raise AdapterError(f"{folder.name}: {reason}; only a plain LoRA is ΔW = s·B·A and can be merged")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{folder.name}: alpha_pattern is {patterns!r}, expected an object of pattern: α")
    alphas = {"lora_alpha": config.get("lora_alpha", 8)}
    alphas |= {f"alpha_pattern of {pattern}": alpha for pattern, alpha in patterns.items()}
    for where, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < 1e30:
            raise AdapterError(f"{folder.name}: {where} is {alpha!r}, expected a finite number other than 0")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(
                f"{folder.name}: alpha_pattern {pattern!r} is no regular expression ({error})"
            ) from error
    return config


def _not_plain(config: Mapping):
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, expected 'LORA'"
    if config.get("use_dora"):
        yield "use_dora is set (DoRA also trains a magnitude)"
    if config.get("modules_to_save"):
        yield f"modules_to_save = {config['modules_to_save']} (whole layers beside the LoRA)"
    if config.get("bias", "none") != "none":
        yield f"bias = {config['bias']!r} (biases of the base were trained)"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_ALTERING):
        yield f"init_lora_weights = {init!r} (this initialisation altered the base's weights)"
    for name in _VARIANTS:
        if config.get(name):
            yield f"{name} is set"


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
    def load(cls, folder: str | Path, name: str | None = None) -> Adapter:
        """Read a PEFT folder (safetensors only, never a pickle).

        Raises:
            AdapterError: naming the folder, and the module where one is at fault: missing or truncated files, not a
                plain LoRA, unpaired factors, ranks that disagree, values that are not finite.
        """
        folder = Path(folder)
        config = read_config(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
            raise AdapterError(f"{folder.name}: no {WEIGHTS}{hint}")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise AdapterError(f"{folder.name}: {WEIGHTS} is damaged ({error}); fetch it again") from error
        pairs: dict[str, dict[str, Tensor]] = {}
        strange = []
        for key in sorted(tensors):
            match = _KEY.match(key)
            if match:
                pair = pairs.setdefault(match["module"], {})
                if match["side"] in pair:
                    raise AdapterError(
                        f"{folder.name}: {match['module']} has lora_{match['side']} twice, as {key!r} too"
                    )
                pair[match["side"]] = tensors[key]
            else:
                strange.append(key)
        if strange:
            raise AdapterError(
                f"{folder.name}: {len(strange)} tensors are not LoRA factors of a linear layer, such as {strange[0]!r}"
            )
        if not pairs:
            raise AdapterError(f"{folder.name}: {WEIGHTS} holds no LoRA factors")
        modules = {module: _factors(folder.name, module, pair, config) for module, pair in pairs.items()}
        return cls(name or folder.name, modules, config.get("base_model_name_or_path") or "", {"config": config})

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
            for side, tensor in (("A", factors.A), ("B", factors.B)):
                stored = tensor.detach().to("cpu", dtype).contiguous().clone()
                if not torch.isfinite(stored).all():
                    raise AdapterError(
                        f"{self.name}: {module} holds values that are not finite in {dtype}; nothing was written"
                    )
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = stored
        files = {
            CONFIG: json.dumps(self.peft_config(), indent=2, sort_keys=True) + "\n",
            "README.md": card or model_card(self),
        }
        _write_folder(folder, files, lambda path: save_file(tensors, path / WEIGHTS, metadata={"format": "pt"}))
        return folder

    def peft_config(self) -> dict:
        """The `adapter_config.json` under which peft computes exactly Σ B A of these factors."""
        ranks = {module: factors.rank for module, factors in self.modules.items()}
        common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        unequal = {module: rank for module, rank in ranks.items() if rank != common}
        return {
            "peft_type": "LORA",
            "task_type": self.info.get("task_type", "CAUSAL_LM"),
            "base_model_name_or_path": self.base,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": {re.escape(module): rank for module, rank in unequal.items()},
            "alpha_pattern": {re.escape(module): rank for module, rank in unequal.items()},
            "target_modules": sorted(ranks),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "fan_in_fan_out": bool(self.info.get("config", {}).get("fan_in_fan_out", False)),
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
