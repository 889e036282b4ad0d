"""geoopt's contract, against geoopt's own product of Euclidean Stiefel factors, with batches.

The laws are those that geoopt holds each of its manifolds to: projections, retraction, transport,
broadcasting over batch dimensions, points and vectors checked by geoopt's own checks.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from strategies import batches, normal, seeds, shapes, spectra

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import ShapeError


def by_geoopt(M: SpectralTTManifold):
    """The same product, factor after factor, by geoopt."""
    frames = sum(g.copies for g in M.frame_groups)
    return geoopt.ProductManifold(
        *((geoopt.EuclideanStiefel(), s) for s in M.shapes[:frames]),
        *((geoopt.Euclidean(ndim=len(s)), s) for s in M.shapes[frames:]),
    )


def point(M: SpectralTTManifold, seed: int, batch: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = M.random(*batch, M.n_elements, dtype=torch.float64, generator=generator)
    return x.detach().as_subclass(torch.Tensor)


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_every_operation_equals_geoopt(shape, spectrum, seed, batch) -> None:
    M = SpectralTTManifold(shape, spectrum)
    P = by_geoopt(M)
    x = point(M, seed, batch)
    e, f = normal(seed + 1, *batch, M.n_elements), normal(seed + 2, *batch, M.n_elements)
    u, v = M.proju(x, e), M.proju(x, f)
    assert M.check_point_on_manifold(x)
    assert M.check_vector_on_tangent(x, u)
    equal = torch.testing.assert_close
    equal(u, P.proju(x, e))
    equal(M.egrad2rgrad(x, e), P.egrad2rgrad(x, e))
    equal(M.projx(x + 0.3 * e), P.projx(x + 0.3 * e), rtol=1e-6, atol=1e-6)
    equal(M.projx(x), x)
    equal(M.retr(x, u), P.retr(x, u))
    equal(M.expmap(x, u), P.expmap(x, u), rtol=1e-6, atol=1e-7)
    equal(M.inner(x, u, v), P.inner(x, u, v))
    equal(M.inner(x, u, keepdim=True), P.inner(x, u, keepdim=True))
    equal(M.component_inner(x, u, v), P.component_inner(x, u, v))
    equal(M.norm(x, u), P.inner(x, u).sqrt())
    y = M.retr(x, u)
    equal(M.transp(x, y, v), P.transp(x, y, v))
    for ours, theirs in (
        (M.retr_transp(x, u, v), P.retr_transp(x, u, v)),
        (M.expmap_transp(x, u, v), P.expmap_transp(x, u, v)),
    ):
        for a, b in zip(ours, theirs, strict=True):
            equal(a, b, rtol=1e-6, atol=1e-7)
    equal(M.transp_follow_retr(x, u, v), M.retr_transp(x, u, v)[1])
    equal(M.transp_follow_expmap(x, u, v), M.expmap_transp(x, u, v)[1])
    assert M.check_point_on_manifold(y)
    assert M.check_vector_on_tangent(y, M.transp(x, y, v))


@given(shape=shapes(), spectrum=spectra, seed=seeds)
def test_the_retraction_is_of_first_order(shape, spectrum, seed) -> None:
    """|retr(x, tu) - exp(x, tu)| falls at least as t^2."""
    M = SpectralTTManifold(shape, spectrum)
    x = point(M, seed, ())
    u = M.proju(x, normal(seed + 1, M.n_elements))
    u = u / u.norm().clamp_min(1e-6)
    gaps = [float((M.retr(x, t * u) - M.expmap(x, t * u)).norm()) for t in (1e-2, 1e-3)]
    assert gaps[1] < max(gaps[0] / 50, 1e-12)


def test_equal_frames_lie_together_as_one_batch_without_a_copy() -> None:
    M = SpectralTTManifold(TTShape((4, 2, 2), (2, 2, 4), rank=3))
    assert [(g.copies, g.d, g.r) for g in M.frame_groups] == [(2, 4, 3), (4, 6, 3)]
    x = M.random(M.n_elements)
    group = M.frame_groups[1]
    frames = x[..., group.span].unflatten(-1, (group.copies, group.d, group.r))
    assert frames.data_ptr() == x[..., group.span].data_ptr()
    eye = torch.eye(3).expand(4, 3, 3)
    torch.testing.assert_close(frames.mT @ frames, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["identity", "free", "bounded"])
def test_points_of_every_kind(dtype, spectrum) -> None:
    M = SpectralTTManifold(TTShape.for_matrix(12, 10, rank=3), spectrum)
    for x in (
        M.random(dtype=dtype),
        M.origin(2, M.n_elements, dtype=dtype),
        M.random((2, M.n_elements), dtype=dtype),
    ):
        assert isinstance(x, geoopt.ManifoldTensor)
        assert x.manifold is M
        assert x.dtype == dtype
        M.assert_check_point_on_manifold(x)
    parameter = M.random_parameter(2, 3, dtype=dtype)
    assert isinstance(parameter, geoopt.ManifoldParameter)
    assert parameter.shape == (2, 3, M.n_elements)
    assert parameter.requires_grad
    torch.testing.assert_close(M.origin(dtype=dtype, seed=None), M.origin(dtype=dtype, seed=7))


def test_points_survive_copying_and_saving() -> None:
    M = SpectralTTManifold(TTShape.for_matrix(12, 10, rank=3))
    x = M.random_parameter()
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    for y in (copy.deepcopy(x), torch.load(buffer, weights_only=False)):
        assert type(y) is geoopt.ManifoldParameter
        assert torch.equal(y, x)
        assert y.manifold.shape == M.shape
        assert torch.equal(y.manifold.unpack(y).to_matrix(), M.unpack(x).to_matrix())


def test_what_is_refused() -> None:
    M = SpectralTTManifold(TTShape.for_matrix(12, 10, rank=3))
    with pytest.raises(ShapeError, match="n_elements"):
        M.random(3)
    with pytest.raises(ShapeError, match="n_elements"):
        M.origin(())
    with pytest.raises(ShapeError, match="flat point"):
        M.unpack(torch.zeros(3))
    with pytest.raises(ValueError, match="last dimension"):
        geoopt.ManifoldParameter(torch.zeros(3), manifold=M)
    with pytest.raises(NotImplementedError):
        M.dist(M.random(), M.random())
    off = M.random() * 2
    assert not M.check_point_on_manifold(off)


def test_it_prints_its_plan() -> None:
    M = SpectralTTManifold(TTShape.svd(4, 3, 2), "bounded", bound=2.0)
    assert repr(M) == "SpectralTTManifold(4 | 3, ranks 1-2-1, spectrum='bounded', bound=2.0)"
