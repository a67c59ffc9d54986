"""What processes that share the grids' jobs make once and then all read: pools, rankings by evaluation, own adapters.

A process that finds something claimed by another waits for it; one that waited too long makes it itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from workbench.adapters import Adapter
from workbench.errors import AdapterError
from workbench.experiment import Recipe
from workbench.results import write_parquet
from workbench.runs import Case, Workplace
from workbench.select import CLOSENESS, rank_adapters, remember_ranking

__all__ = ["asks_for_own", "asks_for_rankings", "claimed", "once", "share_own", "share_rankings"]

PATIENCE, PAUSE = 600.0, 0.5  # seconds that a process waits for another, and between two looks
CHUNK = {"rankings": 20, "own": 60}  # cases that one process takes at a time


def claimed(claims: Path | None, job: str) -> bool:
    """Take a job that no other process has taken; without a folder of claims every job is one's own."""
    if claims is None:
        return True
    claims.mkdir(parents=True, exist_ok=True)
    try:
        (claims / job).open("x").close()
    except FileExistsError:
        return False
    return True


def once(work: Sequence[tuple[Path, Callable[[], object]]], claims: Path | None) -> None:
    """Make every path that is not there: those that no other process has claimed, then wait for the others'."""
    left = []
    for path, make in work:
        if path.exists():
            continue
        if claimed(claims, f"{path.parent.name}-{path.name}"):
            make()
        else:
            left.append((path, make))
    for path, make in left:
        end = time.monotonic() + PATIENCE
        while not path.exists() and time.monotonic() < end:
            time.sleep(PAUSE)
        if not path.exists():
            make()


def asks_for_rankings(recipe: Recipe) -> bool:
    """Whether a recipe's selection goes by accuracy on training examples."""
    picks = recipe.method == "best single" and dict(recipe.options).get("among") != "random"
    return picks or recipe.select in ("evaluation", "diverse")


def asks_for_own(recipe: Recipe) -> bool:
    """Whether a recipe needs the targets' own adapters: merged with the others, or to measure closeness to."""
    return recipe.own or recipe.select in CLOSENESS


def share_rankings(place: Workplace, cases: Sequence[Case], folder: Path, claims: Path | None) -> None:
    """Rank the pool by evaluation on every case's training examples, as Parquet files; `select` finds them known."""
    chunks = _chunks(cases, CHUNK["rankings"], folder / "rankings", "parquet")

    def rank(path: Path, part: Sequence[Case]) -> None:
        ranked = [rank_adapters(place.pool, case.task, place.base).assign(case=case.digest) for case in part]
        write_parquet(pd.concat(ranked, ignore_index=True), path)

    once([(path, lambda path=path, part=part: rank(path, part)) for path, part in chunks], claims)
    for path, part in chunks:
        ranked = dict(iter(pd.read_parquet(path).groupby("case", sort=False)))
        for case in part:
            table = ranked[case.digest].drop(columns="case").reset_index(drop=True)
            remember_ranking(place.pool, case.task, place.base, table)


def share_own(place: Workplace, cases: Sequence[Case], folder: Path, claims: Path | None) -> None:
    """Train every case's own adapter, as PEFT folders, side by side; all processes use what was read from there."""
    chunks = _chunks(cases, CHUNK["own"], folder / "own", "done")

    def train(path: Path, part: Sequence[Case]) -> None:
        for case, adapter in zip(part, place.own(part), strict=True):
            try:
                adapter.save(_home(path, case), overwrite=True)  # of this part alone: another may hold the same case
            except AdapterError:  # it diverged: whoever needs it trains it again, and finds the same
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    once([(path, lambda path=path, part=part: train(path, part)) for path, part in chunks], claims)
    for path, part in chunks:
        there = [case for case in part if _home(path, case).is_dir()]
        place.keep_own(there, [Adapter.load(_home(path, case)) for case in there])


def _home(path: Path, case: Case) -> Path:
    return path.with_suffix("") / f"{case.digest[:24]}-{case.seed}"


def _chunks(cases: Sequence[Case], size: int, folder: Path, suffix: str) -> list[tuple[Path, list[Case]]]:
    """Parts of the cases, and a path for each that is named by what is in it."""
    distinct = list({(case.digest, case.seed): case for case in cases}.values())
    parts = [distinct[i : i + size] for i in range(0, len(distinct), size)]
    names = [hashlib.sha256("".join(f"{c.digest}{c.seed}" for c in part).encode()).hexdigest()[:24] for part in parts]
    return [(folder / f"{name}.{suffix}", part) for name, part in zip(names, parts, strict=True)]
