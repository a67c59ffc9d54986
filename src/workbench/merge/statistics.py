"""What merging methods may know of each adapter's examples: the inputs of every layer, and the loss's gradients there.

    statistics = collect(base, pool, workbench.tasks.upstream(pool, 16))        # gradients=True for `fisher`
    merge(pool, "regmean", statistics=statistics)

Rows are kept as they come, one per token: no d_in × d_in Gram and no d_out × d_in gradient is held for all modules at
once. An adapter with T tokens costs T Σ d_in numbers in the base's own type, and T Σ (d_in + d_out) with gradients, in main
memory; layers that read one tensor (q, k and v; gate and up) share it. `Statistics.nbytes` says what it came to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from workbench.errors import MergeError
from workbench.stack import Units

__all__ = ["Rows", "Statistics"]


@dataclass(frozen=True)
class Rows:
    """One adapter's tokens at one module.

    x (T, d_in) are the layer's inputs, or (T,) int64 token ids where it is an embedding (which stand for one-hot rows).
    g (T, d_out) are the gradients of each example's loss at the layer's output, and example (T,) int64 says whose row it
    is, 0 … examples − 1. `whole` gives the L2 norm of this adapter's diagonal Fisher over all modules; see `Statistics`.
    """

    x: Tensor
    g: Tensor | None = None
    example: Tensor | None = None
    examples: int = 1
    whole: Callable[[Tensor], float] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def ids(self) -> bool:
        return not self.x.is_floating_point()

    @property
    def width(self) -> int:
        """d_in; of ids, no less than one above the largest."""
        return (int(self.x.max()) + 1 if len(self) else 0) if self.ids else self.x.shape[1]

    def inputs(self, like: Tensor) -> Tensor:
        """x on a tensor's device and in its type; ids stay whole numbers."""
        return self.x.to(like.device) if self.ids else self.x.to(like)

    def fisher(self, like: Tensor, d_in: int | None = None) -> Tensor:
        """(d_out, d_in) of the mean over examples of (Σ_t g_t x_tᵀ)²: the squared gradient of the weight itself.

        Args:
            like: its device and type are taken.
            d_in: the vocabulary, where x are ids.
        """
        x, g = self.inputs(like), self.g.to(like)
        if (self.example.diff() < 0).any():  # as where a layer is run twice
            order = torch.argsort(self.example, stable=True).to(like.device)
            x, g = x[order], g[order]
        counts = torch.bincount(self.example, minlength=self.examples).tolist()
        out = g.new_zeros(g.shape[1], d_in or self.width)
        for own, gradients in zip(x.split(counts), g.split(counts), strict=True):
            if self.ids:
                tokens, place = own.unique(return_inverse=True)
                total = g.new_zeros(len(tokens), g.shape[1]).index_add_(0, place, gradients)
                out[:, tokens] += total.T.square()
            else:
                total = gradients.T @ own
                out.addcmul_(total, total)
        return out / max(1, self.examples)


@dataclass(frozen=True)
class Statistics:
    """Adapter's name → module → `Rows`; what `collect` returns and `merge` takes."""

    rows: Mapping[str, Mapping[str, Rows]]
    gradients: bool = False
    norms: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes held; what modules share is counted once."""
        tensors = {
            tensor.data_ptr(): tensor.nbytes
            for modules in self.rows.values()
            for own in modules.values()
            for tensor in (own.x, own.g, own.example)
            if tensor is not None
        }
        return sum(tensors.values())

    def __repr__(self) -> str:
        modules = len({module for modules in self.rows.values() for module in modules})
        what = "inputs and gradients" if self.gradients else "inputs"
        return f"Statistics({what} of {len(self.rows)} adapters in {modules} modules, {self.nbytes / 1e6:.0f} MB)"

    def of(self, units: Units, names: Sequence[str]) -> list[Rows]:
        """The rows of each adapter at the units' module, in the order of the names.

        Raises:
            MergeError: an adapter without that module, rows of another width, or values that are not finite.
        """
        return [self._checked(units, name) for name in names]

    def norm(self, name: str, like: Tensor) -> float:
        """‖F‖₂ of one adapter's diagonal Fisher over all modules collected; computed when first asked for."""
        if name not in self.norms:
            squares = [
                torch.linalg.vector_norm(own.fisher(like), dtype=torch.float64).square()
                for own in self.rows[name].values()
            ]
            self.norms[name] = math.sqrt(float(sum(squares)))
        return self.norms[name]

    def _checked(self, units: Units, name: str) -> Rows:
        own, (d_out, d_in) = self.rows[name].get(units.module), units.shape
        if own is None:
            raise MergeError(
                f"the statistics of {name} lack {units.module}; collect them over all adapters that are merged together"
            )
        if own.ids != units.embedding or (own.width > d_in if own.ids else own.width != d_in):
            words = [
                f"token ids below {width}" if ids else f"inputs of width {width}"
                for ids, width in ((units.embedding, d_in), (own.ids, own.width))
            ]
            raise MergeError(
                f"{units.module} takes {words[0]}, but the statistics of {name} hold {words[1]}; they are of another base"
            )
        if own.g is not None and own.g.shape[1] != d_out:
            raise MergeError(
                f"{units.module} is {d_out}×{d_in}, but the gradients of {name} have {own.g.shape[1]} columns; they are of "
                "another base"
            )
        for what, values in (("inputs", own.x), ("gradients", own.g)):
            if values is not None and not torch.isfinite(values).all():
                raise MergeError(f"{name}: its {what} at {units.module} are not all finite; leave the adapter out")
        return replace(own, whole=partial(self.norm, name)) if self.gradients else own
