"""What a run costs, from a benchmark's lines: forward and backward passes × tokens × seconds a token, of that size of model.

Seconds, all for one run at a time; t is tokens per example, T, V and S are the training, validation and test examples.

    bare            a token read by the base           population, "bare model, same rows"
    forward(u)      … under updates of u units         population, "all candidates in one pass", between its numbers of adapters
    backward(u)     … with gradients and AdamW         coefficients, "one stack", between its numbers of adapters; × that of
                                                       "one stack, checkpointed" where a schedule says so
    write           a token of an answer written       matching, "generate, batches of 40", less reading the prompt
    read            an adapter read from its file      similarity, "a lazy stack's modules"
    place           its factors put in place           population, "all adapters side by side", less its forward passes
    merge(m)        k adapters by a method, k/30 of    merging, "m: 30 adapters, 224 modules"
    cut             a dense module cut to a rank       similarity, "SVD of the dense ΔW", each module as one of that size

    scoring n examples: n t forward, and for the share `written` of them n (t forward + answer · write)
    a ranking of the pool by evaluation: pool_size (read + place + scoring of T); by closeness: a target's own adapter, reading,
        and the similarity's lines of 4 modules; diverse: evaluation and all pairs. Once per task, seed and T, however many
        recipes ask; so is the target's own adapter
    training: steps · min(batch, T) t backward + ⌈steps / every⌉ V t forward; a new adapter as the fewest adapters measured
    LoraHub: budget · T t forward;  a merge: merge(m), twelve values of λ on V, and S once more at λ = 1
    and every run: reading its k adapters, scoring T + V + S (in context, at what demonstrations read once cost more)
    merges for several tasks: λ, then S of each task twice, and each task's own adapter and the base on S once

Not counted: loading the base, encoding, drawing random stand-ins, statistics for RegMean and Fisher, folding. What the
benchmark lacks a line for is unknown, but for read and place, which small models' lack and which are nothing there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.adapt import ADAPTIVE
from workbench.baselines import BASELINES
from workbench.experiment import MOST_TESTED, NEW_ADAPTER, Recipe
from workbench.merge import methods
from workbench.runs import SCALES as LAMBDAS
from workbench.select import CLOSENESS
from workbench.sweep.rates import Rates, Unknown
from workbench.sweep.spec import Experiment, Multitask

__all__ = ["Part", "parts", "shared"]

OWN, RANKED = "the target's own adapter", "the pool ranked by evaluation"
PAIRS, CLOSE = "all pairs of the pool", "the pool ranked by closeness"


@dataclass(frozen=True)
class Part:
    """Seconds of work; `shared` is what it is done once for, None where each run does it again."""

    label: str
    seconds: float
    shared: tuple | None = None


def parts(run: Experiment | Multitask, rates: Rates) -> list[Part]:
    """What one run does, with its seconds.

    Raises:
        Unknown: something that the benchmark has no line for.
    """
    model = _Model(run, rates)
    if isinstance(run, Multitask):
        return [Part("merge and score", model.multitask())]
    once = [Part(label, model.once(label), key) for label, key in shared(run).items()]
    combinations = itertools.product(*(values for _, values in run.recipe.tune))
    tuned = [dict(zip((name for name, _ in run.recipe.tune), values, strict=True)) for values in combinations]
    return [
        *once,
        Part("fit and score", sum(model.experiment(run.recipe.at(one) if one else run.recipe) for one in tuned)),
    ]


def shared(run: Experiment | Multitask) -> dict[str, tuple]:
    """What a run needs that others may need too → what it is done once for."""
    if isinstance(run, Multitask):
        return {}
    recipe, drawn = run.recipe, run.seed if run.draw is None else run.draw
    about = (run.base, run.load, run.task, drawn, run.n_train)
    ranked = recipe.select in ("evaluation", "diverse")
    ranked |= recipe.method == "best single" and dict(recipe.options).get("among", "pool") == "pool"
    found = {}
    if recipe.own or recipe.select in CLOSENESS:
        found[OWN] = (OWN, *about, run.seed, run.n_validation)
    if ranked:
        found[RANKED] = (RANKED, run.pool, run.opening, *about)
    if recipe.select == "diverse":
        found[PAIRS] = (PAIRS, run.pool, run.opening, *about)
    if recipe.select in CLOSENESS:
        found[CLOSE] = (recipe.select, run.pool, run.opening, *about, run.seed, run.n_validation)
    return found


class _Model:
    """The terms of one run."""

    def __init__(self, run: Experiment | Multitask, rates: Rates):
        self.run, self.rates, self.assumed, self.t = run, rates, rates.assumed, rates.assumed.tokens
        self.T = run.n_train or 80
        self.pool = self.assumed.pools.get(run.pool, self.assumed.pool_size)
        self.V = self.T if run.n_validation == "same" else run.n_validation or 20
        self.S = run.n_test or MOST_TESTED

    def scoring(self, n: float, units: float) -> float:
        """n examples judged under an update of so many units."""
        each = self.rates.forward(units) if units else self.rates.bare
        written = self.assumed.written
        again = self.t * each + self.assumed.answer * self.rates.write if written else 0.0
        return n * (self.t * each + written * again)

    def training(self, options: Mapping, known: Mapping, examples: int, units: float, validation: float) -> float:
        steps, batch, every, again = (
            options.get(name, known[name].default) for name in ("steps", "batch", "every", "checkpoint")
        )
        each = self.rates.backward(units) * (self.rates.checkpointing if again else 1.0)
        checks = math.ceil(steps / every) * validation * self.t * self.rates.forward(units)
        return steps * min(batch, examples) * self.t * each + checks

    def once(self, label: str) -> float:
        """Seconds for work that runs share."""
        select, n, rates = self.run.recipe.select, self.pool, self.rates
        if label == OWN:
            return self.new(NEW_ADAPTER)
        if label == RANKED:
            return n * (rates.read + rates.place + self.scoring(self.T, self.assumed.rank))
        if label == PAIRS:
            return rates.pairs(n)
        return n * (rates.read + rates.close(select.removesuffix("_mean")))

    def new(self, recipe: Recipe) -> float:
        known, options = BASELINES[recipe.method].options, dict(recipe.options)
        units = options.get("rank", known["rank"].default if "rank" in known else 0)
        return self.training(options, known, self.T, units, self.V)

    def experiment(self, recipe: Recipe) -> float:
        method, options = recipe.method, dict(recipe.options)
        every = self.T + self.V + self.S
        if method == "zero-shot":
            return self.scoring(every, 0)
        if method == "in-context":
            shots = options.get("shots", 5)
            return self.scoring(self.S + self.V, 0) * (1 + (self.rates.behind - 1) * shots / 5)
        if method == "best single":
            again = options.get("among", "pool") == "random"
            n = self.pool if again else 0
            return self.scoring(every + n * self.T, self.assumed.rank)
        if method in BASELINES:
            known = BASELINES[method].options
            units = options.get("rank", known["rank"].default if "rank" in known else self.rates.hidden)
            return self.new(recipe) + self.scoring(every, units)
        units = recipe.k * self.assumed.rank
        read = recipe.k * self.rates.read
        if method in methods():
            return read + self.merging(method, options, recipe.k, units) + self.lambdas(method, options, units, every)
        return read + self.fitting(method, options, units) + self.scoring(every, units)

    def fitting(self, method: str, options: Mapping, units: float) -> float:
        known = ADAPTIVE[method].options
        if method == "lorahub":
            budget = options.get("budget", known["budget"].default)
            return budget * self.T * self.t * self.rates.forward(units)
        if method == "arrow" and not options.get("trained", False):
            return 0.0
        if ADAPTIVE[method].schedule is None:
            raise Unknown(f"the benchmark has no line for {method}")
        first = (
            {**options, "steps": options.get("merge_steps", known["merge_steps"].default)}
            if method == "prior"
            else None
        )
        return sum(self.training(one, known, self.T, units, self.V) for one in (options, first) if one is not None)

    def merging(self, method: str, options: Mapping, k: int, units: float) -> float:
        if methods()[method].needs:
            raise Unknown(f"the benchmark has no line for the statistics of {method}")
        cut = self.rates.cut if methods()[method].dense and options.get("rank") else 0.0
        return self.rates.merge(method, k) + cut

    def width(self, method: str, options: Mapping, units: float) -> float:
        """Units of a merge's result: a dense one's is as wide as the model."""
        whole = self.rates.hidden if methods()[method].dense else units
        return min(options.get("rank") or whole, whole)

    def lambdas(self, method: str, options: Mapping, units: float, every: float) -> float:
        wide = self.width(method, options, units)
        tuned = len(LAMBDAS) * self.V * self.t * self.rates.forward(wide)
        return tuned + self.scoring(self.S + every, wide)

    def multitask(self) -> float:
        run, n, rates = self.run, self.run.count, self.rates
        units, stream = n * self.assumed.rank, n * self.S * self.t
        beside = stream * (rates.bare + rates.forward(self.assumed.rank)) + n * rates.read
        if run.method == "zero-shot":
            return beside
        combinations = [options for _, options in run.variants()] if run.method in methods() else [{}]
        candidates, made, wide = len(combinations), 0.0, float(self.assumed.rank)
        if run.method == "best single":
            candidates = n
        elif run.method == "new adapter":
            wide = float(run.rank or self.assumed.rank)
            made = self.training(run.options, BASELINES["new adapter"].options, n * self.T, wide, n * self.V)
        else:
            limit = {"rank": run.rank} if run.rank else {}
            made = sum(self.merging(run.method, {**one, **limit}, n, units) for one in combinations)
            wide = self.width(run.method, {**combinations[0], **limit}, units)
        tuned = candidates * (len(LAMBDAS) + 1) * n * self.V * self.t * rates.forward(wide)
        return beside + made + tuned + 2 * stream * rates.forward(wide)
