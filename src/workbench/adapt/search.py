"""LoraHub: gradient-free search for one weight per adapter (arXiv 2307.13269), many fits side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Thread
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from workbench.adapt.fitted import Fitted, fold, side_by_side
from workbench.adapt.gradient import Curves, Watch
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import LowRank, grouped
from workbench.errors import MergeError
from workbench.evaluate import Encoded, score
from workbench.options import Count
from workbench.stack import Stack

__all__ = ["OBJECTIVES", "lorahub", "objective_value", "population_losses"]

SPACES, OPTIMISERS, OBJECTIVES = ("delta", "factor"), ("cma", "cobyla"), ("paper", "reference")
BOUND = 1.5


def objective_value(losses: Tensor, lengths: Tensor, weights: Tensor, objective: str, batch: int = 5) -> Tensor:
    """What LoraHub minimises, (C,), for per-example losses (C, n), answer lengths (n,) and weights (C, K).

    paper (§3.3): cross-entropy + 0.05 Σ|w|. reference (its code): Σ over batches of the mean cross-entropy, divided by
    the number of examples, + 0.05 mean|w|; at 5 examples in one batch and 20 adapters a penalty four times weaker.
    """
    if objective == "paper":
        return (losses * lengths).sum(1) / lengths.sum() + 0.05 * weights.abs().sum(1)
    parts = zip((losses * lengths).split(batch, 1), lengths.split(batch), strict=True)
    return sum(total.sum(1) / size.sum() for total, size in parts) / losses.shape[1] + 0.05 * weights.abs().mean(1)


def population_losses(
    base: Base,
    stacks: Sequence[Stack],
    weights: Tensor,
    examples: Sequence[Sequence[Encoded]],
    space: str = "delta",
    pieces: dict | None = None,
) -> Tensor:
    """Losses (G, P, n) of P candidates' weights (G, P, K) for each of G fits, in one pass.

    delta: Σ w_i s_i B_i A_i. factor: s (Σ w_i B_i)(Σ w_i A_i) on the raw factors, with cross terms, as published; every
    adapter must then have the same rank, scaling and modules. `pieces` is `side_by_side(stacks, base)`, where it is at hand.

    Raises:
        MergeError: factor space over adapters that differ in rank, scaling or modules.
    """
    g, p, _ = weights.shape
    repeated = [rows for rows in examples for _ in range(p)]
    if space == "delta":
        updates = {}
        for module, (b, a, owner) in (pieces or side_by_side(stacks, base)).items():
            c = weights.to(base.device).gather(2, owner[:, None].expand(-1, p, -1))
            updates[module] = LowRank(b, a, c.reshape(g * p, -1))
    else:
        parts = [[_mixed(stack, w) for w in weights[i]] for i, stack in enumerate(stacks)]
        updates = grouped([Adapter("", modules) for row in parts for modules in row], base.device)
    return score(base, repeated, updates).loss.view(g, p, -1)


def _mixed(stack: Stack, weights: Tensor) -> dict[str, Factors]:
    """LoraHub's published composition: both factors mixed by the same weights, then the common scaling."""
    out, n = {}, len(stack)
    for module, units in stack:
        ranks = units.ranks(n)
        if (ranks != ranks[0]).any() or (units.scale != units.scale[0]).any():
            raise MergeError(
                f"factor space needs adapters of one rank and scaling with the same modules; in {module} the ranks are "
                f"{ranks.tolist()} and the scalings {sorted(set(units.scale.tolist()))}. Choose like adapters, or space='delta'"
            )
        r, w = int(ranks[0]), weights.to(units.A)
        order = units.owner.argsort(stable=True)
        raw = (units.B / units.scale)[:, order].view(-1, n, r)
        out[module] = Factors(
            torch.einsum("onr,n->or", raw, w) * units.scale[0],
            torch.einsum("nri,n->ri", units.A[order].view(n, r, -1), w),
            embedding=units.embedding,
        )
    return out


@dataclass
class _Search:
    """One fit's ask/tell search; `best` is the best candidate ever evaluated, `history` each evaluation's objective."""

    dimension: int
    budget: int
    seed: int
    strategy: object = None
    best: np.ndarray | None = None
    lowest: float = float("inf")
    history: list[float] = field(default_factory=list)

    def __post_init__(self):
        import cma

        random = np.random.default_rng(self.seed)
        options = {
            "bounds": [-BOUND, BOUND],
            "seed": float("nan"),
            "randn": lambda *shape: random.standard_normal(shape),
            "verbose": -9,
        }
        self.strategy = cma.CMAEvolutionStrategy(np.zeros(self.dimension), 0.5, options)
        self.asked: list[np.ndarray] = []

    def ask(self) -> np.ndarray:
        """The next candidates: w = 0 first, then a generation, cut where the budget ends."""
        if not self.history:
            self.asked = [np.zeros(self.dimension)]
        else:
            self.asked = self.strategy.ask()[: self.budget - len(self.history)]
        return np.stack(self.asked)

    def tell(self, values: np.ndarray) -> None:
        """Take the objectives of what was asked."""
        for candidate, value in zip(self.asked, values, strict=True):
            self.history.append(float(value))
            if value < self.lowest:
                self.lowest, self.best = float(value), candidate
        if len(self.asked) == self.strategy.popsize and len(self.history) > 1:
            self.strategy.tell(self.asked, list(values))


def lorahub(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    *,
    seeds: Sequence[int],
    space: Literal["delta", "factor"] = "delta",
    optimiser: Literal["cma", "cobyla"] = "cma",
    objective: Literal["paper", "reference"] = "paper",
    budget: Count = 40,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """Search weights in [−1.5, 1.5] from 0, one per adapter, for G fits; each counts its own evaluations up to `budget`.

    cma: pycma (σ₀ 0.5), w = 0 first, the generations of all fits in one forward pass. cobyla: scipy, one candidate of each
    fit at a time (what nevergrad's NGOpt resolves to at these sizes); on a GPU those of all fits in one forward pass. Stacks
    are filled up to the widest; how that rounds can send COBYLA, which compares values, another way than alone. Returns the best candidate ever evaluated;
    `curves.train` is the objective of each evaluation. `watch` is called with the number of
    evaluations of each fit after every pass; once it has asked to stop, no more are made. A budget below a generation
    (4 + ⌊3 ln K⌋) is spent on w = 0 and that generation's first candidates.

    Raises:
        MergeError: an unknown space, optimiser or objective, a budget below 1, stacks of unequal size, or a base that
            gives no finite loss.
    """
    for value, known, what in (
        (space, SPACES, "space"),
        (optimiser, OPTIMISERS, "optimiser"),
        (objective, OBJECTIVES, "objective"),
    ):
        if value not in known:
            raise MergeError(f"{what} {value!r} is unknown; choose one of {', '.join(known)}")
    if budget < 1:
        raise MergeError(f"budget is {budget}, expected at least 1 evaluation")
    if not len(stacks) == len(train) == len(seeds):
        raise MergeError(
            f"expected one of each per fit, got {len(stacks)} stacks, {len(train)} lists of examples and {len(seeds)} seeds"
        )
    if len({len(stack) for stack in stacks}) != 1 or len({len(rows) for rows in train}) != 1:
        raise MergeError("fits side by side need stacks of equally many adapters and equally many examples each")
    k = len(stacks[0])
    lengths = [torch.tensor([float(len(row.answer)) for row in rows]) for rows in train]

    pieces = side_by_side(stacks, base, frozen=True) if space == "delta" else {}

    def values(which: Sequence[int], candidates: np.ndarray) -> np.ndarray:
        weights = torch.from_numpy(candidates).float()
        mine = pieces
        if len(which) < len(stacks):
            mine = {module: tuple(tensor[list(which)] for tensor in piece) for module, piece in pieces.items()}
        losses = population_losses(base, [stacks[i] for i in which], weights, [train[i] for i in which], space, mine)
        found = [objective_value(losses[j], lengths[i], weights[j], objective) for j, i in enumerate(which)]
        return (
            torch.stack(found).nan_to_num(nan=torch.inf, posinf=torch.inf).numpy()
        )  # an overflow is no good candidate

    if optimiser == "cma":
        searches = [_Search(k, budget, int(seed)) for seed in seeds]
        while (done := len(searches[0].history)) < budget:
            found = values(range(len(stacks)), np.stack([search.ask() for search in searches]))
            for search, row in zip(searches, found, strict=True):
                search.tell(row)
            done += len(searches[0].asked)
            if watch is not None and watch(done, budget, float(np.mean([search.lowest for search in searches]))):
                break
        best = [search.best for search in searches]
        histories = [search.history for search in searches]
    else:

        def each(which: Sequence[int], at: np.ndarray) -> np.ndarray:
            if not _apart(base):
                return values(which, at[:, None])[:, 0]
            return np.stack([values([i], w[None, None])[0, 0] for i, w in zip(which, at, strict=True)])

        every = _cobyla(each, len(stacks), k, budget, watch)
        best, histories = zip(*every, strict=True)
    out = []
    for g, stack in enumerate(stacks):
        if not np.isfinite(histories[g]).any():
            raise MergeError(f"fit {g} of {len(stacks)}: no candidate has a finite loss, not even the bare base")
        weights = torch.from_numpy(np.asarray(best[g])).float()
        name = names[g] if names else f"lorahub-of-{k}"
        if space == "delta":
            adapter = fold(stack, weights, name)
        else:
            adapter = Adapter(
                name, {m: replace(f, B=f.B.cpu(), A=f.A.cpu()) for m, f in _mixed(stack, weights).items()}, stack.base
            )
        passes, tokens = len(histories[g]) * len(train[g]), len(histories[g]) * sum(len(row) for row in train[g])
        history = torch.tensor(histories[g])
        curves = Curves(history, torch.zeros(0), (), history.nan_to_num(nan=torch.inf).min(), torch.tensor(tokens))
        out.append(Fitted(adapter, weights.expand(len(stack.modules), -1), curves, passes, tokens, None, k))
    return out


def _apart(base: Base) -> bool:
    """Whether COBYLA's candidates are evaluated fit by fit, so that each gets bit for bit what it would get alone."""
    return base.device.type == "cpu"


def _cobyla(
    values: Callable[[Sequence[int], np.ndarray], np.ndarray], n: int, dimension: int, budget: int, watch: Watch | None
) -> list[tuple[np.ndarray, list[float]]]:
    """The best candidate and each evaluation's value of n searches, each in a thread of its own.

    scipy calls for one value at a time. When every search that goes on has asked for one, all are found together, here, by
    `values` of the searches' places and of their candidates (asked, K): in the same order however threads are run.
    """
    seen: list[list[tuple[float, np.ndarray]]] = [[] for _ in range(n)]
    asked: SimpleQueue = SimpleQueue()
    answers = [SimpleQueue() for _ in range(n)]

    def search(i: int) -> None:
        failed = None
        try:
            _minimise(lambda w: asked.put((i, w, None)) or answers[i].get(), dimension, budget, seen[i])
        except _Ended:
            pass
        except BaseException as error:
            failed = error
        asked.put((i, None, failed))

    for i in range(n):
        Thread(target=search, args=(i,), daemon=True).start()
    going, done, stop = n, 0, False
    try:
        while going:
            told = sorted((asked.get() for _ in range(going)), key=lambda one: one[0])
            for error in (one[2] for one in told if one[2] is not None):
                raise error
            told = [(i, w) for i, w, _ in told if w is not None]
            if stop or not told:
                break
            found, done = values([i for i, _ in told], np.stack([w for _, w in told])), done + 1
            for (i, w), value in zip(told, found.tolist(), strict=True):
                seen[i].append((value, w))
            lowest = [min(value for value, _ in one) for one in seen]
            stop = watch is not None and bool(watch(done, budget, float(np.mean(lowest))))
            going = len(told)
            for (i, _), value in zip(told, found.tolist(), strict=True):
                answers[i].put(_Ended() if stop else value)
    finally:
        for one in answers:
            one.put(_Ended())  # nobody waits for ever
    return [(min(one, key=lambda pair: pair[0])[1], [value for value, _ in one]) for one in seen]


class _Ended(Exception):
    """Ends a search from outside."""


def _minimise(
    ask: Callable[[np.ndarray], float | _Ended], dimension: int, budget: int, seen: Sequence[tuple[float, np.ndarray]]
) -> None:
    from scipy.optimize import minimize

    def value(w: np.ndarray) -> float:
        if len(seen) >= budget:  # COBYLA's own count allows a few more
            return seen[-1][0]
        found = ask(np.clip(w, -BOUND, BOUND))
        if isinstance(found, _Ended):
            raise found
        return found

    minimize(
        value,
        np.zeros(dimension),
        method="COBYLA",
        bounds=[(-BOUND, BOUND)] * dimension,
        options={"maxiter": max(budget, dimension + 2), "rhobeg": 0.5},
    )
