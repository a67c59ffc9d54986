"""Choose adapters of a pool by hand, seeing how alike they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from workbench.errors import SelectionError
from workbench.pool import Pool
from workbench.screen import printable
from workbench.similarity import similarity
from workbench.stack import Stack
from workbench.widgets.maps import most_alike
from workbench.widgets.parts import Panel, Picture, sentence

__all__ = ["AdapterChooser", "Selection", "checked", "heat_map"]

MOST = 20  # adapters in the picture


class Selection(Panel):
    """Adapters of a `pool` that someone has chosen; how, and what is shown of it, is another's to say."""

    pool: Pool
    _chosen: set[str]

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen adapters, in the pool's order."""
        return tuple(name for name in self.pool.names if name in self._chosen)

    @names.setter
    def names(self, names: Sequence[str]) -> None:
        self._choose(checked(self.pool, names))

    @property
    def code(self) -> str:
        """The line of code that makes the same stack, where the pool is called `pool`."""
        return f"pool.stack({list(self.names)!r})"

    def stack(self) -> Stack:
        """The chosen adapters as a stack.

        Raises:
            SelectionError: nothing is chosen.
        """
        return self.pool.stack(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pool {self.pool.name!r}): {self._summary()}\n{self.code}"

    def _choose(self, names: set[str]) -> None:
        """Take this choice and show it."""
        raise NotImplementedError

    def _summary(self) -> str:
        """The choice in a sentence."""
        raise NotImplementedError


class AdapterChooser(Selection):
    """A list of a pool's accepted adapters to choose from, with a filter, a summary and their cosine similarity.

        chooser = AdapterChooser(pool, chosen=["first-two-letters", "last-two-letters"])
        chooser.stack()                                # the choice, however it was made
        chooser.code                                   # "pool.stack(['first-two-letters', 'last-two-letters'])"

    Filtering changes what is listed, not what is chosen. `words`, `rank_from`, `rank_to` and `listed` are its controls.
    """

    def __init__(self, pool: Pool, *, chosen: Sequence[str] = ()):
        """Build the controls and draw the first choice.

        Args:
            chosen: names to begin with.

        Raises:
            SelectionError: an unknown name.
            AdapterError: an adapter that was refused, or whose files have changed since.
        """
        self.pool = pool
        self._chosen = checked(pool, chosen)
        self._told: list[Callable[[], None]] = []
        facts = pool.table[pool.table["accepted"]].set_index("name")
        self._ranks = {name: int(rank) for name, rank in facts["rank"].items()}
        self._units = {name: round(n) for name, n in (facts["mean_rank"] * facts["modules"].astype(float)).items()}
        texts = zip(facts.index, facts["operation"], facts["format"], facts["targets"], strict=True)
        self._texts = {text[0]: " ".join(text).casefold() for text in texts}
        low, high = min(self._ranks.values(), default=1), max(self._ranks.values(), default=1)
        wide, style = {"width": "98%"}, {"description_width": "6em"}
        self.words = ipywidgets.Text(
            description="Filter",
            placeholder="words of a name, operation, format or target",
            tooltip="List adapters whose name, operation, format and targets together hold every one of these words",
            layout=wide,
            style=style,
        )
        limits = {"min": low, "max": high, "style": style, "layout": {"width": "12em"}}
        self.rank_from = ipywidgets.BoundedIntText(
            low, description="Rank from", tooltip="List adapters of at least this rank", **limits
        )
        self.rank_to = ipywidgets.BoundedIntText(
            high, description="to", tooltip="List adapters of at most this rank", **limits
        )
        self.add = ipywidgets.Button(description="Choose all listed", tooltip="Add every listed adapter to the choice")
        self.clear = ipywidgets.Button(description="Choose none", tooltip="Empty the choice, hidden adapters included")
        self.listed = ipywidgets.SelectMultiple(
            description="Adapters",
            tooltip="The adapters that pass the filter; hold Ctrl (or ⌘) or Shift to choose several",
            rows=10,
            layout=wide,
            style=style,
        )
        self.summary, self._code = ipywidgets.HTML(), ipywidgets.HTML()
        self._picture, self._caption = Picture(), ipywidgets.HTML()
        row = ipywidgets.HBox([self.rank_from, self.rank_to, self.add, self.clear], layout={"flex_flow": "row wrap"})
        super().__init__(
            [self.words, row, self.listed, self.summary, self._code, self._caption, self._picture],
        )
        self._list()
        self._update()
        for control in (self.words, self.rank_from, self.rank_to):
            control.observe(self._filtered, "value")
        self.listed.observe(self._picked, "value")
        self.add.on_click(lambda _: self._choose(self._chosen | set(self.shown)))
        self.clear.on_click(lambda _: self._choose(set()))

    @property
    def shown(self) -> tuple[str, ...]:
        """The adapters that pass the filter, chosen or not."""
        words, low, high = self.words.value.casefold().split(), self.rank_from.value, self.rank_to.value
        return tuple(
            name
            for name in self.pool.names
            if low <= self._ranks[name] <= high and all(word in self._texts[name] for word in words)
        )

    def on_choice(self, call: Callable[[], None]) -> None:
        """Have a function called after every change of the choice."""
        self._told.append(call)

    def _choose(self, names: set[str]) -> None:
        self._chosen = names
        self._list()
        self._changed()

    def _filtered(self, _) -> None:
        self._list()
        self.summary.value = sentence(self._summary())

    def _picked(self, change) -> None:
        if not self._listing:
            listed = {name for _, name in self.listed.options}
            self._chosen = (self._chosen - listed) | set(change["new"])
            self._changed()

    def _changed(self) -> None:
        self.attempt(self._update, self._blank)
        for call in self._told:
            call()

    def _list(self) -> None:
        """Fill the list; what that does to its value is no choice of anyone's."""
        self._listing = True
        try:
            options = [(f"{printable(name, 100)} (rank {self._ranks[name]})", name) for name in self.shown]
            if tuple(options) != self.listed.options:
                self.listed.options = options
            self.listed.value = tuple(name for _, name in options if name in self._chosen)
        finally:
            self._listing = False

    def _update(self) -> None:
        names = self.names
        self.summary.value = sentence(self._summary())
        self._code.value = sentence(self.code, "code", "note") if names else ""
        if not 2 <= len(names) <= MOST:
            few = "Choose two adapters or more to see how alike they are."
            many = f"Similarity is drawn for at most {MOST} adapters; {len(names)} are chosen."
            self._caption.value = sentence(few if len(names) < 2 else many)
            self._picture.show(None)
            return
        cosines = similarity(self.stack())
        said = most_alike(cosines)
        self._caption.value = sentence(said)
        self._picture.show(heat_map(cosines), f"Cosine similarity of {len(names)} adapters. {said}")

    def _blank(self) -> None:
        self._caption.value = ""
        self._picture.show(None)

    def _summary(self) -> str:
        names, shown = self.names, self.shown
        if not self.pool.names:
            return f"Pool {self.pool.name!r} has no accepted adapter; pool.table says why."
        listed = "" if len(shown) == len(self.pool) else f" {len(shown)} pass the filter."
        if not names:
            return f"None of {len(self.pool)} adapters chosen.{listed}"
        hidden = len(set(names) - set(shown))
        aside = f" ({hidden} of them hidden by the filter)" if hidden else ""
        ranks = sorted(Counter(self._ranks[name] for name in names).items())
        said = ", ".join(f"{rank} (×{n})" if n > 1 else str(rank) for rank, n in ranks)
        units = sum(self._units[name] for name in names)
        return f"{len(names)} of {len(self.pool)} adapters chosen{aside}; {units:,} units; ranks {said}.{listed}"


def heat_map(cosines: pd.DataFrame) -> Figure:
    """A similarity matrix as a picture; rows have names, columns their numbers."""
    n, values = len(cosines), cosines.to_numpy()
    side = 1.2 + 0.26 * n
    figure = Figure(figsize=(side * 1.2, side))
    ax = figure.add_subplot()
    image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    ax.grid(visible=False)
    rows = [f"{printable(name, 40)}  {i}" for i, name in enumerate(cosines.index, 1)]
    ax.set_yticks(range(n), rows, parse_math=False)
    ax.set_xticks(range(n), [str(i) for i in range(1, n + 1)])
    if n <= 8:
        for i in range(n):
            for j in range(n):
                value = round(float(values[i, j]), 2) + 0.0  # no −0.00
                ax.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    size=7,
                    color="white" if abs(value) > 0.6 else "black",
                )
    figure.colorbar(image, ax=ax, label="cosine of the updates ΔW", fraction=0.046)
    return figure


def checked(pool: Pool, names: Sequence[str]) -> set[str]:
    """Names as a set, all of them of accepted adapters; raises what `Pool.adapter` does."""
    if isinstance(names, str):
        raise SelectionError(f"expected a sequence of names, got the single name {names!r}; write [{names!r}]")
    for name in names:
        if name not in pool.names:
            pool.adapter(name)  # says which names are near, or why it was refused
    return set(names)
