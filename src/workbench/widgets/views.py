"""What the explorer's pictures are made of: computed once for each adapter, at once where that is quick, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import pandas as pd
from matplotlib.figure import Figure

from workbench.pool import Pool
from workbench.similarity import by_layer, norm_profile, similarity
from workbench.spectra import singular_values, spectrum
from workbench.widgets.chooser import MOST, heat_map
from workbench.widgets.maps import LINES, ROWS, Likeness, most_alike, pool_map, profiles
from workbench.widgets.work import Tell

__all__ = ["ALL", "VIEWS", "View", "Views"]

ALL = ""  # the choice of a module that stands for all of them
AT_ONCE = 100  # adapters whose similarity is computed unasked
QUICK = 2**26  # bytes of factors that are read while someone waits


@dataclass(frozen=True)
class View:
    """A picture: its title, what it shows, and the line that computes it, where {} stands for the selection's stack."""

    title: str
    says: str
    code: str


VIEWS = {
    "map": View(
        "Map of the pool",
        "How alike the pool's updates are: heat map with dendrogram, and plane",
        "similarity(pool.stack())  # from workbench.similarity; and tree, plane of that",
    ),
    "cosines": View(
        "Cosines", "Cosine similarity of the selected adapters", "similarity({})  # from workbench.similarity"
    ),
    "norms": View(
        "Norms by layer",
        "‖ΔW‖ of the selected adapters by layer",
        "by_layer(norm_profile({}))  # from workbench.similarity",
    ),
    "spectra": View(
        "Singular values",
        "Singular values of the selected adapters' updates",
        "[spectrum(singular_values(adapter){}) for adapter in map(pool.adapter, explorer.names)]  # from workbench.spectra",
    ),
}
_MAPS: WeakKeyDictionary[Pool, Likeness] = WeakKeyDictionary()


class Views:
    """The pictures of a pool. `lacking` says what a picture still needs, `compute` gets it, `draw` draws.

    Similarity is kept with the pool, for every explorer of it; norms and spectra of an adapter with this object.
    """

    def __init__(self, pool: Pool, colours: pd.Series | None = None):
        self.pool, self._colours = pool, colours
        self._norms: dict[str, pd.DataFrame] = {}
        self._spectra: dict[str, pd.DataFrame] = {}
        self._cosines: tuple[tuple[str, ...], pd.DataFrame | None] = ((), None)
        parameters = pool.table.set_index("name")["parameters"].fillna(0)
        self._bytes = {name: 4 * int(n) for name, n in parameters.items()}

    def lacking(self, view: str, names: Sequence[str]) -> tuple[str, ...]:
        """The adapters that must be read before the view of these can be drawn."""
        if view == "map":
            return () if self.pool in _MAPS or len(self.pool) < 2 else self.pool.names
        if view == "cosines":
            known = self.pool in _MAPS or self._cosines[0] == tuple(names) or not 2 <= len(names) <= MOST
            return () if known else tuple(names)
        known = self._norms if view == "norms" else self._spectra
        return tuple(name for name in names[:ROWS] if name not in known)

    def quick(self, names: Sequence[str]) -> bool:
        """Whether so many adapters are read in a moment."""
        return len(names) <= AT_ONCE and sum(self._bytes[name] for name in names) <= QUICK

    def compute(self, view: str, names: Sequence[str], tell: Tell) -> None:
        """Compute what the view lacks; a job of `Work`.

        Raises:
            SelectionError: it was stopped where there is nothing to show of a part.
            AdapterError: files that have changed since.
        """
        if view == "map":
            stack = self.pool.stack(lazy=None if self.pool.held else True)
            _MAPS[self.pool] = Likeness.of(similarity(stack, watch=tell))
        elif view == "cosines":
            self._cosines = tuple(names), similarity(self.pool.stack(names), watch=tell)
        else:
            lacking = self.lacking(view, names)
            for i, name in enumerate(lacking):
                if tell(i, len(lacking), name):
                    return
                if view == "norms":
                    self._norms[name] = norm_profile(self.pool.stack([name]))
                else:
                    self._spectra[name] = singular_values(self.pool.adapter(name))

    def modules(self, names: Sequence[str]) -> list[str]:
        """The modules of which there are singular values."""
        found = [self._spectra[name]["module"].unique() for name in names if name in self._spectra]
        return list(dict.fromkeys(module for each in found for module in each))

    def code(self, view: str, names: Sequence[str], module: str = ALL) -> str:
        """The line of code that computes what the view shows."""
        of = f", {module!r}" if module else ""
        return VIEWS[view].code.format(of if view == "spectra" else f"pool.stack({list(names)!r})")

    def draw(self, view: str, names: Sequence[str], module: str = ALL) -> tuple[Figure | None, str]:
        """The picture, where there is something to see, and what it says in words."""
        if view in ("map", "cosines"):
            return self._map(names) if view == "map" else self._heat(names)
        if not names:
            return None, f"Select an adapter or more to see {'norms' if view == 'norms' else 'singular values'}."
        return self._by_layer(names) if view == "norms" else self._by_place(names, module)

    def _map(self, names: Sequence[str]) -> tuple[Figure | None, str]:
        if len(self.pool) < 2:
            return None, "A map needs two accepted adapters or more."
        likeness = _MAPS[self.pool]
        colours = None if self._colours is None else self._colours.rename(self._colours.name or "score")
        said = f"Similarity of {len(likeness.cosines)} adapters, {len(names)} of them marked. {likeness.said}"
        return pool_map(likeness, names, colours), said

    def _heat(self, names: Sequence[str]) -> tuple[Figure | None, str]:
        if len(names) < 2:
            return None, "Select two adapters or more to see how alike they are."
        if len(names) > MOST:
            many = f"Cosines are drawn for at most {MOST} adapters; {len(names)} are selected."
            return None, f"{many} The map of the pool marks all of them."
        names = list(names)
        matrix = _MAPS[self.pool].cosines.loc[names, names] if self.pool in _MAPS else self._cosines[1]
        said = f"Cosine similarity of {len(names)} adapters. {most_alike(matrix)}"
        return heat_map(matrix), said

    def _by_layer(self, names: Sequence[str]) -> tuple[Figure, str]:
        table = by_layer(pd.concat([self._norms[name] for name in names[:ROWS]]))
        value = "‖ΔW‖ of the layer"
        return profiles(table, across="layer", value=value), f"Norm of the update by layer{_part(names)}."

    def _by_place(self, names: Sequence[str], module: str) -> tuple[Figure | None, str]:
        drawn = {name: spectrum(self._spectra[name], module or None) for name in names[:ROWS]}
        lacking = [name for name, values in drawn.items() if values.empty]
        table = pd.DataFrame(drawn).T.reindex(list(drawn))
        what = f"of {module}" if module else "the median over modules"
        aside = f" {len(lacking)} of them do not have it." if lacking else ""
        said = f"Singular values of the updates, {what}{_part(names)}.{aside}"
        if len(lacking) == len(drawn):
            return None, said
        return profiles(table, across="place", value="singular value of ΔW", log=len(drawn) <= LINES), said


def _part(names: Sequence[str]) -> str:
    return f"; the first {ROWS} of {len(names)} selected adapters" if len(names) > ROWS else ""
