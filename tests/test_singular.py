"""Singular values and vectors by Gram matrices, as a GPU takes them, against LAPACK's in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import as_on_a_gpu
from workbench import singular


def draw(shape, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    m, n = shape
    r = min(m, n) if rank is None else rank
    return (torch.randn(m, r, generator=g) @ torch.randn(r, n, generator=g)) if r else torch.zeros(m, n)


def orthonormal(x, tolerance=1e-5):
    return torch.allclose(x.T.double() @ x.double(), torch.eye(x.shape[1]).double(), atol=tolerance, rtol=0)


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 1000), rank=st.sampled_from([None, 0, 1, 2]))
def test_an_svd_by_the_gram_matrix_is_the_svd(shape, seed, rank):
    x = draw(shape, seed, rank)
    with as_on_a_gpu():
        u, s, vh = singular.svd(x)
    q = min(shape)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], q), (q,), (q, shape[1]))
    want = torch.linalg.svdvals(x.double())
    assert torch.allclose(s.double(), want, atol=2e-7 * float(want[0]) + 1e-30)
    assert torch.allclose((u * s) @ vh, x, atol=2e-6 * float(want[0]) + 1e-30)
    live = int((want > 1e-5 * want[0]).sum()) if want[0] else 0
    assert orthonormal(u[:, :live])
    assert orthonormal(vh[:live].T)
    assert torch.isfinite(vh).all()
    assert (s.diff() <= 0).all()


@settings(max_examples=40)
@given(shape=SHAPES, rank=st.integers(1, 14), seed=st.integers(0, 1000))
def test_a_factored_svd_is_that_of_the_product(shape, rank, seed):
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g)
    with as_on_a_gpu():
        u, s, vh = singular.factored_svd(B, A)
    exact = singular.factored_svd(B.double(), A.double())
    assert (u.shape, s.shape, vh.shape) == tuple(x.shape for x in exact)
    assert torch.allclose(s.double(), exact[1], atol=1e-5 * float(exact[1][0]))
    assert torch.allclose((u * s) @ vh, B @ A, atol=1e-5 * float(exact[1][0]))


def test_singular_values_over_five_decades_and_their_vectors():
    """What `numerical_rank` keeps of fp32, down to 1.2·10⁻⁵ of the largest, is found as by LAPACK."""
    g = torch.Generator().manual_seed(0)
    q, p = (torch.linalg.qr(torch.randn(n, 20, generator=g).double()).Q for n in (60, 50))
    s = torch.logspace(0, -4.8, 20).double()
    for size in (1e-20, 1.0, 1e18):
        x = (size * (q * s) @ p.T).float()
        with as_on_a_gpu():
            u, got, vh = singular.svd(x)
        assert torch.allclose(got[:20].double() / size, s, atol=1e-6, rtol=0)
        assert orthonormal(u[:, :20], 1e-4)
        assert orthonormal(vh[:20].T, 1e-4)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (9, 9)])
def test_left_vectors_are_orthonormal_and_span_columns_however_small(shape):
    x = draw(shape) * torch.logspace(0, -12, shape[1])
    x[:, 1] = x[:, 0]  # dependent
    with as_on_a_gpu():
        u, s = singular.left(x)
    assert u.shape == (shape[0], min(shape))
    assert orthonormal(u)
    assert torch.allclose(s.double(), torch.linalg.svdvals(x.double()), atol=1e-6 * float(s[0]))
    lost = (x.double() - u.double() @ (u.T.double() @ x.double())).norm(dim=0) / x.norm(dim=0)
    assert lost.max() < 1e-5


def test_the_polar_factor_is_the_nearest_orthonormal_matrix_or_a_partial_isometry():
    x = draw((30, 7), 1)
    for columns in (x, torch.cat([x, x[:, :3]], 1), torch.cat([x, torch.zeros(30, 2)], 1), torch.zeros(5, 3)):
        want = singular.polar(columns.double(), 1e-6)
        with as_on_a_gpu():
            assert torch.allclose(singular.polar(columns, 3e-4).double(), want, atol=1e-5)
        assert torch.allclose(singular.polar(columns, 3e-4).double(), want, atol=1e-5)


def test_fp64_and_processors_keep_lapack():
    x = draw((8, 5))
    assert all(
        torch.equal(a, b) for a, b in zip(singular.svd(x), torch.linalg.svd(x, full_matrices=False), strict=True)
    )
    with as_on_a_gpu():
        assert singular.by_gram(x)
        assert not singular.by_gram(x.double())
    assert not singular.by_gram(x)


def test_places_are_those_of_masks():
    owner = torch.tensor([3, 0, 3, 7, 0, 3])
    assert {i: at.tolist() for i, at in singular.places(owner).items()} == {0: [1, 4], 3: [0, 2, 5], 7: [3]}
    assert singular.places(owner[:0]) == {}
