"""A run of a sweep that is a notebook: what determines it, and its row with what it recorded."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

from workbench.results import provenance, run_key
from workbench.sweep.spec import Notebook
from workbench.usage import default_device, device_name

__all__ = ["notebook_key", "notebook_row"]


def notebook_key(run: Notebook) -> str:
    """The key of a notebook's run: a hash of its code and parameters, the pool's content, methods' versions, kind of device."""
    from workbench import notebooks
    from workbench.adapt import ADAPTIVE
    from workbench.baselines import BASELINES
    from workbench.merge import methods

    notebook = notebooks.read(run.notebook)
    known = {**methods(), **ADAPTIVE, **BASELINES}
    given = notebooks.parameters_of(notebook) | dict(run.given)
    return run_key(
        {
            "code": [cell.source for cell in notebook.cells if cell.cell_type == "code"],
            "parameters": {name: value for name, value in given.items() if name != "out"},
            "pool": _digest(given["pool"]) if "pool" in given else "",
            "versions": {name: one.version for name, one in known.items()},
            "device": default_device(),
        }
    )


def _digest(pool: str) -> str:
    from workbench.pool import Pool

    return Pool.open(pool).digest


def notebook_row(run: Notebook, key: str, folder: Path) -> dict:
    """Execute a notebook and say what it recorded.

    The executed copy is kept as `notebooks/KEY.ipynb` in the folder, its figures in `notebooks/KEY/`; that of a run which
    fails as `notebooks/KEY.failed.ipynb`, until one succeeds.
    """
    from workbench import notebooks

    source, home = Path(run.notebook), Path(folder) / "notebooks"
    copy, failed = home / f"{key}.ipynb", home / f"{key}.failed.ipynb"
    part = home / f".{key}.{uuid.uuid4().hex}.ipynb"
    given = dict(run.given)
    if "out" in notebooks.parameters_of(notebooks.read(source)):
        (home / key).mkdir(parents=True, exist_ok=True)
        given["out"] = os.path.relpath((home / key).resolve(), source.parent.resolve())
    start = time.perf_counter()
    try:
        notebooks.execute(source, part, given)
        metrics = notebooks.recorded(part)
    except Exception:
        if part.is_file():
            os.replace(part, failed)
        raise
    os.replace(part, copy)
    failed.unlink(missing_ok=True)
    return {
        "key": key,
        "notebook": source.stem,
        "metrics": json.dumps(metrics),
        "seconds": time.perf_counter() - start,
        "copy": f"notebooks/{key}.ipynb",
        "device": default_device(),
        "device_name": device_name(default_device()),
        **provenance(),
    }
