"""Grouped-query attention in fp32 on a GPU, by a fused kernel.

PyTorch's fused kernels take queries that share keys and values in half precision only. In fp32 it would fall back to plain
matrix products, which hold every score (rows × heads × T × T) and cost small models more than all else. With keys and
values repeated for every query head, a fused kernel takes fp32 too.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

__all__ = ["NAME", "falls_back", "repeat_heads", "repeated"]

NAME = "sdpa_repeated"  # as transformers knows it


def repeated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention of query (rows, heads, T, d) on key and value (rows, fewer heads, T, d), repeated."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (times := query.shape[1] // key.shape[1]) > 1:
        key, value = (part.repeat_interleave(times, 1) for part in (key, value))
    plain = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # which asks for no grouping
    return sdpa_attention_forward(plain, query, key, value, attention_mask, **settings)


def repeat_heads(model: nn.Module) -> bool:
    """Let a model use `repeated` for its attention; whether it does: one of grouped queries, whose attention is `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    heads, fewer = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if model.config._attn_implementation != "sdpa" or not fewer or fewer == heads:
        return False
    AttentionInterface.register(NAME, repeated)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def falls_back(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has no fused kernel for grouped queries there."""
    return device.type == "cuda" and dtype == torch.float32
