"""A progress bar for one fit, which an interruption ends with the best so far instead of nothing."""

from __future__ import annotations

import signal
import threading

__all__ = ["Bar"]


class Bar:
    """`watch` of a fit: draws a bar; while open, the first interruption (■ in a notebook, Ctrl-C) ends the fit at its step.

    A second interruption raises KeyboardInterrupt as ever. Outside the main thread interruptions are left alone. `step` and
    `steps` say how far the fit came, and of how much; `shown=False` draws nothing.
    """

    def __init__(self, name: str, *, shown: bool = True):
        self.name, self.stopped, self.step, self.steps = name, False, 0, 0
        self._shown, self._bar, self._before = shown, None, None

    def __enter__(self) -> Bar:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __call__(self, step: int, steps: int, loss: float) -> bool:
        from tqdm.auto import tqdm

        self.step, self.steps = step, steps
        if not self._shown:
            return self.stopped
        if self._bar is None:
            self._bar = tqdm(total=steps, desc=self.name, unit="step")
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        return self.stopped

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
