"""The fuller grids behind the notebooks: `python -m workbench.nano.grids --out figures` (minutes on a GPU).

The notebooks run a small share live and draw it beside these rows. Several processes can share the work, each with its
own `--part`, on one folder of results; `--gather` then writes each grid as one Parquet file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workbench.base import Base
from workbench.experiment import NEW_ADAPTER, ZERO_SHOT, Recipe, compare
from workbench.nano import world
from workbench.pool import Pool
from workbench.results import Results
from workbench.tasks import names

__all__ = ["GRIDS", "gather", "run_grid"]

_MERGES = ("average", "svd", "ties", "lego")
_MORE = (
    *("sum", "linear", "magnitude_prune", "dare_linear", "dare_ties", "della", "breadcrumbs"),
    *("tsv", "iso_c", "iso_cts", "knots_ties", "knots_dare", "core", "regmean", "fisher"),
)
_TASKS = tuple(name for kind in world.KINDS for name in names(kind))
_NEW = (NEW_ADAPTER, ZERO_SHOT, Recipe("in-context", shots=5))

# grid → list of (recipes, baselines, settings of `compare`)
GRIDS: dict[str, list[tuple[list[Recipe], tuple[Recipe, ...], dict]]] = {
    "merging": [
        (
            [
                Recipe(method, select=select, k=10)
                for select in ("evaluation", "random")
                for method in ("coefficients", "lorahub", *_MERGES)
            ]
            + [Recipe(method, select="evaluation", k=10) for method in _MORE],
            _NEW,
            {"tasks": _TASKS, "seeds": (0, 1), "n_train": n},
        )
        for n in (10, 80)
    ],
    "random": [
        (
            [
                Recipe("coefficients", select="random", k=k, control=control, steps=steps, granularity=granularity)
                for steps in (400, 100)
                for granularity in ("module", "expert")
                for k in (40, 20, 10, 5)
                for control in ("", "sigma", "spectrum")
            ],
            (ZERO_SHOT, NEW_ADAPTER),
            {"tasks": _TASKS[::2], "seeds": (0,), "n_train": 80, "control": ""},
        )
    ],
}


def run_grid(
    name: str, folder: Path, *, part: int = 0, parts: int = 1, device: str | None = None, n_test: int = 500, say=print
) -> None:
    """Run one part of a grid; what is stored already is skipped."""
    pool = Pool.open("nano")
    base = Base.load(pool.base, device=device)
    for recipes, baselines, settings in GRIDS[name]:
        mine = [*baselines, *recipes][part::parts]
        if mine:
            compare(base, pool, recipes=mine, baselines=(), n_test=n_test, results=folder / name, say=say, **settings)


def gather(name: str, folder: Path, out: Path) -> Path:
    """Write all rows of a grid as one Parquet file, out/grid_NAME.parquet."""
    table = Results(folder / name).read().drop(columns=["versions", "platform", "split"])
    out.mkdir(parents=True, exist_ok=True)
    table.sort_values(["recipe", "task", "seed", "n_train"]).to_parquet(
        out / f"grid_{name}.parquet", index=False, compression="zstd"
    )
    return out / f"grid_{name}.parquet"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the grids behind the notebooks.")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--results", type=Path, default=Path("runs/results"))
    parser.add_argument("--grid", choices=sorted(GRIDS), action="append")
    parser.add_argument("--part", default="0/1", help="I/N: the I-th of N shares of the recipes")
    parser.add_argument("--gather", action="store_true", help="only gather what is stored")
    args = parser.parse_args(argv)
    part, parts = (int(n) for n in args.part.split("/"))
    for name in args.grid or GRIDS:
        if not args.gather:
            run_grid(name, args.results, part=part, parts=parts)
        if args.gather or parts == 1:
            print(gather(name, args.results, args.out))


if __name__ == "__main__":
    main()
