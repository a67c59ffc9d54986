"""Adaptive merging: fit how adapters are combined on a few examples of a task."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from workbench.adapt.coefficients import COEFFICIENTS, Fitted, learn_coefficients
from workbench.adapt.gradient import Schedule
from workbench.adapt.search import lorahub
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.errors import MergeError
from workbench.evaluate import Encoded, encode_task
from workbench.licences import gathered
from workbench.stack import Stack
from workbench.tasks import Task

__all__ = ["ADAPTIVE", "adapt", "fit_many", "options_of", "scheduled"]

# name → (function, version, whether it takes a Schedule, paper)
ADAPTIVE = {
    "coefficients": (learn_coefficients, 1, COEFFICIENTS, "https://arxiv.org/abs/2602.12323"),
    "lorahub": (lorahub, 1, None, "https://arxiv.org/abs/2307.13269"),
}


def scheduled(schedule: Schedule, options: Mapping) -> tuple[Schedule, dict]:
    """Split options into those that change the schedule (steps, lr, batch, …) and the rest."""
    known = {field.name for field in fields(Schedule)}
    return replace(schedule, **{k: v for k, v in options.items() if k in known}), {
        k: v for k, v in options.items() if k not in known
    }


def options_of(method: str) -> tuple[str, ...]:
    """The options of an adaptive method: its own and, where it trains, its schedule's."""
    function, _, schedule, _ = ADAPTIVE[method]
    own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(sorted({*own} - {"seeds", "names"})) + tuple(field.name for field in fields(Schedule) if schedule)


def fit_many(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    method: str,
    *,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    **options,
) -> list[Fitted]:
    """Fit side by side by any adaptive method; options are its own and, where it trains, its schedule's.

    Raises:
        MergeError: an unknown method or option.
    """
    if method not in ADAPTIVE:
        near = difflib.get_close_matches(str(method), ADAPTIVE, 1)
        raise MergeError(
            f"no adaptive method {method!r}{f' (did you mean {near[0]!r}?)' if near else ''}; choose one of {', '.join(ADAPTIVE)}"
        )
    function, _, schedule, _ = ADAPTIVE[method]
    known = options_of(method)
    if unknown := sorted(set(options) - set(known)):
        raise MergeError(f"{method} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    settings, own = scheduled(schedule, options) if schedule else (None, dict(options))
    if schedule:
        return function(base, stacks, train, validation, settings, seeds=seeds, names=names, **own)
    return function(base, stacks, train, seeds=seeds, names=names, **own)


def adapt(
    base: Base,
    adapters: Stack | Sequence[Adapter],
    task: Task,
    method: str = "coefficients",
    *,
    seed: int = 0,
    **options,
) -> Fitted:
    """Fit one merge of adapters to a task's training examples, best validation loss kept where the method trains.

    A task without validation examples keeps the last step.

        fitted = adapt(base, chosen, task, "coefficients", granularity="module")
        fitted.adapter.save("out/mirror")

    Args:
        method: "coefficients" (the recycling study's) or "lorahub" (gradient-free).
        options: the method's own (`learn_coefficients`, `lorahub`), and for coefficients steps, lr, batch, ….

    Raises:
        MergeError: an unknown method or option, or a fit that diverges.
    """
    stack = adapters if isinstance(adapters, Stack) else Stack.of(adapters)
    train, validation = (encode_task(base, task, split) for split in (task.train, task.validation))
    fitted = fit_many(base, [stack], [train], [validation] if validation else None, method, seeds=[seed], **options)[0]
    sources = dict(zip(stack.names, fitted.coefficients.mean(0).tolist(), strict=True))
    info = {"method": method, "options": options, "sources": sources, "task": task.name, "paper": ADAPTIVE[method][3]}
    info |= {"config": stack.config, **gathered(stack.names, stack.infos)}
    info["notes"] = ["a source's weight is the mean of its coefficients over modules"]
    return replace(fitted, adapter=replace(fitted.adapter, info=info))
