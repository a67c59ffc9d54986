"""Choose a method, its options by its form, and what its control is matched by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import ipywidgets

from workbench.adapt import ADAPTIVE
from workbench.controls import MATCHES
from workbench.errors import MergeError
from workbench.merge import methods
from workbench.nano import world
from workbench.options import Count, Option, near
from workbench.pool import Pool
from workbench.runs import check_options
from workbench.widgets.form import Form
from workbench.widgets.parts import label, sentence

__all__ = ["MethodChooser"]

_RANK = {"rank": Option(None, Count | None)}  # of every merge, not of its function: where to cut the result


class MethodChooser(ipywidgets.VBox):
    """A list of all merges and fits that a pool allows, and the form of the one chosen, made from its signature.

    What was typed into a method's form is there again when that method is.
    """

    def __init__(
        self,
        pool: Pool,
        method: str,
        options: Mapping,
        seed: int,
        changed: Callable[[], None],
    ):
        """`changed` is called after every change.

        Raises:
            MergeError: an unknown method, or options that it does not allow.
        """
        self._bundled = all(map(world.find, pool.names))
        self._texts, self._call = {}, lambda: None
        listed = self._available()
        if method not in listed:
            raise MergeError(
                f"{method!r} is no method to choose here{near(method, listed)}; {self._unlisted()}".strip("; ")
            )
        check_options(method, options)
        self.method = ipywidgets.Dropdown(
            options=[(label(name), name) for name in listed],
            value=method,
            description="Method",
            tooltip="How the chosen adapters are merged",
            style={"description_width": "8.5em"},
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
        self._doc, self._out = ipywidgets.HTML(), ipywidgets.HTML(sentence(self._unlisted(), role="note"))
        self._place = ipywidgets.Box(layout={"width": "100%"})
        row = ipywidgets.HBox([self.method, self.seed, self.control], layout={"flex_flow": "row wrap"})
        super().__init__([row, self._doc, self._place, self._out])
        self._reform()
        self.form.take({name: self.form.text(name, value) for name, value in options.items()})
        self._call = changed
        self.method.observe(lambda _: (self._reform(), changed()), "value")
        for one in (self.seed, self.control):
            one.observe(lambda _: changed(), "value")

    def options(self) -> dict:
        """Name → value, of the options that are not at their default.

        Raises:
            MergeError: a value that its option does not allow.
        """
        found = self.form.options()
        check_options(self.method.value, found)
        return found

    def refresh(self) -> None:
        """List methods that were registered since."""
        options = tuple((label(name), name) for name in self._available())
        if options != self.method.options:
            value, listed = self.method.value, [name for _, name in options]
            self.method.options = options
            self.method.value = value if value in listed else listed[0]
            self._out.value = sentence(self._unlisted(), role="note")

    @property
    def settings(self) -> dict:
        """What `take` takes."""
        texts = {name: dict(texts) for name, texts in self._texts.items() if texts}
        return {"method": self.method.value, "texts": texts, "seed": self.seed.value, "control": self.control.value}

    def take(self, settings: Mapping) -> list[str]:
        """Take up settings; what of them is no longer to be had."""
        lost = []
        self._texts = {name: dict(texts) for name, texts in settings["texts"].items()}
        if settings["method"] in [name for _, name in self.method.options]:
            self.method.value = settings["method"]
        else:
            lost.append(f"method {settings['method']}")
        mine = self._texts.get(self.method.value, {})
        self._reform()
        lost += [f"option {name}" for name in mine if name not in self.form.fields]
        self.seed.value, self.control.value = settings["seed"], settings["control"]
        return lost

    def _available(self) -> list[str]:
        self._lacking = [name for name, one in methods().items() if one.needs and not self._bundled]
        return [*ADAPTIVE, *(name for name in methods() if name not in self._lacking)]

    def _unlisted(self) -> str:
        if not self._lacking:
            return ""
        return (
            f"Not listed: {', '.join(self._lacking)}. They look at examples of each adapter's own task, which are known for "
            "bundled adapters only; give them to workbench.merge.collect, and its result to wb.merge(…, statistics=…)."
        )

    def _reform(self) -> None:
        name = self.method.value
        record = {**methods(), **ADAPTIVE}[name]
        self.form = Form(record.options if name in ADAPTIVE else record.options | _RANK, self._typed)
        self.form.take(self._texts.get(name, {}))
        self._place.children = [self.form]
        of_merge = (inspect.getdoc(record.function) or "").partition("\n")[0]
        summary = record.summary if name in ADAPTIVE else of_merge
        self._doc.value = sentence(f"{summary} {record.paper}".strip(), role="note")

    def _typed(self) -> None:
        self._keep()
        self._call()

    def _keep(self) -> None:
        self._texts[self.method.value] = self.form.texts
