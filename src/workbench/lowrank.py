"""A low-rank update for a batch of rows: y += ((x Aᵀ) ∘ c) Bᵀ, with coefficients c per candidate or per token.

An embedding is a linear layer on one-hot tokens: its x Aᵀ is the columns of A at the token ids. The batch is G groups of
rows (contiguous, equally many each). Three forms:

- shared: B (d_out, R), A (R, d_in), and c (C, R): one stack, C candidates, rows split evenly among them;
- grouped: B (G, d_out, R), A (G, R, d_in), c None or (C, R) with C a multiple of G: each group its own adapter;
- routed (`Routed`), shared or grouped: every token has its own c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from workbench.errors import MergeError

__all__ = ["LowRank", "Routed", "check_routing", "filled_up", "inner", "looked_up", "scaled"]

# For y += h Bᵀ in half precision cuBLAS's kernel for β = 1 takes up to 1.27 times as long as that for any other β (an H100,
# 40,960 × 14,336). One ulp of fp32, in which it adds up, is below that sum's own rounding.
_NOT_ONE = 1 + 2**-23


@dataclass(frozen=True)
class LowRank:
    """One module's update for a batch of rows; see the module's docstring for the shapes."""

    B: Tensor
    A: Tensor
    c: Tensor | None = None
    stacked: ClassVar[tuple[str, ...]] = ("B", "A")  # what has a leading dimension G in the grouped form

    def __post_init__(self):
        stacked, c = self.B.ndim == 3, self.c
        if (
            self.B.ndim != self.A.ndim
            or self.B.shape[-1] != self.A.shape[-2]
            or (stacked and len(self.B) != len(self.A))
        ):
            raise MergeError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are no pair of factors")
        if c is not None and (c.ndim != 2 or c.shape[1] != self.A.shape[-2] or (stacked and len(c) % len(self.B))):
            per = f", candidates a multiple of {len(self.B)}" if stacked else ""
            raise MergeError(f"expected coefficients (candidates, {self.A.shape[-2]}){per}, got {tuple(c.shape)}")

    @property
    def groups(self) -> int:
        """How many groups of rows it tells apart (1: all rows alike)."""
        return max(self.B.shape[0] if self.B.ndim == 3 else 1, 1 if self.c is None else self.c.shape[0])

    def to(self, device: torch.device) -> LowRank:
        """The same on a device; itself where it is there already."""
        if type(self) is LowRank and {t.device for t in (self.B, self.A, self.c) if t is not None} == {device}:
            return self  # most often, and before anything is computed
        held = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device) for name, tensor in held.items() if tensor.device != device}
        return replace(self, **moved) if moved else self

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """y + ((x Aᵀ) ∘ c) Bᵀ for x (rows, …, d_in), y (rows, …, d_out); in place on y where no gradient is taken.

        Whole numbers x (rows, …) are tokens.
        """
        if x.shape[0] % self.groups:
            raise MergeError(f"{x.shape[0]} rows cannot be split evenly among {self.groups} groups")
        h = inner(x, self.A) if x.is_floating_point() else looked_up(x, self.A).to(y.dtype)
        return self.outer(self._weighted(h, x), y)

    def outer(self, h: Tensor, y: Tensor) -> Tensor:
        """y + h Bᵀ for h = (x Aᵀ) ∘ c, (tokens, r) or (stacks, tokens, r); in place on y where no gradient is taken."""
        b = self.B.to(y.dtype).mT
        h, flat = h.to(y.dtype), y.reshape(*h.shape[:-1], y.shape[-1])  # autocast may have chosen another type
        if torch.is_grad_enabled():
            out = torch.baddbmm(flat, h, b) if self.B.ndim == 3 else torch.addmm(flat, h, b)
        else:
            beta = _NOT_ONE if flat.is_cuda and flat.dtype.itemsize == 2 else 1
            out = flat.baddbmm_(h, b, beta=beta) if self.B.ndim == 3 else flat.addmm_(h, b, beta=beta)
        return out.reshape(y.shape)

    def _weighted(self, h: Tensor, x: Tensor) -> Tensor:
        """h = x Aᵀ with each unit's column multiplied by its coefficient; in place where no gradient is taken."""
        return h if self.c is None else scaled(h, self.c)


@dataclass(frozen=True, kw_only=True)
class Routed(LowRank):
    """Arrow (Ostapenko et al. 2024, arXiv 2405.11157): every token weighs N adapters by |x · prototype|.

    w = softmax of the `top` largest |x Pᵀ| / temperature, and c_j = w[owner_j]. Shared: owner (R,), prototypes P (N, d_in);
    grouped: owner (G, R), P (G, N, d_in). A row of zeros in P is an adapter that is absent from the module: it is never
    routed to. Of equal logits those of the first adapters are kept. Routing is in fp32 whatever the base's type, and
    differentiable in P. In an embedding x is the one-hot token, so its logits are the column |P[:, token]|.
    """

    owner: Tensor
    prototypes: Tensor
    top: int = 4
    temperature: float = 1.0
    stacked: ClassVar[tuple[str, ...]] = ("B", "A", "owner", "prototypes")

    def __post_init__(self):
        super().__post_init__()
        check_routing(self.top, self.temperature)
        if self.c is not None:
            raise MergeError("a routed update takes no coefficients c: its prototypes give every token its own")
        if self.owner.shape != self.A.shape[:-1]:
            raise MergeError(f"expected owners {tuple(self.A.shape[:-1])}, got {tuple(self.owner.shape)}")
        want, got = (*self.A.shape[:-2], "adapters", self.A.shape[-1]), tuple(self.prototypes.shape)
        if len(got) != len(want) or (*got[:-2], "adapters", got[-1]) != want or not got[-2]:
            raise MergeError(f"expected prototypes ({', '.join(map(str, want))}), got {got}")

    def weights(self, x: Tensor) -> Tensor:
        """Each token's weights of the adapters, (tokens, N) or (G, tokens, N), fp32; they sum to 1 where any is present."""
        p, real = self.prototypes, x.is_floating_point()
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype if real else p.dtype, torch.float32)
            logits = (inner(x.to(wide), p) if real else looked_up(x, p.to(wide))).abs()
        present = p.detach().ne(0).any(-1).unsqueeze(-2)
        low = torch.finfo(wide).min
        logits = logits.masked_fill(~present, low)
        k = min(self.top, logits.shape[-1])
        best = logits.detach().topk(k).values
        above, level = logits > best[..., -1:], logits == best[..., -1:]
        kept = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        return ((logits - best[..., :1]) / self.temperature).masked_fill(~kept, low).softmax(-1) * present

    def _weighted(self, h: Tensor, x: Tensor) -> Tensor:
        weights = self.weights(x)
        c = weights.gather(-1, self.owner.unsqueeze(-2).expand(*h.shape)).to(h.dtype)
        return h * c if torch.is_grad_enabled() else h.mul_(c)


def check_routing(top: int, temperature: float) -> None:
    """Raises:
    MergeError: fewer than one adapter to keep, or a temperature that is not above 0.
    """
    if isinstance(top, bool) or not isinstance(top, Integral) or top < 1:
        raise MergeError(f"top is {top!r}, expected a whole number of adapters to keep for each token, at least 1")
    if not 0 < temperature < torch.inf:
        raise MergeError(f"temperature is {temperature}, expected a number above 0")


def filled_up(
    pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """B (G, d_out, r) and A (G, r, d_in) of G pairs of factors of a module, r the largest rank; None: zeros.

    Where they are; to be moved at once, since a GPU takes its time over each of many small tensors.
    """
    B, A = next(pair for pair in pairs if pair is not None)
    empty = B[:, :0], A[:0]
    B, A = zip(*(empty if pair is None else pair for pair in pairs), strict=True)
    wide = pad_sequence([b.T.to(dtype) for b in B], batch_first=True)
    return wide.mT.contiguous(), pad_sequence([a.to(dtype) for a in A], batch_first=True)


def scaled(h: Tensor, c: Tensor) -> Tensor:
    """h (…, r) with the coefficients c (C, r) of C equal parts of its rows; in place where no gradient is taken."""
    split, c = h.reshape(c.shape[0], -1, h.shape[-1]), c.to(h.dtype)[:, None]
    return (split * c if torch.is_grad_enabled() else split.mul_(c)).reshape(h.shape)


def inner(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ, (tokens, r) or (stacks, tokens, r)."""
    lead = (-1,) if A.ndim == 2 else (A.shape[0], -1)
    return x.reshape(*lead, x.shape[-1]) @ A.to(x.dtype).mT


def looked_up(tokens: Tensor, A: Tensor) -> Tensor:
    """The columns of A at these tokens, as rows."""
    if A.ndim == 2:
        return A.mT[tokens.flatten()]
    stacks = torch.arange(A.shape[0], device=tokens.device)[:, None]
    return A.mT[stacks, tokens.reshape(A.shape[0], -1)]
