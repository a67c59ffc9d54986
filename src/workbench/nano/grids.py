"""The fuller grids behind the notebooks: `python -m workbench.nano.grids --out figures` (on a GPU).

The notebooks run a small share live and draw it beside these rows. Several processes can share the work on one folder of
results: with the same `--claims` folder each takes the next job that none has; `--gather` then writes each grid as one
Parquet file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from workbench.base import Base
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe, compare
from workbench.nano import pools
from workbench.nano.blocks import GRIDS, Block
from workbench.nano.share import asks_for_own, asks_for_rankings, claimed, once, share_own, share_rankings
from workbench.pool import Pool
from workbench.results import run_key, write_parquet
from workbench.runs import Case, Workplace
from workbench.tasks import load

__all__ = ["gather", "job_path", "jobs", "run_grids", "run_job"]


def jobs(grids: Sequence[str]) -> list[tuple[str, Block, Recipe]]:
    """All jobs of some grids: one recipe of one block each."""
    return [(grid, block, recipe) for grid in grids for block in GRIDS[grid]() for recipe in block.recipes]


def run_grids(
    grids: Sequence[str],
    folder: Path,
    *,
    claims: Path | None = None,
    gathered: Path | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run the jobs of some grids, one Parquet file each; what is stored already is skipped.

    Args:
        claims: a folder in which processes that share the work note which jobs they have taken; empty it before a rerun.
        gathered: a folder with files that `gather` wrote; jobs whose rows are there are skipped, too.
    """
    base = Base.load(Pool.open("nano").base, device=device)
    places: dict[str, Workplace] = {}
    held = {grid: _held(grid, gathered) for grid in grids}
    todo = [job for job in jobs(grids) if _row_key(*job[1:]) not in held[job[0]]]
    for grid, block, recipe in todo:
        path, start = job_path(grid, block, recipe, folder), time.perf_counter()
        if path.is_file() or not claimed(claims, path.stem):
            continue
        if block.pool not in places:
            asked = [(b, r) for g, b, r in todo if b.pool == block.pool and not job_path(g, b, r, folder).is_file()]
            places[block.pool] = _place(base, block.pool, asked, folder, claims)
        frame = run_job(places[block.pool], block, recipe)
        write_parquet(frame, path)
        say(
            f"{grid}, {block.pool}, {block.n_train}: {recipe.label}: {len(frame)} rows in {time.perf_counter() - start:.0f} s"
        )
        if base.device.type == "cuda":
            torch.cuda.empty_cache()


def _place(
    base: Base, kind: str, asked: Sequence[tuple[Block, Recipe]], folder: Path, claims: Path | None
) -> Workplace:
    """A pool's workplace, with all that several of the jobs asked for would each make again."""
    if kind == "nano":
        place = Workplace(base, Pool.open("nano"))
    else:
        home = folder / "pools" / kind
        once([(home, lambda: pools.make(kind, home, base))], claims)
        place = Workplace(base, pools.make(kind, home, base))
    for share, wanted in ((share_rankings, asks_for_rankings), (share_own, asks_for_own)):
        blocks = {replace(block, recipes=()): None for block, recipe in asked if wanted(recipe)}
        for block in blocks:
            share(place, _cases(block), folder / "shared" / kind, claims)
    return place


def _cases(block: Block) -> list[Case]:
    sizes = {"n_train": block.n_train, "n_validation": block.n_validation, "n_test": block.n_test}
    return [
        Case(load(name, seed=0 if block.fixed else seed, **sizes), seed) for name in block.tasks for seed in block.seeds
    ]


def run_job(place: Workplace, block: Block, recipe: Recipe) -> pd.DataFrame:
    """The rows of one recipe of a block; `drawn`: each seed drew its own examples, `pool_kind`: whose adapters."""
    sizes = {"n_train": block.n_train, "n_validation": block.n_validation, "n_test": block.n_test}
    tasks = [load(name, seed=0, **sizes) for name in block.tasks] if block.fixed else block.tasks
    settings = {"baselines": (), "control": "", "seeds": block.seeds, "place": place, **sizes}
    return compare(place.base, place.pool, tasks, [recipe], **settings).assign(
        drawn=not block.fixed, pool_kind=block.pool
    )


def job_path(grid: str, block: Block, recipe: Recipe, folder: Path) -> Path:
    """Where a job's rows are stored."""
    what = [grid, repr(replace(block, recipes=())), repr(recipe), recipe.version]
    return folder / grid / f"{run_key({'job': what})}.parquet"


def gather(name: str, folder: Path, out: Path, *, partial: bool = False) -> Path:
    """Write the rows of all jobs of a grid as out/grid_NAME.parquet, numbers in single precision.

    A job that is not in the folder keeps the rows that the file there already holds of it. `partial`: jobs without any
    rows are left out.

    Raises:
        WorkbenchError: jobs that have not run yet.
    """
    path, found, missing, held = out / f"grid_{name}.parquet", {}, [], _held(name, out)
    ours = jobs([name])
    for _, block, recipe in ours:
        key, stored = _row_key(block, recipe), job_path(name, block, recipe, folder)
        if stored.is_file():
            found[key] = _slim(pd.read_parquet(stored))
        elif key in held:
            found[key] = held[key]
        else:
            missing.append(key)
    if missing and not (partial and found):
        raise WorkbenchError(
            f"{len(missing)} of {len(ours)} jobs of {name} are not stored in {folder}; run them first, such as {missing[0][0]}"
        )
    out.mkdir(parents=True, exist_ok=True)
    table = pd.concat(found.values(), ignore_index=True)
    table.sort_values(["recipe", "task", "seed", *_JOB[1:]]).to_parquet(path, index=False, compression="zstd")
    return path


_JOB = ["recipe", "n_train", "drawn", "pool_kind"]  # what tells the jobs of a grid apart


def _row_key(block: Block, recipe: Recipe) -> tuple:
    return recipe.label, block.n_train, not block.fixed, block.pool


def _held(name: str, folder: Path | None) -> dict[tuple, pd.DataFrame]:
    """The rows of each job that a gathered file holds."""
    path = folder / f"grid_{name}.parquet" if folder else None
    return dict(iter(pd.read_parquet(path).groupby(_JOB))) if path and path.is_file() else {}


def _slim(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.drop(columns=["versions", "platform", "split"])
    return rows.astype({column: "float32" for column in rows.select_dtypes("float64")})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the grids behind the notebooks.")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--results", type=Path, default=Path("runs/results"))
    parser.add_argument("--grid", choices=sorted(GRIDS), action="append")
    parser.add_argument("--claims", type=Path, help="a folder by which several processes share the jobs")
    parser.add_argument("--missing", action="store_true", help="run only jobs of which the files in --out hold no rows")
    parser.add_argument("--gather", action="store_true", help="only gather what is stored")
    parser.add_argument("--partial", action="store_true", help="gather what is stored, though jobs may be missing")
    parser.add_argument("--tf32", action="store_true", help="let matrix products use TF32 (faster, less precise)")
    args = parser.parse_args(argv)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    if not args.gather:
        gathered = args.out if args.missing else None
        run_grids(args.grid or list(GRIDS), args.results, claims=args.claims, gathered=gathered)
    if args.gather or args.claims is None:
        for name in args.grid or GRIDS:
            print(gather(name, args.results, args.out, partial=args.partial))


if __name__ == "__main__":
    main()
