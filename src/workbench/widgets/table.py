"""A pool's table to sort, filter and select in: DataTables by way of itables, everything that strangers wrote as text.

No request leaves the page (itables' widget brings its script along), cells are escaped, kept from mathematics by the
table's class, and typed here, so that no text is taken for HTML or a date when it is sorted.
"""

from __future__ import annotations

import math

import anywidget
import pandas as pd

from workbench.errors import SelectionError
from workbench.pool import Pool
from workbench.screen import printable

__all__ = ["Keys", "cells", "grid", "scored"]

COLUMNS = {  # column of a pool's table → its title here
    "rank": "rank",
    "alpha_over_r": "α/r",
    "targets": "targets",
    "norm": "norm",
    "accepted": "accepted",
    "author": "author",
    "downloads": "downloads",
    "operation": "operation",
    "domain": "domain",
    "format": "format",
}
NUMBERS = ("rank", "alpha_over_r", "norm", "downloads")
LONGEST = {"name": 48, "accepted": 48}  # characters of a cell; any other 32
MEASURES = ("accuracy", "loss")


class Keys(anywidget.AnyWidget):
    """Makes the table good to use by keyboard in JupyterLab. Stands in the same panel, and shows nothing.

    JupyterLab takes arrows and Enter to move among cells, unless the focused element itself forbids it. And the filters
    of all tables on a page have one id, so that labels would name, and a click on them focus, that of another table.
    """

    _esm = """
    function render({ el }) {
      let tries = 300;
      const mark = () => {
        const table = el.closest(".workbench-explorer")?.querySelector(".workbench-table");
        const filter = table?.querySelector(".dt-search input"), name = table?.querySelector(".dt-search label");
        if (!filter) return tries-- && setTimeout(mark, 100);
        filter.id = "workbench-" + Math.random().toString(36).slice(2);
        if (name) name.htmlFor = filter.id;
        table.addEventListener(
          "focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
      };
      mark();
    }
    export default { render };
    """


def scored(scores: pd.DataFrame | pd.Series | None, pool: Pool) -> pd.DataFrame:
    """Scores by adapter: what is to be columns of the table, named as given, an adapter in each row.

    Args:
        scores: a series by name, or a frame with accuracy, loss or both and the names as its index or its column `name`
            (`select.rank_adapters` gives one; other columns are left out).

    Raises:
        SelectionError: no such column, a name twice, or no adapter of the pool.
    """
    if scores is None:
        return pd.DataFrame(index=pd.Index([], dtype=object))
    if isinstance(scores, pd.Series):
        scores = scores.to_frame(str(scores.name or "accuracy"))
    else:
        scores = scores.set_index("name") if "name" in scores else scores
        if not (columns := [c for c in MEASURES if c in scores]):
            raise SelectionError(
                f"scores have no column {' or '.join(MEASURES)}; they have {', '.join(map(str, scores.columns))}. "
                "Give a series by name for anything else"
            )
        scores = scores[columns]
    if taken := {"name", *COLUMNS.values()} & {str(c) for c in scores}:
        raise SelectionError(f"the table has a column {min(taken)!r} already; give the scores another name")
    if scores.index.has_duplicates:
        raise SelectionError(f"{scores.index[scores.index.duplicated()][0]!r} has more than one row of scores")
    if not scores.index.isin(pool.names).any():
        raise SelectionError(f"none of {len(scores)} scores is of an adapter of pool {pool.name!r}; index them by name")
    return scores.astype(float)


def cells(pool: Pool, scores: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table as it is shown, all of it text, a row per adapter found in the order of `pool.table`.

    Returns:
        the table, without empty columns, and which of its columns are numbers ("" where one is not known).
    """
    table = pool.table
    out = {"name": [printable(name, LONGEST["name"]) for name in table["name"]]}
    for column in scores:
        out[printable(str(column), 32)] = [_number(value, 3) for value in table["name"].map(scores[column])]
    numbers = [*list(out)[1:], *(COLUMNS[column] for column in NUMBERS)]
    refusals = zip(table["accepted"], table["rule"], table["reason"], strict=True)
    why = ["yes" if good else printable(f"no, {rule}: {said}", LONGEST["accepted"]) for good, rule, said in refusals]
    for column, title in COLUMNS.items():
        if column == "accepted":
            out[title] = why
        elif column in NUMBERS:
            out[title] = [_number(value) for value in table[column]]
        else:
            texts = (
                table[column].str.replace("_proj", "").str.replace(",", " ") if column == "targets" else table[column]
            )
            out[title] = [printable(text, 32) for text in texts]
    frame = pd.DataFrame(out, dtype=object)
    frame = frame.loc[:, [title in ("name", "accepted") or bool((frame[title] != "").any()) for title in frame]]
    return frame, [title for title in numbers if title in frame]


def grid(frame: pd.DataFrame, numbers: list[str], *, order: tuple[str, str] = ("name", "asc"), rows: int = 10):
    """The table as itables' widget: a click or Enter selects a row or drops it, Shift-click up to it; `selected_rows`.

    Args:
        order: the column to sort by at first, and "asc" or "desc"; equal ones by name.
        rows: on a page.
    """
    from itables.widget import ITable

    kinds = [(i, "num" if title in numbers else "string") for i, title in enumerate(frame)]
    first = [[list(frame).index(order[0]), order[1]]]
    found = {"search": "applied"}  # the rows that pass the filter, on other pages too
    buttons = [
        {"extend": "selectAll", "text": "Select all that pass the filter", "selectorModifier": found},
        {"extend": "showSelected", "text": "Show only selected"},
    ]
    shown = ITable(
        frame,
        allow_html=False,
        maxBytes=0,
        maxRows=0,
        showIndex=False,
        text_in_header_can_be_selected=False,  # else a click on a header does not sort
        classes="display compact nowrap tex2jax_ignore mathjax_ignore",
        style="table-layout:auto;width:100%;margin:0",
        columnDefs=[{"targets": i, "type": kind} for i, kind in kinds],
        order=first if first[0] == [0, "asc"] else [*first, [0, "asc"]],
        select={"style": "multi+shift", "keys": "true"},
        layout={"topStart": {"buttons": buttons}, "topEnd": "search", "bottomStart": "info", "bottomEnd": "paging"},
        # Of one column, by its kind (a number above, a text that begins with), in a row of its own, or columns are wider.
        columnControl={"target": 1, "content": ["searchDropdown"]},
        language={"search": "Filter:", "info": "_START_ to _END_ of _TOTAL_", "infoFiltered": "(of _MAX_)"},
        pageLength=rows,
        scrollX=True,
        deferRender=True,
    )
    shown.add_class("workbench-table")
    return shown


def _number(value: object, places: int | None = None) -> str:
    """A number to sort by and to read: so many places, or four digits; "" where it is missing or not finite."""
    if pd.isna(value) or not math.isfinite(value):
        return ""
    if places is not None:
        return f"{value:.{places}f}"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"
