"""What LEGO's clusters mean: whether units of different adapters fall together, and what those adapters have in common.

frame = cluster_units(stack, k=16)                       # one row per unit
sharing(frame).groupby("module")[["shared", "expected"]].mean()
purity(frame, {"a": "reverse", "b": "sort", …})          # beside the same under shuffled labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import gammaln

from workbench.canonical import canonical
from workbench.errors import MergeError, SelectionError
from workbench.merge.lego import cluster, inner_products
from workbench.stack import Stack, Units

__all__ = ["cluster_units", "members", "purity", "sharing", "unit_map"]

_EXACT = 1000  # units up to which a map takes all directions at once; beyond that the widest few


def cluster_units(
    stack: Stack,
    k: int,
    *,
    canonical: str = "raw",
    normalise: bool = False,
    seed: int = 0,
    starts: int = 4,
    modules: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The clusters that `lego` finds at weight 1 under the same settings.

    Returns:
        One row per unit: module, adapter, unit (its place within the adapter, in the canonical form), cluster
        (0 … within the module), norm (‖b‖‖a‖). A module of at most k units has one cluster a unit.

    Raises:
        MergeError: k is below 1, a module that the stack does not have, or an unknown canonical form.
    """
    if k < 1:
        raise MergeError(f"k is {k!r}, expected a whole number of at least 1")
    frames = []
    for module in stack.modules if modules is None else modules:
        units = _canonical(stack, module, canonical)
        labels = cluster(units, k, outer=canonical == "outer", normalise=normalise, seed=seed, starts=starts)
        frames.append(_describe(stack, module, units).assign(cluster=labels.cpu().numpy()))
    if not frames:
        raise MergeError("no modules were named, so there is nothing to cluster")
    return pd.concat(frames, ignore_index=True)[["module", "adapter", "unit", "cluster", "norm"]]


def sharing(frame: pd.DataFrame) -> pd.DataFrame:
    """Do units of different adapters fall into shared clusters, more than chance would have it?

    Chance is exact (no sampling): the module's units dealt at random into clusters of the same sizes. A cluster of n of
    the R units then lies within one adapter with probability Σ_i C(r_i, n) / C(R, n), and holds
    Σ_i [1 − C(R − r_i, n) / C(R, n)] adapters on average.

    Args:
        frame: from `cluster_units`.

    Returns:
        One row per cluster: module, cluster, units, adapters (different ones), shared (more than one), expected (the
        probability of that by chance), expected_adapters. Means of shared and expected are the shares to compare.
    """
    rows = []
    for module, part in frame.groupby("module", sort=False):
        ranks = part.groupby("adapter").size().to_numpy()
        for label, members in part.groupby("cluster"):
            n = len(members)
            found = members["adapter"].nunique()
            alone = np.exp(_log_choose(ranks, n) - _log_choose(len(part), n)).sum()
            missed = np.exp(_log_choose(len(part) - ranks, n) - _log_choose(len(part), n))
            rows.append((module, label, n, found, found > 1, max(0.0, 1 - alone), (1 - missed).sum()))
    names = ["module", "cluster", "units", "adapters", "shared", "expected", "expected_adapters"]
    return pd.DataFrame(rows, columns=names)


def members(frame: pd.DataFrame, labels: Mapping[str, str] | None = None) -> pd.DataFrame:
    """What is in each cluster, the largest first.

    Args:
        frame: from `cluster_units`.
        labels: adapter → label, for every adapter in the frame.

    Returns:
        One row per cluster: module, cluster, units, adapters (different ones), which (a tuple of them, those with most units
        first), norm_share (of the module's squared norms Σ ‖b‖²‖a‖², the cluster's part), and with labels commonest (the
        label of most units) and purity (their share).
    """
    total, rows = frame.groupby("module", sort=False)["norm"].apply(lambda norm: (norm**2).sum()), []
    for (module, label), part in frame.groupby(["module", "cluster"], sort=False):
        which = part["adapter"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index
        share = float((part["norm"] ** 2).sum() / total[module]) if total[module] else 0.0
        row = {"module": module, "cluster": label, "units": len(part), "adapters": len(which), "which": tuple(which)}
        row["norm_share"] = share
        if labels is not None:
            counts = part["adapter"].map(labels).value_counts()
            row |= {"commonest": counts.index[0], "purity": float(counts.iloc[0] / len(part))}
        rows.append(row)
    place = {module: i for i, module in enumerate(total.index)}
    order = sorted(rows, key=lambda row: (place[row["module"]], -row["units"], row["cluster"]))
    return pd.DataFrame(order)


def purity(frame: pd.DataFrame, labels: Mapping[str, str], *, permutations: int = 100, seed: int = 0) -> pd.DataFrame:
    """Do clusters follow a label of the adapters (operation, domain, format), beyond what shuffled labels give?

    Purity is the share of units whose label is the commonest of their cluster; nmi the normalised mutual information of
    clusters and labels (by the mean of the two entropies). Two controls, each `permutations` times:

    - `adapters`: labels shuffled over adapters, an adapter's units staying together. Only this one tells a label apart
      from the mere fact that units of one adapter resemble each other;
    - `units`: labels shuffled over the units of each module.

    Args:
        frame: from `cluster_units`.
        labels: adapter → label, for every adapter in the frame.

    Returns:
        Rows module × measure × control, and module "all" for the mean over modules weighted by their units: value, mean,
        low and high of the control (the middle 95 %), and p, the share of (value and shuffles) at least the value.

    Raises:
        SelectionError: an adapter without a label, or fewer than one permutation.
    """
    adapters = list(dict.fromkeys(frame["adapter"]))
    missing = [name for name in adapters if name not in labels]
    if missing:
        raise SelectionError(f"{len(missing)} of {len(adapters)} adapters have no label, such as {missing[0]}")
    if permutations < 1:
        raise SelectionError(f"permutations is {permutations}, expected at least 1")
    _, codes = np.unique([str(labels[name]) for name in adapters], return_inverse=True)
    place = {name: i for i, name in enumerate(adapters)}
    modules = {
        module: (part["adapter"].map(place).to_numpy(), pd.factorize(part["cluster"])[0])
        for module, part in frame.groupby("module", sort=False)
    }
    sizes = np.array([len(owner) for owner, _ in modules.values()])

    def measure(label_of) -> np.ndarray:
        """(modules + 1, 2): purity and nmi, the last row pooled."""
        each = np.array([_measures(clusters, label_of(owner)) for owner, clusters in modules.values()])
        return np.vstack([each, sizes @ each / sizes.sum()])

    rng = np.random.default_rng(seed)
    value = measure(lambda owner: codes[owner])
    controls = {"adapters": [], "units": []}
    for _ in range(permutations):
        shuffled = rng.permutation(codes)
        controls["adapters"].append(measure(lambda owner, shuffled=shuffled: shuffled[owner]))
        controls["units"].append(measure(lambda owner: rng.permutation(codes[owner])))
    rows = []
    for i, module in enumerate([*modules, "all"]):
        for j, name in enumerate(("purity", "nmi")):
            for control, found in controls.items():
                drawn = np.array([table[i, j] for table in found])
                low, high = np.quantile(drawn, [0.025, 0.975])
                p = (1 + (drawn >= value[i, j] - 1e-12).sum()) / (1 + permutations)
                rows.append((module, name, control, value[i, j], drawn.mean(), low, high, p))
    return pd.DataFrame(rows, columns=["module", "measure", "control", "value", "mean", "low", "high", "p"])


def unit_map(stack: Stack, module: str, *, canonical: str = "raw", seed: int = 0, method: str = "pca") -> pd.DataFrame:
    """A flat map of one module's units, by the distances that k-means sees under that canonical form.

    Args:
        method: "pca", the two directions of largest variance, or "tsne" (scikit-learn's, perplexity at most 30; below four units "pca").
            Of more than 1,000 units the directions come from Lanczos iteration, without the R × R inner products.

    Returns:
        One row per unit: x, y, adapter, unit, norm.

    Raises:
        MergeError: an unknown module, canonical form or method.
    """
    if method not in ("pca", "tsne"):
        raise MergeError(f"method is {method!r}, expected 'pca' or 'tsne'")
    units = _canonical(stack, module, canonical)
    points = _directions(units, canonical == "outer", 50 if method == "tsne" else 2)
    if method == "tsne" and len(points) > 3:
        from sklearn.manifold import TSNE

        model = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=seed)
        points = model.fit_transform(points)
    found = _describe(stack, module, units).assign(x=points[:, 0], y=points[:, 1])
    return found[["x", "y", "adapter", "unit", "norm"]]


def _directions(units: Units, outer: bool, n: int) -> np.ndarray:
    """(R, 2 … n) coordinates in the directions of largest variance, the widest first; zeros where there are fewer than 2.

    Of many units by Lanczos iteration, which never holds the R × R inner products: K v of the matrices b a is, at unit i,
    a_i (Σ_j v_j a_j b_j) b_i.
    """
    if len(units) <= _EXACT:
        inner = inner_products(units, outer=outer).cpu()
        centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
        values, vectors = torch.linalg.eigh(centred)
    else:
        from scipy.sparse.linalg import LinearOperator, eigsh

        a, b = units.A.double().cpu().numpy(), units.B.double().cpu().numpy().T
        x = np.concatenate([a, b], 1)

        def times(v: np.ndarray) -> np.ndarray:
            v = v.ravel() - v.mean()
            out = ((a @ (a.T @ (v[:, None] * b))) * b).sum(1) if outer else x @ (x.T @ v)
            return out - out.mean()

        operator = LinearOperator((len(units), len(units)), matvec=times, dtype=float)
        start = np.random.default_rng(0).standard_normal(len(units))
        if np.abs(times(start)).max() <= 1e-12 * float((x * x).sum()):  # all alike: there is no direction
            return np.zeros((len(units), 2))
        values, vectors = (torch.from_numpy(found) for found in eigsh(operator, n, v0=start, tol=1e-5))
    vectors = vectors * torch.where(vectors.gather(0, vectors.abs().argmax(0)[None]) < 0, -1.0, 1.0)
    points = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :n].numpy()
    return np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))


def _canonical(stack: Stack, module: str, form: str) -> Units:
    if module not in stack.modules:
        raise MergeError(f"no module {module!r} in this stack; it has {', '.join(list(stack.modules)[:3])}, …")
    return canonical(stack.modules[module], form)


def _describe(stack: Stack, module: str, units: Units) -> pd.DataFrame:
    owner = units.owner.cpu().numpy()
    adapter = np.array(stack.names, dtype=object)[owner]
    norms = (units.A.norm(dim=1) * units.B.norm(dim=0)).cpu().numpy()
    frame = pd.DataFrame({"module": module, "adapter": adapter, "norm": norms})
    return frame.assign(unit=frame.groupby("adapter").cumcount())


def _log_choose(n, k):
    """log C(n, k), −∞ where k > n."""
    n = np.asarray(n, dtype=float)
    return np.where(k <= n, gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1), -np.inf)


def _measures(clusters: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Purity, and mutual information over the mean entropy (1 where neither has any), from the table of counts."""
    joint = np.zeros((clusters.max() + 1, labels.max() + 1))
    np.add.at(joint, (clusters, labels), 1.0)
    n = len(labels)
    rows, columns = _entropy(joint.sum(1) / n), _entropy(joint.sum(0) / n)
    shared = rows + columns - _entropy(joint.ravel() / n)
    return joint.max(1).sum() / n, 1.0 if rows + columns == 0 else 2 * max(0.0, shared) / (rows + columns)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
