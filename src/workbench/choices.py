"""Which choices of a search matter, and what the best of many is worth once it has been picked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError
from workbench.stats import complete, holm

__all__ = ["importance", "picked"]


def importance(
    table: pd.DataFrame,
    factors: Sequence[str],
    value: str = "accuracy",
    *,
    block: Sequence[str] = ("task", "seed"),
    interactions: bool | Sequence[tuple[str, str]] = False,
) -> pd.DataFrame:
    """Which choices of a search matter: type-II analysis of variance of `value` over the factors, blocks taken out.

    Every combination of the block's columns is one level of a nuisance factor, so that hard and easy tasks do not count
    as noise. Type II: each factor adjusted for all others, and for the pairs that do not contain it; the order does not
    matter, and neither need the design be balanced. Numbers are taken as levels, not as slopes. The p values suppose
    independent, equally spread errors within blocks, which a task's rows hardly are: they rank choices, `report` tests.

    Args:
        factors: columns of the choices.
        block: columns whose combinations are blocks; () for none.
        interactions: True adds every pair of factors; or the pairs to add.

    Returns:
        Rows from the largest omega2 down, then "residual": term ("a" or "a × b"), sum_of_squares, df, F, p, holm (over
        the terms), partial_eta2 = SS / (SS + SS residual), omega2 (partial, nearly unbiased: df (F − 1) / (df (F − 1) +
        n), below 0 where F < 1), share (of the sum of squares within blocks; where unbalanced they need not add up).

    Raises:
        WorkbenchError: a column or value is missing, a factor of one level, factors or blocks that cannot be told apart,
            a pair of which some combination never occurs, or nothing left to estimate the error from.
    """
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    factors, block = ([one] if isinstance(one, str) else list(one) for one in (factors, block))
    if not factors or len(set(factors + block)) < len(factors + block):
        raise WorkbenchError(f"expected different columns as factors and block, got {factors} and {block}")
    wanted = list(combinations(factors, 2)) if interactions is True else list(interactions or ())
    pairs = [pair for pair in combinations(factors, 2) if any(set(pair) == set(one) for one in wanted)]
    if not all(any(len(one) == 2 and set(pair) == set(one) for pair in pairs) for one in wanted):
        raise WorkbenchError(f"interactions are pairs of the factors {', '.join(factors)}, got {interactions}")
    complete(table, (value, *factors, *block))
    data = pd.DataFrame({f"f{i}": pd.factorize(table[name])[0] for i, name in enumerate(factors)})
    data["y"] = table[value].to_numpy(float)
    data["block"] = table.groupby(block, sort=False, observed=True).ngroup().to_numpy() if block else 0
    _separable(data, factors, pairs, block)
    code = {name: f"C(f{i})" for i, name in enumerate(factors)}
    terms = {code[name]: name for name in factors} | {f"{code[a]}:{code[b]}": f"{a} × {b}" for a, b in pairs}
    model = smf.ols(f"y ~ {' + '.join([*terms, *['C(block)'] * (data['block'].nunique() > 1)])}", data)
    columns, rank = model.exog.shape[1], np.linalg.matrix_rank(model.exog)
    if rank < columns:
        raise WorkbenchError(
            f"the design cannot tell {', '.join(terms.values())} apart: its {columns} columns have rank {rank}; leave out a "
            "factor or an interaction, or run what is missing"
        )
    fit, spread = model.fit(), ((data["y"] - data.groupby("block")["y"].transform("mean")) ** 2).sum()
    if fit.df_resid < 1 or fit.ssr <= max(1e-12 * spread, 1e-24 * (data["y"] ** 2).sum()):
        raise WorkbenchError(
            f"{len(data)} rows, {columns} parameters: {value} has no variation left to estimate the error from; give more "
            "rows, fewer factors, or a coarser block"
        )
    found = anova_lm(fit, typ=2).rename(index=terms | {"Residual": "residual"}).drop(index="C(block)", errors="ignore")
    out = found.rename(columns={"sum_sq": "sum_of_squares", "PR(>F)": "p"}).rename_axis("term").reset_index()
    out["df"], out["holm"] = out["df"].astype(int), holm(out["p"])
    out["partial_eta2"] = out["sum_of_squares"] / (out["sum_of_squares"] + fit.ssr)
    out.loc[out["term"] == "residual", "partial_eta2"] = np.nan
    gain = out["df"] * (out["F"] - 1)
    out["omega2"], out["share"] = gain / (gain + len(data)), out["sum_of_squares"] / spread
    return out.sort_values("omega2", ascending=False, na_position="last", ignore_index=True)


def picked(
    table: pd.DataFrame,
    *,
    column: str = "recipe",
    value: str = "accuracy",
    unit: str = "task",
    cluster: str = "operation",
    splits: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """The winner's curse by halves: pick the best recipe on half of the clusters, judge it on the other half.

    Each split draws half of the clusters (rounded down) at random. All values are means over a half's units, less the mean
    of all recipes on the same half, so that easy halves do not count as gain: of the best of many, what it shows where it
    was picked is its worth and its luck, what it shows elsewhere its worth alone.

    Returns:
        One row per split: pick (the recipe; the first of equals), shown (its gain on the half that it was picked on), kept
        (on the other), best (the gain of that half's own best), rank (the pick's place there, from 1; ties share the mean).

    Raises:
        WorkbenchError: a column or value is missing, fewer than two recipes or clusters, or a recipe without a value of
            some unit.
    """
    complete(table, (column, value, unit, cluster))
    wide = table.pivot_table(index=[cluster, unit], columns=column, values=value, observed=True)
    if (lacking := wide.isna()).any(axis=None):
        at, recipe = np.argwhere(lacking.to_numpy())[0]
        raise WorkbenchError(
            f"{int(lacking.sum(axis=None))} of {lacking.size} pairs of {column} and {unit} have no {value}, such as "
            f"{wide.columns[recipe]!r} on {wide.index[at][1]}; picking needs all of them"
        )
    groups = wide.index.get_level_values(0)
    names = groups.unique().to_numpy()
    if len(names) < 2 or wide.shape[1] < 2:
        raise WorkbenchError(
            f"expected at least two of each to pick and to judge, got {wide.shape[1]} of {column} and {len(names)} of {cluster}"
        )
    gains = wide.sub(wide.mean(axis=1), axis=0)
    generator, rows = np.random.default_rng(seed), []
    for _ in range(splits):
        first = groups.isin(generator.choice(names, len(names) // 2, replace=False))
        here, there = gains[first].mean(), gains[~first].mean()
        pick = here.idxmax()
        rows.append((pick, here[pick], there[pick], there.max(), there.rank(ascending=False)[pick]))
    return pd.DataFrame(rows, columns=["pick", "shown", "kept", "best", "rank"])


def _separable(data: pd.DataFrame, factors: list[str], pairs: list[tuple], block: list[str]) -> None:
    """The usual ways for a design to be of deficient rank, each said in its own words."""
    code = {name: f"f{i}" for i, name in enumerate(factors)}
    for name in factors:
        if data[code[name]].nunique() < 2:
            raise WorkbenchError(f"factor {name!r} has one level in all {len(data)} rows: it has no effect to find")
        if block and data.groupby("block")[code[name]].nunique().max() == 1:
            raise WorkbenchError(
                f"factor {name!r} never changes within a block of {', '.join(block)}: choose a coarser one"
            )
    for name, other in permutations(factors, 2):
        if data.groupby(code[name])[code[other]].nunique().max() == 1:
            raise WorkbenchError(f"factor {name!r} settles factor {other!r}: their effects cannot be told apart")
    for a, b in pairs:
        cells = pd.crosstab(data[code[a]], data[code[b]])
        if empty := int((cells == 0).to_numpy().sum()):
            raise WorkbenchError(f"{empty} of {cells.size} combinations of {a!r} and {b!r} never occur: no interaction")
