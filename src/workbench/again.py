"""How to run a stored row's run again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

__all__ = ["again"]


def again(row: Mapping) -> str:
    """The lines of code that run a row of `compare` again, or the command for an executed notebook; "" for other rows.

    Of a run of a sweep (its JSON is in the column `run`) they open its pool and base. Others need `base` and `pool`; their
    comments say by which hashes those are known.
    """
    run = _json(row.get("run"))
    if run and "notebook" in run:
        given = json.dumps(run.get("given", {}))
        path = str(run["notebook"])
        return shlex.join(["papermill", "--cwd", "notebooks", path, "runs/again.ipynb", "-y", given])
    if run and not _comparable(run):
        lines = ["from pathlib import Path", "", "from workbench.sweep.spec import run_from"]
        lines += ["from workbench.sweep.work import carry_out", "", f"run = run_from({run!r})"]
        return "\n".join([*lines, 'carry_out([run], Path("runs/again"))  # stores its row there'])
    if not all(isinstance(row.get(name), str) for name in ("method", "task")):
        return ""
    given = {name: row[name] for name in ("select", "control") if row.get(name)}
    if row.get("select"):
        given |= {"k": int(row["k"]), "skip": int(row.get("skip") or 0), "own": bool(row.get("own"))}
    given |= {name: _json(row[name]) for name in ("options", "tune") if _json(row.get(name))}
    sizes = {name: int(row[name]) for name in ("n_train", "n_validation", "n_test") if row.get(name) is not None}
    about = {name: str(row.get(name) or "unknown") for name in ("base", "dtype", "device", "pool", "commit")}
    opened = []
    if run:
        opened.append(f"pool = wb.Pool.open({', '.join([repr(run['pool']), *_arguments(run.get('opening', {}))])})")
        base = "pool.base" if run["base"] is None else repr(run["base"])
        opened.append(f"base = wb.Base.load({', '.join([base, *_arguments(run.get('load', {}))])})")
    return "\n".join(
        [
            f"# base: the model with digest {about['base']!r}, in {about['dtype']!r} on {about['device']!r}",
            f"# pool: the pool with digest {about['pool']!r}; git commit {about['commit']!r}",
            "import workbench as wb",
            "",
            *opened,
            f"recipe = wb.Recipe({', '.join([repr(row['method']), *_arguments(given)])})",
            f"table = wb.compare(base, pool, [{row['task']!r}], [recipe], seeds=[{int(row['seed'])}], "
            f'{", ".join(_arguments(sizes))}, control="", baselines=())',
        ]
    )


def _comparable(run: Mapping) -> bool:
    """Whether `compare` does what the run does: a recipe, its task by name, its examples drawn under the run's seed."""
    plain = run.get("draw") in (None, run.get("seed")) and run.get("folder") is None
    return "recipe" in run and plain and not isinstance(run.get("n_validation"), str)


def _arguments(given: Mapping) -> list[str]:
    return [f"{name}={value!r}" for name, value in given.items()]


def _json(text: object) -> dict:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
