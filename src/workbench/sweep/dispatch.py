"""Hands a sweep's runs out to workers, and keeps what they say of them.

Runs that share a task and a seed form a group, whose parts go to one worker as long as it has any left, since they share
selections and targets' own adapters; a worker without work takes over half of what another has left. The first worker of a
group looks which of its runs are stored. Rows are stored by the workers themselves: whatever dies, what had finished stays.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.results import Results
from workbench.sweep.hands import hands
from workbench.sweep.spec import Experiment, Run, Sweep
from workbench.sweep.work import BUSY, FAILED, MISSING, STORED, Outcome, carry_out, failure, identity, look

__all__ = ["Report", "run"]

AGAIN = 2.0  # seconds after which runs that another sweep holds are asked for again


@dataclass
class Report:
    """What became of a sweep: runs carried out, stored before (or by another meanwhile), failed, failed in an earlier sweep
    and not tried again, and left over where it was stopped; wall seconds; each failed run's label and error.
    """

    ran: int = 0
    stored: int = 0
    failed: int = 0
    failed_before: int = 0
    left: int = 0
    seconds: float = 0.0
    stopped: bool = False
    errors: list[tuple[str, str]] = field(default_factory=list)

    def text(self, folder: str | Path) -> str:
        """The whole in a sentence."""
        parts = [f"{self.ran} runs carried out in {self.seconds:.0f} s", f"{self.stored} stored before"]
        parts += [f"{self.failed} failed (workbench results ls {folder} --failed)"] * bool(self.failed)
        parts += [f"{self.failed_before} failed in an earlier sweep (--retry-failed)"] * bool(self.failed_before)
        parts += [f"stopped with {self.left} left; the same command goes on"] * self.stopped
        return ", ".join(parts)


def run(
    sweep: Sweep,
    *,
    results: str | Path | None = None,
    workers: int | None = None,
    scheduler: str = "",
    retry_failed: bool = False,
    threads: int = 1,
    stop: threading.Event | None = None,
    watch: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Carry out a sweep: skip what its results hold, run the rest, store a row for each.

    Interrupting it (Ctrl-C) lets the runs that have begun end and be stored, and a second time ends at once. The same call
    goes on where it stopped; several sweeps may share a folder of results, on several machines, and take turns by run.

    Args:
        results: the folder of results, instead of the sweep's own; a cluster's workers must see it, and the notebooks and
            pools, at the same paths.
        workers: processes on this machine; None: one a GPU or a core; 0: none, all in this process, one after the other.
        scheduler: the address of a Dask scheduler (tcp://host:8786) instead, whose workers are used.
        retry_failed: run what failed before once more.
        threads: of each worker's computations.
        stop: when it is set, the sweep stops as on Ctrl-C.
        watch: show a bar with the time left.
        say: called with a line for each failure.

    Raises:
        WorkbenchError: nothing can go on: results cannot be written, a pool or a base cannot be opened, or the cluster is
            lost. What has finished is stored.
    """
    folder = Path(results or sweep.results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stop, start = stop or threading.Event(), time.perf_counter()
    with _interrupts(stop, say), hands(workers, scheduler) as those, _bar(watch, sweep) as bar:
        report = _Dispatch(sweep, folder, threads, retry_failed, stop, bar, say).through(those)
    report.seconds = time.perf_counter() - start
    return report


class _Group:
    """Parts of runs that are best run by one worker; `known`: whether it has been looked which are stored."""

    def __init__(self, parts: Sequence[tuple[Run, ...]]):
        self.parts, self.known = deque(parts), False


def _groups(runs: Sequence[Run], together: int) -> list[_Group]:
    """Runs by what they share; a part is a recipe on up to `together` tasks and seeds, side by side."""
    kinds: dict = {}
    for one in runs:
        if isinstance(one, Experiment):
            shared = (one.pool, one.opening, one.base, one.load, one.n_train, one.n_validation, one.n_test)
            case = (one.task, one.folder, one.seed, one.draw)
            kinds.setdefault(shared, {}).setdefault(case, []).append(one)
        else:
            kinds[one] = {one: [one]}
    groups = []
    for cases in kinds.values():
        cases = list(cases.values())
        for i in range(0, len(cases), together):
            parts: dict = {}
            for one in (one for case in cases[i : i + together] for one in case):
                parts.setdefault(getattr(one, "recipe", one), []).append(one)
            groups.append(_Group([tuple(part) for part in parts.values()]))
    return groups


class _Dispatch:
    """One sweep under way."""

    def __init__(self, sweep: Sweep, folder: Path, threads: int, retry_failed: bool, stop, bar, say):
        self.folder, self.threads, self.stop, self.bar, self.say = folder, threads, stop, bar, say or (lambda _: None)
        self.store, self.report = Results(folder), Report()
        failures = self.store.failures()
        before = set() if retry_failed or failures.empty else set(failures["asked"])
        wanted = [one for one in sweep.runs if identity(one) not in before]
        self.report.failed_before = len(sweep.runs) - len(wanted)
        self.waiting = deque(_groups(wanted, sweep.together))
        self.own: dict[str, _Group] = {}  # worker → the group that it works through
        self.busy: deque[tuple[float, tuple[Run, ...]]] = deque()  # when to ask again, and for what
        self.under_way: dict[str, tuple] = {}  # worker → what it was given
        bar.total = len(wanted)
        bar.refresh()

    def through(self, hands) -> Report:
        while True:
            if not self.stop.is_set():
                for worker in hands.idle(set(self.under_way)):
                    if (given := self._next(worker)) is not None:
                        self.under_way[worker] = given
                        hands.give(
                            worker, given[0], *given[1:], self.folder, *([self.threads] * (given[0] is carry_out))
                        )
            if not self.under_way and (self.stop.is_set() or not self._left()):
                break
            for worker, found in hands.finished(1.0):
                self._took(worker, *self.under_way.pop(worker), found)
        self.report.left, self.report.stopped = self._left(), self.stop.is_set() and self._left() > 0
        return self.report

    def _left(self) -> int:
        groups = [*self.waiting, *{id(group): group for group in self.own.values()}.values()]
        return sum(len(part) for group in groups for part in group.parts) + sum(len(part) for _, part in self.busy)

    def _next(self, worker: str) -> tuple | None:
        """What a worker does next: a part of its own group, a new group to look at, half of another's, or what was busy."""
        group = self.own.get(worker)
        if group is not None and group.known and group.parts:
            return carry_out, group.parts.popleft()
        if self.waiting:
            group = self.own[worker] = self.waiting.popleft()
            return look, tuple(one for part in group.parts for one in part)
        richest = max((g for g in self.own.values() if g.known), key=lambda g: len(g.parts), default=None)
        if richest is not None and richest.parts:
            mine = self.own[worker] = _Group([richest.parts.pop() for _ in range((len(richest.parts) + 1) // 2)][::-1])
            mine.known = True
            return carry_out, mine.parts.popleft()
        if self.busy and self.busy[0][0] <= time.monotonic():
            return carry_out, self.busy.popleft()[1]
        return None

    def _took(self, worker: str, work, runs: tuple[Run, ...], found) -> None:
        """Keep what a worker says of the runs it was given."""
        if isinstance(found, BaseException):
            found = self._died(work, runs, found)
        if fatal := next((one for one in found if one.fatal), None):
            done = f"{self.report.ran} runs are stored" if self.report.ran else "nothing was run"
            raise WorkbenchError(f"{fatal.error}; {done}: put it right, and the same command goes on from there")
        if work is look:
            stored = {one for one, outcome in zip(runs, found, strict=True) if outcome.status == STORED}
            group = self.own[worker]
            left = (tuple(one for one in part if one not in stored) for part in group.parts)
            group.parts, group.known = deque(part for part in left if part), True
            self._count(STORED, len(stored))
            return
        busy = tuple(one for one, outcome in zip(runs, found, strict=True) if outcome.status == BUSY)
        if busy:
            self.busy.append((time.monotonic() + AGAIN, busy))
        for one, outcome in zip(runs, found, strict=True):
            if outcome.status != BUSY:
                self._count(outcome.status)
            if outcome.status == FAILED:
                self.report.errors.append((one.label, outcome.error))
                self.say(f"failed: {one.label}: {outcome.error}")

    def _count(self, status: str, number: int = 1) -> None:
        setattr(self.report, status, getattr(self.report, status) + number)  # both name it alike
        counts = [f"{count} {name}" for name in (STORED, FAILED) if (count := getattr(self.report, name))]
        self.bar.set_postfix_str(", ".join(counts), refresh=False)
        if status == STORED:  # took no time, so the time left is reckoned without it
            self.bar.total -= number
            self.bar.refresh()
        else:
            self.bar.update(number)

    def _died(self, work, runs: tuple[Run, ...], error: BaseException) -> list[Outcome]:
        """Outcomes of runs whose worker died under them, more than once."""
        if work is look:
            return [Outcome(MISSING)] * len(runs)
        killed = type(error).__name__ == "KilledWorker"
        line = (
            "the workers that ran it died, one after the other; killed, perhaps for want of memory"
            if killed
            else f"{type(error).__name__}: {error}"
        )
        for one in runs:
            self.store.fail(identity(one), failure(one, line, str(error)))
        return [Outcome(FAILED, error=line)] * len(runs)


@contextmanager
def _bar(visible: bool, sweep: Sweep):
    from tqdm import tqdm

    with tqdm(total=len(sweep.runs), desc=sweep.name, unit="run", disable=not visible) as bar:
        yield bar


@contextmanager
def _interrupts(stop: threading.Event, say) -> Iterator[None]:
    """Ctrl-C sets `stop`, a second one interrupts; in a thread beside the main one it is left to others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(*_) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if say:
            say("stopping when the runs that have begun have ended; press Ctrl-C again to end at once")

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
