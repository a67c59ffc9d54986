"""What an explorer of units says: tables as HTML in which every word is escaped, and sentences."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import pandas as pd

from workbench.screen import printable
from workbench.widgets.parts import PLAIN

__all__ = ["layered", "member_rows", "picked_rows", "said_of_clusters", "said_of_unit", "scrolling", "told_apart"]

NAMED = 3  # adapters of a cluster that are named
LISTED = 200  # picked units that are listed


def layered(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """Layer → projection → module. A layer is a path's first number with what stands before, "" where there is none.

    A projection is the path's last part where that tells the layer's modules apart, else all behind the layer.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for module in modules:
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        found.setdefault(".".join(parts[: at + 1]) or "(no layer)", []).append((".".join(parts[at + 1 :]), module))
    prefixes = {layer.rpartition(".")[0] for layer in found if layer != "(no layer)"}
    out = {}
    for layer, pairs in found.items():
        short = [rest.rpartition(".")[2] for rest, _ in pairs]
        names = short if len(set(short)) == len(short) else [rest for rest, _ in pairs]
        shown = layer.rpartition(".")[2] if len(prefixes) == 1 else layer
        out[printable(shown, 60)] = {
            printable(name, 60): module for name, (_, module) in zip(names, pairs, strict=True)
        }
    return out


def member_rows(clusters: pd.DataFrame) -> str:
    """The table of clusters, which scrolls by itself."""
    labelled = "purity" in clusters
    heads = [
        "cluster",
        "units",
        "adapters",
        "share of norm²",
        *(["commonest label", "purity"] if labelled else []),
        "which",
    ]
    rows = []
    for row in clusters.itertuples():
        rest = f" and {row.adapters - NAMED} more" if row.adapters > NAMED else ""
        which = ", ".join(printable(name, 60) for name in row.which[:NAMED]) + rest
        more = [printable(row.commonest, 40), f"{row.purity:.2f}"] if labelled else []
        rows.append([str(row.cluster), str(row.units), str(row.adapters), f"{row.norm_share:.1%}", *more, which])
    return scrolling("Clusters", heads, rows, "16em")


def picked_rows(selected: pd.DataFrame, labels: Sequence[str]) -> str:
    """The picked units with their adapters, the largest first."""
    if selected.empty:
        said = "Lasso units (the map's second button) or pick a cluster, to list them here."
        return f"<div role='status' style='line-height:1.4'>{said}</div>"
    shown = selected.sort_values("norm", ascending=False, kind="stable").head(LISTED)
    rows = [
        [printable(row["adapter"], 60), str(row["unit"]), str(row["cluster"]), f"{row['norm']:.3g}"]
        + [printable(row[name], 40) for name in labels]
        for _, row in shown.iterrows()
    ]
    n, owners = len(selected), selected["adapter"].nunique()
    said = f"{n:,} unit{'s' * (n != 1)} of {owners:,} adapter{'s' * (owners != 1)} picked"
    said += f"; the {LISTED} largest:" if n > LISTED else ":"
    heads = ["adapter", "unit", "cluster", "norm", *(printable(name, 40) for name in labels)]
    return f"<div role='status' style='line-height:1.4'>{html.escape(said)}</div>" + scrolling(
        "Picked units", heads, rows, "14em"
    )


def said_of_unit(row: pd.Series, labels: Iterable[str]) -> str:
    """One unit, as the pointer finds it."""
    told = "".join(f", {name} {printable(row[name], 60)}" for name in labels)
    return f"Unit {row['unit']} of {printable(row['adapter'], 100)}: cluster {row['cluster']}, norm {row['norm']:.3g}{told}"


def said_of_clusters(shared: pd.DataFrame) -> str:
    """Whether clusters hold several adapters, beside chance, from `sharing`."""
    found, by_chance = shared["shared"].astype(float).mean(), shared["expected"].mean()
    return (
        f"{len(shared)} clusters; {found:.0%} of them hold units of several adapters, where units dealt at random would make "
        f"it {by_chance:.0%}."
    )


def told_apart(table: pd.DataFrame, name: str) -> str:
    """How clusters follow a label, beside labels shuffled over adapters, from `purity` of one module."""
    rows = table[(table["module"] != "all") & (table["control"] == "adapters")].set_index("measure")
    one = [
        f"{'purity' if measure == 'purity' else 'mutual information'} {row.value:.2f} (shuffled over adapters {row.low:.2f}"
        f"–{row.high:.2f}, p = {row.p:.2f})"
        for measure, row in ((measure, rows.loc[measure]) for measure in ("purity", "nmi"))
    ]
    return f"Clusters and {printable(name, 40)}: {'; '.join(one)}."


def scrolling(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]], height: str) -> str:
    """Rows of words as an escaped table that scrolls by itself, by keyboard too."""
    cell = "padding:0 .6em;overflow-wrap:break-word"
    head = "".join(
        f"<th scope='col' style='text-align:left;white-space:nowrap;{cell}'>{html.escape(word)}</th>" for word in heads
    )
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left;{cell}'>{html.escape(word)}</td>" for word in row) + "</tr>"
        for row in rows
    )
    return (
        f"<div role='region' aria-label='{name}' tabindex='0' {PLAIN} "
        f"style='max-height:{height};overflow:auto;line-height:1.3;font-size:smaller'>"
        f"<table><tr>{head}</tr>{body}</table></div>"
    )
