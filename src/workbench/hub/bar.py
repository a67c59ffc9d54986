"""How far a survey has come, as a bar with the time left."""

from __future__ import annotations

from threading import Lock

__all__ = ["Bar"]


class Bar:
    """A bar over adapters, or over bytes where their number is known, with the time left; any thread may move it."""

    def __init__(self, what: str, count: int, size: int, visible: bool):
        from tqdm import tqdm

        unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1000} if size else {"unit": " adapters"}
        self._bar = tqdm(total=size or count, desc=what, disable=not visible, leave=False, **unit)
        self._size, self._count, self._done, self._lock = size, count, 0, Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def told(self, count: int) -> None:
        """So many bytes have come."""
        if self._size:
            with self._lock:
                self._bar.update(count)

    def step(self) -> None:
        """One adapter more is done."""
        with self._lock:
            self._done += 1
            if self._size:
                self._bar.set_postfix_str(f"{self._done} of {self._count} adapters")
            else:
                self._bar.update(1)
