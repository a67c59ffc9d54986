"""Canonical forms of an adapter's units: the same ΔW, factored in a way that clustering can compare."""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.errors import MergeError
from workbench.singular import factored_svd, places
from workbench.stack import Units

__all__ = ["CANONICAL", "canonical"]

CANONICAL = ("raw", "balanced", "svd", "outer")


def canonical(units: Units, form: str = "raw") -> Units:
    """The same ΔW per adapter in another form of its units (LoRA-LEGO leaves the choice open, and k-means sees it).

    raw: as factored in the file. balanced: ‖a‖ = ‖b‖, and the first entry of a that reaches half its largest is
    positive, which frees units of scale and sign. svd: the units of the SVD of each adapter's ΔW, balanced: independent
    of how it was factored, up to equal singular values. outer: as balanced; the name tells `lego` to cluster by
    ⟨a, a′⟩⟨b, b′⟩.

    Raises:
        MergeError: an unknown form.
    """
    if form not in CANONICAL:
        raise MergeError(f"canonical form {form!r} is unknown; choose one of {', '.join(CANONICAL)}")
    if form == "raw":
        return units
    if form == "svd":
        B, A = units.B.clone(), units.A.clone()
        for own in places(units.owner).values():
            rank = len(own)
            u, s, vh = factored_svd(units.B[:, own], units.A[own])
            q = min(rank, len(s))
            b, a = units.B.new_zeros(B.shape[0], rank), units.A.new_zeros(rank, A.shape[1])
            b[:, :q], a[:q] = u[:, :q] * s[:q].sqrt(), s[:q, None].sqrt() * vh[:q]
            B[:, own], A[own] = b, a
        units = replace(units, B=B, A=A)
    norm_a, norm_b = units.A.norm(dim=1), units.B.norm(dim=0)
    live = (norm_a > 0) & (norm_b > 0)
    size = (norm_a * norm_b).sqrt()
    lead = (units.A.abs() >= 0.5 * units.A.abs().amax(1, keepdim=True)).to(torch.int8).argmax(1)
    sign = torch.where(units.A.gather(1, lead[:, None])[:, 0] < 0, -1.0, 1.0)
    factor_a = torch.where(live, sign * size / norm_a.clamp_min(1e-38), 0.0)
    factor_b = torch.where(live, sign * size / norm_b.clamp_min(1e-38), 0.0)
    return replace(units, A=units.A * factor_a[:, None], B=units.B * factor_b)
