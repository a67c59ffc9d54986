"""The recycling study's LoraHub runs with their weights: JSON lines, or a file each as in the study's repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError
from workbench.plain import show
from workbench.studies.reading import fraction, json_lines, operation_of, read_json, refuse

__all__ = ["RUN", "RUNS", "read_runs"]

RUNS = "lorahub_gradient_free.jsonl"
RUN = r"lorahub_grad_free_(?P<task>\w+)_(?P<experts>\d+)expert_(?P<budget>\d+)iter_(?P<data>\d+)datasize_(?P<with_target>True|False)bestexp_(?P<selection>\w+)_result\.json"


def read_runs(source: Path | Iterable[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames `lorahub` and `weights` of `Recycling`, from one JSON-lines file or from a file per run.

    Raises:
        WorkbenchError: damaged lines, by number, or a damaged file.
    """
    runs, weights = [], []
    for number, run in enumerate(_lines(source) if isinstance(source, Path) else _files(source)):
        weights += [(number, place, name, weight) for place, (name, weight) in enumerate(run.pop("weights"))]
        runs.append({"run": number, **run})
    return pd.DataFrame(runs), pd.DataFrame(weights, columns=["run", "place", "name", "weight"])


def _lines(path: Path) -> Iterator[dict]:
    """LoraHub's runs from JSON lines, one line in memory at a time; damaged lines are named at the end."""
    bad = {}
    for number, row in json_lines(path):
        try:
            yield _run(row)
        except (TypeError, ValueError) as error:
            bad[number] = str(error)
    refuse(path, bad)


def _files(paths: Iterable[Path]) -> Iterator[dict]:
    """The same from a file each, settings in its name."""
    for path in paths:
        row = re.fullmatch(RUN, path.name).groupdict() | read_json(path)
        valid = row.get("valid_accuracy", row.get("train+valid_accuracy"))
        try:
            yield _run(row | {"valid": valid, "adapters": row.get("expert_name")})
        except (TypeError, ValueError) as error:
            raise WorkbenchError(f"{path.name}: {error}") from error


def _run(row: object) -> dict:
    """A run in our own columns, and its weights.

    Raises:
        ValueError, TypeError: a field is missing, or not what it should be.
    """
    if not isinstance(row, dict):
        raise row if isinstance(row, ValueError) else ValueError(f"{show(row)} is no object")
    wanted = (
        "task",
        "experts",
        "budget",
        "data",
        "with_target",
        "selection",
        "test_accuracy",
        "valid",
        "weights",
        "adapters",
    )
    if lacking := [name for name in wanted if name not in row]:
        raise ValueError(f"no {', '.join(lacking)}")
    k, budget, examples = (int(row[name]) for name in ("experts", "budget", "data"))
    own = {"true": True, "false": False}.get(str(row["with_target"]).lower())
    names, weights = row["adapters"], row["weights"]
    if own is None or not isinstance(weights, list) or not isinstance(names, list) or len(weights) != k:
        raise ValueError(f"expected {k} weights, a list of adapters and with_target true or false")
    weights = [float(weight) for weight in weights]
    if not np.isfinite(weights).all():
        raise ValueError("a weight is not finite")
    task = str(row["task"])
    return {
        "method": "lorahub",
        "task": task,
        "operation": operation_of(task),
        "k": k,
        "own": own,
        "select": str(row["selection"]),
        "budget": budget,
        "examples": examples,
        "accuracy": fraction(row["test_accuracy"]),
        "validation_accuracy": fraction(row["valid"]),
        "chosen": json.dumps(names),
        "weights": list(zip(names if len(names) == k else [None] * k, weights, strict=True)),
    }
