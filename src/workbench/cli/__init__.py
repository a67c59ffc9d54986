"""The command line: each command is one call into the package. What strangers wrote is shown escaped.

Exit codes: 0 fine, 1 nothing was accepted or it failed at run time, 2 wrong usage.
"""

from __future__ import annotations

import typer

from workbench.cli import evaluate, laboratory, make, methods, notebooks, pool, results, sweep

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Are other people's LoRA adapters worth recycling?",
)
app.add_typer(pool.pool, name="pool")
app.add_typer(results.results, name="results")
app.add_typer(notebooks.notebooks, name="notebooks")
for command in (
    methods.methods,
    make.merge,
    make.adapt,
    evaluate.evaluate,
    sweep.sweep,
    methods.bench,
    methods.figures,
    laboratory.forge,
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(laboratory.lab)


@app.callback()
def _main() -> None:
    """Are other people's LoRA adapters worth recycling?"""
