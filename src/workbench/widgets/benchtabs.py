"""The merge bench's pages below its result: coefficients, weights by hand, a prompt of one's own, and saving."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets

from workbench.errors import AdapterError, MergeError
from workbench.trial import Trial
from workbench.widgets.outcome import MOST, answers_table, heat_maps
from workbench.widgets.parts import Picture, sentence
from workbench.widgets.weights import REACH, WeightExplorer
from workbench.widgets.work import Tell

if TYPE_CHECKING:
    from workbench.widgets.bench import MergeBench

__all__ = ["Tabs"]

TITLES = ("Coefficients", "Weights by hand", "Try a prompt", "Save")


class Tabs(ipywidgets.Tab):
    """Four pages on a bench's trial. `opening`, `asking` and `saving` are their buttons, each of which asks the bench to run a job."""

    def __init__(self, bench: MergeBench):
        self._bench = bench
        self.explorer: WeightExplorer | None = None
        self._caption, self._maps = ipywidgets.HTML(), Picture()
        self.opening = _button(
            "Open the sliders", "One slider for each chosen adapter, with the loss on validation examples"
        )
        self.opened = ipywidgets.HTML()
        self._sliders = ipywidgets.VBox([self.opening, self.opened])
        first = (bench.task.validation or bench.task.train or bench.task.test)[:1]
        self.prompt = ipywidgets.Textarea(
            bench.task.prompt(first[0]) if first else "",
            description="Prompt",
            tooltip="What the base, the merge and what stands beside it continue",
            rows=4,
            layout={"width": "98%"},
        )
        self.limit = ipywidgets.BoundedIntText(
            min(bench.task.max_new_tokens, 512),
            min=1,
            max=512,
            description="Tokens",
            tooltip="How many tokens an answer may have",
            layout={"width": "12em"},
        )
        self.asking = _button("Answer", "Have each of them continue the prompt; the likeliest token each time")
        self.answers = ipywidgets.HTML()
        self.path = ipywidgets.Text(
            description="Folder",
            placeholder="such as out/my-merge",
            tooltip="A folder that does not exist yet; what exists is never overwritten",
            continuous_update=False,
            layout={"width": "32em"},
        )
        self.saving = _button("Save", "Write the merge as a PEFT folder")
        self.saved = ipywidgets.HTML()
        row = {"flex_flow": "row wrap"}
        pages = [
            ipywidgets.VBox([self._caption, self._maps]),
            self._sliders,
            ipywidgets.VBox([self.prompt, ipywidgets.HBox([self.limit, self.asking], layout=row), self.answers]),
            ipywidgets.VBox([ipywidgets.HBox([self.path, self.saving], layout=row), self.saved]),
        ]
        super().__init__(pages, titles=TITLES, selected_index=0)
        self._caption.value = sentence("A fit's coefficients are drawn here once there are any.")
        self.opening.on_click(lambda _: self.open_sliders())
        self.asking.on_click(lambda _: self.answer())
        self.saving.on_click(lambda _: self.write())

    def busy(self, busy: bool) -> None:
        """Disable what would use the base, or free it again."""
        sliders = self.explorer.sliders.values() if self.explorer else ()
        for one in (self.opening, self.asking, self.saving, *sliders):
            one.disabled = busy

    def show(self, trial: Trial) -> None:
        """A new trial: its coefficients; answers and notes of an earlier one go."""
        self.answers.value = self.saved.value = ""
        found = trial.coefficients
        if found is None:
            self._maps.show(None)
            self._caption.value = sentence(f"{trial.method} learns no coefficients: each adapter has weight 1.")
            return
        said = (
            "Coefficients by layer and projection, one panel per adapter; white is 0 (which may be a module it lacks)."
        )
        if found.shape[1] > MOST:
            said += f" The {MOST} largest of {found.shape[1]} adapters, by mean size."
        means = found.mean()
        largest = means.abs().idxmax()
        said += f" Largest on average: {largest} ({means[largest]:.2f})."
        self._caption.value = sentence(said)
        self._maps.show(heat_maps(found), said)

    def open_sliders(self) -> None:
        """Sliders for the chosen adapters, at the means of the fit's coefficients where there is one of them."""
        bench, made = self._bench, []

        def job(tell: Tell) -> None:
            stack, trial, start = bench.pool.stack(bench.names), bench.trial, None
            found = trial.coefficients if trial is not None and trial.names == tuple(bench.names) else None
            if found is not None:
                start = found.mean()[list(bench.names)].clip(-REACH, REACH).tolist()
            made.append(WeightExplorer(bench.base, stack, bench.task, weights=start))

        def ended() -> None:
            self.explorer = made[0]
            self._sliders.children = [self.opening, self.opened, self.explorer]

        self.opened.value = ""
        bench.run(job, ended, lambda error: _failed(self.opened, error))

    def answer(self) -> None:
        """Have the merge, and all that stands beside it, continue the prompt."""
        bench, found, prompt, limit = self._bench, {}, self.prompt.value, self.limit.value

        def job(tell: Tell) -> None:
            trial = self._trial()
            found.update(trial.answers(bench.base, prompt, limit, tell=tell))

        def ended() -> None:
            self.answers.value = answers_table(found) if found else ""

        self.answers.value = ""
        bench.run(job, ended, lambda error: _failed(self.answers, error))

    def write(self) -> None:
        """Save the merge shown; a folder that exists is left alone, with a sentence."""
        path = self.path.value.strip()

        def job(tell: Tell) -> None:
            adapter = self._trial().adapter
            if not path:
                raise AdapterError("no folder is given to save to; type one, such as out/my-merge")
            adapter.save(path)

        def ended() -> None:
            self.saved.value = sentence(
                f"Saved: PeftModel.from_pretrained(model, {path!r}) loads it; from here it was "
                f"trial.adapter.save({path!r})."
            )

        self.saved.value = ""
        self._bench.run(job, ended, lambda error: _failed(self.saved, error))

    def _trial(self) -> Trial:
        if self._bench.trial is None:
            raise MergeError("nothing is merged yet; press Merge first")
        return self._bench.trial


def _failed(place: ipywidgets.HTML, error: Exception) -> None:
    place.value = sentence(f"This could not be done: {str(error) or type(error).__name__}", "strong", "alert")


def _button(text: str, tooltip: str) -> ipywidgets.Button:
    return ipywidgets.Button(description=text, tooltip=tooltip)
