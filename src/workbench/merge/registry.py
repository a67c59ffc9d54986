"""What a merging method is, and `merge`, which runs one over a stack.

A method is a short pure function of one module's units with a decorator; everything else (weights checked, options
checked against the signature's hints, the scale, truncation, provenance) happens here:

    @method("sum", paper="https://arxiv.org/abs/2212.04089", invariances={"units", "gauge", "order", "linear"})
    def sum_(units: Units, weights: Tensor) -> tuple[Tensor, Tensor]:
        return units.times(weights[units.owner]), units.A
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_type_hints

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.adapters import Adapter, Factors
from workbench.errors import MergeError
from workbench.licences import gathered
from workbench.merge.dense import Dense, cut
from workbench.options import Count, Option, accepts, near, words
from workbench.singular import on_processor
from workbench.source import finite
from workbench.stack import Stack, Units

if TYPE_CHECKING:
    from workbench.merge.statistics import Statistics
    from workbench.pool import Pool

__all__ = ["INVARIANCES", "Method", "describe", "merge", "method", "methods"]

# What a method may declare; a property test holds each to what it declares. All are meant up to rounding.
INVARIANCES = {
    "units": "permuting the units of an adapter changes nothing",
    "gauge": "(B, A) → (B M, M⁻¹ A), M invertible, per adapter and module, changes nothing; includes units and scale",
    "scale": "(b, a) → (c b, a / c), c ≠ 0 of either sign, per unit, changes nothing",
    "order": "the order of the adapters (and their weights) changes nothing",
    "linear": "the update is linear in the weights",
}


@dataclass(frozen=True)
class Method:
    """A registered method. `also` maps (option, value) → invariances that hold under that setting besides.

    `takes` is how many adapters it merges (None: any number), `needs` what it must know of each adapter's examples
    (`workbench.merge.statistics`): "", "inputs" or "gradients".
    """

    name: str
    function: Callable
    paper: str
    invariances: frozenset[str]
    version: int = 1
    dense: bool = False
    options: dict[str, Option] = field(default_factory=dict)
    truncates: bool = False
    notes: Callable[[Stack, Tensor, dict], list[str]] | None = None
    also: dict[tuple[str, object], frozenset[str]] = field(default_factory=dict)
    takes: int | None = None
    needs: str = ""

    def invariant(self, **options) -> frozenset[str]:
        """The invariances that hold under these options."""
        settings = {name: option.default for name, option in self.options.items()} | options
        return self.invariances.union(*(more for (name, value), more in self.also.items() if settings[name] == value))

    def settings(self, options: Mapping) -> dict:
        """Defaults filled in and every value checked.

        Raises:
            MergeError: an unknown option, or a value that its hint does not allow.
        """
        for name, value in options.items():
            if name not in self.options:
                accepted = "; ".join(f"{key}: {option} ({option.default!r})" for key, option in self.options.items())
                raise MergeError(
                    f"{self.name} has no option {name!r}{near(name, self.options)}; it takes {accepted or 'none'}"
                )
            if not self.options[name].accepts(value):
                raise MergeError(f"{self.name}: {name} is {value!r}, expected {self.options[name]}")
        return {name: options.get(name, option.default) for name, option in self.options.items()}


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    invariances: set[str],
    version: int = 1,
    dense: bool = False,
    truncates: bool = False,
    notes: Callable[[Stack, Tensor, dict], list[str]] | None = None,
    also: Mapping[tuple[str, object], set[str]] | None = None,
    takes: int | None = None,
    needs: str = "",
) -> Callable[[Callable], Callable]:
    """Register a merging method: a function (units, weights, *, options) of one module.

    The function gets `Units` in fp32 (or wider) and weights (N,) on the units' device, and returns factors
    (B (d_out, q), A (q, d_in)), or ΔW (d_out, d_in) with `dense`. Options are keyword-only, with a default and a hint
    (`Share`, `Count`, `Literal`, bool, int, float, str, or one of these `| None`).

    Args:
        paper: the link to what it implements.
        invariances: words of `INVARIANCES` that hold under the default options.
        version: to be raised whenever results change; stored results are keyed by it.
        truncates: the result is cut to `rank`, and where none is given to the largest rank among the candidates.
        notes: called once before merging with (stack, weights, options); may raise, and returns remarks for the result.
        also: (option, value) → further invariances under that setting.
        takes: exactly how many adapters (of a weight other than 0) it merges; None is any number.
        needs: "inputs" or "gradients": the function gets, as a third positional argument, what `collect` found for each
            adapter in this module.

    Raises:
        MergeError: the name is taken, or an invariance unknown.
    """
    also = {key: frozenset(words) for key, words in (also or {}).items()}
    unknown = sorted(set(invariances).union(*also.values()) - set(INVARIANCES))
    if unknown:
        raise MergeError(f"{name}: unknown invariances {', '.join(unknown)}; there are {', '.join(INVARIANCES)}")

    def register(function: Callable) -> Callable:
        taken = _METHODS.get(name)
        if taken and (taken.function.__module__, taken.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise MergeError(f"a method {name!r} exists already ({taken.function.__module__}); choose another name")
        hints = get_type_hints(function, include_extras=True)
        options = {
            key: Option(parameter.default, hints.get(key, object))
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        _METHODS[name] = Method(
            name, function, paper, frozenset(invariances), version, dense, options, truncates, notes, also, takes, needs
        )
        return function

    return register


def methods() -> dict[str, Method]:
    """Name → method, in the order of registration."""
    return dict(_METHODS)


def describe(name: str | None = None) -> list[dict]:
    """What there is to know about each method, or one, in plain values: what `workbench methods` prints.

    Raises:
        MergeError: an unknown name.
    """
    return [_described(record) for record in ([_named(name)] if name else _METHODS.values())]


def _described(record: Method) -> dict:
    text = inspect.getdoc(record.function) or ""
    return {
        "name": record.name,
        "summary": text.partition("\n")[0],
        "result": "dense" if record.dense else "adapter",
        "takes": f"{record.takes} adapters" if record.takes else "",
        "needs": record.needs,
        "options": {key: {"default": o.default, "accepts": str(o)} for key, o in record.options.items()},
        "invariances": [word for word in INVARIANCES if word in record.invariant()],
        "paper": record.paper,
        "version": record.version,
        "documentation": text,
    }


def _named(name: str) -> Method:
    if name not in _METHODS:
        raise MergeError(f"no merging method {name!r}{near(name, _METHODS)}; choose one of {', '.join(_METHODS)}")
    return _METHODS[name]


def merge(
    source: Pool | Stack | Sequence[Adapter],
    method: str = "average",
    *,
    weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    statistics: Statistics | None = None,
    name: str | None = None,
    **options,
) -> Adapter | Dense:
    """Merge adapters into one update.

        merge(adapters, "average")                          # an adapter of rank Σ r
        merge(stack, "ties", density=0.2, rank=16)          # dense, then truncated; info["error"] says at what cost

    Args:
        source: a stack, or adapters of one base, of any mix of ranks and targets; or a pool, of which all accepted
            adapters are merged.
        method: a name in `methods()`.
        weights: one per adapter, in order or by name; any sign; None is 1 for each.
        scale: λ, which multiplies the finished update. Tune it on the validation split for every method alike.
        rank: truncate the result to this rank, by SVD.
        statistics: what `workbench.merge.collect` found over a few of each adapter's examples, for methods that need it.
        name: of the result; such as "ties-of-10" where none is given.
        options: the method's own; `methods()[name].options` lists them.

    Returns:
        `Adapter`, or `Dense` for a dense method without `rank`. `info` holds method, version, options, paper,
        sources (name → weight), licences (name → what the adapter's card states), report (a table, adapter × module: rank
        and status, "used", "weight 0", "absent", "left out" or "refused", with the reason), notes, and, where truncated, error
        (module → relative Frobenius error).

    Raises:
        MergeError: an unknown method or option, a value out of its range, or values that are not finite.
    """
    chosen = _named(method)
    settings = chosen.settings(options)
    if not accepts(float, scale):
        raise MergeError(f"scale is {scale!r}, expected a finite number")
    if not accepts(Count | None, rank):
        raise MergeError(f"rank is {rank!r}, expected {words(Count | None)}")
    refused = source.refused() if hasattr(source, "refused") else {}
    if hasattr(source, "stack"):
        source = source.stack()
    stack = source if isinstance(source, Stack) else Stack.of([source] if isinstance(source, Adapter) else source)
    if not stack.modules:
        raise MergeError(f"the {len(stack)} adapters hold no module, so there is nothing to merge")
    each = stack.weights(weights)
    live = int((each != 0).sum())
    if chosen.takes is not None and live not in (0, chosen.takes):
        raise MergeError(
            f"{method} merges {chosen.takes} adapters, got {live} with a weight other than 0; choose others"
        )
    if chosen.takes is not None and len(stack) < chosen.takes:
        raise MergeError(f"{method} merges {chosen.takes} adapters, got {len(stack)}")
    if chosen.needs:
        _check_statistics(chosen, stack, statistics)
    notes = chosen.notes(stack, each, settings) if chosen.notes else []
    name = name or f"{method}-of-{len(stack)}"
    info = {
        "method": method,
        "version": chosen.version,
        "options": {**settings, "scale": scale, "rank": rank},
        "paper": chosen.paper,
        "sources": dict(zip(stack.names, each.tolist(), strict=True)),
        **gathered(stack.names, stack.infos),
        "config": stack.config,
        "report": _report(stack, each, refused),
        "notes": notes,
    }
    ranks = dict(zip(stack.modules, stack.ranks().amax(0).tolist(), strict=True))
    found, error = {}, {}
    for module, units in stack:  # cut here, so that one module's units and one whole result are held at a time
        most = rank or (ranks[module] if chosen.truncates and not chosen.dense else None)
        found[module], lost = _run(chosen, stack, units, each, settings, scale, statistics, most)
        if lost is not None:
            error[module] = lost
    if error:
        info["error"] = error
    if chosen.dense and rank is None:
        embeddings = frozenset(module for module, units in stack.outline.items() if units.embedding)
        return Dense(name, found, stack.base, info, embeddings)
    return Adapter(name, found, stack.base, info)


merge.methods = methods


def _run(
    chosen: Method,
    stack: Stack,
    units: Units,
    weights: Tensor,
    settings: dict,
    scale: float,
    statistics: Statistics | None,
    rank: int | None,
) -> tuple[Tensor | Factors, float | None]:
    """One module's result, scaled, perhaps cut to a rank (and what share of the norm that lost), in main memory."""
    module = units.module
    dtype = torch.promote_types(units.B.dtype, torch.float32)  # a sum in bf16 stalls (256 + 1 = 256)
    units = replace(units, B=units.B.to(dtype), A=units.A.to(dtype))
    if not finite(units.B, units.A):
        sound = torch.isfinite(units.B).all(0) & torch.isfinite(units.A).all(1)
        culprits = ", ".join(stack.names[i] for i in units.owner[~sound].unique().tolist())
        raise MergeError(f"{module} holds values that are not finite in {culprits}; leave such adapters out")
    known = (statistics.of(units, stack.names),) if chosen.needs else ()
    try:
        result = chosen.function(units, weights.to(units.B), *known, **settings)
    except torch.linalg.LinAlgError as error:
        raise MergeError(f"{chosen.name}: {module} has no singular values ({error}); lower the weights") from error
    first, *others = (result,) if chosen.dense else result
    parts, lost = [first if scale == 1 else first * scale, *others], None
    fetched = [_fetch(part) for part in parts] if rank is None else []
    if not finite(*parts):
        raise MergeError(f"{chosen.name}: the result for {module} overflows; lower the weights")
    if rank is not None:
        cut_off, lost = cut(parts[0] if chosen.dense else Factors(*parts), rank)
        fetched = [_fetch(cut_off.B), _fetch(cut_off.A)]
    parts = [fetch() for fetch in fetched]
    return Factors(*parts, embedding=units.embedding) if len(parts) > 1 else parts[0], lost


def _fetch(x: Tensor) -> Callable[[], Tensor]:
    """A function that gives x in main memory.

    A GPU may still be computing x. Meanwhile all threads touch the pages that are to take it: a copy into untouched ones,
    which one thread makes, goes at 1–2 GB/s.
    """
    if on_processor(x):
        return x.contiguous
    room = torch.empty(x.shape, dtype=x.dtype).zero_()
    return lambda: room.copy_(x)


def _report(stack: Stack, weights: Tensor, refused: Mapping[str, str]) -> pd.DataFrame:
    ranks = stack.ranks().numpy(force=True)
    n, m = ranks.shape
    absent, unused = ranks == 0, (weights.numpy() == 0)[:, None].repeat(m, 1)
    table = pd.DataFrame(
        {
            "adapter": np.repeat(np.array(stack.names, dtype=object), m),
            "module": np.tile(np.array(list(stack.modules), dtype=object), n),
            "rank": ranks.ravel(),
            "weight": weights.double().numpy().repeat(m),
            "status": np.where(absent, "absent", np.where(unused, "weight 0", "used")).ravel(),
            "reason": "",
        }
    )
    others = [
        (name, module, 0, 0.0, "left out", reason)
        for name, info in zip(stack.names, stack.infos, strict=False)
        for module, reason in info.get("left_out", {}).items()
    ]
    others += [(name, "", 0, 0.0, "refused", reason) for name, reason in refused.items()]
    return pd.concat([table, pd.DataFrame(others, columns=table.columns)], ignore_index=True) if others else table


def _check_statistics(chosen: Method, stack: Stack, statistics: Statistics | None) -> None:
    if statistics is None:
        raise MergeError(
            f"{chosen.name} needs {chosen.needs} of each adapter's examples; pass "
            f"statistics=workbench.merge.collect(base, adapters, examples{', gradients=True' * (chosen.needs == 'gradients')})"
        )
    lost = [name for name in stack.names if name not in statistics.names]
    if lost:
        raise MergeError(f"the statistics lack {len(lost)} of {len(stack)} adapters, such as {lost[0]!r}")
    if chosen.needs == "gradients" and not statistics.gradients:
        raise MergeError(f"{chosen.name} needs gradients, which these statistics lack; pass gradients=True to collect")
