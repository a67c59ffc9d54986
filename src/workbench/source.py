"""A PEFT folder whose factors stay in the file until a module is asked for: what pools larger than memory are made of.

    source = Source(folder)
    source.modules["model.layers.0.self_attn.q_proj"].rank       # from the header alone
    source.read("model.layers.0.self_attn.q_proj")               # `Factors`

A module is read at the offsets that the checked header states, into memory of its own. The safetensors library would map
the file: its pages stay with the process for as long as the file is open, and opening it for every module of an 8B
model's adapter costs 0.7 ms each time.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import AdapterError
from workbench.header import WIDTH, read_header
from workbench.keys import layout, locate
from workbench.licences import stated
from workbench.plain import WEIGHTS, read_config, scaling, show, toilsome

__all__ = ["Factors", "Slot", "Source", "feed", "finite", "squared"]

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the module."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def raw_B(self) -> Tensor:
        return self.B / self.scale

    def delta(self) -> Tensor:
        """ΔW, (d_out, d_in)."""
        return self.B @ self.A


@dataclass(frozen=True, slots=True)
class Slot:
    """What a file's header says of one module's factors, and where they lie: (type, first byte) of A and of B."""

    rank: int
    shape: tuple[int, int]
    scale: float
    embedding: bool
    A: tuple[str, int]
    B: tuple[str, int]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of A and of B in the file."""
        d_out, d_in = self.shape
        return WIDTH[self.A[0]] * self.rank * d_in, WIDTH[self.B[0]] * self.rank * d_out

    def typed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The file's bytes (uint8, perhaps more than `sizes`) as the matrices that it says they are."""
        shapes = (self.rank, self.shape[1]), (self.shape[0], self.rank)
        a, b = (
            raw[:size].view(_TYPES[kind]).view(shape)
            for raw, size, (kind, _), shape in zip((A, B), self.sizes, (self.A, self.B), shapes, strict=True)
        )
        return a, b


class Source:
    """A PEFT folder (safetensors only, never a pickle), read module by module; no file stays open.

    `name`, `base` and `info` are as an `Adapter`'s; `modules` is module → `Slot`.
    """

    def __init__(
        self, folder: str | Path, name: str | None = None, *, shapes: Mapping[str, tuple[int, int]] | None = None
    ):
        """Read the configuration and the header.

        Args:
            shapes: the base's layers, as in `Adapter.load`.

        Raises:
            AdapterError: as `Adapter.load`, but for values that are not finite.
        """
        folder = Path(folder)
        self._folder, self._path = folder.name, folder / WEIGHTS
        config = read_config(folder)
        if not self._path.is_file():
            pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
            raise AdapterError(f"{self._folder}: no {WEIGHTS}{hint}")
        self._state = _state(self._path.stat())
        try:
            header = read_header(self._path)
        except AdapterError as error:
            raise AdapterError(f"{self._folder}: {WEIGHTS} is damaged ({error}); fetch it again") from error
        found = layout(header)
        if problem := found.problem or toilsome(config, found.pairs):
            raise AdapterError(f"{self._folder}: {problem}")
        if not found.pairs:
            raise AdapterError(f"{self._folder}: {WEIGHTS} holds no LoRA factors")
        left_out = dict.fromkeys(found.copies, "a copy of the base's own weight, which a LoRA leaves frozen")
        places = {module: module for module in found.pairs}
        if shapes is not None:
            places = _placed(self._folder, found.pairs, shapes)
            left_out |= {m: "the base has no such layer" for m in found.pairs if m not in places}
        end = max(entry["data_offsets"][1] for entry in header.values())
        first = self._state[0] - end  # the data come last in the file
        self.modules = {
            place: _slot(self._folder, module, found.pairs[module], header, first, config, module in found.embeddings)
            for module, place in places.items()
        }
        self.name, self.base = name or folder.name, config.get("base_model_name_or_path") or ""
        self.info = {"config": config, **stated(folder)} | ({"left_out": left_out} if left_out else {})

    def __iter__(self) -> Iterator[tuple[str, Factors]]:
        """Module and factors, one at a time."""
        return ((module, self.read(module)) for module in self.modules)

    def read(self, module: str) -> Factors:
        """One module's factors, fp32.

        Raises:
            AdapterError: values that are not finite, or the file has changed since.
        """
        slot = self.modules[module]
        raw = [torch.empty(size, dtype=torch.uint8) for size in slot.sizes]
        self.copy(module, *raw)
        a, b = (part.float() for part in slot.typed(*raw))
        if not finite(a, b):
            raise AdapterError(f"{self._folder}: {module} holds NaN or infinite values")
        return Factors(b * slot.scale, a, slot.scale, slot.embedding)

    def copy(self, module: str, A: Tensor, B: Tensor) -> None:
        """Copy one module's bytes as the file has them into A and B (uint8, of at least `Slot.sizes`).

        Raises:
            AdapterError: the file has changed since it was opened, or cannot be read any more.
        """
        slot = self.modules[module]
        try:
            with self._path.open("rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise AdapterError(f"{self._folder}: {WEIGHTS} has changed since it was opened; open it again")
                for into, (_, start), size in zip((A, B), (slot.A, slot.B), slot.sizes, strict=True):
                    _fill(file, start, memoryview(into.numpy())[:size])
        except OSError as error:
            raise AdapterError(f"{self._folder}: {WEIGHTS} cannot be read any more ({error})") from error

    def measure(self) -> tuple[float, str]:
        """‖ΔW‖_F over all modules and `Adapter.digest`, one module in memory at a time.

        Raises:
            AdapterError: as `read`.
        """
        total, square = hashlib.sha256(), 0.0
        for module in sorted(self.modules):
            factors = self.read(module)
            feed(total, module, factors)
            square += squared(factors)
        return math.sqrt(0.0 if square < 0 else square), total.hexdigest()  # NaN stays NaN


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers are: the least and the largest, which a NaN is both, take a thirtieth of the time that a look at
    each takes.
    """
    return all(bool(bound.isfinite()) for tensor in tensors if tensor.numel() for bound in tensor.aminmax())


def squared(factors: Factors) -> float:
    """‖BA‖² = Σ (BᵀB ∘ AAᵀ), from the factors alone, in fp64, where no fp32 overflows."""
    b, a = factors.B.double(), factors.A.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def feed(total, module: str, factors: Factors) -> None:
    """Add a module to a content hash: its name, shapes, scale and values."""
    scale = torch.tensor(factors.scale, dtype=torch.float32).item()  # fp32, as a stack keeps it
    total.update(f"{module}|{tuple(factors.B.shape)}|{tuple(factors.A.shape)}|{scale!r}|".encode())
    for tensor in (factors.B, factors.A):
        total.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())


def _placed(name: str, modules: Mapping, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    places = locate(modules, shapes)
    if not places:
        raise AdapterError(
            f"{name}: none of its {len(modules)} modules is in the base; it has such as {next(iter(modules))!r}, the base "
            f"{next(iter(shapes), None)!r}"
        )
    return places


def _slot(
    name: str, module: str, pair: Mapping[str, str], header: Mapping, first: int, config: Mapping, embedding: bool
) -> Slot:
    if set(pair) != {"A", "B"}:
        missing = ({"A", "B"} - set(pair)).pop()
        raise AdapterError(
            f"{name}: {module} has no lora_{missing}; expected a pair of factors A (r, d_in) and B (d_out, r)"
        )
    a, b = (tuple(header[pair[side]]["shape"]) for side in "AB")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
        raise AdapterError(f"{name}: {module} has A {a} and B {b}, expected (r, d_in) and (d_out, r) with one r ≥ 1")
    for side in "AB":
        if header[pair[side]]["dtype"] not in WIDTH:
            kind = show(header[pair[side]]["dtype"])
            raise AdapterError(f"{name}: lora_{side} of {module} is of type {kind}, expected {', '.join(WIDTH)}")
    at = {side: (header[key]["dtype"], first + header[key]["data_offsets"][0]) for side, key in pair.items()}
    return Slot(a[0], (b[0], a[1]), scaling(config, module, a[0]), embedding, at["A"], at["B"])


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _fill(file, start: int, view: memoryview) -> None:
    """Fill a piece of memory from a place in an open file on."""
    done = 0
    file.seek(start)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError("it ends too early")
        done += count
