"""How to run a stored row's run again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

__all__ = ["again"]


def again(row: Mapping) -> str:
    """The lines of code that run a row of `compare` again, or the command for an executed notebook's; "" for others.

    The lines need `base` and `pool`; their comments say by which hashes those are known.
    """
    parameters = _json(row.get("parameters"))
    if isinstance(parameters, dict) and "notebook" in parameters:
        name, given = str(parameters["notebook"]), json.dumps(parameters.get("parameters", {}))
        path = name if name.endswith(".ipynb") else f"notebooks/{name}.ipynb"
        return shlex.join(["papermill", "--cwd", "notebooks", path, "runs/again.ipynb", "-y", given])
    if not all(isinstance(row.get(name), str) for name in ("method", "task")):
        return ""
    given = {name: row[name] for name in ("select", "control") if row.get(name)}
    if row.get("select"):
        given |= {"k": int(row["k"]), "skip": int(row.get("skip") or 0), "own": bool(row.get("own"))}
    given |= {name: _json(row[name]) for name in ("options", "tune") if _json(row.get(name))}
    sizes = {name: int(row[name]) for name in ("n_train", "n_validation", "n_test") if row.get(name) is not None}
    about = {name: str(row.get(name) or "unknown") for name in ("base", "dtype", "device", "pool", "commit")}
    return "\n".join(
        [
            f"# base: the model with digest {about['base']!r}, in {about['dtype']!r} on {about['device']!r}",
            f"# pool: the pool with digest {about['pool']!r}; git commit {about['commit']!r}",
            "import workbench as wb",
            "",
            f"recipe = wb.Recipe({', '.join([repr(row['method']), *_arguments(given)])})",
            f"table = wb.compare(base, pool, [{row['task']!r}], [recipe], seeds=[{int(row['seed'])}], "
            f'{", ".join(_arguments(sizes))}, control="", baselines=())',
        ]
    )


def _arguments(given: Mapping) -> list[str]:
    return [f"{name}={value!r}" for name, value in given.items()]


def _json(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        return None
