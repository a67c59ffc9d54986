"""What a sweep has still to do, and what that costs, before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from workbench.results import Results
from workbench.sweep.estimate import estimate
from workbench.sweep.spec import Sweep
from workbench.sweep.work import identity

__all__ = ["outlook"]


def outlook(
    sweep: Sweep,
    results: str | Path | None = None,
    earlier: Iterable[str | Path] = (),
    benchmark: str | Path = "figures",
    *,
    whole: bool = False,
) -> tuple[pd.DataFrame, int]:
    """What is left of a sweep by kind of run with its cost (see `estimate.estimate`), and how many runs are stored.

    Stored are those whose settings are a stored row's; whether pool, base and tasks still are what they were is seen when
    the sweep runs.

    Args:
        results: the folder of results, instead of the sweep's own; its rows are earlier runs as well.
        earlier: more folders of earlier runs.
        whole: all runs, stored or not, from the benchmark alone.
    """
    rows = Results(results or sweep.results).read()
    asked = set(rows["asked"].dropna()) if "asked" in rows else set()
    left = [one for one in sweep.runs if identity(one) not in asked]
    if whole:
        return estimate(sweep, benchmark=benchmark), len(sweep.runs) - len(left)
    frames = [frame for frame in (rows, *(Results(folder).read() for folder in earlier)) if len(frame)]
    known = pd.concat(frames, ignore_index=True) if frames else None
    return estimate(sweep, known, runs=left, benchmark=benchmark), len(sweep.runs) - len(left)
