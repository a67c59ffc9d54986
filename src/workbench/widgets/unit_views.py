"""What an explorer of units shows: one module's map, its clusters and what chance would give, and the adapters' labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.clusters import cluster_units, purity, sharing, unit_map
from workbench.errors import SelectionError
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.widgets.work import Tell

__all__ = ["LABELS", "View", "Views", "labelled"]

LABELS = ("operation", "format", "domain")
KEPT = 8  # maps; clusters are made anew


@dataclass(frozen=True)
class View:
    """What is known of a module in a canonical form at a k: a row per unit, and how clusters compare with chance."""

    module: str
    form: str
    k: int
    table: pd.DataFrame
    shared: pd.DataFrame
    told: dict[str, pd.DataFrame]


class Views:
    """Views of a stack's modules; the last maps are kept, since k does not change them."""

    def __init__(self, stack: Stack, labels: pd.DataFrame, seed: int):
        self.stack, self.labels, self.seed = stack, labels, seed
        self._maps: dict[tuple[str, str], pd.DataFrame] = {}

    def view(self, module: str, form: str, k: int, tell: Tell = lambda *_: False) -> View | None:
        """The map, which is made once, the clusters, and what chance would give; None where `tell` says stop."""
        if tell(0, 3, f"a map of {module}"):
            return None
        if (module, form) not in self._maps:
            self._maps[module, form] = unit_map(self.stack, module, canonical=form, seed=self.seed)
            if len(self._maps) > KEPT:
                self._maps.pop(next(iter(self._maps)))
        flat = self._maps[module, form]
        if tell(1, 3, f"{k} clusters"):
            return None
        found = cluster_units(self.stack, k, canonical=form, modules=[module], seed=self.seed)
        if tell(2, 3, "shuffled labels"):
            return None
        told = {name: purity(found, self.labels[name].to_dict(), seed=self.seed) for name in self.labels}
        table = found.assign(x=flat["x"], y=flat["y"]).join(self.labels, on="adapter")
        return None if tell(3, 3, "the map") else View(module, form, k, table, sharing(found), told)


def labelled(source: Pool | Stack, given: pd.DataFrame | None, names: Sequence[str]) -> pd.DataFrame:
    """Columns of labels that tell adapters apart, a row per adapter; what is not known is "unknown"."""
    if given is None:
        given = (
            source.table.set_index("name")[list(LABELS)]
            if isinstance(source, Pool)
            else pd.DataFrame(index=list(names))
        )
    found = given[~given.index.duplicated()].reindex(list(names))
    found = found.astype(object).where(found.notna() & (found != ""), "unknown").astype(str)
    clash = {"adapter", "cluster", "norm", "x", "y", "unit", "module"} & set(found)
    if clash:
        raise SelectionError(f"a label may not be called {', '.join(sorted(clash))}, which a unit's table has already")
    return found[[name for name in found if found[name].nunique() > 1]]
