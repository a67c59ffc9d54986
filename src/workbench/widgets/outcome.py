"""What the merge bench shows of a trial: its table, pictures of it and of the coefficients, and answers side by side."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from workbench import metrics
from workbench.adapters import Adapter
from workbench.screen import printable
from workbench.trial import MERGE, NEW, Trial
from workbench.widgets.parts import PLAIN, SPACED

__all__ = [
    "answers_table",
    "heat_maps",
    "interval_picture",
    "layers_by_projection",
    "result_rows",
    "result_table",
    "told",
]

MOST = 8  # adapters with a heat map


def told(trial: Trial) -> str:
    """What was run, in words."""
    options = ", ".join(f"{name}={value!r}" for name, value in trial.options.items())
    size = f", rank {trial.adapter.rank}" if isinstance(trial.adapter, Adapter) else ""
    said = (
        f"{trial.method}{f' ({options})' if options else ''} of {len(trial.names)} adapters{size}, seed {trial.seed}; "
    )
    said += f"{int(trial.table['n'].iloc[0])} test examples of {trial.task}."
    if trial.scale is not None:
        said += f" λ = {trial.scale:g}, from the validation examples."
    if trial.until is not None:
        said += f" The fit was stopped at {trial.told[0]} of {trial.told[1]}; its random control had all of them."
    return said


def result_rows(trial: Trial) -> list[tuple[str, str, str, str]]:
    """The table's cells: what, accuracy, loss, and the merge's accuracy minus this one's, each with its interval."""
    rows = []
    for what, row in trial.table.iterrows():
        more = [f"matched by {trial.control}"] if what.startswith("random") else []
        more += [f"{name}={value!r}" for name, value in trial.new.items()] if what == NEW else []
        name = f"{what} ({', '.join(more)})" if more else what
        cells = [
            _cell(row["accuracy"], row["low"], row["high"], 2),
            _cell(row["loss"], row["loss_low"], row["loss_high"], 3),
            "" if what == MERGE else _cell(row["difference"], row["difference_low"], row["difference_high"], 2, "+"),
        ]
        rows.append((name, *cells))
    return rows


def result_table(trial: Trial) -> str:
    """The table as HTML."""
    measure = _measure(trial)
    head = ("", measure, "loss (nats per token)", f"{measure}: merge − this")
    note = "Brackets: 95 %, over these test examples alone; another draw of training examples may come out otherwise."
    return (
        f"<table role='status' {PLAIN} style='{SPACED};white-space:nowrap'>"
        f"<caption style='text-align:left;white-space:normal'>{html.escape(told(trial))}</caption>"
        + "<tr>"
        + "".join(f"<th scope='col' style='text-align:left'>{html.escape(one)}</th>" for one in head)
        + "</tr>"
        + "".join(
            f"<tr><th scope='row' style='text-align:left'>{html.escape(what)}</th>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for what, *cells in result_rows(trial)
        )
        + f"</table><p {PLAIN} style='margin:0 1em;opacity:.8'>{html.escape(note)}</p>"
    )


def interval_picture(trial: Trial) -> Figure:
    """Accuracy and loss of the merge and of what stands beside it, with their intervals."""
    from workbench import plots

    figure = Figure(figsize=(7.6, 2.3), layout="constrained")
    table = trial.table.reset_index().assign(what=lambda t: t["what"].str.replace(" ", "\n", n=1))
    first, second = figure.subplots(1, 2)
    accuracy = table.rename(columns={"accuracy": "mean"})
    plots.intervals(first, accuracy, x="what", label=_measure(trial))
    loss = table.drop(columns=["low", "high"]).rename(columns={"loss": "mean", "loss_low": "low", "loss_high": "high"})
    plots.intervals(second, loss, x="what", label="loss (nats per token)")
    first.set_ylim(-0.04, 1.04)
    for ax in (first, second):
        ax.tick_params(labelsize=8)
        ax.yaxis.label.set_size(8)
    return figure


def layers_by_projection(modules: Sequence[str]) -> pd.DataFrame:
    """Each module's row and column in a heat map (columns layer, projection): its layer's path, and what follows that.

    A projection has its last name alone where that says enough; a module outside the layers is a row of its own.
    """
    rows = []
    for module in modules:
        found = re.match(r"(.*?\.?(\d+))\.(.+)", module)
        rows.append((found[1], found[3]) if found else ("", module))
    table = pd.DataFrame(rows, columns=["layer", "projection"], index=list(modules))
    short = table["projection"].str.rsplit(".", n=1).str[-1]
    if table.assign(projection=short).drop_duplicates(["layer", "projection"]).shape[0] == len(table):
        table["projection"] = short
    heads = table["layer"].str.replace(r"\d+$", "", regex=True)
    if heads[table["layer"] != ""].nunique() == 1:
        table["layer"] = table["layer"].str.extract(r"(\d+)$")[0].fillna("")
    return table


def heat_maps(coefficients: pd.DataFrame) -> Figure:
    """Coefficients (modules × adapters) as a map of layers × projections for each adapter, the largest `MOST` of them."""
    from workbench import plots

    size = coefficients.abs().mean().sort_values(ascending=False, kind="stable")
    shown = [name for name in coefficients.columns if name in set(size.index[:MOST])]
    place = layers_by_projection(coefficients.index)
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    height = 1.5 + 0.17 * place["layer"].nunique()
    figure = Figure(figsize=(0.4 + 2.3 * across, height * down), layout="constrained")
    reach = float(coefficients[shown].abs().to_numpy().max()) or 1.0
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, name in zip(axes, shown, strict=False):
        values = place.assign(value=coefficients[name].astype(float)).pivot(
            index="layer", columns="projection", values="value"
        )
        values = values.reindex(index=place["layer"].drop_duplicates(), columns=place["projection"].drop_duplicates())
        plots.heatmap(ax, values, limits=(-reach, reach))
        ax.set_title(printable(name, 30), fontsize=7.5, parse_math=False)
        ax.tick_params(labelsize=8)
        ax.set_ylabel("layer", fontsize=8)
    for ax in axes[len(shown) :]:
        ax.remove()
    return figure


def answers_table(answers: Mapping[str, str]) -> str:
    """What each wrote, side by side, as HTML."""
    width = f"{100 / max(1, len(answers)):.0f}%"
    style = f"text-align:left;vertical-align:top;width:{width};padding-right:1em;overflow-wrap:anywhere"
    heads = "".join(f"<th scope='col' style='{style}'>{html.escape(what)}</th>" for what in answers)
    cells = "".join(
        f"<td style='{style}'><code style='white-space:pre-wrap'>{html.escape(_visible(text))}</code></td>"
        for text in answers.values()
    )
    return (
        f"<table role='status' {PLAIN} style='width:100%;table-layout:fixed'><tr>{heads}</tr><tr>{cells}</tr></table>"
    )


def _measure(trial: Trial) -> str:
    return "exact match" if trial.metric == metrics.DEFAULT else f"accuracy ({trial.metric})"


def _visible(text: str) -> str:
    """Lines as they are, all else that does not print as an escape."""
    return "\n".join(printable(row, 4000) for row in text.split("\n")) or "(nothing)"


def _cell(value: float, low: float, high: float, digits: int, sign: str = "") -> str:
    if not math.isfinite(value):
        return "–"
    shown = f"{value:{sign}.{digits}f}".replace("-", "−")
    if not math.isfinite(low):
        return shown
    return f"{shown} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]".replace("-", "−")
