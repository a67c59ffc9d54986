"""Stored rows: whole or not there, from several writers at once, read back in order, and what their keys depend on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from workbench import results, stored
from workbench.errors import SelectionError, WorkbenchError
from workbench.results import Results, provenance, run_key


def row(key, **more):
    return {"key": key, "task": "t", "accuracy": 0.5, "seed": 3} | more


def facts(table):
    """A table's rows without what writing adds."""
    return table.drop(columns=["schema", "written"]).to_dict("records")


def old(folder, row):
    """A row as it was stored before rows had a schema and files their own names."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_parquet(folder / f"{row['key']}.parquet", index=False)


LIGHT = f"""
import sys, types
sys.modules["workbench"] = types.ModuleType("workbench")  # the package without all that it imports
sys.modules["workbench"].__path__ = [{str(Path(results.__file__).parent)!r}]
"""


def called(code, *arguments, **options):
    """Run Python code in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", LIGHT + code, *map(str, arguments)], env=environment, **options)


@pytest.fixture
def store(tmp_path):
    return Results(tmp_path / "runs")


def test_a_row_comes_back_as_it_was(store):
    given = row("k1", note="Ünï, 'quoted'", count=7, share=0.1 + 0.2, nothing=float("nan"), flag=True, text="")
    start = time.time()
    path = store.write(given)
    assert re.fullmatch(r"k1\.[0-9a-f]{12}\.parquet", path.name)
    assert store.has("k1")
    assert store.keys() == {"k1"}
    assert not store.has("k2")
    (got,) = store.read().to_dict("records")
    assert got.pop("schema") == stored.SCHEMA
    assert start <= got.pop("written") <= time.time()
    assert np.isnan(got.pop("nothing"))
    assert np.isnan(given.pop("nothing"))
    assert got == given
    assert list(store.read()) == [*row(""), "note", "count", "share", "nothing", "flag", "text", "schema", "written"]


def test_writing_again_replaces(store):
    store.write(row("k"))
    store.write(row("k", accuracy=0.9, more=1))
    assert store.read()["accuracy"].tolist() == [0.9]
    assert list(store.read()) == [*row("k"), "more", "schema", "written"]
    assert len(list(store.folder.iterdir())) == 2
    store.compact()
    assert len(list(store.folder.iterdir())) == 1
    assert store.read()["accuracy"].tolist() == [0.9]


def test_nothing_stored(store):
    assert store.read().empty
    assert store.read([]).empty
    assert not store.has("k")
    with pytest.raises(WorkbenchError, match=r"no results in .*runs"):
        store.query("select * from results")
    assert not store.folder.exists()


def test_a_row_needs_a_key(store):
    for bad in ({"task": "t"}, row("")):
        with pytest.raises(WorkbenchError, match="a result needs a key"):
            store.write(bad)
    for bad in ("a/b", "../a", "a.b", "a b", "ä", "a\n", "compact", "k" * 181, 5):
        with pytest.raises(WorkbenchError, match="expected up to 180 letters, digits, - and _"):
            store.write(row(bad))
    assert not store.folder.exists()


@pytest.mark.parametrize("where", ["write_table", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(store, monkeypatch, where, error):
    store.write(row("old"))
    real = pq.write_table

    def half(table, path, **kwargs):
        real(table, path, **kwargs)
        with open(path, "r+b") as file:
            file.truncate(20)
        raise error

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if where == "write_table":
            patch.setattr(pq, "write_table", half)
        else:
            patch.setattr(stored.os, where, fail)
        for key in ("new", "old"):
            with pytest.raises(type(error)):
                store.write(row(key, accuracy=0.9))
        with pytest.raises(type(error)):
            store.compact()
    (file,) = store.folder.iterdir()
    assert file.name.startswith("old.")
    assert store.read()["accuracy"].tolist() == [0.5]


def test_what_a_killed_writer_leaves_is_not_read(store):
    store.write(row("k"))
    (store.folder / ".other.123.tmp").write_bytes(b"PAR1 half")
    assert store.read()["key"].tolist() == ["k"]
    assert not store.has("other")


WRITER = """
import sys
from pathlib import Path
from workbench.results import Results
store, name, i = Results(sys.argv[1]), sys.argv[2], 0
while not (store.folder / "stop").exists():
    store.write({"key": f"{name}{i:04d}", "i": i, "double": 2 * i, "text": name * 500})
    store.write({"key": "both", "i": i, "double": 2 * i, "text": name * 500})
    i += 1
(store.folder / name).write_text(str(i))
"""


COMPACTOR = """
import sys
from pathlib import Path
from workbench.results import Results
while not Path(sys.argv[1], "stop").exists():
    Results(sys.argv[1]).compact()
"""


def test_writers_compactors_and_a_reader_that_sees_whole_rows_only(store):
    """Two who write, two who compact, one who reads, until it has seen them at work: the count never falls, no key comes
    twice, each row is whole.
    """
    writers = [called(WRITER, store.folder, name) for name in "xy"]
    compactors = [called(COMPACTOR, store.folder) for _ in range(2)]
    seen, known, end = [], set(), time.monotonic() + 120
    try:
        while len(set(seen)) <= 5 and time.monotonic() < end:
            table = store.read()
            if len(table):
                assert table["key"].is_unique
                assert (table["double"] == 2 * table["i"]).all()
                assert table["text"].isin(["x" * 500, "y" * 500]).all()
                assert known <= set(table["key"])
                known = set(table["key"])
            keys = store.keys()
            assert known <= keys
            known = keys
            seen.append(len(known))
    finally:
        (store.folder / "stop").touch()
    assert [one.wait(60) for one in [*writers, *compactors]] == [0] * 4
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    store.compact()
    table = store.read().set_index("key")
    wrote = {name: int((store.folder / name).read_text()) for name in "xy"}
    assert table.index.tolist() == ["both", *(f"{name}{i:04d}" for name in "xy" for i in range(wrote[name]))]
    assert table.loc["both", "i"] + 1 in wrote.values()
    assert [path.suffix for path in store.folder.iterdir() if path.name not in ("x", "y", "stop")] == [".parquet"]


def test_rows_of_differing_columns_come_together(store):
    store.write(row("a", scale=0.5))
    store.write(row("b", coefficient=1.5, chosen=json.dumps(["x"])))
    store.write({"key": "c", "scale": 2})
    table = store.read().set_index("key")
    assert table["scale"].tolist()[::2] == [0.5, 2.0]
    assert np.isnan(table.loc["b", "scale"])
    assert table["coefficient"].isna().tolist() == [True, False, True]
    assert table["task"].isna().tolist() == [False, False, True]


def test_reading_by_key_keeps_the_order_asked_for(store):
    for i, key in enumerate("abcde"):
        store.write(row(key, accuracy=i / 10))
    assert store.read(["d", "a", "c"])["key"].tolist() == ["d", "a", "c"]
    assert store.read(["d", "a", "c"])["accuracy"].tolist() == [0.3, 0.0, 0.2]
    assert store.read(["d", "a", "d"])["key"].tolist() == ["d", "a", "d"]
    assert store.read(iter("ab"))["key"].tolist() == ["a", "b"]
    assert store.read()["key"].tolist() == list("abcde")
    assert next(iter(store.read(["e"]))) == "key"


def test_missing_keys(store):
    store.write(row("a"))
    with pytest.raises(WorkbenchError, match=r"2 of 3 runs are not stored in .*runs, such as z"):
        store.read(["a", "z", "y"])


def test_queries(store):
    for i in range(6):
        store.write(row(f"k{i}", accuracy=i / 10, recipe="xy"[i % 2]))
    table = store.query(
        "select recipe, avg(accuracy) as mean, count(*) as n from results group by recipe order by recipe"
    )
    assert table.to_dict("list") == {"recipe": ["x", "y"], "mean": pytest.approx([0.2, 0.3]), "n": [3, 3]}


@pytest.mark.parametrize("name", ["a[1]", "s*", "q?", "n_train=10", "o'brien", "{a,b}", "ünï code"])
def test_folders_of_any_name(tmp_path, name):
    """None is taken for a pattern or a partition; the folder beside it is what a pattern would match."""
    for beside in ("a1", "sun", "qq", "a"):
        Results(tmp_path / beside).write(row("k", accuracy=0.0))
    Results(tmp_path / name).write(row("k"))
    table = Results(tmp_path / name).read()
    assert facts(table) == [row("k")]
    Results(tmp_path / name).compact()
    assert facts(Results(tmp_path / name).read()) == [row("k")]


def test_folders_merge_by_copying(tmp_path):
    one, two = Results(tmp_path / "1"), Results(tmp_path / "2")
    one.write(row("a", accuracy=0.1))
    one.write(row("b", accuracy=0.2))
    for path in (two.write(row("b", accuracy=0.3)), two.write(row("c", accuracy=0.4))):
        os.link(path, one.folder / path.name)
    gathered = two.compact()
    os.link(gathered, one.folder / gathered.name)
    for _ in range(2):
        assert one.read()["key"].tolist() == ["a", "b", "c"]
        assert one.read()["accuracy"].tolist() == [0.1, 0.3, 0.4]
        one.compact()


def test_a_run_s_key():
    facts = {"pool": "p", "seed": 1, "recipe": ["ties", 3, (("density", 0.2),)]}
    key = run_key(facts)
    assert re.fullmatch("[0-9a-f]{24}", key)
    assert run_key(dict(reversed(facts.items()))) == key
    recipe = ["ties", 3, (("density", 0.3),)]
    others = [{**facts, "seed": 2}, {**facts, "pool": "q"}, {**facts, "recipe": recipe}, {**facts, "more": 0}]
    assert len({key, *map(run_key, others)}) == 5
    code = "from workbench.results import run_key; print(run_key({'b': (1, 2.5), 'a': 'ü'}))"
    said, _ = called(code, stdout=subprocess.PIPE, text=True).communicate(timeout=60)  # under a hash seed of its own
    assert said == run_key({"a": "ü", "b": (1, 2.5)}) + "\n"


def test_provenance():
    facts = provenance()
    assert set(facts) == {"commit", "versions", "platform"}
    assert re.fullmatch("([0-9a-f]{40}(-dirty)?)?", facts["commit"])
    versions = json.loads(facts["versions"])
    assert set(versions) == {"workbench", "torch", "transformers", "peft"}
    import torch

    assert versions["torch"] == torch.__version__
    assert facts["platform"]


def test_provenance_without_git(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(results.subprocess, "run", none)
    assert provenance.__wrapped__()["commit"] == ""


# Older rows, other files


def test_rows_from_before_schemas_are_read_gathered_and_replaced(store):
    for key in "ab":
        old(store.folder, row(key))
    assert store.keys() == {"a", "b"}
    assert facts(store.read()) == [row("a"), row("b")]
    assert store.read()["schema"].isna().all()
    store.write(row("b", accuracy=0.9, device_name="d"))
    for _ in range(2):
        table = store.read()
        assert table["accuracy"].tolist() == [0.5, 0.9]
        assert table["schema"].isna().tolist() == [True, False]
        assert list(table) == [*row(""), "device_name", "schema", "written"]
        assert store.read(["b"])["accuracy"].tolist() == [0.9]
        store.compact()
    assert len(list(store.folder.iterdir())) == 1


def test_a_newer_schema_is_refused(store, monkeypatch):
    store.write(row("a"))
    with monkeypatch.context() as patch:
        patch.setattr(stored, "SCHEMA", stored.SCHEMA + 1)
        store.write(row("b"))
    for work in (store.read, lambda: store.read(["b"]), lambda: store.query("select 1 from results"), store.compact):
        with pytest.raises(
            WorkbenchError, match=r"b\.[0-9a-f]{12}\.parquet: a row of schema 2, .* up to 1; update workbench"
        ):
            work()
    assert store.read(["a"])["key"].tolist() == ["a"]
    assert len(list(store.folder.iterdir())) == 2


def test_a_table_of_many_rows_is_read_but_stays_where_it_is(store):
    store.write(row("a"))
    table = pd.DataFrame([row("b"), row("c"), row("a", accuracy=0.0)])
    table.to_parquet(store.folder / "more.parquet", index=False)
    assert store.keys() == {"a", "b", "c"}
    store.write(row("d"))
    store.compact()
    assert sorted(p.name.partition(".")[0] for p in store.folder.iterdir()) == ["compact", "more"]
    assert store.read()["accuracy"].tolist() == [0.5] * 4
    table.to_parquet(store.folder / "more.parquet", index=False)
    table.assign(key=["x", "y", "z"]).to_parquet(store.folder / "more.parquet", index=False)
    assert store.keys() == {"a", "d", "x", "y", "z"}


def test_what_is_no_result_is_said_and_stays(store):
    store.write(row("a"))
    pd.DataFrame({"x": [1]}).to_parquet(store.folder / "other.parquet", index=False)
    for work in (store.read, store.keys, store.compact):
        with pytest.raises(WorkbenchError, match=r"other\.parquet is no table of results: it has rows without a key"):
            work()
    (store.folder / "other.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(WorkbenchError, match=r"runs: .*other\.parquet"):
        store.read()
    assert (store.folder / "other.parquet").is_file()


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ((1, 1.5, None), [1.0, 1.5, None]),
        ((None, None, 2), [None, None, 2]),
        ((None, "s", 3), [None, "s", "3"]),
        ((True, None, False), [True, None, False]),
        ((2**60, None, 1), [2**60, None, 1]),
        ((float("inf"), 1, float("nan")), [float("inf"), 1, None]),
        ((np.float32(0.5), np.int64(3), np.bool_(True)), [0.5, 3, 1]),
        (({"a": [1]}, [1, "ü"], "\udc80"), ['{"a": [1]}', '[1, "\\u00fc"]', "\\udc80"]),
    ],
)
def test_columns_whose_type_differs_between_files(store, values, read):
    def found():
        column = store.read()["value"]
        return column.astype(object).where(column.notna(), None).tolist()

    for key, value in zip("abc", values, strict=True):
        store.write({"key": key, "value": value})
    assert found() == read
    for key in "ab":  # gathered, then beside single ones
        store.compact()
        assert found() == read
        store.write({"key": key, "value": values["ab".index(key)]})
        assert found() == read


def test_what_a_row_is_called_does_not_matter(store):
    given = {"key": "a", 'a "quoted" name': 1, "select": 2, "filename": "f", "%s": 3, "ü": 4}
    store.write(given)
    store.write({**given, "select": 3})
    assert facts(store.read()) == [{**given, "select": 3}]
    store.compact()
    assert facts(store.read()) == [{**given, "select": 3}]


# Gathering


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from("abcd"),
            st.one_of(st.none(), st.integers(-3, 3), st.floats(allow_nan=False)),
            st.one_of(st.none(), st.text(max_size=3)),
        ),
        st.just("compact"),
        st.just("new"),
    ),
    max_size=8,
)


@settings(max_examples=15)
@drawn(STEPS)
def test_any_sequence_of_writing_and_gathering_reads_like_a_dictionary(steps):
    with tempfile.TemporaryDirectory() as folder:
        store, model, new = Results(folder), {}, False
        for step in steps:
            if step == "compact":
                assert (store.compact() is not None) == new
                new = False
            elif step == "new":
                store = Results(folder)
            else:
                key, number, text = step
                model[key], new = (number, text), True
                store.write({"key": key, "number": number, "text": text})
            assert store.keys() == set(model)
        table = store.read()
        found = {
            key: (None if pd.isna(number) else number, None if pd.isna(text) else text)
            for key, number, text in zip(*(table[n] for n in ("key", "number", "text")), strict=True)
        } if len(table) else {}  # fmt: skip
        assert found == {k: (None if n is None else float(n), t and t.encode(errors="backslashreplace").decode()) for k, (n, t) in model.items()}  # fmt: skip


def test_nothing_to_gather(store):
    assert store.compact() is None
    store.write(row("a"))
    first = store.compact()
    assert first is not None
    assert store.compact() is None
    assert list(store.folder.iterdir()) == [first]


def test_gathering_changes_nothing_that_is_read(store):
    for i in range(7):
        store.write(row(f"k{i}", number=None if i % 2 else i, flag=None if i % 3 else True, text=None if i else "t"))
    before = store.read()
    store.compact()
    pd.testing.assert_frame_equal(store.read(), before)
    some = store.read(["k5", "k1"])
    assert some.pop("text").isna().all()
    pd.testing.assert_frame_equal(
        some, before.drop(columns="text").iloc[[5, 1]].reset_index(drop=True), check_dtype=False
    )


def test_leftovers_of_killed_writers(store):
    store.write(row("a"))
    for name, age in ((".new.1.tmp", 3600), (".old.2.tmp", 90_000)):
        (store.folder / name).write_bytes(b"PAR1 half")
        os.utime(store.folder / name, (time.time() - age,) * 2)
    store.compact()
    assert sorted(p.name.partition(".")[2][:3] for p in store.folder.iterdir() if p.suffix == ".tmp") == ["new"]
    assert store.read()["key"].tolist() == ["a"]


STOPPED = """
import os, signal
import duckdb, pandas
import pyarrow.parquet as pq
from workbench import stored
from workbench.results import Results

def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def forked(work):
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def compact():
    pq.write_table = counted(pq.write_table)
    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    stored.Path.unlink = counted(stored.Path.unlink)
    Results(sys.argv[1]).compact()

def check():
    assert Results(sys.argv[1]).read()["accuracy"].tolist() == [0, 1, 2.5, 3.5]
    assert Results(sys.argv[1]).keys() == {"k0", "k1", "k2", "k3"}

for step in range(1, 20):
    left = step
    ended = forked(compact)
    print(ended, forked(check))
    if not ended:
        break
"""


def test_a_compaction_killed_at_any_step_loses_nothing(store):
    """Before writing, syncing, renaming, syncing the folder, and each deletion: rows stay, and the next one tidies up."""
    for i in range(3):
        store.write(row(f"k{i}", accuracy=i))
    store.compact()
    for i in (2, 3):
        store.write(row(f"k{i}", accuracy=i + 0.5))
    said, _ = (process := called(STOPPED, store.folder, stdout=subprocess.PIPE, text=True)).communicate(timeout=120)
    assert process.returncode == 0
    ended, checked = zip(*(map(int, line.split()) for line in said.splitlines()), strict=True)
    killed = ended.index(0)
    assert killed >= 5
    assert set(ended[:killed]) == {-signal.SIGKILL}
    assert set(checked) == {0}
    assert len(list(store.folder.glob("*.parquet"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="an open file's name is read in /proc")
def test_files_are_deleted_only_when_the_new_one_and_its_name_are_on_the_disk(store, monkeypatch):
    store.write(row("a"))
    order, sync, replace, unlink = [], os.fsync, os.replace, Path.unlink
    named = {"runs": "folder", ".tmp": "temporary"}

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(f"sync {named[path.suffix or path.name]}")
        sync(descriptor)

    monkeypatch.setattr(stored.os, "fsync", fsync)
    monkeypatch.setattr(stored.os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    monkeypatch.setattr(
        Path, "unlink", lambda self, **more: order.append(f"delete {self.name[:2]}") or unlink(self, **more)
    )
    store.compact()
    assert order[:3] == ["sync temporary", "rename", "sync folder"]
    assert order[-1] == "delete a."


@pytest.mark.slow
def test_compactions_killed_at_random_moments(store):
    draw, count = random.Random(0), 0
    for _ in range(20):
        for _ in range(10):
            store.write(row(f"k{count}", accuracy=count))
            count += 1
        process = called(COMPACTOR, store.folder)
        time.sleep(draw.uniform(0.5, 2.0))
        process.kill()
        process.wait(30)
        assert sorted(Results(store.folder).read()["accuracy"]) == list(range(count))


def test_two_compactions_at_once_delete_nothing_of_each_other(store, monkeypatch):
    """A second one runs whole at each step of a first one."""
    for step in ("write_table", "replace", "unlink"):
        for i in range(3):
            store.write(row(f"{step}{i}"))
        place = {"write_table": pq, "replace": stored.os, "unlink": stored.Path}[step]
        real = getattr(place, step)

        def other(*args, real=real, place=place, step=step, **kwargs):
            monkeypatch.setattr(place, step, real)
            Results(store.folder).compact()
            return real(*args, **kwargs)

        monkeypatch.setattr(place, step, other)
        keys = store.keys()
        store.compact()
        assert store.keys() == keys == set(store.read()["key"])
    store.compact()
    assert len(list(store.folder.iterdir())) == 1


def test_a_file_deleted_between_listing_and_reading_is_looked_for_anew(store, monkeypatch):
    for key in "ab":
        store.write(row(key))
    real, late = stored.Rows.attach, ["b", "a"]

    def attach(self, *given):
        if late:
            written = [path for path in store.folder.iterdir() if path.is_file()]
            store.write(row(late.pop(), accuracy=0.75))
            with monkeypatch.context() as patch:
                patch.setattr(stored.Rows, "attach", real)
                Results(store.folder).compact()
            assert not any(path.exists() for path in written)
        return real(self, *given)

    monkeypatch.setattr(stored.Rows, "attach", attach)
    assert store.read()["accuracy"].tolist() == [0.75, 0.75]
    assert not late


def test_a_listing_that_has_neither_the_old_file_nor_the_new_one_is_not_believed(store, monkeypatch):
    files = ["a.000000000001.parquet", "b.000000000002.parquet"]
    answers = iter([files, files[:1], files[:1], ["a.000000000001.parquet", "compact.000000000003.parquet"], []])
    monkeypatch.setattr(stored.os, "listdir", lambda _: next(answers))
    assert store._rows.names() == files[:1]
    assert next(answers)[-1] == "compact.000000000003.parquet"


# A full disk


LIMITED = """
import resource, sys
from workbench.results import Results
store = Results(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for work in (lambda: store.write({"key": "big", "text": "".join(map(str, range(5000)))}), store.compact):
    try:
        work()
    except OSError as error:
        print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
store.write({"key": "after", "text": "a"})
"""


def test_a_file_that_cannot_be_written_whole_is_not_there(store):
    for i in range(20):
        store.write(row(f"k{i:02d}", text="".join(map(str, range(i, i + 200)))))
    said, _ = (process := called(LIMITED, store.folder, stdout=subprocess.PIPE, text=True)).communicate(timeout=60)
    assert process.returncode == 0
    assert said.split() == [str(27)] * 2  # EFBIG
    assert store.keys() == {"after", *(f"k{i:02d}" for i in range(20))}
    assert len(store.read()) == len(list(store.folder.iterdir())) == 21


def fill(store, text):
    for i in range(1000):
        store.write(row(f"k{i}", text=text))


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")
    try:
        store, text = Results(disk / "runs"), "".join(map(str, range(1000)))
        with pytest.raises(OSError, match="No space left"):
            fill(store, text)
        keys = {f"k{i}" for i in range(len(store.keys()))}
        assert 3 < len(keys) < 200
        with pytest.raises(OSError, match="No space left"):
            store.compact()
        assert store.keys() == keys == set(store.read()["key"])
        assert all(path.suffix == ".parquet" for path in store.folder.iterdir())
        next(store.folder.glob("k0.*")).unlink()
        store.write(row("later", text=text))
        assert store.keys() == keys - {"k0"} | {"later"}
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# Failures


def test_failures_lie_apart_until_their_runs_are_stored(store):
    assert store.failures().empty
    store.fail("a", {"error": "first"})
    store.fail("a", {"error": "second \udc80", "traceback": "line\nline", "run": {"seed": 1}})
    store.fail("b", {"error": "e", "asked": "what b was"})
    assert store.keys() == set()
    assert store.read().empty
    table = store.failures()
    assert table["key"].tolist() == ["a", "b"]
    assert table["error"].tolist() == ["second \\udc80", "e"]
    assert json.loads(table["run"][0]) == {"seed": 1}
    assert store.compact() is None
    pd.testing.assert_frame_equal(store.failures(), table)
    assert store.query("select count(*) as n from failures")["n"].tolist() == [2]
    store.write(row("a"))
    assert store.failures()["key"].tolist() == ["b"]
    store.write(row("another", asked="what b was"))
    assert store.failures().empty
    assert store.read()["key"].tolist() == ["a", "another"]
    assert store.query("select avg(accuracy) as m, (select count(*) from failures) as n from results").to_dict("list") == {"m": [0.5], "n": [0]}  # fmt: skip


# Two folders, one file, one key


def test_what_sets_two_folders_apart(tmp_path):
    one, two = Results(tmp_path / "1"), Results(tmp_path / "2")
    assert one.diff(two).empty
    for store, more in ((one, 0.0), (two, 1e-6)):
        store.write(row("same", recipe="r", seconds=more, commit=str(more)))
        store.write(row("near", recipe="r", loss=1.0 + more))
        store.write(row("far", recipe="r", loss=1.0 + 1e6 * more, chosen=str(more > 0)))
        store.write(row("null", recipe="r", loss=None if more else 3.0, count=None if more else 3))
        store.write(row("inf", recipe="r", loss=float("inf")))
    one.write(row("a", recipe="r"))
    two.write(row("b", recipe="s"))
    table = one.diff(two, 1e-3)
    assert list(table) == ["key", "status", "column", "here", "there", "difference", "recipe", "task", "seed"]
    assert table.iloc[:, :3].to_numpy().tolist() == [
        ["a", "only here", ""],
        ["b", "only there", ""],
        ["far", "differs", "chosen"],
        ["far", "differs", "loss"],
        ["null", "differs", "count"],
        ["null", "differs", "loss"],
    ]
    assert table["recipe"].tolist() == ["r", "s", "r", "r", "r", "r"]
    assert table.loc[3, ["here", "there"]].tolist() == [1.0, 2.0]
    assert table["difference"][3] == pytest.approx(1.0)
    assert table.loc[4:, ["here", "there"]].to_numpy().tolist() == [[3, None], [3.0, None]]
    assert set(one.diff(two).query("key == 'near'")["column"]) == {"loss"}
    assert one.diff(one).empty
    assert two.diff(one, 1e-3)["status"].tolist() == ["only there", "only here", *["differs"] * 4]


def test_columns_that_older_rows_lack_set_nothing_apart(tmp_path):
    one, two = Results(tmp_path / "1"), Results(tmp_path / "2")
    for key in "ab":
        old(one.folder, row(key))
    one.write(row("c", peak=1))
    for key in "abc":
        two.write(row(key, peak=1))
    assert one.diff(two).empty
    two.write(row("b", peak=1, accuracy=0.25))
    assert one.diff(two)["difference"].tolist() == [0.25]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_exports(store, tmp_path, suffix):
    with pytest.raises(WorkbenchError, match="no results in"):
        store.export(tmp_path / f"all{suffix}")
    for key in "ba":
        store.write(row(key, share=0.1 + 0.2, text="ü,\n'\""))
    path = store.export(tmp_path / "new" / f"all{suffix}")
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix]
    pd.testing.assert_frame_equal(read(path), store.read(), check_exact=suffix != ".json", check_dtype=False)
    assert len(list(path.parent.iterdir())) == 1
    with pytest.raises(WorkbenchError, match=r"as \.csv, \.parquet or \.json, not as '\.xlsx'"):
        store.export(tmp_path / "all.xlsx")


def test_a_key_by_its_beginning(store):
    for key in ("abc", "abd", "ab"):
        store.write(row(key))
    store.fail("xyz", {"error": "e"})
    assert [store.find(prefix) for prefix in ("abc", "ab", "x")] == ["abc", "ab", "xyz"]
    with pytest.raises(SelectionError, match="3 keys begin with 'a', such as ab, abc, abd; give more of it"):
        store.find("a")
    with pytest.raises(SelectionError, match=r"no run in .*runs has a key that begins with 'q'"):
        store.find("q")


def test_sql_that_does_not_run(store):
    store.write(row("a"))
    with pytest.raises(WorkbenchError, match='Referenced column "acuracy" not found'):
        store.query("select acuracy from results")
    with pytest.raises(WorkbenchError, match=r'runs: Parser Error: syntax error at or near "from"$'):
        store.query("select where from results")
