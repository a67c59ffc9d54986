"""Merge adapters of a pool by any method, its options a form, and see the merge beside what must stand beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import ipywidgets

from workbench.adapt import ADAPTIVE
from workbench.base import Base
from workbench.controls import MATCHES
from workbench.errors import MergeError
from workbench.merge import methods
from workbench.options import Count, Option, near
from workbench.pool import Pool
from workbench.runs import Workplace, check_examples, check_options
from workbench.tasks import Task
from workbench.trial import Trial, line, try_merge
from workbench.widgets.benchtabs import Tabs
from workbench.widgets.chooser import AdapterChooser
from workbench.widgets.form import Form
from workbench.widgets.outcome import interval_picture, result_rows, result_table, told
from workbench.widgets.parts import MEMORY, Panel, Picture, alone, label, sentence
from workbench.widgets.work import Tell, Work

__all__ = ["MergeBench"]

_RANK = {"rank": Option(None, Count | None)}  # of every merge, not of its function: where to cut the result


class MergeBench(Panel):
    """Choose adapters, a method and its options; merge; see the random control, a new adapter and the base beside it.

        bench = MergeBench(base, pool, task, chosen=["first-two-letters", "last-two-letters"], method="ties")
        bench.form.fields["density"].value = "0.5"
        bench.merge()                                  # what the button does: in the background
        bench.trial.table, bench.adapter, bench.code

    Nothing runs before a button is pressed; one job at a time, which the button Stop ends: a fit with its best so far. The
    control and the new adapter are kept, so that a second merge is quick. The form is made from the method's signature; a
    method registered later is listed once the choice changes or a job has ended. Cells that use `base` while a job runs
    disturb it, and each other.

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
        self._place, self._texts = Workplace(base, pool), {}
        self._listed = self._available()
        if method not in self._listed:
            raise MergeError(f"{method!r} is not to be had here{near(method, self._listed)}; {self._unlisted()}")
        check_options(method, dict(options or {}))
        self.chooser = AdapterChooser(pool, chosen=chosen)
        self._build(method, seed)
        self._reform()
        self.form.take({name: self.form.text(name, value) for name, value in (options or {}).items()})
        self._drop = self._recall()
        self._changed()
        if self._drop:
            self._said.value = sentence(f"Remembered, but no longer to be had: {', '.join(self._drop)}.")
        self.chooser.on_choice(self._changed)
        self.method.observe(lambda _: (self._reform(), self._changed()), "value")
        for one in (self.seed, self.control, self.tabs.prompt, self.tabs.limit, self.tabs.path):
            one.observe(lambda _: self._changed(), "value")

    def _build(self, method: str, seed: int) -> None:
        style = {"description_width": "8.5em"}
        self.method = ipywidgets.Dropdown(
            options=[(label(name), name) for name in self._listed],
            value=method,
            description="Method",
            tooltip="How the chosen adapters are merged",
            style=style,
            layout={"width": "24em"},
        )
        self.seed = ipywidgets.BoundedIntText(
            seed,
            min=0,
            max=2**31 - 1,
            description="Seed",
            tooltip="Of the fits and of the random adapters",
            style={"description_width": "4em"},
            layout={"width": "11em"},
        )
        self.control = ipywidgets.Dropdown(
            options=list(MATCHES),
            description="Control matched by",
            tooltip="What the random adapters of the control have in common with the chosen ones",
            style={"description_width": "10em"},
            layout={"width": "19em"},
        )
        self.go = ipywidgets.Button(
            description="Merge",
            button_style="primary",
            tooltip="Merge the chosen adapters, train what stands beside, score all of it",
        )
        self.show_code = ipywidgets.ToggleButton(
            False, description="Show the code", tooltip="The lines that do the same without this control"
        )
        self.work, self._picture = Work(), Picture()
        self._doc, self._out, self._code, self._said, self.result = (ipywidgets.HTML() for _ in range(5))
        self._code.layout.display = "none"
        self._out.value = sentence(self._unlisted(), role="note")
        self._place_of_form = ipywidgets.Box(layout={"width": "100%"})
        self.tabs = Tabs(self)
        self._accordion = ipywidgets.Accordion(
            [self.chooser], titles=("Adapters",), selected_index=None if self.chooser.names else 0
        )
        row, buttons = ({"flex_flow": "row wrap"} for _ in range(2))
        super().__init__([])
        self.layout.max_width = "70em"
        self.children = [
            self._accordion,
            ipywidgets.HBox([self.method, self.seed, self.control], layout=row),
            self._doc,
            self._place_of_form,
            self._out,
            ipywidgets.HBox([self.go, self.show_code, self.work], layout=buttons),
            self._said,
            self._message,
            self._code,
            self.result,
            self._picture,
            self.tabs,
        ]
        self.go.on_click(lambda _: self.merge())
        self.show_code.observe(lambda _: self._tell_code(), "value")

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen adapters, in the pool's order."""
        return self.chooser.names

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

        Raises:
            MergeError: a value that its option does not allow.
        """
        call = self._call()
        if self.trial is not None and self.trial.until is not None and self._same():
            call = self.trial.code
        return f"from workbench.trial import try_merge\ntrial = {call}\ntrial.table"

    def merge(self) -> None:
        """Merge in the background; `work.wait()` waits for the end.

        What cannot be done is told in the control, not raised.
        """
        found: list[Trial | None] = []

        def job(tell: Tell) -> None:
            given = dict(zip(("method", "options"), settings, strict=True), seed=self.seed.value)
            given |= {"control": self.control.value, "new": self.new, "place": self._place}
            found.append(try_merge(self.base, self.pool, names, self.task, **given, tell=tell))

        def ended() -> None:
            if found[0] is None:
                self._said.value = sentence(
                    "Stopped before the random control and the new adapter were there; no merge is shown without them."
                )
            else:
                self._show(found[0])

        try:
            names, settings = self.names, (self.method.value, self._options())
            if not names:
                raise MergeError("no adapter is chosen; choose some above")
        except Exception as error:
            self.told(error)
        else:
            self.run(job, ended)

    def run(self, job: Callable[[Tell], None], ended: Callable[[], None]) -> None:
        """Have a job run with the base to itself, the buttons disabled meanwhile, and then `ended` if it raised nothing."""
        if self.work.running:
            self.told(MergeError("a job is running; stop it first, or wait for its end"))
            return

        def alone_with_it(tell: Tell) -> None:
            with alone(self.base, stop=lambda: tell(0, 1, "waiting for the base")):
                job(tell)

        def after(error: Exception | None) -> None:
            self._busy(False)
            if error is not None:
                self.told(error)
            else:
                self.attempt(ended, lambda: None)
            self._refresh()

        self.told(None)
        self._said.value = ""
        self._busy(True)
        self.work.start(alone_with_it, after)

    def __repr__(self) -> str:
        rows = [f"MergeBench: {len(self.names)} adapters of pool {self.pool.name!r} chosen; task {self.task.name}"]
        if self.trial is None:
            rows.append("Nothing is merged yet: press Merge, and the control and a new adapter come with it.")
        else:
            rows += [told(self.trial)]
            rows += [": ".join(cells[:2]) + f", loss {cells[2]}" for cells in result_rows(self.trial, self.task)]
        rows += [f"could not be computed: {self.error}"] if self.error else []
        try:
            return "\n".join([*rows, self.code])
        except MergeError as error:
            return "\n".join([*rows, f"no code: {error}"])

    def _available(self) -> list[str]:
        """Merges and fits, but for those that need what is not known of this pool."""
        self._lacking = {}
        for name in methods():
            try:
                check_examples(name, self.pool)
            except MergeError:
                self._lacking[name] = methods()[name].needs
        return [*ADAPTIVE, *(name for name in methods() if name not in self._lacking)]

    def _unlisted(self) -> str:
        if not self._lacking:
            return ""
        return (
            f"Not listed: {', '.join(self._lacking)}. They look at examples of each adapter's own task, which are known for "
            "bundled adapters only; give them to workbench.merge.collect, and its result to wb.merge(…, statistics=…)."
        )

    def _refresh(self) -> None:
        """List methods that were registered since."""
        self._listed = self._available()
        options = tuple((label(name), name) for name in self._listed)
        if options != self.method.options:
            value = self.method.value
            self.method.options = options
            self.method.value = value if value in self._listed else self._listed[0]
            self._out.value = sentence(self._unlisted(), role="note")

    def _known(self) -> Mapping[str, Option]:
        name = self.method.value
        return ADAPTIVE[name].options if name in ADAPTIVE else methods()[name].options | _RANK

    def _options(self) -> dict:
        found = self.form.options()
        check_options(self.method.value, found)
        return found

    def _reform(self) -> None:
        """The form of the method: what was typed into it before is there again."""
        name = self.method.value
        self.form = Form(self._known(), self._changed)
        self.form.take(self._texts.get(name, {}))
        self._place_of_form.children = [self.form]
        record = {**methods(), **ADAPTIVE}[name]
        summary = (inspect.getdoc(record.function) or "").partition("\n")[0]
        self._doc.value = sentence(f"{summary} {record.paper}".strip(), role="note")

    def _call(self) -> str:
        settings = self.names, self.method.value, self._options(), self.seed.value, self.control.value
        return line(*settings, self.new)

    def _same(self) -> bool:
        """Whether the trial shown is of the present settings."""
        made = self.trial
        return line(made.names, made.method, made.options, made.seed, made.control, made.new) == self._call()

    def _changed(self) -> None:
        self._texts[self.method.value] = self.form.texts
        self._refresh()
        self._accordion.titles = (f"Adapters: {len(self.names)} of {len(self.pool)} chosen",)
        if self.key is not None:
            MEMORY[type(self).__name__, self.key] = self._settings()
        if not self.work.running:
            self._said.value = ""
        try:
            self._tell_code()
            self.told(None)
        except MergeError as error:
            self._code.value = ""
            self.told(error)

    def _tell_code(self) -> None:
        self._code.layout.display = "block" if self.show_code.value else "none"
        blocks = [self.code]
        if self.trial is not None and not self._same():
            blocks.append(f"# the result below is of earlier settings:\ntrial = {self.trial.code}")
            self._said.value = sentence("The result below is of earlier settings; Merge again.")
        self._code.value = sentence("\n".join(blocks), "pre", "note")

    def _show(self, trial: Trial) -> None:
        self.trial = trial
        self.result.value = result_table(trial, self.task)
        self._picture.show(
            interval_picture(trial, self.task),
            "\n".join(map(": ".join, (r[:2] for r in result_rows(trial, self.task)))),
        )
        self.tabs.show(trial)
        self._tell_code()

    def _busy(self, busy: bool) -> None:
        self.go.disabled = busy
        self.tabs.busy(busy)

    def _settings(self) -> dict:
        tabs = self.tabs
        return {
            "chosen": list(self.names),
            "method": self.method.value,
            "texts": {name: dict(texts) for name, texts in self._texts.items() if texts},
            "seed": self.seed.value,
            "control": self.control.value,
            "prompt": tabs.prompt.value,
            "limit": tabs.limit.value,
            "path": tabs.path.value,
        }

    def _recall(self) -> list[str]:
        """Take up what is remembered under the key; what of it is no longer to be had."""
        kept = MEMORY.get((type(self).__name__, self.key), {}) if self.key is not None else {}
        if not kept:
            return []
        lost = [name for name in kept["chosen"] if name not in self.pool.names]
        self.chooser.names = [name for name in kept["chosen"] if name not in lost]
        self._accordion.selected_index = None if self.names else 0
        self._texts = {name: dict(texts) for name, texts in kept["texts"].items()}
        if kept["method"] in self._listed:
            self.method.value = kept["method"]
        else:
            lost.append(f"method {kept['method']}")
        self._texts.setdefault(self.method.value, {})
        self._reform()
        lost += [f"option {name}" for name in self._texts[self.method.value] if name not in self.form.fields]
        self.seed.value, self.control.value = kept["seed"], kept["control"]
        for name in ("prompt", "limit", "path"):
            getattr(self.tabs, name).value = kept[name]
        return lost
