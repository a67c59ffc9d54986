"""workbench: find out whether other people's LoRA adapters are worth recycling."""

from workbench import choices, controls, stats, studies, tasks
from workbench.adapt import adapt
from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.compose import compose
from workbench.evaluate import evaluate
from workbench.experiment import Recipe, compare
from workbench.merge import Dense, merge
from workbench.pool import Pool
from workbench.results import Results
from workbench.stack import Stack, Units

__all__ = [
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
