"""A thousand strangers' adapters, of which 200 are broken or hostile: each judged rightly, and nothing else happens."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

import strangers
from helpers import tiny_base
from hub_server import HubServer
from workbench.adapters import Adapter
from workbench.card import hub_id, printable
from workbench.errors import AdapterError
from workbench.merge import merge
from workbench.nano import wild
from workbench.pool import Pool
from workbench.rules import RULES
from workbench.screen import counts, screen

CONFIG, WEIGHTS = strangers.CONFIG, strangers.WEIGHTS
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def world(tmp_path_factory, base):
    """A folder with the base, the thousand adapters and an empty cache; what is expected of each; and what was there."""
    home = tmp_path_factory.mktemp("world")
    base.model.config.save_pretrained(home / "base")
    (home / "cache").mkdir()
    expected = strangers.crowd(home / "pool", base)
    return home, expected, snapshot(home)


@contextmanager
def guarded():
    """Whatever would run a stranger's code raises."""

    def never(*_, **__):
        raise AssertionError("a stranger's code would have been run")

    with pytest.MonkeyPatch.context() as patch:
        import transformers.dynamic_module_utils as dynamic

        for owner, names in (
            (pickle, ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")),
            (torch, ("load",)),
            (torch.serialization, ("load", "_load", "_legacy_load")),
            (dynamic, ("get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file")),
            (os, ("system",)),
            (subprocess, ("Popen",)),
        ):
            for name in names:
                patch.setattr(owner, name, never)
        yield


@pytest.fixture(scope="module")
def pool(world):
    home, _, _ = world
    with guarded():
        return Pool.open(home / "pool", base=home / "base", cache=home / "cache")


def snapshot(home: Path) -> dict[str, str]:
    """Path → kind and content of everything under a folder but its cache."""
    found = {}
    for path in sorted(home.rglob("*")):
        if path.is_relative_to(home / "cache"):
            continue
        data = path.read_bytes() if path.is_file() and path.stat().st_size < 2**30 else b""
        link = os.readlink(path) if path.is_symlink() else ""
        found[os.fsdecode(path)] = (
            f"{path.lstat().st_mode} {path.lstat().st_mtime_ns} {link} {hashlib.sha1(data).hexdigest()}"
        )
    return found


def test_the_crowd_is_of_many_kinds(world):
    _, expected, _ = world
    refused = {name.split("/")[1]: rule for name, rule in expected.items() if rule}
    assert (len(expected), sum(map(bool, expected.values()))) == (1000, 200)
    assert len(refused) >= 150
    assert set(refused.values()) >= {r.name for r in RULES.values() if r.required} - {"readable"}


def test_each_of_a_thousand_is_judged_rightly(pool, world):
    _, expected, _ = world
    table = pool.table.set_index("name")
    assert {name: rule for name, rule in table["rule"].items() if rule != expected[name]} == {}
    assert set(table.index) == set(expected)
    assert set(pool.names) == {name for name, rule in expected.items() if not rule}
    assert not [reason for reason in table["reason"] if "could not be checked" in reason]
    assert (table["reason"].ne("") == table["rule"].ne("")).all()
    assert counts(pool.table).set_index("rule")["count"].to_dict() == Counter(filter(None, expected.values()))


def test_nothing_was_written_and_nothing_run(pool, world):
    home, _, before = world
    assert len(pool) == 800
    assert snapshot(home) == before
    assert not Path("opened.txt").exists()


def test_all_that_was_accepted_can_be_had(pool):
    """Every kind of sound one, read by the pool, is what a reader of its own makes of file and configuration."""
    from safetensors.torch import load_file

    names = [name for name in pool.names if name.startswith("ann-0/")]
    assert len(names) >= len(strangers.GOOD)
    for name in names:
        adapter = pool.adapter(name)
        config = json.loads((pool._folders[name] / CONFIG).read_text())
        tensors = load_file(pool._folders[name] / WEIGHTS)
        count = sum("lora_" in key for key in tensors)
        assert 2 * len(adapter.modules) == count
        stored = sorted(
            float(t.float().norm()) for key, t in tensors.items() if "lora_" in key and "A" in key.split("lora_")[1]
        )
        assert sorted(float(f.A.norm()) for f in adapter.modules.values()) == pytest.approx(stored)
        if not config.get("alpha_pattern") and not config.get("rank_pattern"):
            r = adapter.rank
            s = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
            assert {f.scale for f in adapter.modules.values()} == {s}
        assert set(adapter.modules) <= set(pool.shapes)
    scales = {m: f.scale for m, f in pool.adapter("ann-0/alpha-by-name").modules.items()}
    assert scales["model.layers.0.self_attn.q_proj"] == 0.5
    assert scales["model.layers.1.mlp.up_proj"] == 4
    assert scales["model.layers.0.mlp.up_proj"] == 0.25
    assert scales["model.layers.0.self_attn.k_proj"] == 2
    scales = {m: f.scale for m, f in pool.adapter("ann-0/alpha-by-expression").modules.items()}
    assert scales["model.layers.0.self_attn.k_proj"] == 0.5
    assert scales["model.layers.0.mlp.up_proj"] == 0.75
    assert scales["model.layers.0.self_attn.o_proj"] == 2


def test_what_is_shown_of_them_is_escaped(pool):
    """HTML, the terminal and messages: no tag, no command of a terminal, nothing that turns the text round."""
    page = pool.show()._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert page.startswith('<div class="tex2jax_ignore mathjax_ignore">')
    for text in (
        page,
        repr(pool.show()),
        repr(pool),
        pool.table.to_string(),
        *pool.refused(),
        *pool.refused().values(),
    ):
        assert all(c.isprintable() or c == "\n" for c in text)
    with pytest.raises(AdapterError) as caught:
        pool.adapter(printable("ann-0/red\x1b[31m"))
    assert str(caught.value).isprintable()
    for name in pool.names:
        with pytest.raises(AdapterError) as caught:
            raise AdapterError(name)
        assert str(caught.value).isprintable()


def test_errors_of_the_reader_are_printable(pool, world):
    home, expected, _ = world
    for path in (home / "pool" / "ann-0").iterdir():
        rule = expected.get(printable(f"ann-0/{path.name}"))
        if not rule or rule in ("name", "symlink", "base-name", "base-layers", "base-shape"):
            continue
        try:
            Adapter.load(path)
        except AdapterError as error:
            assert str(error).isprintable(), path.name  # noqa: PT017
        else:
            assert rule in ("rank", "targets", "zero-norm", "large-norm", "finite", "shapes", "pickle"), path.name


def test_the_card_of_a_merge_of_hostile_sources(pool, tmp_path, base):
    """Their names, bases, licences and cards neither become markup nor leave the card's YAML."""
    evil = {
        "author/" + SCRIPT: f"---\nlicense: other\nlicense_name: {SCRIPT}\nlicense_link: javascript:alert(1)\n---\n",
        'a\n---\nlicense: mit\n"': "---\nlicense: |\n  mit\n  base_model: evil/x\n---\n",
        "\x1b[2J\u202e$\\href{javascript:alert(1)}{x}$ | [x](http://evil) `": "---\nlicense: [mit, '\x1b[31m']\n---\n"
        + SCRIPT,
        "../../up": "---\nlicense: &a [*a, *a]\n---\n",
    }
    adapters = []
    for i, (name, card) in enumerate(evil.items()):
        draft = wild.sound(base.layers, 'x"\n---\nlicense: mit\n' + SCRIPT, seed=i)
        draft.card = card
        wild.write(draft, tmp_path / "in" / str(i))
        adapters.append(Adapter.load(tmp_path / "in" / str(i), name))
    merged = merge(adapters, "average")
    folder = merged.save(tmp_path / "out" / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["tags"] == ["merge", "lora", "workbench"]
    assert "base_model" not in fields
    assert fields["license"] != "mit"
    assert all(c.isprintable() or c == "\n" for c in card)
    assert "<script" not in card
    assert "javascript:alert(1)}" not in body
    assert "](http" not in body
    assert "$\\href" not in body
    assert "\n---\n" not in body


HARMFUL = {
    name: change for name, (rule, change) in strangers.BAD.items() if rule in ("header", "dtype", "config-json", "keys")
}


def test_absurd_claims_cost_no_memory(tmp_path, base):
    """Screened in a process that may take 48 MiB more than it has: what would allocate what it claims fails there."""
    names = {}
    for i, (name, change) in enumerate(HARMFUL.items()):
        draft = wild.sound(base.layers, base.name)
        change(draft)
        wild.write(draft, tmp_path / str(i))
        names[str(tmp_path / str(i))] = strangers.BAD[name][0]
    (tmp_path / "expected.json").write_text(json.dumps(names))
    code = f"""
import json, resource
from workbench.screen import screen
expected = json.load(open({str(tmp_path / "expected.json")!r}))
screen(next(iter(expected)))
said = dict(line.split(":") for line in open("/proc/self/status"))
limit = 1024 * int(said["VmData"].split()[0]) + 48 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
found = {{folder: screen(folder).rule for folder in expected}}
print(json.dumps({{folder: rule for folder, rule in found.items() if rule != expected[folder]}}))
try:
    bytearray(2**26)
except MemoryError:
    print("limited")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["{}", "limited"]


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "x\0y", "n" * 5000, "раypal/x", "a\u202eb", "."])
def test_a_name_is_never_a_path(name, world, base, tmp_path, monkeypatch):
    """Whatever an adapter is called, only the folder given is read, and nothing is written."""
    home, _, _ = world
    monkeypatch.chdir(tmp_path)
    verdict = screen(home / "pool" / "ann-0" / "rslora", base.layers, name=name)
    assert verdict.accepted == (name.isprintable() and len(name) <= 200)
    assert verdict.name.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_the_crowd_s_own_base_is_not_read(tmp_path, base):
    """Most name as their base a folder that lies among them: its configuration is a stranger's too."""
    for i in range(2):
        draft = wild.sound(base.layers, str(tmp_path / "pool" / "evil"), seed=i)
        wild.write(draft, tmp_path / "pool" / f"a{i}")
    base.model.config.save_pretrained(tmp_path / "pool" / "evil")
    pool = Pool.open(tmp_path / "pool")
    assert len(pool) == 2
    assert not pool.checked


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")


@pytest.fixture(params=[150, pytest.param(1000, marks=pytest.mark.slow)])
def served(request, tmp_path, base, world, monkeypatch):
    """The crowd on a Hub, and what is expected there: without links, and without names that the Hub does not have."""
    home, expected, _ = world
    kinds = {name: rule for name, rule in expected.items() if hub_id(name) and rule != "symlink"}
    for large in ("header-of-gigabytes", "million-tensors"):  # the server would read all of it for every answer
        kinds.pop(f"ann-0/{large}")
    kinds = dict(sorted(kinds.items(), key=lambda pair: (pair[0].split("/")[0], not pair[1]))[: request.param])
    for name in kinds:
        shutil.copytree(home / "pool" / name, tmp_path / "served" / name, copy_function=_linked)
    base.model.config.save_pretrained(tmp_path / "served/org/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("workbench.hub.client.PAUSE", 0.0)
    monkeypatch.setattr(
        "workbench.hub.distant.FIRST", 64
    )  # the weights of these are smaller than what is asked for first
    with HubServer(tmp_path / "served", "org/base", page=100) as server:
        server.bases["org/base"] = ""
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # on the Hub the card says of which base an adapter is, and the shapes show
        yield server, {name: "" if rule == "base-name" else rule for name, rule in kinds.items()}


def _linked(source: str, target: str) -> None:
    if Path(source).is_file():
        os.link(source, target)


def test_the_crowd_on_a_hub(served, tmp_path):
    """Judged as from a folder; no pickle and no code asked for, no weights of what configuration or header refuse."""
    server, expected = served
    (tmp_path / "cache").mkdir()
    before = snapshot(tmp_path)
    with guarded():
        pool = Pool.open("hub:org/base", cache=tmp_path / "cache")
    found = pool.table.set_index("name")["rule"].to_dict()
    assert {name: rule for name, rule in found.items() if rule != expected[name]} == {}
    assert set(found) == set(expected)
    assert len(set(found.values())) > 20
    assert snapshot(tmp_path) == before
    assert not [each.path for each in server.log if each.path.split("?")[0].endswith(PICKLES)]
    sent = Counter()
    for each in server.asked(WEIGHTS):
        sent["/".join(each.path.split("/")[1:3])] += each.sent
    for name, rule in expected.items():
        stage = RULES[rule].stage if rule else "values"
        if stage == "config":
            assert sent[name] == 0, name
        elif stage == "header":
            assert not [r.path for r in server.asked(f"{name}/resolve", WEIGHTS) if not r.range], name
            path = tmp_path / "served" / name / WEIGHTS
            claimed = int.from_bytes(path.read_bytes()[:8], "little") if path.is_file() else 0
            assert sent[name] <= 2 * (64 + min(claimed, 2**23)), name
            assert not list((tmp_path / "cache").glob(f"models--{name.replace('/', '--')}/snapshots/*/{WEIGHTS}"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in PICKLES]
