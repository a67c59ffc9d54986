"""Low-rank updates on a frozen model, as forward hooks: no weight is copied or overwritten.

    with compose(model, {"model.layers.0.self_attn.q_proj": LowRank(B, A, c)}):
        model(input_ids)                       # y += ((x Aᵀ) ∘ c) Bᵀ in that module

`LowRank` tells the forms that an update can take. Layers that read one input (q, k and v; gate and up) can have their x Aᵀ
taken as one product.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from workbench.adapters import Adapter
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.lowrank import LowRank, Routed, check_routing, filled_up, inner, scaled
from workbench.stack import Stack

__all__ = ["LowRank", "Routed", "alone", "check_routing", "compose", "grouped", "shared", "slice_groups"]

_TURNS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_NEW_TURN = threading.Lock()


def alone(model: nn.Module) -> threading.RLock:
    """The model's lock, to be held while it computes: hooks are the model's, so that another thread would run under them.

    `compose` holds it while it is open, and `Base` in each forward pass; one thread may take it again and again.
    """
    with _NEW_TURN:
        return _TURNS.setdefault(model, threading.RLock())


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
    for module in shapes:
        found = [adapter.modules.get(module) for adapter in adapters]
        B, A = filled_up([None if one is None else (one.B, one.A) for one in found])
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
    modules = list(stack)
    ranks = torch.tensor([len(units) for _, units in modules])
    first = (torch.arange(m) * n).repeat_interleave(ranks).to(stack.device, non_blocking=True)
    owner = torch.cat([units.owner for _, units in modules])  # at once: many small kernels take a GPU longer
    c = per_module.to(stack.device).flatten(1).index_select(1, first + owner).split(ranks.tolist(), 1)
    return {module: LowRank(units.B, units.A, own) for (module, units), own in zip(modules, c, strict=True)}


def slice_groups(updates: Mapping[str, LowRank], start: int, stop: int, total: int) -> dict[str, LowRank]:
    """The updates of groups start … stop of `total` (multiples of the candidates per stack in the grouped form)."""
    if (start, stop) == (0, total):
        return dict(updates)

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
def compose(model: nn.Module, updates: Mapping[str, LowRank], *, joined: bool | None = None) -> Iterator[nn.Module]:
    """Add the updates to the named modules' outputs while the context is open; nothing is left behind, on an error too.

    Works on anything whose output is (rows, …, d_out) for an input (rows, …, d_in): Linear, Conv1D, quantised layers; and
    on embeddings, whose input is tokens. In a model that is spread over several devices each update goes to its layer's.
    Tensors that take no gradient are cast to the layer's type once, so they are not to be changed in an open context.
    Other threads that want the model wait until the context closes (`alone`).

    Args:
        joined: take x Aᵀ of q, k and v, and of gate and up, as one product, where A takes no gradient; None: on a GPU.
            Results may differ in rounding.

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
    handles, hooks = [], {}
    alone(model).acquire()
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
            hooks[name] = _Hook(update.to(computes_on(layer) or update.B.device))
            handles.append(layer.register_forward_hook(hooks[name]))
        if joined is not False:
            _join({name: hook for name, hook in hooks.items() if joined or hook.update.A.is_cuda})
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for family in {hook.family[0] for hook in hooks.values() if hook.family}:
            family.held = None
        alone(model).release()


class _Hook:
    """Adds one module's update to its output. `family`: the layers that it shares a product with, and its place there."""

    def __init__(self, update: LowRank):
        self.update, self.ready, self.types = update, update, None
        self.family: tuple[_Family, int] | None = None

    def __call__(self, layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x = args[0].to(y.device)  # accelerate moves a layer's input behind the hook's back
        types = (x.dtype, y.dtype, torch.is_inference_mode_enabled())
        if types != self.types:
            self.ready, self.types = self._cast(x, y), types
        update, scale = self.ready, getattr(layer, "embed_scale", None)
        if scale is not None:  # some embeddings multiply what they look up
            update = replace(update, B=update.B * scale)
        h = self.family[0].part(self.family[1], x) if self.family else None
        return update.apply(x, y) if h is None else update.outer(h, y)

    def _cast(self, x: Tensor, y: Tensor) -> LowRank:
        """The update in the types of the layer's input and output, but for what takes a gradient or is not read here."""
        if type(self.update).apply is not LowRank.apply:
            return self.update
        inside = x.dtype if x.is_floating_point() else y.dtype
        wanted = {"B": y.dtype, "c": inside} | ({"A": x.dtype} if x.is_floating_point() and not self.family else {})
        held = {name: getattr(self.update, name) for name in wanted}
        cast = {name: t.to(wanted[name]) for name, t in held.items() if t is not None and not t.requires_grad}
        return replace(self.update, **cast)


_FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order in which they are run
_WIDEST = 4096  # units of a family: beyond that each product is wide enough by itself, and joining costs memory


def _join(hooks: Mapping[str, _Hook]) -> None:
    """Find the hooks whose layers read one input, by their names, and make families of those that can share a product."""
    for first in [name for name in hooks if name.rpartition(".")[2] in {names[0] for names in _FAMILIES}]:
        parent, dot, last = first.rpartition(".")
        names = next(names for names in _FAMILIES if names[0] == last)
        some = [hooks[parent + dot + name] for name in names if parent + dot + name in hooks]
        updates = [hook.update for hook in some]
        alike = {
            (type(u), u.A.shape[:-2], u.A.shape[-1], u.A.device, u.A.requires_grad, None if u.c is None else len(u.c))
            for u in updates
        }
        plain = type(updates[0]) is LowRank and not updates[0].A.requires_grad
        if len(some) > 1 and len(alike) == 1 and plain and sum(u.A.shape[-2] for u in updates) <= _WIDEST:
            family = _Family(updates)
            for place, hook in enumerate(some):
                hook.family = (family, place)


class _Family:
    """(x Aᵀ) ∘ c of layers that read one input, as one product.

    The first layer takes it for all. Each other has its part of it once, if it reads the very same tensor, unchanged since
    and in the same mode of gradients; else it takes its own product. What is held goes with the last part, or with x.
    """

    def __init__(self, updates: Sequence[LowRank]):
        self.updates, self.A, self.held = updates, None, None
        self.groups = max(update.groups for update in updates)

    def part(self, place: int, x: Tensor) -> Tensor | None:
        if x.is_inference() or torch.is_inference_mode_enabled() or x.shape[0] % self.groups:
            return None
        state = (x._version, torch.is_grad_enabled())
        if place == 0:
            h = self._product(x).split([update.A.shape[-2] for update in self.updates], -1)
            self.held = (weakref.ref(x, self._let_go), state, dict(enumerate(h)))
        if self.held is None or self.held[0]() is not x or self.held[1] != state:
            return None
        h = self.held[2].pop(place, None)
        if not self.held[2]:
            self.held = None
        return h

    def _product(self, x: Tensor) -> Tensor:
        if self.A is None or self.A.dtype != x.dtype:
            self.A = torch.cat([update.A.to(x.dtype) for update in self.updates], -2)
        h = inner(x, self.A)
        return h if self.updates[0].c is None else scaled(h, torch.cat([update.c for update in self.updates], 1))

    def _let_go(self, reference: weakref.ref) -> None:
        if self.held is not None and self.held[0] is reference:
            self.held = None


def computes_on(module: nn.Module) -> torch.device | None:
    """Where a module, or the first part of a model, computes: where its tensors are, or where accelerate brings them to.

    None: it holds no tensors.
    """
    weight = module._parameters.get("weight")
    if weight is not None and not module._modules and not hasattr(module, "_hf_hook"):
        return weight.device  # as of most layers, at once
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
