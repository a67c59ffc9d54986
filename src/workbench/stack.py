"""The one idea: a pool of adapters is, module by module, a stack of rank-one units.

    units = Units(B, A, owner)     # B (d_out, R), A (R, d_in), owner (R,): unit j is B[:, j] A[j, :], of adapter owner[j]
    stack = Stack.of(adapters)     # module → Units, and the adapters' names

A merge maps a stack to an update; similarity, controls and clusters read the same type. The algebra (`factored`) works on
the factors: no ΔW is formed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.adapters import Adapter, Factors
from workbench.errors import AdapterError, MergeError, SelectionError
from workbench.factored import cosine, gram, squares
from workbench.source import Slot, Source

__all__ = ["Stack", "Units", "cosine", "gram", "squares"]


@dataclass(frozen=True)
class Units:
    """The rank-one units of one module: B (d_out, R), A (R, d_in), owner (R,) int64, scale (R,) the s folded into B.

    `embedding` says that the module looks rows up by token: d_in is the vocabulary, d_out the width (see `Factors`).
    """

    B: Tensor
    A: Tensor
    owner: Tensor
    scale: Tensor
    module: str = ""
    embedding: bool = False

    def __len__(self) -> int:
        return self.A.shape[0]

    def __repr__(self) -> str:
        ranks = self.owner.bincount()
        whose = f"{_count(len(self), 'unit')} of {_count(int((ranks > 0).sum()), 'adapter')}, {_span(ranks)}"
        kind = f"{str(self.A.dtype).removeprefix('torch.')}, {self.A.device}"
        return f"Units({self.module and self.module + ', '}{self.shape[0]}×{self.shape[1]}, {whose}, {kind})"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the module."""
        return self.B.shape[0], self.A.shape[1]

    def of(self, adapter: int) -> Units:
        """The units of one adapter (perhaps none)."""
        return self[self.owner == adapter]

    def to(self, device: str | torch.device) -> Units:
        B, A, owner, scale = (t.to(device) for t in (self.B, self.A, self.owner, self.scale))
        return replace(self, B=B, A=A, owner=owner, scale=scale)

    def __getitem__(self, index) -> Units:
        return replace(self, B=self.B[:, index], A=self.A[index], owner=self.owner[index], scale=self.scale[index])

    def ranks(self, n: int) -> Tensor:
        """(n,) number of units of each adapter; 0 where it does not have the module."""
        return torch.bincount(self.owner, minlength=n)

    def sorted(self) -> Units:
        """The same in the order of their owners; themselves where they lie so already."""
        order = self.owner.argsort(stable=True)
        return self if bool((order[1:] > order[:-1]).all()) else self[order]

    def blocks(self, most: int) -> Iterator[tuple[Tensor, Units]]:
        """At most so many adapters at a time: their places in the stack, and their units, sorted, with owners from 0."""
        units, start = self.sorted(), 0
        present, ranks = units.owner.unique_consecutive(return_counts=True)
        for adapters, counts in zip(present.split(most), ranks.split(most), strict=True):
            block = units[start : start + int(counts.sum())]
            if not len(block):
                return
            start += len(block)
            owner = torch.arange(len(adapters), device=counts.device).repeat_interleave(counts)
            yield adapters, replace(block, owner=owner)

    def padded(self, n: int) -> tuple[Tensor, Tensor]:
        """B (n, d_out, r) and A (n, r, d_in) of each adapter, with r the largest rank; filled up with zeros."""
        units, ranks, (d_out, d_in) = self.sorted(), self.ranks(n), self.shape
        r, B, A = int(ranks.max()), units.B, units.A
        if len(units) < n * r:
            before = r * torch.arange(n, device=ranks.device) - ranks.cumsum(0) + ranks
            place = torch.arange(len(units), device=ranks.device) + before[units.owner]
            B, A = B.new_zeros(d_out, n * r).index_copy_(1, place, B), A.new_zeros(n * r, d_in).index_copy_(0, place, A)
        return B.reshape(d_out, n, r).transpose(0, 1).contiguous(), A.reshape(n, r, d_in)

    def live(self, weights: Tensor) -> Units:
        """The units of the adapters of a weight (N,) other than 0."""
        return self[weights[self.owner] != 0]

    def weighted(self, weights: Tensor) -> Units:
        """`live`, with each adapter's weight multiplied into B."""
        units = self.live(weights)
        return replace(units, B=units.times(weights[units.owner]))

    def times(self, coefficients: Tensor) -> Tensor:
        """B with column j multiplied by coefficient j, (d_out, R)."""
        return self.B * coefficients.to(self.B)

    def delta(self, coefficients: Tensor | None = None) -> Tensor:
        """Σ_j c_j b_j a_j, dense (d_out, d_in)."""
        return (self.B if coefficients is None else self.times(coefficients)) @ self.A


@dataclass(frozen=True)
class Stack:
    """Module → `Units`, over the adapters `names` (owner indexes into them); `infos` is what each says of itself."""

    names: tuple[str, ...]
    modules: Mapping[str, Units]
    base: str = ""
    infos: tuple[Mapping, ...] = ()

    @classmethod
    def of(cls, adapters: Sequence[Adapter] | Sequence[Source]) -> Stack:
        """Stack adapters of any mix of ranks and targets.

        Of `Source`s the stack is lazy: a module's factors are read whenever it is asked for (`workbench.lazy`), so that a
        loop over modules holds one of them at a time, however many there are.

        Raises:
            SelectionError: no adapters, or two of one name.
            AdapterError: two adapters disagree about a module's shape, or name different bases.
        """
        adapters = list(adapters)
        if not adapters:
            raise SelectionError("the selection is empty: a stack needs at least one adapter")
        names = tuple(adapter.name for adapter in adapters)
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise SelectionError(f"adapter names must differ; given more than once: {', '.join(twice)}")
        bases = {adapter.base: adapter.name for adapter in reversed(adapters) if adapter.base}
        if len(bases) > 1:
            said = "; ".join(f"{name} is of {base!r}" for base, name in bases.items())
            raise AdapterError(f"adapters of different bases cannot be stacked: {said}")
        found: dict[str, list[tuple[int, Factors | Slot]]] = {}
        for index, adapter in enumerate(adapters):
            for module, factors in adapter.modules.items():
                found.setdefault(module, []).append((index, factors))
        parts = {module: found[module] for module in sorted(found, key=_natural)}
        for module, part in parts.items():
            _check_same(module, part, names)
        if isinstance(adapters[0], Source):
            from workbench.lazy import Files

            modules: Mapping[str, Units] = Files(adapters, parts)
        else:
            modules = {module: _together(module, part) for module, part in parts.items()}
        return cls(names, modules, next(iter(bases), ""), tuple(adapter.info for adapter in adapters))

    @property
    def lazy(self) -> bool:
        """Whether a module is read from the adapters' files each time it is asked for."""
        return not isinstance(self.modules, dict)

    @property
    def outline(self) -> Mapping[str, Units]:
        """The modules for whoever asks for ranks, owners and shapes only: nothing is read, and A and B may be meta tensors."""
        return self.modules.outline if self.lazy else self.modules

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        ranks = self.ranks()
        size = ", ".join(_count(n, what) for n, what in ((len(self), "adapter"), (ranks.shape[1], "module")))
        where = f"read from files, {self.device}" if self.lazy else self.device
        return f"Stack({size}, {_count(int(ranks.sum()), 'unit')}, {_span(ranks)}, {where})"

    def __iter__(self) -> Iterator[tuple[str, Units]]:
        return iter(self.modules.items())

    @property
    def device(self) -> torch.device:
        return next(iter(self.outline.values())).owner.device

    @property
    def config(self) -> dict:
        """What an update made of these adapters carries over of their configurations: fan_in_fan_out, task_type."""
        configs = [info["config"] for info in self.infos if info.get("config")]
        kinds = {config.get("task_type") for config in configs} - {None}
        out = {"fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs)}
        return out | ({"task_type": kinds.pop()} if len(kinds) == 1 else {})

    def to(self, device: str | torch.device) -> Stack:
        return replace(self, modules=self.modules.to(device) if self.lazy else {m: u.to(device) for m, u in self})

    def index(self, which: str | int) -> int:
        """The place of an adapter, given its name or its place.

        Raises:
            SelectionError: there is no such adapter.
        """
        if which in self.names:
            return self.names.index(which)
        if isinstance(which, str) or not 0 <= which < len(self):
            raise SelectionError(f"no adapter {which!r} in this stack of {len(self)}")
        return int(which)

    def adapter(self, which: int | str) -> Adapter:
        """One adapter out of the stack again."""
        i = self.index(which)
        if self.lazy:
            return self.modules.adapter(i, self.base)
        modules = {}
        for module, units in self:
            own = units.of(i)
            if len(own):
                scale = float(own.scale[0])
                modules[module] = Factors(own.B.contiguous(), own.A.contiguous(), scale, units.embedding)
        return Adapter(self.names[i], modules, self.base, dict(self.infos[i]) if self.infos else {})

    def choose(self, which: Sequence[str | int]) -> Stack:
        """The stack of some of the adapters, in the order given; of a lazy stack a lazy one."""
        if not len(which):
            raise SelectionError("the selection is empty: choose at least one adapter")
        if self.lazy:
            return replace(
                Stack.of([self.modules.source(self.index(w)) for w in which]).to(self.device), base=self.base
            )
        return Stack.of([self.adapter(w) for w in which])

    def ranks(self) -> Tensor:
        """(N, M) rank of each adapter in each module; 0 where absent."""
        return torch.stack([units.ranks(len(self)) for units in self.outline.values()], 1)

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {module: units.shape for module, units in self.outline.items()}

    def gram(self) -> Tensor:
        """(N, N) of ⟨ΔW_i, ΔW_j⟩ summed over modules, fp32."""
        return sum(gram(units, len(self)) for units in self.modules.values())

    def norms(self) -> Tensor:
        """(N,) ‖ΔW_i‖_F over all modules, fp32."""
        return sum(squares(units, len(self)) for units in self.modules.values()).sqrt().float()

    def digest(self) -> str:
        """Content hash over the adapters in order (names excluded)."""
        return hashlib.sha256("".join(self.adapter(i).digest() for i in range(len(self))).encode()).hexdigest()

    def weights(self, weights: Mapping[str, float] | Sequence[float] | Tensor | None) -> Tensor:
        """(N,) fp32 weights in the stack's order; None is all ones.

        Raises:
            MergeError: the wrong number of weights, an unknown name, or a value that is not finite.
        """
        n = len(self)
        if weights is None:
            return torch.ones(n)
        if isinstance(weights, Mapping):
            unknown = sorted(set(weights) - set(self.names))
            if unknown:
                raise MergeError(f"weights name adapters that are not in the stack: {', '.join(unknown)}")
            weights = [weights.get(name, 0.0) for name in self.names]
        out = torch.as_tensor(weights, dtype=torch.float32)
        if out.shape != (n,):
            raise MergeError(
                f"expected {n} weights, one per adapter ({', '.join(self.names[:3])}{'…' if n > 3 else ''}), got shape {tuple(out.shape)}"
            )
        if not torch.isfinite(out).all():
            raise MergeError(f"the weight of {self.names[int((~torch.isfinite(out)).nonzero()[0])]} is not finite")
        return out


def _together(module: str, part: Sequence[tuple[int, Factors]]) -> Units:
    """One module's factors of several adapters, each given with its place, side by side."""
    first = part[0][1]
    owner = [torch.full((f.rank,), i) for i, f in part]
    scale = [torch.full((f.rank,), float(f.scale)) for _, f in part]
    return Units(
        torch.cat([f.B for _, f in part], 1),
        torch.cat([f.A for _, f in part]),
        torch.cat(owner).to(first.A.device),
        torch.cat(scale).to(first.A.device),
        module,
        first.embedding,
    )


def _check_same(module: str, part: Sequence[tuple[int, Factors | Slot]], names: Sequence[str]) -> None:
    """All adapters that have a module agree on what it is."""
    first_index, first = part[0]
    for index, factors in part:
        if factors.shape != first.shape:
            got, want = factors.shape, first.shape
            raise AdapterError(
                f"{names[index]}: {module} is {got[0]}×{got[1]}, but {want[0]}×{want[1]} in {names[first_index]}; "
                "they are of different bases"
            )
        if factors.embedding != first.embedding:
            raise AdapterError(
                f"{module} is an embedding in one of {names[index]} and {names[first_index]} and a linear layer in the "
                "other; they are of different bases"
            )


def _natural(module: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in module.split(".")]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _span(ranks: Tensor) -> str:
    """The ranks that there are, in words."""
    some = ranks[ranks > 0].unique().tolist() or [0]
    return f"rank {some[0]}" if len(some) == 1 else f"rank {some[0]}–{some[-1]}"
