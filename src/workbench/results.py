"""Stored results: one Parquet file a run, written atomically, read back as one table through DuckDB."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from workbench.errors import WorkbenchError

__all__ = ["Results", "provenance", "run_key", "write_parquet"]


def run_key(facts: Mapping) -> str:
    """A run's key: a hash of what determines it (never of the commit, the time or the machine's name)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def provenance() -> dict[str, str]:
    """What is recorded with a run without determining it: git commit ("-dirty": and changes since), versions, platform."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            return ""

    try:
        here = Path(__file__).parent
        what = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(what, cwd=here, capture_output=True, text=True, timeout=10)
        commit = commit.stdout.strip() if commit.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        commit = ""
    versions = {name: found(name) for name in ("workbench", "torch", "transformers", "peft")}
    return {"commit": commit, "versions": json.dumps(versions), "platform": platform.platform(terse=True)}


def write_parquet(frame: pd.DataFrame, target: Path) -> Path:
    """Write a table so that a reader sees all of it or nothing: a temporary file, fsync, rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.stem}.{uuid.uuid4().hex}.tmp"
    try:
        frame.to_parquet(temporary, index=False)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class Results:
    """A folder of rows. Folders of several machines merge by copying; a reader never sees half a row."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.parquet"

    def has(self, key: str) -> bool:
        """Is there a row of this key?"""
        return self.path(key).is_file()

    def write(self, row: Mapping) -> Path:
        """Store one row under its `key`: a temporary file, fsync, rename.

        Raises:
            WorkbenchError: the row has no key.
        """
        if not row.get("key"):
            raise WorkbenchError("a result needs a key (see workbench.results.run_key)")
        return write_parquet(pd.DataFrame([dict(row)]), self.path(row["key"]))

    def read(self, keys: Iterable[str] | None = None) -> pd.DataFrame:
        """All rows, or those of the given keys in that order; empty where there are none.

        Raises:
            WorkbenchError: a key that is not stored.
        """
        if keys is None:
            return (
                self.query("select * from results order by key")
                if any(self.folder.glob("*.parquet"))
                else pd.DataFrame()
            )
        keys = list(keys)
        once = list(dict.fromkeys(keys))
        absent = [key for key in once if not self.has(key)]
        if absent:
            raise WorkbenchError(
                f"{len(absent)} of {len(once)} runs are not stored in {self.folder}, such as {absent[0]}"
            )
        if not keys:
            return pd.DataFrame()
        return _read([self.path(key) for key in once]).set_index("key").loc[keys].reset_index()

    def query(self, sql: str) -> pd.DataFrame:
        """Run SQL over the rows, which are the table `results`."""
        files = sorted(self.folder.glob("*.parquet"))
        if not files:
            raise WorkbenchError(f"no results in {self.folder}")
        return _read(files, sql)


def _read(files: list[Path], sql: str = "select * from results") -> pd.DataFrame:
    import duckdb

    names = [glob.escape(str(file)) for file in files]  # a folder's name may hold [ ] * ?
    with duckdb.connect() as connection:
        connection.read_parquet(names, union_by_name=True).create_view("results")
        return connection.sql(sql).df()
