"""Models and adapters of any size with random weights: what is measured depends on shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from workbench.adapters import Adapter, Factors
from workbench.base import Base
from workbench.errors import BaseError

__all__ = ["SCALES", "Scale", "random_adapters", "random_base"]


@dataclass(frozen=True)
class Scale:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module → (d_out, d_in) of the seven projections of every layer."""
        narrow = self.hidden * self.kv_heads // self.heads
        d, wide = self.hidden, self.intermediate
        each = {f"self_attn.{name}_proj": (out, d) for name, out in (("q", d), ("k", narrow), ("v", narrow), ("o", d))}
        each |= {"mlp.gate_proj": (wide, d), "mlp.up_proj": (wide, d), "mlp.down_proj": (d, wide)}
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in each.items()}


SCALES = {
    "nano": Scale(128, 352, 4, 8, 4, 90),  # as the bundled base
    "1B": Scale(2048, 8192, 16, 32, 8, 128256),  # Llama-3.2-1B
    "8B": Scale(4096, 14336, 32, 32, 8, 128256),  # Llama-3.1-8B
}


def random_base(
    scale: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, layers: int | None = None
) -> Base:
    """A Llama of these sizes (`SCALES`) with random weights, made on the device; its tokenizer is the bundled one's.

    Args:
        layers: so many of its layers only.

    Raises:
        BaseError: an unknown scale.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from workbench.nano.shelf import BASE

    if scale not in SCALES:
        raise BaseError(f"scale {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    size = SCALES[scale]
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are computed, not drawn
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02, generator=generator)
    return Base(model, AutoTokenizer.from_pretrained(BASE), f"random {scale}")


def random_adapters(
    shapes: Mapping[str, tuple[int, int]],
    number: int,
    rank: int | Iterable[int] = 16,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: float = 0.02,
) -> list[Adapter]:
    """Adapters of random factors on all these modules (`Base.projections`), each ΔW of Frobenius norm about `size` √(d_out d_in).

    Args:
        rank: of all of them, or one each.
    """
    generator = torch.Generator(device).manual_seed(1)
    ranks = [rank] * number if isinstance(rank, int) else list(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return [
        Adapter(
            f"random-{i}",
            {m: Factors(normal(d_out, r) * (size / r**0.5), normal(r, d_in)) for m, (d_out, d_in) in shapes.items()},
        )
        for i, r in zip(range(number), ranks, strict=True)
    ]
