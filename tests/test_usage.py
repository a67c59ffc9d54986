"""The most memory held, and what a device is called."""

import mmap
import platform
import sys

import pytest
import torch

from workbench import usage
from workbench.usage import Peak, device_name

MIB = 2**20


def touch(mib):
    """Hold so many MiB for a moment, past the allocator, which may keep what is freed for the next."""
    with mmap.mmap(-1, mib * MIB) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="the record of memory is reset in /proc")
def test_the_peak_is_of_what_was_held_meanwhile():
    touch(128)
    peak = Peak("cpu")
    if not peak.exact:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert peak.rise < 32 * MIB
    touch(64)
    assert 60 * MIB < peak.rise < 96 * MIB
    assert peak.highest >= 60 * MIB
    assert Peak("cpu").rise < 32 * MIB


def test_where_the_record_cannot_be_reset_the_whole_process_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "_PROCESS", tmp_path / "nowhere")
    peak = Peak("cpu")
    assert not peak.exact
    held = bytearray(int(1.2 * peak.highest))
    assert peak.rise > 0.1 * len(held)
    del held


def test_names_of_devices(monkeypatch):
    name = device_name("cpu")
    assert name
    assert name == device_name(torch.device("cpu"))
    if sys.platform == "linux" and platform.machine() == "x86_64":
        with open("/proc/cpuinfo") as file:
            assert f": {name}\n" in file.read()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name("cuda:1") == "GPU 1"
    device_name.cache_clear()
