"""The study of LoRA-LEGO behind notebook 05: `python -m workbench.nano.lego_grid --out figures` (minutes on a GPU).

Five studies over adapters drawn from the bundled pool, made of jobs that several processes can share, each with its own
`--part`, on one folder of results; a job that is stored already is skipped. `--gather` then writes one Parquet file.

- merge: 7 adapters of rank 8, 7 and 30 of mixed ranks into one, every method, its random control, a new adapter
- sweep: LEGO by number of clusters, canonical form and reweighting, on the first draws of `merge`
- scale: the norms and output variances that the two reweightings are to mend, on the same draws
- composition: the adapters of a composed task's two parts
- prune: one adapter cut to fewer units
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.base import Base
from workbench.canonical import CANONICAL
from workbench.errors import WorkbenchError
from workbench.merge import methods
from workbench.nano import world
from workbench.nano.lego_study import STUDIES, Examples, Job, needs
from workbench.pool import Pool
from workbench.results import provenance, run_key, write_parquet
from workbench.tasks import load

__all__ = ["SIZES", "Size", "gather", "jobs", "run"]


@dataclass(frozen=True)
class Size:
    """How much is run: draws by (stratum, adapters), how many of them are swept, and the rest."""

    draws: dict[tuple[str, int], int]
    sweeps: dict[tuple[str, int], int]
    forms: tuple[str, ...] = CANONICAL
    compositions: int = 12
    seeds: int = 2
    prunings: int = 4
    examples: Examples = Examples()


SIZES = {
    "full": Size(
        draws={("equal", 7): 8, ("mixed", 7): 8, ("mixed", 30): 6}, sweeps={("equal", 7): 4, ("mixed", 30): 2}
    ),
    "tiny": Size(
        draws={("equal", 2): 1, ("mixed", 3): 1},
        sweeps={("equal", 2): 1},
        forms=("raw", "svd"),
        compositions=2,
        seeds=1,
        prunings=1,
        examples=Examples(8, 4, 10, 5),
    ),
}


def jobs(size: Size) -> list[Job]:
    """All jobs, the longest first."""
    swept = [(stratum, n, d) for (stratum, n), count in size.sweeps.items() for d in range(count)]
    composed = [spec.slug for spec in world.TARGETS if spec.kind == "composition"][: size.compositions]
    found = [Job(study, *one, form) for study in ("sweep", "scale") for one in swept for form in size.forms]
    found += [Job("merge", stratum, n, d) for (stratum, n), count in size.draws.items() for d in range(count)]
    found += [Job("composition", slug, 2, d) for slug in composed for d in range(size.seeds)]
    found += [Job("prune", "", 1, d) for d in range(size.prunings)]
    return sorted(found, key=lambda job: (-job.n, job.study != "sweep"))


def _path(job: Job, size: Size, base: Base, pool: Pool, folder: Path) -> Path:
    versions = {name: method.version for name, method in methods().items()}
    facts = {"job": repr(job), "examples": repr(size.examples), "versions": versions, "dtype": str(base.dtype)}
    return folder / f"{job.study}-{run_key(facts | {'base': base.digest, 'pool': pool.digest})}.parquet"


def run(
    folder: Path,
    size: Size,
    *,
    studies: Sequence[str] = tuple(STUDIES),
    part: int = 0,
    parts: int = 1,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run one share of the jobs; what is stored already is skipped."""
    pool = Pool.open("nano")
    base = Base.load(pool.base, device=device)
    for job in [job for job in jobs(size) if job.study in studies][part::parts]:
        path, start = _path(job, size, base, pool, folder), time.perf_counter()
        if path.is_file():
            continue
        frame = STUDIES[job.study](base, pool, job, size.examples)
        frame = frame.assign(study=job.study, stratum=job.stratum, draw=job.draw, adapters=job.n, pool=pool.digest)
        frame = frame.assign(base=base.digest, device=base.device.type, commit=provenance()["commit"])
        write_parquet(frame, path)
        say(f"{job}: {len(frame)} rows in {time.perf_counter() - start:.0f} s")


def gather(folder: Path, out: Path, size: Size) -> Path:
    """Write the rows of all jobs as out/grid_lego.parquet, numbers in single precision.

    Raises:
        WorkbenchError: jobs that have not run yet.
    """
    pool = Pool.open("nano")
    base = Base.load(pool.base, device="cpu")
    paths = [_path(job, size, base, pool, folder) for job in jobs(size)]
    if missing := [path for path in paths if not path.is_file()]:
        raise WorkbenchError(f"{len(missing)} of {len(paths)} jobs are not stored in {folder}; run them first")
    table = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    task = {name: load(name, n_train=1, n_validation=1, n_test=1) for name in table.task.dropna().unique()}
    table["needs"] = table.task.map({name: needs(one) for name, one in task.items()})
    counts = ["limit", "k", "rank", "own_rank", "n_validation", "n_test", "seed", "adapters", "draw"]
    table[counts] = table[counts].fillna(0).astype("int32")
    table = table.astype({name: "float32" for name in table.select_dtypes("float64")})
    texts = table.select_dtypes(["object", "str"]).columns
    table[texts] = table[texts].fillna("")
    out.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out / "grid_lego.parquet", index=False, compression="zstd")
    return out / "grid_lego.parquet"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the study of LoRA-LEGO.")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--results", type=Path, default=Path("runs/lego"))
    parser.add_argument("--study", choices=sorted(STUDIES), action="append")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--part", default="0/1", help="I/N: the I-th of N shares of the jobs")
    parser.add_argument("--gather", action="store_true", help="only gather what is stored")
    args = parser.parse_args(argv)
    part, parts = (int(n) for n in args.part.split("/"))
    size = SIZES[args.size]
    if not args.gather:
        run(args.results, size, studies=args.study or tuple(STUDIES), part=part, parts=parts)
    if args.gather or (parts == 1 and not args.study):
        print(gather(args.results, args.out, size))


if __name__ == "__main__":
    main()
