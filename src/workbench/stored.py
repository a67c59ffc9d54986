"""A folder of rows: Parquet files that never change, read as one table and gathered into one beside those who write."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

__all__ = ["SCHEMA", "Rows", "check_key", "durable", "steadily"]

SCHEMA = 1  # of the rows written now; rows from before schemas were numbered have none
COMPACT = "compact"  # the name of files that hold many rows
PATIENCE = (
    90.0  # seconds for which a listing may name files that are gone: network file systems keep listings for a minute
)
LEFT_OVER = 86400.0  # seconds after which a temporary file has no writer any more
_KEY = re.compile(r"[0-9A-Za-z_-]{1,180}")
_FILE = re.compile(r"(?P<key>[0-9A-Za-z_-]+)\.[0-9a-f]{12}\.parquet")
_PLACE = {"stored in": "varchar", "file_row_number": "bigint"}  # of a row
_FIRST = {"key": "varchar", "schema": "bigint", "written": "double"}

T = TypeVar("T")


def check_key(key: object) -> str:
    """The key, where files can be named after it.

    Raises:
        WorkbenchError: there is none, or it has other characters than letters, digits, - and _.
    """
    if not key:
        raise WorkbenchError("a result needs a key (see workbench.results.run_key)")
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key == COMPACT:
        raise WorkbenchError(
            f"key {key!r:.80}: expected up to 180 letters, digits, - and _, and not {COMPACT!r} (see workbench.results.run_key)"
        )
    return key


@contextmanager
def durable(target: Path) -> Iterator[Path]:
    """A path to write to: once the block is done the file is synced and renamed to the target, and the folder is synced.

    A reader sees all of the file or nothing; where the block fails, nothing stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.stem}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def steadily(folders: Sequence[Rows], work: Callable[..., T]) -> T:
    """`work` over the folders' listings; again from new listings where a listed file was gone before it was read.

    Raises:
        WorkbenchError: a file that cannot be read, or SQL that does not run.
    """
    import duckdb
    import pyarrow

    end, pause = time.monotonic() + PATIENCE, 0.005
    while True:
        names = [folder.names() for folder in folders]
        try:
            return work(*names)
        except (duckdb.Error, pyarrow.ArrowException, OSError) as error:
            listed = [f.folder / name for f, some in zip(folders, names, strict=True) for name in some]
            if time.monotonic() > end or all(map(os.path.lexists, listed)):
                said = " ".join(str(error).partition("\n\nLINE ")[0].split())  # DuckDB's, without the SQL again
                raise WorkbenchError(f"{folders[-1].folder}: {said}") from error
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


class Rows:
    """A folder of rows with keys, in Parquet files that are written once and never changed.

    `<key>.<12 hex digits>.parquet` is one row, `compact.<12 hex digits>.parquet` many; any other Parquet file is read
    too, its keys being those inside. `known` are columns, name → SQL type, that the table has even where no row has them.
    """

    def __init__(self, folder: Path, known: Mapping[str, str] = _FIRST):
        self.folder, self.known = folder, {**known, **_FIRST}
        self._read: dict[str, tuple[tuple, frozenset]] = {}  # name → (size, time) and keys of a file of many rows

    def add(self, row: Mapping) -> Path:
        """Write a row to a file of its own, which no other row has or will have; adds `schema` and `written`.

        Mappings and sequences become JSON text, NaN null, and text that is not Unicode is escaped.

        Raises:
            WorkbenchError: the row has no key, or one that no file can be named after.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = self.folder / _named(check_key(row.get("key")))
        plain = {str(name): _plain(value) for name, value in row.items()} | {"schema": SCHEMA, "written": time.time()}
        table = pa.table({name: pa.array([value], _kind(value), from_pandas=True) for name, value in plain.items()})
        with durable(target) as temporary:
            pq.write_table(table, temporary, use_dictionary=False, compression="none", store_schema=False)  # one row
        return target

    def names(self) -> list[str]:
        """The files' names, sorted.

        A listing during which one file is written and another deleted may have neither; so the folder is listed until
        the next listing lacks nothing of the one before.
        """
        found = self._list()
        while True:
            before, found = found, self._list()
            if before <= found:
                return sorted(found)

    def _list(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder) if name.endswith(".parquet") and not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def inside(self, name: str) -> Set[str]:
        """The keys of a file: of a single row by its name, of others read once.

        Raises:
            WorkbenchError: a file without the column `key`.
        """
        import pyarrow.parquet as pq

        if key := _single(name):
            return {key}
        path = self.folder / name
        stat = path.stat()
        mark = (stat.st_size, stat.st_mtime_ns)
        if self._read.get(name, (None,))[0] != mark:
            with pq.ParquetFile(path) as file:
                if "key" not in file.schema_arrow.names:
                    raise _not_rows(path)
                keys = file.read(columns=["key"]).column("key").to_pylist()
            self._read[name] = mark, frozenset(keys)
        return self._read[name][1]

    def keys(self) -> set[str]:
        """The keys of all rows, from one look at the folder."""

        def work(names: list[str]) -> set[str]:
            self._read = {name: self._read[name] for name in names if name in self._read}
            return set().union(*map(self.inside, names))

        return steadily([self], work)

    def attach(
        self,
        connection: duckdb.DuckDBPyConnection,
        view: str,
        names: Sequence[str],
        keys: Set[str] | None = None,
    ) -> None:
        """Make the rows in the named files (of the given keys) a view with one row a key: the last written, ties by file name.

        Columns that differ in type between files take the one that holds both. They stand in the order of the newest row.

        Raises:
            WorkbenchError: rows of a newer schema than this version knows, or without keys.
        """
        import pyarrow.parquet as pq

        if keys is not None:
            names = [name for name in names if not keys.isdisjoint(self.inside(name))]
        single, many = [n for n in names if _single(n)], [n for n in names if not _single(n)]
        none = ", ".join(f'null::{kind} as "{name}"' for name, kind in (self.known | _PLACE).items())
        parts = [f"select {none} where false", *map(self._scan, filter(None, (single, many)))]
        if single:  # opening them is what takes time: once
            connection.execute(f"create table {view}_single as {parts[1]}")
            parts[1] = f"from {view}_single"
        every = " union all by name ".join(parts)
        if keys is not None:
            connection.execute(f"create table {view}_keys as select unnest(?::varchar[]) as key", [sorted(keys)])
            every = f"from ({every}) semi join {view}_keys using (key)"
        place = ", ".join(map(_quoted, _PLACE))
        connection.execute(f"create table {view}_index as select key, schema, written, {place} from ({every})")
        last = f"written desc nulls last, {place.replace(',', ' desc,')} desc"
        ask = f"select {place}, schema, key from {view}_index order by key is null desc, schema desc nulls last, {last} limit 1"
        path, _, schema, key = connection.execute(ask).fetchone() or (None, 0, 0, "")
        if key is None:
            raise _not_rows(path)
        if (schema or 0) > SCHEMA:
            raise WorkbenchError(
                f"{path}: a row of schema {schema}, but this version of workbench knows schemas up to {SCHEMA}; "
                "update workbench to read it"
            )
        twice = f"select key from {view}_index group by key having count(*) > 1"
        connection.execute(
            f"create table {view}_old as select {place} from {view}_index where key in ({twice}) "
            f"qualify row_number() over (partition by key order by {last}) > 1"
        )
        there = connection.sql(every).columns
        columns = [*(pq.read_schema(path).names if path else ()), *self.known, *there]
        chosen = ", ".join(_quoted(name) for name in dict.fromkeys(columns) if name in there and name not in _PLACE)
        if connection.execute(f"from {view}_old limit 1").fetchone():
            every = f"from ({every}) anti join {view}_old using ({place})"
        connection.execute(f"create view {view} as select {chosen} from ({every})")

    def _scan(self, names: Sequence[str]) -> str:
        paths = (glob.escape(str(self.folder / name)).replace("'", "''") for name in names)  # it may hold [ ] * ? '
        files = ", ".join(f"'{path}'" for path in paths)
        options = "union_by_name = true, filename = 'stored in', file_row_number = true, hive_partitioning = false"
        return f"select * from read_parquet([{files}], {options})"

    def compact(self) -> Path | None:
        """Gather all rows into one file and delete the files that it was made of; None where there was nothing to gather.

        Files never change and only those read here are deleted, once a file with their rows (or later ones of the same
        keys) is durable, which itself falls only to a later one: however writers and compactions overlap or are killed,
        each row lies in a whole file at every moment. At worst it lies in two, of which reading takes one. What killed
        writers left behind is deleted when it is a day old.
        """
        import duckdb
        import pyarrow.parquet as pq

        def gather(names: list[str]):
            own = [name for name in names if self._own(name)]
            if not own or (len(own) == 1 and not _single(own[0]) and _FILE.fullmatch(own[0])):
                return None, own
            with duckdb.connect() as connection:
                self.attach(connection, "rows", own)
                return connection.sql("select * from rows order by key").to_arrow_table(), own

        table, own = steadily([self], gather)
        target = self.folder / _named(COMPACT) if table is not None else None
        if target is not None:
            with durable(target) as temporary:
                pq.write_table(table, temporary, row_group_size=25_000)  # several, for as many threads
            for name in own:
                (self.folder / name).unlink(missing_ok=True)  # another compaction may have been here
        for left in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > LEFT_OVER:
                    left.unlink()
        return target

    def _own(self, name: str) -> bool:
        """Whether workbench wrote the file: others may lie in the folder, and stay."""
        return _FILE.fullmatch(name) is not None or self.inside(name) == {name.removesuffix(".parquet")}


def _plain(value: object) -> object:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, default=str)
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _kind(value: object) -> pa.DataType | None:
    """What NaN would not tell of itself."""
    import pyarrow as pa

    return pa.float64() if isinstance(value, float) else None


def _named(stem: str) -> str:
    return f"{stem}.{uuid.uuid4().hex[:12]}.parquet"


def _single(name: str) -> str:
    """The key of a file of one row, '' for others."""
    found = _FILE.fullmatch(name)
    return found["key"] if found and found["key"] != COMPACT else ""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _not_rows(path: str | Path) -> WorkbenchError:
    return WorkbenchError(f"{path} is no table of results: it has rows without a key; move it to another folder")
