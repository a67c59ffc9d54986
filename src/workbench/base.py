"""A frozen base model with its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.attention import falls_back, repeat_heads
from workbench.compose import alone, computes_on, layer_shape
from workbench.errors import AdapterError, BaseError
from workbench.loading import load_parts
from workbench.prompts import turn_end

__all__ = ["Base", "Batch", "Prefix", "check_fits"]

Prefix = Sequence[tuple[Tensor, Tensor]]  # each layer's keys and values (groups, heads, P, width)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, of which the last `keep` columns of what is written are scored; see `evaluate.Packed`.

    ids (rows, T) are prompt and answer together, or the prompts alone where an encoder reads them; labels (rows, keep) hold
    the token that each logit predicts, −100 where none is. An encoder–decoder needs more: mask (rows, T), true at the
    encoder's tokens and false at its padding, and decoder (rows, D), the start token and the answer's tokens but its last.

    A causal model may be told more: `at` (rows, keep), each row's own columns to score instead of the last ones; and
    `prefix`, what `Base.prefix` has of the tokens that come before ids, (groups, …) for rows in groups of equally many.
    """

    ids: Tensor
    labels: Tensor
    keep: int
    mask: Tensor | None = None
    decoder: Tensor | None = None
    at: Tensor | None = None
    prefix: Prefix | None = None


class Base:
    """Any language model of transformers, frozen, in evaluation mode, with its tokenizer.

    Causal models and encoder–decoders (T5) are scored and fitted alike; `decoder_start` tells them apart.

    Args:
        chat: whether prompts go through the tokenizer's chat template; None: where it has one.
        max_length: how many tokens a prompt and its answer may hold together (an encoder: the prompt). Longer prompts are
            then cut from the left, see `prompts.tokenise`; with None what the model cannot read is refused.

    Raises:
        BaseError: a chat asked for where there is no template, or a `max_length` beyond the model's positions.
    """

    def __init__(
        self, model: nn.Module, tokenizer, name: str = "", *, chat: bool | None = None, max_length: int | None = None
    ):
        self.model = model.eval().requires_grad_(False)
        if falls_back(self.device, self.dtype):
            repeat_heads(self.model)
        self.tokenizer = tokenizer
        self.name = name
        template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not template:
            raise BaseError(f"{name}: chat=True, but its tokenizer has no chat template; leave chat out")
        self.chat = template if chat is None else bool(chat)
        if max_length is not None and not 0 < max_length <= (self.positions or max_length):
            most = f" to {self.positions}, all that the model has positions for" if self.positions else ""
            raise BaseError(f"{name}: max_length is {max_length}, expected 1{most}")
        self.max_length = max_length
        self.held: dict[str, int] = {}  # kind of work → tokens in a batch, once memory has run out; see `room`

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | Mapping | None = None,
        quantise: str | None = None,
        revision: str | None = None,
        chat: bool | None = None,
        max_length: int | None = None,
    ) -> Base:
        """Load a folder or a Hub id, from safetensors. No code that comes with it is run.

        Args:
            device: None takes a GPU where there is one.
            dtype: a torch.dtype; "auto", the checkpoint's own; or None: fp32 on a processor, on a GPU the checkpoint's own
                type, bf16 for both half types.
            device_map: instead of a device, where transformers puts each part ("auto", or module path → device); needs
                accelerate.
            quantise: "4bit" (NF4) or "8bit" by bitsandbytes. Everything that composes updates works on it; what adds to
                the weights themselves (`Dense.applied`) does not.
            revision: a branch, tag or commit on the Hub.
            chat, max_length: see `Base`.

        Raises:
            BaseError: the model or its tokenizer cannot be loaded, or not without running code that comes with it.
        """
        parts = load_parts(
            path, device=device, dtype=dtype, device_map=device_map, quantise=quantise, revision=revision
        )
        return cls(*parts, str(path), chat=chat, max_length=max_length)

    @property
    def device(self) -> torch.device:
        """Where batches go: the first device that computes, of a model spread over several."""
        return computes_on(self.model) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in: that of its first weights which are numbers of at least 16 bits."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)

    @cached_property
    def positions(self) -> int | None:
        """How many tokens a row may hold; None: the model sets no limit (T5's positions are relative)."""
        config = self.model.config
        if hasattr(config, "relative_attention_num_buckets"):
            return None
        for name in ("max_position_embeddings", "n_positions"):
            for source in (config, config.get_text_config()):
                if isinstance(most := getattr(source, name, None), int):
                    return most
        most = getattr(self.tokenizer, "model_max_length", None)
        return most if most and most < 10**9 else None  # a tokenizer that knows none says 10³⁰

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """All token ids that end a generation: the chat template's end of a turn first, then the tokenizer's own."""
        ids = [turn_end(self) if self.chat else None, self.tokenizer.eos_token_id]
        for source in (self.model.generation_config.eos_token_id, self.model.config.eos_token_id):
            ids += source if isinstance(source, list) else [source]
        found = tuple(dict.fromkeys(i for i in ids if i is not None))
        if not found:
            raise BaseError(f"{self.name}: neither tokenizer nor configuration names an end-of-sequence token")
        return found

    @cached_property
    def decoder_start(self) -> int | None:
        """The token id behind which an encoder–decoder writes its answer; None: a causal model.

        Raises:
            BaseError: an encoder–decoder whose configuration names none.
        """
        if not self.model.config.is_encoder_decoder:
            return None
        for source in (self.model.config, self.model.generation_config):
            if (start := getattr(source, "decoder_start_token_id", None)) is not None:
                return start
        raise BaseError(
            f"{self.name} is an encoder–decoder, but its configuration names no decoder_start_token_id, behind which it would "
            "write its answers; set it (for T5 it is the pad_token_id)"
        )

    @cached_property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Module path → (d_out, d_in) of all that a LoRA can change: linear layers, and embeddings (width, vocabulary)."""
        found = {name: layer_shape(layer) for name, layer in self.model.named_modules()}
        return {name: shape for name, shape in found.items() if shape}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """`layers` without embeddings: module path → (d_out, d_in), of every linear layer."""
        found = dict(self.model.named_modules())
        return {name: shape for name, shape in self.layers.items() if not isinstance(found[name], nn.Embedding)}

    @cached_property
    def projections(self) -> dict[str, tuple[int, int]]:
        """`shapes` without the output head: the layers that adapters usually target."""
        head = self.model.get_output_embeddings()
        return {
            name: self.shapes[name]
            for name, layer in self.model.named_modules()
            if name in self.shapes and layer is not head
        }

    @cached_property
    def digest(self) -> str:
        """Content hash of the weights (sha256, hex), as held; what a stored result is keyed by.

        A chat template in use, or a `max_length`, counts too.

        Raises:
            BaseError: weights that are not all held, or not as plain tensors.
        """
        total = hashlib.sha256()
        if self.chat or self.max_length:
            total.update(f"{self.tokenizer.chat_template if self.chat else ''}|{self.max_length}|".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if tensor.is_meta or type(tensor.data) is not Tensor:
                raise BaseError(
                    f"{self.name} has no digest: {name} is {'offloaded' if tensor.is_meta else type(tensor.data).__name__}; "
                    "load it whole, on one device"
                )
            total.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def next_token_logits(self, batch: Batch) -> Tensor:
        """Logits (rows, keep, V) of the last `keep` columns of a batch.

        Under causal attention no answer position sees the padding behind it, so only an encoder needs its mask.
        """
        return self.logits(batch)

    def logits(self, batch: Batch) -> Tensor:
        """As `next_token_logits`, with gradients."""
        if batch.decoder is None:
            past = {"use_cache": False}
            if batch.prefix is not None:
                from transformers import DynamicCache

                n = len(batch.ids) // len(batch.prefix[0][0])
                repeated = [tuple(part.repeat_interleave(n, 0) for part in layer) for layer in batch.prefix]
                past = {"use_cache": True, "past_key_values": DynamicCache(repeated)}
            with alone(self.model), _head_reads(self.model.get_output_embeddings(), batch.at):
                keep = batch.keep if batch.at is None else 0
                return self.model(input_ids=batch.ids, logits_to_keep=keep, **past).logits
        with alone(self.model):
            logits = self.model(
                input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=batch.decoder, use_cache=False
            ).logits
        return logits[:, -batch.keep :]

    @torch.no_grad()
    def prefix(self, ids: Tensor) -> Prefix | None:
        """Keys and values of tokens (groups, P) that all rows of a group begin with; under the updates that are composed.

        None where rows cannot go on from them: encoder–decoders, and models whose layers keep anything but keys and values
        of all tokens (sliding windows, states), or whose positions change with the length.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer

        rope = str(getattr(self.model.config.get_text_config(), "rope_parameters", None))
        if self.decoder_start is not None or "dynamic" in rope or "longrope" in rope:
            return None
        with alone(self.model):
            cache = self.model(input_ids=ids, logits_to_keep=1, use_cache=True).past_key_values
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        return [(layer.keys, layer.values) for layer in cache.layers]

    def room(self, kind: str, answers: float, *, units: int = 0, cached: bool = False) -> int:
        """How many tokens, padding included, a batch without gradients may hold: 16,384 on a processor.

        On a GPU as many as fit its free memory, at most 524,288: of a token some vectors of the hidden size and three of
        the widest layer, of an answer's token its logits, in the model's type and twice in fp32. A fifth is left free. Where
        memory ran out in work of this kind before, no more than was found to fit (`held`).

        Args:
            answers: the share of tokens that logits are taken at.
            units: of the updates of a module, at most.
            cached: keys and values of all tokens are kept.
        """
        if self.device.type != "cuda":
            return min(16_384, self.held.get(kind, 16_384))
        config, size = self.model.config.get_text_config(), self.dtype.itemsize
        hidden, widest = config.hidden_size, max(d_out for d_out, _ in self.projections.values())
        token = size * (8 * hidden + 3 * widest + 4 * units)
        if cached:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
            token += 2 * size * config.num_hidden_layers * heads * width
        token += answers * config.vocab_size * (size + 8)
        return max(1, min(524_288, int(0.8 * free_memory(self.device) / token), self.held.get(kind, 524_288)))


@contextmanager
def _head_reads(head: nn.Module | None, at: Tensor | None) -> Iterator[None]:
    """The output head sees these columns (rows, keep) of each row alone; None: whatever it is given.

    On a GPU it sees them as one matrix: of a slice, as it is given, the product would read the head's weights for each row.
    """

    def read(_, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0] if at is None else torch.take_along_dim(args[0], at[..., None].to(args[0].device), 1)
        return (x.contiguous() if x.is_cuda else x,)

    if head is None:
        yield
        return
    pick = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        pick.remove()


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU can still give, what torch holds unused included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_fits(adapter, layers: Mapping[str, tuple[int, int]]) -> None:
    """Check an adapter against a base's layers (`Base.layers`).

    Raises:
        AdapterError: a module that the base lacks, or a shape that disagrees.
    """
    for module, factors in adapter.modules.items():
        got = (factors.B.shape[0], factors.A.shape[1])
        if module not in layers:
            raise AdapterError(f"{adapter.name}: the base has no layer {module}; it was trained for another base")
        if got != layers[module]:
            resized = " (width × vocabulary); was the vocabulary resized?" if factors.embedding else ""
            raise AdapterError(
                f"{adapter.name}: {module} is {got[0]}×{got[1]}, the base's is {layers[module][0]}×{layers[module][1]}{resized}"
            )
