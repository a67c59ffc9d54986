"""Merging: a stack of adapters and a method in, one update out (`Adapter`, or `Dense` where no low rank holds it)."""

from workbench.merge.dense import Dense, truncate
from workbench.merge.options import Count, Range, Share
from workbench.merge.registry import INVARIANCES, Method, merge, method, methods

# Importing a family registers its methods; the order here is the order of `methods()`.
from workbench.merge import linear, elementwise, lego  # noqa: F401  isort: skip

__all__ = ["INVARIANCES", "Count", "Dense", "Method", "Range", "Share", "merge", "method", "methods", "truncate"]
