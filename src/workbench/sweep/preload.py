"""What a Dask worker does first: `dask worker … --preload workbench.sweep.preload`."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

__all__ = ["dask_setup"]


def dask_setup(worker) -> None:
    """Leave Ctrl-C to the process that hands out the runs, which lets those begun end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next tensors.

    Dask's nannies have it handed back at once (MALLOC_TRIM_THRESHOLD_), which here cost a third of the time in page faults.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its largest
    mallopt(-1, 512 * 2**20)  # M_TRIM_THRESHOLD
