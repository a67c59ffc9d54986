"""Stored rows: whole or not there, from several writers at once, read back in order, and what their keys depend on."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from workbench import results
from workbench.errors import WorkbenchError
from workbench.results import Results, provenance, run_key


def row(key, **more):
    return {"key": key, "task": "t", "accuracy": 0.5, "seed": 3} | more


@pytest.fixture
def store(tmp_path):
    return Results(tmp_path / "runs")


def test_a_row_comes_back_as_it_was(store):
    given = row("k1", note="Ünï, 'quoted'", count=7, share=0.1 + 0.2, nothing=float("nan"), flag=True, text="")
    path = store.write(given)
    assert path == store.path("k1")
    assert store.has("k1")
    assert not store.has("k2")
    (got,) = store.read().to_dict("records")
    assert np.isnan(got.pop("nothing"))
    assert np.isnan(given.pop("nothing"))
    assert got == given
    assert list(store.read()) == [*row(""), "note", "count", "share", "nothing", "flag", "text"]


def test_writing_again_replaces(store):
    store.write(row("k"))
    store.write(row("k", accuracy=0.9, more=1))
    assert store.read()["accuracy"].tolist() == [0.9]
    assert [p.name for p in store.folder.iterdir()] == ["k.parquet"]


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
    assert not store.folder.exists()


@pytest.mark.parametrize("where", ["to_parquet", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(store, monkeypatch, where, error):
    store.write(row("old"))
    real = pd.DataFrame.to_parquet

    def half(self, path, **kwargs):
        real(self, path, **kwargs)
        with open(path, "r+b") as file:
            file.truncate(20)
        raise error

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if where == "to_parquet":
            patch.setattr(pd.DataFrame, "to_parquet", half)
        else:
            patch.setattr(results.os, where, fail)
        for key in ("new", "old"):
            with pytest.raises(type(error)):
                store.write(row(key, accuracy=0.9))
    assert [p.name for p in store.folder.iterdir()] == ["old.parquet"]
    assert store.read()["accuracy"].tolist() == [0.5]


def test_what_a_killed_writer_leaves_is_not_read(store):
    store.write(row("k"))
    (store.folder / ".other.123.tmp").write_bytes(b"PAR1 half")
    assert store.read()["key"].tolist() == ["k"]
    assert not store.has("other")


WRITER = """
import sys
from workbench.results import Results
store, name = Results(sys.argv[1]), sys.argv[2]
for i in range(50):
    store.write({"key": f"{name}{i:02d}", "i": i, "double": 2 * i, "text": name * 500})
    store.write({"key": "both", "i": i, "double": 2 * i, "text": name * 500})
"""


def test_two_writers_and_a_reader_that_sees_whole_rows_only(store):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(store.folder)]
    writers = [subprocess.Popen([*command, name], env=environment) for name in "xy"]
    seen, end = [], time.monotonic() + 60
    while any(w.poll() is None for w in writers) and time.monotonic() < end:
        table = store.read()
        if len(table):
            assert (table["double"] == 2 * table["i"]).all()
            assert table["text"].isin(["x" * 500, "y" * 500]).all()
        seen.append(len(table))
    assert [w.wait(30) for w in writers] == [0, 0]
    assert seen == sorted(seen)
    table = store.read()
    assert table["key"].tolist() == sorted(["both", *(f"{n}{i:02d}" for n in "xy" for i in range(50))])
    assert len(list(store.folder.iterdir())) == 101


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
    assert table.to_dict("records") == [row("k")]


def test_folders_merge_by_copying(tmp_path):
    one, two = Results(tmp_path / "1"), Results(tmp_path / "2")
    one.write(row("a"))
    two.write(row("b"))
    os.link(two.path("b"), one.path("b"))
    assert one.read()["key"].tolist() == ["a", "b"]


def test_a_run_s_key():
    facts = {"pool": "p", "seed": 1, "recipe": ["ties", 3, (("density", 0.2),)]}
    key = run_key(facts)
    assert re.fullmatch("[0-9a-f]{24}", key)
    assert run_key(dict(reversed(facts.items()))) == key
    recipe = ["ties", 3, (("density", 0.3),)]
    others = [{**facts, "seed": 2}, {**facts, "pool": "q"}, {**facts, "recipe": recipe}, {**facts, "more": 0}]
    assert len({key, *map(run_key, others)}) == 5
    code = "from workbench.results import run_key; print(run_key({'b': (1, 2.5), 'a': 'ü'}))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == run_key({"a": "ü", "b": (1, 2.5)}) + "\n"


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
