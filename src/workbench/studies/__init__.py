"""Published tables of another study as the same tidy frames as our own results, and what can be asked of them.

study = recycling("realistic-adaptive-merging")     # a clone of the study's repository, or the folder of its files
study.pool                                          # one row per adapter, as in Pool.table
best_single(study)                                  # does the best single adapter beat the base?
"""

from workbench.studies.questions import best_single, clustered, concentration, helpers, published
from workbench.studies.tables import Recycling, recycling

__all__ = ["Recycling", "best_single", "clustered", "concentration", "helpers", "published", "recycling"]
