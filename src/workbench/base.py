"""A frozen base model with its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workbench.compose import layer_shape
from workbench.errors import AdapterError, BaseError

__all__ = ["Base", "Batch", "check_fits"]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, of which the last `keep` columns of what is written are scored; see `evaluate.Packed`.

    ids (rows, T) are prompt and answer together, or the prompts alone where an encoder reads them; labels (rows, keep) hold
    the token that each logit predicts, −100 where none is. An encoder–decoder needs more: mask (rows, T), true at the
    encoder's tokens and false at its padding, and decoder (rows, D), the start token and the answer's tokens but its last.
    """

    ids: Tensor
    labels: Tensor
    keep: int
    mask: Tensor | None = None
    decoder: Tensor | None = None


class Base:
    """Any language model of transformers, frozen, in evaluation mode, with its tokenizer.

    Causal models and encoder–decoders (T5) are scored and fitted alike; `decoder_start` tells them apart.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str = ""):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Base:
        """Load a folder or a Hub id; device None takes a GPU where there is one. No remote code is run.

        Raises:
            BaseError: the model or its tokenizer cannot be loaded.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, KeyError, ValueError) as error:
            raise BaseError(f"no base model could be loaded from {path}: {error}") from error
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        try:
            with _no_bars():
                model = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise BaseError(f"no base model could be loaded from {path}: {error}") from error
        return cls(model, tokenizer, str(path))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """All token ids that end a generation, the tokenizer's own first."""
        ids = [self.tokenizer.eos_token_id]
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
        """Content hash of the weights (sha256, hex), as held; what a stored result is keyed by."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
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
            return self.model(input_ids=batch.ids, logits_to_keep=batch.keep, use_cache=False).logits
        logits = self.model(
            input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=batch.decoder, use_cache=False
        ).logits
        return logits[:, -batch.keep :]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would stay in a notebook's stored output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
