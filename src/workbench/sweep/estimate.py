"""What a sweep will cost: from earlier runs of the same kind where there are any, otherwise from the benchmark's figures.

frame = estimate(Sweep.load("studies/recycling.yaml"))      # a line for each kind of run
print(total(frame))                                         # "… about 310 GPU hours …"
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from workbench.errors import WorkbenchError
from workbench.sweep.cost import Part, parts, shared
from workbench.sweep.rates import Assumptions, Rates, Unknown
from workbench.sweep.spec import Experiment, Multitask, Notebook, Run, Sweep

__all__ = ["estimate", "total"]

COLUMNS = ("kind", "n_train", "runs", "seconds", "hours", "source")


def estimate(
    sweep: Sweep,
    earlier: pd.DataFrame | None = None,
    *,
    runs: Iterable[Run] | None = None,
    benchmark: pd.DataFrame | str | Path = "figures",
) -> pd.DataFrame:
    """What each kind of run will cost: a recipe, merge or notebook on one number of training examples.

    Args:
        earlier: stored rows. Of the same kind are those whose `run` differs in task and seed alone; where a row has
            none, of the same `recipe` and `n_train`. The median of their `seconds` counts, of the device that most have.
        runs: those left to do (None: all of the sweep's).
        benchmark: what `workbench bench` found, or the folder with bench_SCALE_DEVICE.parquet; see `workbench.sweep.cost`
            for how a run is reckoned from it. What several runs share has lines of its own, where those runs have no
            earlier ones.

    Returns:
        kind, n_train (0: of a notebook), runs, seconds (of one), hours (of all), source. Seconds are NaN where unknown. It
        is an estimate, of one run at a time on the device that the source names.

    Raises:
        WorkbenchError: assumptions of the sweep that cannot be.
    """
    runs = list(sweep.runs if runs is None else runs)
    known = _medians(earlier)
    rates = _rates(benchmark, Assumptions.of(sweep.assumed))
    kinds: dict[Run, list[Run]] = {}
    for run in runs:
        kinds.setdefault(_alike(run), []).append(run)
    rows, once = [], {}
    for same in kinds.values():
        first = same[0]
        kind = _kind(first.parameters)
        seconds, source = known.get(kind) or known.get(_label(first)) or (math.nan, "")
        if not source:
            seconds, source = _reckoned(same, rates, once)
        rows.append((_name(first), getattr(first, "n_train", None) or 0, len(same), seconds, source))
    for (label, n_train), found in _gathered(once).items():
        rows.append((label, n_train, len(found), sum(found) / len(found), rates.source))
    frame = pd.DataFrame(rows, columns=["kind", "n_train", "runs", "seconds", "source"])
    frame.insert(4, "hours", frame.runs * frame.seconds / 3600)
    return frame[list(COLUMNS)]


def total(frame: pd.DataFrame) -> str:
    """The whole of an estimate in a sentence or two: runs, hours, on what, and what is unknown."""
    once = frame.kind.str.startswith("once")
    whole, unknown = frame.hours.sum(), frame[frame.seconds.isna()]
    where = sorted({source.partition(", ×")[0] for source in frame[frame.seconds.notna()].source})
    device = "processor hours" if any("threads" in one or "(cpu)" in one for one in where) else "GPU hours"
    text = f"{frame[~once].runs.sum():,} runs: about {_hours(whole)} {device}, one run at a time (an estimate from {'; '.join(where) or 'nothing'})"
    if len(unknown):
        text += (
            f"; of {unknown.runs.sum():,} runs of {len(unknown)} kinds nothing is known, such as {unknown.kind.iloc[0]}"
        )
    return text


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _reckoned(same: list[Run], rates: Rates | str, once: dict) -> tuple[float, str]:
    """(seconds of a run, source) from the benchmark, of runs of one kind; work that runs share is put into `once`."""
    if isinstance(rates, str) or isinstance(same[0], Notebook):
        return math.nan, "unknown: no earlier run" + (f", {rates}" if isinstance(rates, str) else "")
    try:
        found = parts(same[0], rates)
    except Unknown as error:
        return math.nan, f"unknown: {error}"
    for part in found:
        if part.shared is not None:
            keys = {shared(run)[part.label] for run in same}
            once.update({key: (part, same[0].n_train or 0) for key in keys})
    return sum(part.seconds for part in found if part.shared is None), rates.source


def _gathered(once: Mapping[tuple, tuple[Part, int]]) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for part, n_train in once.values():
        found.setdefault((f"once for all that ask: {part.label}", n_train), []).append(part.seconds)
    return found


def _rates(benchmark: pd.DataFrame | str | Path, assumed: Assumptions) -> Rates | str:
    """The benchmark's rates, or why there are none."""
    if not isinstance(benchmark, pd.DataFrame):
        path = Path(benchmark) / f"bench_{assumed.nearest}_{assumed.device}.parquet"
        if not path.is_file():
            return f"and no benchmark {path} (`workbench bench` makes it)"
        benchmark = pd.read_parquet(path)
    try:
        return Rates(benchmark, assumed)
    except Unknown as error:
        return str(error)


def _kind(parameters: Mapping) -> str:
    """What runs of one kind have in common."""
    if "notebook" in parameters:
        return json.dumps(["notebook", Path(parameters["notebook"]).stem])
    return json.dumps(
        {k: v for k, v in parameters.items() if k not in ("task", "seed", "draw", "folder")}, sort_keys=True
    )


def _alike(run: Run) -> Run:
    """The run that stands for its kind."""
    if isinstance(run, Notebook):
        return Notebook(run.notebook)
    return replace(run, seed=0, **({"task": "", "draw": None, "folder": None} if isinstance(run, Experiment) else {}))


def _label(run: Run) -> tuple:
    return (run.recipe.label, run.n_train) if isinstance(run, Experiment) else ()


def _name(run: Run) -> str:
    if isinstance(run, Experiment):
        return run.recipe.label
    if isinstance(run, Multitask):
        return replace(run, seed=0).label.partition(": ")[2]
    return Path(run.notebook).stem


def _medians(earlier: pd.DataFrame | None) -> dict:
    """Kind, or (recipe, n_train), → (seconds, source)."""
    if earlier is None or earlier.empty or "seconds" not in earlier:
        return {}
    rows = earlier[earlier.seconds.notna()].copy()
    rows["device"] = rows.get("device", "")
    told = rows["run"].map(_read) if "run" in rows else pd.Series(None, index=rows.index, dtype=object)
    rows["kind"] = [
        _kind(one) if isinstance(one, dict) else (row.get("recipe"), row.get("n_train"))
        for one, row in zip(told, rows.to_dict("records"), strict=True)
    ]
    found = {}
    for kind, same in rows.groupby("kind", sort=False):
        same = same.drop_duplicates("run") if isinstance(kind, str) else same  # a run may have several rows
        device = same.device.fillna("").mode().iloc[0]
        own = same[same.device.fillna("") == device]
        about = f" ({device})" if device else ""
        found[kind] = float(own.seconds.median()), f"median of {len(own)} earlier run{'s' * (len(own) != 1)}{about}"
    return found


def _read(text) -> dict | None:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError as error:
        raise WorkbenchError(f"a stored row's run is no JSON: {error}") from error
    return found if isinstance(found, dict) else None
