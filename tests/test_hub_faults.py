"""The Hub with everything going wrong: what comes of it, and what was asked, with the real client over HTTP."""

import math
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from helpers import random_adapter, tiny_base
from hub_server import HubServer
from workbench import hub
from workbench.adapters import Adapter
from workbench.errors import AdapterError
from workbench.hub import client
from workbench.hub.files import Snapshot, about, download
from workbench.pool import Pool

BASE, ONE, TWO = "org/base", "ann/one", "bob/two"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALWAYS = math.inf


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two sound adapters and their base's configuration; no test changes them."""
    folder, base = tmp_path_factory.mktemp("served"), tiny_base()
    for i, name in enumerate((ONE, TWO)):
        random_adapter(base, 3 + i, seed=i, name=name).save(folder / name)
    base.model.config.save_pretrained(folder / BASE)
    return folder


@pytest.fixture
def server(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 2.0)
    monkeypatch.setattr(client, "PAUSE", 0.0)
    with HubServer(served, BASE, page=1) as running:
        running.bases[BASE] = ""
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def naps(monkeypatch):
    """The pauses of the client itself, which are not waited for."""
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=slept.append))
    return slept


def opened(tmp_path, **options):
    return Pool.open(f"hub:{BASE}", cache=tmp_path / "cache", **options)


def intact(pool, served, names=(ONE, TWO)):
    assert pool.names == names
    assert all(pool.adapter(name).digest() == Adapter.load(served / name).digest() for name in names)
    return True


def weights_sent(server, repo=ONE):
    """Bytes of the weights' file that were sent, and the ranges asked for; what screening read is left out."""
    asked = [r for r in server.asked(repo, WEIGHTS) if not re.fullmatch(r"bytes=0-\d+", r.range)]
    return sum(r.sent for r in asked), [r.range for r in asked]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "README.md"])
@pytest.mark.parametrize("how", ["429", "500", "503", "etag", "no-etag", "evil-etag"])
def test_a_question_that_goes_wrong_once_is_asked_again(server, served, tmp_path, how, name):
    server.fail(ONE, "head", how, name=name)
    assert intact(opened(tmp_path), served)
    others = len(server.asked(TWO, name, method="HEAD"))
    unused = how == "etag" and name == WEIGHTS  # screening needs its size alone
    assert len(server.asked(ONE, name, method="HEAD")) == others + (not unused)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("how", ["429", "500", "503", "cut", "short", "long", "slow", "other-range"])
def test_an_answer_that_goes_wrong_is_asked_for_again(server, served, tmp_path, how, name):
    server.fail(ONE, "get", how, 2, name=name)
    assert intact(opened(tmp_path), served)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.parametrize("how", ["corrupt", "garbage"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "README.md"])
def test_damaged_content_is_fetched_again(server, served, tmp_path, how, name):
    held = Snapshot(ONE, server.commit(ONE), tmp_path / "cache")
    server.fail(ONE, "get", how, name=name)
    assert download(held, name).read_bytes() == (served / ONE / name).read_bytes()
    assert len(server.asked(ONE, name)) == 2
    assert download(held, name).is_file()
    assert len(server.asked(ONE, name)) == 2


@pytest.mark.parametrize(
    ("kind", "how", "rule", "words"),
    [
        ("head", "500", "fetch", "500"),
        ("head", "429", "fetch", "429"),
        ("head", "missing", "fetch", "lists a file that it does not have"),
        ("head", "vanished", "fetch", "does not exist any more, or is private"),
        ("head", "etag", "checksum", "its sha256 is not the d9298a10d1b0"),
        ("head", "no-etag", "fetch", "no size or no hash of adapter_model.safetensors"),
        ("head", "evil-etag", "fetch", "'../../../../evil'"),
        ("get", "503", "fetch", "503"),
        ("get", "missing", "fetch", "lists a file that it does not have"),
        ("get", "vanished", "fetch", "does not exist any more"),
        ("get", "long", "fetch", "bytes from 0 of 15,736 were asked for"),
        ("get", "corrupt", "checksum", "adapter_model.safetensors is damaged: its sha256"),
        ("get", "garbage", "header", "claims a header of 8,680,820,740,569,200,760"),
        ("get", "other-range", "fetch", "bytes 1-"),
    ],
)
def test_what_stays_wrong_is_one_refused_row(server, served, tmp_path, kind, how, rule, words):
    server.fail(ONE, kind, how, ALWAYS, name=WEIGHTS)
    pool = opened(tmp_path)
    assert intact(pool, served, (TWO,))
    row = pool.table.set_index("name").loc[ONE]
    assert row["rule"] == rule
    assert words in row["reason"]
    assert not row["reason"].startswith(ONE)
    assert len(server.asked(ONE, WEIGHTS)) <= 2 * client.TRIES
    if (kind, how) == ("get", "503"):
        assert len(server.asked(ONE, WEIGHTS)) == client.TRIES
    server.faults.clear()
    if rule != "header":  # that was found of the file, the rest only of the day
        assert intact(opened(tmp_path), served)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_download_that_breaks_off_goes_on_where_it_was(server, served, tmp_path, elsewhere):
    server.elsewhere = elsewhere
    server.fail(ONE, "get", "cut", 2, name=WEIGHTS)
    held = Snapshot(ONE, server.commit(ONE), tmp_path / "cache")
    size = (served / ONE / WEIGHTS).stat().st_size
    assert download(held, WEIGHTS).read_bytes() == (served / ONE / WEIGHTS).read_bytes()
    sent, ranges = weights_sent(server)
    assert sent == size
    first = size // 3
    assert list(dict.fromkeys(ranges)) == ["", f"bytes={first}-", f"bytes={first + (size - first) // 3}-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_what_another_run_began_is_continued(server, served, tmp_path, ranges, monkeypatch):
    server.ranges = ranges
    monkeypatch.setattr(client, "TRIES", 1)
    server.fail(ONE, "get", "cut", name=WEIGHTS)
    held = Snapshot(ONE, server.commit(ONE), tmp_path / "cache")
    with pytest.raises(AdapterError, match="ann/one: RemoteProtocolError"):
        download(held, WEIGHTS)
    part = next((tmp_path / "cache").rglob("*.incomplete"))
    size, have = (served / ONE / WEIGHTS).stat().st_size, part.stat().st_size
    assert 0 < have < size
    assert download(held, WEIGHTS).read_bytes() == (served / ONE / WEIGHTS).read_bytes()
    last = server.asked(ONE, WEIGHTS)[-1]
    assert (last.range, last.sent) == (f"bytes={have}-", size - have if ranges else size)
    assert not part.exists()


@pytest.mark.parametrize("what", ["junk", "longer", "whole", "spoilt"])
def test_what_is_found_begun_is_not_trusted(server, served, tmp_path, what):
    held, good = Snapshot(ONE, server.commit(ONE), tmp_path / "cache"), (served / ONE / WEIGHTS).read_bytes()
    part = held.blob(f"{about(held, WEIGHTS).etag}.incomplete")
    part.parent.mkdir(parents=True)
    part.write_bytes({"junk": b"junk", "longer": good + b"more", "whole": good, "spoilt": b"?" * len(good)}[what])
    assert download(held, WEIGHTS).read_bytes() == good
    assert len(server.asked(ONE, WEIGHTS)) == {"junk": 2, "longer": 1, "whole": 0, "spoilt": 1}[what]


def test_a_part_that_the_server_does_not_know_is_fetched_anew(server, served, tmp_path):
    held, good = Snapshot(ONE, server.commit(ONE), tmp_path / "cache"), (served / ONE / WEIGHTS).read_bytes()
    part = held.blob(f"{about(held, WEIGHTS).etag}.incomplete")
    part.parent.mkdir(parents=True)
    part.write_bytes(good[:100])
    server.fail(ONE, "get", "416")
    assert download(held, WEIGHTS).read_bytes() == good
    assert [r.range for r in server.asked(ONE, WEIGHTS)] == ["bytes=100-", ""]


def test_a_header_is_put_together_where_ranges_are_ignored_or_break_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.hub.distant.FIRST", 64)
    server.fail(ONE, "get", "cut", 3, name=WEIGHTS)
    for server.ranges in (True, False):
        seen = hub.survey(BASE, cache=tmp_path / str(server.ranges), until="header")
        assert [v.accepted for v in seen.verdicts] == [True, True]


def test_of_the_weights_only_the_header_is_read_before_they_are_wanted(server, served, tmp_path, monkeypatch):
    size = (served / ONE / WEIGHTS).stat().st_size
    for first, requests in ((64, 2), (2**17, 1)):
        monkeypatch.setattr("workbench.hub.distant.FIRST", first)
        server.log.clear()
        seen = hub.survey(BASE, cache=tmp_path / str(first), until="header")
        assert [v.accepted for v in seen.verdicts] == [True, True]
        assert not seen.folders
        asked = server.asked(ONE, WEIGHTS)
        assert len(asked) == requests
        assert all(request.range for request in asked)
        assert (sum(r.sent for r in asked) < size / 2) == (first == 64)


def test_a_server_that_knows_no_ranges_is_not_read_to_the_end(server, tmp_path):
    big = tmp_path / "served"
    random_adapter(tiny_base(), 32, name="x").save(big / "eve" / "big")
    path = big / "eve/big" / WEIGHTS
    header = int.from_bytes(path.read_bytes()[:8], "little")
    server.folder, server.ranges = big, False
    with path.open("ab") as file:
        file.truncate(2**26)  # 64 MiB, of which the header speaks of little: screening refuses it
    verdict = hub.survey(BASE, cache=tmp_path / "cache").verdicts[0]
    assert (verdict.rule, "is damaged: it has 67,108,864 bytes" in verdict.reason) == ("header", True)
    for request in server.asked("eve/big", WEIGHTS):
        for _ in range(100):
            time.sleep(0.01)  # until the server has noticed
            if request.sent == 0:
                break
        assert request.sent == 0  # it could not send all of what it began to
    assert header < 2**17


@pytest.mark.parametrize("how", ["429", "500", "503"])
def test_pages_of_the_listing_are_asked_for_again(server, served, tmp_path, naps, how):
    server.fail("*", "list", how, 2, after=3)
    assert [repo.id for repo in hub.discover(BASE)] == [ONE, TWO]
    assert naps == [4.0, 4.0]  # as the Hub says, and a second for safety
    server.fail("*", "list", how, ALWAYS)
    with pytest.raises(AdapterError, match=f"the adapters of org/base could not be listed on the Hub: .*{how}"):
        hub.discover(BASE)
    assert len(server.asked("/api/models?")) < 12


def test_a_listing_put_off_until_a_date(server, naps, monkeypatch):
    """The client does not know dates: it gives up after its own pauses, and then the date is waited for."""
    waited = []
    monkeypatch.setattr(
        client.Patience, "_sleep", lambda self, seconds: waited.append(seconds) or self.__dict__.update(_open=0)
    )
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.fail("*", "list", "429", 6, after=date)
    assert [repo.id for repo in hub.discover(BASE)] == [ONE, TWO]
    assert waited == [pytest.approx(100, abs=3)]


@pytest.mark.parametrize("kind", ["info", "revision"])
@pytest.mark.parametrize("how", ["429", "500", "503"])
def test_questions_about_a_repository_are_asked_again(server, served, tmp_path, kind, how):
    server.fail(ONE, kind, how, 2)
    revision = server.commit(ONE) if kind == "revision" else None
    folder = hub.fetch(ONE, revision, cache=tmp_path / "cache")
    assert (folder / WEIGHTS).read_bytes() == (served / ONE / WEIGHTS).read_bytes()
    assert len(server.asked(f"/api/models/{ONE}")) == 3
    with pytest.raises(AdapterError, match="no such revision any more"):
        hub.fetch(ONE, "0" * 40, cache=tmp_path / "cache")


@pytest.mark.parametrize("dated", [False, True])
def test_all_threads_keep_the_pause_that_the_hub_asks_for(server, served, tmp_path, dated):
    """While one is told to wait, no other asks anything either."""
    after = "0.4"
    if dated:
        after = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds: 1 to 2
    server.fail(ONE, "head", "429", name=CONFIG, after=after)
    assert intact(opened(tmp_path), served)
    told = next(r for r in server.log if r.status == 429)
    late = [r for r in server.log if r.time > told.time + 0.1]  # what was under way already may come
    assert late
    assert min(r.time for r in late) >= told.time + 0.39


def test_a_pause_beyond_all_patience_is_not_waited_for(server, tmp_path):
    server.fail(ONE, "head", "429", ALWAYS, after=10_000)
    start = time.monotonic()
    assert opened(tmp_path).table.set_index("name").loc[ONE, "rule"] == "fetch"
    assert time.monotonic() - start < 5
    assert len(server.asked(ONE, CONFIG, method="HEAD")) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({}, None),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(headers, seconds):
    from httpx2 import Headers

    error = Exception()
    error.response = SimpleNamespace(headers=Headers(headers))
    assert client.retry_after(error) == seconds
    assert client.retry_after(Exception()) is None


def test_pauses_grow_and_tries_are_counted(monkeypatch):
    from httpx2 import ConnectError

    patience, slept, tries = client.Patience(), [], []
    monkeypatch.setattr(client, "PAUSE", 1.0)
    monkeypatch.setattr(patience, "_sleep", slept.append)

    def call():
        tries.append(1)
        raise ConnectError("no route")

    with pytest.raises(ConnectError):
        patience(call)
    assert len(tries) == client.TRIES
    assert all(0.75 * 2**i <= pause <= 1.25 * 2**i for i, pause in enumerate(slept))
    assert len(slept) == client.TRIES - 1
    tries.clear()
    with pytest.raises(ConnectError):  # a megabyte more each time for a while: nobody gives up meanwhile
        patience(call, lambda: min(len(tries), 20) * client.STEP)
    assert len(tries) == 20 + client.TRIES - 1
    tries.clear()
    with pytest.raises(ConnectError):  # a byte each time is no progress
        patience(call, lambda: len(tries))
    assert len(tries) == client.TRIES


def test_the_hub_s_refusals_are_not_asked_again(server, tmp_path):
    server.trouble[ONE] = "gated"
    with pytest.raises(AdapterError) as error:
        hub.fetch(ONE, cache=tmp_path / "cache")
    assert f"accept the terms at {server.url}/{ONE}, then run `hf auth login`" in str(error.value)
    assert len(server.asked(ONE, "resolve", method="HEAD")) == 1
    server.trouble[ONE] = "gone"
    with pytest.raises(AdapterError, match="or is private: `hf auth login` with an account that may read it"):
        hub.fetch(ONE, cache=tmp_path / "cache")


def test_whoever_waits_is_woken_when_all_is_stopped():
    patience, ended = client.Patience(), []
    patience.close(60)

    def wait():
        with pytest.raises(client.Interrupted):
            patience(lambda: None)
        ended.append(1)

    thread = threading.Thread(target=wait)
    thread.start()
    patience.stopped.set()
    thread.join(5)
    assert ended
