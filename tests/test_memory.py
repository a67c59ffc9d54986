"""Peak memory of a pool that is read module by module, measured in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT, NUMBER = Path(__file__).parent / "benchmarks" / "pool.py", 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The benchmark's small pool, with 16 layers."""
    spec = importlib.util.spec_from_file_location("bench_pool", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    folder = tmp_path_factory.mktemp("pool")
    size = bench.SMALL | {"num_hidden_layers": 16}
    bench.base(folder / "small" / "base", size)
    bench.write(folder / "small" / "pool", size, NUMBER, values=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["merge", "gram"])
def test_memory_is_of_a_few_modules_not_of_the_pool(stage, home):
    command = [sys.executable, SCRIPT, "--stage", stage, home, str(NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held = json.loads(done.stdout.splitlines()[-1])[1]  # MiB above what the process held at most before
    weights = sum(path.stat().st_size for path in home.rglob("*.safetensors")) / 2**20
    assert weights > 300
    assert held < weights / 4
