"""Carries recipes out, all tasks and seeds of one recipe side by side: selection, merging or fitting, scoring."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from workbench.adapt import ADAPTIVE, fit_many
from workbench.adapt.arrow import routed
from workbench.adapt.fitted import fold
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.baselines import BASELINES, train_many
from workbench.compose import LowRank, grouped
from workbench.controls import BUT_OWN, SHUFFLED, random_like, shuffled
from workbench.errors import MergeError
from workbench.evaluate import Encoded, Scores, encode_task, score
from workbench.judging import judged
from workbench.merge import Dense, Statistics, collect, merge, methods
from workbench.nano import world
from workbench.pool import Pool
from workbench.select import CLOSENESS, choose
from workbench.spectra import stable_ranks
from workbench.stack import Stack
from workbench.tasks import Task, upstream

__all__ = [
    "EXAMPLES",
    "OWN",
    "SCALES",
    "Case",
    "Outcome",
    "Workplace",
    "check_examples",
    "check_options",
    "observe",
    "run",
    "tune_scales",
]

_OF_ANY_MERGE = ("weights", "scale", "rank")
OWN = "own"  # the name of the target's own adapter among the chosen
EXAMPLES = 16  # of each adapter's own task, for merges that need them; part of those methods' versions
SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


def check_options(method: str, options: Mapping) -> None:
    """Check a recipe's options before anything runs, their names and values.

    Raises:
        MergeError: an option that the method does not have (near names are given), or a value that it does not allow.
    """
    if method in methods():
        methods()[method].settings({name: value for name, value in options.items() if name not in _OF_ANY_MERGE})
    elif method in ADAPTIVE:
        ADAPTIVE[method].settings(options)
    else:
        BASELINES[method].check(options)


def check_examples(method: str, pool: Pool, names: Sequence[str] | None = None) -> None:
    """Check, before anything runs, that a merge which needs the adapters' examples can have them (None: of the whole pool).

    Raises:
        MergeError: the pool holds adapters that are not bundled ones, whose tasks are not known.
    """
    needs = methods()[method].needs if method in methods() else ""
    unknown = [name for name in names or pool.names if world.find(name) is None] if needs else []
    if unknown:
        raise MergeError(
            f"{method} needs {needs} of each adapter's examples, which a recipe finds for bundled adapters only, not for "
            f"{unknown[0]!r}; merge by hand with workbench.merge.merge(stack, {method!r}, statistics=collect(base, stack, examples))"
        )


def observe(base: Base, stack: Stack, method: str, names: Sequence[str] | None = None) -> Statistics | None:
    """What a merge needs of its adapters' examples, 16 of each bundled one's own task; None where it needs nothing.

    `names` are those whose tasks are meant, where the stack holds stand-ins for them.
    """
    if not (needs := methods()[method].needs):
        return None
    examples = dict(zip(stack.names, upstream(names or stack.names, EXAMPLES).values(), strict=True))
    return collect(base, stack, examples, gradients=needs == "gradients")


@dataclass(frozen=True)
class Case:
    """One task with its drawn examples, under one seed."""

    task: Task
    seed: int

    @cached_property
    def digest(self) -> str:
        return self.task.digest()


@dataclass
class Outcome:
    """What one run found: `facts` are columns of its row, `chosen` the adapters' names."""

    facts: dict = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)


class Workplace:
    """A base, a pool, and what runs over them can share: encoded splits, targets' own adapters, selections, merges."""

    def __init__(self, base: Base, pool: Pool | None):
        """`pool` is None where nothing is chosen from one."""
        self.base, self.pool = base, pool
        self.side_by_side = 512 if base.device.type == "cuda" else 8
        self._encoded: dict = {}
        self._own: dict[tuple[str, int], Adapter] = {}
        self._stacks: dict = {}
        self._orders: dict[tuple, list[str]] = {}  # the whole pool by closeness, which many recipes ask for
        self._merged: dict = {}
        self.beside: dict = {}  # what stands beside merges of adapters picked by hand, see `workbench.trial`
        self._examples: dict[int, list[Task]] = {}  # id of a stack → the task of each adapter it holds or stands in for

    def encoded(self, case: Case, split: str, shots: int = 0) -> list[Encoded]:
        """A split's examples as token ids, made once."""
        task, examples = case.task, getattr(case.task, split)
        shown = (shots, case.seed, task.train, task.bare, task.separator) if shots else ()
        key = (task.name, task.instruction, task.template, task.max_new_tokens, examples, shown)
        if key not in self._encoded:
            self._encoded[key] = encode_task(self.base, task, examples, shots=shots, seed=case.seed)
        return self._encoded[key]

    def own(self, cases: Sequence[Case]) -> list[Adapter]:
        """The targets' own adapters: the baseline "new adapter" at its defaults, trained once for each case."""
        new = [case for case in cases if (case.digest, case.seed) not in self._own]
        if new:
            self.keep_own(new, [adapter for adapter, _ in train_many(self, "new adapter", new, {})])
        return [self._own[case.digest, case.seed] for case in cases]

    def keep_own(self, cases: Sequence[Case], adapters: Sequence[Adapter]) -> None:
        """Take adapters trained elsewhere as the targets' own."""
        for case, adapter in zip(cases, adapters, strict=True):
            self._own[case.digest, case.seed] = replace(adapter, name=OWN)

    def stacks(self, recipe, cases: Sequence[Case]) -> list[Stack]:
        """The recipe's adapters for each case, or their random stand-ins."""
        wanted = recipe.own or recipe.select in CLOSENESS
        targets = self.own(cases) if wanted else [None] * len(cases)
        return [self._stack(recipe, case, target) for case, target in zip(cases, targets, strict=True)]

    def _stack(self, recipe, case: Case, target: Adapter | None) -> Stack:
        names = self._chosen(recipe, case, target)
        control = "" if recipe.control == SHUFFLED else recipe.control
        key = (tuple(names), control, case.seed if control else 0, (case.digest, case.seed) if recipe.own else ())
        if key not in self._stacks:
            chosen = self.pool.stack(names)
            if recipe.own:
                own = replace(target, base=chosen.base)
                chosen = Stack.of([own, *(chosen.adapter(i) for i in range(len(chosen)))])
            keep = [0] if recipe.own and control.endswith(BUT_OWN) else []
            match = control.removesuffix(BUT_OWN)
            self._stacks[key] = random_like(chosen, match, seed=case.seed, keep=keep) if control else chosen
            if recipe.method in methods() and methods()[recipe.method].needs:
                tasks = list(upstream(names, EXAMPLES).values())
                self._examples[id(self._stacks[key])] = [case.task] * recipe.own + tasks
        return self._stacks[key]

    def _chosen(self, recipe, case: Case, target: Adapter | None) -> list[str]:
        asked = {"task": case.task, "base": self.base, "seed": case.seed, "target": target}
        if recipe.select not in CLOSENESS:
            return choose(self.pool, recipe.select, recipe.k, skip=recipe.skip, **asked)
        key = (recipe.select, case.digest, case.seed)
        if key not in self._orders:
            how = recipe.select if target.norm() > 0 else "random"  # nothing is close to zero
            self._orders[key] = choose(self.pool, how, len(self.pool), **asked)
        return self._orders[key][recipe.skip : recipe.skip + recipe.k]

    def merged(self, recipe, stack: Stack) -> Adapter:
        """The merge of a stack, made once however many tasks ask for it."""
        key = (id(stack), recipe.method, recipe.options)
        if key not in self._merged:
            needs = methods()[recipe.method].needs
            known = self._statistics(stack, needs) if needs else None
            result = merge(stack, recipe.method, statistics=known, **dict(recipe.options))
            self._merged[key] = result.truncate() if isinstance(result, Dense) else result
        return self._merged[key]

    def _statistics(self, stack: Stack, needs: str):
        """What a merge needs of the adapters' examples, a random stand-in taking those of the adapter it replaces."""
        examples = dict(zip(stack.names, self._examples[id(stack)], strict=True))
        return collect(self.base, stack, examples, gradients=needs == "gradients")

    def scored(self, cases: Sequence[Case], adapters: Sequence | None, shots: int = 0) -> list[Outcome]:
        """Test, training and validation scores of each case under its adapter or routed model (None: the base alone)."""
        plain = bool(adapters) and all(isinstance(adapter, Adapter) for adapter in adapters)
        updates = (grouped if plain else routed)(adapters, self.base.device) if adapters else None
        facts: list[dict] = [{} for _ in cases]
        for split, prefix in (("test", ""), ("train", "train_"), ("validation", "validation_")):
            if shots and split == "train":
                continue  # the demonstrations come from there
            result = self.judged(cases, split, updates, shots)
            for row, accuracy, loss, case in zip(
                facts, result.accuracy.tolist(), result.loss.mean(1).tolist(), cases, strict=True
            ):
                row |= {f"{prefix}accuracy": accuracy, f"{prefix}loss": loss}
                if split == "test":
                    encoded = self.encoded(case, split, shots)
                    row["tokens_per_example"] = sum(map(len, encoded)) / len(encoded)
        if plain:
            sizes = zip(_norms(updates).tolist(), stable_ranks(updates).tolist(), strict=True)
            for row, adapter, (norm, stable) in zip(facts, adapters, sizes, strict=True):
                row |= {"rank": adapter.rank, "norm": norm, "stable_rank": stable}
        return [Outcome(row) for row in facts]

    def judged(
        self, cases: Sequence[Case], split: str, updates: Mapping[str, LowRank] | None, shots: int = 0
    ) -> Scores:
        """One split of each case under its group of the updates."""
        groups = [self.encoded(case, split, shots) for case in cases]
        return judged(self.base, [c.task for c in cases], [getattr(c.task, split) for c in cases], groups, updates)


def _norms(updates: Mapping[str, LowRank]) -> Tensor:
    """(G,) ‖ΔW‖_F over all modules of grouped updates, as `Adapter.norm` has it of each."""
    total = 0.0
    for update in updates.values():
        b, a = update.B.double(), update.A.double()
        total = total + ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
    return total.clamp_min(0).sqrt().cpu()  # NaN stays NaN


def run(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    """Run one recipe on many cases; outcomes in their order.

    A recipe with options to tune runs at each combination of their values; the one of least validation loss stands for the
    case, and what all of them spent is its cost. Where a GPU's memory runs out, half as many cases run side by side.
    """
    if recipe.tune:
        names, values = zip(*recipe.tune, strict=True)
        tried = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]
        found = [run(place, recipe.at(options), cases) for options in tried]
        return [_best([outcomes[i] for outcomes in found], tried) for i in range(len(cases))]
    found: dict[int, Outcome] = {}
    sizes = [tuple(len(getattr(case.task, split)) for split in ("train", "validation", "test")) for case in cases]
    for size in dict.fromkeys(sizes):
        like = [i for i, own in enumerate(sizes) if own == size]
        while like:
            part, outcomes = like[: place.side_by_side], None
            try:
                outcomes = _one(place, recipe, [cases[i] for i in part])
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
            if outcomes is None:  # what the failed run held is let go by now
                place.side_by_side = len(part) // 2
                torch.cuda.empty_cache()
                continue
            found |= zip(part, outcomes, strict=True)
            like = like[len(part) :]
    return [found[i] for i in range(len(cases))]


def _best(outcomes: Sequence[Outcome], tried: Sequence[Mapping]) -> Outcome:
    losses = torch.tensor([outcome.facts["validation_loss"] for outcome in outcomes]).nan_to_num(nan=torch.inf)
    i = int(losses.argmin())
    spent = {name: sum(outcome.facts[name] for outcome in outcomes) for name in ("passes", "tokens")}
    return replace(outcomes[i], facts=outcomes[i].facts | spent | {"tuned": json.dumps(tried[i])})


def _one(place: Workplace, recipe, cases: Sequence[Case]) -> list[Outcome]:
    if recipe.method in BASELINES:
        return BASELINES[recipe.method].run(place, dict(recipe.options), cases)
    stacks = place.stacks(recipe, cases)
    outcomes = (_fitted if recipe.method in ADAPTIVE else _merged)(place, recipe, cases, stacks)
    for outcome, stack in zip(outcomes, stacks, strict=True):
        outcome.chosen = list(stack.names)
    return outcomes


def _fitted(place: Workplace, recipe, cases: Sequence[Case], stacks: Sequence[Stack]) -> list[Outcome]:
    train, validation = ([place.encoded(case, split) for case in cases] for split in ("train", "validation"))
    seeds, options = [case.seed for case in cases], dict(recipe.options)
    if options.get("start") == "target":
        options.setdefault("target", 0)  # the target's own adapter comes first
    fits = fit_many(place.base, stacks, train, validation, recipe.method, seeds=seeds, **options)
    adapters = [fit.adapter for fit in fits]
    if recipe.control == SHUFFLED:
        given = [
            shuffled(s, f.coefficients, f.units, seed=seed) for s, f, seed in zip(stacks, fits, seeds, strict=True)
        ]
        adapters = [fold(stack, own, SHUFFLED) for stack, own in zip(stacks, given, strict=True)]
    outcomes = place.scored(cases, adapters)
    trains = ADAPTIVE[recipe.method].schedule is not None and fits[0].curves is not None
    for outcome, fit in zip(outcomes, fits, strict=True):
        outcome.facts |= {
            "passes": fit.passes,
            "tokens": fit.tokens,
            "parameters": fit.parameters,
            "diverged": trains and not bool(torch.isfinite(fit.curves.train).all()),
            **_summary(fit.coefficients),
        }
    return outcomes


def _summary(coefficients: Tensor) -> dict[str, float]:
    """Mean, norm, smallest and largest coefficient, and the share that is zero."""
    found = {
        "mean": coefficients.mean(),
        "norm": coefficients.norm(),
        "min": coefficients.min(),
        "max": coefficients.max(),
        "zeros": (coefficients == 0).double().mean(),
    }
    return {f"coefficient_{name}": float(value) for name, value in found.items()}


def _merged(place: Workplace, recipe, cases: Sequence[Case], stacks: Sequence[Stack]) -> list[Outcome]:
    adapters = [place.merged(recipe, stack) for stack in stacks]
    validation = [place.encoded(case, "validation") for case in cases]
    best = tune_scales(place.base, adapters, validation)
    unscaled = place.judged(cases, "test", grouped(adapters, place.base.device)).accuracy.tolist()
    outcomes = place.scored(cases, [adapter.times(scale) for adapter, scale in zip(adapters, best, strict=True)])
    for outcome, plain, scale, rows in zip(outcomes, unscaled, best, validation, strict=True):
        fed = len(SCALES) * len(rows), len(SCALES) * sum(map(len, rows))
        outcome.facts |= {
            "scale": scale,
            "accuracy_unscaled": plain,
            "passes": fed[0],
            "tokens": fed[1],
            "parameters": 1,
        }
    return outcomes


def tune_scales(base: Base, adapters: Sequence[Adapter], validation: Sequence[Sequence[Encoded]]) -> list[float]:
    """λ of least validation loss for each adapter, all in one pass: the scales are candidates over each one's stack."""
    together, n = grouped(adapters, base.device), len(SCALES)
    scales = torch.tensor(SCALES, device=base.device).repeat(len(adapters))
    updates = {m: LowRank(u.B, u.A, scales[:, None].expand(-1, u.A.shape[1])) for m, u in together.items()}
    losses = score(base, [rows for rows in validation for _ in range(n)], updates).loss.mean(1).view(len(adapters), n)
    losses = losses.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a λ that overflows is no minimum
    return [SCALES[i] for i in losses.argmin(1).tolist()]
