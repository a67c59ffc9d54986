"""Set the weights of a few adapters by hand and see what the merge does on a task's examples."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from workbench.adapt.fitted import fold
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.compose import shared
from workbench.errors import MergeError, SelectionError, TaskError
from workbench.evaluate import Scores, encode_task, score
from workbench.licences import gathered
from workbench.screen import printable
from workbench.stack import Stack
from workbench.tasks import Task
from workbench.widgets.parts import PLAIN, SPACED, Panel, Picture, label, sentence, turn

__all__ = ["WeightExplorer", "loss_curve"]

MOST = 10  # sliders
REACH = 1.5  # LoraHub's bounds (arXiv 2307.13269)
GRID = tuple(i / 4 for i in range(-6, 7))
SPLITS = ("train", "validation", "test")


class WeightExplorer(Panel):
    """One slider per adapter; loss and exact match of Σ w ΔW on a few examples, beside the base's own.

        explorer = WeightExplorer(base, stack, task, weights=[0.5, 0.5])
        explorer.sliders["first-two-letters"].value = 0.8       # what moving it does
        explorer.adapter().save("out/by-hand")

    Releasing a slider scores the present weights, and 13 values of the moved one over its range, in one pass.
    """

    def __init__(
        self,
        base: Base,
        stack: Stack,
        task: Task,
        *,
        split: str = "validation",
        examples: int = 20,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
    ):
        """The first view scores the base and the start weights, no more.

        Args:
            examples: how many of the split's examples, from its beginning.
            weights: to start with, one per adapter, in order or by name; None is 1 for each.

        Raises:
            SelectionError: more than 10 adapters.
            TaskError: no such split, or no examples in it.
            MergeError: the wrong number of weights, or one outside −1.5 … 1.5.
            BaseError, AdapterError: adapters that do not fit the base, or one that a job of another control is using.
        """
        if len(stack) > MOST:
            raise SelectionError(
                f"{len(stack)} adapters need as many sliders, expected at most {MOST}; take some with stack.choose([…])"
            )
        if split not in SPLITS:
            raise TaskError(f"{task.name} has no split {split!r}; choose one of {', '.join(SPLITS)}")
        taken = getattr(task, split)[:examples] if examples > 0 else ()
        if not taken:
            raise TaskError(
                f"{task.name}: {examples} of {len(getattr(task, split))} {split} examples leave none to score"
            )
        start = stack.weights(weights)
        for name, weight in zip(stack.names, start.tolist(), strict=True):
            if abs(weight) > REACH:
                raise MergeError(f"the weight of {name} is {weight:g}, expected −{REACH} … {REACH}, a slider's range")
        self.base, self.task, self._stack, self._held = base, task, stack, stack.to(base.device)
        self._examples = encode_task(base, task, taken)
        self._what = f"{len(taken)} {split} {'example' if len(taken) == 1 else 'examples'} of {task.name}"
        self.sliders = {
            name: ipywidgets.FloatSlider(
                round(weight, 6),
                min=-REACH,
                max=REACH,
                step=0.05,
                description=label(name),
                tooltip=f"Weight of {printable(name, 200)}; scored when released",
                continuous_update=False,
                style={"description_width": "18em"},
                layout={"width": "98%"},
            )
            for name, weight in zip(stack.names, start.tolist(), strict=True)
        }
        self.numbers, self._code, self._caption = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._picture = Picture()
        super().__init__([*self.sliders.values(), self.numbers, self._code, self._caption, self._picture])
        with turn(base):
            self._base_scores = score(base, [self._examples])
        self._scores: Scores | None = None
        self._first()
        for name, slider in self.sliders.items():
            slider.observe(lambda _, name=name: self.attempt(lambda: self._moved(name), self._blank), "value")

    @property
    def weights(self) -> dict[str, float]:
        """Adapter → present weight."""
        return {name: round(slider.value, 6) for name, slider in self.sliders.items()}

    @property
    def code(self) -> str:
        """The line of code that makes the same merge, where the stack is called `stack`."""
        return f'wb.merge(stack, "sum", weights={self.weights!r})'

    def loss(self, weights: Mapping[str, float] | Sequence[float] | Tensor) -> float:
        """Mean loss (nats per answer token) on the examples under any weights; the sliders stay where they are.

        Raises:
            MergeError: the wrong number of weights, an unknown name, or a value that is not finite.
        """
        return float(self._score(self._stack.weights(weights)[None]).loss.mean())

    def adapter(self, name: str | None = None) -> Adapter:
        """The merge under the present weights, as one adapter of rank Σ r."""
        info = {"method": "weights by hand", "options": {}, "sources": self.weights, "task": self.task.name}
        info |= gathered(self._stack.names, self._stack.infos)
        return fold(self._stack, self._present(), name or f"by-hand-of-{len(self._stack)}", info)

    def __repr__(self) -> str:
        rows = [f"WeightExplorer: {self._what}"]
        rows += [f"{what}: loss {loss}, exact match {match}" for what, loss, match in self._rows()]
        return "\n".join([*rows, *([f"could not be computed: {self.error}"] if self.error else []), self.code])

    def _present(self) -> Tensor:
        return self._stack.weights(self.weights)

    def _score(self, candidates: Tensor) -> Scores:
        """Scores of candidates (C, N) side by side on the examples."""
        with turn(self.base):
            return score(self.base, [self._examples] * len(candidates), shared(self._held, candidates))

    def _first(self) -> None:
        self._scores = self._score(self._present()[None])
        self._tell()
        self._caption.value = sentence("Move a weight to see the loss over its range.")

    def _moved(self, name: str) -> None:
        present, i = self._present(), self._stack.index(name)
        candidates = present.repeat(1 + len(GRID), 1)
        candidates[1:, i] = torch.tensor(GRID)
        self._scores = self._score(candidates)
        self._tell()
        losses = self._scores.loss.mean(1).tolist()
        said = f"Loss over the weight of {name}, the others as they stand."
        if finite := [pair for pair in zip(losses[1:], GRID, strict=True) if math.isfinite(pair[0])]:
            said += " Lowest of the {} drawn: {:.3f} at {:g}.".format(len(GRID), *min(finite))
        self._caption.value = sentence(said)
        ours, base = (float(present[i]), losses[0]), float(self._base_scores.loss.mean())
        self._picture.show(loss_curve(GRID, losses[1:], ours, base, name), said)

    def _blank(self) -> None:
        self._scores = None
        self._tell()
        self._caption.value = ""
        self._picture.show(None)

    def _tell(self) -> None:
        cells = "".join(
            f"<tr><th scope='row' style='text-align:left'>{what}</th><td>{loss}</td><td>{match}</td></tr>"
            for what, loss, match in self._rows()
        )
        self.numbers.value = (
            f"<table role='status' {PLAIN} style='{SPACED}'>"
            f"<caption style='text-align:left'>{html.escape(self._what)}</caption>"
            "<tr><th></th><th scope='col'>loss (nats per answer token)</th><th scope='col'>exact match</th></tr>"
            f"{cells}</table>"
        )
        self._code.value = sentence(self.code, "code", "note")

    def _rows(self) -> list[tuple[str, str, str]]:
        """What, loss and exact match: of the present weights (dashes where they could not be scored), of the base."""
        rows = []
        for what, scores in (("these weights", self._scores), ("base alone", self._base_scores)):
            if scores is None:
                rows.append((what, "–", "–"))
                continue
            right, n = int(scores.match[0].sum()), scores.match.shape[1]
            rows.append((what, f"{float(scores.loss[0].mean()):.3f}", f"{right} of {n}"))
        return rows


def loss_curve(
    weights: Sequence[float], losses: Sequence[float], present: tuple[float, float], base: float, name: str
) -> Figure:
    """Loss as one adapter's weight varies, with the present (weight, loss) marked and the base's loss as a line."""
    figure = Figure(figsize=(5.4, 2.6))
    ax = figure.add_subplot()
    ax.plot(weights, losses, marker=".", label="this weight varied")
    ax.plot(*present, marker="o", linestyle="none", color="C3", label="present weight")
    ax.axhline(base, linestyle="--", linewidth=1, color="0.4", label="base alone")
    ax.set_xlabel(f"weight of {printable(name, 60)}", parse_math=False)
    ax.set_ylabel("loss (nats per token)")
    ax.legend(fontsize="small", frameon=False)
    return figure
