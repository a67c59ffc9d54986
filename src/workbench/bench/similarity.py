"""Who resembles whom: all pairs by Gram matrices of the factors, against one pair at a time; from files; close to a target."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from workbench import factored
from workbench.adapters import WEIGHTS, Adapter
from workbench.bench.measure import Line, Timing, timed
from workbench.bench.models import SCALES, random_adapters
from workbench.closeness import closeness
from workbench.singular import factored_svd
from workbench.source import Source
from workbench.stack import Stack, Units, cosine, gram

__all__ = ["lines", "random_units"]

AREA = "similarity"
OURS, STREAM = "Gram matrices", "Gram matrices, the factors made in between"
FACTORED, DENSE = "one pair after another, from the factors", "one pair after another, from dense ΔW"
PLAIN, LOADED, READ = "the files' bytes, read and dropped", "safetensors, each file to fp32", "a lazy stack's modules"
END_TO_END = "a lazy stack's Gram matrices, its opening included"
Shape = tuple[int, int]


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """All pairs of 10 to 960 adapters of rank 16 and 64, in bf16 on a GPU at 1B and 8B and in fp32 elsewhere.

    One module of each shape is timed and counts as often as the model has it; one line runs through all modules. Errors
    are the largest of a cosine, against the same factors multiplied in fp64.
    """
    gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if gpu and scale != "nano" else torch.float32
    shapes = SCALES[scale].shapes()
    most = 10**9 if gpu else 16_000  # units of a module
    numbers = (4, 9) if quick else (10, 30, 100, 300, 960)
    streamed = max(n for n in numbers if gpu or n <= 100)
    for rank in (2, 8) if quick else (16, 64):
        pairs = {way: _one_pair(way, Counter(shapes.values()), rank, device, dtype) for way in (DENSE, FACTORED)}
        for number in (n for n in numbers if n * rank <= most):
            through = shapes if number == streamed and rank in (2, 16) else None
            yield from _all_pairs(Counter(shapes.values()), number, rank, device, dtype, pairs, through)
    yield from _one_svd(next(iter(shapes.values())), 3 if quick else 30, 2 if quick else 16, device)
    yield from _to_a_target(shapes, 5 if quick else 100, 2 if quick else 16, device)
    yield from _from_files(shapes, 6 if quick else 100, 2 if quick else 16, device)


def random_units(
    shape: Shape, number: int, rank: int, device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> Units:
    """A module's units of so many adapters, made on the device, each ΔW with half of its square in common."""
    (d_out, d_in), R = shape, number * rank
    made = {"generator": torch.Generator(device).manual_seed(seed), "device": device, "dtype": dtype}
    B = torch.randn(d_out, R, **made).add_(torch.randn(d_out, rank, **made).repeat(1, number)).mul_(d_out**-0.5)
    A = torch.randn(R, d_in, **made).add_(torch.randn(rank, d_in, **made).repeat(number, 1)).mul_(d_in**-0.5)
    owner = torch.arange(number, device=device).repeat_interleave(rank)
    return Units(B, A, owner, torch.ones(R, device=device))


def _all_pairs(
    kinds: Mapping[Shape, int],
    number: int,
    rank: int,
    device: str,
    dtype: torch.dtype,
    pairs: Mapping[str, Timing],
    through: Mapping[str, Shape] | None,
) -> Iterator[Line]:
    """`pairs`: one pair's time over all modules; `through`: the modules to run through from first to last."""
    count, total = number * (number - 1) // 2, sum(kinds.values())
    work = f"all pairs of {number} adapters of rank {rank} in {total} modules"
    said = f"a pair timed in each of {len(kinds)} shapes, times {count:,}"
    each = sum(n * sum(shape) for shape, n in kinds.items())
    dense = sum(n * 4.0 * rank * d_out * d_in for (d_out, d_in), n in kinds.items())
    for way, operations in ((DENSE, dense), (FACTORED, 2.0 * rank**2 * each)):
        one = pairs[way]
        timing = Timing(one.seconds * count, one.spread, one.peak)
        yield Line(AREA, work, way, DENSE, timing, "pair", count, operations * count, note=said)
    parts, error = [], None
    long = torch.device(device).type == "cpu" and number * rank > 3000
    for shape, n in kinds.items():
        units = random_units(shape, number, rank, device, dtype)
        once = partial(gram, units, number)
        parts.append((timed(once, device, warm=int(not long), repeat=1 if long else 3), n))
        if error is None and number * rank <= 20_000 and not long:
            error = _error(units, number)
        del units, once
    done = float(each * _multiplied(number * rank, device))
    said = f"a module of each of {len(kinds)} shapes timed"
    grown = {"adapters": number, "rank": rank}
    yield Line(AREA, work, OURS, DENSE, _summed(parts), "pair", count, done, error=error, note=said, **grown)
    if through:
        timing = timed(lambda: _streamed(through, number, rank, device, dtype), device, warm=0, repeat=1)
        yield Line(AREA, work, STREAM, DENSE, timing, "pair", count, done)


def _multiplied(R: int, device: str | torch.device) -> float:
    """Operations on every row of the factors: two for each pair of units in the blocks that `gram` takes."""
    step = factored.BLOCK * (2 if torch.device(device).type == "cuda" else 1)
    return R**2 + (R // step) * step**2 + (R % step) ** 2


def _streamed(shapes: Mapping[str, Shape], number: int, rank: int, device: str, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(number, number, device=device)
    for seed, shape in enumerate(shapes.values()):
        total += gram(random_units(shape, number, rank, device, dtype, seed), number)
    return total


def _error(units: Units, number: int) -> float:
    """The largest error of a cosine, against fp64."""
    wide = Units(units.B.double(), units.A.double(), units.owner, units.scale)
    return float((cosine(gram(units, number)) - cosine(gram(wide, number))).abs().max())


def _one_pair(way: str, kinds: Mapping[Shape, int], rank: int, device: str, dtype: torch.dtype) -> Timing:
    parts = []
    for shape, n in kinds.items():
        units = random_units(shape, 2, rank, device, dtype)
        parts.append((timed(partial(WAYS[way], units.of(0), units.of(1)), device), n))
    return _summed(parts)


def dense_cosine(x: Units, y: Units) -> float:
    """As state dicts are compared: both ΔW, flat, in fp32."""
    flat = [(u.B.float() @ u.A.float()).flatten() for u in (x, y)]
    return float(cosine_similarity(*flat, dim=0))


def factored_cosine(x: Units, y: Units) -> float:
    """The same of the factors: three sums over r × r products."""

    def inner(u: Units, v: Units) -> Tensor:
        return ((u.B.T @ v.B).float() * (u.A @ v.A.T).float()).sum()

    return float(inner(x, y) / (inner(x, x) * inner(y, y)).sqrt())


WAYS: dict[str, Callable[[Units, Units], float]] = {DENSE: dense_cosine, FACTORED: factored_cosine}


def _summed(parts: list[tuple[Timing, int]]) -> Timing:
    """The time of all modules, given one module's and how many there are like it."""
    seconds = sum(timing.seconds * n for timing, n in parts)
    return Timing(seconds, max(timing.spread for timing, _ in parts), max(timing.peak for timing, _ in parts))


def _one_svd(shape: Shape, number: int, rank: int, device: str) -> Iterator[Line]:
    units = random_units(shape, number, rank, device, torch.float32)
    each = [(own.B.contiguous(), own.A.contiguous()) for own in (units.of(i) for i in range(number))]
    work, way = f"SVD of ΔW, {shape[0]} × {shape[1]} of rank {rank}", "SVD of the dense ΔW"
    ours, found = timed(lambda: [factored_svd(B, A) for B, A in each], device), []
    whole = each[0][0] @ each[0][1]
    dense = timed(lambda: found.append(torch.linalg.svd(whole, full_matrices=False)[1]), device, warm=0, repeat=1)
    yield Line(AREA, work, way, way, dense, "update", 1)
    error = float((factored_svd(*each[0])[1] - found[0][:rank]).abs().max() / found[0].max())
    yield Line(AREA, work, "SVD of the factors", way, ours, "update", number, error=error)


def _to_a_target(shapes: Mapping[str, Shape], number: int, rank: int, device: str) -> Iterator[Line]:
    """One module of each shape; factors in fp32, as they are read."""
    few = {module: shape for shape, module in {shape: module for module, shape in shapes.items()}.items()}
    *adapters, target = random_adapters(few, number + 1, rank, device=device)
    stack, way = Stack.of(adapters), "one adapter after another, from dense ΔW"
    some = adapters[: min(5, number)]
    for how in ("cosine", "clamp", "qfim"):
        work = f"{how} of {number} adapters of rank {rank} to a target in {len(few)} modules"
        took = timed(lambda: [dense_closeness(a, target, how) for a in some], device, repeat=1)  # noqa: B023
        scaled = Timing(took.seconds / len(some) * number, took.spread, took.peak)
        said = f"{len(some)} adapters timed"
        yield Line(AREA, work, way, way, scaled, "adapter", number, note=said)
        ours = timed(lambda: closeness(stack, target, how), device)  # noqa: B023
        want = torch.tensor([dense_closeness(a, target, how) for a in some])
        error = float((closeness(stack, target, how)[: len(some)].cpu() - want).abs().max())
        yield Line(AREA, work, "the stack at once", way, ours, "adapter", number, error=error)


def dense_closeness(adapter: Adapter, target: Adapter, how: str) -> float:
    """`workbench.closeness`'s pooled measures as they are defined, of adapters with the same modules."""
    inner = own = theirs = 0.0
    for module, factors in adapter.modules.items():
        x, t = factors.delta(), target.modules[module].delta()
        if how == "qfim":
            x, t = x.square(), t.square()
        product = x * t
        inner += float((product.clamp(min=0) if how == "clamp" else product).sum())
        own, theirs = own + float(x.square().sum()), theirs + float(t.square().sum())
    value = inner / (own * theirs) ** 0.5
    return value**0.5 if how == "qfim" else value


def _from_files(shapes: Mapping[str, Shape], number: int, rank: int, device: str) -> Iterator[Line]:
    """Files in bf16 that the system holds in memory, so that what is measured is not the disk."""
    with tempfile.TemporaryDirectory() as folder:
        folders = _written(Path(folder), shapes, number, rank, device)
        files = [path / WEIGHTS for path in folders]
        size = float(sum(file.stat().st_size for file in files))
        work = f"{number} adapters of rank {rank} in {len(shapes)} modules, from files of {size / number / 1e6:.1f} MB"

        def load() -> None:
            for file in files:
                for tensor in load_file(file, device=device).values():
                    tensor.float()

        def read() -> None:
            for _ in stack:
                pass

        stack, found = _opened(folders, device), []
        ways = {PLAIN: lambda: [len(file.read_bytes()) for file in files], LOADED: load, READ: read}
        for way, run in (ways | {END_TO_END: lambda: found.append(_opened(folders, device).gram())}).items():
            timing, error = timed(run, device, warm=int(way == PLAIN), repeat=2), None
            if way == END_TO_END:
                distinct = Stack.of([Adapter.load(path) for path in folders[:DISTINCT]]).gram().double()
                place = torch.arange(number) % len(distinct)
                error = float((cosine(found[-1]).cpu() - cosine(distinct[place][:, place])).abs().max())
            yield Line(AREA, work, way, PLAIN, timing, "adapter", number, traffic=size, error=error)


DISTINCT = 4  # adapters that are written; the others are copies


def _written(folder: Path, shapes: Mapping[str, Shape], number: int, rank: int, device: str) -> list[Path]:
    made = random_adapters(shapes, min(DISTINCT, number), rank, device=device)
    folders = [adapter.save(folder / f"a{i}", dtype=torch.bfloat16) for i, adapter in enumerate(made)]
    for i in range(len(folders), number):
        folders.append(Path(shutil.copytree(folders[i % DISTINCT], folder / f"a{i}")))
    return folders


def _opened(folders: list[Path], device: str) -> Stack:
    return Stack.of([Source(path) for path in folders]).to(device)
