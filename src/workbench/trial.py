"""One merge of adapters picked by hand, and what must stand beside it: the base, a new adapter, the random control.

trial = try_merge(base, pool, ["first-two-letters", "last-two-letters"], task, "coefficients", {"steps": 50})
trial.table                             # accuracy and loss on the test split, with intervals
trial.adapter.save("out/two-letters")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from workbench import stats
from workbench.adapt import ADAPTIVE, adapt
from workbench.adapt.arrow import Router, routed
from workbench.adapt.fitted import Fitted
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.baselines import BASELINES, train_many
from workbench.compose import grouped
from workbench.controls import MATCHES, random_like
from workbench.errors import MergeError, TaskError
from workbench.evaluate import Scores
from workbench.generation import decode, generate
from workbench.merge import Dense, merge, methods
from workbench.options import near
from workbench.pool import Pool
from workbench.prompts import tokenise
from workbench.runs import Case, Workplace, check_examples, check_options, observe, tune_scales
from workbench.stack import Stack
from workbench.tasks import Task

__all__ = ["BASE", "CONTROL", "MERGE", "NEW", "Trial", "compared", "line", "try_merge"]

MERGE, BASE, NEW, CONTROL = "merge", "base alone", "new adapter", "random control"
Tell = Callable[[int, int, str], bool]


@dataclass(frozen=True)
class Trial:
    """A merge and what stands beside it; made by `try_merge`.

    table: a row each for the merge, the base alone, the new adapter and the random control. accuracy, loss (nats per answer
    token) and difference (the merge's accuracy minus this one's, on the same examples), each with low and high, over the
    `n` test examples; accuracy's interval is Wilson's (of a metric with partial credit, and of all else, the bootstrap's).
    adapters: what each row is of, None for the base; Arrow's merge is a `Router`.
    fitted: what the fit returned, None of a merge that fits nothing but λ, the `scale`.
    told: the last step of the merge's fit, and how many there were to be; (0, 0) where none was told of.
    """

    names: tuple[str, ...]
    task: str
    metric: str
    method: str
    options: Mapping
    seed: int
    control: str
    new: Mapping
    table: pd.DataFrame
    adapters: Mapping[str, Adapter | Router | None]
    modules: tuple[str, ...]
    fitted: Fitted | None = None
    scale: float | None = None
    told: tuple[int, int] = (0, 0)
    asked: bool = field(default=False, repr=False)

    @property
    def adapter(self) -> Adapter | Router:
        """The merge."""
        return self.adapters[MERGE]

    @property
    def until(self) -> int | None:
        """The step at which the merge's fit was asked to stop before its end; None: it was not."""
        done, total = self.told
        return done if self.asked and done < total else None

    @property
    def code(self) -> str:
        """The call that makes this trial."""
        return line(self.names, self.method, self.options, self.seed, self.control, self.new, self.until)

    @property
    def coefficients(self) -> pd.DataFrame | None:
        """Of a fit, each module's coefficient of each adapter (columns); None where nothing was fitted."""
        if self.fitted is None:
            return None
        found = self.fitted.coefficients.detach().cpu()
        more = [f"fresh {i}" for i in range(1, found.shape[1] - len(self.names) + 1)]  # π-tuning's own
        return pd.DataFrame(found.numpy(), index=list(self.modules), columns=[*self.names, *more])

    def answers(self, base: Base, prompt: str, limit: int, *, tell: Tell = lambda *_: False) -> dict[str, str]:
        """What each writes after a prompt, greedily, in at most `limit` tokens; those that came before `tell` said stop.

        Raises:
            TaskError: an empty prompt, or one longer than the base can read.
        """
        out, ids = {}, tokenise(base, [prompt], [limit])
        for i, (what, adapter) in enumerate(self.adapters.items()):
            if tell(i, len(self.adapters), what):
                break
            ((written,),) = generate(base, [ids], limit, _updates(base, adapter))
            out[what] = decode(base, written)
        return out


def line(
    names: Sequence[str],
    method: str,
    options: Mapping,
    seed: int = 0,
    control: str = "sigma",
    new: Mapping | None = None,
    until: int | None = None,
) -> str:
    """The call of `try_merge` with these, where base, pool and task have these names."""
    given = [f"{list(names)!r}", "task", repr(method), *([repr(dict(options))] if options else [])]
    given += [f"seed={seed}"] * bool(seed) + [f"control={control!r}"] * (control != "sigma")
    given += [f"new={dict(new or {})!r}"] * bool(new) + [f"until={until}"] * (until is not None)
    return f"try_merge(base, pool, {', '.join(given)})"


def try_merge(
    base: Base,
    pool: Pool,
    names: Sequence[str],
    task: Task,
    method: str,
    options: Mapping | None = None,
    *,
    seed: int = 0,
    control: str = "sigma",
    new: Mapping | None = None,
    until: int | None = None,
    place: Workplace | None = None,
    tell: Tell | None = None,
) -> Trial | None:
    """Merge adapters of a pool for a task, and the base, a new adapter and the same recipe over random adapters beside it.

    As `compare` has it of a recipe: fits see the training examples, and the validation split for the best step; a merge that
    fits nothing has its λ from the validation split; all are scored on the test split.

    Args:
        method, options: of a merge (`merge.methods()`) or of a fit (`ADAPTIVE`).
        seed: of the fits and of the random adapters.
        control: what random adapters are matched by: sigma, norm or spectrum.
        new: options of the new adapter, such as {"steps": 40}.
        until: the step at which the merge's own fit ends, the best so far kept; the control and the new adapter go on.
        place: keeps new adapters, controls and encoded examples from one trial to the next.
        tell: called with how far a stage is, of how much, and which; true stops. The merge's own fit comes last and ends with
            the best so far (`Trial.until`).

    Returns:
        None where `tell` said stop before there was all that stands beside a merge.

    Raises:
        MergeError: an unknown method, option or control, a value that is not allowed, adapters that cannot be merged so.
        TaskError: a task that lacks training, validation or test examples.
        SelectionError: no names, or unknown ones.
    """
    options, new, tell = dict(options or {}), dict(new or {}), tell or (lambda *_: False)
    _check(pool, names, task, method, options, control, new)
    place, case, stack = place or Workplace(base, pool), Case(task, seed), pool.stack(names)
    adapters: dict[str, Adapter | Router | None] = {}
    scores: dict[str, Scores] = {}
    work = _Work(base, place, case, method, options, tell)
    function = {**methods(), **ADAPTIVE}[method].function  # a name may be registered anew
    beside = {
        BASE: ((), lambda watch: None),
        CONTROL: (
            (stack.names, stack.digest(), function, repr(options), control),
            lambda watch: work.merged(random_like(stack, control, seed=seed), stack.names, watch)[0],
        ),
        NEW: ((repr(new),), lambda watch: train_many(place, "new adapter", [case], new, watch=watch)[0][0]),
    }
    for what, (key, make) in beside.items():
        key = (what, case.digest, seed, *key)
        if key not in place.beside:
            watch = _Watch(f"{what}: ", tell)
            if watch(0, 1, None):
                return None
            adapter = make(watch)
            if watch.asked:
                return None
            place.beside[key] = adapter, work.scored(adapter)
        adapters[what], scores[what] = place.beside[key]
    watch = _Watch("", tell, until)
    if watch(0, 1, None):
        return None
    adapter, fitted, scale = work.merged(stack, stack.names, watch)
    adapters, scores = {MERGE: adapter, **adapters}, {MERGE: work.scored(adapter), **scores}
    order = (MERGE, BASE, NEW, CONTROL)
    table = compared({what: scores[what] for what in order})
    adapters = {what: adapters[what] for what in order}
    told, asked = (watch.done, watch.total), watch.asked
    made = (tuple(stack.names), task.name, task.metric, method, options, seed, control, new, table, adapters)
    return Trial(*made, tuple(stack.modules), fitted, scale, told, asked)


@dataclass
class _Watch:
    """`watch` of one stage: passes on how far it is, and remembers whether it was asked to stop."""

    words: str
    tell: Tell
    until: int | None = None
    done: int = 0
    total: int = 0
    asked: bool = False

    def __call__(self, done: int, total: int, loss: float | None) -> bool:
        said = self.words + ("" if loss is None else f"loss {loss:.3f}")
        if loss is not None:
            self.done, self.total = done, total
        stop = self.tell(done, total, said.removesuffix(": ") or MERGE)
        due = loss is not None and self.until is not None and done >= self.until
        self.asked = self.asked or bool(stop) or due
        return self.asked


@dataclass(frozen=True)
class _Work:
    """What the merge and its control have in common."""

    base: Base
    place: Workplace
    case: Case
    method: str
    options: Mapping
    tell: Tell

    def merged(
        self, stack: Stack, names: Sequence[str], watch: _Watch
    ) -> tuple[Adapter | Router, Fitted | None, float | None]:
        """The merge of a stack, or of random stand-ins for these names; the fit, or λ."""
        base, options = self.base, dict(self.options)
        if self.method in ADAPTIVE:
            if isinstance(options.get("target"), str):
                options["target"] = list(names).index(options["target"])  # stand-ins have other names
            fitted = adapt(base, stack, self.case.task, self.method, seed=self.case.seed, watch=watch, **options)
            return fitted.adapter, fitted, None
        found = merge(stack, self.method, statistics=observe(base, stack, self.method, names), **options)
        adapter = found.truncate() if isinstance(found, Dense) else found
        (scale,) = tune_scales(base, [adapter], [self.place.encoded(self.case, "validation")])
        return adapter.times(scale), None, scale

    def scored(self, adapter: Adapter | Router | None) -> Scores:
        return self.place.judged([self.case], "test", _updates(self.base, adapter))


def _updates(base: Base, adapter: Adapter | Router | None):
    if adapter is None:
        return None
    return routed([adapter], base.device) if isinstance(adapter, Router) else grouped([adapter], base.device)


def _check(pool: Pool, names: Sequence[str], task: Task, method: str, options: Mapping, control: str, new: Mapping):
    known = {**methods(), **ADAPTIVE}
    if method not in known:
        raise MergeError(f"no method {method!r}{near(method, known)}; choose one of {', '.join(known)}")
    check_options(method, options)
    BASELINES[NEW].check(new)
    if control not in MATCHES:
        raise MergeError(f"random control {control!r} is unknown; choose one of {', '.join(MATCHES)}")
    if isinstance(options.get("target"), str) and options["target"] not in names:
        raise MergeError(f"target {options['target']!r} is not among the chosen adapters; choose it, or name another")
    if not (task.train and task.validation and task.test):
        raise TaskError(f"{task.name}: a trial needs training, validation and test examples")
    check_examples(method, pool, names)


def compared(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """A row each, as `Trial.table` has them: the scores (1, N) of the first and of what stands beside it."""
    first = next(iter(scores))
    ours, rows = scores[first].match[0].double().numpy(), []
    for what, one in scores.items():
        match, loss = one.match[0].double().numpy(), one.loss[0].double().numpy()
        low, high = _interval(match)[1:]
        if not one.match.is_floating_point():
            low, high = binomtest(int(match.sum()), len(match)).proportion_ci(0.95, "wilson")
        row = {"accuracy": match.mean(), "low": low, "high": high}
        row |= dict(zip(("loss", "loss_low", "loss_high"), _interval(loss), strict=True))
        apart = (np.nan,) * 3 if what == first else _interval(ours - match)
        row |= dict(zip(("difference", "difference_low", "difference_high"), apart, strict=True))
        rows.append({"what": what, **row, "n": len(match)})
    return pd.DataFrame(rows).set_index("what")


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval over examples (bootstrap); of values that are not all finite neither."""
    if not np.isfinite(values).all():
        return (np.nan,) * 3
    frame = pd.DataFrame({"value": values, "example": range(len(values))})
    found = stats.bootstrap(frame, [], "value", cluster="example").iloc[0]
    return tuple(float(found[name]) for name in ("mean", "low", "high"))
