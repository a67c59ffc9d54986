"""What a Dask worker does first: `dask worker … --preload workbench.sweep.preload`."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["dask_setup"]


def dask_setup(worker) -> None:
    """Leave Ctrl-C to the process that hands out the runs, which lets those begun end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
