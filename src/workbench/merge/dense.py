"""Updates that no low rank holds, and the way back to low rank with its error stated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from workbench.adapters import Adapter, Factors, scaled
from workbench.compose import layer_shape, stores_transposed
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.singular import factored_svd, svd

__all__ = ["Dense", "cut", "truncate"]


@dataclass(frozen=True)
class Dense:
    """A named dense update: module path in the base → ΔW (d_out, d_in). What TIES and its like return.

    `embeddings` names the modules that look rows up by token; their ΔW is (width, vocabulary), see `Factors`.
    """

    name: str
    modules: dict[str, Tensor]
    base: str = ""
    info: dict = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return math.sqrt(sum(float(delta.double().square().sum()) for delta in self.modules.values()))

    def times(self, weight: float) -> Dense:
        """This update multiplied by a number, λ ΔW (the sign included)."""
        modules = {module: delta * weight for module, delta in self.modules.items()}
        return replace(self, modules=modules, info=scaled(self.info, weight))

    def truncate(self, rank: int | None = None) -> Adapter:
        """The nearest adapter of a rank (Eckart–Young: the SVD cut off), or with None the whole update, unchanged.

        Returns:
            An adapter whose `info["error"]` gives ‖ΔW − B A‖_F / ‖ΔW‖_F per module. With None its rank is
            min(d_out, d_in) in every module, one factor being the identity.

        Raises:
            MergeError: a rank that is not a whole number of at least 1.
        """
        modules, error = {}, {}
        for module, delta in self.modules.items():
            modules[module], error[module] = (_whole(delta), 0.0) if rank is None else cut(delta, rank)
            modules[module] = replace(modules[module], embedding=module in self.embeddings)
        return Adapter(self.name, modules, self.base, {**self.info, "error": error})

    def push(self, *_, **__) -> None:
        """Not for a dense update, which no PEFT folder holds: choose a rank, `update.truncate(rank).push(…)`."""
        raise MergeError(f"{self.name} is dense, and a PEFT folder holds factors: call truncate(rank) on it first")

    save = push

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Add ΔW to the model's weights while the context is open; the very same weights are put back, on an error too.

        Raises:
            BaseError: a module that the model lacks, whose weight is quantised, or is shared with another module.
            AdapterError: a ΔW that does not fit its module.
        """
        found = dict(model.named_modules())
        absent = [module for module in self.modules if module not in found]
        if absent:
            raise BaseError(
                f"{len(absent)} of {len(self.modules)} modules are not in this base, such as {absent[0]!r}; "
                "is the update of another base?"
            )
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for module, delta in self.modules.items():
                    weight = _weight(found, module, tuple(delta.shape))
                    kept.append((weight, weight.clone()))
                    delta = delta.T if stores_transposed(found[module]) else delta
                    weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta.to(weight.device))
            yield model
        finally:
            with torch.no_grad():
                for weight, original in kept:
                    weight.copy_(original)


def truncate(adapter: Adapter, rank: int | Mapping[str, int]) -> Adapter:
    """An adapter cut to a rank by the SVD of its ΔW, taken from the factors; `info["error"]` as in `Dense.truncate`.

    Args:
        rank: one for all modules, or one per module. A module of at most that rank stays as it is.

    Raises:
        MergeError: a rank that is not a whole number of at least 1.
    """
    modules, error = {}, {}
    for module, factors in adapter.modules.items():
        modules[module], error[module] = cut(factors, rank[module] if isinstance(rank, Mapping) else rank)
    return replace(adapter, modules=modules, info={**adapter.info, "error": error})


def cut(update: Tensor | Factors, rank: int) -> tuple[Factors, float]:
    """One module's update, dense or factored, cut to a rank by its SVD, and the share of the norm that is lost.

    Raises:
        MergeError: a rank that is not a whole number of at least 1.
    """
    rank = _checked(rank)
    if isinstance(update, Tensor):
        return _cut(svd(update), rank)
    if rank >= update.rank:
        return update, 0.0
    factors, error = _cut(factored_svd(update.B, update.A), rank)
    return replace(factors, embedding=update.embedding), error


def _checked(rank) -> int:
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise MergeError(f"rank is {rank!r}, expected a whole number of at least 1")
    return int(rank)


def _cut(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Factors, float]:
    """The first singular triplets as balanced factors, and the share of the norm that is lost."""
    u, s, vh = svd
    root = s[:rank].sqrt()
    total, lost = s.double().square().sum(), s[rank:].double().square().sum()
    error = float((lost / total).sqrt()) if total > 0 else 0.0
    return Factors((u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()), error


def _whole(delta: Tensor) -> Factors:
    d_out, d_in = delta.shape
    if d_in <= d_out:
        return Factors(delta, torch.eye(d_in, dtype=delta.dtype, device=delta.device))
    return Factors(torch.eye(d_out, dtype=delta.dtype, device=delta.device), delta)


def _is_plain(weight: Tensor, shape: tuple[int, int] | None) -> bool:
    """Whether it is numbers of at least 16 bits, all here, one for each entry of the matrix: not quantised or offloaded."""
    wide = weight.is_floating_point() and weight.dtype.itemsize > 1 and type(weight.data) is Tensor
    return wide and not weight.is_meta and (shape is None or weight.numel() == shape[0] * shape[1])


def _weight(found: Mapping[str, nn.Module], module: str, shape: tuple[int, int]) -> Tensor:
    layer = found[module]
    weight, expected = getattr(layer, "weight", None), layer_shape(layer)
    if weight is None or not _is_plain(weight, expected):
        raise BaseError(
            f"{module} has no floating-point weight to add to; truncate the update to a rank and compose it instead"
        )
    if expected != shape:
        raise AdapterError(
            f"{module}: an update of {shape[0]}×{shape[1]} does not fit a layer of {expected[0]}×{expected[1]}"
            if expected
            else f"{module}: a {type(layer).__name__} is not a linear layer or an embedding, so ΔW cannot be added to it"
        )
    sharing = [name for name, other in found.items() if other is not layer and getattr(other, "weight", None) is weight]
    if sharing:
        raise BaseError(f"{module} shares its weight with {sharing[0]}, which would change too; untie them first")
    return weight
