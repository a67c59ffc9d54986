"""Adaptive merging: fit how adapters are combined on a few examples of a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import get_type_hints

from workbench.adapt.arrow import ARROW, arrow
from workbench.adapt.coefficients import COEFFICIENTS, adamerging, learn_coefficients
from workbench.adapt.fitted import Fitted
from workbench.adapt.gradient import Schedule, Watch, check_schedule
from workbench.adapt.pi_tuning import PI_TUNING, pi_tuning
from workbench.adapt.prior import PRIOR, prior
from workbench.adapt.progress import Bar
from workbench.adapt.ridge import ridge
from workbench.adapt.search import lorahub
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.errors import MergeError, TaskError
from workbench.evaluate import Encoded, encode_task
from workbench.licences import gathered
from workbench.options import Option, near
from workbench.stack import Stack
from workbench.tasks import Task

__all__ = ["ADAPTIVE", "Method", "adapt", "fit_many", "named", "options_of", "scheduled"]

_NOT_OPTIONS = ("seeds", "names", "watch")


@dataclass(frozen=True)
class Method:
    """An adaptive method: its function, version, default schedule (None: it takes none), paper, what it does, in a sentence
    for whoever chooses one; and what it returns.
    """

    name: str
    function: Callable[..., list[Fitted]]
    version: int
    schedule: Schedule | None
    paper: str
    summary: str
    validates: bool = True  # takes validation examples
    fixed: bool = False  # the stack stays as it is, and the coefficients alone make the adapter
    routes: bool = False  # it makes a routed model, which is no adapter

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its own options and, where it trains, its schedule's."""
        hints = get_type_hints(self.function, include_extras=True)
        own = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        found = {p.name: Option(p.default, hints.get(p.name, object)) for p in own if p.name not in _NOT_OPTIONS}
        return found | (schedule_options(self.schedule) if self.schedule else {})

    def folds(self, options: Mapping) -> bool:
        """Whether, under these options, folding the coefficients into the stack gives the adapter."""
        return self.fixed and options.get("space", "delta") == "delta"

    def settings(self, options: Mapping) -> tuple[Schedule | None, dict]:
        """The schedule and the method's own options, checked.

        Raises:
            MergeError: an unknown option (near names are given) or a value that it does not allow.
        """
        checked(self.name, options, self.options)
        if self.schedule is None:
            return None, dict(options)
        schedule, own = scheduled(self.schedule, options)
        check_schedule(schedule)
        return schedule, own


def schedule_options(schedule: Schedule) -> dict[str, Option]:
    """The options that change a schedule."""
    hints = get_type_hints(Schedule, include_extras=True)
    return {field.name: Option(getattr(schedule, field.name), hints[field.name]) for field in fields(Schedule)}


def checked(method: str, options: Mapping, known: Mapping[str, Option]) -> None:
    """Check options' names and values.

    Raises:
        MergeError: an unknown option (near names are given), or a value that it does not allow.
    """
    for name, value in options.items():
        if name not in known:
            raise MergeError(
                f"{method} has no option {name!r}{near(name, known)}; it takes {', '.join(known) or 'none'}"
            )
        if not known[name].accepts(value):
            raise MergeError(f"{method}: {name} is {value!r}, expected {known[name]}")


_METHODS = (
    Method(
        "coefficients",
        learn_coefficients,
        1,
        COEFFICIENTS,
        "https://arxiv.org/abs/2602.12323",
        "Learns from the training examples how much each adapter counts in every module; the adapters stay as they are.",
        fixed=True,
    ),
    Method(
        "lorahub",
        lorahub,
        2,
        None,
        "https://arxiv.org/abs/2307.13269",
        "LoraHub: searches one weight for each adapter, in [−1.5, 1.5], by trying candidates on the training examples.",
        validates=False,
        fixed=True,
    ),
    Method(
        "adamerging",
        adamerging,
        1,
        COEFFICIENTS,
        "https://arxiv.org/abs/2310.02575",
        "AdaMerging: learns a coefficient for each adapter and module, by the answers or by how sure the model is.",
        fixed=True,
    ),
    Method(
        "pi_tuning",
        pi_tuning,
        1,
        PI_TUNING,
        "https://arxiv.org/abs/2304.14381",
        "π-Tuning: learns the adapters' weights, which sum to one, and trains the adapters themselves along with them.",
    ),
    Method(
        "arrow",
        arrow,
        1,
        ARROW,
        "https://arxiv.org/abs/2405.11157",
        "Arrow: every token chooses and weighs adapters by its own hidden states; the result is a routed model.",
        routes=True,
    ),
    Method(
        "prior",
        prior,
        1,
        PRIOR,
        "",
        "Learns the merge's coefficients first, and then trains a new adapter on top of the merge.",
    ),
    Method(
        "ridge",
        ridge,
        1,
        None,
        "",
        "Solves for the coefficients in closed form, by ridge regression on the model linearised in them.",
        fixed=True,
    ),
)
ADAPTIVE: dict[str, Method] = {method.name: method for method in _METHODS}


def named(method: str) -> Method:
    """An adaptive method by its name.

    Raises:
        MergeError: no such method (near names are given).
    """
    if method not in ADAPTIVE:
        raise MergeError(f"no adaptive method {method!r}{near(method, ADAPTIVE)}; choose one of {', '.join(ADAPTIVE)}")
    return ADAPTIVE[method]


def scheduled(schedule: Schedule, options: Mapping) -> tuple[Schedule, dict]:
    """Split options into those that change the schedule (steps, lr, batch, …) and the rest."""
    known = {field.name for field in fields(Schedule)}
    return replace(schedule, **{k: v for k, v in options.items() if k in known}), {
        k: v for k, v in options.items() if k not in known
    }


def options_of(method: str) -> tuple[str, ...]:
    """The names of an adaptive method's options: its own and, where it trains, its schedule's."""
    return tuple(ADAPTIVE[method].options)


def fit_many(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    method: str,
    *,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
    **options,
) -> list[Fitted]:
    """Fit side by side by any adaptive method; options are its own and, where it trains, its schedule's.

    Raises:
        MergeError: an unknown method or option, or a value that an option does not allow.
    """
    chosen = named(method)
    schedule, own = chosen.settings(options)
    given = (train, validation) if chosen.validates else (train,)
    given += (schedule,) if schedule else ()
    return chosen.function(base, stacks, *given, seeds=seeds, names=names, watch=watch, **own)


def adapt(
    base: Base,
    adapters: Stack | Sequence[Adapter],
    task: Task,
    method: str = "coefficients",
    *,
    seed: int = 0,
    watch: Watch | bool | None = None,
    **options,
) -> Fitted:
    """Fit one merge of adapters to a task's training examples, best validation loss kept where the method trains.

    A task without validation examples keeps the last step.

        fitted = adapt(base, chosen, task, "coefficients", granularity="module")
        fitted.adapter.save("out/mirror")

    Args:
        method: "coefficients" (the recycling study's), "lorahub" (gradient-free), "adamerging", "pi_tuning", "arrow" (a
            routed model, which is no adapter), "prior" (a new adapter trained on top of the merge) or "ridge" (closed
            form).
        watch: called after every step with its number, the number of all and the loss; true stops there, and the best so
            far is kept. True shows a progress bar; interrupting the fit (■ in a notebook) then ends it in the same way.
        options: the method's own (`ADAPTIVE[method].options`), and steps, lr, batch, … of those that train.

    Returns:
        The adapter, its coefficients, the curves, and what was spent (examples fed forward and their tokens).

    Raises:
        TaskError: a task without training examples.
        MergeError: an unknown method or option, a value that it does not allow, or a fit that diverges.
    """
    stack = adapters if isinstance(adapters, Stack) else Stack.of(adapters)
    if not task.train:
        raise TaskError(f"{task.name} has no training examples to fit to")
    train, validation = (encode_task(base, task, split) for split in (task.train, task.validation))
    with Bar(method) if watch is True else nullcontext(watch or None) as told:
        fits = fit_many(
            base, [stack], [train], [validation] if validation else None, method, seeds=[seed], watch=told, **options
        )
    fitted = fits[0]
    sources = dict(zip(stack.names, fitted.coefficients.mean(0).tolist(), strict=True))
    info = {"method": method, "options": options, "sources": sources, "task": task.name}
    info |= {"paper": ADAPTIVE[method].paper} if ADAPTIVE[method].paper else {}
    info |= {"config": stack.config, **gathered(stack.names, stack.infos)}
    info["notes"] = ["a source's weight is the mean of its coefficients over modules"]
    return replace(fitted, adapter=replace(fitted.adapter, info=info))
