"""Which adapters of a pool to merge: every method ranks the whole pool, and the first k (after `skip`) are taken.

    random      a seeded order                           evaluation  accuracy on the task's training examples
    rank        the largest LoRA rank first              diverse     evaluation, less likeness to those chosen before
    cosine, clamp, abs, clamp_pm, qfim                   closeness to an adapter trained on the task (`closeness`)
    cosine_mean, clamp_mean, …                           the same, as the mean over modules

No method reads the validation or the test split, but for the adapter that a closeness is measured to: trained here, its
best step is the one of least validation loss, as everywhere. A new method is a function (pool, *, task, base, seed,
target) → names, best first, registered with `@selection("name")`.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from workbench.adapt.fresh import NEW_ADAPTER, train_fresh
from workbench.adapters import Adapter
from workbench.base import Base, check_fits
from workbench.closeness import MEASURES, check_target, closeness, diversify
from workbench.compose import LowRank
from workbench.errors import SelectionError, TaskError
from workbench.evaluate import encode_task
from workbench.judging import judged
from workbench.stack import cosine
from workbench.tasks import Task

if TYPE_CHECKING:
    from workbench.pool import Pool

__all__ = [
    "CLOSENESS",
    "SELECTIONS",
    "choose",
    "rank_adapters",
    "rank_by_closeness",
    "rank_diverse",
    "remember_ranking",
    "selection",
    "train_target",
]

SELECTIONS: dict[str, Callable[..., list[str]]] = {}


def selection(name: str):
    """Register a ranking function under a name."""

    def register(function):
        SELECTIONS[name] = function
        return function

    return register


def choose(
    pool: Pool,
    how: str,
    k: int,
    *,
    task: Task | None = None,
    base: Base | None = None,
    seed: int = 0,
    skip: int = 0,
    target: Adapter | None = None,
) -> list[str]:
    """The names of k adapters, best first, after leaving out the first `skip` of the ranking.

    Args:
        skip: a window further down the ranking, such as the best but 5, 10, 15, 20 (recycling study, relevance).
        target: what closeness is measured to, an adapter trained on the task's training examples; None trains one
            (`train_target`, under `seed`), which needs `task` and `base`. The study's code puts it first among those
            chosen; here it is not among them.

    Raises:
        SelectionError: an unknown method, k or skip out of range, or what the method needs is missing.
    """
    if how not in SELECTIONS:
        near = difflib.get_close_matches(str(how), SELECTIONS, 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(sorted(SELECTIONS))}"
        raise SelectionError(f"no selection method {how!r}; {hint}")
    if k < 1 or skip < 0:
        raise SelectionError(f"k is {k} and skip is {skip}, expected k ≥ 1 and skip ≥ 0")
    if k + skip > len(pool):
        skipped = f" after the first {skip}" if skip else ""
        raise SelectionError(f"{k} adapters asked for{skipped}, but pool {pool.name!r} has {len(pool)}")
    return SELECTIONS[how](pool, task=task, base=base, seed=seed, target=target)[skip : skip + k]


@selection("random")
def at_random(pool: Pool, *, seed: int, **_) -> list[str]:
    """A random order under the seed; fewer adapters are always the first of more."""
    names = list(pool.names)
    random.Random(f"select|{seed}").shuffle(names)
    return names


@selection("evaluation")
def by_evaluation(pool: Pool, *, task: Task | None, base: Base | None, **_) -> list[str]:
    """By each adapter's accuracy on the task's training examples."""
    _need("evaluation", task, base)
    return rank_adapters(pool, task, base)["name"].tolist()


@selection("rank")
def by_rank(pool: Pool, **_) -> list[str]:
    """The largest LoRA rank first, then by name.

    The study's code sorts by the configuration's r, largest first; where modules differ, our reading is the largest.
    """
    ranks = pool.table.set_index("name")["rank"]
    return sorted(pool.names, key=lambda name: (-ranks[name], name))


@selection("diverse")
def by_diversity(pool: Pool, *, task: Task | None, base: Base | None, **_) -> list[str]:
    """`rank_diverse` at its default β."""
    _need("diverse", task, base)
    return rank_diverse(pool, task, base)


def _by_closeness(
    pool: Pool, *, how: str, task: Task | None, base: Base | None, seed: int, target: Adapter | None
) -> list[str]:
    if target is None:
        _need(how, task, base, " (or the adapter trained on it, target=…)")
        target = train_target(pool, task, base, seed=seed)
    measure, mean = how.removesuffix("_mean"), how.endswith("_mean")
    return rank_by_closeness(pool, target, measure, mean=mean, device="cpu" if base is None else base.device)


CLOSENESS = tuple(measure + mean for measure in MEASURES for mean in ("", "_mean"))  # the selections that use `target`
for _how in CLOSENESS:
    selection(_how)(partial(_by_closeness, how=_how))


def _need(how: str, task: Task | None, base: Base | None, otherwise: str = "") -> None:
    if task is None or base is None:
        lacking = "task" if task is None else "base"
        raise SelectionError(
            f"selection by {how} needs a {lacking}{otherwise}: pool.select({how!r}, k, task=…, base=…)"
        )


def rank_adapters(pool: Pool, task: Task, base: Base) -> pd.DataFrame:
    """name, accuracy and loss (nats per answer token, mean over examples) of every accepted adapter, best first.

    Scored on the training split only: the recycling study's reference code adds validation, which leaks. Ties in
    accuracy go to the lower loss, then to the name. Asking again for the same pool, base and examples costs nothing.

    Raises:
        TaskError: no training examples.
        SelectionError: no accepted adapter.
        AdapterError: an adapter that does not fit the base.
    """
    if not task.train:
        raise TaskError(f"{task.name} has no training examples to evaluate adapters on")
    _check_pool(pool)
    known = pool.rankings.setdefault(base, {})
    key = _examples_key(task, base)
    if key not in known:
        known[key] = _score_all(pool, task, base)
    return known[key].copy()


def remember_ranking(pool: Pool, task: Task, base: Base, ranking: pd.DataFrame) -> None:
    """Take a ranking that `rank_adapters` made elsewhere, of the same pool, base and training examples, as known."""
    pool.rankings.setdefault(base, {})[_examples_key(task, base)] = ranking


def rank_by_closeness(
    pool: Pool, target: Adapter, how: str, *, mean: bool = False, device: str | torch.device = "cpu"
) -> list[str]:
    """Every accepted adapter, the closest to the target first (`closeness.closeness`); ties to six decimals by name.

    The pool is taken in chunks, and one that does not fit into memory module by module.

    Raises:
        SelectionError: no accepted adapter, or what `closeness` raises.
    """
    _check_pool(pool)
    check_target(target, how)
    found: dict[str, float] = {}
    whole, budget = None if pool.held else pool.stack(lazy=True), _budget(torch.device(device))
    if whole:  # of a chunk one module is held at a time
        widths = [sum(shape) for shape in whole.shapes().values()]
        budget = budget * sum(widths) // max(widths)
    for chunk in _chunks(pool, budget):
        stack = (whole.choose(chunk) if whole else pool.stack(chunk)).to(device)
        if target.modules.keys() & stack.modules.keys():
            found |= zip(chunk, closeness(stack, target, how, mean=mean).tolist(), strict=True)
    if not found:
        closeness(stack, target, how)  # says that no module is shared
    return sorted(pool.names, key=lambda name: (-round(found.get(name, 0.0), 6), name))


def rank_diverse(pool: Pool, task: Task, base: Base, *, beta: float = 1.0) -> list[str]:
    """Every accepted adapter, in greedy order: of high accuracy, and unlike those before it.

    The first is the best by `rank_adapters`. Each next one has the largest z − β·c, with z its accuracy on the training
    examples, standardised over the pool (where all are equally accurate, minus its loss), and c the largest |cosine| of
    its ΔW (modules pooled) to one already chosen; ties to six decimals go to the better by `rank_adapters`. Our own
    rule, after maximal marginal relevance (Carbonell & Goldstein 1998).

    Args:
        beta: what likeness costs. By default a copy of an adapter chosen before loses one standard deviation; 0 is
            `rank_adapters`' order.

    Raises:
        SelectionError: β is negative or not finite; besides what `rank_adapters` raises.
    """
    if not (beta >= 0 and math.isfinite(beta)):
        raise SelectionError(f"β is {beta}, expected a finite number ≥ 0")
    table = rank_adapters(pool, task, base)
    names, varied = table["name"].tolist(), table["accuracy"].nunique() > 1
    if beta == 0:
        return names
    good = torch.tensor((table["accuracy"] if varied else -table["loss"]).to_numpy(), dtype=torch.float64)
    z = (good - good.mean()) / good.std(correction=0).clamp_min(1e-12)
    return [names[i] for i in diversify(z, _cosines(pool, names, base.device).abs(), beta)]


def train_target(pool: Pool, task: Task, base: Base, *, seed: int = 0) -> Adapter:
    """A new adapter trained on the task's training examples, at its step of least validation loss (where it has any).

    Trained once per pool, base, examples and seed, however many selections ask.

    Raises:
        TaskError: no training examples.
    """
    if not task.train:
        raise TaskError(f"{task.name} has no training examples to train a target adapter on")
    known = pool.rankings.setdefault(base, {})
    key = ("target", seed, task.validation, *_examples_key(task, base))
    if key not in known:
        validation = [encode_task(base, task, task.validation)] if task.validation else None
        train = [encode_task(base, task, task.train)]
        (known[key],), _ = train_fresh(base, [f"target-{task.name}"], train, validation, NEW_ADAPTER, seeds=[seed])
    return known[key]


def _examples_key(task: Task, base: Base) -> tuple:
    asked = (task.instruction, task.template, task.max_new_tokens, task.metric, task.choices)
    return (*asked, task.train, str(base.device), str(base.dtype))


def _check_pool(pool: Pool) -> None:
    if not len(pool):
        raise SelectionError(f"pool {pool.name!r} has no accepted adapter; pool.table says why")


def _cosines(pool: Pool, names: list[str], device: torch.device) -> Tensor:
    """(N, N) cosines of the adapters named, all modules pooled; a pool that does not fit into memory is read once."""
    return cosine(pool.stack(names, lazy=not pool.held).to(device).gram().cpu())


def _budget(device: torch.device) -> int:
    """Bytes of factors held at once: of a GPU's memory an eighth."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 2**28


def _score_all(pool: Pool, task: Task, base: Base) -> pd.DataFrame:
    examples, rows = encode_task(base, task, task.train), []
    chunks = _chunks(pool, _budget(base.device))
    held = pool.rankings[base].setdefault("factors", {})  # of a pool that fits at once: the next task asks again
    for chunk in chunks:
        updates = held.get(tuple(chunk))
        if updates is None:
            updates = _side_by_side(pool, chunk, base)
            if len(chunks) == 1:
                held[tuple(chunk)] = updates
        n = len(chunk)
        result = judged(base, [task] * n, [task.train] * n, [examples] * n, updates)
        rows += zip(chunk, result.accuracy.tolist(), result.loss.mean(1).tolist(), strict=True)
        del updates  # before the next ones are made
    rows.sort(key=lambda row: (-row[1], round(row[2], 6), row[0]))
    return pd.DataFrame(rows, columns=["name", "accuracy", "loss"])


def _side_by_side(pool: Pool, names: list[str], base: Base) -> dict[str, LowRank]:
    """As `compose.grouped`; adapters that do not fit into memory are read module by module."""
    stack = pool.stack(names, lazy=not pool.held).to(base.device)
    for module, units in stack.outline.items():
        check_fits(Adapter(stack.names[int(units.owner[0])], {module: units}), base.layers)  # shapes, as of factors
    return {module: LowRank(*units.padded(len(names))) for module, units in stack}


def _chunks(pool: Pool, budget: int) -> list[list[str]]:
    """Names in groups of like rank, whose factors, filled up to the group's largest rank, take at most `budget` bytes."""
    facts = pool.table.set_index("name")
    names = sorted(pool.names, key=lambda name: (facts.at[name, "rank"], name))
    chunks: list[list[str]] = []
    widest = 0.0
    for name in names:
        rank, parameters = facts.at[name, "rank"], facts.at[name, "parameters"]
        widest = max(widest, parameters / facts.at[name, "mean_rank"])  # Σ (d_out + d_in), about
        if not chunks or (len(chunks[-1]) + 1) * 4 * widest * rank > budget:
            chunks.append([])
        chunks[-1].append(name)
    return chunks
