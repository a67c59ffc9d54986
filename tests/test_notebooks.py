"""workbench.notebooks: what it finds and reads, and what its runs leave behind."""

import json
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbench.errors import WorkbenchError
from workbench.notebooks import find, main, parameters_of, read, settings, title_of

PARAMETERS = 'seed = 0\nsteps = 1000\nout = "../figures"'


def write(path, *sources, metadata=None, parameters=PARAMETERS):
    """A notebook file with a title, a parameters cell and code cells of the given sources."""
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell("# Is it so?\nYes."), tagged, *map(new_code_cell, sources)])
    notebook.metadata.update(metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def texts(path):
    """Standard output of each code cell."""
    return ["".join(o.get("text", "") for o in c.outputs) for c in read(path).cells if c.cell_type == "code"]


def test_find_takes_numbered_notebooks_in_order(tmp_path):
    for name in ("10_b", "02_a", "scratch"):
        write(tmp_path / f"{name}.ipynb")
    assert [path.stem for path in find(tmp_path)] == ["02_a", "10_b"]
    assert [path.stem for path in find(tmp_path, ["10"])] == ["10_b"]
    with pytest.raises(WorkbenchError, match=r"starts with '03'.*02_a"):
        find(tmp_path, ["10", "03"])


def test_title_and_parameters(tmp_path):
    parameters = 'seeds: list = [0, 1]\nscale = -0.5\nout = "../figures"\nempty = None'
    notebook = read(write(tmp_path / "1.ipynb", parameters=parameters))
    assert title_of(notebook) == "Is it so?"
    assert parameters_of(notebook) == {"seeds": [0, 1], "scale": -0.5, "out": "../figures", "empty": None}


@pytest.mark.parametrize(
    "source", ["steps = 2 * 3", "import os", "a, b = 1, 2", "x.y = 1", "a: int", "seeds = range(3)"]
)
def test_parameters_must_be_literals(tmp_path, source):
    with pytest.raises(WorkbenchError, match="is not `name = literal`"):
        parameters_of(read(write(tmp_path / "1.ipynb", parameters=source)))


def test_parameters_cell_must_be_one():
    for count in (0, 2):
        cells = [new_code_cell("a = 1", metadata={"tags": ["parameters"]}) for _ in range(count)]
        with pytest.raises(WorkbenchError, match=f"found {count}"):
            parameters_of(new_notebook(cells=cells))


def test_settings_come_from_the_metadata(tmp_path):
    own = {"workbench": {"small": {"steps": 2}, "runs": [{"seed": 1}, {"seed": 2, "steps": 3}]}}
    path = write(tmp_path / "1.ipynb", metadata=own)
    assert settings(path, "defaults") == [{}]
    assert settings(path, "small") == [{"steps": 2}]
    assert settings(path, "runs") == [{"steps": 2}, {"seed": 1}, {"seed": 2, "steps": 3}]
    bare = write(tmp_path / "2.ipynb")
    assert settings(bare, "runs") == []
    with pytest.raises(WorkbenchError, match=r"2.ipynb.*no `workbench.small`"):
        settings(bare, "small")
    with pytest.raises(WorkbenchError, match=r"sets \['stepz'\]"):
        settings(write(tmp_path / "3.ipynb", metadata={"workbench": {"small": {"stepz": 2}}}), "small")


def test_missing_small_parameters_stop_the_run_before_anything_is_executed(tmp_path, capsys):
    write(tmp_path / "1.ipynb", metadata={"workbench": {"small": {}}})
    write(tmp_path / "2.ipynb")
    assert main(["run", "--small", "--folder", str(tmp_path), "--to", str(tmp_path / "runs")]) == 2
    assert "2.ipynb" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*.ipynb"))


def test_list_and_an_empty_folder(tmp_path, capsys):
    assert main(["list", "--folder", str(tmp_path)]) == 0
    assert "no notebooks" in capsys.readouterr().out
    write(tmp_path / "1.ipynb")
    assert main(["list", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("1.ipynb: Is it so?\n")


def test_run_executes_all_and_reports_the_failures(tmp_path, capfd, monkeypatch):
    """The small parameters and `out` are injected, a failure does not stop the next, and the kernel is our own."""
    hostile = tmp_path / "user" / "kernels" / "python3"
    hostile.mkdir(parents=True)
    (hostile / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "user"))
    small = {"workbench": {"small": {"steps": 2}}}
    folder = tmp_path / "repository" / "notebooks"
    write(folder / "01_bad.ipynb", "raise ValueError('first line\\nthe last line')", metadata=small)
    write(
        folder / "02_good.ipynb",
        "import os, sys; print(os.getcwd(), sys.executable, seed, steps, sep='|')",
        "open(f'{out}/figure.txt', 'w').close()",
        metadata=small,
    )
    arguments = ["--folder", str(folder), "--to", str(tmp_path / "runs"), "--out", str(tmp_path / "drawn")]
    assert main(["run", "--small", *arguments]) == 1
    shown = capfd.readouterr()
    assert shown.err.endswith("01_bad failed: the last line\n")
    assert "without encryption" not in shown.err  # the kernels' warning, amid the progress lines
    assert [line.split()[0] for line in shown.out.splitlines()] == ["01_bad", "02_good"]
    assert shown.out.splitlines()[1].endswith(" s ok")
    printed = next(text for text in texts(tmp_path / "runs" / "02_good.ipynb") if text)
    assert printed.strip() == f"{folder}|{sys.executable}|0|2"
    assert (tmp_path / "drawn" / "figure.txt").exists()
    assert texts(folder / "02_good.ipynb") == ["", "", ""]


def test_parameterised_runs_are_numbered(tmp_path, capsys):
    path = write(
        tmp_path / "n" / "01_a.ipynb",
        "print(seed, out)",
        metadata={"workbench": {"small": {"seed": 5}, "runs": [{"seed": 6}]}},
    )
    to = ["--to", str(tmp_path / "runs")]
    assert main(["run", "--parameterised", "--jobs", "2", "--folder", str(path.parent), *to]) == 0
    for i, seed in enumerate((5, 6)):
        printed = "".join(texts(tmp_path / "runs" / f"01_a-{i}.ipynb")).strip()
        assert printed == f"{seed} ../runs/figures/01_a-{i}"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_jobs_must_be_one_or_more(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--jobs", "0", "--folder", str(tmp_path)])
    assert "--jobs is 0, expected 1 or more" in capsys.readouterr().err


def test_a_cell_that_hangs_or_kills_its_kernel_is_a_failure(tmp_path, capsys):
    write(tmp_path / "1_hangs.ipynb", "import time; time.sleep(60)")
    write(tmp_path / "2_dies.ipynb", "import os; os._exit(1)")
    assert main(["run", "--folder", str(tmp_path), "--to", str(tmp_path / "runs"), "--timeout", "4"]) == 1
    hung, dead = capsys.readouterr().err.splitlines()
    assert hung.startswith("1_hangs failed: A cell timed out")
    assert dead == "2_dies failed: Kernel died"


def test_store_leaves_a_clean_notebook_with_fresh_outputs(tmp_path):
    widget = "import ipywidgets; ipywidgets.IntSlider(value=3)"
    path = write(
        tmp_path / "1.ipynb",
        "print(steps)",
        widget,
        metadata={
            "workbench": {"small": {"steps": 2}},
            "papermill": {},
            "widgets": {},
            "kernelspec": {"name": "x", "display_name": "x"},
        },
    )
    stale = read(path)
    stale.cells[2].execution_count = 77
    stale.cells[2].outputs = [new_output("stream", text="stale")]
    stale.cells[2].metadata.update(papermill={"duration": 1.0}, tags=["nbval-check-output"])
    nbformat.write(stale, path)
    assert main(["store", "--folder", str(tmp_path)]) == 0
    stored = read(path)
    nbformat.validate(stored)
    assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2, 3]
    assert texts(path)[1] == "1000\n"
    assert stored.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "workbench": {"small": {"steps": 2}},
    }
    assert [cell.metadata for cell in stored.cells[1:]] == [
        {"tags": ["parameters"]},
        {"tags": ["nbval-check-output"]},
        {},
    ]
    assert list(stored.cells[3].outputs[0].data) == ["text/plain"]
    assert [file.name for file in tmp_path.iterdir()] == ["1.ipynb"]
    before = path.read_text()
    assert main(["store", "1", "--folder", str(tmp_path)]) == 0
    assert path.read_text() == before


def test_store_leaves_a_failing_notebook_alone(tmp_path, capsys):
    path = write(tmp_path / "1.ipynb", "print(1)", "1 / 0")
    before = path.read_text()
    assert main(["store", "--folder", str(tmp_path)]) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert path.read_text() == before
