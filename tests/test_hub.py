"""The Hub, through the real client and a server on this machine."""

import hashlib
import json
import shutil

import pytest

from helpers import random_adapter, tiny_base
from hub_server import HubServer
from workbench import hub
from workbench.adapters import Adapter
from workbench.errors import AdapterError, SelectionError, WorkbenchError
from workbench.nano import wild
from workbench.pool import Pool
from workbench.screen import REMOTE, counts

BASE = "org/base"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def repos(tmp_path, base):
    """Four sound adapters by two authors, and the base itself."""
    folder = tmp_path / "served"
    for i, name in enumerate(("ann/one", "ann/two", "bob/one", "bob/two")):
        random_adapter(base, 2 + i, seed=i, name=name).save(folder / name)
    base.model.save_pretrained(folder / "org" / "base")
    return folder


@pytest.fixture
def server(repos, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("workbench.hub.client.PAUSE", 0.0)
    with HubServer(repos, BASE) as running:
        running.bases[BASE] = ""
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_discover_follows_the_pages(server, repos, base):
    for i in range(5):
        random_adapter(base, 2, seed=i).save(repos / "eve" / f"n{i}")
    server.bases["eve/n3"] = "org/other"
    found = hub.discover(BASE)
    assert [repo.id for repo in found] == sorted(
        ["ann/one", "ann/two", "bob/one", "bob/two", "eve/n0", "eve/n1", "eve/n2", "eve/n4"]
    )
    assert all(repo.revision == server.commit(repo.id) for repo in found)
    assert sum(request.startswith("GET /api/models?") for request in server.requests) == 3
    assert len(hub.discover(BASE, limit=2)) == 2


def test_fetch_brings_the_files_and_nothing_else(server, repos, tmp_path):
    (repos / "ann/one" / "train.py").write_text("raise SystemExit")
    (repos / "ann/one" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    folder = hub.fetch("ann/one", cache=tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == (repos / "ann/one" / WEIGHTS).read_bytes()
    assert (tmp_path / "cache") in folder.parents
    asked = [request for request in server.requests if "train.py" in request or ".bin" in request]
    assert not asked


def test_fetch_of_a_revision(server, tmp_path):
    commit = server.commit("bob/one")
    assert hub.fetch("bob/one", commit, cache=tmp_path / "cache").name == commit


def test_a_pool_from_the_hub(server, repos, tmp_path):
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    assert pool.names == ("ann/one", "ann/two", "bob/one", "bob/two")
    assert (pool.name, pool.base, pool.checked) == (f"hub:{BASE}", BASE, True)
    assert pool.table["rank"].tolist() == [2, 3, 4, 5]
    for i, name in enumerate(pool.names):
        served = Adapter.load(repos / name)
        assert pool.adapter(name).digest() == served.digest()
        assert served.rank == 2 + i
    assert pool.stack().names == pool.names


def test_one_bad_repository_stops_nothing(server, repos, tmp_path, base):
    server.trouble["ann/one"] = "gated"
    server.trouble["bob/one"] = "corrupt"
    server.trouble["bob/two"] = "gone"
    (repos / "eve/pickled").mkdir(parents=True)
    shutil.copy(repos / "ann/two/adapter_config.json", repos / "eve/pickled")
    (repos / "eve/pickled/adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (repos / "eve/empty").mkdir()
    (repos / "eve/empty/README.md").write_text("nothing yet")
    (repos / "eve/weightless").mkdir()
    shutil.copy(repos / "ann/two/adapter_config.json", repos / "eve/weightless")
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    rules = dict(zip(pool.table["name"], pool.table["rule"], strict=True))
    assert rules == {
        "ann/one": "gated",
        "ann/two": "",
        "bob/one": "checksum",
        "bob/two": "fetch",
        "eve/empty": "config-file",
        "eve/pickled": "pickle",
        "eve/weightless": "weights-file",
    }
    reasons = pool.table.set_index("name")["reason"]
    assert "granted by its author" in reasons["ann/one"]
    assert "sha256" in reasons["bob/one"]
    assert "adapter_model.bin" in reasons["eve/pickled"]
    assert all(not reason.startswith(name) for name, reason in reasons.items())
    told = counts(pool.table).set_index("rule")
    assert told["count"].sum() == 6
    assert told.loc["checksum", "why"] == REMOTE["checksum"]
    with pytest.raises(AdapterError, match=r"bob/one was refused by the rule 'checksum'"):
        pool.adapter("bob/one")


def test_a_corrupted_file_is_refused_and_does_not_stay_in_the_cache(server, repos, tmp_path):
    server.trouble["ann/one"] = "corrupt"
    with pytest.raises(AdapterError, match=r"ann/one: adapter_model\.safetensors is damaged: its sha256"):
        hub.fetch("ann/one", cache=tmp_path / "cache")
    good = (repos / "ann/one" / WEIGHTS).read_bytes()
    spoilt = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size == len(good)]
    assert not spoilt
    del server.trouble["ann/one"]
    folder = hub.fetch("ann/one", cache=tmp_path / "cache")
    assert (folder / WEIGHTS).read_bytes() == good


def test_damage_on_the_way_is_mended_by_fetching_again(server, repos, tmp_path):
    server.trouble["ann/one"] = "corrupt-once"
    folder = hub.fetch("ann/one", cache=tmp_path / "cache")
    want = hashlib.sha256((repos / "ann/one" / WEIGHTS).read_bytes()).hexdigest()
    assert hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() == want
    assert "ann/one" not in server.trouble


def test_a_file_spoilt_in_the_cache_is_fetched_again(server, repos, tmp_path):
    folder = hub.fetch("ann/one", cache=tmp_path / "cache")
    blob = (folder / WEIGHTS).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert (hub.fetch("ann/one", cache=tmp_path / "cache") / WEIGHTS).read_bytes() == data


def test_an_overloaded_server_is_asked_again(server, tmp_path):
    server.trouble["ann/one"] = "busy-once"
    assert (hub.fetch("ann/one", cache=tmp_path / "cache") / WEIGHTS).is_file()
    asked = [request for request in server.requests if request.startswith("GET /api/models/ann/one")]
    assert len(asked) == 2


def test_a_refused_configuration_spares_the_weights(server, repos, tmp_path):
    path = repos / "ann/one/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    assert pool.table.set_index("name").loc["ann/one", "rule"] == "dora"
    asked = [request for request in server.requests if f"/{WEIGHTS}" in request]
    assert asked
    assert not any("ann/one" in request for request in asked)


def test_too_large_a_file_is_not_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.rules.MAX_WEIGHTS", 20_000)
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    assert set(pool.table["rule"]) == {"", "weights-file"}
    refused = pool.table.loc[~pool.table["accepted"], "name"]
    assert len(refused)
    assert not any(f"GET /{name}/resolve" in r and WEIGHTS in r for name in refused for r in server.requests)


def test_aliases_of_the_base_stack_together(server, repos, tmp_path):
    for name, said in (("ann/one", "someone/base-4bit"), ("ann/two", "/data/models/base"), ("bob/one", "")):
        path = repos / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": said}))
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    assert len(pool) == 4
    assert pool.stack().base == BASE


def test_the_shapes_of_the_base_are_compared(server, repos, tmp_path, base):
    wide = {module: (d_out, 2 * d_in) for module, (d_out, d_in) in base.projections.items()}
    random_adapter(wide, 2).save(repos / "eve/wide")
    cache = tmp_path / "cache"
    rules = Pool.open(f"hub:{BASE}", cache=cache).table.set_index("name")["rule"]
    assert rules["eve/wide"] == "base-shape"
    assert (rules.drop("eve/wide") == "").all()
    server.trouble[BASE] = "gated"
    unchecked = Pool.open(f"hub:{BASE}", cache=tmp_path / "other cache")
    assert not unchecked.checked
    assert "not compared" in repr(unchecked)
    checked = Pool.open(f"hub:{BASE}", base=repos / BASE, cache=cache)
    assert checked.base == str(repos / BASE)
    assert "eve/wide" not in checked.names


def test_wild_repositories(server, repos, tmp_path, base):
    expected = wild.make(repos / "wild", base)
    shutil.rmtree(repos / "wild/link-to-outside")
    for name in expected:
        if "<" in name:
            shutil.rmtree(repos / "wild" / name)  # the Hub has no such names
    rules = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache").table.set_index("name")["rule"]
    here = {f"wild/{name}": rule for name, rule in expected.items() if (repos / "wild" / name).is_dir()}
    here["wild/other-base-name"] = ""  # on the Hub the card says of which base it is, and the shapes show
    assert {name: rules[name] for name in here} == here


def test_no_adapters_and_no_hub(server, tmp_path, monkeypatch):
    with pytest.raises(AdapterError, match="lists no adapter of 'org/nothing'"):
        Pool.open("hub:org/nothing", cache=tmp_path / "cache")
    with pytest.raises(AdapterError, match="nobody/none"):
        hub.fetch("nobody/none", cache=tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own attempts
    with pytest.raises(WorkbenchError, match="could not be listed"):
        Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")


def test_all_refused_opens_but_does_not_stack(server, repos, tmp_path):
    server.trouble |= dict.fromkeys(("ann/one", "ann/two", "bob/one", "bob/two"), "gated")
    pool = Pool.open(f"hub:{BASE}", cache=tmp_path / "cache")
    assert len(pool) == 0
    assert len(pool.table) == 4
    with pytest.raises(SelectionError, match="all 4 adapters"):
        pool.stack()
