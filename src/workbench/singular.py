"""What a processor and a GPU are to be asked for differently: singular values and vectors, and each adapter's own units.

A processor's SVD is LAPACK's. A GPU's is by Jacobi rotations, or QR steps of a few columns, and takes many times longer
than the eigenvectors of a Gram matrix of the smaller side. There these are taken, of matrices in fp32 and in fp64 (`by_gram`):
squares of fp32 values are held exactly, so singular values come out to about 10⁻⁷ of the largest, as by an SVD in fp32,
and vectors are orthonormal to rounding. Matrices in fp64 keep the SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["by_gram", "factored_svd", "left", "on_processor", "places", "polar", "svd"]


def on_processor(x: Tensor) -> bool:
    """Whether a tensor is in main memory, rather than a GPU's."""
    return x.device.type == "cpu"


def places(owner: Tensor) -> dict[int, Tensor]:
    """Adapter → where its units are, (r,), of owners (R,): in order, for every adapter that has any.

    A mask for each adapter would have a GPU waited for each time.
    """
    order = owner.argsort(stable=True)
    found, counts = owner[order].unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), order.split(counts.tolist()), strict=True))


def by_gram(x: Tensor) -> bool:
    """Whether singular vectors are taken from a Gram matrix in fp64: of fp32 on anything but a processor."""
    return x.dtype == torch.float32 and not on_processor(x)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of (m, n): U (m, q), S (q,) descending, Vh (q, n), q = min(m, n).

    By the Gram matrix, the longer side's vectors of singular values that are all rounding are 0.
    """
    return _svd(x.double(), x.dtype) if by_gram(x) else torch.linalg.svd(x, full_matrices=False)


def factored_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B A from its factors: U (d_out, q), S (q,), Vh (q, d_in), with q = min(d_out, R, d_in), S descending.

    QR of both factors leaves a core of size at most R × R; where R ≥ min(d_out, d_in) the dense way is the cheaper exact
    one and is taken.
    """
    if A.shape[0] >= min(B.shape[0], A.shape[1]):
        return svd(B @ A)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    u, s, vh = _svd(r_b.double() @ r_a.T.double(), B.dtype) if by_gram(B) else svd(r_b @ r_a.T)
    return q_b @ u, s, vh @ q_a.T


def left(x: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors of (d, k), (d, min(d, k)), orthonormal, and the singular values, descending.

    By way of QR, which works column by column: the vectors span each column to rounding, however small it is beside the
    others.
    """
    if x.shape[1] >= x.shape[0]:
        return svd(x)[:2]
    q, r = torch.linalg.qr(x)
    if not by_gram(x):
        u, s, _ = torch.linalg.svd(r)
        return q @ u, s
    u, s = _squares(r.double())
    return q @ u.to(x), s.to(x)


def polar(x: Tensor, tolerance: float) -> Tensor:
    """The polar factor of (d, k), k ≤ d: orthonormal columns, or the partial isometry where columns are dependent.

    Args:
        tolerance: singular values of at most this share of the largest are none.
    """
    if not by_gram(x):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        rank = int((s > tolerance * s[:1]).sum())
        return u[:, :rank] @ vh[:rank]
    wide = x.double()
    v, s = _squares(wide.T)
    return (wide @ ((v * _inverse(s, tolerance)) @ v.T)).to(x)


def _svd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a matrix in fp64 by the eigenvectors of its smaller Gram matrix."""
    if x.shape[0] > x.shape[1]:
        v, s, uh = _svd(x.T, dtype)
        return uh.T, s, v.T
    u, s = _squares(x)
    floor = (len(s) * torch.finfo(x.dtype).eps) ** 0.5
    vh = _inverse(s, floor)[:, None] * (u.T @ x)
    return u.to(dtype), s.to(dtype), vh.to(dtype)


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """(U (m, m), S (m,) descending) of x (m, n), m ≤ n, from x xᵀ."""
    squares, u = torch.linalg.eigh(x @ x.T)
    return u.flip(-1), squares.clamp_min(0).sqrt().flip(-1)


def _inverse(s: Tensor, tolerance: float) -> Tensor:
    """1 / s, but 0 where s is at most a share of the largest."""
    return torch.where(s > tolerance * s[:1], 1 / s, 0.0)
