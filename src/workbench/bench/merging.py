"""Every merging method over a whole model, beside peft's merging, dense SVDs and scikit-learn's k-means."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench.adapters import WEIGHTS, Adapter
from workbench.bench.measure import Line, Timing, timed
from workbench.bench.models import SCALES, random_adapters
from workbench.merge import collect, merge, methods
from workbench.merge.elementwise import threshold
from workbench.merge.lego import cluster, features
from workbench.source import Source
from workbench.stack import Stack

__all__ = ["lines"]

Shape = tuple[int, int]
GROWING = ("sum", "average", "ties", "tsv", "lego")
EXACT = ("slerp", "svd", "tsv", "iso_c", "iso_cts", "knots_ties", "core")  # what fp32 does to them is stated


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """Merges of 30 adapters of rank 16 on random weights, at nano scale of the bundled pool.

    From 1B on one module of each shape is merged, and its time multiplied by how many modules have the shape. Methods that
    look at each adapter's examples run at nano scale only. The other ways are timed on one module of the largest shape and
    multiplied by the model's entries over that module's.
    """
    shapes = Counter(SCALES[scale].shapes().values())
    largest = max(shapes, key=math.prod)
    dtype = torch.bfloat16 if torch.device(device).type != "cpu" else torch.float32
    number, rank, repeat = (3, 4, 1) if quick else (30, 16, 3)

    def stack(shape: Shape, number: int = number, rank: int = rank, dtype: torch.dtype = dtype) -> Stack:
        return Stack.of(random_adapters({"m": shape}, number, rank, device=device, dtype=dtype))

    if scale == "nano":
        yield from _bundled(device, number if quick else None, repeat)
    else:
        yield from _whole(shapes, stack, device)
    whole = sum(math.prod(shape) * count for shape, count in shapes.items()) / math.prod(largest)
    yield from _others(stack(largest), whole, device, starts=1 if quick else 4)
    yield from _files(scale, number, rank, 1 if quick else 2, device, repeat)
    numbers, ranks = ((2, 3), (2, 4)) if quick else ((10, 30, 100, 300, 960), (4, 16, 64))
    for name in GROWING:
        words = f"{name}, one module of {largest[0]}×{largest[1]}"
        for n in numbers:
            work = f"{words}, adapters of rank {rank}"
            yield _grown(name, work, "adapters", n, numbers[0], stack(largest, n), device)
        for r in ranks:
            work = f"{words}, {number} adapters"
            yield _grown(name, work, "rank", r, ranks[0], stack(largest, rank=r), device)


def _line(work: str, way: str, timing: Timing, against: str = "ours", **more) -> Line:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Line("merging", work, way, against, timing, **more)


def _bundled(device: str, number: int | None, repeat: int) -> Iterator[Line]:
    """All methods over the bundled pool, those that need statistics too."""
    from workbench.base import Base
    from workbench.pool import Pool
    from workbench.tasks import upstream

    pool = Pool.open("nano")
    stack = pool.stack(pool.names[:number]).to(device)
    if number:
        stack = replace(stack, modules=dict(list(stack)[:4]))
    base, examples = Base.load(pool.base), upstream(stack.names, n=2 if number else 8)
    known = {
        "": {},
        "inputs": {"statistics": collect(base, stack, examples)},
        "gradients": {"statistics": collect(base, stack, examples, gradients=True)},
    }
    modules = len(stack.modules)
    for name, record in methods().items():
        some = stack.choose(stack.names[: record.takes]) if record.takes else stack
        run = partial(merge, some, name, **known[record.needs])
        timing = timed(run, device, repeat=repeat)
        work = f"{name}: the bundled pool's {len(some)} adapters, {modules} modules"
        yield _line(work, "ours", timing, unit="module", per=modules)


def _whole(shapes: Counter, stack: Callable[..., Stack], device: str) -> Iterator[Line]:
    """All methods that need no statistics, over as many modules as the model has."""
    modules, narrow = shapes.total(), min(shapes, key=math.prod)
    for name, record in methods().items():
        if record.needs or name == "cat":  # which is `sum`
            continue
        seconds, spread, peak, products = 0.0, 1.0, 0, 0.0
        for shape, count in shapes.items():
            some = stack(shape) if record.takes is None else stack(shape, record.takes)
            timing = timed(partial(merge, some, name), device, repeat=2)
            seconds, spread = seconds + count * timing.seconds, max(spread, timing.spread)
            peak = max(peak, timing.peak)
            products += count * 2 * len(some.modules["m"]) * math.prod(shape)
        error = _rounding(stack(narrow, record.takes or 3), name) if name in EXACT else None
        note = f"one module of each of {len(shapes)} shapes, times their number; the result in main memory"
        note += "; error: of three adapters, against fp64" if error is not None else ""
        work = f"{name}: {len(some)} adapters, {modules} modules"
        timing = Timing(seconds, spread, peak)
        operations = products if record.dense else None  # of B A alone
        yield _line(work, "ours", timing, unit="module", per=modules, operations=operations, error=error, note=note)


def _rounding(stack: Stack, name: str) -> float:
    """‖ΔW − ΔW of the same method in fp64‖ / ‖ΔW‖; of few adapters, since a GPU's SVD in fp64 takes its time."""
    exact = [
        Adapter(name, {m: type(f)(f.B.double(), f.A.double()) for m, f in stack.adapter(name).modules.items()})
        for name in stack.names
    ]
    got, want = (_delta(merge(some, name)) for some in (stack, exact))
    return float((got.double() - want).norm() / want.norm())


def _delta(update) -> Tensor:
    found = update.modules["m"]
    return found if isinstance(found, Tensor) else found.delta()


def _grown(name: str, work: str, what: str, size: int, first: int, stack: Stack, device: str) -> Line:
    timing = timed(lambda: merge(stack, name), device, repeat=1)
    way, against = (f"{n} adapters" if what == "adapters" else f"rank {n}" for n in (size, first))
    return _line(work, way, timing, against, unit="adapter", per=len(stack), **{what: size})


# The other ways -----------------------------------------------------------------------------------------------------


def _others(stack: Stack, whole: float, device: str, starts: int) -> Iterator[Line]:
    """One module's merges by other means, beside ours; seconds are of the whole model."""
    units, n = stack.modules["m"], len(stack)
    where = f"{n} adapters, all modules by one of {units.shape[0]}×{units.shape[1]}"

    def measured(work: str, way: str, run: Callable[[], object], against: str = "peft", times: float = 1.0, **more):
        timing = timed(run, device, repeat=1)
        timing = Timing(timing.seconds * whole * times, timing.spread, timing.peak)
        return _line(f"{work}: {where}", way, timing, against, **more)

    for name in ("ties", "magnitude_prune", "dare_linear", "dare_ties"):
        yield measured(name, "ours", partial(merge, stack, name), "peft's function of all ΔW")
        yield measured(name, "peft's function of all ΔW", partial(peft_dense, stack, name), "ours")
        yield measured(
            name,
            "peft",
            peft_merge(stack, name),
            "ours",
            note="of the factors, another result: Σ of pruned B times Σ of pruned A",
        )
    yield measured("svd", "ours", lambda: merge(stack, "svd", of="sum"))
    yield measured("svd", "peft", peft_merge(stack, "svd"), "ours")
    dense = "a dense SVD"
    delta = units.of(0).delta().float()
    for name, times in (("tsv", n), ("iso_c", 1)):
        yield measured(name, "ours", partial(merge, stack, name), dense)
        note = f"the SVD of one ΔW, times {times}: nothing else of the method"
        yield measured(name, dense, lambda: torch.linalg.svd(delta, full_matrices=False), "ours", times, note=note)
    k = round(len(units) / n)
    theirs, other = measured_kmeans(units, k, starts)
    ours = inertia(units, cluster(units, k, starts=starts))
    yield measured(
        "lego",
        "ours",
        lambda: merge(stack, "lego", starts=starts),
        "scikit-learn",
        error=ours / other - 1,
        note="error: inertia over scikit-learn's, less 1",
    )
    yield measured("lego", "scikit-learn", theirs, "ours", note="k-means alone")
    sizes = units.of(0).delta().float().abs()
    work, keep = f"the exact threshold of {sizes.numel()} entries", round(0.2 * sizes.numel())
    for way, run in {
        "ours": lambda: threshold(sizes, 0.2),
        "topk": lambda: sizes.flatten().topk(keep, sorted=False).values.amin(),
        "sort": lambda: sizes.flatten().sort().values[-keep],
        "kthvalue": lambda: sizes.flatten().kthvalue(sizes.numel() - keep + 1).values,
    }.items():
        yield _line(work, way, timed(run, device))


def peft_model(stack: Stack) -> nn.Module:
    """peft's model of one linear layer with all adapters of a stack of one module `m`."""
    from peft import LoraConfig, get_peft_model

    units = stack.modules["m"]
    holder = nn.Module()
    holder.m = nn.Linear(units.shape[1], units.shape[0], bias=False, device=units.B.device)
    model = None
    for i, name in enumerate(stack.names):
        own = units.of(i)
        config = LoraConfig(r=len(own), lora_alpha=len(own), target_modules=["m"])
        if model is None:
            model = get_peft_model(holder, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.m
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(own.A)
            layer.lora_B[name].weight.copy_(own.B)
    return model


def peft_merge(stack: Stack, name: str) -> Callable[[], Tensor]:
    """peft's `add_weighted_adapter` over the stack, ready to be run; it returns ΔW."""
    model = peft_model(stack)
    options = {"svd_full_matrices": False} if name == "svd" else {"density": 0.2}

    def run() -> Tensor:
        weights = [1.0] * len(stack)
        with torch.no_grad():
            model.base_model.add_weighted_adapter(list(stack.names), weights, "merged", name, **options)
            delta = model.base_model.model.m.get_delta_weight("merged")
        model.base_model.delete_adapter("merged")  # one of that name is left as it is
        return delta

    return run


def peft_dense(stack: Stack, name: str) -> Tensor:
    """What peft's combination types of ΔW (`ties_svd` and its like) do before their SVD."""
    from peft.utils import merge_utils

    units = stack.modules["m"]
    deltas = [units.of(i).delta().float() for i in range(len(stack))]
    return getattr(merge_utils, name)(deltas, torch.ones(len(stack), device=units.B.device), 0.2)


def measured_kmeans(units, k: int, starts: int) -> tuple[Callable[[], object], float]:
    """scikit-learn's k-means of a module's units, ready to be run, and its inertia."""
    from sklearn.cluster import KMeans

    x = features(units).float().cpu().numpy()
    fit = lambda: KMeans(k, n_init=starts, random_state=0, tol=0.0).fit(x)  # noqa: E731
    return fit, inertia(units, torch.from_numpy(fit().labels_).long().to(units.owner.device))


def inertia(units, labels: Tensor) -> float:
    """Σ ‖x − μ‖² over a module's units, in fp64."""
    x = features(units).double()
    means = x.new_zeros(int(labels.max()) + 1, x.shape[1]).index_add_(0, labels, x)
    means /= labels.bincount()[:, None]
    return float((x - means[labels]).square().sum())


def _files(scale: str, number: int, rank: int, layers: int, device: str, repeat: int) -> Iterator[Line]:
    """Sum and average over adapters' files (bf16), beside reading alone, and the weighted sum of state dicts."""
    shapes = SCALES[scale].shapes()
    shapes = {m: shape for m, shape in shapes.items() if int(m.split(".")[2]) < layers}
    with tempfile.TemporaryDirectory() as folder:
        for adapter in random_adapters(shapes, number, rank):
            adapter.save(Path(folder) / adapter.name, dtype=torch.bfloat16)
        paths = sorted(Path(folder).iterdir())
        stack = Stack.of([Source(path) for path in paths]).to(device)
        size = sum((path / WEIGHTS).stat().st_size for path in paths)

        def state_dicts() -> dict[str, Tensor]:
            total: dict[str, Tensor] = {}
            for path in paths:
                for key, tensor in load_file(path / WEIGHTS, device=device).items():
                    total[key] = tensor / number if key not in total else total[key] + tensor / number
            return total

        work = f"{number} adapters of rank {rank} from files, {len(shapes)} modules"
        for way, run, note in (
            ("reading alone", lambda: [stack.modules[m] for m in stack.modules], ""),
            ("sum", lambda: merge(stack, "sum"), ""),
            ("average", lambda: merge(stack, "average"), ""),
            ("state dicts", state_dicts, "mean of B times mean of A, in bf16: another result"),
        ):
            timing = timed(run, device, repeat=repeat)
            yield _line(work, way, timing, "reading alone", unit="module", per=len(shapes), traffic=size, note=note)
