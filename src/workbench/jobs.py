"""Jobs one after the other or several at once, with a line on each in their order; a failure does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial

__all__ = ["each"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def each(jobs: Mapping[str, Callable[[], None]], at_once: int = 1, *, preload: Sequence[str] = ()) -> dict[str, str]:
    """Call each job, printing its name, seconds and outcome; name → last line of the error of those that failed.

        each({"a": partial(execute, a), "b": partial(execute, b)}, at_once=2)

    Args:
        at_once: how many run at the same time; with 2 or more in processes beside this one, to which jobs must be
            picklable. Lines come in the order of the jobs all the same, each when its job and those before have ended.
        preload: modules that all jobs need, which are then imported once and not in each process.
    """
    if at_once <= 1:
        return _told({name: partial(_outcome, job) for name, job in jobs.items()})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(at_once, len(jobs) or 1), context, initializer=_end_with_parent)
    try:
        return _told({name: pool.submit(_outcome, job).result for name, job in jobs.items()})
    except BaseException:  # interrupted: a job handed to a process by now cannot be cancelled
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _told(outcomes: Mapping[str, Callable[[], tuple[float, str]]]) -> dict[str, str]:
    failed = {}
    for name, outcome in outcomes.items():
        print(f"{name} …", end=" ", flush=True)
        start = time.perf_counter()
        try:
            seconds, line = outcome()
        except BrokenExecutor as error:  # which ends all that have not ended
            seconds, line = time.perf_counter() - start, str(error)
        print(f"{seconds:.0f} s {f'failed: {line}' if line else 'ok'}", flush=True)
        failed |= {name: line} if line else {}
    return failed


def _outcome(job: Callable[[], None]) -> tuple[float, str]:
    """Seconds that a job took, and the last line of its error; "" where there was none."""
    start, line = time.perf_counter(), ""
    try:
        job()
    except Exception as error:
        lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
        line = lines[0 if isinstance(error, TimeoutError) else -1] if lines else type(error).__name__
    return time.perf_counter() - start, line


def _end_with_parent() -> None:
    """Let this process end when the one that gives it work is killed; the kernels that it started then end too."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
