"""Low-rank updates on a frozen model, as forward hooks: no weight is copied or overwritten.

    with compose(model, {"model.layers.0.self_attn.q_proj": LowRank(B, A, c)}):
        model(input_ids)                       # y += ((x Aᵀ) ∘ c) Bᵀ in that module

An embedding is a linear layer on one-hot tokens: its x Aᵀ is the columns of A at the token ids. The batch is G groups of
rows (contiguous, equally many each). Three forms:

- shared: B (d_out, R), A (R, d_in), and c (C, R): one stack, C candidates, rows split evenly among them;
- grouped: B (G, d_out, R), A (G, R, d_in), c None or (C, R) with C a multiple of G: each group its own adapter;
- routed (`Routed`), shared or grouped: every token has its own c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.adapters import Adapter
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.stack import Stack

__all__ = ["LowRank", "Routed", "check_routing", "compose", "grouped", "shared", "slice_groups"]


@dataclass(frozen=True)
class LowRank:
    """One module's update for a batch of rows; see the module's docstring for the shapes."""

    B: Tensor
    A: Tensor
    c: Tensor | None = None
    stacked: ClassVar[tuple[str, ...]] = ("B", "A")  # what has a leading dimension G in the grouped form

    def __post_init__(self):
        stacked, c = self.B.ndim == 3, self.c
        if (
            self.B.ndim != self.A.ndim
            or self.B.shape[-1] != self.A.shape[-2]
            or (stacked and len(self.B) != len(self.A))
        ):
            raise MergeError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are no pair of factors")
        if c is not None and (c.ndim != 2 or c.shape[1] != self.A.shape[-2] or (stacked and len(c) % len(self.B))):
            per = f", candidates a multiple of {len(self.B)}" if stacked else ""
            raise MergeError(f"expected coefficients (candidates, {self.A.shape[-2]}){per}, got {tuple(c.shape)}")

    @property
    def groups(self) -> int:
        """How many groups of rows it tells apart (1: all rows alike)."""
        return max(self.B.shape[0] if self.B.ndim == 3 else 1, 1 if self.c is None else self.c.shape[0])

    def to(self, device: torch.device) -> LowRank:
        """The same on a device; itself where it is there already."""
        held = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device) for name, tensor in held.items() if tensor.device != device}
        return replace(self, **moved) if moved else self

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """y + ((x Aᵀ) ∘ c) Bᵀ for x (rows, …, d_in), y (rows, …, d_out); in place on y where no gradient is taken.

        Whole numbers x (rows, …) are tokens.
        """
        if x.shape[0] % self.groups:
            raise MergeError(f"{x.shape[0]} rows cannot be split evenly among {self.groups} groups")
        b = self.B.to(y.dtype).mT
        h = _inner(x, self.A) if x.is_floating_point() else _looked_up(x, self.A).to(y.dtype)
        h = self._weighted(h, x)
        h, flat = h.to(y.dtype), y.reshape(*h.shape[:-1], y.shape[-1])  # autocast may have chosen another type
        if torch.is_grad_enabled():
            out = torch.baddbmm(flat, h, b) if self.B.ndim == 3 else torch.addmm(flat, h, b)
        else:
            out = flat.baddbmm_(h, b) if self.B.ndim == 3 else flat.addmm_(h, b)
        return out.reshape(y.shape)

    def _weighted(self, h: Tensor, x: Tensor) -> Tensor:
        """h = x Aᵀ with each unit's column multiplied by its coefficient; in place where no gradient is taken."""
        if self.c is None:
            return h
        split = h.reshape(self.c.shape[0], -1, h.shape[-1])
        c = self.c.to(h.dtype)[:, None]
        return (split * c if torch.is_grad_enabled() else split.mul_(c)).reshape(h.shape)


@dataclass(frozen=True, kw_only=True)
class Routed(LowRank):
    """Arrow (Ostapenko et al. 2024, arXiv 2405.11157): every token weighs N adapters by |x · prototype|.

    w = softmax of the `top` largest |x Pᵀ| / temperature, and c_j = w[owner_j]. Shared: owner (R,), prototypes P (N, d_in);
    grouped: owner (G, R), P (G, N, d_in). A row of zeros in P is an adapter that is absent from the module: it is never
    routed to. Of equal logits those of the first adapters are kept. Routing is in fp32 whatever the base's type, and
    differentiable in P. In an embedding x is the one-hot token, so its logits are the column |P[:, token]|.
    """

    owner: Tensor
    prototypes: Tensor
    top: int = 4
    temperature: float = 1.0
    stacked: ClassVar[tuple[str, ...]] = ("B", "A", "owner", "prototypes")

    def __post_init__(self):
        super().__post_init__()
        check_routing(self.top, self.temperature)
        if self.c is not None:
            raise MergeError("a routed update takes no coefficients c: its prototypes give every token its own")
        if self.owner.shape != self.A.shape[:-1]:
            raise MergeError(f"expected owners {tuple(self.A.shape[:-1])}, got {tuple(self.owner.shape)}")
        want, got = (*self.A.shape[:-2], "adapters", self.A.shape[-1]), tuple(self.prototypes.shape)
        if len(got) != len(want) or (*got[:-2], "adapters", got[-1]) != want or not got[-2]:
            raise MergeError(f"expected prototypes ({', '.join(map(str, want))}), got {got}")

    def weights(self, x: Tensor) -> Tensor:
        """Each token's weights of the adapters, (tokens, N) or (G, tokens, N), fp32; they sum to 1 where any is present."""
        p, real = self.prototypes, x.is_floating_point()
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype if real else p.dtype, torch.float32)
            logits = (_inner(x.to(wide), p) if real else _looked_up(x, p.to(wide))).abs()
        present = p.detach().ne(0).any(-1).unsqueeze(-2)
        low = torch.finfo(wide).min
        logits = logits.masked_fill(~present, low)
        k = min(self.top, logits.shape[-1])
        best = logits.detach().topk(k).values
        above, level = logits > best[..., -1:], logits == best[..., -1:]
        kept = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        return ((logits - best[..., :1]) / self.temperature).masked_fill(~kept, low).softmax(-1) * present

    def _weighted(self, h: Tensor, x: Tensor) -> Tensor:
        weights = self.weights(x)
        c = weights.gather(-1, self.owner.unsqueeze(-2).expand(*h.shape)).to(h.dtype)
        return h * c if torch.is_grad_enabled() else h.mul_(c)


def check_routing(top: int, temperature: float) -> None:
    """Raises:
    MergeError: fewer than one adapter to keep, or a temperature that is not above 0.
    """
    if isinstance(top, bool) or not isinstance(top, Integral) or top < 1:
        raise MergeError(f"top is {top!r}, expected a whole number of adapters to keep for each token, at least 1")
    if not 0 < temperature < torch.inf:
        raise MergeError(f"temperature is {temperature}, expected a number above 0")


def _inner(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ, (tokens, r) or (stacks, tokens, r)."""
    lead = (-1,) if A.ndim == 2 else (A.shape[0], -1)
    return x.reshape(*lead, x.shape[-1]) @ A.to(x.dtype).mT


def _looked_up(tokens: Tensor, A: Tensor) -> Tensor:
    """The columns of A at these tokens, as rows."""
    if A.ndim == 2:
        return A.mT[tokens.flatten()]
    stacks = torch.arange(A.shape[0], device=tokens.device)[:, None]
    return A.mT[stacks, tokens.reshape(A.shape[0], -1)]


def grouped(adapters: Sequence[Adapter], device: str | torch.device = "cpu") -> dict[str, LowRank]:
    """Each adapter for its own group of rows: factors stacked, ranks filled up with zeros, absent modules zero."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for module, factors in adapter.modules.items():
            shape = (factors.B.shape[0], factors.A.shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise AdapterError(
                    f"{adapter.name}: {module} is {shape[0]}×{shape[1]}, expected {shapes[module][0]}×{shapes[module][1]}"
                )
    updates = {}
    for module, (d_out, d_in) in shapes.items():
        rank = max(a.modules[module].rank for a in adapters if module in a.modules)
        B, A = torch.zeros(len(adapters), d_out, rank), torch.zeros(len(adapters), rank, d_in)
        for g, adapter in enumerate(adapters):
            factors = adapter.modules.get(module)
            if factors is not None:
                B[g, :, : factors.rank], A[g, : factors.rank] = factors.B, factors.A
        updates[module] = LowRank(B.to(device), A.to(device))
    return updates


def shared(stack: Stack, coefficients: Tensor) -> dict[str, LowRank]:
    """One stack under C candidates' coefficients: (C, N) one per adapter, or (C, M, N) one per module and adapter.

    Raises:
        MergeError: coefficients of the wrong length.
    """
    n, m = len(stack), len(stack.modules)
    if (
        coefficients.ndim not in (2, 3)
        or coefficients.shape[-1] != n
        or (coefficients.ndim == 3 and coefficients.shape[1] != m)
    ):
        raise MergeError(
            f"expected coefficients (candidates, {n}) or (candidates, {m}, {n}) for {n} adapters and {m} modules, got {tuple(coefficients.shape)}"
        )
    per_module = coefficients[:, None].expand(-1, m, -1) if coefficients.ndim == 2 else coefficients
    per_module = per_module.to(stack.device)
    return {module: LowRank(u.B, u.A, per_module[:, i].index_select(1, u.owner)) for i, (module, u) in enumerate(stack)}


def slice_groups(updates: Mapping[str, LowRank], start: int, stop: int, total: int) -> dict[str, LowRank]:
    """The updates of groups start … stop of `total` (multiples of the candidates per stack in the grouped form)."""

    def cut(tensor: Tensor) -> Tensor:
        per = total // len(tensor)
        return tensor[start // per : -(-stop // per)]

    out = {}
    for module, update in updates.items():
        parts = {name: cut(getattr(update, name)) for name in update.stacked if update.B.ndim == 3}
        if update.c is not None and len(update.c) > 1:
            parts["c"] = cut(update.c)
        out[module] = replace(update, **parts)
    return out


@contextmanager
def compose(model: nn.Module, updates: Mapping[str, LowRank]) -> Iterator[nn.Module]:
    """Add the updates to the named modules' outputs while the context is open; nothing is left behind, on an error too.

    Works on anything whose output is (rows, …, d_out) for an input (rows, …, d_in): Linear, Conv1D, quantised layers; and
    on embeddings, whose input is tokens. In a model that is spread over several devices each update goes to its layer's.

    Raises:
        BaseError: a module that the model does not have, or an embedding that computes something else.
        AdapterError: factors that do not fit the module.
        MergeError: several groups of rows at an embedding of something other than the rows' tokens.
    """
    found = dict(model.named_modules())
    absent = [module for module in updates if module not in found]
    if absent:
        raise BaseError(
            f"{len(absent)} of {len(updates)} modules are not in this base, such as {absent[0]!r}; are the adapters of another base?"
        )
    handles = []
    try:
        for name, update in updates.items():
            layer = found[name]
            expected, got = layer_shape(layer), (update.B.shape[-2], update.A.shape[-1])
            if expected and got != expected:
                raise AdapterError(
                    f"{name}: an update of {got[0]}×{got[1]} does not fit a layer of {expected[0]}×{expected[1]}"
                )
            if isinstance(layer, nn.Embedding) and not _of_tokens(model, layer):
                if type(layer).forward is not nn.Embedding.forward and not hasattr(layer, "embed_scale"):
                    raise BaseError(f"{name} is a {type(layer).__name__}, which does more than look its input up")
                if update.groups > 1:
                    raise MergeError(
                        f"{name} does not look the rows' tokens up, so {update.groups} groups cannot be told apart in it"
                    )
            handles.append(layer.register_forward_hook(partial(_add, update.to(computes_on(layer) or update.B.device))))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _add(update: LowRank, layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
    scale = getattr(layer, "embed_scale", None)  # some embeddings multiply what they look up
    if scale is not None:
        update = replace(update, B=update.B * scale)
    return update.apply(args[0].to(y.device), y)  # accelerate moves a layer's input behind the hook's back


def computes_on(module: nn.Module) -> torch.device | None:
    """Where a module, or the first part of a model, computes: where its tensors are, or where accelerate brings them to.

    None: it holds no tensors.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if (brought := getattr(one, "execution_device", None)) is not None:
                return torch.device(brought)
        for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            return tensor.device
    return None


def _of_tokens(model: nn.Module, layer: nn.Embedding) -> bool:
    """Whether an embedding is the model's own of its input tokens, or shares its weight (T5's encoder and decoder)."""
    own = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else layer
    return layer is own or layer.weight is own.weight


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer of any make, (width, vocabulary) of an embedding; None where it has no such thing."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    if hasattr(layer, "nf") and hasattr(layer, "nx"):  # transformers' Conv1D
        return layer.nf, layer.nx
    return None


def stores_transposed(layer: nn.Module) -> bool:
    """Whether its weight is (d_in, d_out): embeddings and transformers' Conv1D."""
    return isinstance(layer, nn.Embedding) or hasattr(layer, "nf")
