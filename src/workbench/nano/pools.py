"""Pools made beside the bundled one, for studies that it cannot answer: near-twins of the targets, and one rank for all.

    python -m workbench.nano.pools twins runs/pools/twins       # the bundled pool and a near-twin of every target
    python -m workbench.nano.pools rank-4 runs/pools/rank-4     # the upstream tasks again, every adapter of rank 4

A minute each on a GPU; they are not bundled.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workbench.adapt.fresh import PROJECTIONS, Plan
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.errors import WorkbenchError
from workbench.nano import world
from workbench.nano.forge import PRESETS, Preset, save_stranger, train_pool
from workbench.nano.shelf import ADAPTERS, BASE
from workbench.pool import Pool

__all__ = ["RANKS", "make"]

RANKS = (1, 4, 16)
_DRAW = 1000  # of the examples: no study draws its own under this seed
_TWIN, _SEEDS = Plan(8, 2.0, False, PROJECTIONS), {"twins": 5000, **{f"rank-{r}": 6000 + 100 * r for r in RANKS}}


def make(kind: str, folder: Path, base: Base, *, preset: Preset = PRESETS["nano"], most: int | None = None) -> Pool:
    """Train a pool into a folder, unless it is there already, and open it.

    twins: the bundled adapters, and for every target an adapter of rank 8 trained on 4,000 examples of the target task
    itself; none of them is a test example, and they are drawn under a seed that no study uses.
    rank-N: one adapter of rank N and α/r = 2 on all projections for every upstream task, so that factor space is possible.

    Args:
        base: what to train on; for twins the bundled base, `Base.load(Pool.open("nano").base)`.
        preset: its examples and schedule.
        most: only so many of the tasks.

    Raises:
        WorkbenchError: an unknown kind, no tasks, twins on another base than the bundled one, or a folder that is there
            already and holds another pool, or fewer adapters.
    """
    if kind not in _SEEDS:
        raise WorkbenchError(f"no pool {kind!r}; choose one of {', '.join(_SEEDS)}")
    if most is not None and most < 1:
        raise WorkbenchError(f"most is {most}, expected at least one task, or None for all")
    twins, on_bundled = kind == "twins", base.name == str(BASE)
    if twins and not on_bundled:
        raise WorkbenchError(
            f"twins lie beside the bundled adapters, so they need the bundled base, got {base.name!r}; load it with "
            'Base.load(Pool.open("nano").base)'
        )
    specs = list(world.TARGETS if twins else world.UPSTREAM)[:most]
    plan = _TWIN if twins else replace(_TWIN, rank=int(kind.removeprefix("rank-")))
    if not folder.is_dir():
        seeds = [_SEEDS[kind] + i for i in range(len(specs))]
        adapters, _ = train_pool(base, specs, [plan] * len(specs), preset, seeds, _DRAW)
        if on_bundled:  # under one name with the bundled adapters: screening refuses those of another base
            name = Adapter.load(ADAPTERS / world.UPSTREAM[0].slug).base
            adapters = [replace(one, base=name) for one in adapters]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / folder.name
            if kind == "twins":
                shutil.copytree(ADAPTERS, whole)
            for adapter in adapters:
                save_stranger(adapter, plan, whole / adapter.name)
            os.replace(whole, folder)
    pool = Pool.open(folder, base=base.name or None)
    ranks, trained = pool.table.set_index("name")["rank"], [spec.slug for spec in specs]
    wanted = trained + [spec.slug for spec in world.UPSTREAM] * twins
    lacking = [name for name in wanted if name not in pool.names]
    if lacking or any(ranks[name] != plan.rank for name in trained):
        why = (
            f"{lacking[0]!r} and {len(lacking) - 1} more are lacking or refused"
            if lacking
            else f"rank is not {plan.rank}"
        )
        raise WorkbenchError(f"{folder} is not the pool {kind!r}: {why}; give another folder, or remove it")
    return pool


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: a kind and a folder."""
    parser = argparse.ArgumentParser(description="Train a pool beside the bundled one.")
    parser.add_argument("kind", choices=sorted(_SEEDS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    base = Base.load(Pool.open("nano").base)
    print(f"{len(make(args.kind, args.folder, base))} adapters in {args.folder}")


if __name__ == "__main__":
    main()
