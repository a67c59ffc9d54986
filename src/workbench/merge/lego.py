"""LoRA-LEGO: the units of all adapters are clustered, and each cluster's centroid is one unit of the merged adapter.

arXiv 2409.16167; its authors published no code, so each choice that the paper leaves open is an option or is named.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from workbench.canonical import canonical as canonical_form
from workbench.errors import MergeError
from workbench.merge.registry import method
from workbench.options import Count
from workbench.singular import factored_svd, on_processor, places
from workbench.stack import Stack, Units

__all__ = ["centroid", "cluster", "features", "inner_products", "lego"]

Canonical = Literal["raw", "balanced", "svd", "outer"]


def _notes(stack: Stack, weights: Tensor, options: dict) -> list[str]:
    ranks = stack.ranks()[weights != 0]
    sizes = dict(zip(stack.modules, ranks.sum(0).tolist(), strict=True))
    k = options["k"]
    if k is None:
        mixed = [m for m, column in zip(stack.modules, ranks.T, strict=True) if len(column[column > 0].unique()) > 1]
        return [f"ranks differ in {len(mixed)} modules: k is their mean there, rounded"] if mixed else []
    if sizes and k > max(sizes.values()):
        raise MergeError(
            f"lego: k is {k}, but no module has more than {max(sizes.values())} units of adapters with a weight other "
            "than 0; lower k"
        )
    short = [module for module, size in sizes.items() if size < k]
    return (
        [f"k = {k} exceeds the units of {len(short)} modules, such as {short[0]}, which keep all of theirs"]
        if short
        else []
    )


@method(
    "lego",
    paper="https://arxiv.org/abs/2409.16167",
    invariances={"units", "order"},
    also={
        ("canonical", "balanced"): {"scale"},
        ("canonical", "outer"): {"scale"},
        ("canonical", "svd"): {"scale", "gauge"},
    },
    notes=_notes,
)
def lego(
    units: Units,
    weights: Tensor,
    *,
    k: Count | None = None,
    canonical: Canonical = "raw",
    parameter_reweighting: bool = True,
    norm: Literal["2", "inf"] = "2",
    output_reweighting: bool = True,
    normalise: bool = False,
    seed: int = 0,
    starts: Count = 4,
) -> tuple[Tensor, Tensor]:
    """Rank-wise clustering (§3): k-means over all units of the module, a centroid a unit.

    Where scales go, as k-means sees them: s and then the adapter's weight (its sign too) multiply b; then the units are
    brought to the canonical form. Weight 0 leaves an adapter out.

    Args:
        k: units of the result, at most the module's R units; None is the candidates' rank, where ranks differ the mean
            over the adapters that have the module, rounded. With k ≥ R nothing is clustered, so that duplicates stay
            apart, and with `output_reweighting` off the result is the plain sum.
        canonical: the form of the units, see `workbench.canonical.canonical`. With `outer` the distance is that of the
            matrices b a, ‖b a − b′ a′‖_F, and a centroid is the best rank-one approximation of its cluster's mean.
        parameter_reweighting: rescale each centroid [a ; b] (`outer`: the matrix b a) to the mean norm of its cluster.
        norm: the norm of that, Euclidean or the largest entry.
        output_reweighting: multiply the result by √(r / k), r the mean rank of the candidates in the module.
        normalise: cluster the directions [a/‖a‖ ; b/‖b‖] (`outer`: b a / ‖b a‖) instead; centroids as before.
        seed: of k-means; with `starts` beginnings, of which the one of least inertia is kept.
    """
    units = units.weighted(weights)
    if not len(units):
        return units.B.new_zeros(units.shape[0], 1), units.A.new_zeros(1, units.shape[1])
    ranks = units.ranks(len(weights)).to(units.B)
    r = float(ranks[ranks > 0].mean())
    k = int(r + 0.5) if k is None else k
    B, A = units.B, units.A
    if k < len(units):
        units = canonical_form(units, canonical)
        labels = cluster(units, k, outer=canonical == "outer", normalise=normalise, seed=seed, starts=starts)
        parts = [units[own] for own in places(labels).values()]
        centroids = [centroid(part, canonical == "outer", norm if parameter_reweighting else None) for part in parts]
        B, A = torch.stack([b for b, _ in centroids], 1), torch.stack([a for _, a in centroids])
    if output_reweighting:
        B = B * (r / A.shape[0]) ** 0.5
    return B, A


def centroid(part: Units, outer: bool, norm: str | None) -> tuple[Tensor, Tensor]:
    """(b, a) of one cluster, at the mean norm of its units unless `norm` is None."""
    order = 2 if norm != "inf" else float("inf")
    if outer:
        u, s, vh = factored_svd(part.B / len(part), part.A)
        b, a = u[:, 0] * s[0], vh[0]
        sizes, size = part.B.norm(order, 0) * part.A.norm(order, 1), b.norm(order) * a.norm(order)
    else:
        b, a = part.B.mean(1), part.A.mean(0)
        sizes, size = features(part).norm(order, 1), torch.cat([a, b]).norm(order)
    if norm is not None and size > 0:
        factor = sizes.mean() / size
        return b * factor, a if outer else a * factor
    return b, a


def features(units: Units, normalise: bool = False) -> Tensor:
    """(R, d_in + d_out), the vectors [a ; b] that k-means sees; with `normalise`, [a/‖a‖ ; b/‖b‖]."""
    a, b = units.A, units.B.T
    if normalise:
        a, b = torch.nn.functional.normalize(a, eps=1e-38), torch.nn.functional.normalize(b, eps=1e-38)
    return torch.cat([a, b], 1)


def inner_products(units: Units, *, outer: bool, normalise: bool = False) -> Tensor:
    """(R, R) in float64: of the matrices b a with `outer`, ⟨a, a′⟩⟨b, b′⟩, else of the vectors [a ; b]."""
    if not outer:
        x = features(units, normalise).double()
        return x @ x.T
    a, b = units.A.double(), units.B.double()
    inner = (a @ a.T) * (b.T @ b)
    size = inner.diagonal().sqrt().clamp_min(1e-300)
    return inner / size[:, None] / size[None] if normalise else inner


def cluster(
    units: Units, k: int, *, outer: bool = False, normalise: bool = False, seed: int = 0, starts: int = 4
) -> Tensor:
    """(R,) clusters 0 … q − 1 of units in their canonical form; q ≤ k, less where fewer than k units differ.

    The units are sorted by content first, so that their order decides nothing. k ≥ R puts each in its own cluster. On a
    processor scikit-learn clusters vectors; on a GPU, and of matrices, it is done by inner products.
    """
    if k >= len(units):
        return torch.arange(len(units), device=units.owner.device)
    order = _by_content(units)
    units = units[order]
    if outer or not on_processor(units.A):
        trials = 1 if outer else 2 + int(math.log(k))  # as many as scikit-learn's
        inner = inner_products(units, outer=outer, normalise=normalise)
        found = _kernel_kmeans(inner, k, seed, starts, trials)
    else:
        found = _kmeans(features(units, normalise), k, seed, starts)
    _, found = found.unique(return_inverse=True)  # no empty clusters
    labels = torch.empty_like(found)
    labels[order.to(found.device)] = found
    return labels.to(units.owner.device)


def _by_content(units: Units) -> Tensor:
    """(R,) the order of ‖b a‖ (free of scale and sign), and where that is equal of a fixed projection of [a ; b]."""
    x = features(units).double()
    sizes = units.A.double().norm(dim=1) * units.B.T.double().norm(dim=1)
    fixed = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).cos()
    second = (x * fixed).sum(1).argsort(stable=True)
    return second[sizes[second].argsort(stable=True)]


def _kmeans(x: Tensor, k: int, seed: int, starts: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(k, n_init=starts, random_state=seed, tol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer than k different units: the caller counts them
        return torch.from_numpy(model.fit_predict(x.cpu().numpy())).long()


def _kernel_kmeans(inner: Tensor, k: int, seed: int, starts: int, trials: int = 1, steps: int = 300) -> Tensor:
    """k-means from inner products alone: ‖x − μ_C‖² = ⟨x, x⟩ − 2 Σ_{j∈C} ⟨x, x_j⟩ / |C| + Σ_{i,j∈C} ⟨x_i, x_j⟩ / |C|²."""
    own = inner.diagonal()
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(inner), dtype=torch.long, device=inner.device), float("inf")
    for _ in range(starts):
        centres = _plus_plus(inner, k, generator, trials)
        labels = (own[centres] - 2 * inner[:, centres]).argmin(1)
        for _ in range(steps):
            members = torch.nn.functional.one_hot(labels, len(centres)).to(inner)
            means = members / members.sum(0).clamp_min(1)
            cross = inner @ means
            distance = own[:, None] - 2 * cross + (means * cross).sum(0)
            empty = (members.sum(0) == 0).nonzero().flatten().tolist()
            if empty:
                distance[:, empty] = float("inf")
            moved = distance.argmin(1)
            for c in empty:  # an empty cluster takes the unit that is worst served
                far = int(distance.gather(1, moved[:, None])[:, 0].argmax())
                moved[far], distance[far, c] = c, 0.0
            if torch.equal(moved, labels):
                break
            labels = moved
        inertia = float(distance.gather(1, labels[:, None]).sum())
        if inertia < least:
            best, least = labels, inertia
    return best


def _plus_plus(inner: Tensor, k: int, generator: torch.Generator, trials: int) -> list[int]:
    """k-means++ seeding: each centre drawn in proportion to the squared distance to the nearest one so far.

    Of several drawn at once that one stays which leaves the least. Draws are the processor's, whatever the device.
    """
    own = inner.diagonal()
    centres = [int(torch.randint(len(inner), (1,), generator=generator))]
    nearest = torch.full_like(own, float("inf"))
    while len(centres) < k:
        last = centres[-1]
        nearest = torch.minimum(nearest, own - 2 * inner[:, last] + own[last])
        nearest.masked_fill_(nearest <= 1e-12 * own.max(), 0.0)
        chances = nearest.cpu()
        if not chances.any():
            break
        drawn = torch.multinomial(chances, trials, replacement=True, generator=generator).to(inner.device)
        if trials > 1:
            distance = own[:, None] - 2 * inner[:, drawn] + own[drawn]
            drawn = drawn[torch.minimum(nearest[:, None], distance).sum(0).argmin()]
        centres.append(int(drawn))
    return centres
