"""Run the numbered notebooks headlessly, or store their outputs anew: `python -m workbench.notebooks run|store|list`.

A notebook carries its own settings for the gate in its metadata: `workbench.small`, a dict of parameters that makes it
run in seconds, and `workbench.runs`, a list of further such dicts. Notebooks are found by glob.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from workbench.errors import ParameterError, WorkbenchError
from workbench.jobs import each
from workbench.parameters import NUMBERED, checked, described, literals
from workbench.recording import record, recorded

__all__ = [
    "describe",
    "execute",
    "find",
    "parameters_of",
    "record",
    "recorded",
    "run",
    "settings",
    "store",
    "title_of",
    "validate",
]

CELL_TIMEOUT = 600
KEPT_METADATA = ("kernelspec", "language_info", "workbench")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def find(folder: str | Path = "notebooks", names: Iterable[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order; `names` keeps those whose file name starts with one of them.

    Raises:
        WorkbenchError: a name that no notebook starts with.
    """
    found, names = sorted(Path(folder).glob(NUMBERED)), tuple(names)
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise WorkbenchError(f"no notebook in {folder} starts with {name!r}; there are {[p.stem for p in found]}")
    return [path for path in found if not names or path.name.startswith(names)]


def read(path: str | Path):
    """A notebook as nbformat reads it, brought to version 4."""
    import nbformat

    return nbformat.read(path, as_version=4)


def title_of(notebook) -> str:
    """The first line of the first markdown cell, without its `#`; empty where there is none."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return next(texts, "").partition("\n")[0].lstrip("# ").strip()


def parameters_of(notebook) -> dict:
    """Names and default values that the cell tagged `parameters` assigns; only literals are allowed there.

    Raises:
        WorkbenchError: no such cell, several, or something in it that is not `name = literal`.
    """
    return literals(_parameters_cell(notebook))


def _parameters_cell(notebook) -> str:
    """The source of the one cell tagged `parameters`."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise WorkbenchError(f"expected one code cell tagged `parameters`, found {len(cells)}")
    return cells[0].source


def describe(path: str | Path) -> list[dict[str, object]]:
    """A notebook's parameters, a dict each: `name`, `default`, `kind` (what it may be, in words) and `help`.

    Raises:
        WorkbenchError: the parameters cell cannot be read (see `parameters_of`).
    """
    return described(_parameters_cell(read(path)))


def validate(path: str | Path, parameters: Mapping[str, object]) -> dict[str, object]:
    """Hold overrides to a notebook's parameters before anything runs; relative paths start in the notebook's folder.

    Returns:
        The values as the notebook uses them, such as 1 for 1.0, and the list for a JSON text of one.

    Raises:
        ParameterError: a value that the parameter cannot take, or a name that is no parameter of this notebook.
    """
    path = Path(path)
    try:
        return checked(parameters, parameters_of(read(path)), path.parent) if parameters else {}
    except ParameterError as error:
        raise ParameterError(f"{path.name}: {error}") from error


def settings(path: Path, mode: str) -> list[dict]:
    """The parameter overrides of each run of a notebook: `defaults` (one, empty), `small` (one) or `runs` (it and others).

    Raises:
        WorkbenchError: a notebook without `workbench.small`, or an override that is not among its parameters.
    """
    if mode == "defaults":
        return [{}]
    notebook = read(path)
    own = notebook.metadata.get("workbench", {})
    if mode == "small" and "small" not in own:
        raise WorkbenchError(f"{path.name}: its metadata has no `workbench.small`, a dict of small parameters")
    overrides = [own["small"]] if "small" in own else []
    overrides += own.get("runs", []) if mode == "runs" else []
    known = parameters_of(notebook)
    for override in overrides:
        if unknown := sorted(set(override) - set(known)):
            raise WorkbenchError(f"{path.name}: workbench.{mode} sets {unknown}, its parameters are {sorted(known)}")
    return [dict(override) for override in overrides]


def _encrypted():
    """The configuration under which a kernel does not warn, amid the progress lines, that its transport is open."""
    from traitlets.config import Config

    return Config(KernelManager={"transport_encryption": "required"})


def execute(path: Path, target: Path, parameters: dict, *, timeout: int = CELL_TIMEOUT) -> None:
    """Execute one notebook with papermill in its own folder, writing the executed copy to `target`.

    Args:
        parameters: overrides of the cell tagged `parameters`; plain JSON values.
        timeout: seconds a cell may take; a dead kernel ends there too.

    Raises:
        ParameterError: what the parameters cannot take (see `validate`); nothing has run then.
    """
    import papermill

    parameters = validate(path, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(path),
        str(target),
        parameters=parameters,
        cwd=str(path.parent),
        kernel_name="python3",
        language="python",
        execution_timeout=timeout,
        progress_bar=False,
        config=_encrypted(),
    )


def run(
    paths: Iterable[Path],
    to: Path,
    out: Path | None = None,
    *,
    mode: str = "defaults",
    given: Mapping[str, object] | None = None,
    timeout: int = CELL_TIMEOUT,
    at_once: int = 1,
) -> dict[str, str]:
    """Execute notebooks, with a line on each in their order; a failure does not stop the others.

    Args:
        to: folder of the executed copies; several runs of one notebook are numbered from 0.
        out: folder of the figures, given to each notebook as its parameter `out`; by default one for each under `to`.
        mode: `defaults`, `small` or `runs`, see `settings`.
        given: parameters that go before those; an `out` among them goes before the argument too.
        at_once: how many run at the same time.

    Returns:
        Name of each failed run → the last line of its error.

    Raises:
        WorkbenchError: settings that do not suit their notebook; nothing has run then.
    """
    jobs = {}
    for path in paths:
        for i, override in enumerate(settings(path, mode)):
            name = f"{path.stem}-{i}" if mode == "runs" else path.stem
            figures = Path(out or to / "figures" / name).resolve()
            figures.mkdir(parents=True, exist_ok=True)
            figures_from_there = os.path.relpath(figures, path.parent.resolve())
            values = validate(path, {"out": figures_from_there, **override, **(given or {})})
            jobs[name] = partial(execute, path, to / f"{name}.ipynb", values, timeout=timeout)
    return each(jobs, at_once, preload=["papermill"])


def store(path: Path, *, timeout: int = CELL_TIMEOUT) -> None:
    """Execute a notebook in place with its defaults: fresh kernel, in order, counts 1…n, only lasting metadata kept.

    The file is replaced when every cell has succeeded, and left alone otherwise.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = read(path)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
        config=_encrypted(),
    ).execute()
    notebook.metadata = {key: value for key, value in notebook.metadata.items() if key in KEPT_METADATA}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data.pop(WIDGET_VIEW, None)
    fresh = path.with_suffix(".ipynb.part")
    nbformat.write(nbformat.from_dict(notebook), fresh)
    os.replace(fresh, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 when a notebook failed, 2 when it could not be started."""
    parser = argparse.ArgumentParser(prog="python -m workbench.notebooks", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["run", "store", "list"])
    parser.add_argument("names", nargs="*", help="only notebooks whose file name starts so (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("notebooks"), help="where the notebooks lie")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_const", const="small", dest="mode", help="at their small parameters")
    which.add_argument(
        "--parameterised", action="store_const", const="runs", dest="mode", help="those, and each of their further runs"
    )
    parser.add_argument("--to", type=Path, help="folder of the executed copies (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: one for each run under --to)")
    parser.add_argument("--timeout", type=int, default=CELL_TIMEOUT, help="seconds a cell may take")
    parser.add_argument("--jobs", type=int, default=1, help="how many notebooks run at once (default: one)")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs is {given.jobs}, expected 1 or more")
    try:
        paths = find(given.folder, given.names)
        if not paths:
            print(f"no notebooks in {given.folder}: nothing was done")
            return 0
        if given.action == "list":
            for path in paths:
                print(f"{path}: {title_of(read(path))}")
            return 0
        if given.action == "store":
            jobs = {path.stem: partial(store, path, timeout=given.timeout) for path in paths}
            failed = each(jobs, given.jobs, preload=["nbclient"])
        else:
            with tempfile.TemporaryDirectory() as temporary:
                failed = run(
                    paths,
                    given.to or Path(temporary),
                    given.out,
                    mode=given.mode or "defaults",
                    timeout=given.timeout,
                    at_once=given.jobs,
                )
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 2
    for name, line in failed.items():
        print(f"{name} failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
