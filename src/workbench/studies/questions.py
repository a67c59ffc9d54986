"""What the recycling study's tables say of a pool: which adapters help, the best single one, generalists and specialists."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError
from workbench.stats import holm
from workbench.studies.tables import Recycling

__all__ = ["best_single", "chance_best", "clustered", "concentration", "helpers", "published"]

ZERO_SHOT = "zero_shot"


def helpers(study: Recycling, *, level: float = 0.95) -> pd.DataFrame:
    """Which adapters help on what: test accuracy against the base's, with the uncertainty over the test examples.

    Both accuracies are taken as shares of n independent examples. They are of the same examples, but single outcomes are
    not published, so the pairing is lost: intervals are wider, and p larger, than those of a paired test.

    Args:
        level: of the intervals (Newcombe 1998, method 10: from the two Wilson intervals).

    Returns:
        One row per adapter and task with a zero-shot accuracy: name, task, operation, n, accuracy, zero_shot, gain
        (accuracy − zero_shot), low, high, p (one-sided, Fisher's exact test, of not being better), holm (p adjusted over
        the adapters of the task). Where n is not known, low, high, p and holm are NaN.
    """
    rows = _against_base(study, "test")
    rows["gain"] = rows["accuracy"] - rows[ZERO_SHOT]
    rows["low"], rows["high"] = _newcombe(rows["accuracy"], rows[ZERO_SHOT], rows["n"], level)
    rows["p"] = _fisher(rows["accuracy"], rows[ZERO_SHOT], rows["n"])
    rows["holm"] = rows.groupby("task", sort=False)["p"].transform(holm)
    return rows


def best_single(study: Recycling, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """The adapter that is best on train + validation of each task, on the test split: does it beat the base?

    The pick never saw the test split, so its p needs no correction for the many it was picked from. The best on the test
    split itself does: `best_p` is the chance that the best of as many adapters, all exactly as good as the base and
    independent of each other, comes out as far above it (parametric bootstrap, the base's own rate drawn from its
    posterior under Jeffreys' prior). Adapters share the examples and much else, which makes this p too large, not too small.

    Returns:
        One row per task: task, operation, n, adapters (scored on both splits), name (the pick, the pool's first among
        equals), tied (equals), validation_accuracy (on train + validation), accuracy (test), zero_shot, gain, low, high, p
        (Fisher, one-sided), holm (over tasks); rank_p (share of the adapters whose test accuracy is at least the pick's:
        the exact p of a pick that knows nothing), spearman (of train + validation and test over adapters); best,
        best_accuracy (the best on test), best_gain, luck (what best_gain is on average if none is better than the base),
        best_p, best_holm (over tasks); validation_luck (luck on train + validation). NaN where n is not known.
    """
    test, earlier = study.matrix("test"), study.matrix("train+validation")
    base = study.zero_shot.set_index("task")
    sizes, earlier_sizes = study.examples("test"), study.examples("train+validation")
    generator, rows = np.random.default_rng(seed), []
    for task in [task for task in test if task in earlier and task in base.index]:
        both = pd.DataFrame({"earlier": earlier[task], "test": test[task]}).dropna()
        if both.empty:
            continue
        zero, n, count = base.at[task, "accuracy"], sizes[task], len(both)
        pick, best = both["earlier"].idxmax(), both["test"].idxmax()  # the first among equals
        got = both.at[pick, "test"]
        luck = chance_best(zero, n, count, draws=draws, generator=generator)
        validation_luck = chance_best(zero, earlier_sizes[task], count, draws=draws, generator=generator)
        gain = both.at[best, "test"] - zero
        rows.append(
            {
                "task": task,
                "operation": base.at[task, "operation"],
                "n": n,
                "adapters": count,
                "name": pick,
                "tied": int((both["earlier"] == both["earlier"].max()).sum()),
                "validation_accuracy": both.at[pick, "earlier"],
                "accuracy": got,
                "zero_shot": zero,
                "gain": got - zero,
                "rank_p": float((both["test"] >= got).mean()),
                "spearman": _spearman(both),
                "best": best,
                "best_accuracy": both.at[best, "test"],
                "best_gain": gain,
                "luck": luck.mean(),
                "best_p": (1 + (luck >= gain - 1e-9).sum()) / (1 + draws) if n == n else np.nan,
                "validation_luck": validation_luck.mean(),
            }
        )
    if not rows:
        raise WorkbenchError("no task has scores of both splits and a zero-shot accuracy")
    out = pd.DataFrame(rows)
    low, high = _newcombe(out["accuracy"], out["zero_shot"], out["n"], level)
    p = _fisher(out["accuracy"], out["zero_shot"], out["n"])
    at = out.columns.get_loc("gain") + 1
    for i, (name, values) in enumerate({"low": low, "high": high, "p": p, "holm": holm(pd.Series(p))}.items()):
        out.insert(at + i, name, values)
    out.insert(out.columns.get_loc("best_p") + 1, "best_holm", holm(out["best_p"]))
    return out


def chance_best(rate: float, n: float, count: int, *, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Draws of best − base, in accuracy, where a base and `count` adapters all have one rate of success on n examples each.

    The base's accuracy was observed as `rate`: the true one is drawn from its posterior under Jeffreys' prior. The best of
    `count` binomials needs one draw: its distribution function is the binomial's to the power of `count`. NaN without n.
    """
    from scipy.stats import binom

    if np.isnan(n):
        return np.full(draws, np.nan)
    true = generator.beta(rate * n + 0.5, (1 - rate) * n + 0.5, draws)
    best = binom.ppf(generator.random(draws) ** (1 / count), n, true)
    return (best - generator.binomial(int(n), true)) / n


def concentration(found: pd.DataFrame, *, alpha: float = 0.05, draws: int = 500, seed: int = 0) -> pd.DataFrame:
    """Whether help comes from a few generalists: how unevenly it is spread, against help that falls on adapters at random.

    An adapter helps on a task where Holm's p is below `alpha`. By chance: within each task the gains are dealt out anew to
    the adapters that were scored there, so that tasks keep how many are helped, and adapters only have luck.

    Args:
        found: of `helpers`.

    Returns:
        A row per measure: helpers (adapters that help on any task), most (tasks that one adapter helps on), gini (of the
        number of tasks that adapters help on; 0 alike, 1 one does all), top_tenth (share of all help that comes from the
        most helpful tenth), between (share of the gains' variance within tasks that lies between adapters' means); with
        value, chance (mean over the draws), low, high (95 % of them), p (one-sided, of a value at least as large).

    Raises:
        WorkbenchError: nothing was found to be of known size.
    """
    known = found[found["holm"].notna()]
    if known.empty:
        raise WorkbenchError("no task has a known number of test examples: who helps cannot be told")
    gains = known.pivot(index="name", columns="task", values="gain")
    gains = (gains - gains.mean()).to_numpy()
    helps = known.assign(helps=known["holm"] < alpha).pivot(index="name", columns="task", values="helps")
    helps = helps.fillna(False).to_numpy(float)
    scored = [np.flatnonzero(~np.isnan(column)) for column in gains.T]
    generator, chance = np.random.default_rng(seed), []
    for _ in range(draws):
        dealt_gains, dealt_helps = gains.copy(), helps.copy()
        for task, rows in enumerate(scored):
            order = generator.permutation(rows)
            dealt_gains[rows, task], dealt_helps[rows, task] = gains[order, task], helps[order, task]
        chance.append(_spread(dealt_gains, dealt_helps))
    chance = pd.DataFrame(chance)
    out = pd.DataFrame(
        {
            "value": _spread(gains, helps),
            "chance": chance.mean(),
            "low": chance.quantile(0.025),
            "high": chance.quantile(0.975),
        }
    )
    p = (1 + (chance >= out["value"] - 1e-12).sum()) / (1 + draws)
    out["p"] = p.where(out["value"].notna())
    return out.rename_axis("measure").reset_index()


def published(study: Recycling, *, aliases: bool = False) -> pd.DataFrame:
    """Published accuracies on the tasks that the zero-shot, merged and baseline tables share, as rows for `stats.bootstrap`.

    Columns: method, own, k, examples (0: none are used), task, operation, accuracy. LoraHub's runs are averaged per task.

    Args:
        aliases: also tasks that the zero-shot table calls by another name (55 tasks without, 59 with).
    """
    zero = study.zero_shot
    zero = zero if aliases else zero[zero["task"] == zero["published_as"]]
    tables = [
        zero,
        *(part for _, part in study.baselines.groupby("examples")),
        *(p for _, p in study.merged.groupby(["method", "own"])),
    ]
    shared = set.intersection(*(set(table["task"]) for table in tables))
    by = ["method", "own", "k", "examples", "task", "operation"]
    runs = study.lorahub.groupby(by, sort=False)["accuracy"].mean().reset_index()
    every = [zero.assign(method="zero-shot", own=False, k=0, examples=0), study.merged.assign(examples=0)]
    every += [runs, study.baselines.assign(own=False, k=0)]
    out = pd.concat([table[[*by, "accuracy"]] for table in every], ignore_index=True)
    return out[out["task"].isin(shared)].reset_index(drop=True)


def clustered(matrix: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns in the order of their dendrograms (average linkage, Euclidean); a missing value counts as its column's mean."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    filled = matrix.fillna(matrix.mean()).to_numpy(float)
    orders = [
        leaves_list(linkage(side, "average", optimal_ordering=True)) if len(side) > 2 else np.arange(len(side))
        for side in (filled, filled.T)
    ]
    return matrix.iloc[orders[0], orders[1]]


def _against_base(study: Recycling, split: str) -> pd.DataFrame:
    base = study.zero_shot[["task", "accuracy"]].rename(columns={"accuracy": ZERO_SHOT})
    rows = study.scores[study.scores["split"] == split].merge(base, on="task")
    return rows[["name", "task", "operation", "n", "accuracy", ZERO_SHOT]].astype({"n": float})


def _spearman(both: pd.DataFrame) -> float:
    ranks = both.rank()
    return float(ranks.corr().iat[0, 1]) if (ranks.nunique() > 1).all() else np.nan


def _spread(gains: np.ndarray, helps: np.ndarray) -> dict[str, float]:
    """The measures of `concentration` of gains (adapters, tasks; NaN where not scored) and of who helps where (0 or 1)."""
    count = np.sort(helps.sum(1))
    total, m = count.sum(), len(count)
    means = np.nanmean(gains, 1)
    return {
        "helpers": float((count > 0).sum()),
        "most": float(count[-1]),
        "gini": float(((2 * np.arange(1, m + 1) - m - 1) * count).sum() / (m * total)) if total else np.nan,
        "top_tenth": float(count[-max(1, m // 10) :].sum() / total) if total else np.nan,
        "between": float((means**2).mean() / np.nanmean(gains**2)),
    }


def _newcombe(first: pd.Series, second: pd.Series, n: pd.Series, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a difference of two shares of n (Newcombe 1998, method 10)."""
    a, b, n = (np.asarray(one, float) for one in (first, second, n))
    (a_low, a_high), (b_low, b_high) = _wilson(a, n, level), _wilson(b, n, level)
    return a - b - np.hypot(a - a_low, b_high - b), a - b + np.hypot(a_high - a, b - b_low)


def _wilson(share: np.ndarray, n: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    from statsmodels.stats.proportion import proportion_confint

    return proportion_confint(share * n, n, 1 - level, "wilson")


def _fisher(first: pd.Series, second: pd.Series, n: pd.Series) -> np.ndarray:
    """One-sided p of Fisher's exact test that the first share of n is not above the second; NaN where n is not known."""
    from scipy.stats import hypergeom

    counts = pd.DataFrame({"a": first * n, "b": second * n, "n": n}).round()
    once = counts.dropna().drop_duplicates()
    p = hypergeom.sf(once["a"] - 1, 2 * once["n"], once["n"], once["a"] + once["b"])
    return counts.merge(once.assign(p=p), how="left", on=["a", "b", "n"])["p"].to_numpy()
