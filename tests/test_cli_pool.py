"""`workbench pool`: what it prints, in which form, and its exit codes."""

import json
import re

import pytest
from typer.testing import CliRunner

from helpers import random_adapter, tiny_base
from hub_server import HubServer
from workbench.cli import app
from workbench.cli.pool import _bytes
from workbench.hub import client
from workbench.nano import wild
from workbench.screen import RULES

BASE = "org/base"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def called(*arguments):
    return CliRunner().invoke(app, ["pool", *map(str, arguments)])


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def jungle(tmp_path_factory, base):
    """A folder of wild adapters, the base's folder, and what is expected of each."""
    folder = tmp_path_factory.mktemp("jungle")
    base.model.config.save_pretrained(folder / "base")
    return folder / "wild", folder / "base", wild.make(folder / "wild", folder / "base")


@pytest.fixture
def server(tmp_path, base, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "PAUSE", 0.0)
    for i, name in enumerate(("ann/one", "bob/two")):
        random_adapter(base, 2 + i, seed=i, name=name).save(tmp_path / "served" / name)
    base.model.config.save_pretrained(tmp_path / "served" / BASE)
    with HubServer(tmp_path / "served", BASE) as running:
        running.bases[BASE] = ""
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_scan(server):
    server.facts["bob/two"] = {
        "downloads": 77,
        "tags": ["base_model:adapter:org/base", "license:mit\x1b]0;x", "dataset:d"],
    }
    result = called("scan", BASE)
    assert result.exit_code == 0
    assert re.search(r"^bob/two +77 +0 +mit\\x1b\]0;x +d$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("2 adapters of org/base\n")
    assert result.stdout.replace("\n", "").isprintable()
    found = json.loads(called("scan", f"hub:{BASE}", "--json", "--limit", 1).stdout)
    assert [(r["id"], r["downloads"], r["datasets"]) for r in found] == [("bob/two", 77, ["d"])]
    assert called("scan", "org/none").exit_code == 1
    server.bases["ann/one"] = "re/up-bnb-4bit"
    assert len(json.loads(called("scan", BASE, "--alias", "re/up", "--quantised", "--json").stdout)) == 2
    assert len(json.loads(called("scan", BASE, "--alias", "re/up", "--json").stdout)) == 1
    assert not server.asked("resolve")


def test_screen_a_folder(jungle):
    folder, base, expected = jungle
    result = called("screen", folder, "--base", base, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert {row["name"]: row["rule"] for row in told["adapters"]} == expected
    counted = {row["rule"]: row["count"] for row in told["refused"]}
    assert counted == {rule: list(expected.values()).count(rule) for rule in set(expected.values()) - {""}}
    study = json.loads(called("screen", folder, "--base", base, "--rules", "study", "--json").stdout)
    assert {row["name"]: row["rule"] for row in study["adapters"]} == expected | wild.STUDY_ONLY
    fewer = json.loads(called("screen", folder, "--base", base, "--without", "large-norm", "--json").stdout)
    assert {row["name"] for row in fewer["adapters"] if row["accepted"]} >= {"exploded"}
    assert {row["name"] for row in told["adapters"] if row["accepted"]}.isdisjoint({"exploded"})
    words = called("screen", folder, "--base", base, "--rules", "large-norm,zero-norm").stdout
    assert re.search(r"^exploded +refused +large-norm +‖ΔW‖ is", words, re.MULTILINE)
    assert re.search(r"^large-norm +1 +‖ΔW‖ is at most 1000$", words, re.MULTILINE)
    assert re.search(r"^faint +accepted$", words, re.MULTILINE)
    assert words.endswith(f"of {len(expected)} adapters accepted\n")


def test_explain(jungle):
    folder, base, _ = jungle
    result = called("screen", folder, "--base", base, "--rules", "study", "--explain", "dora")
    assert result.exit_code == 1
    assert re.search(r"^dora +config +refused +use_dora is set", result.stdout, re.MULTILINE)
    assert re.search(r"^peft-type +config +passed +peft_type is LORA$", result.stdout, re.MULTILINE)
    assert re.search(r"^finite +values +not checked", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("dora is refused by dora\n")
    told = json.loads(called("screen", folder, "--base", base, "--explain", "faint", "--json").stdout)
    assert told["accepted"] is True
    outcomes = {row["rule"]: row["outcome"] for row in told["rules"]}
    assert list(outcomes) == list(RULES)
    assert {rule for rule, outcome in outcomes.items() if outcome == "off"} == set(wild.STUDY_ONLY.values())
    both = called("screen", folder, "--base", base, "--rules", "study", "--explain", "no-task-type")
    assert both.exit_code == 1
    assert called("screen", folder, "--base", base, "--explain", "faint").exit_code == 0


def test_screen_on_the_hub_downloads_no_weights(server, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.hub.distant.FIRST", 64)
    result = called("screen", f"hub:{BASE}", "--cache", tmp_path / "cache")
    assert result.exit_code == 0
    assert result.stdout.endswith("2 of 2 adapters accepted\n")
    assert all(re.fullmatch(r"bytes=\d+-\d+", request.range) for request in server.asked(WEIGHTS))
    one = called("screen", f"hub:{BASE}", "--cache", tmp_path / "cache", "--explain", "ann/one")
    assert one.exit_code == 0
    assert re.search(r"^finite +values +not checked", one.stdout, re.MULTILINE)
    assert called("screen", f"hub:{BASE}", "--cache", tmp_path / "cache", "--explain", "ann/on").exit_code == 2


def test_fetch(server, tmp_path):
    result = called("fetch", BASE, "--cache", tmp_path / "cache", "--budget", "1B")
    assert result.exit_code == 1
    assert "of the budget of 1 are left" in result.stdout
    assert re.search(r"^budget +2 +There is room", result.stdout, re.MULTILINE)
    result = called("fetch", BASE, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0
    assert [row["rank"] for row in json.loads(result.stdout)["adapters"]] == [2, 3]
    server.log.clear()
    assert called("fetch", BASE, "--cache", tmp_path / "cache", "--offline").exit_code == 0
    assert not server.log
    path = server.folder / "ann/one" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "\x1b[2J\u202e"}))
    words = called("fetch", BASE, "--cache", tmp_path / "cache").stdout
    assert "peft_type is" in words
    assert words.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("screen", "/nowhere"), 1, "found nothing"),
        (("screen", "/no\x1b[2J"), 1, r"/no\x1b[2J: expected a folder"),
        (("screen", "nano", "--rules", "larg-norm"), 2, "no screening rule 'larg-norm'"),
        (("screen", "nano", "--without", "larg-norm"), 2, "no screening rule 'larg-norm'"),
        (("screen", "nano", "--without", "dora"), 2, "cannot be switched off"),
        (("screen", "nano", "--explain", "nobody"), 2, "no adapter 'nobody'"),
        (("fetch", BASE, "--budget", "much"), 2, "a size is a number with a unit"),
        (("scan",), 2, "Missing argument"),
        (("scan", BASE, "--limit", "0"), 2, "limit"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(arguments, code, words):
    result = called(*arguments)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_a_hub_that_cannot_be_asked(monkeypatch, tmp_path):
    result = called("fetch", BASE, "--cache", tmp_path, "--offline")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no adapter of 'org/base' was listed before" in result.stderr


@pytest.mark.parametrize("command", ["scan", "screen", "fetch"])
def test_help_explains_the_options(command):
    words = called(command, "--help").stdout
    assert "--alias" in words
    assert "most downloaded" in words


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), ("10", 10), ("10B", 10), ("1.5GB", 1_500_000_000), ("2 GiB", 2**31), ("3kb", 3000), ("1TiB", 2**40)],
)
def test_sizes(text, size):
    assert _bytes(text) == size
