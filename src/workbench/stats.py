"""Means with bootstrap intervals clustered by operation: tasks of one operation are not independent.

`report` sets every recipe against its random control and a newly trained adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError

__all__ = ["bootstrap", "complete", "holm", "paired", "report"]

_WHAT = ("method", "select", "k", "options")  # what a recipe and its control have in common, and where there are any:
_WHAT_MORE = ("skip", "own", "tune")


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
    complete(frame, (*by, value, cluster))
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
    complete(frame, (column,))
    some = frame[frame[column].isin([first, second])]
    complete(some, (value, *keep))
    wide = some.pivot_table(index=keep, columns=column, values=value, aggfunc="mean", observed=True)
    if first not in wide or second not in wide or wide[[first, second]].dropna().empty:
        raise WorkbenchError(
            f"no task and seed have both {first!r} and {second!r}; there are {', '.join(sorted(frame[column].astype(str).unique()))}"
        )
    wide = wide[[first, second]].dropna()
    both = (wide[first] - wide[second]).rename("difference").reset_index()
    both["pair"] = f"{first} − {second}"
    return bootstrap(both, ["pair", *by], "difference", **settings)


def report(
    table: pd.DataFrame,
    *,
    by: Sequence[str] = ("n_train",),
    control: str = "sigma",
    reference: str = "new adapter",
    value: str = "accuracy",
    cluster: str = "operation",
    draws: int = 2000,
    permutations: int = 20_000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Every recipe of `workbench.compare`'s table with its interval, and tested against its control and a new adapter.

    Differences are over pairs of one task, seed and n_train. A recipe's control is the row of the same method, select, k
    and options (and skip, own and tune, where the table has them); labels are not read. Intervals resample clusters and
    keep each cluster's rows together, all of its tasks and all of their seeds: several seeds of a task narrow the noise
    within its cluster and never count as more clusters.

    p is two-sided, of the cluster sign-flip test: were there no difference, each cluster's mean difference, weighted by
    its rows, could as well have the other sign. It is exact where 2^(clusters − 1) is at most `permutations`, else a seeded
    Monte Carlo estimate, at least 1 / (permutations + 1) (Phipson and Smyth 2010). With few clusters no p can be small:
    the least is 2^(1 − clusters), 0.06 for five. Holm's adjustment is over the whole column: all recipes and groups tested
    against their controls are one family, all tested against the reference another, each answering its own question.

    Args:
        by: further columns whose every combination is reported apart.
        control: the `control` of the rows to compare with, such as sigma, norm, spectrum; "" leaves this out.
        reference: the recipe, by its label, to compare with; "" leaves this out.
        permutations: most sign flips of a test.

    Returns:
        One row per recipe without control and group: `by`, recipe, mean, low, high, rows, clusters; then, beginning with
        control_ and new_: difference (recipe − control, recipe − reference), low, high, rows (the pairs), p, holm. A
        recipe without a partner (a baseline has no control) has NaN and 0 rows; one cluster has no interval and no p.

    Raises:
        WorkbenchError: a column or value is missing, two rows are of the same recipe, task, seed and n_train, or nothing
            can be paired.
    """
    by = [by] if isinstance(by, str) else list(by)
    group = list(dict.fromkeys([*by, "recipe"]))
    where = list(dict.fromkeys(["task", "seed", *(["n_train"] if "n_train" in table else []), *by]))
    what = [*_WHAT, *(name for name in _WHAT_MORE if name in table)]
    complete(table, (value, cluster, "recipe", *where))
    complete(table[:0], ("control", *what))
    named = {name: _texts(table[name]) for name in ("control", *what)}
    same = ["\x1f".join(parts) for parts in zip(*(named[name] for name in what), strict=True)]
    frame = table.assign(control=named["control"], what=same)
    real, shams = frame[frame["control"] == ""], frame[frame["control"] == control]
    if real.empty:
        raise WorkbenchError("the table has no recipe without a control, so there is nothing to report")
    for rows in (real, shams):
        _single(rows, ["recipe", *where])
        _single(rows, ["what", *where])
    settings = {"cluster": cluster, "draws": draws, "level": level, "seed": seed}
    out = bootstrap(real, group, value, **settings)
    partners = [("control", control, shams, ["what", *where], real)]
    partners += [("new", reference, real[real["recipe"] == reference], where, real[real["recipe"] != reference])]
    for name, wanted, others, keys, rows in partners:
        if not wanted:
            continue
        column, there = ("control", frame) if name == "control" else ("recipe", real)
        if others.empty:
            raise WorkbenchError(
                f"no row has {column} {wanted!r}; there are {', '.join(map(repr, sorted(set(there[column]) - {''})))}; "
                f"{'control' if name == 'control' else 'reference'}='' leaves this comparison out"
            )
        pairs = rows.merge(others[[*keys, value]], on=keys, suffixes=("", " of the other"))
        if pairs.empty:
            raise WorkbenchError(f"no recipe shares {', '.join(where)} with a row of {column} {wanted!r}: no pairs")
        pairs["difference"] = pairs[value] - pairs[f"{value} of the other"]
        found = bootstrap(pairs, group, "difference", **settings).drop(columns="clusters")
        parts = [part for _, part in pairs.groupby(group, sort=False, observed=True)]
        found["p"] = [_sign_flip(part, cluster, permutations, seed) for part in parts]
        found["holm"] = holm(found["p"])
        found = found.rename(columns={"mean": "difference"})
        out = out.merge(found.rename(columns=lambda c, n=name: c if c in group else f"{n}_{c}"), on=group, how="left")
        out[f"{name}_rows"] = out[f"{name}_rows"].fillna(0).astype(int)
    return out


def _single(rows: pd.DataFrame, keys: list[str]) -> None:
    twice = rows[rows.duplicated(keys, keep=False)]
    if len(twice):
        one = twice.iloc[0]
        count = int((twice[keys] == one[keys]).all(axis=1).sum())
        raise WorkbenchError(
            f"{count} rows are of {one['recipe']!r} with {', '.join(f'{name} {one[name]}' for name in keys[1:])}, expected "
            "one; name the column that tells them apart (another pool, another grid) in `by`, or drop the repeated ones"
        )


def _sign_flip(pairs: pd.DataFrame, cluster: str, permutations: int, seed: int) -> float:
    """Two-sided p of the mean difference when the signs of whole clusters are flipped.

    scipy.stats.permutation_test does the same in twenty times the time, which a report of a hundred tests would feel.
    """
    sums = pairs.groupby(cluster, observed=True)["difference"].sum().sort_index().to_numpy(float)  # also of stored fp32
    n = len(sums)
    if n < 2:
        return np.nan
    signs, exact = _signs(n, permutations, seed)
    as_far = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    return float(as_far.mean()) if exact else float((as_far.sum() + 1) / (permutations + 1))


@lru_cache(maxsize=8)
def _signs(n: int, permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Arrangements of n signs, one a row, and whether they are all there are: |Σ| is the same when all turn, so one stays."""
    if exact := 2 ** (n - 1) <= permutations:
        drawn = np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (permutations, n), dtype=np.int8)
    return 2.0 * drawn - 1, exact


def holm(p: pd.Series) -> pd.Series:
    """p adjusted over the whole series (Holm 1979); a missing one stays missing and counts for nothing."""
    known = p.dropna().astype(float).sort_values(kind="stable")
    return (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)


def _texts(column: pd.Series) -> list[str]:
    """`_text` of every value, each distinct one looked at once."""
    codes, distinct = pd.factorize(column, use_na_sentinel=False)
    return np.array([_text(one) for one in distinct], dtype=object)[codes].tolist()


def _text(value) -> str:
    """A column's value for comparison: missing, empty ("{}" too), False and 0 are alike, and so are 10 and 10.0."""
    if (pd.api.types.is_scalar(value) and pd.isna(value)) or not value or value == "{}":
        return ""
    return repr(float(value)) if isinstance(value, int | float | np.number | np.bool_) else str(value)


def complete(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has these columns and a value in each: grouping and pivoting would leave rows out without a word.

    Raises:
        WorkbenchError: a column that the table lacks, or values that are missing.
    """
    lacking = [column for column in columns if column not in frame]
    if lacking:
        raise WorkbenchError(
            f"the table has no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, frame.columns))}"
        )
    for column in columns:
        if frame[column].isna().any():
            raise WorkbenchError(f"{int(frame[column].isna().sum())} of {len(frame)} rows have no {column}")
