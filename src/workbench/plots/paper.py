"""The figures of a paper, typeset at a venue's widths from the data that the notebooks' figures keep beside them.

    draw(venue="neurips", out="figures/paper")        # or: make figures VENUE=neurips, or: workbench figures

The notebooks compute and store NAME.csv and NAME.json; here nothing is computed anew, so the same numbers stand in a
notebook, in its figure and in the paper. After a re-run with `out` set to a folder, `data` is that folder.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.errors import WorkbenchError
from workbench.options import near
from workbench.plots import charts
from workbench.plots.sheet import Venue, figure, save, style, venue_of
from workbench.results import provenance

__all__ = ["FIGURES", "draw"]

KINDS = ("latent", "relative", "composition", "format", "unrelated")
BEST = "coefficients, evaluation 10"
METHODS = ("zero-shot", "in-context, shots=5", "new adapter, tuned", BEST, f"{BEST}, random (sigma)")
METHODS += ("adamerging, evaluation 10", "best single", "lorahub, evaluation 10")
Drawer = Callable[[pd.DataFrame, Venue], Figure]


def draw(
    names: Sequence[str] = (),
    *,
    data: str | Path = "figures",
    out: str | Path = "figures/paper",
    venue: str = "icml",
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Draw the figures of `FIGURES`, or those named, each as PDF, PNG, CSV and a note (JSON) of what made it.

    The files are exactly as wide as the venue's column or text. The note adds the drawing's commit, venue and width to
    the caption and the origin that the notebook's figure states.

    Returns:
        The PDF files.

    Raises:
        WorkbenchError: an unknown name or venue, or data that are missing in the folder or lack a column.
    """
    for name in names:
        if name not in FIGURES:
            raise WorkbenchError(f"no figure {name!r}{near(name, FIGURES)}; choose of {', '.join(FIGURES)}")
    page, data, out, made = venue_of(venue), Path(data), Path(out), provenance()
    names = list(names or FIGURES)
    for name in names:
        source, drawer = FIGURES[name]
        table, note = _stored(data, source)
        try:
            with style():
                fig = drawer(table, page)
        except KeyError as error:
            raise WorkbenchError(
                f"{data / source}.csv has no column {error}; store notebook {source[:2]} anew"
            ) from error
        width = float(fig.get_size_inches()[0])
        about = {
            "of": f"{source}.csv",
            **note["made"],
            "venue": venue,
            "width in inches": width,
            "drawn": made["commit"],
        }
        save(fig, out, name, table, caption=note["caption"], made=about, exact=True)
        plt.close(fig)
        say(f"{out / name}.pdf: {width:g} in wide, {len(table)} rows of {source}.csv")
    return [out / f"{name}.pdf" for name in names]


def _stored(folder: Path, source: str) -> tuple[pd.DataFrame, dict]:
    paths = [folder / f"{source}.{end}" for end in ("csv", "json")]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise WorkbenchError(
            f"{absent[0]} is not there; notebook {source[:2]} makes it: python -m workbench.notebooks run {source[:2]} "
            f"--out {folder}"
        )
    return pd.read_csv(paths[0], keep_default_na=False, na_values=[""]), json.loads(paths[1].read_text("utf-8"))


# Drawers ------------------------------------------------------------------------------------------------------------


def _legend(fig: Figure, ax: Axes, columns: int = 3, **more) -> None:
    """Below the axes, where it takes no width away."""
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=6, **more)


def _new_adapter(ax: Axes, rows: pd.DataFrame) -> None:
    """The mean of a newly trained adapter, which stands beside every merge, as a line."""
    for mean in rows["mean"]:
        ax.axhline(mean, color="0.3", linestyle=(0, (1, 1)), linewidth=1, label="new adapter")


def _ordered(table: pd.DataFrame, **orders: Sequence) -> pd.DataFrame:
    """Rows in the columns' orders (first column first); values that an order lacks are left out."""
    for column, order in orders.items():
        table = table[table[column].isin(order)].assign(
            **{column: lambda t, c=column, o=order: pd.Categorical(t[c], o)}
        )
    return table.sort_values(list(orders), kind="stable").astype({column: str for column in orders})


def _by_kind(table: pd.DataFrame, page: Venue, *, series: str, order: Sequence[str], columns: int) -> Figure:
    """Exact match by kind of target, a panel for each number of examples."""
    sizes = sorted(table["n_train"].unique())
    fig, axes = figure(len(sizes), 1, width=page.text, height=1.5, sharex=True, squeeze=False)
    for ax, n in zip(axes[:, 0], sizes, strict=True):
        part = _ordered(table[table["n_train"] == n], **{series: order, "kind": KINDS})
        charts.intervals(ax, part, x="kind", series=series, label=f"exact match\n{n} examples")
    _legend(fig, axes[0, 0], columns)
    return fig


def _dial(table: pd.DataFrame, page: Venue) -> Figure:
    from workbench.nano.dial import LEVELS

    return _by_kind(
        table, page, series="who", order=(*LEVELS, "random adapters", "new adapter", "zero-shot"), columns=5
    )


def _controls(table: pd.DataFrame, page: Venue) -> Figure:
    """Real minus random adapters of every recipe, over all kinds of target."""
    part = table[table["kind"].isna() & (table["against"] == "sigma")]
    part = part.assign(recipe=part["plain"], series=part["n_train"].map("{} examples".format))
    order = part.groupby("recipe")["control_difference"].max().sort_values(ascending=False).index
    fig, ax = figure(width=page.text, height=0.17 * len(order) + 0.9)
    charts.forest(ax, _ordered(part, recipe=list(order), series=sorted(part["series"].unique())), series="series")
    ax.set_xlabel("exact match: real minus random adapters")
    _legend(fig, ax)
    return fig


def _sweep(table: pd.DataFrame, page: Venue) -> Figure:
    """Number of adapters × kind, a coefficient a module, by the longest fits."""
    part = table[(table["granularity"] == "module") & (table["steps"] == table["steps"].max())]
    fig, axes = figure(1, len(KINDS), width=page.text, height=1.7, sharey=True)
    for ax, kind in zip(axes, KINDS, strict=True):
        charts.curves(ax, part[part["kind"] == kind], x="k", series="adapters", log=True)
        _new_adapter(ax, table[(table["kind"] == kind) & (table["adapters"] == "new adapter")])
        ax.set(title=kind, xlabel="adapters", ylabel="exact match" if kind == KINDS[0] else "")
    _legend(fig, axes[0], 4)
    return fig


def _number_and_rank(table: pd.DataFrame, page: Venue) -> Figure:
    """LoraHub by the number of adapters, and by their rank and space."""
    part = table[table["kind"] == "all kinds"]
    fig, axes = figure(1, 2, width=page.text, height=2.0, sharey=True)
    for ax, x, label in zip(axes, ("k", "rank"), ("adapters", "rank of the adapters"), strict=True):
        charts.curves(ax, part[part[x].notna()], x=x, series="adapters", log=True)
        _new_adapter(ax, part[part["adapters"] == "new adapter"])
        ax.set_xlabel(label)
        ax.legend(fontsize=6)
    axes[0].set_ylabel("exact match")
    return fig


def _tokens(table: pd.DataFrame, page: Venue) -> Figure:
    part = table[table["who"] != "LoraHub 20, reference"]
    fig, axes = figure(1, 2, width=page.text, height=1.9, sharey=True)
    for ax, x, label in zip(
        axes, ("tokens_per_example", "total"), ("", "\n(its share of the fitting included)"), strict=True
    ):
        charts.curves(ax, part, x=x, series="series")
        ax.set_xlabel("tokens of a question" + label)
    axes[0].set_ylabel("exact match")
    _legend(fig, axes[0], 4)
    return fig


def _importance(table: pd.DataFrame, page: Venue) -> Figure:
    cuts = list(dict.fromkeys(table["over"]))
    fig, axes = figure(1, len(cuts), width=page.text, height=1.6, squeeze=False)
    for ax, cut in zip(axes[0], cuts, strict=True):
        charts.importance(ax, table[table["over"] == cut])
        ax.set(title=textwrap.fill(cut, 20), xlim=(-0.02, 1.1 * table["omega2"].max()))
    return fig


def _clusters(table: pd.DataFrame, page: Venue) -> Figure:
    """LEGO by k and reweighting, a panel a canonical form; random adapters under both reweightings."""
    random = table[(table["series"] == "random (σ)") & (table["reweighting"] == "both")]
    real = pd.concat([table[table["series"] == "real"], random.assign(reweighting="both, random (σ)")])
    groups, forms = list(dict.fromkeys(real["group"])), list(dict.fromkeys(real["canonical"]))
    fig, axes = figure(len(groups), len(forms), width=page.text, height=1.4, sharey=True, sharex="row", squeeze=False)
    for row, group in zip(axes, groups, strict=True):
        for ax, form in zip(row, forms, strict=True):
            part = real[(real["group"] == group) & (real["canonical"] == form)]
            charts.curves(ax, part, x="k", series="reweighting", log=True)
            _new_adapter(ax, table[(table["group"] == group) & (table["series"] == "new adapter")])
            ax.tick_params(axis="x", labelsize=5, rotation=90)
            ax.set(title=form if group == groups[0] else "", xlabel="clusters k" if group == groups[-1] else "")
        row[0].set_ylabel(f"exact match\n{group}", fontsize=6)
    _legend(fig, axes[0, 0], 6, title="reweighting", title_fontsize=6)
    return fig


def _units(table: pd.DataFrame, page: Venue) -> Figure:
    fig, ax = figure(width=page.column, height=2.6)
    charts.units(ax, table, by="operation")
    if legend := ax.get_legend():
        legend.remove()
    _legend(fig, ax, 3 if page.column < 4 else 5)
    return fig


def _inventory(table: pd.DataFrame, page: Venue) -> Figure:
    facts = list(dict.fromkeys(table["fact"]))
    fig, axes = figure(1, len(facts), width=page.text, height=1.6, squeeze=False)
    for ax, fact in zip(axes[0], facts, strict=True):
        counts = table[table["fact"] == fact].sort_values("value").set_index("value")["count"]
        charts.bars(ax, counts.rename("{:g}".format), label=fact)
    axes[0, 0].set_ylabel("adapters")
    return fig


def _screening(table: pd.DataFrame, page: Venue) -> Figure:
    fig, ax = figure(width=page.text, height=2.2)
    charts.bars(ax, table.set_index("rule")["count"])
    ax.set_ylabel("adapters refused")
    ax.tick_params(axis="x", rotation=75)
    return fig


FIGURES: dict[str, tuple[str, Drawer]] = {
    "methods": ("03_methods", partial(_by_kind, series="recipe", order=METHODS, columns=3)),
    "real_against_random": ("04_controls", _controls),
    "number_of_adapters": ("04_sweep", _sweep),
    "relevance_dial": ("06_dial", _dial),
    "tokens": ("07_tokens", _tokens),
    "number_and_rank": ("07_adapters", _number_and_rank),
    "design_space": ("09_importance", _importance),
    "lego_clusters": ("05_clusters", _clusters),
    "unit_map": ("02_unit_map", _units),
    "inventory": ("01_inventory", _inventory),
    "screening": ("01_screening", _screening),
}
