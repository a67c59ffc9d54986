"""The explorer's pictures: a pool's similarity as a heat map and a plane, and profiles of a few adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from workbench.screen import printable
from workbench.similarity import plane, tree
from workbench.widgets.parts import DPI

__all__ = ["LINES", "MARKED", "ROWS", "Likeness", "branches", "most_alike", "pool_map", "profiles"]

MARKED = 20  # adapters with a number in the map
LINES = 8  # adapters drawn as lines; more as rows
ROWS = 40  # adapters drawn as rows
ORDERED = 300  # adapters; the best order of more leaves takes seconds


@dataclass(frozen=True)
class Likeness:
    """A pool's similarity, ready to be drawn again and again: what of it takes time at a thousand adapters is done once.

    Fields: cosines (N, N) in the dendrogram's order, its linkage, the plane (`similarity.plane`), the largest cosine
    that colours tell apart, and the most alike in words.
    """

    cosines: pd.DataFrame
    tree: np.ndarray
    plane: pd.DataFrame
    limit: float
    said: str

    @classmethod
    def of(cls, cosines: pd.DataFrame) -> Likeness:
        """Of a similarity matrix (N, N), N at least 2."""
        from scipy.cluster.hierarchy import leaves_list

        linkage = tree(cosines, optimal=len(cosines) <= ORDERED)
        apart = np.abs(cosines.to_numpy(dtype=float)[~np.eye(len(cosines), dtype=bool)])
        leaves = leaves_list(linkage)
        limit = max(0.05, float(np.quantile(apart, 0.995)))
        return cls(cosines.iloc[leaves, leaves], linkage, plane(cosines), limit, most_alike(cosines))


def most_alike(cosines: pd.DataFrame) -> str:
    """The two of largest cosine, in words."""
    values = np.tril(cosines.to_numpy(dtype=float), -1) - 2 * np.triu(np.ones(cosines.shape))
    i, j = np.unravel_index(values.argmax(), values.shape)
    return f"Most alike: {cosines.index[j]} and {cosines.index[i]} (cosine {cosines.iat[i, j]:.2f})."


def pool_map(likeness: Likeness, marked: Sequence[str], colours: pd.Series | None = None) -> Figure:
    """A pool's similarity: heat map in its dendrogram's order, and plane; marked adapters are numbered in both.

    Args:
        marked: names of the pool; the first `MARKED` have numbers, the others only marks.
        colours: a number for each adapter, which colours its point.
    """
    figure = Figure(figsize=(9.9, 4.3), dpi=DPI, layout="none")
    spec = {"left": 0.005, "right": 0.985, "bottom": 0.07, "top": 0.93, "wspace": 0.03}
    columns = figure.add_gridspec(1, 6, width_ratios=[0.6, 3.2, 0.14, 0.85, 3.3, 1.9], **spec)
    axes = [figure.add_subplot(columns[i]) for i in (0, 1, 2, 4, 5)]
    _heat(figure, axes[1], axes[2], likeness)
    _dendrogram(axes[0], likeness.tree)
    at = {name: place for place, name in enumerate(likeness.cosines.index)}
    _rows_marked(axes[1], [at[name] for name in marked], len(at))
    _points(figure, axes[3], likeness.plane, marked, colours)
    _legend(axes[4], marked)
    return figure


def branches(linkage: np.ndarray) -> np.ndarray:
    """(N − 1, 4, 2) corners (height, place) of a linkage's brackets, places as in its order of leaves.

    scipy's own drawing descends recursively, too deep for Python where a thousand adapters join one by one.
    """
    from scipy.cluster.hierarchy import leaves_list

    n = len(linkage) + 1
    place, height = np.zeros(2 * n - 1), np.zeros(2 * n - 1)
    place[leaves_list(linkage)] = np.arange(n)
    out = np.empty((n - 1, 4, 2))
    for i, (left, right, distance, _) in enumerate(linkage):
        left, right = int(left), int(right)
        place[n + i], height[n + i] = (place[left] + place[right]) / 2, distance
        out[i] = (
            (height[left], place[left]),
            (distance, place[left]),
            (distance, place[right]),
            (height[right], place[right]),
        )
    return out


def profiles(table: pd.DataFrame, *, across: str, value: str, log: bool = False) -> Figure:
    """Numbers of a few adapters over layers or places: lines of up to `LINES` adapters, else rows of colours.

    Args:
        table: adapter × place, NaN where there is none; the first `ROWS` rows are drawn.
        across: what the columns are.
        value: what the numbers are.
        log: a logarithmic scale, for lines; what is not above 0 is left out.
    """
    table = table.iloc[:ROWS]
    rows, few = len(table), len(table) <= LINES
    figure = Figure(figsize=(9.9, 3.2 if few else 1.1 + 0.17 * rows), dpi=DPI, layout="constrained")
    ax = figure.add_subplot()
    names = [f"{i}  {printable(name, 40)}" for i, name in enumerate(table.index, 1)]
    if few:
        places = np.arange(table.shape[1])
        for i, values in enumerate(table.to_numpy(dtype=float)):
            if log:
                values = np.where(values > 0, values, np.nan)
            ax.plot(places, values, ("-", "--", ":", "-.")[i % 4], marker="osD^vP*X"[i], markersize=3.5, color=f"C{i}")
        if log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(value, fontsize=8)
        found = ax.legend(ax.lines, names, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
        for text in found.get_texts():
            text.set_parse_math(False)
        ax.grid(color="0.9", linewidth=0.6)
    else:
        image = ax.imshow(table.to_numpy(dtype=float), aspect="auto", interpolation="nearest", cmap="cividis")
        ax.set_yticks(range(rows), names, fontsize=7, parse_math=False)
        ax.grid(visible=False)
        figure.colorbar(image, ax=ax, label=value, fraction=0.04, pad=0.01)
    step = max(1, -(-table.shape[1] // 20))
    labels = [printable(str(c), 24) for c in table.columns[::step]]
    ax.set_xticks(
        range(0, table.shape[1], step), labels, parse_math=False, rotation=90 * any(len(c) > 3 for c in labels)
    )
    ax.set_xlabel(across, fontsize=8)
    ax.tick_params(labelsize=8 if few else 7)
    return figure


def _heat(figure: Figure, ax: Axes, bar: Axes, likeness: Likeness) -> None:
    values, limit = likeness.cosines.to_numpy(), likeness.limit
    image = ax.imshow(values, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    ax.set(xticks=[])
    ax.set_xlabel(f"{len(values)} adapters, the most alike side by side", fontsize=8)
    ax.grid(visible=False)
    at = ax.get_position()
    bar.set_position([at.x1 + 0.045, at.y0, 0.012, at.height])
    figure.colorbar(image, cax=bar, extend="both").ax.set_title("cosine", fontsize=8)
    bar.tick_params(labelsize=7)
    bar.grid(visible=False)


def _dendrogram(ax: Axes, linkage: np.ndarray) -> None:
    ax.add_collection(LineCollection(branches(linkage), colors="0.35", linewidths=0.6 if len(linkage) < 200 else 0.25))
    low, high = float(linkage[:, 2].min()), float(linkage[:, 2].max())
    room = 0.05 * (high - low) or 0.1
    ax.set(xlim=(high + room, max(0.0, low - 4 * room)), ylim=(len(linkage) + 0.5, -0.5))  # leaves' lines are cut short
    ax.set_axis_off()


def _rows_marked(ax: Axes, places: Sequence[int], n: int) -> None:
    """Lines through the rows where they are few, and at the right a stroke to each, and numbers set apart."""
    ax.set_yticks([])
    across = ax.get_yaxis_transform()
    start = 0 if len(places) <= MARKED else 1
    lines = [((start, place), (1.012, place)) for place in places]
    least = n / 24  # rows that a number takes
    order = sorted(range(min(len(places), MARKED)), key=lambda i: places[i])
    spread = _apart([places[i] for i in order], least, n - 0.5)
    lines += [((1.012, places[i]), (1.045, y)) for i, y in zip(order, spread, strict=True)]
    strokes = LineCollection(lines, colors="0.2", linewidths=0.5, transform=across, clip_on=False)
    ax.add_collection(strokes, autolim=False)
    for i, y in zip(order, spread, strict=True):
        ax.text(1.055, y, str(i + 1), transform=across, va="center", size=7.5)


def _apart(places: Sequence[float], least: float, last: float) -> list[float]:
    """Ascending places moved so that they are at least so far apart, none beyond the last."""
    out: list[float] = []
    for place in places:
        out.append(max(place, out[-1] + least) if out else float(place))
    for i in reversed(range(len(out))):
        out[i] = min(out[i], last - least * (len(out) - 1 - i))
    return out


def _points(figure: Figure, ax: Axes, places: pd.DataFrame, marked: Sequence[str], colours: pd.Series | None) -> None:
    x, y = places["x"].to_numpy(), places["y"].to_numpy()
    dots = {"s": 14 if len(x) < 200 else 7, "linewidths": 0, "alpha": 0.8}
    if colours is None:
        ax.scatter(x, y, color="0.6", **dots)
    else:
        values = colours.reindex(places.index).to_numpy(dtype=float)
        known = ~np.isnan(values)
        ax.scatter(x[~known], y[~known], color="0.8", **dots)
        points = ax.scatter(x[known], y[known], c=values[known], cmap="viridis_r", **dots)
        bar = figure.colorbar(points, ax=ax, location="top", fraction=0.03, pad=0.02, aspect=40)
        bar.ax.tick_params(labelsize=7)
        bar.ax.grid(visible=False)
        bar.set_label(printable(str(colours.name), 40), fontsize=8, parse_math=False)
    own = places.loc[list(marked)]
    ring = {"s": 44, "linewidths": 1.2} if len(own) <= 100 else {"s": 16, "linewidths": 0.7}
    ax.scatter(own["x"], own["y"], facecolors="none", edgecolors="C3", **ring)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel("the two directions that tell most of the cosines apart", fontsize=8)
    ax.margins(0.08)
    ax.grid(visible=False)
    ground = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}
    for numbers, at in _together(own.to_numpy()[:MARKED], np.array([np.ptp(x), np.ptp(y)])):
        few = ", ".join(map(str, numbers[:3])) + " …" * (len(numbers) > 3)
        ax.annotate(few, at, (5, 4), textcoords="offset points", size=7.5, bbox=ground)


def _together(points: np.ndarray, extent: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """Numbers from 1 of points, those that would lie on one another in one label."""
    out: list[tuple[list[int], np.ndarray]] = []
    for number, point in enumerate(points, 1):
        near = [group for group, at in out if (np.abs(point - at) <= extent * (0.12, 0.05)).all()]
        if near:
            near[0].append(number)
        else:
            out.append(([number], point))
    return out


def _legend(ax: Axes, marked: Sequence[str]) -> None:
    ax.set_axis_off()
    lines = [f"{i}  {printable(name, 30)}" for i, name in enumerate(marked[:MARKED], 1)]
    if len(marked) > MARKED:
        lines.append(f"and {len(marked) - MARKED} more, marked only")
    title = "Selected" if marked else "None selected"
    ax.text(0.06, 1, "\n".join([title, *lines]), va="top", size=7.5, linespacing=1.35, parse_math=False)
