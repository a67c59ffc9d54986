"""Means with bootstrap intervals clustered by operation: tasks of one operation are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError

__all__ = ["bootstrap", "paired"]


def bootstrap(
    frame: pd.DataFrame,
    by: Sequence[str],
    value: str = "accuracy",
    *,
    cluster: str = "operation",
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of `value` per group with a percentile interval, resampling whole clusters (cluster bootstrap).

    Returns one row per group: the group's columns, mean, low, high, rows, clusters. A group of one cluster has no
    interval (NaN).

    Raises:
        WorkbenchError: a column that the frame lacks, or values that are missing.
    """
    _complete(frame, (*by, value, cluster))
    out = []
    for key, part in frame.groupby(list(by), sort=False, observed=True) if len(by) else [((), frame)]:
        sums = part.groupby(cluster, observed=True)[value].agg(["sum", "count"]).sort_index()
        n = len(sums)
        low = high = np.nan
        if n > 1:
            drawn = np.random.default_rng(seed).integers(0, n, (draws, n))
            means = sums["sum"].to_numpy()[drawn].sum(1) / sums["count"].to_numpy()[drawn].sum(1)
            low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        out.append([*key, float(part[value].mean()), low, high, len(part), n])
    return pd.DataFrame(out, columns=[*by, "mean", "low", "high", "rows", "clusters"])


def paired(
    frame: pd.DataFrame,
    first: str,
    second: str,
    *,
    by: Sequence[str] = (),
    column: str = "recipe",
    value: str = "accuracy",
    **settings,
) -> pd.DataFrame:
    """Difference first − second of two recipes on the same task and seed, with its clustered interval, per group.

    Raises:
        WorkbenchError: no task and seed have both, a column that the frame lacks, or values that are missing.
    """
    cluster = settings.get("cluster", "operation")
    keep = list(dict.fromkeys(["task", *(name for name in ("seed", "n_train") if name in frame), cluster, *by]))
    _complete(frame, (column,))
    some = frame[frame[column].isin([first, second])]
    _complete(some, (value, *keep))
    wide = some.pivot_table(index=keep, columns=column, values=value, aggfunc="mean", observed=True)
    if first not in wide or second not in wide or wide[[first, second]].dropna().empty:
        raise WorkbenchError(
            f"no task and seed have both {first!r} and {second!r}; there are {', '.join(sorted(frame[column].astype(str).unique()))}"
        )
    wide = wide[[first, second]].dropna()
    both = (wide[first] - wide[second]).rename("difference").reset_index()
    both["pair"] = f"{first} − {second}"
    return bootstrap(both, ["pair", *by], "difference", **settings)


def _complete(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Grouping and pivoting would leave out rows with a missing value without a word."""
    lacking = [column for column in columns if column not in frame]
    if lacking:
        raise WorkbenchError(
            f"the table has no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, frame.columns))}"
        )
    for column in columns:
        if frame[column].isna().any():
            raise WorkbenchError(f"{int(frame[column].isna().sum())} of {len(frame)} rows have no {column}")
