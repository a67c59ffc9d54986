"""Who resembles whom in a pool: cosines of the updates, from Gram matrices of the stack; no ΔW is formed."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from workbench.errors import SelectionError
from workbench.stack import Stack, cosine, gram, squares

__all__ = ["by_layer", "norm_profile", "ordered", "pairs", "plane", "similarity", "tree"]


def similarity(stack: Stack, *, watch: Callable[[int, int, str], bool] | None = None) -> pd.DataFrame:
    """Cosine of ΔW_i and ΔW_j over all modules together, adapter × adapter.

    Args:
        watch: called before every module with how many are done, the number of all and the module's name; true stops.

    Raises:
        SelectionError: it was stopped; cosines over some of the modules would be those of other updates.
    """
    total, modules = 0.0, list(stack.modules)
    for done, module in enumerate(modules):
        if watch is not None and watch(done, len(modules), module):
            raise SelectionError(f"stopped after {done} of {len(modules)} modules; similarity needs all of them")
        total = total + gram(stack.modules[module], len(stack))
    return pd.DataFrame(cosine(total).cpu().numpy(), index=list(stack.names), columns=list(stack.names))


def ordered(matrix: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns of a similarity matrix in the order of its dendrogram (average linkage of 1 − cosine, optimal leaf order)."""
    from scipy.cluster.hierarchy import leaves_list

    if len(matrix) < 3:
        return matrix
    leaves = leaves_list(tree(matrix))
    return matrix.iloc[leaves, leaves]


def tree(matrix: pd.DataFrame, *, optimal: bool = True) -> np.ndarray:
    """A similarity matrix's dendrogram as scipy's linkage (N − 1, 4): average linkage of 1 − cosine.

    Args:
        optimal: leaves in the order that puts the most alike side by side; takes seconds for a thousand.

    Raises:
        SelectionError: fewer than two adapters.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 2:
        raise SelectionError(f"a dendrogram needs two adapters or more, got {len(matrix)}")
    distance = np.clip(1 - matrix.to_numpy(dtype=float), 0, 2)
    np.fill_diagonal(distance, 0)
    return linkage(squareform((distance + distance.T) / 2, checks=False), "average", optimal_ordering=optimal)


def plane(matrix: pd.DataFrame) -> pd.DataFrame:
    """A place in the plane for each adapter (columns x, y): the first two principal components of its similarity matrix.

    That is classical scaling of the distances √(2 − 2 cosine): of what the cosines tell, as much as two numbers can keep.
    """
    from sklearn.decomposition import KernelPCA

    size = min(2, len(matrix))
    found = KernelPCA(size, kernel="precomputed", eigen_solver="dense").fit_transform(matrix.to_numpy(dtype=float))
    return pd.DataFrame(np.pad(found, ((0, 0), (0, 2 - size))), index=matrix.index, columns=["x", "y"])


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


def by_layer(profile: pd.DataFrame) -> pd.DataFrame:
    """A norm profile by layer: the root of the sum of squares over the modules of each; what is missing counts as 0.

    A layer is a module's name up to its first number, and only the number where all layers are of one list; modules
    without a number keep their names and come last.
    """
    found = {module: re.match(r"(.*?)(\d+)(?:\.|$)", module) for module in profile.columns}
    lists = {match[1] for match in found.values() if match}
    names = [
        module if not match else match[2] if len(lists) == 1 else match[1] + match[2] for module, match in found.items()
    ]
    place = {
        name: (match is None, match[1] if match else "", int(match[2]) if match else 0)
        for name, match in zip(names, found.values(), strict=True)
    }
    total = (profile.fillna(0) ** 2).T.groupby(names, sort=False).sum().T
    return total[sorted(total.columns, key=place.__getitem__)] ** 0.5
