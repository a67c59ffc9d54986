"""Long work of a control: in a thread beside the kernel's own, with progress and a button that stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ipywidgets

from workbench.widgets.parts import label

__all__ = ["Job", "Tell", "Work"]

Tell = Callable[..., bool]
Job = Callable[[Tell], None]


class Work(ipywidgets.HBox):
    """A bar, a line of words and a stop button, shown while a job runs. One job at a time: a new one ends the old one.

        def job(tell):
            for i, k in enumerate(ks):
                if tell(i, len(ks), f"k = {k}"):
                    return                       # stopped; what was shown so far stays
                curve.add(k, accuracy(k))

        work.start(job, ended=panel.told)

    The kernel stays free for other cells and for the stop button, which only asks: the job ends where it next tells.
    `tell(done, total, words)` may be given as `watch` to what fits (the loss is then its third argument).
    """

    def __init__(self):
        self._bar = ipywidgets.IntProgress(0, 0, 1, layout={"width": "16em"})
        self._words = ipywidgets.Label()
        self._stop = ipywidgets.Button(description="Stop", tooltip="End what is being computed; what is shown stays")
        self._stop.on_click(lambda _: self.stop())
        self._thread: threading.Thread | None = None
        self._asked: threading.Event | None = None
        self.stopped = False
        super().__init__([self._bar, self._stop, self._words], layout={"display": "none", "flex_flow": "row wrap"})

    @property
    def running(self) -> bool:
        """Whether a job has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Job, ended: Callable[[Exception | None], None] = lambda error: None) -> None:
        """Run a job in a thread of its own, after the present one, which is asked to stop.

        Args:
            job: called with `tell`.
            ended: called in that thread when the job has ended, with what it raised, or None. Not called for a job that
                a newer one was started in place of.
        """
        self.stop()
        before, asked = self._thread, threading.Event()
        self._asked = asked

        def run() -> None:
            if before is not None:
                before.join()
            if self._asked is not asked:  # a newer job waits already
                return
            self.stopped = False
            self._show(0, 1, "working …")
            error = None
            try:
                job(lambda done, total, words="": self._told(asked, done, total, words))
            except Exception as caught:
                error = caught
            if self._asked is asked:
                self.stopped = asked.is_set()
                self.layout.display = "none"
                ended(error)

        self._thread = threading.Thread(target=run, name="workbench", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the present job to end; it does where it next tells how far it is."""
        if self.running:
            self._asked.set()
            self._words.value = "stopping …"

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the present job; whether it has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.running

    def _told(self, asked: threading.Event, done: int, total: int, words: object) -> bool:
        if not asked.is_set():
            self._show(done, total, f"loss {words:.3f}" if isinstance(words, float) else str(words))
        return asked.is_set()

    def _show(self, done: int, total: int, words: str) -> None:
        with self._bar.hold_sync():
            self._bar.max, self._bar.value = max(1, total), done
        self._bar.tooltip = f"{done} of {total}"
        self._words.value = label(f"{words} ({done} of {total})", 200)
        self.layout.display = "flex"
