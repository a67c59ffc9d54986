"""workbench.parameters: what each kind of parameter takes and refuses, and the check inside and outside of a notebook."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import ParameterError
from workbench.notebooks import describe, find, parameters_of, read, settings, validate
from workbench.parameters import PARAMETERS, check, checked, described, literals

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = find(FOLDER)
CELL = 'k = 10  # adapters\nseeds = [0]\ngrid = "../figures/grid.parquet"\nstudy = None\nout = "../figures"'


def session(*cells):
    """A namespace as a notebook's is once these cells have run: IPython's history among it, and what they leave."""
    namespace = {"In": ["", *cells], "Out": {}, "plt": object()}
    for cell in cells:
        exec(cell, namespace)
    return namespace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_parameters_are_in_the_table_and_fit_it(path):
    defaults = parameters_of(read(path))
    assert set(defaults) <= set(PARAMETERS)
    assert validate(path, defaults) == defaults
    for override in settings(path, "runs"):
        assert validate(path, override) == override


def test_the_table_has_no_parameter_that_no_notebook_has():
    assert set(PARAMETERS) == set().union(*(parameters_of(read(path)) for path in NOTEBOOKS))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_checks_its_parameters_first_and_records_last(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    assert cells[at + 1].source.startswith("parameters.check(globals())\n")
    assert "notebooks.record(" in cells[-1].source
    assert len(settings(path, "runs")) >= 3


TAKEN = [
    ("k", 5, 5),
    ("k", 5.0, 5),
    ("k", "5", 5),
    ("n_test", "1e3", 1000),
    ("seed", 10**400, 10**400),
    ("seed", 0, 0),
    ("limit", "1e-3", 0.001),
    ("limit", 0, 0.0),
    ("limit", 1, 1.0),
    ("seeds", "[0, 1, 2]", [0, 1, 2]),
    ("seeds", (0, 1.0), [0, 1]),
    ("methods", '["ties", "lego"]', ["ties", "lego"]),
    ("methods", ["new adapter", "lorahub"], ["new adapter", "lorahub"]),
    ("controls", ["", "sigma but own"], ["", "sigma but own"]),
    ("space", '{"lr": ["1e-3"], "own": [true]}', {"lr": [0.001], "own": [True]}),
    ("pool", "hub:some/base", "hub:some/base"),
    ("pool", ".", "."),
    ("task", "nano/rotate-right-months", "nano/rotate-right-months"),
    ("task", "bbh/navigate", "bbh/navigate"),
    ("task", "here.yaml#b", "here.yaml#b"),
    ("tasks", ["nano/rotate-right-animals"], ["nano/rotate-right-animals"]),
    ("study", None, None),
    ("study", "here.yaml", "here.yaml"),
    ("out", "not/there/yet", "not/there/yet"),
]


@pytest.mark.parametrize(("name", "value", "expected"), TAKEN)
def test_values_are_taken_as_they_are_meant(tmp_path, name, value, expected):
    (tmp_path / "here.yaml").touch()
    found = checked({name: value}, [name], tmp_path)[name]
    assert found == expected
    assert type(found) is type(expected)
    assert checked({name: found}, [name], tmp_path)[name] == found


REFUSED = [
    ("k", "ten", "parameter k: expected a whole number of at least 1, got 'ten'"),
    ("k", 0, "at least 1, got 0"),
    ("k", 1.5, "whole number of at least 1, got 1.5"),
    ("k", True, "got True"),
    ("k", None, "got None"),
    ("k", math.nan, "got nan"),
    ("k", "inf", "got inf"),
    ("k", [5], r"got \[5\]"),
    ("most", 1, "at least 2, got 1"),
    ("seed", -1, "at least 0, got -1"),
    ("limit", 1.01, "a number from 0 to 1, got 1.01"),
    ("limit", False, "got False"),
    ("seeds", 0, r"expected a list, each entry a whole number of at least 0, got 0; write it as .*\[0, 1\]"),
    ("seeds", "(0, 1)", r"got '\(0, 1\)'; as text it has to be JSON"),
    ("seeds", [0, "x"], r"got 'x' \(entry 2\)"),
    ("seeds", [True], r"got True \(entry 1\)"),
    ("seeds", [], r"got \[\]"),
    ("seeds", '{"a": 1}', "as text it has to be JSON"),
    ("methods", "ties", "as text it has to be JSON"),
    ("methods", ["ties", "leggo"], r"got 'leggo' \(did you mean 'lego'\?\) \(entry 2\)"),
    ("methods", [1], r"got 1; there are 'sum'.*\(entry 1\)"),
    ("compared", ["lorahub"], "merging method, got 'lorahub'"),
    ("select", "evalution", "did you mean 'evaluation'"),
    ("granularity", "per layer", "there are 'expert', 'layer'|did you mean 'layer'"),
    ("canonical", "SVD", "'svd'"),
    ("controls", ["sigm"], "did you mean 'sigma'"),
    ("levels", ["twins"], "did you mean 'twin'"),
    ("space", {"start": ["zerro"]}, r"got 'zerro' \(did you mean 'zero'\?\) \(entry 1\) at 'start'"),
    ("space", {"strat": ["zero"]}, r"got the key 'strat' \(did you mean 'start'\?\)"),
    ("space", {"lr": [0]}, r"got 0 \(entry 1\) at 'lr'"),
    ("space", {"lr": [10**400]}, r"got 1000.*… \(entry 1\) at 'lr'"),
    ("space", {"own": [1]}, r"got 1; there are False|got 1; there are True"),
    ("space", {"k": 3}, "at 'k'"),
    ("space", {}, r"got \{\}"),
    ("space", "[1]", "as text it has to be JSON"),
    ("pool", "nana", "did you mean 'nano'"),
    ("pool", "hub:", "which is no folder seen from /"),
    ("pool", 3, "got 3"),
    ("task", "nano/rotate-right-month", "did you mean 'nano/rotate-right-months'"),
    ("task", "elsewhere.yaml", "the path of its file or folder, got 'elsewhere.yaml'"),
    ("tasks", ["bbh/navigat"], "did you mean 'bbh/navigate'"),
    ("merged", ["a", ""], r"got '' \(entry 2\)"),
    ("grid", "nowhere.parquet", "nowhere.parquet', which does not exist seen from .*--cwd notebooks"),
    ("grid", "/nowhere.parquet", "'/nowhere.parquet', which does not exist$"),
    ("grid", None, "got None"),
    ("study", 5, "expected None or the path of a file or folder that exists, got 5"),
    ("out", "", "got ''"),
    ("out", "here.yaml", "which is a file"),
    ("pool", object(), "got a object, which is no plain value: run the parameters cell again first"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_bad_values_are_refused_by_name(tmp_path, name, value, message):
    (tmp_path / "here.yaml").touch()
    with pytest.raises(ParameterError, match=message) as caught:
        checked({name: value}, [name], tmp_path)
    assert str(caught.value).startswith(f"parameter {name}: expected ")


def test_every_kind_is_tried():
    """A bad value of each parameter, or of one of the same kind, is among those refused above."""
    tried = {PARAMETERS[name].kind.expected for name, _, _ in REFUSED}
    same = {"a whole number of at least 1", "the path of a Parquet file that exists"}
    rest = {name for name, one in PARAMETERS.items() if one.kind.expected not in tried | same}
    assert rest == {"modules", "ks", "merge_ks"}  # lists of what is tried in other lists


@given(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
    )
)
def test_a_count_is_a_whole_number_or_an_error(value):
    """Whatever comes, `k` is either refused or an int of at least 1 equal to what came."""
    takes = True
    try:
        found = checked({"k": value}, ["k"])["k"]
    except ParameterError:
        takes = False
    if takes:
        assert type(found) is int
        assert found == float(value) >= 1
    else:
        assert isinstance(value, bool | str | list | None) or not (value >= 1 and value == value // 1)


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_a_list_and_its_json_are_the_same(seeds):
    assert checked({"seeds": str(seeds)}, ["seeds"])["seeds"] == checked({"seeds": seeds}, ["seeds"])["seeds"] == seeds


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ParameterError, match=r"^mehtods: no such parameter \(did you mean 'methods'\?\)$"):
        checked({"mehtods": ["ties"]}, ["methods", "out"])
    with pytest.raises(ParameterError, match=r"^zzz: no such parameter; there are methods, out$"):
        checked({"zzz": 1}, ["methods", "out"])
    with pytest.raises(ParameterError, match="k: no such parameter"):  # one of other notebooks
        validate(FOLDER / "02_msu_clustering.ipynb", {"k": 3})
    with pytest.raises(ParameterError, match=r"^03_merge_experiments.ipynb: parameter k: expected"):
        validate(FOLDER / "03_merge_experiments.ipynb", {"k": "ten"})


def test_a_name_of_one_s_own_notebook_keeps_its_value():
    assert checked({"mine": "(1, 2)"}, ["mine"]) == {"mine": "(1, 2)"}


def test_check_reads_what_papermill_injected_and_writes_it_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.parquet").touch()
    given = '# Parameters\nk = "5"\nseeds = "[0, 1]"\ngrid = "grid.parquet"\nPAPERMILL_INPUT_PATH = "a.ipynb"\n'
    namespace = session("import os", CELL, given)
    namespace["In"].append("parameters.check(globals())")
    want = {"k": 5, "seeds": [0, 1], "grid": "grid.parquet", "study": None, "out": "../figures"}
    assert check(namespace) == want
    assert {name: namespace[name] for name in want} == want


def test_check_refuses_names_that_papermill_injected_and_the_cell_has_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.parquet").touch()
    given = '# Parameters\nkk = 5\nn_test = 3\ngrid = "grid.parquet"\n'
    with pytest.raises(ParameterError, match=r"^kk: no such.*; n_test: no such parameter; there are k, seeds, grid"):
        check(session(CELL, given))
    check(session(CELL, "# Parameters\ngrid = 'grid.parquet'\n", "leftover = 3\nother = [1]"))  # cells of one's own


def test_check_refuses_bad_values_and_leaves_the_namespace_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = session(CELL, "# Parameters\nseeds = '[3]'\n")
    with pytest.raises(ParameterError, match=r"parameter grid: .*does not exist seen from .*--cwd notebooks"):
        check(namespace)
    assert namespace["seeds"] == "[3]"


def test_defaults_are_found_from_the_folder_above_the_notebooks(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "notebooks" / "01_a.ipynb").touch()
    (tmp_path / "figures" / "grid.parquet").touch()
    monkeypatch.chdir(tmp_path)
    found = check(session(CELL))
    assert (found["grid"], found["out"], found["study"]) == ("figures/grid.parquet", "figures", None)
    assert check(session(CELL, "# Parameters\nout = 'runs/figures'\n"))["out"] == "runs/figures"  # given: from here
    monkeypatch.chdir(tmp_path / "notebooks")
    assert check(session(CELL))["grid"] == "../figures/grid.parquet"


def test_outside_of_a_notebook_every_plain_value_has_to_be_a_parameter():
    assert check({"k": 3.0, "wb": math, "_hidden": 1}) == {"k": 3}
    with pytest.raises(ParameterError, match="steeps: no such parameter"):
        check({"k": 3, "steeps": 2})


def test_what_a_cell_says_wins_over_the_table():
    source = 'k = 3  # adapters at random\nn_test = 5\nspace = {  # searched\n    "k": [1],  # few\n}\nmine = 1'
    rows = {row["name"]: row for row in described(source)}
    assert rows["k"] == {
        "name": "k",
        "default": 3,
        "kind": "a whole number of at least 1",
        "help": "adapters at random",
    }
    assert rows["n_test"]["help"] == PARAMETERS["n_test"].help
    assert rows["space"]["help"] == "searched"
    assert rows["mine"] == {"name": "mine", "default": 1, "kind": "any value", "help": ""}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_every_notebook_is_explained(path):
    for row in describe(path):
        assert re.search(r"\w+ \w+", row["help"]), row
        assert row["kind"] != "any value"


@pytest.mark.parametrize("source", ["a += 1", "a = f()", "a, b = 1, 2", "print(1)", "a: int"])
def test_literals_are_all_that_a_parameters_cell_may_hold(source):
    with pytest.raises(ParameterError, match="is not `name = literal`"):
        literals(source)
