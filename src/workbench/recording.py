"""Numbers that a notebook records in its output, exactly, and that are read back from an executed copy of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

from workbench.errors import WorkbenchError

__all__ = ["MIME", "record", "recorded"]

MIME = "application/vnd.workbench.metrics+json"


def record(**metrics) -> None:
    """Show numbers as a small table and attach them to the cell's output, to the last digit, for `recorded` to read.

    record(units=len(frame), accuracy=table.groupby("recipe").accuracy.mean()) records `units` and, for each recipe,
    `accuracy.<recipe>`. What is recorded should be the same again at the same parameters: results, no times.

    Args:
        metrics: numbers, or pandas Series of numbers, whose index (its levels with commas between them) goes behind the
            name and a full stop.

    Raises:
        WorkbenchError: nothing to record, what is no finite number (a bool is none), or two numbers of one name.
    """
    from IPython.display import display

    found: dict[str, float] = {}
    for name, value in (pair for metric in metrics.items() for pair in _flat(*metric)):
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise WorkbenchError(f"{name}: expected a finite number to record, got {value!r}")
        if name in found:
            raise WorkbenchError(f"{name} is recorded twice: give a Series whose index has each entry once")
        found[name] = float(value)
    if not found:
        raise WorkbenchError("nothing to record: give numbers by name, or a Series that is not empty")
    width = max(map(len, found))
    table = "\n".join(f"{name.ljust(width)}  {value:.6g}" for name, value in found.items())
    display({MIME: found, "text/plain": table}, raw=True)


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    import pandas as pd

    if not isinstance(value, pd.Series):
        yield name, value
        return
    for index, one in value.items():
        levels = index if isinstance(index, tuple) else (index,)
        yield f"{name}.{', '.join(map(str, levels))}", one


def recorded(path: str | Path) -> dict[str, float]:
    """The numbers that an executed notebook recorded, by name; {} where it recorded none.

    Raises:
        WorkbenchError: the same name in two calls of `record`.
    """
    import nbformat

    found: dict[str, float] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for name, value in output.get("data", {}).get(MIME, {}).items():
                if name in found:
                    raise WorkbenchError(f"{path}: {name} is recorded twice; give each call of `record` its own names")
                found[name] = float(value)
    return found
