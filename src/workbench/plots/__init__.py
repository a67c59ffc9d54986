"""Figures: functions that take an Axes and return artists, one style, and files that carry their data with them."""

from workbench.plots.charts import bars, curves, forest, heatmap, importance, intervals, units
from workbench.plots.sheet import COLUMN, TEXT, VENUES, Venue, apply, figure, save, style, venue_of

__all__ = [
    "COLUMN",
    "TEXT",
    "VENUES",
    "Venue",
    "apply",
    "bars",
    "curves",
    "figure",
    "forest",
    "heatmap",
    "importance",
    "intervals",
    "save",
    "style",
    "units",
    "venue_of",
]
