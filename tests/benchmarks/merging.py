"""Time and memory of every merging method: `python tests/benchmarks/merging.py`, a table in Markdown.

Each line is a process of its own. Memory is the most that was held above the loaded adapters: the process's peak on a
processor, the allocator's on a GPU. `--shape` times one module of that shape, of random adapters, instead of the bundled
pool (such as `--shape 4096x14336 --rank 16 --number 30 --device cuda`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch

import workbench as wb
from workbench.merge import collect, methods
from workbench.tasks import upstream


def peak(device: str) -> float:
    """MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_stack(shape: str, rank: int, number: int, device: str) -> wb.Stack:
    d_out, d_in = (int(n) for n in shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device) / size[-1] ** 0.5

    return wb.Stack.of(
        [wb.Adapter(f"a{i}", {"m": wb.Factors(normal(d_out, rank), normal(rank, d_in))}) for i in range(number)]
    )


def measure(name: str, args: argparse.Namespace) -> dict:
    """One merge, after one of two adapters that warms libraries up."""
    torch.set_num_threads(args.threads)
    options, record = {}, methods()[name]
    if args.shape:
        stack = random_stack(args.shape, args.rank, args.number, args.device)
    else:
        pool = wb.Pool.open("nano")
        stack = pool.stack(pool.names[: args.number]).to(args.device)
    if record.needs:
        if args.shape:
            return {"method": name, "skipped": f"needs {record.needs} of each adapter's examples"}
        base = wb.Base.load(pool.base)
        examples = upstream(stack.names, n=8)
        options["statistics"] = collect(base, stack, examples, gradients=record.needs == "gradients")
    if record.takes:
        stack = stack.choose(stack.names[: record.takes])
    wb.merge(stack.choose(stack.names[:2]), name, **options)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before, start = peak(args.device), time.perf_counter()
    update = wb.merge(stack, name, **options)
    seconds = time.perf_counter() - start
    found = {"method": name, "adapters": len(stack), "seconds": seconds, "MiB": peak(args.device) - before}
    return found | {"result": "dense" if record.dense else f"rank ≤ {update.rank}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=72, help="adapters")
    parser.add_argument("--shape", default="", help="d_out x d_in of one module of random adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default="", help="only this one, as JSON")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args.method, args)))
        return
    print("| method | adapters | seconds | MiB above the adapters | result |\n|---|---|---|---|---|")
    for name in methods():
        command = [sys.executable, *sys.argv, "--method", name]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} | | | |")
            continue
        row = json.loads(done.stdout)
        if "skipped" in row:
            print(f"| {name} | {row['skipped']} | | | |")
        else:
            print(
                f"| {name} | {row['adapters']} | {row['seconds']:.2f} | {row['MiB']:.0f} | {row['result']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
