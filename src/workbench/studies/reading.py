"""Files of published tables: found by name, read strictly; what is damaged is named by file and line."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from workbench.errors import WorkbenchError
from workbench.plain import show

__all__ = ["Files", "fraction", "json_lines", "operation_of", "read_json", "read_table", "refuse"]

_BLANK = ("", "-", "nan", "none", "null", "na", "n/a")
_TOLD = 5  # damaged lines and cells that an error names


class Files:
    """The files below a folder, by name; hidden folders left out.

    Raises:
        WorkbenchError: no such folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "nothing"
            raise WorkbenchError(f"{self.folder}: expected the folder of a study's files or a clone, found {found}")
        self._found: dict[str, list[Path]] = {}
        for where, inner, names in os.walk(self.folder):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(names):
                self._found.setdefault(name, []).append(Path(where) / name)

    def matching(self, pattern: str, parent: str | None = None) -> list[Path]:
        """Files whose whole name matches, sorted by name; `parent` is the name of the folder that they must be in."""
        every = [path for name in sorted(self._found) if re.fullmatch(pattern, name) for path in self._found[name]]
        return [path for path in every if parent in (None, path.parent.name)]

    def one(self, name: str) -> Path | None:
        """The file of that name, the one nearest to the top; None where there is none.

        Raises:
            WorkbenchError: several are equally near.
        """
        paths = sorted(self._found.get(name, []), key=lambda path: len(path.parts))
        if len(paths) > 1 and len(paths[0].parts) == len(paths[1].parts):
            where = " and ".join(str(path.parent.relative_to(self.folder)) for path in paths[:2])
            raise WorkbenchError(f"{self.folder} holds {name} in {where}: give the folder of the one that is meant")
        return paths[0] if paths else None


def read_table(path: Path, key: str, ignored: Sequence[str] = ()) -> tuple[list[str], pd.DataFrame]:
    """A CSV file's columns as they are named, and its numbers from 0 to 1, one row per `key`; a blank cell is NaN.

    Columns of the frame are numbered, for the same name may stand there twice. `ignored` columns are left out.

    Raises:
        WorkbenchError: a line with another number of cells than the header, a cell that is no number from 0 to 1, no column
            `key`, a key that is there twice.
    """
    rows, bad = [], {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if key not in header:
                raise WorkbenchError(f"{path.name} has no column {key!r}; it has {show(header)}")
            kept = [i for i, name in enumerate(header) if name != key and name not in ignored]
            for row in reader:
                if len(row) == len(header):
                    rows.append((reader.line_num, row))
                elif row:
                    bad[reader.line_num] = f"{len(row)} cells, expected {len(header)}"
    except (csv.Error, UnicodeDecodeError) as error:
        raise WorkbenchError(f"{path.name}: line {reader.line_num + 1} is damaged: {error}") from error
    refuse(path, bad)
    at, seen, values = header.index(key), {}, []
    for number, row in rows:
        name = row[at].strip()
        if not name or name in seen:
            bad[number] = f"{name!r} is in line {seen[name]} too" if name else f"no {key}"
        seen[name] = number
        try:
            values.append([fraction(row[i]) for i in kept])
        except ValueError as error:
            bad[number] = str(error)
    refuse(path, bad)
    return [header[i] for i in kept], pd.DataFrame(values, pd.Index(seen, name=key, dtype=str), dtype=float)


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of each line of a JSON-lines file, one line in memory at a time; a ValueError is the value of a bad one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"no JSON: {error}")


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        WorkbenchError: it does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WorkbenchError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WorkbenchError(f"{path.name} holds a {type(found).__name__}, expected an object")
    return found


def fraction(cell: object) -> float:
    """A cell as a number from 0 to 1, numbers as text too; NaN where it is blank.

    Raises:
        ValueError: it is neither.
    """
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _BLANK):
        return math.nan
    try:
        value = float(cell)  # of a list: TypeError
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(cell, bool) or not 0 <= value <= 1:
        raise ValueError(f"{show(cell)} is no number from 0 to 1")
    return value


def refuse(path: Path, bad: dict[int, str]) -> None:
    """Name the damaged lines of a file, and what is wrong with the first; nothing where there are none.

    Raises:
        WorkbenchError: there are damaged lines.
    """
    if bad:
        named = ", ".join(str(number) for number in sorted(bad)[:_TOLD])
        first = min(bad)
        more = f" and {len(bad) - _TOLD} more" if len(bad) > _TOLD else ""
        raise WorkbenchError(f"{path.name}: damaged line {named}{more}; line {first}: {bad[first]}")


def operation_of(task: str) -> str:
    """The task itself, or the data set that it is one language or grade of: what intervals are clustered by."""
    return re.sub(r"^(arc|masakhanews|xnli)_.*", r"\1", task)
