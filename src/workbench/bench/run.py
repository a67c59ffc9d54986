"""A benchmark's lines as a table with ratios, as Parquet and as a figure."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch

from workbench.bench.measure import Line, ceilings
from workbench.bench.models import SCALES
from workbench.errors import SelectionError
from workbench.results import provenance, write_parquet

__all__ = ["AREAS", "draw", "draw_growth", "keep", "run", "store", "tabulate"]

AREAS = ("population", "matching", "coefficients", "fits", "similarity", "merging")


def run(
    areas: Sequence[str] = AREAS,
    scale: str = "nano",
    device: str = "cpu",
    *,
    quick: bool = False,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Measure some areas on a model of a scale, in this process, one line said as soon as it is there.

    Returns:
        `tabulate`'s table with scale, device, its ceilings (operations and bytes per second) and the versions.

    Raises:
        SelectionError: an unknown area or scale, or nothing to measure at this one.
    """
    if unknown := sorted(set(areas) - set(AREAS)):
        raise SelectionError(f"no area {unknown[0]!r}; choose of {', '.join(AREAS)}")
    if scale not in SCALES:
        raise SelectionError(f"no scale {scale!r}; choose of {', '.join(SCALES)}")
    lines, cuda = [], torch.device(device).type == "cuda"
    most = ceilings(device, torch.bfloat16 if cuda and scale != "nano" else torch.float32)
    for area in areas:
        for line in importlib.import_module(f"workbench.bench.{area}").lines(scale, device, quick=quick):
            lines.append(line)
            say(f"{line.area}: {line.work}: {line.way}: {_seconds(line.each)} {f'a {line.unit}' if line.unit else ''}")
        if cuda:
            torch.cuda.empty_cache()
    if not lines:
        raise SelectionError(f"{', '.join(areas)}: nothing to measure at scale {scale}; many small fits are nano's")
    table = tabulate(lines)
    table["of_operations"] = table["operations"] / most["operations"]
    table["of_traffic"] = table["traffic"] / most["traffic"]
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return table.assign(scale=scale, device=name, quick=quick, **provenance())


def tabulate(lines: Iterable[Line]) -> pd.DataFrame:
    """One row a line: each (seconds for one unit), ratio (how many times as long the `against` way of the same work takes),
    peak (bytes), operations and traffic per second.
    """
    lines = list(lines)
    known = {(line.area, line.work, line.way): line.each for line in lines}
    rows = [
        {
            **{name: getattr(line, name) for name in ("area", "work", "way", "against", "unit", "per", "each")},
            "seconds": line.timing.seconds,
            "spread": line.timing.spread,
            "ratio": known.get((line.area, line.work, line.against), float("nan")) / line.each,
            "peak": line.timing.peak,
            "operations": (line.operations or float("nan")) / line.timing.seconds,
            "traffic": (line.traffic or float("nan")) / line.timing.seconds,
            "error": float("nan") if line.error is None else line.error,
            "note": line.note,
            "adapters": line.adapters,
            "rank": line.rank,
        }
        for line in lines
    ]
    return pd.DataFrame(rows)


def store(table: pd.DataFrame, folder: str | Path) -> Path:
    """Write the table as FOLDER/bench_SCALE_KIND.parquet; areas that the file there has and the table lacks stay."""
    kind = "cpu" if "threads" in table["device"].iloc[0] else "gpu"
    path = Path(folder) / f"bench_{table['scale'].iloc[0]}_{kind}.parquet"
    if path.is_file():
        held = pd.read_parquet(path)
        table = pd.concat([held[~held["area"].isin(table["area"])], table], ignore_index=True)
    return write_parquet(table, path)


def keep(table: pd.DataFrame, folder: str | Path) -> list[Path]:
    """`store` the table and draw the whole file: the paths written, of its growth only where the file has some."""
    path = store(table, folder)
    whole, written = pd.read_parquet(path), [path]
    figures = {"": draw(whole)}
    if whole["adapters"].notna().any() and not whole["quick"].any():
        figures["_growth"] = draw_growth(whole)
    for name, figure in figures.items():
        written.append(path.with_name(f"{path.stem}{name}.png"))
        figure.savefig(written[-1], metadata={"Software": None})
    return written


def draw(table: pd.DataFrame):
    """A bar for each way: how many times as fast as the way it is compared with, on a logarithmic axis.

    Lines that show growth are left to `draw_growth`, but for the similarity of the most adapters of each rank; and of two
    ways that are compared with each other, that of ours stands for both.
    """
    from workbench import plots

    alike = table["area"] == "similarity"
    most = table["adapters"] == table.where(alike).groupby("rank")["adapters"].transform("max")
    grown = table["adapters"].notna() | table["rank"].notna()
    fewer = set(table.loc[alike & grown & ~most, "work"])
    left_out = (grown & ~alike & (table["area"] != "coefficients")) | (alike & table["work"].isin(fewer))
    left_out |= (table["way"] == table["against"]) | (table["against"] == "ours") | table["ratio"].isna()
    shown = table[~left_out].iloc[::-1]
    fig, ax = plots.figure(width=1.4 * plots.TEXT, height=0.15 * len(shown) + 0.6)
    ratios, high = shown["ratio"], max(1.0, shown["ratio"].max())
    ax.barh(range(len(shown)), ratios - 1, left=1, color="C0", height=0.7)
    for i, (ratio, way) in enumerate(zip(ratios, shown["against"], strict=True)):
        ax.text(max(ratio, 1) * high**0.02, i, f"{ratio:.3g} × {way}", fontsize=5, va="center")
    names = [f"{area}: {work}: {way}" for area, work, way in shown[["area", "work", "way"]].itertuples(index=False)]
    ax.set_yticks(range(len(shown)), names, fontsize=5)
    ax.set(xscale="log", xlabel="times as fast", xlim=(0.8 * min(1.0, ratios.min()), 2 * high**1.9))
    ax.axvline(1, color="0.4", linewidth=0.8)
    ax.set_ylim(-0.6, len(shown) - 0.4)
    return fig


GROWTH = {
    "population": "population pass, a candidate",
    "coefficients": "learned coefficients, a step",
    "similarity": "cosines of all pairs",
}


def draw_growth(table: pd.DataFrame):
    """Seconds against the number of adapters, and against their rank, a line for each kind of work; logarithmic axes.

    Merging methods are shown by their names, on one module.

    Raises:
        SelectionError: a table without lines that show growth.
    """
    from workbench import plots

    fig, axes = plots.figure(1, 2, height=3.4, sharey=True)
    named = table["area"].map(GROWTH).fillna(table["work"].str.partition(",")[0] + ", a module")
    shown = table.assign(series=named, mean=table["each"].where(table["unit"] == "candidate", table["seconds"]))
    for ax, what, other, usual in zip(axes, ("adapters", "rank"), ("rank", "adapters"), (16, 100), strict=True):
        some = shown[shown[what].notna() & (shown[other].isna() | (shown[other] == usual))]
        if some.empty:
            raise SelectionError(f"no line of the table shows how time grows with {what}; run without --quick")
        plots.curves(ax, some, x=what, series="series", log=True)
        ax.set(yscale="log", xlabel=what)
        ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    axes[0].set_ylabel("seconds")
    return fig


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
