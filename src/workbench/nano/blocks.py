"""What the grids behind the notebooks ask for: blocks of recipes, each on its tasks, seeds and sizes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from workbench.errors import WorkbenchError
from workbench.experiment import NEW_ADAPTER, ZERO_SHOT, Recipe
from workbench.nano import dial, pools, world
from workbench.tasks import names

__all__ = ["DESIGN", "GRIDS", "Block", "design"]


@dataclass(frozen=True)
class Block:
    """Recipes, each a job of its own, on the same tasks, seeds and sizes; `pool` is "nano" or one of `nano.pools`.

    `fixed` keeps the examples that seed 0 draws, so that seeds choose adapters alone.
    """

    recipes: Sequence[Recipe]
    tasks: Sequence[str]
    seeds: Sequence[int]
    n_train: int
    n_validation: int = 20
    n_test: int = 500
    pool: str = "nano"
    fixed: bool = False


_MERGES = ("average", "svd", "ties", "lego")
_MORE = (
    *("sum", "linear", "magnitude_prune", "dare_linear", "dare_ties", "della", "breadcrumbs"),
    *("tsv", "iso_c", "iso_cts", "knots_ties", "knots_dare", "core", "regmean", "fisher"),
)
_TASKS = tuple(name for kind in world.KINDS for name in names(kind))
_FIVE = (0, 1, 2, 3, 4)
_RATES = {"new": [1e-3, 3e-3, 1e-2], "coefficients": [1e-2, 5e-2, 2e-1]}
TUNED = Recipe("new adapter", tune={"lr": _RATES["new"]})


def _both(recipes: Sequence[Recipe], *controls: str) -> list[Recipe]:
    """Each recipe and its controls."""
    return [
        one for recipe in recipes for one in (recipe, *(recipe.against(control) for control in controls or ("sigma",)))
    ]


def _merging() -> Iterator[Block]:
    adaptive = [
        Recipe(method, select=select, k=10)
        for select in ("evaluation", "random")
        for method in ("coefficients", "lorahub", *_MERGES)
    ]
    more = [Recipe(method, select="evaluation", k=10) for method in _MORE]
    for n in (10, 80):
        baselines = [NEW_ADAPTER, ZERO_SHOT, Recipe("in-context", shots=5)]
        yield Block(baselines + _both(adaptive + more), _TASKS, (0, 1), n)


def _random() -> Iterator[Block]:
    swept = [
        Recipe("coefficients", select="random", k=k, control=control, steps=steps, granularity=granularity)
        for steps in (400, 100)
        for granularity in ("module", "expert")
        for k in (40, 20, 10, 5)
        for control in ("", "sigma", "spectrum")
    ]
    yield Block([NEW_ADAPTER, ZERO_SHOT, *swept], _TASKS[::2], (0,), 80)


def _findings() -> Iterator[Block]:
    """The recycling study's findings: five seeds, every kind of target."""
    best = {"select": "evaluation", "k": 10}
    for n in (10, 80):
        recipes = [TUNED, NEW_ADAPTER, ZERO_SHOT, Recipe("in-context", shots=5)]
        recipes += [Recipe("best single"), Recipe("best single", among="random")]
        controls = ("sigma", "norm", "spectrum", "shuffled") if n == 10 else ("sigma", "shuffled")
        recipes += _both([Recipe("coefficients", **best)], *controls)
        recipes += _both([Recipe("coefficients", k=k) for k in (10, 30)])
        recipes += [Recipe("coefficients", select=how, k=10) for how in ("cosine", "qfim", "diverse")]
        recipes += _both([Recipe("coefficients", k=10, own=True)], "sigma", "sigma but own")
        recipes += [Recipe("coefficients", **best, own=True, start="target", activation="linear")]
        recipes += _both([Recipe(method, **best) for method in ("adamerging", "arrow", "lorahub", "average")])
        recipes += [Recipe("arrow", **best, trained=True), Recipe("adamerging", **best, objective="entropy")]
        recipes += [Recipe("pi_tuning", select="qfim", k=20, lr=1e-3)]
        yield Block(recipes, _TASKS, _FIVE, n)


def _relevance() -> Iterator[Block]:
    """Windows that skip the best, and the dial from a near-twin to nothing shared."""
    for n in (10, 80):
        windows = [Recipe("coefficients", select="evaluation", k=10, skip=skip) for skip in (5, 10, 15, 20, 40)]
        yield Block(windows, _TASKS, _FIVE, n)
        for which in dial.LEVELS:
            recipe = Recipe("coefficients", select=f"dial {which}", k=10)
            at = [name for name in _TASKS if which == "twin" or which in _levels(name)]
            recipes = _both([recipe]) if which in ("twin", "nothing") else [recipe]
            yield Block(recipes, at, _FIVE, n, pool="twins")


def _levels(name: str) -> set[str]:
    target = world.find(name.removeprefix("nano/"))
    return {dial.level(target, spec) for spec in world.UPSTREAM}


def _lorahub() -> Iterator[Block]:
    """LoraHub's trade-off at five examples: tokens, demonstrations resampled or fixed, number of adapters, their rank."""
    shots = [ZERO_SHOT, *(Recipe("in-context", shots=n) for n in (1, 2, 3, 4, 5))]
    hub = Recipe("lorahub", k=20)
    for fixed in (False, True):
        yield Block(shots + _both([hub]), _TASKS, _FIVE, 5, fixed=fixed)
    others = [Recipe("lorahub", k=20, objective="reference"), Recipe("lorahub", k=20, optimiser="cobyla")]
    others += [Recipe("lorahub", select="evaluation", k=20)]
    trained = [Recipe("new adapter", steps=100), Recipe("full fine-tuning", steps=100)]
    yield Block(_both(others) + trained, _TASKS, _FIVE, 5)
    yield Block(_both([Recipe("lorahub", k=k) for k in (5, 10, 40)]), _TASKS, _FIVE, 5)
    for rank in pools.RANKS:
        ranked = [Recipe("lorahub", k=20, space=space, objective="reference") for space in ("delta", "factor")]
        yield Block(_both(ranked), _TASKS, _FIVE, 5, pool=f"rank-{rank}")


def _regularisation() -> Iterator[Block]:
    """Few degrees of freedom by other means: equal steps, three learning rates each, the best on validation."""
    near = ((2e-2, 5e-2, 2e-1), (3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1), (1e-4, 3e-4, 1e-3))
    ways = ("random subspace", "trained core", "trained vectors", "full fine-tuning")
    few = [Recipe(way, steps=100, tune={"lr": list(rates)}) for way, rates in zip(ways, near, strict=True)]
    few += [Recipe("trained core", steps=100, frozen="svd", tune={"lr": [1e-2, 3e-2, 1e-1]})]
    few += [Recipe("new adapter", steps=100, rank=rank, tune={"lr": _RATES["new"]}) for rank in (1, 8)]
    few += [Recipe("new adapter", tune={"lr": _RATES["new"], "steps": [12, 25, 50]})]
    merges = [
        Recipe("coefficients", select=how, k=10, tune={"lr": _RATES["coefficients"]})
        for how in ("evaluation", "random")
    ]
    for n in (10, 80):
        yield Block(few + _both(merges), _TASKS, (0, 1, 2), n)


DESIGN = {
    "granularity": ("expert", "layer", "sublayer", "module", "unit"),
    "activation": ("linear", "squared", "softmax", "sigmoid", "leaky_relu"),
    "start": ("zero", "uniform", "normal", "equal"),
    "lr": (1e-1, 5e-2, 1e-2),
    "k": (5, 10, 20, 30),
    "select": ("random", "evaluation", "cosine"),
    "own": (False, True),
}


def design(n: int, seed: int = 0, space: Mapping[str, Sequence] = DESIGN) -> list[Recipe]:
    """n different recipes of learned coefficients from a design space, every value of a choice as often as the others.

    Each choice goes round its values in a shuffled order of its own (a Latin hypercube sample), shuffled again until no two
    recipes are alike.

    Raises:
        WorkbenchError: more recipes than the space has.
    """
    if n > math.prod(map(len, space.values())):
        raise WorkbenchError(f"{n} recipes asked for, but the space has {math.prod(map(len, space.values()))}")
    rng, rows = random.Random(f"design|{seed}"), []
    while len(set(rows)) < n:
        columns = [[values[i % len(values)] for i in range(n)] for values in space.values()]
        for column in columns:
            rng.shuffle(column)
        rows = list(zip(*columns, strict=True))
    return [Recipe("coefficients", **dict(zip(space, row, strict=True))) for row in rows]


def _design() -> Iterator[Block]:
    yield Block([NEW_ADAPTER, ZERO_SHOT, *_both(design(80))], _TASKS[::2], (0,), 80)


def _open() -> Iterator[Block]:
    """Can anything beat a tuned new adapter where a relative is in the pool, and lose nothing where none is?"""
    best = {"select": "evaluation", "k": 10}
    recipes = [
        *(NEW_ADAPTER, TUNED, Recipe("new adapter", steps=500)),
        *_both([Recipe("prior", **best)]),
        Recipe("prior", **best, fallback=False),
        *(Recipe("prior", **best, joint=True, merge_steps=steps) for steps in (0, 100)),
        Recipe("prior", select="diverse", k=10),
        Recipe("prior", select="evaluation", k=1),
        Recipe("ridge", **best, granularity="expert"),
        Recipe("coefficients", **best, tune={"l2": [0.0, 0.01, 0.1, 1.0]}),
        Recipe("coefficients", **best, granularity="unit", tune={"sparsity": [0.0, 0.1, 1.0]}),
    ]
    yield Block(recipes, _TASKS, _FIVE, 10)


GRIDS = {
    "merging": _merging,
    "random": _random,
    "findings": _findings,
    "relevance": _relevance,
    "lorahub": _lorahub,
    "regularisation": _regularisation,
    "design": _design,
    "open": _open,
}
