"""What is listed, what is fetched, where it lies and what is asked for again: over HTTP, the request log as the oracle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import random_adapter, tiny_base
from hub_server import HubServer
from workbench import hub
from workbench.adapters import Adapter
from workbench.errors import AdapterError, SelectionError
from workbench.hub import client, opening
from workbench.hub.distant import Distant
from workbench.hub.files import Snapshot, download
from workbench.hub.listing import names_of
from workbench.nano import wild
from workbench.pool import Pool
from workbench.rules import Rule
from workbench.screen import DEFAULT, STUDY, Candidate, Refused, counts, explain, screen

BASE, NAMES = "org/base", ("ann/one", "ann/two", "bob/one", "bob/two")
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def repos(tmp_path, base):
    folder = tmp_path / "served"
    for i, name in enumerate(NAMES):
        random_adapter(base, 2 + i, seed=i, name=name).save(folder / name)
    base.model.config.save_pretrained(folder / BASE)
    return folder


@pytest.fixture
def server(repos, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(client, "PAUSE", 0.0)
    with HubServer(repos, BASE) as running:
        running.bases[BASE] = ""
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def opened(cache, **options):
    return Pool.open(f"hub:{BASE}", cache=cache, **options)


def rules_of(pool):
    return dict(zip(pool.table["name"], pool.table["rule"], strict=True))


# -- what is listed ------------------------------------------------------------------------------------------------


def test_the_card_s_facts(server, cache):
    server.facts["ann/one"] = {
        "author": "ann",
        "createdAt": "2024-07-23T10:00:00.000Z",
        "lastModified": "2025-01-02T10:00:00.000Z",
        "downloads": 1234,
        "likes": 5,
        "tags": [
            "peft",
            "base_model:adapter:org/base",
            "license:llama3.1",
            "dataset:squad",
            "dataset:a/b",
            "x\x1b[31m",
        ],
    }
    repo = hub.discover(BASE)[0]
    assert (repo.id, repo.author, repo.created, repo.modified) == ("ann/one", "ann", "2024-07-23", "2025-01-02")
    assert (repo.downloads, repo.likes, repo.licence, repo.datasets) == (1234, 5, "llama3.1", ("squad", "a/b"))
    assert (repo.gated, repo.revision, repo.base) == (False, server.commit("ann/one"), BASE)
    assert set(repo.files) == {CONFIG, WEIGHTS, CARD} & set(os.listdir(server.folder / "ann/one"))
    row = opened(cache).table.set_index("name").loc["ann/one"]
    assert (row["author"], row["created"], row["downloads"], row["likes"]) == ("ann", "2024-07-23", 1234, 5)
    assert (row["licence"], row["datasets"]) == ("llama3.1", "squad,a/b")
    assert "x\\x1b[31m" in row["tags"]


def test_aliases_and_quantised_forms_are_listed_on_request(server):
    server.bases |= {"ann/two": "re/upload", "bob/one": "org/base-bnb-4bit", "bob/two": "unsloth/base-unsloth-bnb-4bit"}
    assert [r.id for r in hub.discover(BASE)] == ["ann/one"]
    assert [r.id for r in hub.discover(BASE, aliases=["re/upload", BASE])] == ["ann/one", "ann/two"]
    found = hub.discover(BASE, aliases=["re/upload"], quantised=True)
    assert {r.id: r.base for r in found} == {
        "ann/one": BASE,
        "ann/two": "re/upload",
        "bob/one": "org/base-bnb-4bit",
        "bob/two": "unsloth/base-unsloth-bnb-4bit",
    }
    assert [r.id for r in hub.discover(BASE, aliases=["re/upload"], limit=1)] == ["ann/one"]  # the first of equals
    server.facts["ann/two"] = {"downloads": 99}
    assert [r.id for r in hub.discover(BASE, aliases=["re/upload"], limit=1)] == ["ann/two"]


def test_one_listed_twice_is_one(server):
    info = server.info
    server.info = lambda repo: (found := info(repo)) | {"tags": [*found["tags"], "base_model:adapter:re/upload"]}
    found = hub.discover(BASE, aliases=["re/upload"])
    assert [(r.id, r.base) for r in found if r.id in NAMES] == [(name, BASE) for name in NAMES]
    assert len(found) == len({r.id for r in found})


def test_known_aliases():
    names = names_of("meta-llama/Llama-3.1-8B-Instruct", ["me/copy"], quantised=True)
    assert names[:2] == ["meta-llama/Llama-3.1-8B-Instruct", "me/copy"]
    assert {"unsloth/Meta-Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"} < set(names)
    assert len(names) == len(set(names))
    assert all(base not in others for base, others in hub.ALIASES.items())


# -- screening at a distance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [STUDY, ()], ids=["study", "none"])
def test_what_is_screened_on_the_hub_is_judged_as_in_its_folder(server, repos, cache, base, rules, monkeypatch):
    """The same verdict, reason and facts, of every wild adapter, whether its header fits into one answer or not."""
    monkeypatch.setattr("workbench.hub.distant.FIRST", 100)
    server.page, expected = 100, wild.make(repos / "wild", base)
    names = [name for name in expected if "<" not in name and name != "link-to-outside"]
    listed = {repo.id: repo for repo in hub.discover(BASE)}
    for name in names:
        here = screen(repos / "wild" / name, base.layers, None, rules, name=f"wild/{name}", until="header")
        there = screen(Distant(listed[f"wild/{name}"], cache, base.layers), rules=rules, until="header")
        assert (there.accepted, there.rule, there.reason) == (here.accepted, here.rule, here.reason)
        assert there.facts.items() <= here.facts.items()
        if there.accepted:
            assert there.facts == here.facts
    sent = sum(r.sent for r in server.asked("wild/", WEIGHTS))
    assert sent < sum(path.stat().st_size for path in (repos / "wild").glob(f"*/{WEIGHTS}")) / 4
    found = hub.survey(BASE, cache=cache, rules=rules)
    for verdict in found.verdicts:
        if verdict.name.removeprefix("wild/") in names:
            here = screen(repos / verdict.name, base.layers, None, rules, name=verdict.name)
            assert (verdict.accepted, verdict.rule, verdict.reason) == (here.accepted, here.rule, here.reason)
    assert not server.asked(".bin")
    assert not server.asked(".bin", method="HEAD")


def test_what_is_refused_by_its_header_costs_no_weights(server, repos, cache, base, monkeypatch):
    monkeypatch.setattr("workbench.hub.distant.FIRST", 100)
    wide = {module: (d_out, 2 * d_in) for module, (d_out, d_in) in base.projections.items()}
    random_adapter(wide, 2).save(repos / "eve/wide")
    assert rules_of(opened(cache)) == dict.fromkeys(NAMES, "") | {"eve/wide": "base-shape"}
    assert all(r.range.startswith("bytes=") and not r.range.endswith("-") for r in server.asked("eve/wide", WEIGHTS))


def test_explaining_one(server, repos, cache, base):
    path = repos / "ann/one" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 99, "task_type": "SEQ_CLS", "bias": "all"}))
    found = {c.rule.name: (c.state, c.reason) for c in hub.explain_one(BASE, "ann/one", cache=cache, rules=STUDY)}
    assert found["dora"] == ("passed", "")
    assert found["bias"] == ("refused", "bias = 'all': biases of the base were trained")
    assert {found[name][0] for name in ("init", "task-type", "rank", "finite")} == {"not checked"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "none"}))
    found = {c.rule.name: c.state for c in hub.explain_one(BASE, "ann/one", cache=cache, rules=STUDY)}
    assert {name for name, state in found.items() if state == "refused"} == {"task-type", "rank"}
    assert found["finite"] == "not checked"  # its weights are not here
    with pytest.raises(SelectionError, match="the Hub lists no 'ann/on' for org/base; did you mean ann/one"):
        hub.explain_one(BASE, "ann/on", cache=cache)
    states = {c.rule.name: c.state for c in explain(Candidate(repos / "bob/one", "bob/one", base.layers))}
    assert states["finite"] == "passed"
    assert states["task-type"] == "off"


def test_rules_of_one_s_own(server, repos, cache, base):
    asked = []

    def even(c):
        asked.append(c.name)
        return "" if c.header and c.pairs and next(iter(c.pairs.values()))["A"][0] % 2 == 0 else "an odd rank"

    def late(c):
        return "not two" * (c.norm > 0 and c.name.endswith("/two"))

    mine = [*DEFAULT, Rule("even", "Even ranks", even, "header"), Rule("late", "Not two", late, "values")]
    assert rules_of(opened(cache, rules=mine)) == {
        "ann/one": "",
        "ann/two": "even",
        "bob/one": "",
        "bob/two": "even",
    }
    assert sorted(set(asked)) == sorted(NAMES)
    told = counts(opened(cache, rules=mine).table)
    assert told.to_dict("records") == [{"rule": "even", "count": 2, "why": "A rule of one's own"}]
    assert screen(repos / "bob/two", base.layers, rules=mine[:-2] + mine[-1:], name="bob/two").rule == "late"
    assert screen(repos / "bob/two", None, None, mine[:-2] + mine[-1:], name="bob/two", until="header").accepted
    change = json.loads((repos / "ann/one" / CONFIG).read_text()) | {"r": 99}
    (repos / "ann/one" / CONFIG).write_text(json.dumps(change))
    early = Rule("early", "None at all", lambda c: "no", "config")
    assert screen(repos / "ann/one", base.layers, rules=[*DEFAULT, early]).rule == "early"
    assert screen(repos / "ann/one", base.layers).rule == "rank"
    with pytest.raises(SelectionError, match="there is a rule 'rank' already"):
        opened(cache, rules=[Rule("rank", "", even, "header")])
    with pytest.raises(SelectionError, match="has the stage 'later'; expected one of config, header, values"):
        opened(cache, rules=[Rule("mine", "", even, "later")])


# -- the cache -------------------------------------------------------------------------------------------------------


def test_the_client_and_peft_s_own_way_find_what_was_fetched(server, repos, cache):
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    opened(cache)
    report = scan_cache_dir(cache)
    assert {r.repo_id for r in report.repos} == {*NAMES, BASE}
    asked = len(server.asked(WEIGHTS))
    for name in NAMES:
        for ask in ({"local_files_only": True}, {}):
            found = hf_hub_download(name, WEIGHTS, cache_dir=cache, endpoint=server.url, **ask)
            assert Path(found).read_bytes() == (repos / name / WEIGHTS).read_bytes()
        assert snapshot_download(name, cache_dir=cache, local_files_only=True) == str(Path(found).parent)
    assert len(server.asked(WEIGHTS)) == asked


def test_what_the_client_fetched_is_not_fetched_again(server, repos, cache):
    from huggingface_hub import snapshot_download

    for name in NAMES:
        snapshot_download(name, cache_dir=cache, endpoint=server.url)
    server.log.clear()
    pool = opened(cache)
    assert pool.names == NAMES
    assert pool.table["norm"].notna().all()  # judged all the same
    assert not server.asked(WEIGHTS)
    assert not server.asked(CONFIG)


def test_the_second_opening_asks_for_the_listing_alone(server, repos, cache):
    first = opened(cache)
    server.log.clear()
    second = opened(cache)
    assert second.names == first.names == NAMES
    assert second.table.equals(first.table)
    paths = {request.path.partition("?")[0] for request in server.log}
    assert paths == {"/api/models"}
    random_adapter(tiny_base(), 7, seed=9).save(repos / "ann/one", overwrite=True)
    third = opened(cache)
    assert third.table["rank"].tolist() == [7, 3, 4, 5]
    assert {r.path.split("/")[2] for r in server.asked("resolve", WEIGHTS)} == {"one"}
    assert {r.path.split("/")[1] for r in server.asked("resolve", WEIGHTS)} == {"ann"}


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_nothing_is_asked(server, repos, cache, how, monkeypatch):
    with pytest.raises(AdapterError, match="no adapter of 'org/base' was listed before"):
        opened(cache, offline=True)
    server.trouble["bob/two"] = "gone"
    first = opened(cache, limit=4)
    del server.trouble["bob/two"]
    server.log.clear()
    if how == "environment":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    second = opened(cache, **({"offline": True} if how == "argument" else {}))
    assert second.names == first.names == NAMES[:3]
    assert second.checked
    assert second.adapter("ann/two").digest() == Adapter.load(repos / "ann/two").digest()
    assert second.table.drop(columns="reason").equals(first.table.drop(columns="reason"))
    assert second.refused() == {"bob/two": "not in the cache, and the Hub is not asked (offline)"}
    blob = (hub.survey(BASE, cache=cache, offline=True).folders["ann/one"] / WEIGHTS).resolve()
    blob.unlink()
    assert opened(cache, offline=True).names == NAMES[1:3]
    if how == "environment":
        with pytest.raises(AdapterError, match="ann/one: not in the cache, and the Hub is not asked"):
            hub.fetch("ann/one", cache=cache)
        assert hub.fetch("ann/two", cache=cache).is_dir()
        with pytest.raises(AdapterError, match="cannot be listed offline; unset HF_HUB_OFFLINE"):
            hub.discover(BASE)
    assert not server.log


def test_offline_what_was_listed_last_is_known(server, repos, cache):
    opened(cache)
    opened(cache, limit=1)
    assert opened(cache, offline=True).names == NAMES
    server.bases["bob/two"] = "org/other"
    opened(cache)
    assert opened(cache, offline=True).names == NAMES[:3]


def test_offline_without_an_inventory_the_cache_is_screened(server, cache):
    opened(cache)
    for path in (cache / "workbench").glob("*.parquet"):
        path.unlink()
    assert opened(cache, offline=True).names == NAMES
    assert opened(cache, offline=True, rules=STUDY).names == NAMES


def test_the_budget(server, repos, cache):
    sizes = {name: (repos / name / WEIGHTS).stat().st_size for name in NAMES}
    server.facts |= {name: {"downloads": 10 - i} for i, name in enumerate(NAMES)}
    room = sizes["ann/one"] + sizes["ann/two"] + sizes["bob/one"] - 1
    pool = opened(cache, budget=room)
    assert rules_of(pool) == {"ann/one": "", "ann/two": "", "bob/one": "budget", "bob/two": "budget"}
    left = sizes["bob/one"] - 1
    assert pool.refused()["bob/one"] == (
        f"its weights have {sizes['bob/one']:,} bytes, and {left:,} of the budget of {room:,} are left"
    )
    assert pool.table.set_index("name").loc["bob/one", "rank"] == 4  # its header was read
    assert not [r for r in server.asked("bob/", WEIGHTS) if r.range in ("", f"bytes=0-{sizes['bob/one']}")]
    server.log.clear()
    assert rules_of(opened(cache, budget=room)) == rules_of(pool)  # what is kept counts
    assert rules_of(opened(cache, budget=room + 1)) == dict.fromkeys(NAMES[:3], "") | {"bob/two": "budget"}
    assert not server.asked("ann/", WEIGHTS)
    assert rules_of(opened(cache)) == dict.fromkeys(NAMES, "")
    assert opened(cache, budget=0).names == NAMES  # nothing is to be fetched, and nothing thrown away


def test_the_disk_is_not_filled(server, cache, monkeypatch):
    from collections import namedtuple

    free = opening.SPARE + 20_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(free))
    pool = opened(cache)
    assert 0 < len(pool) < 4
    assert "of the disk are left" in next(iter(pool.refused().values()))


def test_files_of_strangers_stay_in_the_cache(server, repos, cache, tmp_path):
    info = server.info
    hostile = {
        "ann/one": {"id": "../../evil"},
        "ann/two": {"id": "a/b/../../../evil"},
        "bob/one": {"sha": "../../../../evil"},
        "bob/two": {"siblings": [{"rfilename": "../../evil.json"}, {"rfilename": "/evil"}, {"rfilename": CONFIG}]},
    }
    server.info = lambda repo: info(repo) | hostile.get(repo, {})
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(cache))
    found = {v.name: (v.rule, v.reason) for v in hub.survey(BASE, cache=cache).verdicts}
    assert found["../../evil"] == ("fetch", "'../../evil' is no id of a repository on the Hub")
    assert found["a/b/../../../evil"][0] == "fetch"
    assert found["bob/one"] == ("fetch", "'../../../../evil' is no commit")
    assert found["bob/two"][0] == "weights-file"
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(cache)) == before
    assert not [path for path in cache.rglob("*") if "evil" in path.name]
    for repo, revision in (("../x", "0" * 40), ("a/b", "main"), ("a/b", "../" * 13 + "x"), ("a/b", None)):
        with pytest.raises(Refused):
            Snapshot(repo, revision, cache)


def test_a_card_beyond_all_measure_is_left(server, repos, cache, monkeypatch):
    monkeypatch.setitem(hub.opening.bring.__globals__["LIMITS"], CARD, 10)
    (repos / "ann/one" / CARD).write_text("x" * 11)
    (repos / "ann/two" / CARD).write_text("x" * 10)
    found = hub.survey(BASE, cache=cache)
    assert [v.accepted for v in found.verdicts] == [True] * 4
    assert not (found.folders["ann/one"] / CARD).exists()
    assert (found.folders["ann/two"] / CARD).read_text() == "x" * 10


def test_where_there_are_no_links_files_are_copied(server, repos, cache, monkeypatch):
    def never(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", never)
    folder = hub.fetch("ann/one", cache=cache)
    assert not (folder / WEIGHTS).is_symlink()
    assert (folder / WEIGHTS).read_bytes() == (repos / "ann/one" / WEIGHTS).read_bytes()


# -- several at once, and interruptions ------------------------------------------------------------------------------


def test_two_at_once_fetch_each_file_once(server, repos, cache):
    """The lock is the system's, so that two threads with a lock each stand for two processes."""
    server.fail("*", "get", "slow", 100)
    pools = []
    threads = [threading.Thread(target=lambda: pools.append(opened(cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pool.names for pool in pools] == [NAMES, NAMES]
    for name in NAMES:
        whole = [r for r in server.asked(name, WEIGHTS) if not r.range]
        assert len(whole) == 1


WORK = "import sys; from workbench import hub; hub.survey(sys.argv[1], cache=sys.argv[2])"


HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def started(server, cache):
    """A process that fetches, and hears an interrupt even where the tests do not: a shell's background jobs ignore it."""
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen([sys.executable, "-c", HEARS + WORK, BASE, str(cache)], env=env, stderr=subprocess.PIPE)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_was_finished_when_it_was_interrupted_is_not_fetched_again(server, repos, cache, how):
    for name in NAMES[2:]:
        server.fail(name, "whole", "slow", name=WEIGHTS)  # not the screening, which reads the header
    server.slowness = 1.0  # ten seconds for each
    process = started(server, cache)

    def finished(name):
        return bool(list(cache.glob(f"models--{name.replace('/', '--')}/snapshots/*/{WEIGHTS}")))

    until(lambda: all(map(finished, NAMES[:2])) and len(list(cache.rglob("*.incomplete"))) == 2)
    until(lambda: all(path.stat().st_size for path in cache.rglob("*.incomplete")))
    process.send_signal(how)
    process.wait(30)
    process.stderr.close()
    assert not any(map(finished, NAMES[2:]))
    server.faults.clear()
    server.log.clear()
    have = {path.parent.parent.name: path.stat().st_size for path in cache.rglob("*.incomplete")}
    assert opened(cache).names == NAMES
    for name in NAMES:
        fetched = [r for r in server.asked(name, WEIGHTS) if r.range in ("", "bytes=0-") or r.range.endswith("-")]
        begun = have.get(f"models--{name.replace('/', '--')}")
        assert [r.range for r in fetched] == ([f"bytes={begun}-"] if begun else [])
    assert not list(cache.rglob("*.incomplete"))


def test_an_unforeseen_error_stops_all_and_keeps_what_was_found(server, cache, monkeypatch):
    take = opening._Run.take

    def failing(self, repo):
        if repo.id == "bob/two":
            raise RuntimeError("a defect")
        return take(self, repo)

    monkeypatch.setattr(opening._Run, "take", failing)
    monkeypatch.setattr(opening, "THREADS", 1)
    with pytest.raises(RuntimeError, match="a defect"):
        opened(cache)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert opened(cache).names == NAMES[:3]


def test_progress_is_shown_on_request(server, cache, capsys):
    opened(cache, progress=True)
    said = capsys.readouterr().err
    assert "screened" in said
    assert "fetched" in said
    assert "4 of 4 adapters" in said
    shutil.rmtree(cache)
    opened(cache)
    assert capsys.readouterr().err == ""


def test_a_file_that_is_there_is_not_asked_about(server, cache):
    held = Snapshot("ann/one", server.commit("ann/one"), cache)
    download(held, CONFIG)
    server.log.clear()
    assert download(held, CONFIG).is_file()
    assert not server.log


def test_options_for_the_hub_alone(repos):
    with pytest.raises(SelectionError, match="budget: for adapters on the Hub only"):
        Pool.open(repos, budget=10)
