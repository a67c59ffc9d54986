"""Who computes which run, where several sweeps share one folder: claims, renewed while their holders live.

A claim is a file, `claims/<key>.<n>`, which whoever creates it holds. Its holder touches it every few seconds; one whose
process is gone (on the same machine) or that has not been touched for a minute (on another) is dead, and whoever creates
`<key>.<n + 1>` holds the run then. Works on any file system that creates a file for one of two processes only.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from functools import cache
from pathlib import Path

import psutil

__all__ = ["Claims"]

BEAT, PATIENCE = 5.0, 60.0  # seconds between two touches, and after which an untouched claim of another machine is dead


@cache
def _here() -> str:
    """What processes that can see each other's numbers have in common: the machine, since its start, and the namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux
        boot, space = str(int(psutil.boot_time())), 0
    return f"{platform.node()} {boot} {space}"


class Claims:
    """The claims of one process on the runs of a results folder; close it, or use it as a context, to give all up."""

    def __init__(self, folder: str | Path, *, beat: float = BEAT, patience: float = PATIENCE):
        self.folder, self.beat, self.patience = Path(folder) / "claims", beat, patience
        self._held: dict[str, Path] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def take(self, key: str) -> bool:
        """Take a run that no living process holds; false where one does.

        Whoever has taken a run looks once more whether its result is stored: another may have finished it in between.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        others = sorted(self.folder.glob(f"{key}.*"), key=_number)
        if others and not self._dead(others[-1]):
            return False
        number = _number(others[-1]) + 1 if others else 0
        path = self.folder / f"{key}.{number}"
        try:
            with path.open("x") as file:
                json.dump({"where": _here(), "pid": os.getpid(), "started": psutil.Process().create_time()}, file)
        except FileExistsError:
            return False
        for other in others:
            other.unlink(missing_ok=True)
        with self._lock:
            self._held[key] = path
            if self._heart is None:
                self._heart = threading.Thread(target=self._live, daemon=True, name="claims")
                self._heart.start()
        return True

    def release(self, key: str) -> None:
        """Give up a run, finished or not."""
        with self._lock:
            path = self._held.pop(key, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up all."""
        self._closed.set()
        for key in list(self._held):
            self.release(key)

    def _live(self) -> None:
        while not self._closed.wait(self.beat):
            with self._lock:
                paths = list(self._held.values())
            for path in paths:
                try:
                    os.utime(path)
                except OSError:  # taken over by one who thought us dead, or a file system that is away for a while
                    continue

    def _dead(self, path: Path) -> bool:
        try:
            text, touched = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:  # given up just now: the result may be there, so whoever asks looks again
            return False
        try:
            facts = json.loads(text)
        except ValueError:  # being written, or its writer was killed in the middle
            facts = {}
        if facts.get("where") == _here():
            try:
                return psutil.Process(facts["pid"]).create_time() != facts["started"]
            except psutil.NoSuchProcess:
                return True
        return self._now() - touched > self.patience

    def _now(self) -> float:
        """The time by the clock of the file system, which need not be this machine's."""
        probe = self.folder / f".{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)


def _number(path: Path) -> int:
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else -1
