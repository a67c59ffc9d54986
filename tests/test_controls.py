"""Random controls: same shapes, owners and scalings; σ, norms and spectra as they say; random in every direction."""

import math

import pytest
import torch

from helpers import random_adapter
from workbench.controls import MATCHES, random_like
from workbench.errors import MergeError
from workbench.stack import Stack

SHAPES = {"b.q_proj": (48, 32), "a.v_proj": (16, 32), "a.up_proj": (64, 24)}


@pytest.fixture(scope="module")
def stack():
    """Four adapters of unequal ranks (one above the width of a.v_proj), scalings, sizes and targets."""
    return Stack.of(
        [
            random_adapter(SHAPES, 3, 0, name="a", size=0.3),
            random_adapter(SHAPES, 20, 1, name="b", alpha=5),
            random_adapter(SHAPES, 6, 2, ["a.v_proj"], rslora=True, name="c", size=0.02),
            random_adapter(SHAPES, 1, 3, ["b.q_proj", "a.up_proj"], name="d", size=2.0),
        ]
    )


@pytest.mark.parametrize("match", MATCHES)
def test_everything_but_the_values_is_kept(stack, match):
    before = stack.digest()
    new = random_like(stack, match, seed=0)
    assert stack.digest() == before
    assert list(new.modules) == list(stack.modules)
    assert new.base == stack.base
    assert new.names == tuple(f"random-{i}-{name}" for i, name in enumerate("abcd"))
    assert torch.equal(new.ranks(), stack.ranks())
    for module, units in new:
        old = stack.modules[module]
        assert units.B.shape == old.B.shape
        assert units.A.shape == old.A.shape
        assert torch.equal(units.owner, old.owner)
        assert torch.equal(units.scale, old.scale)
        full = min(old.shape) if match == "spectrum" else math.inf
        assert int(units.B.any(0).sum()) == sum(min(r, full) for r in units.ranks(4).tolist())
        assert not torch.isclose(units.A, old.A).all(1).any()


def test_sigma_is_that_of_the_raw_factors_per_module_and_factor():
    """Wide enough that a standard deviation is known to 1 %; A and B differ tenfold, the modules too."""
    shapes = {"x.q_proj": (500, 400), "x.v_proj": (300, 600)}
    adapters = [random_adapter(shapes, 16, i, alpha=(4, 16, 64)[i], name=str(i)) for i in range(3)]
    stack = Stack.of(adapters)
    stack.modules["x.q_proj"].A.mul_(10.0)
    stack.modules["x.v_proj"].B.mul_(0.2)
    new = random_like(stack, "sigma", seed=0)
    for module, (d_out, d_in) in shapes.items():
        old, got = stack.modules[module], new.modules[module]
        raw = torch.cat([old.of(i).B / (0.25, 1.0, 4.0)[i] for i in range(3)], 1)
        for i, s in enumerate((0.25, 1.0, 4.0)):
            own = got.of(i)
            assert float(own.A.std()) == pytest.approx(float(old.A.std()), rel=5 / math.sqrt(2 * 16 * d_in))
            assert float(own.B.std()) == pytest.approx(s * float(raw.std()), rel=5 / math.sqrt(2 * 16 * d_out))
            assert abs(float(own.A.mean() / own.A.std())) < 5 / math.sqrt(16 * d_in)
            assert own.B.abs().min() > 0


@pytest.mark.parametrize("match", MATCHES)
def test_norm_and_spectrum_per_adapter_and_module(stack, match):
    new, close = random_like(stack, match, seed=1), {"norm": [], "spectrum": []}
    for module, units in new:
        for i in range(4):
            if not len(units.of(i)):
                continue
            old, got = (u.of(i).delta().double() for u in (stack.modules[module], units))
            values = torch.linalg.svdvals(old), torch.linalg.svdvals(got)
            close["norm"].append(torch.isclose(old.norm(), got.norm(), rtol=1e-5, atol=0).item())
            close["spectrum"].append(torch.allclose(*values, rtol=1e-4, atol=1e-5 * float(values[0][0])))
            cosine = float((old * got).sum() / (old.norm() * got.norm()))
            assert abs(cosine) < 6 / math.sqrt(old.numel() / len(units.of(i)))
    assert len(close["norm"]) == 9
    assert all(close["norm"]) == (match != "sigma")
    assert all(close["spectrum"]) == (match == "spectrum")


def test_a_rank_above_the_module_s_width_is_matched_too():
    """Rank 40 in 64 × 32: at most 32 singular values, the other units stay zero."""
    stack = Stack.of([random_adapter({"m": (64, 32)}, 40, 0, name="wide"), random_adapter({"m": (64, 32)}, 2, 1)])
    new = random_like(stack, "spectrum", seed=0)
    old, got = (torch.linalg.svdvals(s.modules["m"].of(0).delta()) for s in (stack, new))
    torch.testing.assert_close(got, old, rtol=1e-4, atol=1e-5)
    assert int(new.modules["m"].B.any(0).sum()) == 34


@pytest.mark.parametrize("match", MATCHES)
def test_random_in_every_direction(match):
    """Over 600 seeds no entry of ΔW leans to one side (LAPACK's QR alone would make the first one positive)."""
    stack = Stack.of([random_adapter({"m": (6, 8)}, 3, 0)])
    drawn = torch.stack([random_like(stack, match, seed=seed).modules["m"].delta() for seed in range(600)])
    z = drawn.mean(0) / drawn.std(0) * math.sqrt(600)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("match", MATCHES)
def test_seeded_whatever_the_order_of_modules(stack, match):
    turned = Stack(stack.names, dict(reversed(stack.modules.items())), stack.base)
    one, same, other = (random_like(s, match, seed=n) for s, n in ((stack, 3), (turned, 3), (stack, 4)))
    assert list(same.modules) == list(reversed(one.modules))
    for module, units in one:
        assert torch.equal(units.B, same.modules[module].B)
        assert torch.equal(units.A, same.modules[module].A)
        assert not torch.equal(units.B, other.modules[module].B)
    state = torch.get_rng_state()
    random_like(stack, match, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_match(stack):
    with pytest.raises(MergeError, match="random control 'sigm' is unknown; choose one of sigma, norm, spectrum"):
        random_like(stack, "sigm", seed=0)
