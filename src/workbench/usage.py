"""What a computation uses: the name of its device, and the most memory that was held."""

from __future__ import annotations

import platform
import re
import resource
import sys
from functools import cache
from pathlib import Path

import torch

__all__ = ["Peak", "default_device", "device_name"]

_PROCESS = Path("/proc/self")


def default_device() -> str:
    """The kind of device that is computed on where none is named: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class Peak:
    """The most memory held from when this was made until it is asked, in bytes.

    Of a GPU, what PyTorch's allocator held. Of a processor, the process's resident set; its record is reset in
    /proc/self/clear_refs on Linux. Where that cannot be done, the process's peak since its start stands for both ends, so
    that a rise below an earlier peak counts as 0 (`exact` is false). One at a time in a process: each new one resets the record.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.exact = _reset()
            self.before = _resident("VmRSS") if self.exact else _largest()

    @property
    def highest(self) -> int:
        """Bytes held at most, with what was held before."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM") if self.exact else _largest()

    @property
    def rise(self) -> int:
        """Bytes held at most above what was held before."""
        return max(0, self.highest - self.before)


def _reset() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return _resident("VmHWM") > 0
    except OSError:
        return False


def _resident(what: str) -> int:
    found = re.search(rf"^{what}:\s*(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
