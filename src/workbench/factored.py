"""Inner products and norms of the updates of a stack's module, from the factors: no ΔW is formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workbench.stack import Units

__all__ = ["cosine", "gram", "products", "squares"]

BLOCK = 1024  # units a side of the products that are held at once; twice that on a GPU
ENTRIES = 2**24  # of the factors that are padded at once


def gram(units: Units, n: int) -> Tensor:
    """(n, n) inner products ⟨ΔW_i, ΔW_j⟩ of one module: ⟨b a, b′ a′⟩ = ⟨b, b′⟩⟨a, a′⟩ summed over pairs of units.

    Factors of half precision are multiplied as they are; products, sums and outcome are fp32 (fp64 of fp64 factors).

    Cost R² (d_out + d_in), of which symmetry saves up to half: never d_out × d_in per pair. Held at a time: the products
    of two blocks of `BLOCK` units.
    """
    upper = torch.zeros(n, n, dtype=torch.promote_types(units.A.dtype, torch.float32), device=units.A.device)
    step = BLOCK * (2 if units.A.is_cuda else 1)
    blocks = [units[start : start + step] for start in range(0, len(units), step)]
    for i, one in enumerate(blocks):
        for other in blocks[i:]:
            products = _product(one.B.T, other.B).mul_(_product(one.A, other.A.T))
            if other is one:
                products *= 0.5  # the other half is its transpose's
            sums = products.new_zeros(n, len(other)).index_add_(0, one.owner, products)
            upper.index_add_(1, other.owner, sums)
    return upper + upper.T


def squares(units: Units, n: int) -> Tensor:
    """(n,) ‖ΔW_i‖² of one module, fp64: the diagonal of `gram`, at the cost of each adapter's own units."""
    out = torch.zeros(n, dtype=torch.float64, device=units.A.device)
    held = int(units.ranks(n).max()) * sum(units.shape)
    for adapters, block in units.blocks(max(1, ENTRIES // max(1, held))):
        B, A = block.padded(len(adapters))
        out[adapters] = products(B.double(), A.double())
    return out


def products(B: Tensor, A: Tensor, D: Tensor | None = None, C: Tensor | None = None) -> Tensor:
    """(n,) ⟨B_i A_i, D_i C_i⟩ of padded factors (n, d_out, r) and (n, r, d_in); D and C may be one pair for all.

    Without D and C the squared norms ‖B_i A_i‖², never below 0.
    """
    if D is None or C is None:
        return products(B, A, B, A).clamp_min(0)
    return ((B.mT @ D) * (A @ C.mT)).sum((1, 2))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y, in fp32 where the factors are of half precision."""
    if x.dtype.itemsize > 2:
        return x @ y
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda else x.float() @ y.float()


def cosine(inner: Tensor) -> Tensor:
    """(n, n) cosines from a Gram matrix; rows and columns of norm 0 are 0 (1 on the diagonal)."""
    norm = inner.diagonal().clamp_min(0).sqrt()
    out = torch.where(
        (norm[:, None] > 0) & (norm[None] > 0), inner / (norm[:, None] * norm[None]).clamp_min(1e-38), 0.0
    )
    return out.clamp(-1, 1).fill_diagonal_(1.0)
