"""The style sheet, and saving a figure with the data behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from workbench.errors import WorkbenchError
from workbench.options import near

__all__ = ["COLUMN", "TEXT", "VENUES", "Venue", "apply", "figure", "save", "style", "venue_of"]


@dataclass(frozen=True)
class Venue:
    """Widths of a column and of the text in inches; equal where the pages have one column."""

    column: float
    text: float


VENUES = {
    "aaai": Venue(3.3, 7.0),
    "acl": Venue(3.03, 6.3),
    "cvpr": Venue(3.25, 6.875),
    "iclr": Venue(5.5, 5.5),
    "icml": Venue(3.25, 6.75),
    "ieee": Venue(3.5, 7.16),
    "jmlr": Venue(6.0, 6.0),
    "neurips": Venue(5.5, 5.5),
    "tmlr": Venue(6.5, 6.5),
}
COLUMN, TEXT = VENUES["icml"].column, VENUES["icml"].text
_STYLE = Path(__file__).with_name("workbench.mplstyle")


def venue_of(name: str) -> Venue:
    """The widths of a venue's pages.

    Raises:
        WorkbenchError: an unknown venue.
    """
    if name not in VENUES:
        raise WorkbenchError(f"no venue {name!r}{near(name, VENUES)}; choose of {', '.join(VENUES)}")
    return VENUES[name]


def style():
    """The package's style as a context manager; nothing outside it changes."""
    return plt.style.context(_STYLE)


def apply() -> None:
    """Take the package's style for the rest of a notebook."""
    plt.style.use(_STYLE)


def figure(rows: int = 1, columns: int = 1, *, width: float = TEXT, height: float = 2.4, **settings):
    """A figure and its axes in the package's style; height is per row, inches."""
    with style():
        return plt.subplots(rows, columns, figsize=(width, height * rows), **settings)


def save(
    fig: Figure,
    folder: str | Path,
    name: str,
    data: pd.DataFrame,
    *,
    caption: str,
    made: Mapping | None = None,
    exact: bool = False,
) -> Path:
    """Write NAME.pdf and NAME.png, the data behind as NAME.csv, and a note (caption, how it was made) as NAME.json.

    The files hold no time stamp: the same figure gives the same bytes on the same machine. Returns the folder.

    Args:
        exact: keep the figure's size; else it is cut, or widened, to what is drawn.

    Raises:
        WorkbenchError: there is no data behind the figure.
    """
    if data.empty:
        raise WorkbenchError(f"figure {name!r} has no data behind it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with style(), plt.rc_context({"savefig.bbox": None if exact else "tight"}):
        fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "ModDate": None})
        fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
    note = {"caption": caption, "data": f"{name}.csv", "rows": len(data), "made": dict(made or {})}
    (folder / f"{name}.json").write_text(json.dumps(note, indent=1, default=str) + "\n", encoding="utf-8")
    return folder
