"""The rules every notebook keeps. Each rule is a function notebook → complaints, tried here on notebooks that break it."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbench.errors import WorkbenchError
from workbench.notebooks import find, parameters_of, read, title_of

FOLDER = Path(__file__).parents[1] / "notebooks"
LARGEST = 1_000_000
ABSOLUTE = re.compile(r"(?<![\w.~/:])/(?:home|root|work|tmp|Users|private|var|opt|mnt)/[\w./-]+|[A-Z]:\\\\?Users\b")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def shown_texts(cell):
    """Every text among a cell's outputs, whatever its type; pictures left out."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from output.get("traceback", [])
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png"))


def title(notebook):
    first = notebook.cells[0] if notebook.cells else None
    line = first.source.partition("\n")[0] if first and first.cell_type == "markdown" else ""
    if not line.startswith("# ") or not title_of(notebook).endswith("?"):
        yield f"the first line, {line!r}, is not a title that asks a question"


def counts(notebook):
    found = [cell.execution_count for cell in code_cells(notebook)]
    if found != list(range(1, len(found) + 1)):
        yield f"execution counts are {found}: store it anew (make notebooks)"


def parameters(notebook):
    try:
        names = set(parameters_of(notebook))
    except WorkbenchError as error:
        yield str(error)
        return
    if not names & {"seed", "seeds"}:
        yield "no `seed` or `seeds` among the parameters"
    if "out" not in names:
        yield "no `out` among the parameters"
    if "small" not in (own := notebook.metadata.get("workbench", {})):
        yield "no `workbench.small` in the metadata"
    for override in [own.get("small", {}), *own.get("runs", [])]:
        if unknown := set(override) - names:
            yield f"workbench.small or .runs sets {sorted(unknown)}, which are no parameters"


def checked_outputs(notebook):
    checked = [cell for cell in code_cells(notebook) if "nbval-check-output" in tags(cell)]
    if not checked:
        yield "no cell is tagged `nbval-check-output`"
    for cell in checked:
        if not any(text.strip() for text in shown_texts(cell)):
            yield f"the cell tagged `nbval-check-output` has stored no text to compare: {cell.source!r}"


def errors(notebook):
    for cell in code_cells(notebook):
        yield from (f"stored error {o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error")


def thinness(notebook):
    for cell in code_cells(notebook):
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                yield f"class {node.name} belongs in the package"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno > node.lineno + 1:
                yield f"function {node.name} is longer than a line, and belongs in the package"


def lasting_metadata(notebook):
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernel is not python3"
    if "widgets" in notebook.metadata:
        yield "widget state is stored in its metadata"
    for cell in notebook.cells:
        if timed := {"execution", "papermill", "ExecuteTime"} & set(cell.metadata):
            yield f"timing metadata {sorted(timed)} is stored with a cell"


def paths(notebook):
    for cell in code_cells(notebook):
        for text in shown_texts(cell):
            yield from (f"an output shows the absolute path {found[0]}" for found in ABSOLUTE.finditer(text))


def size(notebook):
    if (length := len(nbformat.writes(notebook).encode())) > LARGEST:
        yield f"it has {length} bytes, more than {LARGEST}"


RULES = [title, counts, parameters, checked_outputs, errors, thinness, lasting_metadata, paths, size]
NOTEBOOKS = find(FOLDER) or [pytest.param(None, marks=pytest.mark.skip(reason="there are no notebooks"), id="none")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES)
def test_notebook_keeps_the_rule(path, rule):
    complaints = list(rule(read(path)))
    assert not complaints, f"{path.name}: " + "; ".join(complaints)


def test_every_notebook_is_numbered():
    """Papermill and nbval find notebooks by their number; one without would never be run."""
    assert sorted(FOLDER.glob("*.ipynb")) == find(FOLDER)


def good():
    """A small notebook that keeps every rule."""
    cells = [
        new_markdown_cell("# Does it help?\nYes."),
        new_code_cell('seed = 0\nsteps = 9\nout = "../figures"', metadata={"tags": ["parameters"]}),
        new_code_cell("%matplotlib inline\ndouble = lambda x: 2 * x\ndef half(x): return x / 2"),
        new_code_cell("double(2)", metadata={"tags": ["nbval-check-output"]}),
    ]
    for i, cell in enumerate(cells[1:], 1):
        cell.execution_count = i
    cells[3].outputs = [new_output("execute_result", data={"text/plain": "4 of ../figures/a/b"}, execution_count=3)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "workbench": {"small": {"steps": 1}}})


def _set(path, value):
    """An edit: assign `value` at a path of attributes and indices of the notebook."""

    def edit(notebook):
        *inner, last = path
        for step in inner:
            notebook = notebook[step]
        notebook[last] = value

    return edit


def _print(text):
    return _set(["cells", 3, "outputs"], [new_output("stream", text=text)])


BAD = [
    (title, _set(["cells", 0, "source"], "# It helps\nDoes it?"), "asks a question"),
    (title, _set(["cells", 0, "source"], "Does it help?"), "asks a question"),
    (title, _set(["cells"], [new_code_cell("# Does it help?")]), "asks a question"),
    (counts, _set(["cells", 2, "execution_count"], 5), r"\[1, 5, 3\]"),
    (counts, _set(["cells", 2, "execution_count"], None), "None"),
    (parameters, _set(["cells", 1, "metadata"], {}), "found 0"),
    (parameters, _set(["cells", 2, "metadata"], {"tags": ["parameters"]}), "found 2"),
    (parameters, _set(["cells", 1, "source"], "seed = 1 + 1\nout = ''"), "is not `name = literal`"),
    (parameters, _set(["cells", 1, "source"], "steps = 9\nout = ''"), "no `seed`"),
    (parameters, _set(["cells", 1, "source"], "seeds = [0]\nsteps = 9"), "no `out`"),
    (parameters, _set(["metadata", "workbench"], {}), "no `workbench.small`"),
    (parameters, _set(["metadata", "workbench", "small"], {"step": 1}), "step"),
    (parameters, _set(["metadata", "workbench", "runs"], [{"seed": 1}, {"k": 1}]), r"\['k'\]"),
    (checked_outputs, _set(["cells", 3, "metadata"], {}), "no cell is tagged"),
    (checked_outputs, _set(["cells", 3, "outputs"], []), "no text"),
    (checked_outputs, _print(" \n"), "no text"),
    (
        checked_outputs,
        _set(["cells", 3, "outputs"], [new_output("display_data", data={"image/png": "aGk="})]),
        "no text",
    ),
    (errors, _set(["cells", 2, "outputs"], [new_output("error", ename="E", evalue="v", traceback=[])]), "E: v"),
    (thinness, _set(["cells", 2, "source"], "class A: pass"), "class A"),
    (thinness, _set(["cells", 2, "source"], "def f(x):\n    y = x\n    return y"), "function f"),
    (
        thinness,
        _set(["cells", 2, "source"], "for i in a:\n    def f(x):\n        y = x\n        return y"),
        "function f",
    ),
    (lasting_metadata, _set(["metadata", "kernelspec", "name"], "other"), "kernel"),
    (lasting_metadata, _set(["metadata", "widgets"], {}), "widget state"),
    (lasting_metadata, _set(["cells", 2, "metadata", "execution"], {"iopub.execute_input": "x"}), "execution"),
    (paths, _print("saved to /home/someone/figures/a.pdf"), "/home/someone"),
    (paths, _print("File '/root/x.py', line 1"), "/root/x.py"),
    (paths, _set(["cells", 3, "outputs", 0, "data"], {"text/html": "<a href=/Users/me/a>"}), "/Users/me/a"),
    (size, _print("x" * LARGEST), "bytes"),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_accept_a_good_notebook(rule):
    nbformat.validate(good())
    assert list(rule(good())) == []


@pytest.mark.parametrize(("rule", "edit", "complaint"), BAD)
def test_rules_refuse_bad_notebooks(rule, edit, complaint):
    notebook = good()
    edit(notebook)
    complaints = list(rule(notebook))
    assert len(complaints) == 1
    assert re.search(complaint, complaints[0])


def test_every_rule_is_tried():
    assert {rule for rule, _, _ in BAD} == set(RULES)
