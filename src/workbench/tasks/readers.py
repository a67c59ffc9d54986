"""Rows of tables, from files and from what other libraries hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.errors import TaskError

__all__ = ["read_rows"]


def read_rows(source) -> Sequence:
    """The rows of a table, each a mapping of columns: a CSV (every cell text), TSV, JSON, JSON lines or Parquet file, a pandas
    data frame, a `datasets` table or a list of mappings.

    Raises:
        TaskError: a file that is not there, of another kind, or cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source))
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):  # a `datasets` table stays where it lies
        return source
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return [_plain(row) for row in source.to_dict("records")]
    if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        return source
    raise TaskError(
        f"expected a path, a data frame, a datasets table or a list of mappings, got a {type(source).__name__}"
    )


def _plain(value):
    """Without NumPy's and pandas' own types."""
    import pandas as pd

    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if pd.isna(value) else value


def _from_file(path: Path) -> Sequence:
    kind = path.suffix.lower()
    if not path.is_file():
        raise TaskError(f"there is no file {path}")
    try:
        if kind in (".csv", ".tsv"):
            import pandas as pd

            frame = pd.read_csv(path, sep="\t" if kind == ".tsv" else ",", dtype=str, keep_default_na=False)
            return frame.to_dict("records")
        if kind == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if kind == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind == ".json":
            rows = json.loads(text)
        else:
            raise TaskError(f"{path}: expected .csv, .tsv, .json, .jsonl or .parquet")
    except TaskError:
        raise
    except Exception as error:  # of pandas, pyarrow, json and the file system
        raise TaskError(f"{path} cannot be read: {error}") from error
    if isinstance(rows, Mapping):  # {"examples": […]}, as BIG-bench has it
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise TaskError(f"{path}: expected a list of mappings, or a mapping with one such list in it")
    return rows
