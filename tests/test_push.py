"""Uploading, through the real client and a server on this machine; and writing folders, which a failure leaves alone."""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import workbench.adapters as adapters_under_test
from helpers import hook_logits, peft_s_own_warnings, random_adapter, relative, some_ids, tiny_base
from hub_server import HubServer
from workbench.adapters import CONFIG, WEIGHTS, Adapter
from workbench.errors import AdapterError, MergeError
from workbench.hub import client
from workbench.merge import merge
from workbench.pool import Pool
from workbench.push import push

TOKEN = "hf_secretsecretsecret"
# huggingface_hub 2.4 hands its HTTP library a file as `data`, when it does not upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4.0)


@pytest.fixture
def adapter(base):
    return random_adapter(base, 3, seed=1, name="mine")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub where TOKEN may write to `me`; no token is stored on the machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its servers are others than the Hub's
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    monkeypatch.setattr(client, "PAUSE", 0.0)
    (tmp_path / "served").mkdir()
    with HubServer(tmp_path / "served") as running:
        running.writers[TOKEN] = {"me"}
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)  # these are made once, on import
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def served(server, repo):
    return server.files(repo) if repo in server.repos() else None


def test_what_was_pushed_gives_the_same_logits_in_plain_peft(server, base, tmp_path):
    from peft import PeftModel

    sources = [random_adapter(base, r, seed=r, name=f"ann/{r}") for r in (2, 5)]
    merged = merge(sources, "ties", rank=6, weights=[1.0, -0.5])
    url = merged.push("me/merged", token=TOKEN)
    assert url == f"{server.url}/me/merged/commit/{server.commit('me/merged')}"
    assert [made["added"] for made in server.commits] == [["README.md", CONFIG, WEIGHTS]]
    with peft_s_own_warnings():
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), "me/merged", cache_dir=tmp_path / "cache").eval()
    ids = some_ids(base)
    with torch.no_grad():
        got, bare = model(input_ids=ids).logits, base.model(input_ids=ids).logits
    want = hook_logits(base, merged, ids)
    assert relative(got, want) < 1e-5
    assert relative(bare, want) > 1e-2
    assert any(request.startswith("GET /me/merged/resolve") and WEIGHTS in request for request in server.requests)
    card = server.files("me/merged")["README.md"].decode()
    assert 'model = PeftModel.from_pretrained(base, "me/merged")' in card
    assert "| ann/2 | 1 |" in card


def test_what_was_pushed_is_what_would_have_been_saved(server, adapter, tmp_path):
    adapter.push("me/half", token=TOKEN, dtype=torch.bfloat16, commit_message="Half the size")
    adapter.save(tmp_path / "half", dtype=torch.bfloat16)
    for name in (CONFIG, WEIGHTS):
        assert server.files("me/half")[name] == (tmp_path / "half" / name).read_bytes()
    assert server.commits[0]["message"] == "Half the size"
    assert adapter.push("me/full", token=TOKEN).startswith(f"{server.url}/me/full/commit/")
    assert server.commits[1]["message"] == "Upload mine, written by workbench"


def test_licences_come_with_the_adapters_from_the_hub_and_go_into_the_card_of_the_merge(server, base, tmp_path):
    for name, licence in (("ann/a", "mit"), ("ann/b", "gpl-3.0"), ("eve/c", "cc-by-nc-4.0"), ("eve/d", None)):
        folder = random_adapter(base, 2, seed=len(name), name=name).save(server.folder / name)
        said = f"license: {licence}\n" if licence else ""
        (folder / "README.md").write_text(f"---\nlibrary_name: peft\n{said}---\n\n# {name}\n")
    pool = Pool.open(f"hub:{server.base}", cache=tmp_path / "cache")
    merged = merge(pool, "sum", weights={"ann/a": 1.0, "ann/b": 0.5, "eve/c": -2.0})
    assert merged.info["licences"] == {"ann/a": "mit", "ann/b": "gpl-3.0", "eve/c": "cc-by-nc-4.0", "eve/d": ""}
    merged.push("me/merged", token=TOKEN, base="org/base")
    card = server.files("me/merged")["README.md"].decode()
    assert "license: other\nlicense_name: gpl-3.0-and-cc-by-nc-4.0\n" in card
    assert "gpl-3.0 (ann/b) asks that what is made from it be passed on under it" in card
    assert "eve/d" not in card.split("Conflicts")[1]  # of weight 0


def test_an_adapter_that_is_there_already_is_replaced_only_when_asked(server, adapter):
    adapter.push("me/mine", token=TOKEN)
    (server.folder / "me/mine/adapter_model.bin").write_bytes(b"the old weights, as a pickle")
    (server.folder / "me/mine/scores.json").write_text("{}")
    before, parent = served(server, "me/mine"), server.commit("me/mine")
    other = adapter.times(-2.0)
    with pytest.raises(
        AdapterError, match=r"me/mine holds an adapter already; choose another name or pass overwrite=True"
    ):
        other.push("me/mine", token=TOKEN)
    assert served(server, "me/mine") == before
    other.push("me/mine", token=TOKEN, overwrite=True)
    after = served(server, "me/mine")
    assert after[WEIGHTS] != before[WEIGHTS]
    assert set(before) - set(after) == {"adapter_model.bin"}
    assert after["scores.json"] == before["scores.json"]
    assert server.commits[-1]["parent"] == parent
    assert len(server.commits) == 2


def test_a_repository_of_something_else_is_left_alone(server, adapter):
    (server.folder / "me/model").mkdir(parents=True)
    (server.folder / "me/model/model.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(AdapterError, match=r"me/model holds no adapter but other files, such as model\.safetensors"):
        adapter.push("me/model", token=TOKEN, overwrite=True)
    assert set(served(server, "me/model")) == {"model.safetensors"}
    (server.folder / "me/new").mkdir()
    (server.folder / "me/new/README.md").write_text("---\nlicense: mit\n---\n")  # as the Hub's own form makes it
    adapter.push("me/new", token=TOKEN)
    assert set(served(server, "me/new")) == {"README.md", CONFIG, WEIGHTS}


def test_private(server, adapter):
    adapter.push("me/secret", token=TOKEN, private=True)
    adapter.push("me/open", token=TOKEN)
    assert server.private == {"me/secret"}
    before = served(server, "me/open")
    with pytest.raises(AdapterError, match="me/open exists and is public"):
        adapter.times(2).push("me/open", token=TOKEN, private=True, overwrite=True)
    assert served(server, "me/open") == before
    adapter.times(2).push("me/secret", token=TOKEN, private=True, overwrite=True)


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("me/mine", None, "no token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token="),
        ("me/mine", "", "no token for the Hub"),
        ("me/mine", "hf_unknown", "does not accept the token; run `hf auth login`"),
        ("me/mine", TOKEN + "\n", "holds spaces or characters that no token has"),
        ("me/mine", "hf_two words", "holds spaces or characters that no token has"),
        ("me/mine", "hf_ключ", "holds spaces or characters that no token has"),
        ("ann/hers", TOKEN, "may not write to 'ann'.*settings/tokens and run `hf auth login`"),
        ("ann/there", TOKEN, "may not write to 'ann'.*settings/tokens and run `hf auth login`"),
    ],
)
def test_without_the_right_token_the_error_says_what_to_do(server, adapter, repo, token, said):
    (server.folder / "ann/there").mkdir(parents=True)
    (server.folder / "ann/there/README.md").write_text("soon")
    with pytest.raises(AdapterError, match=said) as caught:
        adapter.push(repo, token=token)
    assert TOKEN not in str(caught.value)
    assert "hf_unknown" not in str(caught.value)
    assert server.repos() == ["ann/there"]
    assert set(served(server, "ann/there")) == {"README.md"}
    assert not server.stored
    assert not server.commits


def test_the_token_of_the_machine_is_used(server, adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    adapter.push("me/mine")
    assert server.repos() == ["me/mine"]


def test_what_cannot_be_saved_asks_the_hub_for_nothing(server, adapter, base):
    big = adapter.times(1e9)
    with pytest.raises(AdapterError, match=r"not finite in torch\.float16; nothing was written"):
        big.push("me/big", token=TOKEN, dtype=torch.float16)
    with pytest.raises(AdapterError, match="holds no module"):
        Adapter("empty", {}, "org/base").push("me/empty", token=TOKEN)
    for wrong in ("mine", "a/b/c", "me/my adapter", "", "../mine", "me/mine\n"):
        with pytest.raises(AdapterError, match="is no repository's id; expected owner/name"):
            adapter.push(wrong, token=TOKEN)
    dense = merge([adapter], "ties")
    for call in (lambda: dense.push("me/dense", token=TOKEN), lambda: dense.save("anywhere")):
        with pytest.raises(
            MergeError, match=r"ties-of-1 is dense, and a PEFT folder holds factors: call truncate\(rank\)"
        ):
            call()
    assert not server.requests


def test_the_base_must_be_one_that_others_can_load(server, adapter):
    for wrong in ("/home/someone/models/base", "", "~/base", "C:\\models\\base", "a/b/c"):
        with pytest.raises(AdapterError, match=r"is no id on the Hub.*push\(…, base='org/model'\)"):
            replace(adapter, base=wrong).push("me/mine", token=TOKEN)
    assert not server.requests
    replace(adapter, base="/home/someone/base").push("me/mine", token=TOKEN, base="org/base")
    files = server.files("me/mine")
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in files["README.md"].decode()
    assert not any(b"/home/someone" in data for data in files.values())


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("broken-transfer", "the upload broke off .*adapter_model.safetensors"),
        ("cut-transfer", "the upload broke off .*adapter_model.safetensors"),
        ("broken-commit", "nothing was uploaded: .*500"),
        ("raced", "was changed by someone else meanwhile; look at it and push again"),
    ],
)
def test_a_failure_on_the_way_leaves_the_repository_as_it_was(server, adapter, trouble, said):
    adapter.push("me/mine", token=TOKEN)
    before = served(server, "me/mine")
    server.trouble |= {"me/mine": trouble, "me/fresh": trouble}
    with pytest.raises(AdapterError, match=said):
        adapter.times(2.0).push("me/mine", token=TOKEN, overwrite=True)
    assert served(server, "me/mine") == before
    with pytest.raises(AdapterError, match=said + ".*the new repository me/fresh stays, empty"):
        adapter.times(3.0).push("me/fresh", token=TOKEN)
    assert set(served(server, "me/fresh")) == {".gitattributes"}
    del server.trouble["me/fresh"]
    adapter.times(3.0).push("me/fresh", token=TOKEN)  # the second try needs no leave to overwrite
    assert {CONFIG, WEIGHTS} < set(served(server, "me/fresh"))


def test_a_hub_that_cannot_be_reached(server, adapter, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"the upload broke off .*ConnectError"):
        adapter.push("me/mine", token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set; unset it to upload"):
        adapter.push("me/mine", token=TOKEN)


def test_a_connection_that_fails_is_tried_again(server, monkeypatch):
    """Whichever HTTP library the client uses: its transport errors are no `HfHubHTTPError`."""
    from huggingface_hub.errors import HfHubHTTPError

    library = __import__(HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    tries = []

    def call():
        tries.append(1)
        if len(tries) < client.TRIES:
            raise library.ConnectError("no route")
        return "there"

    assert client.patiently(call) == "there"
    assert len(tries) == client.TRIES


def test_nothing_is_left_on_this_machine(server, adapter, monkeypatch, tmp_path):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    adapter.push("me/mine", token=TOKEN)
    with pytest.raises(AdapterError):
        adapter.push("me/mine", token=TOKEN)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_pushing_does_not_change_the_adapter(server, adapter):
    before = copy.deepcopy(adapter)
    push(adapter, "me/mine", token=TOKEN, base="org/base", dtype=torch.float16)
    assert (adapter.digest(), adapter.base, adapter.info) == (before.digest(), before.base, before.info)


# Writing a folder ----------------------------------------------------------------------------------------------------


STAGES = {
    "making room": (tempfile, "mkdtemp"),
    "the configuration": (Path, "write_text"),
    "the weights": (adapters_under_test, "save_file"),
    "the access rights": (Path, "chmod"),
    "moving": (adapters_under_test.os, "replace"),
}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_at_any_call_of_any_stage_changes_nothing(adapter, tmp_path, monkeypatch, stage, existing):
    owner, name = STAGES[stage]
    real, calls, fail_at = getattr(owner, name), 0, 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError("disk is full")
        return real(*args, **kwargs)

    def state():
        return {path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*") if path.is_file()}

    failures = 0
    while True:
        fail_at += 1
        calls = 0
        home = tmp_path / f"{fail_at}"
        home.mkdir()
        if existing:
            adapter.save(home / "a")
        before, changed = state(), adapter.times(2.0)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, failing)
            try:
                changed.save(home / "a", overwrite=True)
            except OSError:
                failures += 1
            else:
                break
        assert state() == before
        assert [path.name for path in home.iterdir()] == ["a"] * existing
    assert failures >= (2 if existing and stage == "moving" else 1)
    assert state() != before
