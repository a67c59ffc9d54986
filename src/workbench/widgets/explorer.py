"""Look over a whole pool: a table to sort, filter and select in, pictures of what is selected, and the choice handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets
import pandas as pd

from workbench.pool import Pool
from workbench.screen import printable
from workbench.widgets import table, views
from workbench.widgets.chooser import Selection, checked
from workbench.widgets.parts import Picture, label, sentence
from workbench.widgets.work import Work

__all__ = ["PoolExplorer"]

LISTED = 6  # names in a sentence
SHOWN = 300  # characters of the line of code that are shown; `code` is whole


class PoolExplorer(Selection):
    """A pool's table, linked with pictures of the selected adapters, which "Use these" hands on.

        explorer = PoolExplorer(pool, chosen=["first-two-letters"], scores=rank_adapters(pool, task, base))
        explorer.names, explorer.stack()               # what is selected, however it was selected
        explorer.used                                  # what "Use these" fixed, whatever is selected since
        explorer.code                                  # "pool.stack(['first-two-letters'])"

    Click rows, or move with Tab and the arrow keys and press Enter; sorting and filtering keep what is selected. Refused
    adapters are listed with their reason and cannot be selected. `view` says which picture is drawn: "map" (the pool's
    similarity as heat map and plane), "cosines", "norms" or "spectra" of the selected. Controls: `table`, `view`,
    `module`, `use`, `none`, `compute`.

    With `key`, the selection, what was handed on and the view are remembered in this kernel and taken up by the next
    PoolExplorer of that key (`parts.MEMORY`), which then has precedence over `chosen`.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        chosen: Sequence[str] = (),
        scores: pd.DataFrame | pd.Series | None = None,
        on_use: Callable[[tuple[str, ...]], object] | None = None,
        key: str | None = None,
    ):
        """Build the table and draw the first picture; for that, similarity is computed at once where the pool is small.

        Args:
            chosen: names to begin with.
            scores: accuracy, loss or another number of the adapters, as columns to sort by: a series by name, or a frame
                such as `select.rank_adapters` gives. The map is coloured by the first.
            on_use: called with the names when "Use these" is pressed.
            key: under which to remember the settings in this kernel.

        Raises:
            SelectionError: an unknown name, or scores that are of no adapter.
            AdapterError: a chosen adapter that was refused.
        """
        self.pool, self.on_use, self.key = pool, on_use, key
        self._chosen, self._used = checked(pool, chosen), ()
        self.scores = table.scored(scores, pool)
        view, self._module, dropped = self._remembered()
        frame, numbers = table.cells(pool, self.scores)
        self._rows, self._accepted = tuple(pool.table["name"]), frozenset(pool.names)
        self.table = table.grid(frame, numbers, order=_first(self.scores, frame))
        self._views = views.Views(pool, self.scores.iloc[:, 0] if len(self.scores.columns) else None)
        self._quiet, self._ticket, self._under_way, self._map_error = False, 0, False, None
        self._build(view)
        row = ipywidgets.HBox([self.use, self.none], layout={"flex_flow": "row wrap"})
        tools = ipywidgets.HBox([self.view, self.module, self.compute], layout={"flex_flow": "row wrap"})
        below = [self.summary, self._note, self._code, tools, self._mapping, self._reading]
        super().__init__([self.table, row, *below, self._caption, self._picture, self._line, table.Keys()])
        self.add_class("workbench-explorer")
        self.layout.max_width = "76em"
        self._choose(self._chosen)
        self._note.value = sentence(dropped) if dropped else ""
        self.table.observe(self._picked, "selected_rows")
        self.view.observe(lambda _: self._turned(), "value")
        self.module.observe(self._other_module, "value")
        self.use.on_click(lambda _: self._use())
        self.none.on_click(lambda _: self._choose(set()))
        self.compute.on_click(lambda _: self._map())

    def _build(self, view: str) -> None:
        """The controls below the table."""
        self.use = ipywidgets.Button(
            description="Use these", button_style="primary", tooltip="Hand the selected adapters on: explorer.used"
        )
        self.none = ipywidgets.Button(
            description="Select none", tooltip="Drop every selected adapter, those on other pages too"
        )
        self.compute = ipywidgets.Button(
            description=f"Compute the similarity of {len(self.pool)} adapters",
            tooltip="Reads every adapter, beside the kernel's other work; it can be stopped",
            layout={"width": "auto"},
        )
        self.view = ipywidgets.ToggleButtons(
            options=[(each.title, name) for name, each in views.VIEWS.items()],
            value=view,
            tooltips=[each.says for each in views.VIEWS.values()],
            style={"button_width": "auto"},
        )
        self.module = ipywidgets.Dropdown(
            options=[("all modules, median", views.ALL)],
            description="Module",
            tooltip="The module whose singular values are drawn",
        )
        self.summary, self._note, self._code, self._caption, self._line = (ipywidgets.HTML() for _ in range(5))
        self._picture, self._mapping, self._reading = Picture(), Work(), Work()
        self._picture.layout.margin = "0"  # or it is wider than the panel

    @property
    def used(self) -> tuple[str, ...]:
        """What was selected when "Use these" was last pressed; () before."""
        return self._used

    def _choose(self, names: set[str]) -> None:
        """Select, in the table too, and show it."""
        self._chosen, self._quiet = names, True
        try:
            self.table.selected_rows = [i for i, name in enumerate(self._rows) if name in names]
        finally:
            self._quiet = False
        self._note.value = ""
        self._tell()
        self._draw()

    def _picked(self, change) -> None:
        if self._quiet:
            return
        names = {self._rows[i] for i in change["new"] if i < len(self._rows)}
        refused = sorted(names - self._accepted)
        self._choose(names & self._accepted)
        if refused:
            verdict = self.pool.table.set_index("name").loc[refused[0]]
            why = f"{refused[0]} cannot be selected; the rule {verdict['rule']!r} refused it: {verdict['reason']}"
            more = f" (and {len(refused) - 1} more refused adapters)" if len(refused) > 1 else ""
            self._note.value = sentence(printable(why, 1000) + more, "strong", "alert")

    def _turned(self) -> None:
        self._remember()
        self._draw()

    def _other_module(self, change) -> None:
        if not self._quiet:
            self._module = change["new"]
            self._turned()

    def _use(self) -> None:
        names = self.names
        if not names:
            self._note.value = sentence("Nothing is selected; select a row or more to hand on.", "strong", "alert")
            return
        self._used = names
        self._tell()
        if self.on_use is not None:
            self.attempt(lambda: self.on_use(names), lambda: None)

    def _tell(self) -> None:
        """The sentence and the line of code below the table."""
        self.summary.value = sentence(self._summary())
        self._code.value = sentence(printable(self.code, SHOWN), "code", "note") if self._chosen else ""
        self._remember()

    def _summary(self) -> str:
        names, found = self.names, len(self._rows)
        if not len(self.pool):
            return f"Pool {self.pool.name!r} has no accepted adapter among {found}; pool.table says why."
        few = f": {_listed(names)}" if names else ""
        handed = f" Handed on (explorer.used): {_listed(self._used)}." if self._used else ""
        return f"{len(names)} of {len(self.pool)} adapters selected{few}.{handed}"

    def _draw(self) -> None:
        """Show the view of what is selected; what it needs is read first, beside the kernel's thread where that takes long."""
        self._ticket, view, names = self._ticket + 1, self.view.value, self.names
        self._reading.stop()
        lacking = self._views.lacking(view, names)
        self.module.layout.display = "" if view == "spectra" else "none"
        self.compute.layout.display = "none"
        self._line.value = sentence(printable(self._views.code(view, names, self._module), SHOWN), "code", "note")
        if not lacking or self._views.quick(lacking):
            self.attempt(lambda: self._show(view, names), self._blank)
        elif view == "map":
            self._blank()
            self.told(self._map_error)
            self._wait_for_map()
        else:
            self._blank(f"Reading {len(lacking)} adapters …")
            self._read(view, names, self._ticket)

    def _show(self, view: str, names: Sequence[str]) -> None:
        if self._views.lacking(view, names):
            self._views.compute(view, names, lambda *_: False)
        if view == "spectra":
            self._offer(self._views.modules(names))
        figure, said = self._views.draw(view, names, self._module)
        self._caption.value = sentence(said)
        self._picture.show(figure, said, cut=view == "cosines")

    def _read(self, view: str, names: Sequence[str], ticket: int) -> None:
        def ended(error: Exception | None) -> None:
            if ticket != self._ticket:  # something else is shown by now
                return
            if self._reading.stopped:
                self._caption.value = sentence("Stopped. Select anything, or another picture, to start again.")
            elif error is not None:
                self._blank()
                self.told(error)
            else:
                self.attempt(lambda: self._show(view, names), self._blank)

        self._reading.start(lambda tell: self._views.compute(view, names, tell), ended)

    def _map(self) -> None:
        """Compute the pool's similarity beside the kernel's thread; other pictures can be looked at meanwhile."""

        def ended(error: Exception | None) -> None:
            self._under_way, self._map_error = False, None if self._mapping.stopped else error
            if self.view.value == "map":
                self._draw()

        self._under_way, self._map_error = True, None
        self._mapping.start(lambda tell: self._views.compute("map", (), tell), ended)
        self._draw()

    def _wait_for_map(self) -> None:
        running, n = self._under_way, len(self.pool)
        self.compute.layout.display = "none" if running else ""
        said = (
            f"The similarity of {n} adapters is being computed."
            if running
            else f"Similarity of {n} adapters is computed when you ask for it."
        )
        self._caption.value = sentence(said)

    def _offer(self, modules: Sequence[str]) -> None:
        """Fill the list of modules; what that does to its value is no choice of anyone's."""
        options = [("all modules, median", views.ALL), *((label(module, 60), module) for module in modules)]
        self._quiet = True
        try:
            if tuple(options) != self.module.options:
                self.module.options = options
            self._module = self._module if self._module in modules else views.ALL
            self.module.value = self._module
        finally:
            self._quiet = False

    def _blank(self, said: str = "") -> None:
        self._caption.value = sentence(said) if said else ""
        self._picture.show(None)

    def _remembered(self) -> tuple[str, str, str]:
        """The view and the module to begin with, and what is said of settings that do not fit any more."""
        kept = self.recall()
        if not kept:
            return "map", views.ALL, ""
        gone = [name for name in dict.fromkeys((*kept["names"], *kept["used"])) if name not in self.pool.names]
        self._chosen = set(kept["names"]) - set(gone)
        self._used = tuple(name for name in kept["used"] if name not in gone)
        said = f"Selected before, but not accepted in this pool: {_listed(gone)}." if gone else ""
        return kept["view"], kept["module"], said

    def _remember(self) -> None:
        settings = {"names": self.names, "used": self._used, "view": self.view.value, "module": self._module}
        self.remember(settings)


def _first(scores: pd.DataFrame, frame: pd.DataFrame) -> tuple[str, str]:
    """The column to sort by at first, and how: the best score on top, else by name."""
    for column in scores:
        if printable(str(column), 32) in frame:
            return printable(str(column), 32), "asc" if column == "loss" else "desc"
    return "name", "asc"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(printable(name, 60) for name in names[:LISTED]) + more
