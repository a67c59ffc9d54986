"""What the shell offers for a name that is begun. It is asked for at every press of a key, so nothing here imports torch.

Methods and selections are read from the source that registers them, in about 0.06 s; tasks come from modules that are light,
in about 0.13 s; adapters from the folders' names. The program itself starts in about 0.2 s. Methods of one's own are not
offered.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import typer

__all__ = ["adapters", "adaptive", "declared", "merging", "pools", "selections", "tasks"]

_PACKAGE = Path(__file__).parents[1]


def declared(path: str, function: str) -> dict[str, str]:
    """Name → first line of its docstring, of what a file (or each file of a folder) registers by `function("name", …)`.

    declared("merge", "method")["ties"]
    """
    where = _PACKAGE / path
    files = sorted(where.glob("*.py")) if where.is_dir() else [where]
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                said = (ast.get_docstring(node) or "").partition("\n")[0]
                found |= {name: said for call in node.decorator_list for name in _name(call, function)}
            for name in _name(node, function):
                found.setdefault(name, "")
    return found


def _name(node: ast.AST, function: str) -> Iterator[str]:
    """The text that a call of the function begins with, if it is one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def merging(incomplete: str) -> list[tuple[str, str]]:
    """Merging methods, with what each does."""
    return _begun(declared("merge", "method"), incomplete)


def adaptive(incomplete: str) -> list[tuple[str, str]]:
    """Adaptive methods."""
    return _begun(declared("adapt/__init__.py", "Method"), incomplete)


def selections(incomplete: str) -> list[tuple[str, str]]:
    """Ways to choose adapters: those registered by name, and every closeness, pooled and as a mean over modules."""
    assigned = ast.walk(ast.parse((_PACKAGE / "closeness.py").read_text(encoding="utf-8")))
    measures = next(
        ast.literal_eval(node.value)
        for node in assigned
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MEASURES"
    )
    said = "By closeness to an adapter trained on the task"
    near = {measure: f"{said}." for measure in measures}
    near |= {f"{measure}_mean": f"{said}, mean over modules." for measure in measures}
    return _begun(declared("select.py", "selection") | near, incomplete)


def tasks(incomplete: str) -> list[str]:
    """The names of tasks that come with the package."""
    from workbench.tasks import names

    every = [*names(), *names("bbh"), *names("study")]
    return [name for name in every if name.startswith(incomplete)]


def pools(incomplete: str) -> list[str]:
    """The bundled pool, and folders."""
    return [name for name in ("nano", *_folders(incomplete)) if name.startswith(incomplete)]


def adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """The adapters of the pool that was named before, the last one of a list with commas."""
    from workbench.nano import shelf

    pool = ctx.params.get("source") or next(iter(ctx.args), None)  # an option still without its value ends the parsing
    root = shelf.ADAPTERS if pool == "nano" else Path(pool) if pool else None
    head, comma, last = incomplete.rpartition(",")
    known = sorted(one.parent.name for one in root.glob("*/adapter_config.json")) if root else []
    return [f"{head}{comma}{name}" for name in known if name.startswith(last) and name not in head.split(",")]


def _folders(begun: str) -> list[str]:
    head, slash, last = begun.rpartition("/")
    try:
        found = sorted(p.name for p in Path(head or slash or ".").iterdir() if p.is_dir())
    except OSError:
        return []
    return [f"{head}{slash}{name}" for name in found if name.startswith(last) and not name.startswith(".")]


def _begun(known: dict[str, str], incomplete: str) -> list[tuple[str, str]]:
    return [(name, said) for name, said in known.items() if name.startswith(incomplete)]
