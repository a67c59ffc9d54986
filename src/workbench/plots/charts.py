"""The charts. Each takes an Axes first and returns its artists; markers and dashes tell series apart without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.errors import WorkbenchError
from workbench.plots.sheet import style

__all__ = ["bars", "curves", "forest", "heatmap", "importance", "intervals", "units"]

_MARKERS = "osD^vP*X"
_LABEL = 9  # points along an axis that a label standing upright takes


def bars(ax: Axes, counts: pd.Series, *, label: str = ""):
    """Counts by category, in the series' order, each with its number above."""
    with style():
        drawn = ax.bar([str(name) for name in counts.index], counts.to_numpy(), color="C0", width=0.7)
        ax.bar_label(drawn, fontsize=6, padding=1)
        ax.set(xlabel=label)
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.12)
    return drawn


def intervals(ax: Axes, table: pd.DataFrame, *, x: str, series: str | None = None, label: str = ""):
    """Means with their intervals (columns mean, low, high) as points side by side, one marker per series.

    Raises:
        WorkbenchError: a column is missing.
    """
    _need(table, [x, "mean", "low", "high", *([series] if series else [])])
    places = {name: i for i, name in enumerate(dict.fromkeys(table[x]))}
    groups = [(None, table)] if series is None else list(table.groupby(series, sort=False, observed=True))
    width, out = 0.8 / len(groups), []
    with style():
        for i, (name, part) in enumerate(groups):
            at = part[x].map(places).to_numpy() + (i - (len(groups) - 1) / 2) * width
            error = np.nan_to_num(np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy()))
            marker = _MARKERS[i % len(_MARKERS)]
            out.append(
                ax.errorbar(
                    at,
                    part["mean"],
                    error,
                    fmt=marker,
                    capsize=1.5,
                    elinewidth=0.8,
                    markersize=3.5,
                    color=f"C{i % 8}",
                    label=name,
                )
            )
        ax.set_xticks(range(len(places)), [str(name) for name in places])
        ax.set(ylabel=label, xlim=(-0.5, len(places) - 0.5))
        ax.grid(axis="x", visible=False)
    return out


def curves(ax: Axes, table: pd.DataFrame, *, x: str, series: str, label: str = "", log: bool = False):
    """Means (column mean, and low and high where there are any) against a number, one line per series.

    Raises:
        WorkbenchError: a column is missing.
    """
    _need(table, [x, "mean", series])
    out = []
    with style():
        for i, (name, part) in enumerate(table.groupby(series, sort=False, observed=True)):
            part, dashes = part.sort_values(x), ("-", "--", ":", "-.")[i % 4]
            (line,) = ax.plot(
                part[x], part["mean"], dashes, marker=_MARKERS[i % len(_MARKERS)], color=f"C{i % 8}", label=name
            )
            if "low" in part and part["low"].notna().any():
                ax.fill_between(part[x], part["low"], part["high"], alpha=0.15, color=line.get_color(), linewidth=0)
            out.append(line)
        if log:
            ax.set_xscale("log", base=2)
            ticks = sorted(table[x].unique())
            ax.set_xticks(ticks, _spaced(ticks, ax.bbox.width / ax.figure.dpi * 72 / _LABEL))
            ax.minorticks_off()
        ax.set(xlabel=x, ylabel=label)
    return out


def _spaced(ticks: Sequence[float], room: float) -> list[str]:
    """Labels of a logarithmic axis on which `room` of them fit; "" where a larger one is too close to have both read."""
    labels, above = [], math.inf
    for tick in reversed(ticks):
        close = ticks[0] > 0 and math.log(above / tick) * room < math.log(ticks[-1] / ticks[0])
        labels.append("" if close else f"{tick:g}")
        above = above if close else tick
    return labels[::-1]


def forest(
    ax: Axes,
    table: pd.DataFrame,
    *,
    against: str = "control",
    series: str | None = None,
    alpha: float = 0.05,
    label: str = "",
):
    """Differences with their intervals, a row per recipe of `workbench.stats.report`, its first on top; zero is marked.

    A marker is filled where Holm's p is below `alpha`. `against` is control or new; recipes without a partner are left
    out. `series` is a column, such as n_train, whose values lie side by side in a recipe's row, one marker each.

    Raises:
        WorkbenchError: a column is missing, no recipe has a difference, or one has several in a series.
    """
    wanted = [f"{against}_{name}" for name in ("difference", "low", "high", "holm")]
    keys = ["recipe", *([series] if series else [])]
    _need(table, [*keys, *wanted])
    table = table[table[wanted[0]].notna()]
    twice = table.duplicated(keys)
    if table.empty or twice.any():
        one = "no recipe" if table.empty else f"more than one row of {table.loc[twice, 'recipe'].iloc[0]!r}"
        raise WorkbenchError(f"{one} has {wanted[0]}; expected one per {' and '.join(keys)}")
    places = {name: i for i, name in enumerate(dict.fromkeys(table["recipe"]))}
    groups = [(None, table)] if series is None else list(table.groupby(series, sort=False, observed=True))
    out = []
    with style():
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=1)
        for i, (name, part) in enumerate(groups):
            at = part["recipe"].map(places).to_numpy() + (i - (len(groups) - 1) / 2) * 0.7 / len(groups)
            difference, low, high, p = (part[column].to_numpy(float) for column in wanted)
            ax.hlines(at, low, high, color=f"C{i % 8}", linewidth=0.8)
            fill = [f"C{i % 8}" if one < alpha else "white" for one in p]
            edge = {"edgecolors": f"C{i % 8}", "linewidths": 0.8, "marker": _MARKERS[i % len(_MARKERS)]}
            out.append(ax.scatter(difference, at, s=12, facecolors=fill, zorder=3, label=name, **edge))
        ax.set_yticks(range(len(places)), list(places))
        ax.set(xlabel=label, ylim=(len(places) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    return out


def importance(ax: Axes, table: pd.DataFrame, *, value: str = "omega2", alpha: float = 0.05, label: str = "partial ω²"):
    """Bars of an effect size, a row per term of `workbench.choices.importance`; filled where Holm's p is below `alpha`.

    Raises:
        WorkbenchError: a column is missing.
    """
    _need(table, ["term", value, "holm"])
    table = table[table["term"] != "residual"]
    with style():
        fill = ["C0" if p < alpha else "white" for p in table["holm"]]
        drawn = ax.barh(range(len(table)), table[value], color=fill, edgecolor="C0", linewidth=0.8, height=0.7)
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_yticks(range(len(table)), table["term"])
        ax.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    return drawn


def heatmap(
    ax: Axes, values: pd.DataFrame, *, label: str = "", limits: tuple[float, float] | None = None, names: bool = True
):
    """A matrix as colours, rows and columns in the frame's order, with its colour bar; diverging where limits are symmetric."""
    low, high = limits or (float(values.min(axis=None)), float(values.max(axis=None)))
    with style():
        image = ax.imshow(
            values.to_numpy(dtype=float),
            vmin=low,
            vmax=high,
            cmap="RdBu_r" if low == -high else "cividis",
            aspect="auto",
            interpolation="nearest",
        )
        if names:
            ax.set_xticks(range(values.shape[1]), values.columns, rotation=90, fontsize=5)
            ax.set_yticks(range(values.shape[0]), values.index, fontsize=5)
        else:
            ax.set_xticks([])
            ax.set_yticks([])
        ax.grid(visible=False)
        ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.02)
    return image


def units(ax: Axes, table: pd.DataFrame, *, by: str, most: int = 8, order: Sequence[str] | None = None):
    """A flat map of units (columns x, y, norm), coloured by a column; the `most` commonest values, the others grey."""
    _need(table, ["x", "y", "norm", by])
    top = list(order or table[by].value_counts().index[:most])
    size = 4 + 30 * (table["norm"] / table["norm"].max())
    with style():
        rest = ~table[by].isin(top)
        out = (
            [ax.scatter(table["x"][rest], table["y"][rest], s=size[rest], color="0.85", linewidths=0)]
            if rest.any()
            else []
        )
        for i, name in enumerate(top):
            own = table[by] == name
            out.append(
                ax.scatter(
                    table["x"][own],
                    table["y"][own],
                    s=size[own],
                    color=f"C{i % 8}",
                    marker=_MARKERS[i % 8],
                    alpha=0.8,
                    linewidths=0,
                    label=name,
                )
            )
        ax.legend(title=by, fontsize=6, title_fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set(xlabel="first direction", ylabel="second direction")
    return out


def _need(table: pd.DataFrame, columns: Sequence[str]) -> None:
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise WorkbenchError(
            f"the table has no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, table.columns))}"
        )
