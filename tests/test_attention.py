"""Attention with repeated keys and values is that of grouped queries: logits, gradients, masks, caches; and who takes it."""

import pytest
import torch

from helpers import some_ids, tiny_base, tiny_gpt2, tiny_t5
from workbench.attention import NAME, falls_back, repeat_heads
from workbench.base import Base
from workbench.generation import generate
from workbench.nano.shelf import BASE


@pytest.fixture(scope="module")
def pair():
    """The bundled base, whose queries share keys and values by two, as it is and with them repeated."""
    plain, other = Base.load(BASE), Base.load(BASE)
    assert repeat_heads(other.model)
    return plain, other


def test_only_models_of_grouped_queries_repeat(pair):
    plain, other = pair
    assert (plain.model.config._attn_implementation, other.model.config._attn_implementation) == ("sdpa", NAME)
    for base in (tiny_gpt2(), tiny_t5()):
        before = base.model.config._attn_implementation
        assert not repeat_heads(base.model)
        assert base.model.config._attn_implementation == before
    eager = tiny_base()
    eager.model.set_attn_implementation("eager")
    assert not repeat_heads(eager.model)


def test_a_gpu_in_fp32_alone_falls_back():
    assert falls_back(torch.device("cuda"), torch.float32)
    assert not falls_back(torch.device("cuda"), torch.bfloat16)
    assert not falls_back(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_are_the_same(pair, padded):
    ids, found = some_ids(pair[0], rows=3, length=14), []
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for base in pair:
        x = base.model.get_input_embeddings()(ids).requires_grad_()
        logits = base.model(inputs_embeds=x, attention_mask=mask if padded else None).logits
        (gradient,) = torch.autograd.grad(logits[:, -1].square().sum(), x)
        found.append((logits, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        assert float(one.detach().abs().max()) > 0


def test_generation_goes_on_from_the_cache(pair):
    prompts = [some_ids(pair[0], rows=2, length=n, seed=n)[0].tolist() for n in (9, 4)]
    one, other = (generate(base, [prompts], 8) for base in pair)
    assert one == other
    assert all(one[0])


def test_the_last_columns_are_those_of_all(pair):
    """The head reads a slice of the rows (on a GPU made one matrix)."""
    from workbench.base import Batch

    base, ids = pair[0], some_ids(pair[0], rows=3, length=10)
    whole = base.model(input_ids=ids).logits
    torch.testing.assert_close(base.logits(Batch(ids, ids[:, -4:], 4)), whole[:, -4:], rtol=1e-5, atol=1e-5)
    assert not base.model.get_output_embeddings()._forward_pre_hooks
