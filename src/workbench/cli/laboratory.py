"""The bundled laboratory trained anew, and JupyterLab on the notebooks."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.shared import failures, show

__all__ = ["forge", "lab"]


def forge(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where base/, adapters/ and forge.json go.")],
    preset: Annotated[str, typer.Option(help="The size: nano (the bundled pool's) or tiny (the tests').")] = "tiny",
    device: Annotated[str, typer.Option(help="Where it trains; by default a GPU where there is one.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes that write the base's training text.")] = 1,
) -> None:
    """Train a laboratory: a base, and a pool of adapters over it, in one seeded command.

    \b
    workbench forge --preset tiny --out runs/tiny                 # under a minute on a processor
    workbench forge --preset nano --out runs/nano --workers 16    # the bundled one; about seven minutes on an H200

    The pool opens by `workbench pool screen FOLDER/adapters --base FOLDER/base`. A base that an earlier run of the same
    recipe left in the folder is kept, and only the pool is trained.
    """
    from workbench.nano.forge import PRESETS
    from workbench.nano.forge import forge as train
    from workbench.options import near
    from workbench.usage import default_device

    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset!r}{near(preset, PRESETS)}; choose one of {', '.join(PRESETS)}")
    with failures():
        train(PRESETS[preset], out, device or default_device(), workers=workers)


def lab(
    ctx: typer.Context,
    notebooks: Annotated[Path, typer.Option(help="The folder that is opened.", metavar="FOLDER")] = Path("notebooks"),
) -> None:
    """Open JupyterLab on the notebooks; all other arguments are JupyterLab's own.

    \b
    workbench lab
    workbench lab --no-browser --port 9000
    workbench lab --notebooks elsewhere/notebooks
    """
    if find_spec("jupyterlab") is None:
        show(["JupyterLab is not installed beside this Python; `pip install jupyterlab` brings it"], err=True)
        raise typer.Exit(1)
    if not notebooks.is_dir():
        show([f"there is no folder {notebooks} here; go to the repository, or name one: --notebooks FOLDER"], err=True)
        raise typer.Exit(1)
    where = notebooks.resolve()
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={where.parent}"]
    os.execv(sys.executable, [*command, f"--LabApp.default_url=/lab/tree/{where.name}", *ctx.args])
