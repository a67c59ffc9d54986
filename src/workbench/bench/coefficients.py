"""One step of learned coefficients: all adapters as one stack, against a hook for each adapter, as peft adds active ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from workbench.adapt.gradient import checkpointed
from workbench.base import Base, Batch, free_memory
from workbench.bench.measure import Line, timed
from workbench.bench.models import random_base
from workbench.bench.population import random_rows
from workbench.compose import LowRank, compose
from workbench.encoding import Packed
from workbench.evaluate import row_losses

__all__ = ["LOOP", "OURS", "RECOMPUTED", "Pieces", "gradient", "lines", "one_by_one", "random_pieces", "stacked"]

AREA, OURS, RECOMPUTED, LOOP = "coefficients", "one stack", "one stack, checkpointed", "a hook for each adapter"
Pieces = Mapping[str, tuple[Tensor, Tensor, Tensor]]  # module → B (d_out, R), A (R, d_in), owner (R,)


def lines(scale: str, device: str, *, quick: bool = False) -> Iterator[Line]:
    """30 adapters of rank 16 to 64, a coefficient each and module, 5 examples of 128 tokens; then other numbers of them.

    A step is forward, backward and AdamW. The error is ‖g − g′‖ / ‖g′‖ of the gradients, g′ the same stack's in the next
    wider type (of bf16 in fp32), so that the loop has an error, too. Numbers of adapters whose factors would take more than
    six tenths of a GPU's free memory are left out.
    """
    cuda = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if cuda and scale != "nano" else torch.float32
    base = random_base(scale, device, dtype)
    most, tokens = (3, 16) if quick else (30, 128)
    rows = random_rows(base, 5, tokens - 8, 8)
    packed = Packed(rows, base)
    batch = packed.batch(torch.arange(len(rows)).numpy())
    for number in (2, most) if quick else (most, 10, 100, 300, 960):
        ranks = [(16, 32, 48, 64)[i % 4] // (8 if quick else 1) for i in range(number)]
        size = sum(ranks) * sum(map(sum, base.projections.values())) * dtype.itemsize
        if (cuda and size > 0.6 * free_memory(torch.device(device))) or (not cuda and size > 2 * 10**9):
            continue
        pieces, compared = random_pieces(base.projections, ranks, device, dtype), number == most
        theta = torch.full((len(pieces), number), 0.1, device=device, requires_grad=True)
        optimiser = torch.optim.AdamW([theta], lr=0.0)
        work = f"{number} adapters of rank {min(ranks)} to {max(ranks)}, 5 examples of {tokens} tokens"
        counted = 4 * len(rows) * tokens * sum(o * i + sum(ranks) * (o + i) for o, i in base.projections.values())
        ways: dict[str, tuple[Callable, bool]] = {OURS: (stacked, False)}
        if compared:
            ways = {LOOP: (one_by_one, False), **ways, RECOMPUTED: (stacked, True)}
        timings, gradients, totals = {}, {}, {}
        for way, (updated, recompute) in ways.items():

            def step(updated=updated, recompute=recompute, theta=theta, optimiser=optimiser, pieces=pieces) -> None:
                theta.grad = gradient(base, batch, partial(updated, base.model, pieces), theta, recompute)
                optimiser.step()

            timings[way] = timed(step, device, repeat=2 if way == LOOP else 3)
            gradients[way] = theta.grad.double()
            totals[way] = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB in all" if cuda else ""
        exact = wider(base, batch, pieces, theta) if compared else None
        for way, timing in timings.items():
            error = float((gradients[way] - exact).norm() / exact.norm()) if compared else None
            against = LOOP if compared else OURS
            size = {} if compared and way != OURS else {"adapters": number}
            yield Line(AREA, work, way, against, timing, "step", 1, counted, error=error, note=totals[way], **size)
        del pieces, theta, optimiser, step


def wider(base: Base, batch: Batch, pieces: Pieces, theta: Tensor) -> Tensor:
    """The gradient of one stack, all of it computed in the next wider type; fp64."""
    narrow = base.dtype
    wide = torch.float32 if narrow.itemsize < 4 else torch.float64
    held = {m: (b.to(wide), a.to(wide), owner) for m, (b, a, owner) in pieces.items()}
    try:
        _cast(base, wide)
        with torch.enable_grad():
            return gradient(
                base, batch, partial(stacked, base.model, held), theta.detach().to(wide).requires_grad_()
            ).double()
    finally:
        _cast(base, narrow)


def _cast(base: Base, dtype: torch.dtype) -> None:
    """The parameters alone, one after another; what positions are computed from stays as it is."""
    for p in base.model.parameters():
        p.data = p.data.to(dtype)


def random_pieces(
    shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], device: str, dtype: torch.dtype
) -> Pieces:
    """Random adapters of these ranks side by side, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(device)
    total, out = sum(ranks), {}
    for module, (d_out, d_in) in shapes.items():
        b, a = (torch.empty(shape, device=device, dtype=dtype) for shape in ((d_out, total), (total, d_in)))
        out[module] = b.normal_(0, 0.002, generator=generator), a.normal_(generator=generator), owner
    return out


def gradient(
    base: Base, batch: Batch, updated: Callable[[Tensor], ExitStack], theta: Tensor, recompute: bool = False
) -> Tensor:
    """Of the mean loss in θ (M, K), under the updates that θ gives."""
    with updated(theta), checkpointed(base.model) if recompute else nullcontext():
        sums, counts = row_losses(base.logits(batch), batch.labels)
        return torch.autograd.grad(sums.sum() / counts.sum(), theta)[0]


def stacked(model: nn.Module, pieces: Pieces, theta: Tensor):
    """All adapters as one stack of units, as `learn_coefficients` has them."""
    slots = theta.unbind(0)
    return compose(
        model,
        {
            m: LowRank(b, a, c.gather(0, owner)[None])
            for c, (m, (b, a, owner)) in zip(slots, pieces.items(), strict=True)
        },
    )


@contextmanager
def one_by_one(model: nn.Module, pieces: Pieces, theta: Tensor) -> Iterator[None]:
    """Every adapter in every module by itself: y += c (x Aᵀ) Bᵀ, as peft adds one active adapter after another."""

    def add(a: Tensor, b: Tensor, c: Tensor, layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return y + (args[0] @ a.mT @ b.mT) * c.to(y.dtype)

    with ExitStack() as hooks:
        for i, (module, (b, a, owner)) in enumerate(pieces.items()):
            sizes, layer = torch.bincount(owner, minlength=theta.shape[1]).tolist(), model.get_submodule(module)
            for k, (own_b, own_a) in enumerate(zip(b.split(sizes, 1), a.split(sizes), strict=True)):
                hooks.callback(layer.register_forward_hook(partial(add, own_a, own_b, theta[i, k])).remove)
        yield
