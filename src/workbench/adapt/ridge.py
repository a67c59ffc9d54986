"""Coefficients in closed form: ridge regression on the linearised answer logits.

z_t(θ) ≈ z_t + J_t (θ − θ₀)      z_t (V,) the logits of answer token t at θ₀, J_t (V, P) their exact derivative
θ(λ) = (A + λ I)⁻¹ (A θ₀ + b)    A = mean_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t,  b = mean_t J_tᵀ (y_t − p_t)

At θ₀ = 0 that is the generalised Gauss–Newton (Fisher) step of the mean cross-entropy + λ/2 ‖θ‖² (Martens 2020,
arXiv 1412.1193, §8); for a model whose logits are linear in θ, Newton's. J comes from forward-mode differentiation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.adapt.coefficients import GRANULARITIES, slots
from workbench.adapt.fitted import Fitted, fold, modules_of
from workbench.adapt.gradient import Curves, Watch
from workbench.base import Base, Batch
from workbench.compose import compose, shared
from workbench.errors import BaseError, MergeError
from workbench.evaluate import Encoded, Packed, score
from workbench.options import Count, Range
from workbench.stack import Stack

__all__ = ["LENGTHS", "PENALTIES", "Normal", "normal_equations", "ridge", "solve"]

PENALTIES = tuple(10.0**e for e in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -4))
LENGTHS = (1.0, 0.5, 0.25)
_BYTES = {"cuda": 2**33}  # of J at once; 2²⁸ on a processor
_TOKENS = {"cuda": 2**19}  # in one forward pass; 2¹⁴ on a processor


@dataclass(frozen=True)
class Normal:
    """A (P, P) and b (P,), fp64, of the module's docstring, and the mean loss (nats per answer token) at θ₀."""

    A: Tensor
    b: Tensor
    loss: float


def ridge(
    base: Base,
    stacks: Sequence[Stack],
    train: Sequence[Sequence[Encoded]],
    validation: Sequence[Sequence[Encoded]] | None,
    *,
    seeds: Sequence[int],
    granularity: Literal["expert", "layer", "sublayer", "module"] = "expert",
    iterations: Count = 3,
    start: float = 0.0,
    penalties: tuple[float, ...] = PENALTIES,
    lengths: tuple[float, ...] = LENGTHS,
    folds: Annotated[int, Range(2)] = 5,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[Fitted]:
    """Coefficients of G fits without training: linearise, solve for every λ, keep the best, and again from there.

    The candidates of an iteration are θ₀ + s (θ(λ) − θ₀) for all λ of `penalties` and s of `lengths`; the one of the lowest
    held-out loss is where the next linearises, and a fit ends where none is better than θ₀. Held out are the validation
    examples; without any, each of `folds` parts of the training examples from a fit on the others (drawn under the seed),
    and the fit on all of them goes the same way.

    Cost of an iteration: slots × K derivatives, each about two forward passes of the training examples, and as many scores
    of the held-out ones as there are candidates. J is never held whole: P numbers for each of V logits go as far as 256 MB
    (8 GB on a GPU) at once, about 140 MB a token for P = 280 and a vocabulary of 128,000; what an example has beyond that
    repeats its forward passes.

    Args:
        granularity: what shares a coefficient per adapter.
        start: the first θ₀, of every coefficient.
        penalties: λ, above 0, on the scale of nats per token: a coefficient of 1 costs λ/2.
        lengths: s.
        watch: called after every iteration of all fits with its number, the number of all and the mean training loss; true
            ends the fits there.

    Returns:
        Linear coefficients; `curves.train` has the training loss at every linearisation, `curves.validation` the held-out
        loss before the first iteration and after each. `passes` counts a derivative as one pass. adapter.info has the
        penalties and lengths chosen.

    Raises:
        MergeError: numbers of fits that disagree, an option out of its range, too few examples, or no finite loss.
        BaseError, AdapterError: a module that the base lacks, or of another shape there; a base with an operation that
            has no forward-mode derivative.
    """
    _check(stacks, train, validation, seeds, names, granularity, penalties, lengths, folds, iterations)
    fits = []
    for g, stack in enumerate(stacks):
        modules_of([stack], base)
        members = _split(train[g], None if validation is None else validation[g], folds, seeds[g])
        fits.append(_Fit(stack.to(base.device), slots(list(stack.modules), granularity), members, start))
    for i in range(iterations):
        losses = [fit.advance(base, penalties, lengths) for fit in fits]
        if watch is not None and watch(i + 1, iterations, float(np.mean(losses))):
            break
    return [fit.result(names[g] if names else f"ridge-of-{len(fit.stack)}") for g, fit in enumerate(fits)]


def normal_equations(
    base: Base, stack: Stack, theta: Tensor, rows: Sequence[Encoded], slot: Sequence[int]
) -> tuple[Normal, int]:
    """A, b and the loss at θ₀ = theta (slots, K), over the answer tokens of the rows; and how many tokens were fed.

    slot: for each module of the stack, in its order, the place of its coefficients (`coefficients.slots`). Parameters are
    in the order of theta.flatten().
    """
    packed, size = Packed(rows, base), theta.numel()
    count = sum(len(row.answer) for row in rows)
    A, b, loss, fed = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0.0, 0
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    room = max(1, _BYTES.get(base.device.type, 2**28) // (4 * vocabulary * size))
    for part in _parts([len(row.answer) for row in rows], room):
        batch = packed.batch(part)
        every = (batch.labels != -100).nonzero()
        for where in every.split(room):
            z, J = _linearised(base, stack, theta, slot, packed, part, where)
            fed += size * sum(len(rows[i]) for i in part)
            y = batch.labels[where[:, 0], where[:, 1]]
            p = z.softmax(1)
            J -= torch.einsum("tv,tvp->tp", p, J)[:, None]  # the softmax does not see what is common to all logits
            b += J[torch.arange(len(y), device=y.device), y].double().sum(0).cpu()
            loss -= float(z.log_softmax(1).gather(1, y[:, None]).double().sum())
            J *= p.sqrt()[:, :, None]
            J = J.flatten(0, 1)
            A += (J.T @ J).double().cpu()
    return Normal(A / count, b / count, loss / count), fed


def solve(normal: Normal, theta: Tensor, penalties: Sequence[float]) -> Tensor:
    """θ(λ) (len(penalties), slots, K), fp64, of normal equations at theta (slots, K)."""
    values, vectors = torch.linalg.eigh(normal.A)
    target = vectors.T @ (normal.A @ theta.double().flatten() + normal.b)
    inverse = 1 / (values.clamp_min(0) + torch.tensor(penalties, dtype=torch.float64)[:, None])
    return (inverse * target @ vectors.T).view(-1, *theta.shape)


@dataclass
class _Fit:
    """One fit: `members` are its training examples and those held out of them; the last one's θ is the result."""

    stack: Stack
    slot: list[int]
    members: list[tuple[Sequence[Encoded], Sequence[Encoded]]]
    start: float
    passes: int = 0
    tokens: int = 0
    done: bool = False
    train: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    chosen: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self):
        size = (max(self.slot) + 1, len(self.stack))
        self.theta = [torch.full(size, float(self.start), dtype=torch.float64) for _ in self.members]

    def advance(self, base: Base, penalties: Sequence[float], lengths: Sequence[float]) -> float:
        """Linearise every member, and go where the held-out loss is lowest; the last member's training loss before it."""
        if self.done:
            return self.train[-1]
        options = [(0.0, 0.0), *((penalty, length) for length in lengths for penalty in penalties)]
        losses, ahead = torch.zeros(len(options), dtype=torch.float64), []
        for theta, (rows, held) in zip(self.theta, self.members, strict=True):
            normal, fed = normal_equations(base, self.stack, theta, rows, self.slot)
            solved = solve(normal, theta, penalties)
            ahead.append(torch.cat([theta[None], *(theta + length * (solved - theta) for length in lengths)]))
            self.passes, self.tokens = self.passes + theta.numel() * len(rows), self.tokens + fed
            if held:
                updates = shared(self.stack, ahead[-1][:, self.slot].float())
                losses += score(base, [held] * len(options), updates).loss.double().sum(1)
                self.passes += len(options) * len(held)
                self.tokens += len(options) * sum(map(len, held))
        losses /= sum(len(held) for _, held in self.members)
        losses[~torch.isfinite(losses)] = torch.inf
        best = int(losses.argmin())
        if not np.isfinite(normal.loss) or torch.isinf(losses[best]):
            raise MergeError("no finite loss on the examples; are the adapters sound, and of this base?")
        self.held = self.held or [float(losses[0])]
        self.train.append(normal.loss)
        self.held.append(float(losses[best]))
        self.chosen.append(options[best])
        self.theta, self.done = [candidates[best] for candidates in ahead], best == 0
        return normal.loss

    def result(self, name: str) -> Fitted:
        """What the last member came to."""
        value = self.theta[-1][self.slot].float()
        best, tokens = torch.tensor(self.held[-1]), torch.tensor(self.tokens)
        curves = Curves(torch.tensor(self.train), torch.tensor(self.held), tuple(range(len(self.held))), best, tokens)
        info = {"penalties": [p for p, _ in self.chosen], "lengths": [s for _, s in self.chosen]}
        adapter = fold(self.stack.to("cpu"), value, name, info)
        return Fitted(adapter, value, curves, self.passes, self.tokens, parameters=self.theta[-1].numel())


def _split(train: Sequence[Encoded], validation: Sequence[Encoded] | None, folds: int, seed: int) -> list[tuple]:
    """The members of a fit: (training examples, held out); the last has all, and without validation nothing held out."""
    if validation is not None:
        return [(train, validation)]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(int(seed))).tolist()
    parts = [order[i :: min(folds, len(train))] for i in range(min(folds, len(train)))]
    members = [([train[i] for i in order if i not in part], [train[i] for i in part]) for part in parts]
    return [*members, (train, ())]


def _parts(sizes: Sequence[int], room: int) -> Iterator[np.ndarray]:
    """Places of consecutive examples whose answers have at most `room` tokens together, or one that has more."""
    held, total = [], 0
    for i, size in enumerate(sizes):
        if held and total + size > room:
            yield np.array(held)
            held, total = [], 0
        held.append(i)
        total += size
    yield np.array(held)


def _linearised(
    base: Base, stack: Stack, theta: Tensor, slot: Sequence[int], packed: Packed, part: np.ndarray, where: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (T, V) at θ₀ and their derivatives (T, V, P), fp32, at the answer tokens `where` (T, 2) of these examples."""
    size, n, kind = theta.numel(), len(part), base.device.type
    units = torch.eye(size, dtype=torch.float32).view(size, *theta.shape)[:, slot]
    batch = packed.batch(part)
    at, J = theta[slot].float(), None
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    few = min(
        _TOKENS.get(kind, 2**14) // (n * packed.width), _BYTES.get(kind, 2**28) // (8 * n * batch.keep * vocabulary)
    )
    for start in range(0, size, max(1, few)):
        directions = units[start : start + max(1, few)].to(base.device)
        logits, change = _derivative(
            base, stack, at.to(base.device), directions, packed.batch(np.tile(part, len(directions)))
        )
        split = (len(directions), n, *logits.shape[1:])
        if J is None:
            z = logits.view(split)[0][where[:, 0], where[:, 1]].float()
            J = torch.empty(*z.shape, size, device=base.device)
        J[..., start : start + len(directions)] = change.view(split)[:, where[:, 0], where[:, 1]].movedim(0, -1).float()
    return z, J


def _derivative(base: Base, stack: Stack, at: Tensor, directions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of C copies of the rows, and copy c's derivative along directions[c] (M, N), in one forward-mode pass."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _no_jit_warning():
        c = forward_ad.make_dual(at.expand_as(directions).contiguous(), directions)
        try:
            with compose(base.model, shared(stack, c)), torch.enable_grad():
                primal, tangent = forward_ad.unpack_dual(base.logits(batch))
        except NotImplementedError as error:
            raise BaseError(
                f"{base.name} has an operation without a forward-mode derivative; load it unquantised and with "
                f"attn_implementation='sdpa' or 'eager' ({error})"
            ) from error
    return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent.detach()


@contextmanager
def _no_jit_warning() -> Iterator[None]:
    """torch's first forward-mode call compiles decompositions by a function that it calls deprecated itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=DeprecationWarning)
        yield


def _check(stacks, train, validation, seeds, names, granularity, penalties, lengths, folds, iterations) -> None:
    if granularity not in GRANULARITIES[:4]:
        raise MergeError(
            f"granularity {granularity!r} is unknown to ridge; choose one of {', '.join(GRANULARITIES[:4])}"
        )
    lists = {"lists of examples": train, "seeds": seeds}
    lists |= {} if validation is None else {"lists of validation examples": validation}
    lists |= {"names": names} if names else {}
    for what, given in lists.items():
        if len(given) != len(stacks):
            raise MergeError(f"expected one of each per fit, got {len(stacks)} stacks and {len(given)} {what}")
    for what, values in (("penalties", penalties), ("lengths", lengths)):
        if not len(values) or not all(np.isfinite(value) and value > 0 for value in values):
            raise MergeError(f"{what} are {tuple(values)}, expected one or more finite numbers above 0")
    if iterations < 1 or folds < 2:
        raise MergeError(f"iterations is {iterations} and folds {folds}, expected at least 1 and 2")
    least = 1 if validation is not None else 2
    for g, rows in enumerate(train):
        if len(rows) < least or (validation is not None and not len(validation[g])):
            raise MergeError(
                f"fit {g} of {len(train)} has {len(rows)} training examples and {len(validation[g]) if validation else 0} for "
                f"validation; it takes {'one of each' if validation else 'two, or one and some for validation'}"
            )
