"""workbench notebooks: list, params, and a run with its recorded numbers."""

import json
from pathlib import Path

import pytest

from test_cli import called
from test_notebooks import write
from workbench.notebooks import find, parameters_of, read, title_of

FOLDER = Path(__file__).parents[1] / "notebooks"
CELLS = (
    "from workbench import notebooks, parameters\nparameters.check(globals())",
    "notebooks.record(sum=sum(seeds), k=k)",
)


@pytest.fixture
def folder(tmp_path):
    """A folder with one small notebook that records, and one of its own numbers."""
    write(tmp_path / "n" / "01_a.ipynb", *CELLS, parameters='seeds = [0]\nk = 2  # how many\nout = "."')
    write(tmp_path / "n" / "02_b.ipynb", "1 / 0", parameters='seed = 0\nout = "."')
    return tmp_path / "n"


def test_list():
    wanted = [(path.stem, title_of(read(path))) for path in find(FOLDER)]
    rows = json.loads(called("notebooks", "list", "--folder", str(FOLDER), "--json").stdout)
    assert [(row["notebook"], row["title"]) for row in rows] == wanted
    shown = called("notebooks", "list", "--folder", str(FOLDER)).stdout
    assert all(f"{name}  " in shown and title in shown for name, title in wanted)


def test_params_says_default_kind_and_help_and_shows_a_line():
    shown = called("notebooks", "params", "03", "--folder", str(FOLDER))
    assert shown.exit_code == 0
    for name, default in parameters_of(read(FOLDER / "03_merge_experiments.ipynb")).items():
        assert any(line.split()[:1] == [name] and json.dumps(default) in line for line in shown.stdout.splitlines())
    assert "a whole number of at least 1" in shown.stdout
    assert "shots: demonstrations of in-context learning" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith(f"papermill --cwd {FOLDER} {FOLDER}/03_merge")
    rows = json.loads(called("notebooks", "params", "03", "--folder", str(FOLDER), "--json").stdout)
    assert {"name": "k", "default": 10, "kind": "a whole number of at least 1"}.items() <= rows[4].items()


def test_run_gives_what_was_recorded(folder, tmp_path):
    to = ["--folder", str(folder), "--to", str(tmp_path / "runs")]
    result = called("notebooks", "run", "01", "-p", "seeds", "[1, 2]", "-y", "{k: 3.0, seeds: [7]}", "--json", *to)
    assert result.exit_code == 0, result.stderr
    copy = tmp_path / "runs" / "01_a.ipynb"
    assert json.loads(result.stdout) == {"copy": str(copy), "error": None, "recorded": {"sum": 3, "k": 3}}
    assert copy.exists()
    failed = called("notebooks", "run", "02", *to, "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["01", "-p", "k", "ten"], "01_a.ipynb: parameter k: expected a whole number of at least 1, got 'ten'"),
        (["01", "-y", "{k: }"], "parameter k: expected a whole number of at least 1, got None"),
        (["01", "-p", "sedes", "[1]"], "sedes: no such parameter (did you mean 'seeds'?)"),
        (["01", "-y", "k"], "-y takes a mapping of parameters"),
        (["01", "-p", "k", "{"], "what -p and -y take is YAML"),
        (["0"], "'0' begins the names of ['01_a', '02_b']; say which one"),
        (["01", "-p", "k"], "requires 2 arguments"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(folder, tmp_path, arguments, message):
    result = called("notebooks", "run", "--folder", str(folder), "--to", str(tmp_path / "runs"), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("runs/*.ipynb"))


@pytest.mark.parametrize("command", ["list", "params", "run"])
def test_help(command):
    result = called("notebooks", command, "--help")
    assert result.exit_code == 0
    assert "notebook" in result.stdout
