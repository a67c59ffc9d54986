"""Stored results at size: `python tests/benchmarks/results.py`, a table of times in Markdown.

Rows are like those of `compare`, 50 columns. Single files are gathered; then a folder of many gathered rows, with some
single ones beside them, is asked as a person or a comparison would. Each question starts from a new `Results`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from workbench.results import Results, run_key

RECIPES = [f"{method}, evaluation {k}" for method in ("coefficients", "ties", "lorahub", "lego") for k in (3, 10, 30)]
WORDS = ("kind", "domain", "format", "select", "control", "metric", "options", "tune", "tuned", "dtype", "device")
NUMBERS = (
    "accuracy",
    "loss",
    "train_accuracy",
    "train_loss",
    "validation_accuracy",
    "validation_loss",
    "norm",
    "scale",
)
NUMBERS += (
    "stable_rank",
    "seconds",
    "tokens_per_example",
    "accuracy_unscaled",
    *(f"coefficient_{n}" for n in range(5)),
)
COUNTS = ("k", "skip", "n_train", "n_validation", "n_test", "rank", "parameters", "passes", "tokens", "peak_memory")
HASHES = ("pool", "base", "split")


def row(i: int) -> dict:
    """A row of 50 columns."""
    draw = random.Random(i)
    found: dict = {
        "key": run_key({"i": i}),
        "task": f"nano/task-{i % 60}",
        "recipe": RECIPES[i % len(RECIPES)],
        "seed": i % 5,
    }
    found |= {name: f"{name} {draw.randrange(4)}" for name in WORDS}
    found |= {name: draw.random() if draw.random() < 0.95 else None for name in NUMBERS}
    found |= {name: draw.randrange(1000) for name in COUNTS}
    found |= {name: run_key({name: draw.randrange(60)}) for name in HASHES}
    found |= {"own": draw.random() < 0.5, "diverged": False, "commit": "31ca26e54213d6c5c213d2b49cbbcdca44ce9b09"}
    return found | {
        "chosen": str([f"adapter-{draw.randrange(72)}" for _ in range(10)]),
        "versions": '{"torch": "2.11"}',
    }


def timed(what: str, work: Callable[[], object], times: int = 3) -> object:
    """Print the least time of some, and of the processor's."""
    took, spent, found = [], [], None
    for _ in range(times):
        start, before = time.perf_counter(), time.process_time()
        found = work()
        took.append(time.perf_counter() - start)
        spent.append(time.process_time() - before)
    print(f"| {what} | {min(took):.2f} | {min(spent):.2f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--single", type=int, default=2_000, help="single files")
    parser.add_argument("--gathered", type=int, default=100_000, help="gathered rows")
    args = parser.parse_args()
    mean = "select recipe, avg(accuracy) as mean, count(*) as n from results group by recipe order by recipe"
    with tempfile.TemporaryDirectory() as home:
        single, many = Path(home, "single"), Path(home, "many")
        print("| what | s | processor, s |\n|---|---|---|")
        rows = [row(i) for i in range(args.single)]
        timed(f"write {len(rows)} single files", lambda: [Results(single).write(one) for one in rows], 1)
        timed(f"keys of {len(rows)} single files", lambda: Results(single).keys())
        timed(f"a mean by recipe over {len(rows)} single files", lambda: Results(single).query(mean))
        timed(f"compact {len(rows)} single files", lambda: Results(single).compact(), 1)
        many.mkdir()
        table = pd.DataFrame([row(i) for i in range(args.gathered)]).assign(schema=1, written=time.time())
        table.to_parquet(many / "rows.parquet", index=False)
        os.rename(many / "rows.parquet", many / "compact.000000000000.parquet")
        print(
            f"| {len(table)} rows of {table.shape[1]} columns, {sum(f.stat().st_size for f in many.iterdir()) / 1e6:.0f} MB | | |"
        )
        timed("compact them with one more", lambda: Results(many).write(row(-1)) and Results(many).compact())
        keys = [run_key({"i": i}) for i in range(40, 100)]
        for beside in (0, 100):
            for i in range(beside):
                Results(many).write(row(i))  # of a stored key: the older is left out
            what = f"{len(table)} gathered rows" + f", {beside} written anew" * bool(beside)
            timed(f"{what}: keys", lambda: Results(many).keys())
            timed(f"{what}: a mean by recipe", lambda: Results(many).query(mean))
            timed(f"{what}: 60 rows by key", lambda: Results(many).read(keys))
            timed(f"{what}: all rows", lambda: Results(many).read())
        shutil.rmtree(single)


if __name__ == "__main__":
    main()
