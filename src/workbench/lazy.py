"""The modules of a stack whose factors stay in the adapters' files: each is read when it is asked for, and not kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from workbench.adapters import Adapter
from workbench.source import Factors, Slot, Source
from workbench.stack import Units

__all__ = ["Files"]


class Files(Mapping[str, Units]):
    """Module → `Units`, read from the files of all adapters that have it; what was read before is not kept.

    So one module of all adapters is in memory at a time (two, where a loop still holds the last). `outline` has the same
    modules without reading: owners, scales and shapes are real, A and B are meta tensors.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        parts: Mapping[str, Sequence[tuple[int, Slot]]],
        device: str | torch.device = "cpu",
        *,
        read: bool = True,
    ):
        """`parts`: module → (place in `sources`, slot) of those that have it; `Stack.of` makes it, and checks it."""
        self._sources, self._parts, self.device, self._read = tuple(sources), parts, torch.device(device), read

    @property
    def outline(self) -> Files:
        """The same modules without their values."""
        return Files(self._sources, self._parts, self.device, read=False)

    def to(self, device: str | torch.device) -> Files:
        return Files(self._sources, self._parts, device, read=self._read)

    def __getitem__(self, module: str) -> Units:
        part = self._parts[module]
        slots = [slot for _, slot in part]
        ranks, (d_out, d_in) = torch.tensor([slot.rank for slot in slots]), slots[0].shape
        where = self.device if self._read else "meta"
        units = Units(
            torch.empty(d_out, int(ranks.sum()), device=where),
            torch.empty(int(ranks.sum()), d_in, device=where),
            torch.tensor([place for place, _ in part]).repeat_interleave(ranks).to(self.device),
            torch.tensor([float(slot.scale) for slot in slots]).repeat_interleave(ranks).to(self.device),
            module,
            slots[0].embedding,
        )
        start = 0
        for place, slot in part if self._read else ():
            factors, stop = self._sources[place].read(module), start + slot.rank
            units.B[:, start:stop], units.A[start:stop] = factors.B, factors.A
            start = stop
        return units

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, module: object) -> bool:
        return module in self._parts

    def source(self, i: int) -> Source:
        """The files of the i-th adapter."""
        return self._sources[i]

    def adapter(self, i: int, base: str) -> Adapter:
        """The i-th adapter, of which alone files are read; as `Stack.adapter` gives it."""
        source, modules = self._sources[i], {}
        for module in self:
            if module in source.modules:
                modules[module] = self._moved(source.read(module))
        return Adapter(source.name, modules, base, dict(source.info))

    def _moved(self, factors: Factors) -> Factors:
        scale = torch.tensor(factors.scale, dtype=torch.float32).item()  # fp32, as a stack keeps it
        return replace(factors, B=factors.B.to(self.device), A=factors.A.to(self.device), scale=scale)
