"""Spectra of updates, from the factors: how many directions an update really has."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from workbench.adapters import Adapter
from workbench.compose import LowRank
from workbench.errors import MergeError
from workbench.singular import factored_svd

__all__ = ["singular_values", "spectrum", "stable_ranks"]


def singular_values(adapter: Adapter) -> pd.DataFrame:
    """module, place (from 1), value: the singular values of every ΔW_m, descending; no ΔW is formed."""
    rows = []
    for module, factors in adapter.modules.items():
        values = factored_svd(factors.B, factors.A)[1][: factors.rank]
        rows += [(module, place, value) for place, value in enumerate(values.tolist(), 1)]
    return pd.DataFrame(rows, columns=["module", "place", "value"])


def spectrum(values: pd.DataFrame, module: str | None = None) -> pd.Series:
    """Singular values (`singular_values`) by place: of one module, or the median over the modules that have so many."""
    own = values if module is None else values[values["module"] == module]
    return own.groupby("place")["value"].median()


def stable_ranks(updates: Mapping[str, LowRank], squarings: int = 10) -> Tensor:
    """(G,) ‖ΔW‖_F² / ‖ΔW‖₂² of grouped updates, the mean over the modules where it is defined; NaN where it nowhere is.

    The largest singular value comes from 2^squarings power iterations on the R × R matrix (BᵀB)(AAᵀ), which has ΔWᵀΔW's
    eigenvalues, by squaring it.

    Raises:
        MergeError: updates that are not grouped, or under coefficients.
    """
    if not updates or any(u.B.ndim != 3 or u.c is not None for u in updates.values()):
        raise MergeError("stable ranks are of grouped updates without coefficients (compose.grouped)")
    ranks = []
    for update in updates.values():
        b, a = update.B.double(), update.A.double()
        inner = (b.mT @ b) @ (a @ a.mT)
        total = inner.diagonal(dim1=1, dim2=2).sum(1)
        power = inner
        for _ in range(squarings):
            power = power / power.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
            power = power @ power
        place = power.norm(dim=1).argmax(1)  # all columns point the same way by now; the longest is taken
        v = power[torch.arange(len(power), device=power.device), :, place][:, :, None]
        largest = (inner @ (v / v.norm(dim=1, keepdim=True).clamp_min(1e-300))).norm(dim=1)[:, 0]
        ranks.append(torch.where(total > 0, total / largest.clamp_min(1e-300), torch.nan))
    return torch.stack(ranks).nanmean(0).float().cpu()
