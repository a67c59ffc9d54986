"""One adapter, wherever it comes from, and what must stand beside it: the base, random adapters like it, a new adapter.

found = try_adapter(base, Adapter.load("out/two-letters"), task)
found.table                             # accuracy and loss on the test split, with intervals
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.adapt.gradient import Watch
from workbench.adapters import Adapter
from workbench.base import Base, check_fits
from workbench.baselines import BASELINES, train_many
from workbench.compose import grouped
from workbench.controls import MATCHES, random_like
from workbench.errors import MergeError, TaskError
from workbench.evaluate import Scores
from workbench.runs import Case, Workplace
from workbench.stack import Stack
from workbench.tasks import Task
from workbench.trial import BASE, CONTROL, NEW, compared

__all__ = ["ADAPTER", "Beside", "try_adapter"]

ADAPTER = "adapter"


@dataclass(frozen=True)
class Beside:
    """An adapter and what stands beside it; made by `try_adapter`.

    table: as `Trial.table` has it, a row each for the adapter, the base alone, the new adapter (unless it was left out) and
    the random control; of several random adapters it is of each example's mean over them, so that its interval says what
    other examples would change, and `draws` (each one's accuracy) what other random weights would.
    new: the new adapter; None where it was left out.
    """

    task: Task
    seed: int
    control: str
    table: pd.DataFrame
    draws: tuple[float, ...]
    new: Adapter | None


def try_adapter(
    base: Base,
    adapter: Adapter,
    task: Task,
    *,
    seed: int = 0,
    control: str = "sigma",
    draws: int = 5,
    new: Mapping | None = None,
    train_new: bool = True,
    place: Workplace | None = None,
    watch: Watch | None = None,
) -> Beside:
    """Score an adapter on a task's test split, and the base, random adapters like it and a new adapter beside it.

    Args:
        seed: of the random adapters (the i-th of them is drawn under seed + i) and of the new one's training.
        control: what random adapters are matched by: sigma, norm or spectrum.
        draws: how many random adapters, scored in one pass.
        new: options of the new adapter, such as {"steps": 40}; it is trained on the task's training examples, its best step
            chosen on the validation split.
        train_new: False leaves the new adapter out.
        place: keeps encoded examples from one task or adapter to the next.
        watch: of the new adapter's training.

    Raises:
        MergeError: an unknown control or option of the new adapter, or no draw.
        TaskError: a task without test examples, or, for the new adapter, without training or validation examples.
        AdapterError: an adapter that does not fit the base.
    """
    new = dict(new or {})
    BASELINES[NEW].check(new)
    if control not in MATCHES:
        raise MergeError(f"random control {control!r} is unknown; choose one of {', '.join(MATCHES)}")
    if draws < 1:
        raise MergeError(f"draws is {draws}, expected a whole number ≥ 1")
    if not task.test:
        raise TaskError(f"{task.name} has no test examples to score an adapter on")
    if train_new and not (task.train and task.validation):
        raise TaskError(
            f"{task.name}: a new adapter needs training and validation examples; give it some, or leave it out (train_new=False)"
        )
    check_fits(adapter, base.layers)
    place, case, stack = place or Workplace(base, None), Case(task, seed), Stack.of([adapter])

    def scored(adapters: Sequence[Adapter]) -> Scores:
        return place.judged(
            [case] * max(1, len(adapters)), "test", grouped(adapters, base.device) if adapters else None
        )

    scores, trained = {ADAPTER: scored([adapter]), BASE: scored([])}, None
    if train_new:
        trained = train_many(place, NEW, [case], new, watch=watch)[0][0]
        scores[NEW] = scored([trained])
    random = scored([random_like(stack, control, seed=seed + i).adapter(0) for i in range(draws)])
    shares = random.match if draws == 1 else random.match.float().mean(0, keepdim=True)
    scores[CONTROL] = Scores(random.loss.mean(0, keepdim=True), shares, random.tokens)
    return Beside(task, seed, control, compared(scores), tuple(random.accuracy.tolist()), trained)
