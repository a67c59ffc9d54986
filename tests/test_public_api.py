"""What `import workbench as wb` offers, that it is documented, and that it stays light."""

import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
import types

import pytest

import workbench as wb
from workbench import errors

PUBLIC = [
    "Adapter",
    "Base",
    "Dense",
    "Factors",
    "Pool",
    "Recipe",
    "Results",
    "Stack",
    "Units",
    "adapt",
    "choices",
    "compare",
    "compose",
    "controls",
    "evaluate",
    "merge",
    "stats",
    "studies",
    "tasks",
]
MODULES = sorted(m.name for m in pkgutil.walk_packages(wb.__path__, "workbench.") if not m.name.endswith("__main__"))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all():
    assert wb.__all__ == PUBLIC
    assert wb.__all__ == sorted(wb.__all__, key=lambda name: (name.islower(), name))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_there_and_documented(name):
    found = getattr(wb, name)
    assert found.__doc__
    assert len(found.__doc__.strip()) > 20
    assert not inspect.isclass(found) or not found.__doc__.startswith(f"{name}(")  # a dataclass's signature is no text


@pytest.mark.parametrize("name", [m for m in MODULES if m not in ("workbench.nano",)])
def test_every_module_says_what_it_is_and_what_it_offers(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for word in getattr(module, "__all__", []):
        found = getattr(module, word)
        if inspect.isfunction(found) or inspect.isclass(found):
            assert found.__doc__, f"{name}.{word} has no docstring"
            assert not found.__doc__.startswith(f"{word}("), f"{name}.{word} has only its signature for a docstring"


def test_functions_although_packages_have_their_names():
    """`merge` and `adapt` are packages too; importing what is in them must not put the package in the function's place."""
    code = """
import workbench as wb
first = wb.merge, wb.adapt
import workbench.merge.lego, workbench.adapt.search
from workbench.merge import linear
from workbench.adapt import coefficients
import importlib, inspect, sys
importlib.import_module("workbench.merge.elementwise")
importlib.import_module("workbench.adapt.fresh")
assert (wb.merge, wb.adapt) == first
assert inspect.isfunction(wb.merge) and inspect.isfunction(wb.adapt)
assert "lego" in wb.merge.methods() and "sum" in wb.merge.methods()
assert sys.modules["workbench.merge"].merge is wb.merge
print("fine")
"""
    assert run(code) == "fine\n"
    code = """
import workbench.merge.lego
import workbench.adapt.search
import workbench
assert "ties" in workbench.merge.methods()
print(type(workbench.merge).__name__, type(workbench.adapt).__name__)
"""
    assert run(code) == "function function\n"


def test_they_pickle_for_other_processes():
    for found in (wb.merge, wb.adapt, wb.compare, wb.Recipe):
        assert pickle.loads(pickle.dumps(found)) is found
    recipe = wb.Recipe("ties", select="evaluation", k=3, control="norm", density=0.3)
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_heavy_things_are_imported_where_they_are_used():
    heavy = ["peft", "huggingface_hub", "dask", "ipywidgets", "matplotlib", "duckdb", "cma", "sklearn", "datasets"]
    code = f"import sys, json, workbench; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    assert json.loads(run(code)) == []


def test_every_error_on_purpose_is_a_value_error():
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.WorkbenchError)
        assert issubclass(error, ValueError)
        assert error.__doc__


def test_submodules_that_notebooks_name():
    for module in (wb.controls, wb.stats, wb.studies, wb.tasks):
        assert isinstance(module, types.ModuleType)
    assert wb.tasks.load
    assert wb.controls.random_like
    assert wb.stats.bootstrap
    assert wb.studies.recycling
