"""Who carries runs out: this process, one after the other, or the workers of a Dask cluster."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

from workbench.errors import WorkbenchError
from workbench.sweep.cluster import agreeing, connected

__all__ = ["Here", "There", "hands"]

PAUSE = 0.5  # seconds that this process waits where nothing is to be done
LOST = 15.0  # seconds without its scheduler after which a client gives up
# What a client raises without its scheduler, by what it is about: OSError, CancelledError, ClosedClientError, ValueError, ...
_AWAY = (Exception, asyncio.CancelledError)


class Here:
    """This process as the one worker."""

    def __init__(self):
        self._found: list = []

    def idle(self, working: set[str]) -> list[str]:
        """Workers that have nothing to do."""
        return [] if working else ["here"]

    def give(self, worker: str, work, *arguments) -> None:
        """Have a worker call `work`."""
        self._found.append((worker, work(*arguments)))

    def finished(self, patience: float) -> Iterator[tuple[str, object]]:
        """(worker, what it returned or raised) of calls that have ended, waiting for so many seconds at most."""
        if not self._found:
            time.sleep(min(patience, PAUSE))
        while self._found:
            yield self._found.pop()


class There:
    """The workers of a Dask cluster; a future whose worker dies is given to another by the scheduler."""

    def __init__(self, client, scheduler: str):
        self.client, self.scheduler, self.lost = client, scheduler, None
        self._done: queue.Queue = queue.Queue()
        self._futures: dict = {}
        self._seen: set[str] = set()  # workers that have this version of the code

    def idle(self, working: set[str]) -> list[str]:
        if self.client.status != "running":  # for how long, `finished` sees
            return []
        try:
            there = list(self.client.nthreads())
            if self.scheduler and (new := [address for address in there if address not in self._seen]):
                agreeing(self.client, new)  # of those, too, whose jobs wait in a queue at first
                self._seen.update(new)
            return [address for address in there if address not in working]
        except WorkbenchError:
            raise
        except _AWAY:
            return []

    def give(self, worker: str, work, *arguments) -> None:
        with self._reached():
            future = self.client.submit(work, *arguments, workers=[worker], allow_other_workers=True, pure=False)
        self._futures[worker] = future
        future.add_done_callback(lambda future, worker=worker: self._done.put((worker, future)))

    def finished(self, patience: float) -> Iterator[tuple[str, object]]:
        self._look_out()
        try:
            worker, future = self._done.get(timeout=patience)
        except queue.Empty:
            return
        del self._futures[worker]
        if future.status in ("cancelled", "lost"):
            raise WorkbenchError(self._gone())
        with self._reached():  # what a run raises is told in its outcome
            error = future.exception()
            found = future.result() if error is None else error
            if isinstance(error, OSError):
                raise error
        yield worker, found

    def _look_out(self) -> None:
        if self.client.status == "running":
            self.lost = None
            return
        self.lost = self.lost or time.monotonic()
        if time.monotonic() - self.lost > LOST or self.client.status == "closed":
            raise WorkbenchError(self._gone())

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """What fails within fails for want of the scheduler."""
        try:
            yield
        except _AWAY as error:
            raise WorkbenchError(f"{self._gone()} ({type(error).__name__}: {error})") from error

    def _gone(self) -> str:
        where = f" at {self.scheduler}" if self.scheduler else ""
        return f"the scheduler{where} is gone; what has finished is stored, and the same command goes on from there"


@contextmanager
def hands(workers: int | None, scheduler: str) -> Iterator[Here | There]:
    """This process where `workers` is 0, or the workers of a cluster; see `cluster.connected`."""
    if workers == 0 and not scheduler:
        yield Here()
        return
    with connected(workers, scheduler) as client:
        yield There(client, scheduler)
