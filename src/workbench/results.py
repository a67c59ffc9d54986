"""Stored results: one Parquet file a run, written atomically, read back as one table through DuckDB."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from workbench.errors import SelectionError, WorkbenchError
from workbench.stored import Rows, durable, steadily

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
    with durable(target) as temporary:
        frame.to_parquet(temporary, index=False)
    return target


_FAILED = dict.fromkeys(("key", "asked", "error", "traceback", "run"), "varchar")
_COST = (
    "schema",
    "written",
    "seconds",
    "side_by_side",
    "peak_memory",
    *("commit", "versions", "platform", "device_name"),
)


class Results:
    """A folder of rows, one a key. Folders of several machines merge by copying; a reader never sees half a row.

    Every write is a new file, so that writers on a shared file system are never in each other's way; of a key's rows the
    last written counts. Failed runs lie apart, in the folder `failed`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._rows, self._failed = Rows(self.folder), Rows(self.folder / "failed", _FAILED)

    def keys(self) -> set[str]:
        """The keys of all stored runs, from one look at the folder."""
        return self._rows.keys()

    def has(self, key: str) -> bool:
        """Is there a row of this key? For many keys ask `keys` once."""
        return key in self.keys()

    def find(self, prefix: str) -> str:
        """The only key, of a stored or a failed run, that begins so.

        Raises:
            SelectionError: none does, or several.
        """
        every = self.keys() | self._failed.keys()
        found = [prefix] if prefix in every else sorted(key for key in every if key.startswith(prefix))
        if len(found) != 1:
            several = f"{len(found)} keys begin with {prefix!r}, such as {', '.join(found[:3])}; give more of it"
            raise SelectionError(several if found else f"no run in {self.folder} has a key that begins with {prefix!r}")
        return found[0]

    def write(self, row: Mapping) -> Path:
        """Store one row under its `key`: a temporary file, fsync, rename. Adds `schema` and `written`.

        Mappings and sequences are stored as JSON text, NaN as null.

        Raises:
            WorkbenchError: the row has no key, or one that no file can be named after.
        """
        return self._rows.add(row)

    def fail(self, key: str, facts: Mapping) -> Path:
        """Store that a run failed: error, traceback, run (its JSON), … It meets no average, see `failures`."""
        return self._failed.add({**dict.fromkeys(_FAILED, ""), **facts, "key": key})

    def read(self, keys: Iterable[str] | None = None) -> pd.DataFrame:
        """All rows, or those of the given keys in that order; empty where there are none.

        Raises:
            WorkbenchError: a key that is not stored, or a row of a newer schema than this version knows.
        """
        if keys is None:
            found = self._ask("select * from results order by key")
            return pd.DataFrame() if found is None or found.empty else found
        keys = list(keys)
        once = list(dict.fromkeys(keys))
        found = self._ask("select * from results", set(once)) if once else None
        there = set() if found is None else set(found["key"])
        absent = [key for key in once if key not in there]
        if absent:
            raise WorkbenchError(
                f"{len(absent)} of {len(once)} runs are not stored in {self.folder}, such as {absent[0]}"
            )
        return pd.DataFrame() if found is None else found.set_index("key").loc[keys].reset_index()

    def query(self, sql: str) -> pd.DataFrame:
        """Run SQL over the rows, which are the table `results`; those of `failures` are the table `failures`.

        Raises:
            WorkbenchError: nothing is stored, or the SQL does not run.
        """
        found = self._ask(sql)
        if found is None:
            raise WorkbenchError(f"no results in {self.folder}")
        return found

    def failures(self) -> pd.DataFrame:
        """The last failure of each key that is not stored by now: key, asked, error, traceback, run, …, written.

        `asked` is a name of what was to be run, for failures before a run's key is known: rows that have it end them too.
        """
        found = self._ask("select * from failures order by written, key")
        return pd.DataFrame(columns=[*_FAILED, "schema", "written"]) if found is None else found

    def _ask(self, sql: str, keys: set[str] | None = None) -> pd.DataFrame | None:
        """None where nothing is stored. Failures are listed first: a run that ends meanwhile is stored and no failure."""
        import duckdb

        def work(failed: list[str], rows: list[str]) -> pd.DataFrame | None:
            if not rows and not failed:
                return None
            with duckdb.connect() as connection:
                self._rows.attach(connection, "results", rows, keys)
                if "failures" in sql.lower():
                    self._failed.attach(connection, "failed", failed)
                    ended = " anti join results using (asked)" * ("asked" in connection.table("results").columns)
                    connection.execute(f"create view failures as from failed anti join results using (key){ended}")
                found = connection.sql(sql)
                return pd.DataFrame() if found is None else found.df()

        return steadily([self._failed, self._rows], work)

    def compact(self) -> Path | None:
        """Gather the files of single rows into one, and those of failures; None where there were no rows to gather.

        Nothing is lost, whoever writes, reads or compacts meanwhile and whenever it is killed (`stored.Rows.compact`).
        """
        self._failed.compact()
        return self._rows.compact()

    def export(self, path: str | Path) -> Path:
        """Write all rows to one file: .csv, .parquet or .json (a list of objects), by its suffix.

        Raises:
            WorkbenchError: another suffix, or nothing stored.
        """
        path = Path(path)
        if path.suffix not in (".csv", ".parquet", ".json"):
            raise WorkbenchError(f"{path}: results are exported as .csv, .parquet or .json, not as {path.suffix!r}")
        table = self.read()
        if table.empty:
            raise WorkbenchError(f"no results in {self.folder}")
        if path.suffix == ".parquet":
            return write_parquet(table, path)
        with durable(path) as temporary:
            if path.suffix == ".csv":
                table.to_csv(temporary, index=False)
            else:
                table.to_json(temporary, orient="records", indent=2, double_precision=15, force_ascii=False)
        return path

    def diff(self, other: Results, tolerance: float = 0.0) -> pd.DataFrame:
        """What sets two stores apart; empty where nothing does.

        Returns:
            A row for each run that only one has (`status` "only here" or "only there") and for each column of a run in which
            both differ ("differs"): numbers by more than the tolerance, anything else at all. Costs and provenance are not
            compared, nor columns that one store, or the row of an older schema, does not have. key, status, column, here,
            there, difference, and recipe, task and seed where rows have them.
        """
        a, b = self.read(), other.read()
        a, b = (table.set_index("key") if len(table) else table for table in (a, b))
        both = a.index.intersection(b.index)
        x, y = a.loc[both], b.loc[both]
        found = [(key, "only here", "", None, None, None) for key in a.index.difference(b.index)]
        found += [(key, "only there", "", None, None, None) for key in b.index.difference(a.index)]
        for name in x.columns.intersection(y.columns, sort=False):
            if name not in _COST:
                found += _differing(x[name], y[name], tolerance, x["schema"].fillna(0), y["schema"].fillna(0))
        table = pd.DataFrame(found, columns=["key", "status", "column", "here", "there", "difference"])
        named = [name for name in ("recipe", "task", "seed") if name in a or name in b]
        labels = pd.DataFrame({name: _either(a, b, name) for name in named})
        table = table.sort_values(["key", "column"], kind="stable", ignore_index=True)
        return table.join(labels, on="key") if found and named else table


def _either(a: pd.DataFrame, b: pd.DataFrame, name: str) -> pd.Series:
    """A column of the runs of two stores, of either that has it."""
    every = pd.concat([table[name].dropna() for table in (a, b) if name in table])
    return every[~every.index.duplicated()]


def _differing(x: pd.Series, y: pd.Series, tolerance: float, old: pd.Series, new: pd.Series) -> list[tuple]:
    """One column of the same runs in two stores, where it differs; `old` and `new` are the rows' schemas."""
    gap = pd.Series(float("nan"), index=x.index)
    if pd.api.types.is_numeric_dtype(x) and pd.api.types.is_numeric_dtype(y):
        gap = (x.astype(float) - y.astype(float)).abs()
        differs = gap > tolerance
    else:
        differs = x.notna() & y.notna() & (x.astype(str) != y.astype(str))
    differs |= (x.isna() != y.isna()) & ~((x.isna() & (old < new)) | (y.isna() & (new < old)))
    here, there = (one[differs].astype(object).where(one[differs].notna(), None) for one in (x, y))
    return [
        (key, "differs", x.name, *values)
        for key, *values in zip(x.index[differs], here, there, gap[differs], strict=True)
    ]
