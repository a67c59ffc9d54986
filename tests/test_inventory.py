"""What screening found, kept on disk: nothing is lost, nothing is made up, and a damaged file costs no more than time."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import inventory
from workbench.inventory import Inventory, place
from workbench.inventory import settings as settings_of
from workbench.rules import DEFAULT, Rule
from workbench.screen import Verdict

FACTS = {"rank": 16, "norm": 2.5, "rslora": False, "base": "org/base", "mean_rank": 1 / 3}
GOOD = Verdict("ann/good", True, "", "", FACTS)
BAD = Verdict("bob/bad", False, "finite", "3 tensors hold NaN, “such as” x", {"rslora": True})

texts = st.text(st.characters(codec=None), max_size=12)  # surrogates too
values = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | texts
verdicts = st.builds(Verdict, texts, st.booleans(), st.just("rule"), st.just("reason"), st.dictionaries(texts, values))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "workbench" / "pool.parquet"


def exactly(verdict):
    return repr(verdict) + json.dumps(verdict.facts)  # == takes True for 1 and 1.0


def test_verdicts_come_back_exactly(path):
    kept = Inventory(path, "s")
    kept.add([(GOOD, "r1"), (BAD, "r2")])
    for again in (kept, Inventory(path, "s")):
        assert exactly(again.get("ann/good", "r1")) == exactly(GOOD)
        assert exactly(again.get("bob/bad", "r2")) == exactly(BAD)
        assert again.get("ann/good", "r2") is None
        assert again.get("bob/bad", "r1") is None
        assert len(again) == 2
        assert again.note == ""


@given(found=st.lists(verdicts, max_size=4), data=st.data())
@settings(max_examples=40)
def test_any_verdict_comes_back(tmp_path_factory, found, data):
    path = tmp_path_factory.mktemp("any") / "i.parquet"
    found = {verdict.name.encode("utf-8", "backslashreplace"): verdict for verdict in found}.values()
    revisions = [data.draw(texts) for _ in found]
    Inventory(path, "s").add(zip(found, revisions, strict=True))
    again = Inventory(path, "s")
    for verdict, revision in zip(found, revisions, strict=True):
        assert exactly(again.get(verdict.name, revision)) == exactly(verdict)
    assert again.note == ""


def test_numbers_that_are_not_finite_come_back(path):
    Inventory(path, "s").add([(Verdict("a", False, "finite", "why", {"norm": math.nan, "size": math.inf}), "r")])
    facts = Inventory(path, "s").get("a", "r").facts
    assert math.isnan(facts["norm"])
    assert facts["size"] == math.inf


def test_no_file_and_no_verdicts(path):
    assert len(Inventory(path, "s")) == 0
    assert Inventory(path, "s").get("a", "r") is None
    Inventory(path, "s").add([])
    assert not path.exists()


def test_what_is_added_again_replaces_and_other_revisions_stay(path):
    kept = Inventory(path, "s")
    kept.add([(GOOD, "r1")])
    changed = Verdict(GOOD.name, False, "zero-norm", "why", {})
    kept.add([(changed, "r1"), (BAD, "r1"), (GOOD, "r2")])
    for again in (kept, Inventory(path, "s")):
        assert (again.get(GOOD.name, "r1"), again.get(GOOD.name, "r2")) == (changed, GOOD)
        assert len(again) == 3
    assert len(pd.read_parquet(path)) == 3
    kept.add([(GOOD, "r1"), (changed, "r1")])
    assert Inventory(path, "s").get(GOOD.name, "r1") == kept.get(GOOD.name, "r1") == changed


def test_other_settings_are_kept_and_never_answer(path):
    Inventory(path, "default").add([(GOOD, "r")])
    study = Inventory(path, "study")
    assert study.get(GOOD.name, "r") is None
    refused = Verdict(GOOD.name, False, "eva", "why", {})
    study.add([(refused, "r")])
    assert Inventory(path, "study").get(GOOD.name, "r") == study.get(GOOD.name, "r") == refused
    assert Inventory(path, "default").get(GOOD.name, "r") == GOOD


def test_two_at_once_see_each_other_s_rows(path):
    first, second = Inventory(path, "s"), Inventory(path, "s")
    first.add([(GOOD, "r"), (BAD, "both")])
    mine = Verdict(BAD.name, True, "", "", {})
    second.add([(mine, "both")])
    assert second.get(GOOD.name, "r") == GOOD  # merged with what another had written meanwhile
    assert Inventory(path, "s").get(BAD.name, "both") == second.get(BAD.name, "both") == mine
    assert first.get(BAD.name, "both") == BAD
    first.add([(GOOD, "r2")])
    assert first.get(BAD.name, "both") == BAD
    assert len(Inventory(path, "s")) == 3


def test_an_addition_waits_for_another(path, monkeypatch):
    """Otherwise the second would read before, and write after, and one row be lost."""
    write, second = inventory.write_parquet, Inventory(path, "s")
    thread = threading.Thread(target=second.add, args=([(BAD, "r")],))

    def slow(frame, target):
        if thread.ident is None:
            thread.start()
            thread.join(0.3)
        return write(frame, target)

    monkeypatch.setattr(inventory, "write_parquet", slow)
    Inventory(path, "s").add([(GOOD, "r")])
    thread.join()
    assert len(Inventory(path, "s")) == len(second) == 2


def test_two_processes_adding_at_once_lose_nothing(path):
    code = """
import sys
from pathlib import Path
from workbench.inventory import Inventory
from workbench.screen import Verdict
kept = Inventory(Path(sys.argv[1]), "s")
print("ready", flush=True)
sys.stdin.readline()
for i in range(8):
    kept.add([(Verdict(f"{sys.argv[2]}-{i}", True, "", "", {"rank": i}), "r")])
assert not kept.note, kept.note
"""
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, who], **pipes) for who in "ab"]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.close()
    while any(process.poll() is None for process in both):
        time.sleep(0.01)
        assert Inventory(path, "s").note == ""  # a reader never sees half a file, nor two halves
    for process in both:
        process.stdout.close()
    assert [process.returncode for process in both] == [0, 0]
    kept = Inventory(path, "s")
    assert len(kept) == 16
    assert all(kept.get(f"{who}-{i}", "r").facts == {"rank": i} for who in "ab" for i in range(8))
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


def _rows(path, **changed):
    Inventory(path, "s").add([(GOOD, "r")])
    rows = pd.read_parquet(path)
    return rows.assign(**changed).to_parquet(path, index=False)


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"PAR1 no more than that"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "another table": lambda path: pd.DataFrame({"name": ["a"]}).to_parquet(path),
    "other kinds": lambda path: _rows(path, reason=3),
    "verdicts that are none": lambda path: _rows(path, accepted="no"),
    "facts that are no JSON": lambda path: _rows(path, facts="{"),
    "facts that are no facts": lambda path: _rows(path, facts="[1]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_set_aside_and_made_anew(path, damage):
    Inventory(path, "s").add([(GOOD, "r")])
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    kept = Inventory(path, "s")
    assert len(kept) == 0
    assert f"{path} cannot be read as an inventory" in kept.note
    assert "adapters are screened again" in kept.note
    assert [p.name for p in path.parent.glob("*damaged*")] == []  # reading changes nothing
    kept.add([(BAD, "r")])
    (aside,) = path.parent.glob("pool.parquet.damaged-*")
    assert aside.name in kept.note
    assert before is None or aside.read_bytes() == before
    again = Inventory(path, "s")
    assert (again.note, len(again), again.get(BAD.name, "r")) == ("", 1, BAD)


def test_what_cannot_be_written_costs_nothing_now(tmp_path):
    (tmp_path / "file").write_text("in the way")
    kept = Inventory(tmp_path / "file" / "pool.parquet", "s")
    kept.add([(GOOD, "r")])
    assert "could not be written" in kept.note
    assert kept.get(GOOD.name, "r") == GOOD


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    kept = Inventory(path, "s")
    kept.add([(GOOD, "r")])
    before = path.read_bytes()

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.stored.os.replace", cut)
    with pytest.raises(KeyboardInterrupt):
        kept.add([(BAD, "r")])
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.startswith(".")) == ["pool.parquet"]
    monkeypatch.undo()
    kept.add([])
    kept.add([(Verdict("c", True, "", "", {}), "r")])
    assert Inventory(path, "s").get("c", "r")


def test_a_place_for_every_source(tmp_path, monkeypatch):
    sources = [
        "hub:a/b",
        "hub:a--b",
        "hub:a/b ",
        "/data/a",
        "/data/" + "ä" * 300,
        "/data/" + "b" * 300,
        "../..",
        "\udcff",
    ]
    places = [place(source, tmp_path) for source in sources]
    assert len(set(places)) == len(sources)
    for found in places:
        assert found.parent == tmp_path / "workbench"
        assert len(found.name) < 100
        assert found.suffix == ".parquet"
        assert not found.name.startswith(".")
    assert place("hub:org/Base-8B", tmp_path).name.startswith("hub--org--Base-8B-")
    assert place("hub:a/b", tmp_path) == place("hub:a/b", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert place("hub:a/b", None) == tmp_path / "hub" / places[0].relative_to(tmp_path)
    assert place("x", "~/c").is_relative_to(Path.home())


def test_settings_tell_everything_that_a_verdict_depends_on(monkeypatch):
    shapes = {"a": (2, 3), "b": (4, 5)}
    same = [
        settings_of(None, shapes, ["x", "y"]),
        settings_of(DEFAULT[::-1], dict(reversed(shapes.items())), ("y", "x")),
    ]
    assert len(set(same)) == 1
    others = [
        settings_of((), shapes, ["x", "y"]),
        settings_of(None, shapes | {"a": (3, 2)}, ["x", "y"]),
        settings_of(None, {"a": (2, 3)}, ["x", "y"]),
        settings_of(None, None, ["x", "y"]),
        settings_of(None, shapes, ["x"]),
        settings_of(None, shapes, None),
    ]
    assert len({*same, *others}) == 1 + len(others)
    own = Rule("own", "one's own", lambda c: "", "config")
    assert settings_of([*DEFAULT, own], shapes) is None
    monkeypatch.setattr(inventory, "VERSION", 10**6)
    assert settings_of(None, shapes, ["x", "y"]) not in same
