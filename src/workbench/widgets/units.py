"""Look at the units of adapters: a map of a module's, their clusters at any k, and what k does to a LEGO merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets
import numpy as np
import pandas as pd

from workbench.base import Base
from workbench.canonical import CANONICAL
from workbench.clusters import cluster_units, members, purity, sharing, unit_map
from workbench.errors import MergeError, SelectionError
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.tasks import Task
from workbench.widgets.merge_curve import MergeCurve
from workbench.widgets.parts import MEMORY, Panel, sentence
from workbench.widgets.unit_map import UnitMap, by_number, by_value
from workbench.widgets.unit_tables import (
    layered,
    member_rows,
    picked_rows,
    said_of_clusters,
    said_of_unit,
    told_apart,
)
from workbench.widgets.work import Tell, Work

__all__ = ["UnitExplorer"]

POINTS = 15_000  # on the map
SOON = 2000  # units that are clustered at once; more in the background
LARGEST_K = 256
LABELS = ("operation", "format", "domain")
NO_CLUSTER = -1


@dataclass(frozen=True)
class _View:
    """What is known of one module under one setting: a row per unit, and how clusters compare with chance."""

    module: str
    table: pd.DataFrame
    shared: pd.DataFrame
    told: dict[str, pd.DataFrame]


class UnitExplorer(Panel):
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
        self._pool, self.seed, self._key = isinstance(source, Pool), seed, key
        self._modules = layered(self.stack.outline)
        self._labels = _labels(source, labels, self.stack.names)
        for name in merged or ():
            self.stack.index(name)
        module = next(iter(self.stack.outline)) if module is None else module
        self._check(module, canonical, k)
        if tasks is not None and not isinstance(tasks, Mapping):
            tasks = {task.name: task for task in tasks}
        self._view: _View | None = None
        self._rows = np.arange(0)
        self._known: dict[tuple, pd.DataFrame] = {}
        self._setting = False
        self._controls(canonical, k)
        self.curve = MergeCurve(
            self.stack, base, tasks, merged, self._options, self._changed, ks=ks, n_test=n_test, seed=seed
        )
        self._place(module)
        self.map, self.work = UnitMap(), Work()
        self._summary, self._clusters, self._picked = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._hovered, self._code, self._note = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__(self._arranged())
        self.layout.max_width = "62em"
        self._note.value = self._remembered()
        self._listen()
        self._refresh()

    @property
    def module(self) -> str:
        """The picked module."""
        return self._modules[self.layer.value][self.projection.value]

    @property
    def table(self) -> pd.DataFrame:
        """A row per unit of the module shown: module, adapter, unit, cluster, norm, x, y, and the labels."""
        return pd.DataFrame() if self._view is None else self._view.table

    @property
    def clusters(self) -> pd.DataFrame:
        """A row per cluster of the module shown (`workbench.clusters.members`), with its purity by the label picked."""
        if self._view is None:
            return pd.DataFrame()
        return members(self.table, self._labels[self.label.value].to_dict() if self.label.value else None)

    @property
    def selected(self) -> pd.DataFrame:
        """The rows of `table` that are lassoed, or picked by their cluster."""
        return self.table.iloc[self._rows[list(self.map.picked)]] if self.map.picked else self.table.iloc[:0]

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

    def _controls(self, canonical: str, k: int) -> None:
        style = {"description_width": "8em"}
        wide = {"width": "20em"}

        def menu(options, value, description, tooltip):
            shape = {"style": style, "layout": wide}
            return ipywidgets.Dropdown(options=options, value=value, description=description, tooltip=tooltip, **shape)

        self.layer = menu(list(self._modules), next(iter(self._modules)), "Layer", "The layer whose units are shown")
        self.projection = menu([], None, "Projection", "The projection of that layer")
        self.form = menu(CANONICAL, canonical, "Canonical form", "The form of the units that k-means sees")
        largest = min(LARGEST_K, max(map(len, self.stack.outline.values())))
        self.k = ipywidgets.IntSlider(
            min(k, largest),
            min=1,
            max=largest,
            description="k",
            tooltip="Clusters of the module, and units of the merge in each module; clustered when released",
            continuous_update=False,
            style=style,
            layout={"width": "40em"},
        )
        columns = list(self._labels)
        self.colour = menu(["adapter", "cluster", *columns, "norm"], "cluster", "Colour", "What a point's colour tells")
        self.label = menu(
            [("none", ""), *((name, name) for name in columns)],
            columns[0] if columns else "",
            "Purity by",
            "The label that clusters are compared with",
        )
        self.cluster = menu(
            [("none", NO_CLUSTER)], NO_CLUSTER, "Pick cluster", "Pick the units of a cluster on the map"
        )
        self.parameter = ipywidgets.Checkbox(
            True,
            description="Parameter reweighting",
            tooltip="Rescale each centroid to its cluster's mean norm",
            indent=False,
        )
        self.output = ipywidgets.Checkbox(
            True, description="Output reweighting", tooltip="Multiply the merge by √(r / k)", indent=False
        )

    def _arranged(self) -> list[ipywidgets.Widget]:
        wrap = {"flex_flow": "row wrap", "width": "100%"}
        pickers = ipywidgets.HBox([self.layer, self.projection, self.form], layout=wrap)
        colours = ipywidgets.HBox([self.colour, self.label, self.cluster], layout=wrap)
        left = ipywidgets.VBox([self.map, self._hovered], layout={"flex": "1 1 34em", "min_width": "20em"})
        right = ipywidgets.VBox([self.map.legend, self._picked], layout={"flex": "0 1 22em", "min_width": "14em"})
        merging = [ipywidgets.HTML("<b>The merge</b>"), ipywidgets.HBox([self.parameter, self.output]), self.curve]
        field = ipywidgets.HBox([left, right], layout={"width": "100%"})
        return [
            pickers,
            self.k,
            colours,
            self.work,
            self._note,
            field,
            self._summary,
            self._clusters,
            *merging,
            self._code,
        ]

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

    def _check(self, module: str, canonical: str, k: int) -> None:
        if module not in self.stack.outline:
            raise MergeError(f"no module {module!r} in this stack; it has {', '.join(list(self.stack.outline)[:3])}, …")
        if canonical not in CANONICAL:
            raise MergeError(f"canonical form {canonical!r} is unknown; choose one of {', '.join(CANONICAL)}")
        if not 1 <= k <= LARGEST_K:
            raise MergeError(f"k is {k!r}, expected 1 … {LARGEST_K}, the slider's range")

    def _place(self, module: str) -> None:
        """Set the pickers to a module."""
        layer, name = next((la, n) for la, found in self._modules.items() for n, m in found.items() if m == module)
        self._setting = True
        self.layer.value = layer
        self.projection.options = list(self._modules[layer])
        self.projection.value = name
        self._setting = False

    def _relayered(self, _) -> None:
        """A layer keeps the projection where it has it."""
        if self._setting:
            return
        held, names = self.projection.value, self._modules[self.layer.value]
        self._place(names.get(held) or next(iter(names.values())))
        self._refresh()

    def _options(self) -> dict:
        """LEGO's options but k, as the controls stand."""
        options = {"canonical": self.form.value, "seed": self.seed}
        if not self.parameter.value:
            options["parameter_reweighting"] = False
        if not self.output.value:
            options["output_reweighting"] = False
        return options

    def _refresh(self) -> None:
        """Cluster what the controls say: at once where it is quick, else in the background."""
        self._changed()
        module, form, k = self.module, self.form.value, self.k.value
        if len(self.stack.outline[module]) <= SOON:
            self.work.stop()
            self.attempt(lambda: self._show(self._computed(module, form, k)), self._blank)
            return

        def job(tell: Tell) -> None:
            if (found := self._computed(module, form, k, tell)) is not None:
                self._show(found)

        self._blank()
        self.told(None)
        self.work.start(job, self.told)

    def _computed(self, module: str, form: str, k: int, tell: Tell = lambda *_: False) -> _View | None:
        """The map, which is made once, the clusters, and what chance would give; None where `tell` says stop."""
        if tell(0, 3, f"a map of {module}"):
            return None
        if (module, form) not in self._known:
            self._known[module, form] = unit_map(self.stack, module, canonical=form, seed=self.seed)
            if len(self._known) > 8:
                self._known.pop(next(iter(self._known)))
        flat = self._known[module, form]
        if tell(1, 3, f"{k} clusters"):
            return None
        found = cluster_units(self.stack, k, canonical=form, modules=[module], seed=self.seed)
        if tell(2, 3, "shuffled labels"):
            return None
        told = {name: purity(found, self._labels[name].to_dict(), seed=self.seed) for name in self._labels}
        table = found.assign(x=flat["x"], y=flat["y"]).join(self._labels, on="adapter")
        return None if tell(3, 3, "the map") else _View(module, table, sharing(found), told)

    def _show(self, view: _View) -> None:
        old, self._view = self._view, view
        units = len(view.table)
        self._rows = np.arange(units)
        if units > POINTS:
            self._rows = np.sort(np.random.default_rng(self.seed).permutation(units)[:POINTS])
        same = old is not None and len(old.table) == units and old.table[["x", "y"]].equals(view.table[["x", "y"]])
        if same and old.module == view.module and self.map.scatter is not None:
            self.map.recolour(self._colours())
            self.map.pick(self.map.picked)
        else:
            self.map.show(view.table.iloc[self._rows], self._colours())
        self._setting = True
        labels = view.table["cluster"].value_counts()
        self.cluster.options = [("none", NO_CLUSTER), *((f"{c} ({n} units)", int(c)) for c, n in labels.items())]
        self.cluster.value = NO_CLUSTER
        self._setting = False
        self._tell()

    def _blank(self) -> None:
        """Nothing of before is true any more."""
        self._view, self._rows = None, np.arange(0)
        self.map.pick(())
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
        self._summary.value = "<br>".join(sentence(line) for line in [self._what(), *self._said()])
        self._clusters.value = member_rows(self.clusters)
        self._tell_picked()

    def _tell_picked(self) -> None:
        self._picked.value = picked_rows(self.selected, list(self._labels))

    def _tell_hovered(self) -> None:
        row = self.map.hovered
        known = 0 <= row < len(self._rows)
        self._hovered.value = sentence(said_of_unit(self.table.iloc[self._rows[row]], self._labels)) if known else ""

    def _what(self) -> str:
        units = self.stack.outline[self.module]
        owners = int((units.ranks(len(self.stack)) > 0).sum())
        part = f"; {POINTS:,} of them, drawn at random, are on the map" if len(units) > POINTS else ""
        return f"{self.module}: {len(units):,} units of {owners:,} adapters{part}, {self.form.value} form, k = {self.k.value}"

    def _said(self) -> list[str]:
        lines = [said_of_clusters(self._view.shared)]
        return lines + [told_apart(self._view.told[self.label.value], self.label.value)] * bool(self.label.value)

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
        if self._key is not None:
            MEMORY[type(self).__name__, self._key] = {"module": self.module} | {
                name: control.value for name, control in self._kept().items()
            }

    def _kept(self) -> dict[str, ipywidgets.Widget]:
        return {
            "form": self.form,
            "k": self.k,
            "colour": self.colour,
            "label": self.label,
            "parameter": self.parameter,
            "output": self.output,
            "merged": self.curve.chosen,
            "ks": self.curve.ks,
        }

    def _remembered(self) -> str:
        """Take up what is kept under the key; a sentence on what of it does not fit any more."""
        kept = dict(MEMORY.get((type(self).__name__, self._key), {})) if self._key is not None else {}
        lost = []
        if (module := kept.pop("module", None)) is not None:
            if module in self.stack.outline:
                self._place(module)
            else:
                lost.append(f"module {module}")
        if "merged" in kept:
            lost += [f"adapter {name}" for name in kept["merged"] if name not in self.stack.names]
            kept["merged"] = tuple(name for name in kept["merged"] if name in self.stack.names)
        for name, value in kept.items():
            control = self._kept()[name]
            if name == "k" and value > control.max:
                lost.append(f"k = {value}")
                continue
            try:
                control.value = value
            except Exception:  # traitlets says in many ways that a value is not among the options
                lost.append(f"{name} {value}")
        return sentence(f"No longer here, and left out: {', '.join(lost)}.") if lost else ""


def _labels(source: Pool | Stack, given: pd.DataFrame | None, names: Sequence[str]) -> pd.DataFrame:
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
