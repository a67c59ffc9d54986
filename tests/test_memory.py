"""Peak memory of a pool that is read module by module, each measured in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT, NUMBER = Path(__file__).parent / "benchmarks" / "pool.py", 40


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The benchmark's small pool, with 2 and with 16 layers."""
    spec = importlib.util.spec_from_file_location("bench_pool", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = {}
    for layers in (2, 16):
        size, found[layers] = bench.SMALL | {"num_hidden_layers": layers}, tmp_path_factory.mktemp(f"layers{layers}")
        bench.base(found[layers] / "small" / "base", size)
        bench.write(found[layers] / "small" / "pool", size, NUMBER, values=True)
    return found


def grown(stage, home):
    """MiB that a stage held at most above what the imports did."""
    command = [sys.executable, SCRIPT, "--stage", stage, home, str(NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["merge", "gram"])
def test_memory_depends_on_a_module_not_on_the_pool(stage, homes):
    held = {layers: grown(stage, home) for layers, home in homes.items()}
    weights = sum(path.stat().st_size for path in homes[16].rglob("*.safetensors")) / 2**20
    assert weights > 300
    assert held[16] < weights / 4
    assert held[16] < held[2] + 20
