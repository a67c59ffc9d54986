"""Notebooks as runs of a sweep: executed copies, numbers in rows, failures apart, the same numbers from a row's settings."""

import json
from pathlib import Path

import nbformat
import pytest

from workbench import notebooks
from workbench.results import Results
from workbench.sweep import Notebook, Sweep, run, run_from
from workbench.sweep.notebook import notebook_key
from workbench.sweep.reading import sweep_of
from workbench.usage import default_device, device_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A notebook that records two numbers and a figure, and fails where n is 3."""
    cells = [
        nbformat.v4.new_markdown_cell("# A small notebook"),
        nbformat.v4.new_code_cell('n = 1\nseed = 0\nout = "."', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import random\nassert n != 3, 'three is too many'\nx = random.Random(seed).random() / n"
        ),
        nbformat.v4.new_code_cell(
            "from workbench.notebooks import record\nrecord(x=x, n=n)\nopen(f'{out}/figure.txt', 'w').write(str(x))"
        ),
    ]
    path = tmp_path_factory.mktemp("notebooks") / "01_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.slow
def test_a_grid_over_a_notebook(small, tmp_path):
    given = {"name": "grid", "results": str(tmp_path), "notebook": str(small), "grid": {"n": [1, 2, 3]}}
    sweep = sweep_of(given | {"parameters": {"seed": 7}})
    report = run(sweep, workers=2)
    assert (report.ran, report.failed) == (2, 1)
    assert "three is too many" in report.errors[0][1]
    rows = Results(tmp_path).read().set_index("key")
    for key, row in rows.iterrows():
        copy = tmp_path / row["copy"]
        assert copy == tmp_path / "notebooks" / f"{key}.ipynb"
        metrics = json.loads(row.metrics)
        assert notebooks.recorded(copy) == metrics
        assert float((tmp_path / "notebooks" / key / "figure.txt").read_text()) == metrics["x"]
        assert row.notebook == "01_small"
        assert (row.device, row.device_name) == (default_device(), device_name(default_device()))
    assert sorted(json.loads(text)["n"] for text in rows.metrics) == [1, 2]
    (failed,) = (tmp_path / "notebooks").glob("*.failed.ipynb")
    assert "three is too many" in failed.read_text()
    assert not list((tmp_path / "notebooks").glob(".*"))
    again = run(sweep, workers=0)
    assert (again.ran, again.stored, again.failed_before) == (0, 2, 1)


def test_what_a_key_depends_on(small, tmp_path, monkeypatch):
    key = notebook_key(Notebook(str(small), {"n": 2}))
    assert notebook_key(Notebook(str(small), {"n": 2, "seed": 0})) == key  # its default
    assert notebook_key(Notebook(str(small), {"n": 2, "out": "elsewhere"})) == key
    assert notebook_key(Notebook(str(small), {"n": 3})) != key
    with monkeypatch.context() as patch:
        patch.setattr("workbench.sweep.notebook.default_device", lambda: "cuda")
        assert notebook_key(Notebook(str(small), {"n": 2})) != key
    other = tmp_path / "01_small.ipynb"
    book = nbformat.read(small, 4)
    nbformat.write(book, other)
    assert notebook_key(Notebook(str(other), {"n": 2})) == key  # wherever it lies
    book.cells[0].source = "# Another title"
    book.cells[2].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(book, other)
    assert notebook_key(Notebook(str(other), {"n": 2})) == key
    book.cells[2].source += " + 1"
    nbformat.write(book, other)
    assert notebook_key(Notebook(str(other), {"n": 2})) != key


@pytest.mark.slow
def test_a_row_s_settings_give_its_numbers_again(tmp_path):
    """Of a real notebook, by papermill."""
    path = ROOT / "notebooks" / "01_pool_exploration.ipynb"
    (parameters,) = notebooks.settings(path, "small")
    report = run(Sweep("one", tmp_path / "a", (Notebook(str(path), parameters),)), workers=0)
    assert report.ran == 1, report.errors
    row = Results(tmp_path / "a").read().iloc[0]
    metrics = json.loads(row.metrics)
    assert metrics
    stored = json.loads(row["run"])
    copy = tmp_path / "again.ipynb"
    (tmp_path / "out").mkdir()
    notebooks.execute(Path(stored["notebook"]), copy, stored["given"] | {"out": str(tmp_path / "out")})
    assert notebooks.recorded(copy) == metrics
    assert run(Sweep("two", tmp_path / "a", (run_from(stored),)), workers=0).stored == 1
