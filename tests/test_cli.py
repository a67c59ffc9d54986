"""The command line, run in this process; and once as the installed command."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.merge import methods


def called(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_methods_lists_every_method_with_options_and_paper():
    result = called("methods")
    assert result.exit_code == 0
    for name, record in methods().items():
        assert f"\n{name}  (" in "\n" + result.stdout
        assert record.paper in result.stdout
        assert all(f"{key} = {option.default!r}: {option}" in result.stdout for key, option in record.options.items())
    assert "slerp  (adapter, 2 adapters)" in result.stdout
    assert "ties  (dense)" in result.stdout


def test_methods_as_json_is_what_describe_gives():
    found = {one["name"]: one for one in json.loads(called("methods", "--json").stdout)}
    assert list(found) == list(methods())
    assert found["ties"]["options"]["density"] == {"default": 0.2, "accepts": "a finite number in [0, 1]"}
    assert found["sum"]["invariances"] == ["units", "gauge", "scale", "order", "linear"]
    assert found["lego"]["summary"] == methods()["lego"].function.__doc__.partition("\n")[0]


def test_one_method_is_explained_in_full():
    result = called("methods", "lego")
    assert "Where scales go" in result.stdout
    assert "ties" not in result.stdout


def test_an_unknown_method_is_said_on_stderr_with_exit_code_2():
    result = called("methods", "tise")
    assert result.exit_code == 2
    assert "did you mean 'ties'" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("--help",), ("methods", "--help")])
def test_help(arguments):
    result = called(*arguments)
    assert result.exit_code == 0
    assert "merging methods" in result.stdout


def test_the_command_is_installed_beside_python():
    command = Path(sys.executable).with_name("workbench")
    done = subprocess.run([command, "methods", "--json"], capture_output=True, text=True, check=True)
    assert {"sum", "lego"} <= {one["name"] for one in json.loads(done.stdout)}


def test_a_benchmark_prints_its_ratios_and_stores_them(tmp_path):
    result = called("bench", "--area", "matching", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert result.stdout.startswith("area")
    assert "teacher forcing" in result.stdout
    assert pd.read_parquet(tmp_path / "bench_nano_cpu.parquet").ratio.notna().all()
    assert (tmp_path / "bench_nano_cpu.png").stat().st_size > 5000
    rows = json.loads(called("bench", "--area", "matching", "--quick", "--device", "cpu", "--json").stdout)
    assert {row["area"] for row in rows} == {"matching"}
    assert called("bench", "--area", "speed").exit_code == 2
