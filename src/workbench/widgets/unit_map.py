"""A map of points to zoom, lasso and recolour, drawn by jupyter-scatter, which is told no stranger's word."""

from __future__ import annotations

import html
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib import colormaps
from matplotlib.colors import to_hex

from workbench.screen import printable
from workbench.widgets.parts import PLAIN

__all__ = ["Colours", "UnitMap", "by_number", "by_value"]

MOST = 24  # values with a colour of their own; more cannot be told apart
STEPS = 32  # of a number's colour scale
GREY = "#c8c8c8"
_EIGHT = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#b8a800")  # Okabe and Ito's


@dataclass(frozen=True)
class Colours:
    """A colour's place in `palette` for each point, and what the legend says: (colour, words)."""

    codes: np.ndarray
    palette: tuple[str, ...]
    legend: tuple[tuple[str, str], ...]

    def of(self, rows: np.ndarray) -> Colours:
        """The same for some of the points; the legend is still that of all."""
        return Colours(self.codes[rows], self.palette, self.legend)


def by_value(values: Sequence) -> Colours:
    """A colour for each of the commonest values, grey for the others."""
    counts = pd.Series(list(values)).value_counts(sort=False).sort_values(ascending=False, kind="stable")
    top, rest = list(counts.index[:MOST]), counts.iloc[MOST:]
    palette = _EIGHT[: len(top)] if len(top) <= len(_EIGHT) else _many(len(top))
    place = {value: i for i, value in enumerate(top)}
    codes = np.array([place.get(value, len(top)) for value in values])
    legend = [(palette[i], f"{printable(str(value), 60)} ({counts[value]})") for value, i in place.items()]
    if len(rest):
        legend.append((GREY, f"{len(rest)} others ({rest.sum()})"))
    return Colours(codes, (*palette, GREY), tuple(legend))


def by_number(values: Sequence[float]) -> Colours:
    """A scale of colours from the least to the largest."""
    values = np.asarray(values, dtype=float)
    low, high, share = float(values.min()), float(values.max()), _share(values)
    palette = tuple(to_hex(colormaps["cividis"](i / (STEPS - 1))) for i in range(STEPS))
    marks = [round(i * (STEPS - 1) / 4) for i in range(5)]
    legend = tuple((palette[i], f"{low + (high - low) * i / (STEPS - 1):.3g}") for i in marks)
    return Colours(np.minimum((share * STEPS).astype(int), STEPS - 1), palette, legend)


class UnitMap(ipywidgets.VBox):
    """Points to zoom (wheel), pan (drag) and lasso (its second button, then drag); `picked` are the lassoed rows.

    `hovered` is the row under the pointer, −1 for none. Colours are sent as numbers and the legend is escaped HTML.
    """

    picked = traitlets.Tuple(help="rows of the table last shown")
    hovered = traitlets.Int(-1)

    def __init__(self, height: int = 400):
        self._height, self.scatter = height, None
        self._turn = threading.RLock()  # a job may show while a control recolours
        self.legend = ipywidgets.HTML()
        super().__init__([], layout={"width": "100%"})

    def show(self, points: pd.DataFrame, colours: Colours) -> None:
        """Draw points (columns x, y, norm: a point's size) in their colours; nothing is picked any more."""
        with self._turn, _quiet():
            self.pick(())
            frame = self._frame(points, colours)
            if self.scatter is None:
                self._build(frame)
            else:
                self.scatter.data(frame)
                self.scatter.color(by="colour", map=list(self._palette))
                self.scatter.widget.reset_view()
            self._points = points
            self._tell(colours)

    def recolour(self, colours: Colours) -> None:
        """Draw the same points in other colours; the view and what is picked stay."""
        with self._turn, _quiet():
            self.scatter.data(self._frame(self._points, colours))
            self.scatter.color(by="colour", map=list(self._palette))
            self._tell(colours)
            self.pick(self.picked)

    def pick(self, rows: Sequence[int]) -> None:
        """Pick rows, as the lasso does."""
        self.picked = tuple(int(row) for row in rows)
        if self.scatter is not None:
            self.scatter.widget.selection = np.asarray(self.picked, dtype="uint32")

    def _frame(self, points: pd.DataFrame, colours: Colours) -> pd.DataFrame:
        """What is drawn. jupyter-scatter wants the colours that occur, numbered from 0."""
        used, codes = np.unique(colours.codes, return_inverse=True)
        self._palette = tuple(colours.palette[i] for i in used)
        names = [f"{i:03}" for i in range(len(used))]
        colour = pd.Categorical.from_codes(codes, categories=names)
        sizes = _share(points["norm"].to_numpy(), 0.0)
        x, y = (2 * _share(points[axis].to_numpy()) - 1 for axis in "xy")
        return pd.DataFrame({"x": x, "y": y, "colour": colour, "size": sizes})

    def _build(self, frame: pd.DataFrame) -> None:
        import jscatter

        self.scatter = jscatter.Scatter(
            x="x",
            y="y",
            x_scale=(-1.05, 1.05),
            y_scale=(-1.05, 1.05),
            size_norm=(0.0, 1.0),
            data=frame,
            color_by="colour",
            color_map=list(self._palette),
            size_by="size",
            size_map=(3, 9, 7) if len(frame) <= 3000 else (2, 5, 7),
            opacity_by=None,
            opacity=0.8,
            axes=False,
            height=self._height,
        )
        widget = self.scatter.widget
        widget.observe(self._lassoed, "selection")
        widget.observe(
            lambda change: setattr(self, "hovered", -1 if change["new"] is None else change["new"]), "hovering"
        )
        self.children = [widget]

    def _lassoed(self, change) -> None:
        rows = change["new"]
        self.picked = () if rows is None else tuple(np.asarray(rows).astype(int).tolist())

    def _tell(self, colours: Colours) -> None:
        rows = "".join(
            f"<div><span style='color:{colour}' aria-hidden='true'>⬤</span> {html.escape(words)}</div>"
            for colour, words in colours.legend
        )
        style = "max-height:30em;overflow:auto;line-height:1.35;font-size:smaller;overflow-wrap:anywhere"
        self.legend.value = f"<div {PLAIN} tabindex='0' aria-label='Colours' style='{style}'>{rows}</div>"


def _share(values: np.ndarray, low: float | None = None) -> np.ndarray:
    """Where values lie between the least (or `low`) and the largest, 0 … 1; 0 where these are one."""
    low = float(values.min()) if low is None else low
    reach = float(values.max()) - low
    return (values - low) / reach if reach > 0 else np.zeros(len(values))


def _many(n: int) -> tuple[str, ...]:
    return tuple(to_hex(colormaps["tab20"](i)) if i < 20 else to_hex(colormaps["Dark2"](i - 20)) for i in range(n))


@contextmanager
def _quiet() -> Iterator[None]:
    """jupyter-scatter 1.0 uses a keyword that pandas has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The inplace keyword in DataFrame.set_index")
        yield
