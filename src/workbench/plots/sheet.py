"""The style sheet, and saving a figure with the data behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from workbench.errors import WorkbenchError

__all__ = ["COLUMN", "TEXT", "apply", "figure", "save", "style"]

COLUMN, TEXT = 3.25, 6.75  # widths of a column and of the text in the usual two-column venues, inches
_STYLE = Path(__file__).with_name("workbench.mplstyle")


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
    fig: Figure, folder: str | Path, name: str, data: pd.DataFrame, *, caption: str, made: Mapping | None = None
) -> Path:
    """Write NAME.pdf and NAME.png, the data behind as NAME.csv, and a note (caption, how it was made) as NAME.json.

    The files hold no time stamp: the same figure gives the same bytes on the same machine. Returns the folder.

    Raises:
        WorkbenchError: there is no data behind the figure.
    """
    if data.empty:
        raise WorkbenchError(f"figure {name!r} has no data behind it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "ModDate": None})
        fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
    note = {"caption": caption, "data": f"{name}.csv", "rows": len(data), "made": dict(made or {})}
    (folder / f"{name}.json").write_text(json.dumps(note, indent=1, default=str) + "\n", encoding="utf-8")
    return folder
