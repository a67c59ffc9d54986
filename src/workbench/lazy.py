"""The modules of a stack whose factors stay in the adapters' files: each is read when it is asked for, and not kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from workbench.adapters import Adapter
from workbench.source import Factors, Slot, Source, finite
from workbench.stack import Units

__all__ = ["Files"]

_ALIGNED = 8  # bytes: the widest number's


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
        ranks = torch.tensor([slot.rank for slot in slots])
        scale = torch.tensor([float(slot.scale) for slot in slots]).repeat_interleave(ranks).to(self.device)
        if self._read:
            A, B = self._factors(module)
            B *= scale
        else:
            (d_out, d_in), R = slots[0].shape, len(scale)
            A, B = torch.empty(R, d_in, device="meta"), torch.empty(d_out, R, device="meta")
        owner = torch.tensor([place for place, _ in part]).repeat_interleave(ranks).to(self.device)
        return Units(B, A, owner, scale, module, slots[0].embedding)

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (R, d_in) and B (d_out, R) of all that have the module, fp32 on the device, B without its scale.

        The files' bytes are read into one piece of memory, by as many threads as torch has, moved as they are, and only then
        brought to one type.
        """
        part = [(self._sources[place], slot) for place, slot in self._parts[module]]
        sizes = [_ALIGNED * -(-size // _ALIGNED) for _, slot in part for size in slot.sizes]
        raw = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pieces = raw.split(sizes)

        def fill(share: slice) -> None:
            for (source, _), a, b in zip(part[share], pieces[::2][share], pieces[1::2][share], strict=True):
                source.copy(module, a, b)

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, [slice(i, None, threads) for i in range(min(threads, len(part)))]))
        pieces = raw.to(self.device, non_blocking=True).split(sizes)
        typed = [slot.typed(*pair) for *pair, (_, slot) in zip(pieces[::2], pieces[1::2], part, strict=True)]
        A, B = torch.cat([a for a, _ in typed]).float(), torch.cat([b for _, b in typed], 1).float()
        if not finite(A, B):
            for source, _ in part:
                source.read(module)  # says whose values are not finite
        return A, B

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
