"""workbench: find out whether other people's LoRA adapters are worth recycling.

What is named here is imported when it is first asked for, so that a command's help need not wait for torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {"Adapter": "adapters", "Factors": "adapters", "Recipe": "experiment", "compare": "experiment"}
_HOMES |= {"Base": "base", "Dense": "merge", "Pool": "pool", "Results": "results", "Stack": "stack", "Units": "stack"}
_FUNCTIONS = ("adapt", "compose", "evaluate", "merge")  # each in a module of its own name, whose place here it takes


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    home = importlib.import_module(f"workbench.{_HOMES.get(name, name)}")
    found = getattr(home, name) if name in _HOMES or name in _FUNCTIONS else home
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing a module binds its name here; where a function of that name is offered, the function is bound instead."""

    def __setattr__(self, name: str, value) -> None:
        of_its_name = isinstance(value, ModuleType) and name in _FUNCTIONS
        super().__setattr__(name, getattr(value, name) if of_its_name else value)


sys.modules[__name__].__class__ = _Package
