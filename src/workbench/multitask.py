"""One update for many tasks: merges of several adapters, and beside them random ones, a new adapter, and each one alone.

    frame = multitask(base, stack, {"reverse-letters": task, …}, {"ties": ("ties", {}), "lego": ("lego", {"k": 8})})
    frame.groupby(["variant", "control"]).accuracy.mean()     # tasks interleaved in one stream, without a label

A merged update answers an input alike whatever stands beside it, so its accuracy on a mixed stream is the mean over tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pandas as pd
import torch

from workbench.adapt.fresh import NEW_ADAPTER, Plan, train_fresh
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.compose import grouped
from workbench.controls import random_like
from workbench.errors import TaskError
from workbench.evaluate import Encoded, Scores, encode_task, evaluate, score
from workbench.merge import Dense, merge, truncate
from workbench.runs import tune_scales
from workbench.stack import Stack
from workbench.tasks import Task

__all__ = ["Variant", "multitask", "score_at", "tune"]

Variant = tuple[str, Mapping]  # a merging method's name, and its options
_TOGETHER = {"cuda": 64}  # updates in one pass; 8 on a processor


@dataclass(frozen=True)
class _Candidate:
    variant: str
    control: str
    limit: int
    method: str
    options: Mapping
    adapter: Adapter
    seconds: float


def multitask(
    base: Base,
    stack: Stack,
    tasks: Mapping[str, Task],
    variants: Mapping[str, Variant | Sequence[Variant]],
    *,
    controls: Sequence[str] = ("sigma",),
    rank: int | None = None,
    fresh: Sequence[int] = (80,),
    schedule: Schedule = NEW_ADAPTER,
    floor: float = 0.5,
    single: bool = True,
    real: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Merge a stack by each variant and score each merge on every task; all updates share their passes.

    One λ per merge, of least loss on the validation examples of all tasks together; λ = 1 is scored beside it.

    Args:
        tasks: the name of an adapter → the task it was trained on; under any other name, a task that none of them knows.
        variants: name → (method, options), or a list of such, of which the one of least validation loss stands.
        controls: random stand-ins of the adapters that every variant is repeated with (`controls.random_like`).
        rank: each merge is scored once more at no more than this rank (rows with `limit`), cut where it is of a larger one.
        fresh: a new adapter is trained for each number of training examples per task, all tasks' together; its rank is
            `rank`, or the mean rank of the stack.
        floor: least own accuracy at which `relative` is defined.
        single: look for the best single adapter, which scores every one at every λ.
        real: False leaves out the merges of the real adapters, so that those of their stand-ins are made alone.
        seed: of the random stand-ins and the new adapters.

    Returns:
        A row per variant × control × limit × task: adapter and task; kind, operation, domain, format; own_rank and own
        (rank and accuracy of the task's own adapter, alone); accuracy, loss, and both _unscaled (λ = 1); relative
        (accuracy / own); scale (λ), validation_loss; method, options (JSON) and k (where the method has one); rank, norm
        and seconds of the merge; adapters, n_validation, n_test, seed. Variants beside those given: "zero-shot"; "alone",
        the task's own adapter, which takes a label; "best single", the one adapter best for all tasks by validation
        loss; "new adapter, N examples".

    Raises:
        TaskError: no tasks, or one without validation or test examples.
        MergeError: what a variant asks for cannot be done.
    """
    if not tasks or not all(task.validation and task.test for task in tasks.values()):
        raise TaskError("merging for many tasks needs at least one task, each with validation and test examples")
    validation, test = (
        [encode_task(base, t, getattr(t, split)) for t in tasks.values()] for split in ("validation", "test")
    )
    sizes, pooled, stream = [len(rows) for rows in test], list(chain(*validation)), list(chain(*test))
    found = [_merged(stack, name, "", choices, rank) for name, choices in variants.items() if real]
    for control in controls:
        drawn = random_like(stack, control, seed=seed)
        found += [_merged(drawn, name, control, choices, rank) for name, choices in variants.items()]
    if single:
        each = [_Candidate("best single", "", 0, "alone", {"of": n}, stack.adapter(n), 0.0) for n in stack.names]
        found.append([each])
    width = rank or int(stack.ranks()[stack.ranks() > 0].float().mean() + 0.5)
    found += [[[_fresh(base, tasks, validation, n, width, schedule, seed)]] for n in fresh]

    groups = [group for variant in found for group in variant]
    every = [candidate for group in groups for candidate in group]
    scales, losses = tune(base, [one.adapter for one in every], [pooled] * len(every))
    chosen, at = [], 0
    for group in groups:
        best = at + int(torch.tensor(losses[at : at + len(group)]).argmin())
        chosen.append((every[best], scales[best], losses[best]))
        at += len(group)
    adapters = [one.adapter for one, _, _ in chosen]
    at_scales = [[scale for _, scale, _ in chosen], [1.0] * len(chosen)]
    tuned, plain = [score_at(base, adapters, at, [stream] * len(chosen)) for at in at_scales if chosen] or (None, None)

    own = {
        name: next(_means(evaluate(base, task, grouped([stack.adapter(name)], base.device)), 0, [len(task.test)]))
        for name, task in tasks.items()
        if name in stack.names
    }
    facts = [
        {
            "adapter": name,
            "task": task.name,
            **{label: task.labels.get(label, "") for label in ("kind", "domain", "format")},
            "operation": task.labels.get("operation", task.name),  # intervals are clustered by it
            "own_rank": stack.adapter(name).rank if name in own else 0,
            "own": own[name]["accuracy"] if name in own else float("nan"),
            "adapters": len(stack),
            "n_validation": len(task.validation),
            "n_test": len(task.test),
            "seed": seed,
        }
        for name, task in tasks.items()
    ]
    rows = []
    for g, (one, scale, least) in enumerate(chosen):
        about = {
            "variant": one.variant,
            "control": one.control,
            "limit": one.limit,
            "method": one.method,
            "options": json.dumps(dict(one.options)),
            "k": one.options.get("k", 0),
            "scale": scale,
            "validation_loss": least,
            "rank": one.adapter.rank,
            "norm": one.adapter.norm(),
            "seconds": one.seconds,
        }
        means = zip(facts, _means(tuned, g, sizes), _means(plain, g, sizes), strict=True)
        rows += [about | fact | at_scale | _unscaled(at_one) for fact, at_scale, at_one in means]
    unset = {"control": "", "options": "{}", "limit": 0, "k": 0, "rank": 0}
    for fact, means in zip(facts, _means(score(base, [stream]), 0, sizes), strict=True):
        rows.append(unset | {"variant": "zero-shot", "method": "zero-shot"} | fact | means | _unscaled(means))
    for fact in facts:
        if means := own.get(fact["adapter"]):
            about = {"variant": "alone", "method": "alone", "scale": 1.0, "rank": fact["own_rank"]}
            rows.append(about | fact | means | _unscaled(means))
    frame = pd.DataFrame(rows).fillna(unset)
    frame["relative"] = (frame.accuracy / frame.own).where(frame.own >= floor)
    return frame.astype({"limit": int, "k": int, "rank": int})


def tune(
    base: Base, adapters: Sequence[Adapter], validation: Sequence[Sequence[Encoded]]
) -> tuple[list[float], list[float]]:
    """λ of least validation loss for each update on its own examples, and that loss; see `runs.tune_scales`."""
    scales, losses = [1.0] * len(adapters), [0.0] * len(adapters)
    for part in _batches(base, adapters):
        rows = [validation[i] for i in part]
        best = tune_scales(base, [adapters[i] for i in part], rows)
        scored = score_at(base, [adapters[i] for i in part], best, rows).loss.mean(1).nan_to_num(torch.inf).tolist()
        for i, scale, loss in zip(part, best, scored, strict=True):
            scales[i], losses[i] = scale, loss
    return scales, losses


def score_at(
    base: Base, adapters: Sequence[Adapter], scales: Sequence[float], examples: Sequence[Sequence[Encoded]]
) -> Scores:
    """Scores of each update times its λ on its own examples (equally many each), in passes of some updates at once."""
    loss, match, tokens = torch.zeros(len(adapters), len(examples[0])), [None] * len(adapters), 0
    for part in _batches(base, adapters):
        scaled = grouped([adapters[i].times(scales[i]) for i in part], base.device)
        found = score(base, [examples[i] for i in part], scaled)
        loss[part], tokens = found.loss, tokens + found.tokens
        for i, right in zip(part, found.match, strict=True):
            match[i] = right
    return Scores(loss, torch.stack(match), tokens)


def _batches(base: Base, adapters: Sequence[Adapter]) -> Iterator[list[int]]:
    """Places of updates that share a pass, of like rank, since the smaller are filled up with zeros."""
    order = sorted(range(len(adapters)), key=lambda i: adapters[i].rank)
    size = _TOGETHER.get(base.device.type, 8)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _means(scores: Scores, g: int, sizes: Sequence[int]) -> Iterator[dict[str, float]]:
    """accuracy and loss of one update on each task of the stream."""
    for match, loss in zip(scores.match[g].split(list(sizes)), scores.loss[g].split(list(sizes)), strict=True):
        yield {"accuracy": float(match.float().mean()), "loss": float(loss.mean())}


def _unscaled(means: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_unscaled": value for name, value in means.items()}


def _merged(stack: Stack, name: str, control: str, choices, rank: int | None) -> list[list[_Candidate]]:
    """The candidates of one variant, and those of them cut to `rank`."""
    whole, cut = [], []
    for method, options in [choices] if isinstance(choices, tuple) else choices:
        start = time.perf_counter()
        result = merge(stack, method, **options)
        seconds = time.perf_counter() - start
        whole.append(_Candidate(name, control, 0, method, options, _exact(result), seconds))
        if rank is not None:
            start = time.perf_counter()
            low = result.truncate(rank) if isinstance(result, Dense) else truncate(result, rank)
            cut.append(replace(whole[-1], limit=rank, adapter=low, seconds=seconds + time.perf_counter() - start))
    return [whole, cut] if cut else [whole]


def _exact(result: Adapter | Dense) -> Adapter:
    """The same update as factors no wider than its modules."""
    if isinstance(result, Adapter):
        if all(f.rank <= min(f.B.shape[0], f.A.shape[1]) for f in result.modules.values()):
            return result
        embeddings = frozenset(m for m, f in result.modules.items() if f.embedding)
        deltas = {m: f.delta() for m, f in result.modules.items()}
        result = Dense(result.name, deltas, result.base, embeddings=embeddings)
    return result.truncate()


def _fresh(
    base: Base,
    tasks: Mapping[str, Task],
    validation: Sequence[Sequence[Encoded]],
    n: int,
    rank: int,
    schedule: Schedule,
    seed: int,
) -> _Candidate:
    train = []
    for task in tasks.values():
        if len(task.train) < n:
            raise TaskError(
                f"{task.name}: a new adapter from {n} training examples asked for, it has {len(task.train)}"
            )
        train += encode_task(base, task, task.train[:n])
    name, start = f"new adapter, {n} examples", time.perf_counter()
    adapters, _ = train_fresh(
        base, [name], [train], [list(chain(*validation))], schedule, seeds=[seed], plans=[Plan(rank=rank)]
    )
    seconds = time.perf_counter() - start
    return _Candidate(name, "", 0, "new adapter", {"rank": rank}, adapters[0], seconds)
