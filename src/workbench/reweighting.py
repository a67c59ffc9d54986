"""What LoRA-LEGO's two reweightings are to mend, measured: centroids lose norm, and more units give outputs more variance.

decay = norm_decay(stack, k=8)                               # one row per cluster: ‖centroid‖ over its units' mean norm
ratio = variances([merged], inputs) / variances(adapters, inputs).mean()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from workbench.adapters import Adapter
from workbench.canonical import canonical as canonical_form
from workbench.errors import MergeError
from workbench.merge.lego import centroid, cluster, features
from workbench.stack import Stack

__all__ = ["norm_decay", "variances"]


def norm_decay(
    stack: Stack, k: int, *, canonical: str = "raw", normalise: bool = False, seed: int = 0, starts: int = 4
) -> pd.DataFrame:
    """The norm of each centroid that `lego` finds at weight 1, over the mean norm of its cluster's units (§3).

    Norms are of [a ; b], with `outer` of the matrix b a: those that the parameter reweighting evens out.

    Returns:
        One row per cluster: module, units (n of them), ratio, and orthogonal, the ratio of n orthogonal units of one norm,
        1/√n (with `outer`, whose centroid is cut to rank one, 1/n).

    Raises:
        MergeError: k is below 1, or an unknown canonical form.
    """
    if k < 1:
        raise MergeError(f"k is {k!r}, expected a whole number of at least 1")
    outer, rows = canonical == "outer", []
    for module, units in stack:
        units = canonical_form(units, canonical)
        labels = cluster(units, k, outer=outer, normalise=normalise, seed=seed, starts=starts)
        for label in labels.unique().tolist():
            part = units[labels == label]
            b, a = centroid(part, outer, None)
            norm = b.norm() * a.norm() if outer else torch.cat([a, b]).norm()
            each = part.B.norm(dim=0) * part.A.norm(dim=1) if outer else features(part).norm(dim=1)
            n, mean = len(part), float(each.mean())
            rows.append((module, n, float(norm) / mean if mean else 1.0, 1 / n if outer else n**-0.5))
    return pd.DataFrame(rows, columns=["module", "units", "ratio", "orthogonal"])


def variances(adapters: Sequence[Adapter], inputs: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
    """The variance of ΔW x over inputs x, mean over outputs: adapters (rows) × modules (columns), NaN where absent.

    Args:
        inputs: module → x (T, d_in), such as those that `workbench.merge.statistics.collect` keeps; None is x ~ N(0, I),
            for which it is ‖ΔW‖²_F / d_out.

    Raises:
        MergeError: a module without inputs, or with fewer than two.
    """
    table = {}
    for adapter in adapters:
        own = table.setdefault(adapter.name, {})
        for module, factors in adapter.modules.items():
            if inputs is None:
                own[module] = float(factors.delta().square().sum()) / len(factors.B)
            elif module not in inputs or len(inputs[module]) < 2:
                raise MergeError(
                    f"{adapter.name}: no inputs for {module}, or only one; collect them from more examples"
                )
            else:
                outputs = inputs[module].to(factors.A) @ factors.A.T @ factors.B.T
                own[module] = float(outputs.var(0).mean())
    return pd.DataFrame.from_dict(table, orient="index")
