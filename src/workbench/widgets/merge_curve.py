"""A merge's accuracy as the number of its units changes, beside its controls; computed when a button asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from workbench.base import Base
from workbench.errors import MergeError, SelectionError
from workbench.screen import printable
from workbench.stack import Stack
from workbench.tasks import Task
from workbench.widgets.parts import Panel, Picture, sentence, turn
from workbench.widgets.unit_tables import scrolling
from workbench.widgets.work import Tell, Work

__all__ = ["MergeCurve", "accuracy_curve", "summary"]

FEW = 10  # adapters that are chosen without being named
KS = "2, 8, 16, 32"
LEGO, RANDOM = "LEGO merge", "random adapters, merged alike"


class MergeCurve(Panel):
    """Adapters to merge, numbers of clusters to try, and the accuracy of each merge on the adapters' tasks.

        curve.chosen.value, curve.ks.value = ("first-two-letters", "last-two-letters"), "4, 16"
        curve.start.click(); curve.work.wait()
        curve.table                                   # rows of workbench.multitask.multitask, as far as they have come

    Each k is one call of `multitask`: the merge, its random control, the base alone, each adapter on its own task.
    """

    def __init__(
        self,
        stack: Stack,
        base: Base | None,
        tasks: Mapping[str, Task] | None,
        merged: Sequence[str] | None,
        settings: Callable[[], dict],
        changed: Callable[[], None],
        *,
        ks: str = KS,
        n_test: int = 30,
        seed: int = 0,
    ):
        """Nothing is computed.

        Args:
            tasks: adapter's name (or another name) → task; None finds those of bundled adapters.
            merged: names to begin with; None takes a stack of at most 10 whole.
            settings: LEGO's options without k, when they are needed.
            changed: called when the choice or the ks have changed.
        """
        self.stack, self.base, self.n_test, self.seed = stack, base, n_test, seed
        self.tasks, self._settings = None if tasks is None else dict(tasks), settings
        self.table, self._about = pd.DataFrame(), ""
        wide, style = {"width": "98%"}, {"description_width": "6em"}
        names = list(stack.names) if merged is None and len(stack) <= FEW else list(merged or ())
        self.chosen = ipywidgets.SelectMultiple(
            options=[(printable(name, 100), name) for name in stack.names],
            value=names,
            description="Merge",
            tooltip="The adapters to merge; hold Ctrl (or ⌘) or Shift to choose several",
            rows=5,
            layout=wide,
            style=style,
        )
        self.ks = ipywidgets.Text(
            ks,
            description="Values of k",
            tooltip="Clusters per module to try: whole numbers, one merge each",
            continuous_update=False,
            style=style,
        )
        self.take = ipywidgets.Button(
            description="Merge the picked", tooltip="Choose the adapters of the units picked on the map"
        )
        self.start = ipywidgets.Button(
            description="Accuracy by k",
            tooltip="Merge at each k and score the merges and their controls on the tasks, in the background",
            button_style="primary",
        )
        self.work = Work()
        self.caption, self._picture, self._rows = ipywidgets.HTML(), Picture(), ipywidgets.HTML()
        row = ipywidgets.HBox([self.ks, self.take, self.start], layout={"flex_flow": "row wrap"})
        super().__init__([self.chosen, row, self.work, self.caption, self._picture, self._rows])
        self.layout.max_width = "100%"
        self.start.on_click(lambda _: self.run())
        for control in (self.chosen, self.ks):
            control.observe(lambda _: changed(), "value")
        if base is None:
            self.start.disabled = True
            self.caption.value = sentence("Pass base= (and tasks=) to see what k does to a merge's accuracy.")

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters to merge, in the stack's order."""
        return tuple(name for name in self.stack.names if name in set(self.chosen.value))

    @property
    def merged(self) -> str:
        """The expression for their stack, where the whole one is called `stack`."""
        return "stack" if self.names == self.stack.names else f"stack.choose({list(self.names)!r})"

    @property
    def values(self) -> list[int]:
        """The ks to try, ascending.

        Raises:
            MergeError: something that is no whole number of at least 1, or nothing.
        """
        words = re.split(r"[\s,;]+", self.ks.value.strip(" ,;"))
        if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
            raise MergeError(f"the values of k are {self.ks.value!r}, expected whole numbers such as {KS!r}")
        return sorted({int(word) for word in words})

    @property
    def code(self) -> str:
        """The line that computes the whole curve, where base, stack and tasks have these names."""
        try:
            values = self.values
        except MergeError:
            return ""
        options = "".join(f", {name!r}: {value!r}" for name, value in self._settings().items())
        each = f'{{f"k={{k}}": ("lego", {{"k": k{options}}}) for k in {values}}}'
        return f"multitask(base, {self.merged}, tasks, {each}, fresh=(), single=False, seed={self.seed})"

    def run(self) -> None:
        """Start computing, in place of what is being computed; what cannot be is told."""
        try:
            if self.base is None:
                raise SelectionError("there is no base to score merges with; pass base= to the explorer")
            if not self.names:
                raise SelectionError("no adapters are chosen to be merged; choose some in the list")
            job = self._job(self.stack.choose(self.names), self.values, dict(self._settings()))
        except Exception as error:
            self.told(error)
            return
        self.told(None)
        self.work.start(job, self._ended)

    def known(self, names: Sequence[str]) -> dict[str, Task]:
        """The tasks to score these adapters' merge on.

        Raises:
            SelectionError: none is known.
        """
        if self.tasks is not None:
            found = self.tasks
        else:
            from workbench import tasks
            from workbench.nano import world

            own = [name for name in names if world.find(name) is not None]
            found = {n: tasks.load(f"nano/{n}", n_train=1, n_validation=4, n_test=self.n_test) for n in own}
        if not found:
            raise SelectionError(
                "no task of these adapters is known; pass tasks={adapter's name: task} to the explorer"
            )
        return found

    def _job(self, stack: Stack, values: Sequence[int], options: dict) -> Callable[[Tell], None]:
        def job(tell: Tell) -> None:
            from workbench.multitask import multitask

            if tell(0, len(values), "tasks"):
                return
            tasks, parts = self.known(stack.names), []
            said = ", ".join(f"{name} {value}" for name, value in options.items())
            self._about = f"{len(stack)} adapters, {_counted(len(tasks), 'task')}; {said}"
            self._show(pd.DataFrame(), tasks)
            for i, k in enumerate(values):
                if tell(i, len(values), f"k = {k}"):
                    return
                variant = {f"k={k}": ("lego", {"k": k, **options})}
                with turn(self.base, stop=lambda i=i: tell(i, len(values), "waiting for the base")):
                    part = multitask(self.base, stack, tasks, variant, fresh=(), single=False, seed=self.seed)
                parts.append(part if not parts else part[part.method == "lego"])
                self._show(pd.concat(parts, ignore_index=True), tasks)

        return job

    def _ended(self, error: Exception | None) -> None:
        self.told(error)
        if error is None and self.work.stopped:
            self.caption.value = sentence(
                f"Stopped. {self._said()}" if len(self.table) else "Stopped before the first k."
            )

    def _show(self, table: pd.DataFrame, tasks: Mapping[str, Task]) -> None:
        self.table = table
        if table.empty:
            self.caption.value, self._rows.value = sentence(f"Merging {self._about}."), ""
            self._picture.show(None)
            return
        curve, base, own = summary(table)
        said = self._said()
        self.caption.value = sentence(said)
        self._picture.show(accuracy_curve(curve, base, own), said)
        self._rows.value = _as_html(curve)

    def _said(self) -> str:
        curve, base, own = summary(self.table)
        last = curve[curve.series == LEGO].iloc[-1]
        alone = (
            f"each adapter alone on its own task (a newly trained adapter for it): {own:.2f}"
            if own is not None
            else "not every task has its own adapter in the merge, so none is shown beside it"
        )
        return (
            f"{self._about}. Accuracy, mean over tasks. Base alone: {base:.2f}; {alone}. "
            f"At k = {last.k}: {last['mean']:.2f} (λ tuned on validation), {last.at_one:.2f} (λ = 1)."
        )


def summary(table: pd.DataFrame) -> tuple[pd.DataFrame, float, float | None]:
    """Means over tasks of what `multitask` found.

    Returns:
        Rows series × k with mean (λ tuned), at_one (λ = 1) and λ; the base's accuracy; that of each task's own adapter, None
        where a task has none.
    """
    merges = table[table.method == "lego"]
    found = merges.groupby(["control", "k"], sort=True)
    curve = found.agg(mean=("accuracy", "mean"), at_one=("accuracy_unscaled", "mean"), scale=("scale", "first"))
    curve = curve.reset_index().assign(series=lambda f: [RANDOM if c else LEGO for c in f["control"]])
    alone, zero = table[table.variant == "alone"], table[table.variant == "zero-shot"]
    own = float(alone.accuracy.mean()) if len(alone) == len(zero) else None
    return curve[["series", "k", "mean", "at_one", "scale"]], float(zero.accuracy.mean()), own


def accuracy_curve(curve: pd.DataFrame, base: float, own: float | None) -> Figure:
    """The curve of `summary`, λ tuned (solid) and λ = 1 (dashed), with the base's and the own adapters' accuracy."""
    figure = Figure(figsize=(7.6, 3.0))
    ax = figure.add_subplot()
    for i, (series, part) in enumerate(curve.groupby("series", sort=False)):
        look = {"color": f"C{i}", "marker": "os"[i % 2]}
        ax.plot(part["k"], part["mean"], "-", label=f"{series}, λ tuned", **look)
        ax.plot(part["k"], part["at_one"], "--", markersize=3, label=f"{series}, λ = 1", **look)
    if own is not None:
        ax.axhline(own, color="0.3", linestyle="-.", linewidth=1, label="each adapter on its own task")
    ax.axhline(base, color="0.3", linestyle=":", linewidth=1, label="base alone")
    ax.set_xscale("log", base=2)
    ticks = sorted(curve["k"].unique())
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set(xlabel="k, clusters per module", ylabel="accuracy, mean over tasks", ylim=(-0.03, 1.03))
    ax.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _as_html(curve: pd.DataFrame) -> str:
    rows = [
        [str(row.k), row.series, f"{row.scale:g}", f"{row.mean:.3f}", f"{row.at_one:.3f}"]
        for row in curve.sort_values(["k", "series"]).itertuples()
    ]
    return scrolling("Accuracy by k", ["k", "merge", "λ", "accuracy, λ tuned", "accuracy, λ = 1"], rows, "20em")


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
