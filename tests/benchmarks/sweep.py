"""How much faster two workers carry out a sweep of 200 runs on the bundled pool than one process does, and whether alike.

    python tests/benchmarks/sweep.py [WORKERS]

Prints seconds of either way (what starts once, workers and models, included and apart), their ratio, and the columns in
which rows differ.
"""

import sys
import tempfile
import time
from pathlib import Path

from workbench.results import Results
from workbench.sweep import run
from workbench.sweep.reading import sweep_of

TIMED = ["seconds", "written", "peak_memory"]


def main() -> None:
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    given = {
        "name": "two hundred",
        "pool": "nano",
        "tasks": [
            "nano/second-days",
            "nano/mirror-months",
            "nano/rotate-right-months",
            "nano/third-days-dashes",
            "nano/ends-months",
        ],
        "seeds": list(range(5)),
        "n_train": 5,
        "n_validation": 5,
        "n_test": 20,
        "baselines": ["zero-shot", {"method": "new adapter", "steps": 20}],
        "recipes": [
            {"method": "coefficients", "select": "evaluation", "k": 5, "steps": 5},
            {"method": "ties", "select": "random", "k": 5},
            {"method": "lorahub", "k": 5, "budget": 10},
        ],
    }
    with tempfile.TemporaryDirectory() as temporary:
        found, took = {}, {}
        for name, number in (("one process", 0), (f"{workers} workers", workers)):
            folder, start = Path(temporary) / name, time.perf_counter()
            report = run(sweep_of(given | {"results": str(folder)}), workers=number)
            took[name] = time.perf_counter() - start
            assert not report.failed, report.errors
            found[name] = Results(folder).read().set_index("key").sort_index()
            own = found[name].written.max() - found[name].written.min()
            print(
                f"{name}: {report.ran} runs in {took[name]:.1f} s, {own:.1f} s of it from the first to the last result"
            )
        one, many = found.values()
        first, last = took.values()
        differing = [name for name in one if name not in TIMED and not one[name].equals(many[name])]
        print(f"ratio {first / last:.2f}; rows differ in: {', '.join(differing) or 'nothing'}")


if __name__ == "__main__":
    main()
