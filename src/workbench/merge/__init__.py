"""Merging: a stack of adapters and a method in, one update out (`Adapter`, or `Dense` where no low rank holds it)."""

from workbench.merge.dense import Dense, truncate
from workbench.merge.observe import collect
from workbench.merge.registry import INVARIANCES, Method, describe, merge, method, methods
from workbench.merge.statistics import Statistics
from workbench.options import Count, Range, Share

# Importing a family registers its methods; the order here is the order of `methods()`.
from workbench.merge import linear, elementwise, subspace, aligned, data, lego  # noqa: F401  isort: skip

__all__ = [
    "INVARIANCES",
    "Count",
    "Dense",
    "Method",
    "Range",
    "Share",
    "Statistics",
    "collect",
    "describe",
    "merge",
    "method",
    "methods",
    "truncate",
]

merge.collect = collect
