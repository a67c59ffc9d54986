"""How fast it is: ours beside the ways it is usually done, on a model of any size with random weights (`workbench bench`)."""

from workbench.bench.measure import Line, Timing, ceilings, timed
from workbench.bench.models import SCALES, Scale, random_adapters, random_base

__all__ = ["SCALES", "Line", "Scale", "Timing", "ceilings", "random_adapters", "random_base", "timed"]
