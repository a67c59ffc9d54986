"""`workbench results`: what it prints, in which form, and its exit codes."""

import json
import re

import pandas as pd
import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.results import Results


def called(*arguments):
    return CliRunner().invoke(app, ["results", *map(str, arguments)])


def row(key, **more):
    facts = {"key": key, "recipe": "ties, random 3", "method": "ties", "task": "nano/mirror-months", "seed": 1}
    return facts | {"accuracy": 0.125, "loss": 1.23456, "seconds": 2.0, "device": "cpu"} | more


@pytest.fixture
def store(tmp_path):
    store = Results(tmp_path / "runs")
    store.write(row("abc1", accuracy=0.5))
    store.write(row("abd2", method="lego", seed=2))
    store.fail(
        "f00d",
        {"error": "it broke\x1b]0;x\nbadly", "traceback": "Traceback\n  line", "label": "one", "run": {"seed": 3}},
    )
    return store


def test_ls(store):
    result = called("ls", store.folder)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["key", "recipe", "task", "seed", "accuracy", "loss", "seconds", "device", "written"]
    assert re.fullmatch(r"abc1  ties, random 3  nano/mirror-months  1     0\.5       1\.23  2        cpu     2\d{3}-\d\d-\d\d \d\d:\d\d:\d\dZ", lines[1])  # fmt: skip
    assert lines[-1] == f"2 runs in {store.folder}"


def test_ls_of_some(store):
    result = called("ls", store.folder, "--where", "method = 'lego' and seed > 1", "--columns", "key, seed", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [{"key": "abd2", "seed": 2}])
    assert set(json.loads(called("ls", store.folder, "--columns", "all", "--json").stdout)[0]) == {
        *row(""),
        "schema",
        "written",
    }
    none = called("ls", store.folder, "--where", "seed > 5")
    assert (none.exit_code, none.stdout.splitlines()[-1]) == (1, f"0 runs in {store.folder}")


def test_ls_of_failures_shows_nothing_of_strangers_unescaped(store):
    result = called("ls", store.folder, "--failed")
    assert result.exit_code == 0
    assert "it broke\\x1b]0;x" in result.stdout
    assert "badly" not in result.stdout
    assert result.stdout.endswith(f"1 failures in {store.folder}\n")
    store.write(row("f00d"))
    assert called("ls", store.folder, "--failed").exit_code == 1


@pytest.mark.parametrize(
    ("said", "code", "arguments"),
    [
        ("there is no folder", 1, ("ls", "nowhere")),
        ("column", 1, ("ls", "FOLDER", "--where", "sede = 1")),
        ("no column 'sede'", 2, ("ls", "FOLDER", "--columns", "key,sede")),
        ("no run in", 2, ("show", "FOLDER", "zzz")),
        ("2 keys begin with 'ab'", 2, ("show", "FOLDER", "ab")),
        ("not as '.xls'", 1, ("export", "FOLDER", "all.xls")),
        ("there is no folder", 1, ("diff", "FOLDER", "nowhere")),
        ("there is no folder", 1, ("compact", "nowhere")),
    ],
)
def test_what_is_wrong_is_said_on_stderr(store, said, code, arguments):
    result = called(*(store.folder if one == "FOLDER" else one for one in arguments))
    assert result.exit_code == code
    assert said in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert result.stdout == ""


def test_show(store):
    result = called("show", store.folder, "abc")
    assert result.exit_code == 0
    assert re.search(r"^accuracy +0\.5$", result.stdout, re.MULTILINE)
    assert re.search(r"^written +2\d{3}-.*Z$", result.stdout, re.MULTILINE)
    assert "recipe = wb.Recipe('ties')" in result.stdout
    facts = json.loads(called("show", store.folder, "abc", "--json").stdout)
    assert facts["loss"] == 1.23456
    assert facts["again"].startswith("# base: ")


def test_show_of_a_failure(store):
    result = called("show", store.folder, "f")
    assert result.exit_code == 0
    assert "it broke\\x1b]0;x\\nbadly" in result.stdout
    assert "\nTraceback\n  line\n" in result.stdout
    assert '{"seed": 3}' in result.stdout


def test_diff(store, tmp_path):
    other = Results(tmp_path / "other")
    for one in (row("abc1", accuracy=0.5 + 1e-4, seconds=9.0), row("abd2", method="lego", seed=2)):
        other.write(one)
    assert called("diff", store.folder, other.folder, "--tolerance", "1e-3").exit_code == 0
    result = called("diff", store.folder, other.folder)
    assert result.exit_code == 1
    assert re.search(r"^abc1  differs  accuracy  0\.5   0\.5001  0\.0001 ", result.stdout, re.MULTILINE)
    other.write(row("new"))
    result = called("diff", store.folder, other.folder)
    assert result.stdout.splitlines()[-1] == f"0 runs only in {store.folder}, 1 only in {other.folder}, 1 that differ"
    found = json.loads(called("diff", store.folder, other.folder, "--json").stdout)
    assert [(one["key"], one["status"]) for one in found] == [("abc1", "differs"), ("new", "only there")]


def test_export_and_compact(store, tmp_path):
    result = called("export", store.folder, tmp_path / "all.csv")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'all.csv'}\n")
    assert pd.read_csv(tmp_path / "all.csv")["key"].tolist() == ["abc1", "abd2"]
    result = called("compact", store.folder)
    assert result.exit_code == 0
    assert [str(path) for path in store.folder.glob("*.parquet")] == [result.stdout.strip()]
    assert called("compact", store.folder).stdout == f"nothing to gather in {store.folder}\n"
