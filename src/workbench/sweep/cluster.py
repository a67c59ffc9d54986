"""Where runs are carried out: workers of a Dask cluster, on this machine or elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from workbench.errors import WorkbenchError
from workbench.results import provenance

__all__ = ["agreeing", "connected", "default_workers"]

PRELOAD = "workbench.sweep.preload"
# What Dask does beside the runs, and that costs them: nannies hand this on to their workers.
QUIET = {
    "distributed.worker.profile.enabled": False,  # it samples the computing thread a hundred times a second
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
}
STARTING = 600.0  # seconds that local workers may take to start, on a machine that is busy with other things


def default_workers() -> int:
    """One worker a GPU; without a GPU one a core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return torch.cuda.device_count() or cores or 1


@contextmanager
def connected(workers: int | None = None, scheduler: str = "", *, patience: float = 60.0) -> Iterator:
    """A Dask client: of a local cluster of so many workers, or of a scheduler elsewhere.

    A local worker is a process of one thread, watched by a nanny that starts another where it dies. Where there are GPUs,
    each worker sees one of them, in turn (CUDA_VISIBLE_DEVICES); Dask's own memory limit is off, since it knows nothing of
    what a model needs.

    Raises:
        WorkbenchError: Dask is not installed, nobody answers at the scheduler's address, or it has no workers.
    """
    try:
        import dask
        from distributed import Client, Nanny, Scheduler, SpecCluster
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise WorkbenchError(
            "a sweep over several workers needs Dask: pip install 'workbench[cluster]'; or run it with --workers 0, one run after the other"
        ) from error
    spawned = dask.config.get("distributed.nanny.pre-spawn-environ", {}) | {"DASK_LOGGING__DISTRIBUTED": "critical"}
    ours = QUIET | {
        "distributed.nanny.pre-spawn-environ": spawned,
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.work-stealing": False,
    }
    with dask.config.set(ours), silence_logging_cmgr(logging.CRITICAL):
        if scheduler:
            try:
                client = Client(scheduler, timeout=patience, set_as_default=False)
            except (OSError, TimeoutError, ValueError) as error:
                raise WorkbenchError(
                    f"no scheduler answers at {scheduler}: {error}; start one with `dask scheduler`"
                ) from error
            with client:
                _staffed(client, scheduler, patience)
                yield client
            return
        gpus, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        options = {"nthreads": 1, "memory_limit": 0, "preload": [PRELOAD], "dashboard": False}
        specs = {
            i: {"cls": Nanny, "options": options | ({"env": {"CUDA_VISIBLE_DEVICES": names[i % gpus]}} if gpus else {})}
            for i in range(workers or default_workers())
        }
        served = {
            "cls": Scheduler,
            "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"},
        }
        with (
            SpecCluster(workers=specs, scheduler=served, silence_logs=False) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.wait_for_workers(len(specs), timeout=STARTING)
            yield client


def _staffed(client, scheduler: str, patience: float) -> None:
    """Wait for a first worker."""
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as error:
        raise WorkbenchError(
            f"the scheduler at {scheduler} has no workers after {patience:.0f} s; start some with `dask worker {scheduler} "
            f"--nthreads 1 --preload {PRELOAD}`"
        ) from error


def agreeing(client, workers: Sequence[str]) -> None:
    """See that workers have this process's version of the code.

    Raises:
        WorkbenchError: one has not; rows of one sweep would not compare.
    """
    ours = provenance()
    for address, theirs in client.run(provenance, workers=workers).items():
        if (theirs["versions"], theirs["commit"]) != (ours["versions"], ours["commit"]):
            raise WorkbenchError(
                f"the worker at {address} runs {theirs['versions']} at commit {theirs['commit'] or 'unknown'}, this process "
                f"{ours['versions']} at {ours['commit'] or 'unknown'}; update one of them, or rows of one sweep would not compare"
            )
