"""Look at the units of adapters: a map of a module's, their clusters at any k, and what k does to a LEGO merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np
import pandas as pd

from workbench.base import Base
from workbench.clusters import members
from workbench.errors import SelectionError
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.tasks import Task
from workbench.widgets.merge_curve import MergeCurve
from workbench.widgets.parts import sentence
from workbench.widgets.unit_controls import NO_CLUSTER, UnitControls
from workbench.widgets.unit_map import UnitMap, by_number, by_value
from workbench.widgets.unit_tables import (
    member_rows,
    picked_rows,
    said_of_clusters,
    said_of_unit,
    told_apart,
)
from workbench.widgets.unit_views import View, Views, labelled
from workbench.widgets.work import Tell, Work

__all__ = ["UnitExplorer"]

POINTS = 15_000  # on the map
SOON = 2000  # units that are clustered at once; more in the background


class UnitExplorer(UnitControls):
    """Units of a module on a map, coloured by adapter, cluster, label or norm; clusters by LEGO's k-means; merges by k.

        units = UnitExplorer(pool, base=base, merged=["first-two-letters", "last-two-letters"])
        units.k.value = 32                             # what moving the slider does
        units.clusters                                 # a row per cluster; units.table a row per unit
        units.map.pick([0, 1, 2])                      # what the lasso does; then units.selected
        units.code                                     # the lines that cluster and merge alike

    `layer`, `projection`, `form`, `k`, `colour`, `label`, `parameter`, `output` and `curve` are its controls. Up to 2,000
    units are clustered at once, more beside the kernel's thread (`work`). The curve of accuracies starts by its button only.
    """

    def __init__(
        self,
        source: Pool | Stack,
        *,
        labels: pd.DataFrame | None = None,
        base: Base | None = None,
        tasks: Mapping[str, Task] | Sequence[Task] | None = None,
        merged: Sequence[str] | None = None,
        module: str | None = None,
        k: int = 8,
        canonical: str = "raw",
        ks: str = "2, 8, 16, 32",
        n_test: int = 30,
        seed: int = 0,
        key: str | None = None,
    ):
        """Map and cluster the first module; no merge is computed.

        Args:
            source: adapters; a pool's all.
            labels: a row per adapter (index: names), a column per label; a pool's operation, format and domain are found.
            base: what merges are scored on; without it there is no curve.
            tasks: to score merges on, by the name of the adapter that is each one's own; None finds those of bundled
                adapters, with n_test test examples.
            merged: adapters to merge at first; None takes all of at most 10.
            module, k, canonical, ks: what to begin with (module: the first).
            seed: of k-means, shuffled labels and random adapters.
            key: settings are kept under this name, and taken up by the next explorer made with it in this kernel; given
                values then count only where nothing is kept.

        Raises:
            SelectionError: an unknown adapter among `merged`.
            MergeError: an unknown module or canonical form, or a k outside 1 … 256.
        """
        self.stack = source.stack() if isinstance(source, Pool) else source
        self._pool, self.seed, self.key = isinstance(source, Pool), seed, key
        self.views = Views(self.stack, labelled(source, labels, self.stack.names), seed)
        for name in merged or ():
            self.stack.index(name)
        module = next(iter(self.stack.outline)) if module is None else module
        self._check(module, canonical, k)
        if tasks is not None and not isinstance(tasks, Mapping):
            tasks = {task.name: task for task in tasks}
        self._view: View | None = None
        self._rows, self._drawn = np.arange(0), None  # of the table, on the map; the module and form drawn
        self._controls(list(self.views.labels), canonical, k)
        self.curve = MergeCurve(
            self.stack, base, tasks, merged, self._options, self._changed, ks=ks, n_test=n_test, seed=seed
        )
        self._place(module)
        self.map, self.work = UnitMap(), Work()
        self._summary, self._clusters, self._picked = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._hovered, self._code, self._note = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        above, below = self._arranged()
        super().__init__([*above, *below])
        self.children = [*above, self._message, *below]
        self.layout.max_width = "74em"
        self._note.value = self._remembered()
        self._listen()
        self._refresh()

    @property
    def table(self) -> pd.DataFrame:
        """A row per unit of the module shown: module, adapter, unit, cluster, norm, x, y, and the labels."""
        return pd.DataFrame() if self._view is None else self._view.table

    @property
    def clusters(self) -> pd.DataFrame:
        """A row per cluster of the module shown (`workbench.clusters.members`), with its purity by the label picked."""
        if self._view is None:
            return pd.DataFrame()
        return members(self.table, self.views.labels[self.label.value].to_dict() if self.label.value else None)

    @property
    def selected(self) -> pd.DataFrame:
        """The rows of `table` that are lassoed, or picked by their cluster."""
        if self._view is None or not self.map.picked:
            return self.table.iloc[:0]
        return self.table.iloc[self._rows[list(self.map.picked)]]

    @property
    def code(self) -> str:
        """The lines that do the same, where the stack is called `stack` (and base and tasks have these names)."""
        form = "" if self.form.value == "raw" else f", canonical={self.form.value!r}"
        options = "".join(f", {name}={value!r}" for name, value in self._options().items())
        lines = ["stack = pool.stack()"] * self._pool
        lines.append(f"cluster_units(stack, {self.k.value}{form}, modules=[{self.module!r}], seed={self.seed})")
        if self.curve.names:
            lines.append(f'wb.merge({self.curve.merged}, "lego", k={self.k.value}{options})')
        if self.curve.names and self.curve.base is not None:
            lines.append(self.curve.code)
        return "\n".join(line for line in lines if line)

    def __repr__(self) -> str:
        said = [] if self._view is None else self._said()
        failed = [f"could not be computed: {self.error}"] if self.error else []
        return "\n".join([f"UnitExplorer: {self._what()}", *said, *failed, self.code])

    def _arranged(self) -> tuple[list[ipywidgets.Widget], list[ipywidgets.Widget]]:
        """What stands above and below the message of what went wrong."""
        wrap = {"flex_flow": "row wrap", "width": "100%"}
        pickers = ipywidgets.HBox([self.layer, self.projection, self.form], layout=wrap)
        colours = ipywidgets.HBox([self.colour, self.label, self.cluster], layout=wrap)
        left = ipywidgets.VBox([self.map, self._hovered], layout={"flex": "1 1 34em", "min_width": "20em"})
        right = ipywidgets.VBox([self.map.legend], layout={"flex": "0 1 20em", "min_width": "12em"})
        merging = [ipywidgets.HTML("<b>The merge</b>"), ipywidgets.HBox([self.parameter, self.output]), self.curve]
        field = ipywidgets.HBox([left, right], layout={"width": "100%"})
        above = [pickers, self.k, colours, self.work, self._note]
        return above, [field, self._picked, self._summary, self._clusters, *merging, self._code]

    def _listen(self) -> None:
        self.layer.observe(self._relayered, "value")
        for control in (self.projection, self.form, self.k):
            control.observe(lambda _: None if self._setting else self._refresh(), "value")
        self.colour.observe(lambda _: self._retold(colour=True), "value")
        self.label.observe(lambda _: self._retold(colour=False), "value")
        self.cluster.observe(self._cluster_picked, "value")
        for control in (self.parameter, self.output):
            control.observe(lambda _: self._changed(), "value")
        self.map.observe(lambda _: self._tell_picked(), "picked")
        self.map.observe(lambda _: self._tell_hovered(), "hovered")
        self.curve.take.on_click(lambda _: self._take())

    def _relayered(self, _) -> None:
        """A layer keeps the projection where it has it."""
        if self._setting:
            return
        held, names = self.projection.value, self._modules[self.layer.value]
        self._place(names.get(held) or next(iter(names.values())))
        self._refresh()

    def _refresh(self) -> None:
        """Cluster what the controls say: at once where it is quick, else in the background."""
        self._changed()
        module, form, k = self.module, self.form.value, self.k.value
        if len(self.stack.outline[module]) <= SOON:
            self.work.stop()
            self.attempt(lambda: self._show(self.views.view(module, form, k)), self._blank)
            return

        def job(tell: Tell) -> None:
            if (found := self.views.view(module, form, k, tell)) is not None:
                self._show(found)

        self._blank()
        self.told(None)
        self.work.start(job, self._ended)

    def _ended(self, error: Exception | None) -> None:
        self.told(error)
        if error is None and self.work.stopped:
            self._summary.value = sentence("Stopped. Change a setting to have it computed.")

    def _show(self, view: View) -> None:
        if (view.module, view.form, view.k) != (self.module, self.form.value, self.k.value):
            return  # made for settings that are no more
        units = len(view.table)
        rows = np.arange(units)
        if units > POINTS:
            rows = np.sort(np.random.default_rng(self.seed).permutation(units)[:POINTS])
        self._rows, self._view = rows, view
        if self._drawn == (view.module, view.form):
            self.map.recolour(self._colours())
        else:
            self.map.show(view.table.iloc[rows], self._colours())
            self._drawn = (view.module, view.form)
        self.map.layout.visibility = "visible"
        self._setting = True
        labels = view.table["cluster"].value_counts()
        self.cluster.options = [("none", NO_CLUSTER), *((f"{c} ({n} units)", int(c)) for c, n in labels.items())]
        self.cluster.value = NO_CLUSTER
        self._setting = False
        self._tell()

    def _blank(self) -> None:
        """Nothing of before is true any more; the map is kept for another k, but not seen."""
        self._view, self.map.layout.visibility = None, "hidden"
        for text in (self._summary, self._clusters, self._picked, self._hovered, self.map.legend):
            text.value = ""

    def _colours(self):
        by = self.colour.value
        found = by_number(self.table["norm"]) if by == "norm" else by_value(self.table[by])
        return found.of(self._rows)

    def _retold(self, colour: bool) -> None:
        self._changed()
        if self._view is not None:
            self.attempt(lambda: self.map.recolour(self._colours()) if colour else self._tell(), lambda: None)

    def _tell(self) -> None:
        lines = "".join(sentence(line, "div") for line in [self._what(), *self._said()])
        self._summary.value = f"<div style='line-height:1.4'>{lines}</div>"
        self._clusters.value = member_rows(self.clusters)
        self._tell_picked()

    def _tell_picked(self) -> None:
        self._picked.value = picked_rows(self.selected, list(self.views.labels))

    def _tell_hovered(self) -> None:
        row = self.map.hovered
        known = self._view is not None and 0 <= row < len(self._rows)
        self._hovered.value = (
            sentence(said_of_unit(self.table.iloc[self._rows[row]], self.views.labels)) if known else ""
        )

    def _what(self) -> str:
        units = self.stack.outline[self.module]
        owners = int((units.ranks(len(self.stack)) > 0).sum())
        part = f"; {POINTS:,} of them, drawn at random, are on the map" if len(units) > POINTS else ""
        return f"{self.module}: {len(units):,} units of {owners:,} adapter{'s' * (owners != 1)}{part}, {self.form.value} form, k = {self.k.value}"

    def _said(self) -> list[str]:
        view, label = self._view, self.label.value
        return [said_of_clusters(view.shared), *([told_apart(view.told[label], label)] if label else [])]

    def _cluster_picked(self, _) -> None:
        if not self._setting and self._view is not None:
            own = self.table["cluster"].to_numpy()[self._rows] == self.cluster.value
            self.map.pick(np.flatnonzero(own))

    def _take(self) -> None:
        if self.selected.empty:
            self.curve.told(SelectionError("no units are picked; lasso some on the map, or pick a cluster"))
            return
        self.curve.told(None)
        self.curve.chosen.value = tuple(dict.fromkeys(self.selected["adapter"]))

    def _changed(self) -> None:
        """The settings have changed: the code follows, and what is kept of them."""
        self._code.value = sentence(self.code, "pre", "note").replace("<pre ", "<pre style='white-space:pre-wrap' ", 1)
        self._keep()
