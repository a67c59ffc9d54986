"""Who resembles whom in a pool: cosines of the updates, from Gram matrices of the stack; no ΔW is formed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.errors import SelectionError
from workbench.stack import Stack, cosine, squares

__all__ = ["norm_profile", "ordered", "pairs", "similarity"]


def similarity(stack: Stack) -> pd.DataFrame:
    """Cosine of ΔW_i and ΔW_j over all modules together, adapter × adapter."""
    return pd.DataFrame(cosine(stack.gram()).cpu().numpy(), index=list(stack.names), columns=list(stack.names))


def ordered(matrix: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns of a similarity matrix in the order of its dendrogram (average linkage of 1 − cosine, optimal leaf order)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 3:
        return matrix
    distance = np.clip(1 - matrix.to_numpy(dtype=float), 0, 2)
    np.fill_diagonal(distance, 0)
    leaves = leaves_list(
        linkage(squareform((distance + distance.T) / 2, checks=False), "average", optimal_ordering=True)
    )
    return matrix.iloc[leaves, leaves]


def pairs(matrix: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Every ordered pair of different adapters with its cosine and what the two have in common.

    Args:
        labels: one row per adapter name (its index), one column per label (operation, domain, format).

    Returns:
        first, second, cosine, shared ("nothing", or the labels they share joined by " + "), and `first`'s own labels.

    Raises:
        SelectionError: an adapter without labels.
    """
    lacking = [name for name in matrix.index if name not in labels.index]
    if lacking:
        raise SelectionError(f"{len(lacking)} adapters have no labels, such as {lacking[0]!r}")
    labels = labels.loc[matrix.index]
    first, second = (
        grid.ravel() for grid in np.meshgrid(np.arange(len(matrix)), np.arange(len(matrix)), indexing="ij")
    )
    first, second = first[first != second], second[first != second]
    same = {c: labels[c].to_numpy()[first] == labels[c].to_numpy()[second] for c in labels}
    shared = [" + ".join(c for c in same if same[c][i]) or "nothing" for i in range(len(first))]
    table = pd.DataFrame({"first": matrix.index.to_numpy()[first], "second": matrix.index.to_numpy()[second]})
    table["cosine"], table["shared"] = matrix.to_numpy()[first, second], shared
    return table.assign(**{c: labels[c].to_numpy()[first] for c in labels})


def norm_profile(stack: Stack) -> pd.DataFrame:
    """‖ΔW‖_F of every adapter (rows) in every module (columns); 0 where it does not have the module."""
    columns = {module: squares(units, len(stack)).sqrt().float().cpu().numpy() for module, units in stack}
    return pd.DataFrame(columns, index=list(stack.names))
