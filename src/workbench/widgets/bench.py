"""Merge adapters of a pool by any method, its options a form, and see the merge beside what must stand beside it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import ipywidgets

from workbench.base import Base
from workbench.errors import MergeError
from workbench.pool import Pool
from workbench.runs import Workplace
from workbench.tasks import Task
from workbench.trial import Trial, line, try_merge
from workbench.widgets.benchtabs import Tabs
from workbench.widgets.chooser import AdapterChooser
from workbench.widgets.form import Form
from workbench.widgets.method import MethodChooser
from workbench.widgets.outcome import interval_picture, result_rows, result_table, told
from workbench.widgets.parts import PLAIN, Panel, Picture, sentence, turn
from workbench.widgets.work import Tell, Work

__all__ = ["MergeBench"]


class MergeBench(Panel):
    """Choose adapters, a method and its options; merge; see the random control, a new adapter and the base beside it.

        bench = MergeBench(base, pool, task, chosen=["first-two-letters", "last-two-letters"], method="ties")
        bench.form.fields["density"].value = "0.5"
        bench.merge()                                  # what the button does: in the background
        bench.trial.table, bench.adapter, bench.code

    Nothing runs before a button is pressed; one job at a time, which the button Stop ends: a fit with its best so far. The
    control and the new adapter are kept, so that a second merge is quick. The form is made from the method's signature; a
    method registered later is listed once a setting changes or a job has ended.

    `key`: the settings, not the results, outlive this control: the next one of this key takes them up.
    """

    def __init__(
        self,
        base: Base,
        pool: Pool,
        task: Task,
        *,
        chosen: Sequence[str] = (),
        method: str = "coefficients",
        options: Mapping | None = None,
        seed: int = 0,
        new: Mapping | None = None,
        key: str | None = None,
    ):
        """Build the controls; nothing is computed.

        Args:
            chosen, method, options, seed: to begin with, where `key` remembers nothing.
            new: options of the new adapter that stands beside, such as {"steps": 40}.

        Raises:
            SelectionError, AdapterError: an adapter that is not in the pool.
            MergeError: an unknown method, or options that it does not allow.
        """
        from workbench import plots  # noqa: F401  pyplot is best imported in the kernel's own thread

        self.base, self.pool, self.task, self.new, self.key = base, pool, task, dict(new or {}), key
        self.trial: Trial | None = None
        self._beside = Workplace(base, pool)
        self.chooser = AdapterChooser(pool, chosen=chosen)
        self.how = MethodChooser(pool, method, options or {}, seed, self._changed)
        self.tabs = Tabs(self)
        self.go = ipywidgets.Button(
            description="Merge",
            button_style="primary",
            tooltip="Merge the chosen adapters, train what stands beside, score all of it",
        )
        self.show_code = ipywidgets.ToggleButton(
            False, description="Show the code", tooltip="The lines that do the same without this control"
        )
        self.work, self._picture = Work(), Picture()
        self._code, self._said, self.result = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._fold = ipywidgets.Accordion([self.chooser], titles=("Adapters",))
        row = ipywidgets.HBox([self.go, self.show_code, self.work], layout={"flex_flow": "row wrap"})
        super().__init__([])
        self.layout.max_width = "70em"
        above = [self._fold, self.how, row, self._said, self._message, self._code]
        self.children = [*above, self.result, self._picture, self.tabs]
        lost = self._recall()
        self._fold.selected_index = None if self.names else 0
        self._changed()
        if lost:
            self._said.value = sentence(f"Remembered, but no longer to be had: {', '.join(lost)}.")
        self.chooser.on_choice(self._changed)
        self.go.on_click(lambda _: self.merge())
        self.show_code.observe(lambda _: self._changed(), "value")
        for one in (self.tabs.prompt, self.tabs.limit, self.tabs.path):
            one.observe(lambda _: self._changed(), "value")

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen adapters, in the pool's order."""
        return self.chooser.names

    @property
    def method(self) -> ipywidgets.Dropdown:
        """The list of methods."""
        return self.how.method

    @property
    def form(self) -> Form:
        """The present method's form."""
        return self.how.form

    @property
    def adapter(self):
        """The merge shown, as an adapter (Arrow's: a router).

        Raises:
            MergeError: nothing is merged yet.
        """
        if self.trial is None:
            raise MergeError("nothing is merged yet; press Merge")
        return self.trial.adapter

    @property
    def code(self) -> str:
        """The lines that do what the present settings do, where base, pool and task have these names.

        Of a fit that was stopped, the lines that stop at the same step, as long as the settings stay.

        Raises:
            MergeError: a value that its option does not allow.
        """
        call = self.trial.code if self._same() else self._call()
        return f"from workbench.trial import try_merge\ntrial = {call}\ntrial.table"

    def merge(self) -> None:
        """Merge in the background; `work.wait()` waits for the end.

        What cannot be done is told in the control, not raised.
        """
        found: list[Trial | None] = []
        try:
            if not self.names:
                raise MergeError("no adapter is chosen; choose some above")
            given = (self.base, self.pool, self.names, self.task, self.method.value, self.how.options())
        except MergeError as error:
            self.told(error)
            return
        more = {"seed": self.how.seed.value, "control": self.how.control.value, "new": self.new, "place": self._beside}

        def ended() -> None:
            if found[0] is None:
                self._said.value = sentence(
                    "Stopped before the random control and the new adapter were there; no merge is shown without them."
                )
            else:
                self._show(found[0])

        self.run(lambda tell: found.append(try_merge(*given, **more, tell=tell)), ended)

    def run(
        self, job: Callable[[Tell], None], ended: Callable[[], None], say: Callable[[Exception], None] = lambda _: None
    ) -> None:
        """Have a job run with the base to itself, the buttons disabled meanwhile, and then `ended` if it raised nothing.

        An error is told below the buttons, and by `say` where the button pressed is elsewhere.
        """
        if self.work.running:
            busy = MergeError("a job is running; stop it first, or wait for its end")
            self.told(busy)
            say(busy)
            return

        def in_turn(tell: Tell) -> None:
            with turn(self.base, stop=lambda: tell(0, 1, "waiting for the base")):
                job(tell)

        def after(error: Exception | None) -> None:
            try:
                if error is not None:
                    self.told(error)
                    say(error)
                else:
                    self.attempt(ended, lambda: None)
                self.how.refresh()
            finally:
                self._busy(False)

        self.told(None)
        self._said.value = ""
        self._busy(True)
        self.work.start(in_turn, after)

    def __repr__(self) -> str:
        rows = [f"MergeBench: {len(self.names)} adapters of pool {self.pool.name!r} chosen; task {self.task.name}"]
        if self.trial is None:
            rows.append("Nothing is merged yet: press Merge, and the control and a new adapter come with it.")
        else:
            rows += [told(self.trial)]
            rows += [f"{what}: {match}, loss {loss}" for what, match, loss, _ in result_rows(self.trial)]
        rows += [f"could not be computed: {self.error}"] if self.error else []
        try:
            return "\n".join([*rows, self.code])
        except MergeError as error:
            return "\n".join([*rows, f"no code: {error}"])

    def _call(self) -> str:
        how = self.how
        return line(self.names, how.method.value, how.options(), how.seed.value, how.control.value, self.new)

    def _same(self) -> bool:
        """Whether a trial is shown, and of the present settings."""
        made = self.trial
        return made is not None and self._call() == line(
            made.names, made.method, made.options, made.seed, made.control, made.new
        )

    def _changed(self) -> None:
        self.how.refresh()
        self._fold.titles = (f"Adapters: {len(self.names)} of {len(self.pool)} chosen",)
        own = {name: getattr(self.tabs, name).value for name in ("prompt", "limit", "path")}
        self.remember({"chosen": list(self.names), **self.how.settings, **own})
        self._said.value = ""
        try:
            self._tell_code()
            self.told(None)
        except MergeError as error:
            self._code.value = ""
            self.told(error)

    def _recall(self) -> list[str]:
        """Take up what is remembered under the key; what of it is no longer to be had."""
        kept = self.recall()
        if not kept:
            return []
        lost = [name for name in kept["chosen"] if name not in self.pool.names]
        self.chooser.names = [name for name in kept["chosen"] if name not in lost]
        for name in ("prompt", "limit", "path"):
            getattr(self.tabs, name).value = kept[name]
        return lost + self.how.take(kept)

    def _tell_code(self) -> None:
        self._code.layout.display = "block" if self.show_code.value else "none"
        blocks = [self.code]
        if self.trial is not None and not self._same():
            blocks.append(f"# the result below is of earlier settings:\ntrial = {self.trial.code}")
            self._said.value = sentence("The result below is of earlier settings; Merge again.")
        style = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;line-height:1.4"
        shown = html.escape("\n".join(blocks))
        self._code.value = f"<pre {PLAIN} style='{style}'>{shown}</pre>"

    def _show(self, trial: Trial) -> None:
        self.trial = trial
        says = "\n".join(f"{what}: {match}" for what, match, *_ in result_rows(trial))
        self.result.value = result_table(trial)
        self._picture.show(interval_picture(trial), says)
        self.tabs.show(trial)
        self._said.value = ""
        self._tell_code()

    def _busy(self, busy: bool) -> None:
        self.go.disabled = busy
        self.tabs.busy(busy)
