"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree, and what is installed agrees with them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [Requirement(r) for r in sum(EXTRAS.values(), PROJECT["project"]["dependencies"])]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
LINES = [line for line in CONSTRAINTS.splitlines() if line and not line.lstrip().startswith("#")]
PINS = {canonicalize_name(name): Version(pin) for name, _, pin in (line.partition("==") for line in LINES)}
NAMES = [requirement.name for requirement in REQUIREMENTS]
HEAVY = [
    "matplotlib",
    "sklearn",
    "peft",
    "papermill",
    "nbformat",
    "seaborn",
    "dask",
    "ipywidgets",
    "transformers.modeling_utils",
]


def test_constraints_are_exact_pins_and_nothing_else():
    pin = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*")  # no local build (+cpu), hash, marker, address or option
    assert [line for line in LINES if not pin.fullmatch(line)] == []
    assert len(PINS) == len(LINES)
    assert not re.search(r"https?:|file:|index-url|find-links", CONSTRAINTS)


def test_constraints_name_the_command_that_makes_them():
    """The header is written by uv, so it also says that `make lock` made the file."""
    command = re.search(r"^\t\$\(UV\) (pip compile .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert CONSTRAINTS.splitlines()[1] == f"#    uv {command}"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=NAMES)
def test_every_dependency_has_a_bound_that_its_pin_satisfies(requirement):
    assert any(bound.operator == ">=" for bound in requirement.specifier), f"{requirement} has no lower bound"
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_no_dependency_is_named_twice():
    assert sorted(set(NAMES)) == sorted(NAMES)


def test_pins_are_the_ones_that_pyproject_asks_for():
    """Every direct dependency is marked as such in constraints.txt, and nothing else is."""
    direct = re.findall(r"^([^\s=]+)==\S+\n((?:    #.*\n)+)", CONSTRAINTS + "\n", re.MULTILINE)
    marked = {name for name, comment in direct if "workbench (pyproject.toml)" in comment}
    assert marked == {canonicalize_name(name) for name in NAMES}


def test_conda_environment_is_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["project"]["name"]
    assert environment["channels"] == ["conda-forge"]
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['project']['requires-python']}", "pip"]
    constraint, editable = pip["pip"]
    assert constraint == "-c constraints.txt"
    assert editable == f"-e .[{','.join(EXTRAS)}]"
    assert f"pip install --quiet {constraint} {editable[:3]}'{editable[3:]}'" in (ROOT / "Makefile").read_text()


def test_installed_from_here_and_at_the_pins():
    installed = metadata.distribution("workbench")
    source = json.loads(installed.read_text("direct_url.json"))
    assert source["dir_info"] == {"editable": True}
    assert source["url"] == ROOT.as_uri()
    wrong = {}
    for requirement in REQUIREMENTS:
        try:
            version = Version(metadata.version(requirement.name))
        except metadata.PackageNotFoundError:
            version = None
        if version is None or Version(version.public) != PINS[canonicalize_name(requirement.name)]:
            wrong[requirement.name] = version and str(version)
    assert not wrong, f"not installed as constraints.txt says: {wrong}; run make env"


def test_import_is_quick_and_light():
    """Under 3 s of processor time, or twice what torch and pandas take on a slow one, with the heavy libraries left out."""
    heavy = f"[name for name in {HEAVY} if name in sys.modules]"
    program = "import json, sys, time, {}; print(json.dumps([time.process_time(), {}]))"
    seconds = []
    for _ in range(3):
        spent = []
        for what in ("workbench", "torch, pandas"):
            command = [sys.executable, "-c", program.format(what, heavy)]
            found, loaded = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            assert loaded == []
            spent.append(found)
        seconds.append(spent)
        if spent[0] < max(3, 2 * spent[1]):
            return
    pytest.fail(f"import workbench, and torch and pandas alone, took {seconds} s of processor time")


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(tmp_path):
    """The bundled pool and the style sheet too, and nothing beside the package."""
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp_path, ROOT]
    subprocess.run([sys.executable, *command], check=True)
    (wheel,) = tmp_path.glob("workbench-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(ROOT / "src").as_posix() for path in files}


@pytest.mark.parametrize("target", ["help", "env", "demo", "test", "test-full", "nbval", "lab", "notebooks", "lock"])
def test_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def bare(tmp_path):
    """A folder with what `make env` reads, and a PATH on which every Python is too old but those that a test adds."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        add_program(programs / name, "exit 1")
    for name in ("touch", "mkdir", "ln"):
        (programs / name).symlink_to(shutil.which(name))
    return tmp_path


def add_program(path, body):
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def make_env(folder, *words):
    environment = {**os.environ, "PATH": str(folder / "programs")}
    for inherited in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"):
        environment.pop(inherited, None)
    command = [shutil.which("make"), "env", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


# A Python that writes down how it was called; as `-m venv`, it puts itself into .venv/bin.
RECORDER = """echo "${0##*/} $*" >> calls
if test "$2" = venv; then mkdir -p .venv/bin; ln -s "$0" .venv/bin/python; fi"""


def test_make_refuses_an_old_python_with_a_sentence(bare):
    done = make_env(bare)
    assert done.returncode != 0
    assert "workbench needs Python 3.11 or newer, and python3 is not" in done.stderr
    assert not (bare / ".venv").exists()


def test_make_takes_a_newer_python_where_python3_is_old_and_installs_once(bare):
    add_program(bare / "programs" / "python3.12", RECORDER)
    done = make_env(bare)
    assert done.returncode == 0, done.stderr
    calls = [line for line in (bare / "calls").read_text().splitlines() if " -m " in line]
    assert calls == [
        "python3.12 -m venv --clear .venv",
        "python -m pip install --quiet -c constraints.txt -e .[dev,cluster,tasks]",
    ]
    assert (bare / ".venv" / "installed").exists()
    make_env(bare)
    assert (bare / "calls").read_text().count("pip install") == 1
    later = (bare / ".venv" / "installed").stat().st_mtime + 10
    os.utime(bare / "constraints.txt", (later, later))
    make_env(bare)
    assert (bare / "calls").read_text().count("pip install") == 2
    assert (bare / "calls").read_text().count("venv --clear") == 1


@pytest.mark.slow
def test_make_nbval_compares_the_outputs_of_every_notebook(tmp_path):
    """Two notebooks with the same cells: what the second has stored is wrong, and that alone is found."""
    import nbformat

    from test_notebooks import write

    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests/sanitize.cfg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name, stored in (("01_right", "6 in 0.1 s\n"), ("02_wrong", "7 in 0.1 s\n")):
        path = write(tmp_path / "notebooks" / f"{name}.ipynb", "import time; print(2 * 3, 'in', time.time(), 's')")
        notebook = nbformat.read(path, as_version=4)
        checked = notebook.cells[2]
        checked.metadata["tags"], checked.execution_count = ["nbval-check-output"], 2
        checked.outputs = [nbformat.v4.new_output("stream", text=stored)]
        nbformat.write(notebook, path)
    command = ["make", "-o", ".venv/installed", "nbval"]  # without bringing the environment up to date
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 failed, 3 passed" in shown
    assert re.findall(r"FAILED \S*/(\S+)::Cell 1", shown) == ["02_wrong.ipynb"]
