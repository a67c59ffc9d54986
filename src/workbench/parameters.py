"""The parameters of the numbered notebooks: what each may be, what it says, and the check of a run's values.

A notebook's second code cell calls `parameters.check(globals())`; `workbench.notebooks.validate` does the same before
anything runs. A parameter means the same in every notebook that has it, so there is one table of them, `PARAMETERS`.
"""

from __future__ import annotations

import ast
import io
import os
import tokenize
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workbench import kinds
from workbench.errors import ParameterError
from workbench.kinds import Kind, entries, named, number, optional, path, place, text, whole
from workbench.options import near

__all__ = ["PARAMETERS", "Parameter", "check", "checked", "described", "literals"]

NUMBERED = "[0-9]*.ipynb"
INJECTED = "# Parameters\n"  # the first line of the cell in which papermill sets what it was given
PAPERMILLS_OWN = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}  # set by its option --inject-paths


@dataclass(frozen=True)
class Parameter:
    """A parameter's kind, and a sentence on what it is."""

    kind: Kind
    help: str


def _recipes() -> Iterable[str]:
    from workbench.adapt import ADAPTIVE
    from workbench.baselines import BASELINES

    return [*_merges(), *ADAPTIVE, *BASELINES]


def _merges() -> Iterable[str]:
    from workbench.merge import methods

    return methods()


def _selections() -> Iterable[str]:
    from workbench.select import SELECTIONS

    return SELECTIONS


def _controls() -> Iterable[str]:
    from workbench.controls import CONTROLS

    return ["", *CONTROLS]


def _canonical() -> Iterable[str]:
    from workbench.canonical import CANONICAL

    return CANONICAL


def _levels() -> Iterable[str]:
    from workbench.nano.dial import LEVELS

    return LEVELS


def _coefficients(what: str) -> Callable[[], Iterable[str]]:
    def names():
        from workbench.adapt import coefficients

        return getattr(coefficients, what)

    return names


_METHOD, _MERGE = named("the name of a method", _recipes), named("the name of a merging method", _merges)
_SELECT = named("the name of a way to select adapters", _selections)
_GRANULARITY = named("the name of a granularity", _coefficients("GRANULARITIES"))
_ADAPTERS = entries(text("the name of an adapter of the pool"))
_SPACE = {
    "granularity": _GRANULARITY,
    "activation": named("the name of an activation", _coefficients("ACTIVATIONS")),
    "start": named("the name of a start", _coefficients("STARTS")),
    "lr": number(0),
    "k": whole(),
    "select": _SELECT,
    "own": named("True or False", lambda: (True, False)),
}
_GRID = path("a Parquet file that exists")

PARAMETERS = {
    "pool": Parameter(kinds.pool(), "The pool of adapters."),
    "task": Parameter(kinds.task(), "The target task."),
    "tasks": Parameter(entries(kinds.task()), "The target tasks that are computed live."),
    "methods": Parameter(entries(_METHOD), "The methods that are run live."),
    "select": Parameter(_SELECT, "How adapters are chosen from the pool."),
    "k": Parameter(whole(), "How many adapters are merged."),
    "granularity": Parameter(_GRANULARITY, "What shares one learned coefficient."),
    "controls": Parameter(
        entries(named("'' or the name of a control", _controls)), "What random adapters are matched by."
    ),
    "levels": Parameter(
        entries(named("the name of a level", _levels)), "What one of the adapters shares with the target."
    ),
    "space": Parameter(
        kinds.mapping({key: entries(kind) for key, kind in _SPACE.items()}), "The design space: values by choice."
    ),
    "recipes": Parameter(whole(), "How many recipes are drawn."),
    "merged": Parameter(_ADAPTERS, "The adapters that are merged into one."),
    "compared": Parameter(entries(_MERGE), "The merging methods that LEGO is compared with."),
    "modules": Parameter(entries(text("the name of a module of the base")), "The modules whose units are clustered."),
    "canonical": Parameter(named("the name of a canonical form", _canonical), "The form in which units are clustered."),
    "ks": Parameter(entries(whole()), "Numbers of clusters."),
    "merge_ks": Parameter(entries(whole()), "Numbers of clusters of the merges."),
    "permutations": Parameter(whole(), "How often labels are shuffled."),
    "most": Parameter(whole(2), "How many adapters are compared with each other, at most."),
    "n_train": Parameter(whole(), "Training examples of each task."),
    "n_validation": Parameter(whole(), "Validation examples of each task."),
    "n_test": Parameter(whole(), "Test examples of each task."),
    "shots": Parameter(whole(), "Demonstrations of in-context learning."),
    "steps": Parameter(whole(), "Steps of each fit."),
    "new_steps": Parameter(whole(), "Steps of the newly trained adapter."),
    "budget": Parameter(whole(), "Evaluations of the objective in a search."),
    "longer": Parameter(whole(), "Evaluations of the search that is given more."),
    "questions": Parameter(whole(), "Questions over which the cost of fitting is spread."),
    "learnt": Parameter(whole(), "Training examples of each bundled adapter that are looked at."),
    "known": Parameter(whole(), "Training examples of each adapter that are searched for test examples."),
    "limit": Parameter(number(0, 1), "Largest share of test examples known to the pool."),
    "splits": Parameter(whole(), "How often the operations are halved."),
    "ahead_by": Parameter(number(0, 1), "By how much of exact match a way has to be ahead."),
    "loses_at_most": Parameter(number(0, 1), "How much of exact match a way may lose."),
    "chosen_on": Parameter(entries(whole(0)), "Seeds on which a winner is picked."),
    "seed": Parameter(whole(0), "Seed of what is drawn."),
    "seeds": Parameter(entries(whole(0)), "Seeds of examples, adapters and fits; one run each."),
    "grid": Parameter(_GRID, "The stored rows that the notebook reads."),
    "merges": Parameter(_GRID, "Stored rows of merges."),
    "findings": Parameter(_GRID, "Stored rows of the findings' grid."),
    "sweep": Parameter(_GRID, "Stored rows of a sweep."),
    "frugal": Parameter(_GRID, "Stored rows of fits of few degrees of freedom."),
    "study": Parameter(optional(path("a file or folder that exists")), "Where the recycling study's tables lie."),
    "threads": Parameter(whole(), "Threads of PyTorch."),
    "out": Parameter(place("a folder, made where it is missing"), "Where figures and their data are written."),
}


def checked(given: Mapping[str, object], known: Collection[str], folder: str | Path = ".") -> dict[str, object]:
    """The values of a run as the notebook uses them: 1 for 1.0, and the list for a JSON text of one.

    A name that is known to the notebook but not to `PARAMETERS` keeps its value. What parameters have to be with respect
    to each other is left to whom they are given.

    Args:
        given: values by name.
        known: the names of the notebook's parameters.
        folder: where relative paths start, the notebook's own folder.

    Raises:
        ParameterError: a value that the parameter cannot take, or a name that is no parameter.
    """
    if unknown := [name for name in given if name not in known and name not in PAPERMILLS_OWN]:
        raise ParameterError("; ".join(f"{name}: no such parameter{_meant(name, known)}" for name in unknown))
    named_ones = {name: value for name, value in given.items() if name in known}
    return {name: _read(name, value, Path(folder)) for name, value in named_ones.items()}


def _meant(name: str, known: Collection[str]) -> str:
    return near(name, known) or f"; there are {', '.join(known)}"


def _read(name: str, value: object, folder: Path) -> object:
    return kinds.read(name, PARAMETERS[name].kind, value, folder) if name in PARAMETERS else value


def check(namespace: dict) -> dict[str, object]:
    """Hold a notebook's parameters to their kinds and write them back as read; called with `globals()` after their cell.

    The notebook's own parameters are those of its parameters cell, and what papermill was given those of the cell that it
    adds below it, both told by the session's history (outside of IPython every plain value in the namespace has to be a
    parameter). A default that is a relative path is meant from the notebooks' folder: where the kernel runs in the folder
    above it, as papermill has it without `--cwd`, the default becomes the same path seen from there.

    Returns:
        The parameters by name, as they stand in the namespace from now on.

    Raises:
        ParameterError: a value that the parameter cannot take, or a name that is no parameter (papermill only warns).
    """
    plain = {name: v for name, v in namespace.items() if isinstance(v, kinds.PLAIN) and not name.startswith("_")}
    own, injected = _told(namespace["In"]) if "In" in namespace else ([*PARAMETERS], [*plain])
    values = {name: namespace[name] for name in [*own, *injected] if name in namespace}
    if (home := _home()) != Path():
        paths = [name for name in own if name in PARAMETERS and PARAMETERS[name].kind.is_path]
        moved = [name for name in paths if name not in injected and values.get(name)]
        values |= {name: os.path.normpath(home / values[name]) for name in moved}
    found = checked(values, own)
    namespace.update(found)
    return found


def _home() -> Path:
    """The notebooks' folder: this one, or the one of that name below it, if there are notebooks in that only."""
    below = Path("notebooks")
    return below if any(below.glob(NUMBERED)) and not any(Path().glob(NUMBERED)) else Path()


def _told(cells: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names that the last parameters cell of a session assigns, and those of papermill's cell since then."""
    injected: list[str] = []
    for source in reversed(list(cells)):
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        names = [name for statement in body for name in _targets(statement)]
        if source.startswith(INJECTED):
            injected += names
        elif "out" in names and all(map(_targets, body)):
            return names, injected
    return [*PARAMETERS], injected


def _targets(statement: ast.stmt) -> list[str]:
    """The names that `name = …` assigns; none of another statement."""
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def literals(source: str) -> dict[str, object]:
    """Names and values that a parameters cell assigns.

    Raises:
        ParameterError: something in it that is not `name = literal`.
    """
    found = {}
    for statement in ast.parse(source).body:
        try:
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else statement.targets
            value = ast.literal_eval(statement.value)
            found.update({target.id: value for target in targets})
        except (AttributeError, TypeError, ValueError) as error:
            raise ParameterError(
                f"line {statement.lineno} of the parameters cell, `{ast.unparse(statement)}`, is not `name = literal`; "
                f"move what is derived to the next cell"
            ) from error
    return found


def described(source: str) -> list[dict[str, object]]:
    """Name, default, kind and help of each parameter of a parameters cell, whose own comments go before the table's help.

    Raises:
        ParameterError: see `literals`.
    """
    defaults, said = literals(source), _comments(source)
    rows = []
    for name, default in defaults.items():
        known = PARAMETERS.get(name)
        expected = known.kind.expected if known else "any value"
        rows.append(
            {
                "name": name,
                "default": default,
                "kind": expected,
                "help": said.get(name) or (known.help if known else ""),
            }
        )
    return rows


def _comments(source: str) -> dict[str, str]:
    """Name → the comment that stands beside its assignment, on its first line or its last."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for statement in ast.parse(source).body:
        said = lines.get(statement.lineno) or lines.get(statement.end_lineno)
        found.update({name: said for name in _targets(statement) if said})
    return found
