"""Points and weights: pack, unpack, counts, gauge, weight decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import batches, bound_of, normal, seeds, shapes, spectra, weight

from sttp_manifold import SpectralTTManifold, TTShape, tt_svd
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.frames import random_rotation, rotate


@given(shape=shapes(max_modes=4), spectrum=spectra, seed=seeds, batch=batches)
def test_pack_and_unpack_are_inverse(shape, spectrum, seed, batch) -> None:
    M = SpectralTTManifold(shape, spectrum, bound=bound_of(spectrum))
    tt = weight(shape, spectrum, seed, batch)
    x = M.pack(tt)
    assert x.shape == (*batch, M.n_elements)
    assert M.check_point_on_manifold(x)
    assert M.unpack(x).allclose(tt)
    assert M.unpack(x).shape == shape
    if spectrum != "normalized":
        torch.testing.assert_close(M.pack(M.unpack(x)), x)


@given(shape=shapes(), spectrum=spectra)
def test_counts_are_those_of_the_plan(shape, spectrum) -> None:
    M = SpectralTTManifold(shape, spectrum)
    assert M.dim == shape.dim(spectrum)
    assert M.total_dim - M.gauge_dim == M.dim
    frames = sum(g.copies * g.d * g.r for g in M.frame_groups)
    assert M.n_elements == frames + shape.spectrum_size(spectrum)


@given(shape=shapes(max_modes=3, max_numel=120), spectrum=spectra, seed=seeds)
def test_ranks_of_the_tangent_and_horizontal_projections(shape, spectrum, seed) -> None:
    M = SpectralTTManifold(shape, spectrum)
    x = (
        M.pack(weight(shape, spectrum, seed))
        if spectrum != "bounded"
        else M.random(dtype=torch.float64)
    )
    if M.n_elements > 90:
        return
    tangent = M.proju(x, torch.eye(M.n_elements, dtype=torch.float64))
    assert torch.linalg.matrix_rank(tangent, rtol=1e-8) == M.total_dim
    horizontal = M.horizontal(x, tangent)
    assert torch.linalg.matrix_rank(horizontal, rtol=1e-7) == M.dim


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_horizontal_projection(shape, spectrum, seed, batch) -> None:
    """Orthogonal, idempotent, tangent; and what it drops does not move the weight."""
    M = SpectralTTManifold(shape, spectrum, bound=bound_of(spectrum))
    x = M.pack(weight(shape, spectrum, seed, batch))
    u = M.proju(x, normal(seed, *batch, M.n_elements))
    h, v = M.horizontal(x, u), M.vertical(x, u)
    torch.testing.assert_close(h + v, u)
    torch.testing.assert_close(M.horizontal(x, h), h, rtol=1e-7, atol=1e-8)
    assert bool((M.inner(x, h, v).abs() <= 1e-8 * (1 + M.inner(x, u))).all())
    assert M.check_vector_on_tangent(x, h)
    _, moved = torch.autograd.functional.jvp(lambda y: M.unpack(y).to_matrix(), x, v)
    assert float(moved.abs().max()) < 1e-7


@given(shape=shapes(), seed=seeds)
def test_points_on_one_orbit_are_one_weight(shape, seed) -> None:
    M = SpectralTTManifold(shape)
    tt = weight(shape, "free", seed)
    torch.manual_seed(seed)
    left = [random_rotation(c.shape[-1], dtype=torch.float64) for c in tt.left[:-1]]
    right = [random_rotation(c.shape[-1], dtype=torch.float64) for c in tt.right[:-1]]
    x, y = M.pack(tt), M.pack(rotate(tt, left, right))
    assert M.same_weight(x, y)
    assert float(M.weight_dist(x, y)) < 1e-9
    z = M.pack(weight(shape, "free", seed + 1))
    dense = torch.linalg.matrix_norm(M.unpack(x).to_matrix() - M.unpack(z).to_matrix())
    torch.testing.assert_close(M.weight_dist(x, z), dense)


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_weight_decay_is_the_gradient_of_half_the_squared_norm(
    shape, spectrum, seed, batch
) -> None:
    M = SpectralTTManifold(shape, spectrum, bound=bound_of(spectrum))
    x = M.pack(weight(shape, spectrum, seed, batch)).requires_grad_()
    W = M.unpack(x).to_matrix()
    (gradient,) = torch.autograd.grad(W.square().sum() / 2, x)
    expected = M.egrad2rgrad(x, gradient).detach()
    torch.testing.assert_close(M.weight_decay_grad(x), expected, rtol=1e-8, atol=1e-8)


def test_from_matrix() -> None:
    shape = TTShape.for_matrix(12, 10, rank=3)
    W = normal(0, 2, 12, 10)
    x = SpectralTTManifold(shape).from_matrix(W)
    torch.testing.assert_close(
        SpectralTTManifold(shape).unpack(x).to_matrix(), tt_svd(W, shape).to_matrix()
    )
    for spectrum in ("identity", "normalized", "bounded"):
        M = SpectralTTManifold(shape, spectrum)
        with pytest.raises(SpectrumError, match="project=True"):
            M.from_matrix(W)
        s = M.unpack(M.from_matrix(W, project=True)).singular_values()
        assert float(s.max()) <= 1 + 1e-12
    with pytest.raises(ShapeError, match="from_matrix"):
        SpectralTTManifold(shape).pack(weight(TTShape.for_matrix(12, 10, rank=2), "free", 0))
