"""Sweeps: many runs from one file, of recipes, of merges for several tasks, or of a notebook's parameters."""

from workbench.sweep.dispatch import Report, run
from workbench.sweep.spec import Experiment, Multitask, Notebook, Sweep, run_from

__all__ = ["Experiment", "Multitask", "Notebook", "Report", "Sweep", "run", "run_from"]
