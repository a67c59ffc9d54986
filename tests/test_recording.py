"""workbench.recording: numbers survive a notebook's output to the last digit; a re-run gives the same ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_notebooks import write
from workbench.errors import WorkbenchError
from workbench.notebooks import execute, record, recorded, settings
from workbench.recording import MIME

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def shown(monkeypatch):
    """What `record` hands to the display, one bundle a call."""
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def copy(path, *bundles):
    """An executed notebook whose cells have shown these bundles."""
    from nbformat import write as write_file
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    cells = [new_code_cell("", outputs=[new_output("display_data", data=one)]) for one in bundles]
    write_file(new_notebook(cells=cells), path)
    return path


def test_numbers_and_series_are_recorded_by_name(shown, tmp_path):
    two = pd.Series([0.1, 1 / 3], pd.MultiIndex.from_tuples([("ties", 2), ("lego, k=4", 8)]))
    record(units=np.int64(7), accuracy=two, norm=np.float32(0.1))
    want = {"units": 7, "accuracy.ties, 2": 0.1, "accuracy.lego, k=4, 8": 1 / 3, "norm": float(np.float32(0.1))}
    assert shown[0][MIME] == want
    lines = [re.split(r"  +", line) for line in shown[0]["text/plain"].splitlines()]
    assert lines == [[name, f"{value:.6g}"] for name, value in want.items()]
    assert recorded(copy(tmp_path / "1.ipynb", *shown)) == want


@given(st.dictionaries(st.text("abc_", min_size=1), st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_every_digit_survives(tmp_path_factory, values):
    bundles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
        record(**values)
    found = recorded(copy(tmp_path_factory.mktemp("exact") / "1.ipynb", *bundles))
    assert found == values
    assert {name: value.hex() for name, value in found.items()} == {name: value.hex() for name, value in values.items()}


@pytest.mark.parametrize(
    "value", ["0.5", None, True, np.True_, float("nan"), float("inf"), 1j, [1.0], pd.DataFrame({"a": [1]})]
)
def test_what_is_no_number_is_refused(shown, value):
    with pytest.raises(WorkbenchError, match="score: expected a finite number to record"):
        record(score=value)
    with pytest.raises(WorkbenchError, match=r"score\.a: expected a finite number to record"):
        record(score=pd.Series({"a": value}, dtype=object))
    assert shown == []


def test_nothing_and_twice_the_same_name_are_refused(shown, tmp_path):
    for nothing in ({}, {"accuracy": pd.Series(dtype=float)}):
        with pytest.raises(WorkbenchError, match="nothing to record"):
            record(**nothing)
    with pytest.raises(WorkbenchError, match=r"accuracy\.a is recorded twice"):
        record(accuracy=pd.Series([1.0, 2.0], ["a", "a"]))
    record(a=1)
    record(b=2)
    assert recorded(copy(tmp_path / "1.ipynb", {"text/plain": "x"}, *shown)) == {"a": 1, "b": 2}
    with pytest.raises(WorkbenchError, match="a is recorded twice"):
        recorded(copy(tmp_path / "2.ipynb", *shown, shown[0]))
    assert recorded(copy(tmp_path / "3.ipynb", {"text/plain": "x"})) == {}


def test_a_run_checks_its_parameters_first_and_its_copy_keeps_what_was_recorded(tmp_path):
    """By papermill, in a kernel: a JSON text becomes a list there, too."""
    cells = (
        "from workbench import notebooks, parameters\nparameters.check(globals())",
        "notebooks.record(third=1 / 3, steps=steps)",
        "notebooks.record(seeds=sum(seeds))",
    )
    path = write(tmp_path / "1.ipynb", *cells, parameters='seeds = [0]\nsteps = 10\nout = "."')
    execute(path, tmp_path / "runs" / "1.ipynb", {"seeds": "[1, 2]", "steps": 3.0})
    assert recorded(tmp_path / "runs" / "1.ipynb") == {"third": 1 / 3, "steps": 3, "seeds": 3}
    with pytest.raises(WorkbenchError, match=r"1.ipynb: parameter steps: expected .* got 'few'"):
        execute(path, tmp_path / "runs" / "2.ipynb", {"steps": "few"})
    assert not (tmp_path / "runs" / "2.ipynb").exists()


@pytest.mark.slow
def test_papermill_s_own_command_takes_lists_as_json_and_is_stopped_by_a_name_that_is_none(tmp_path):
    """From the folder above the notebooks, without --cwd, as a person would type it."""
    cells = (
        "from workbench import notebooks, parameters\nparameters.check(globals())",
        "notebooks.record(n=len(seeds))",
    )
    write(tmp_path / "notebooks" / "1.ipynb", *cells, parameters='seeds = [0]\nmethods = ["ties"]\nout = "../figures"')
    call = [sys.executable, "-m", "papermill", "notebooks/1.ipynb", "1.ipynb", "--no-progress-bar", "-k", "python3"]
    call += ["-l", "python", "-p", "seeds", "[0,1,2]", "-p", "methods"]
    good = subprocess.run([*call, '["ties","lego"]'], cwd=tmp_path, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert recorded(tmp_path / "1.ipynb") == {"n": 3}
    bad = subprocess.run([*call, '["ties"]', "-p", "sedes", "[4]"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "sedes: no such parameter (did you mean 'seeds'?)" in bad.stderr


@pytest.mark.slow
def test_a_re_run_at_the_recorded_parameters_gives_the_same_numbers(tmp_path):
    """Notebook 03 at its small parameters, and again at those that papermill wrote into the executed copy."""
    path, small = FOLDER / "03_merge_experiments.ipynb", settings(FOLDER / "03_merge_experiments.ipynb", "small")[0]
    execute(path, tmp_path / "once.ipynb", {**small, "out": str(tmp_path)})
    once = json.loads((tmp_path / "once.ipynb").read_text())["metadata"]["papermill"]["parameters"]
    execute(path, tmp_path / "twice.ipynb", once)
    assert once.items() >= small.items()
    assert recorded(tmp_path / "once.ipynb") == recorded(tmp_path / "twice.ipynb")
    assert any(name.startswith("accuracy.coefficients") for name in recorded(tmp_path / "once.ipynb"))
