"""The manifold of fixed TT rank: its laws over random plans, spectra and batches, in float64.

Judged on dense matrices: a tangent vector by the matrix that it stands for.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import batches, normal, seeds, shapes, weight
from torch import Tensor

from sttp_manifold import FixedTTRankManifold, SpectralTT, TTShape, truncate, tt_svd
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import ManifoldError, ShapeError, SpectrumError
from sttp_manifold.frames import random_rotation, rotate
from sttp_manifold.manifolds import interfaces
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD

# "given" has a pair of equal singular values and, from rank three on, different ones.
kinds = st.sampled_from(["full", "identity", "given"])
small = shapes(max_modes=3, max_numel=200)


def manifold(shape: TTShape, kind: str, **options) -> FixedTTRankManifold:
    if kind == "given":
        return FixedTTRankManifold(
            shape, [2.0, 2.0, *(1.0 + 0.5 * k for k in range(5))][: shape.rank], **options
        )
    return FixedTTRankManifold(shape, kind, **options)


def point(F: FixedTTRankManifold, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    """With every third seed all singular values are equal, where other coordinates break."""
    kind = "identity" if seed % 3 == 2 else "full"
    return F.pack(weight(F.shape, kind, seed, batch), project=True)


def tangent(F: FixedTTRankManifold, x: Tensor, seed: int) -> Tensor:
    """A random tangent vector of norm one."""
    u = F.project_matrix(x, normal(seed, *x.shape[:-1], F.shape.d_out, F.shape.d_in))
    return u / F.norm(x, u, keepdim=True).clamp_min(1e-300)


def quartic(F: FixedTTRankManifold, seed: int):
    target = normal(seed, F.shape.d_out, F.shape.d_in)
    mask = normal(seed + 1, F.shape.d_out, F.shape.d_in) > 0

    def cost(tt: SpectralTT) -> Tensor:
        gap = tt.to_matrix() - target
        return (mask * gap).square().sum() / 2 + gap.pow(4).sum() / 8 + tt.norm() ** 2 / 3

    def derivative(W: Tensor) -> Tensor:
        gap = W - target
        return mask * gap + gap.pow(3) / 2 + 2 * W / 3

    return cost, derivative


def least_singular_value(F: FixedTTRankManifold, x: Tensor) -> float:
    """Of all unfoldings: the radius of curvature of the manifold at ``x``."""
    modes = [*F.shape.out_modes, *F.shape.in_modes]
    W, size, least = F.to_matrix(x), 1, []
    for k, mode in enumerate(modes[:-1], start=1):
        size *= mode
        s = torch.linalg.svdvals(W.reshape(size, -1))
        least.append(float(s[F.shape.ranks[k] - 1]))
    return min(least)


# -- tangent vectors ----------------------------------------------------------------------------


@given(shape=small, kind=kinds, seed=seeds)
def test_projection_is_orthogonal_and_has_the_rank_of_the_dimension(shape, kind, seed) -> None:
    F = manifold(shape, kind)
    x = point(F, seed)
    eye = torch.eye(shape.numel, dtype=torch.float64)
    u = F.project_matrix(x, eye.unflatten(-1, (shape.d_out, shape.d_in)))
    P = F.ambient_vector(x, u).flatten(1)
    torch.testing.assert_close(P, P.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-10)
    assert round(float(P.trace())) == F.dim
    assert F.check_vector_on_tangent(x, u)


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_coordinates_are_an_isometry(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    x = point(F, seed, batch)
    u, v = tangent(F, x, seed + 1), tangent(F, x, seed + 2)
    A, B = F.ambient_vector(x, u), F.ambient_vector(x, v)
    torch.testing.assert_close(F.inner(x, u, v), (A * B).sum((-2, -1)), rtol=0, atol=1e-11)
    torch.testing.assert_close(F.norm(x, u), torch.linalg.matrix_norm(A))
    torch.testing.assert_close(F.inner(x, u, keepdim=True), F.inner(x, u).unsqueeze(-1))
    torch.testing.assert_close(F.proju(x, u), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(F.project_matrix(x, A), u, rtol=0, atol=1e-11)
    # The nearest tangent coordinates to any: what is dropped is orthogonal to all that is kept.
    e = normal(seed + 3, *batch, F.n_elements)
    p = F.proju(x, e)
    torch.testing.assert_close(F.proju(x, p), p, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        ((e - p) * u).sum(-1), torch.zeros(batch, dtype=e.dtype), rtol=0, atol=1e-9
    )


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_what_is_projected_may_be_dense_a_train_or_sparse(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    x = point(F, seed, batch)
    Z = weight(TTShape(shape.out_modes, shape.in_modes, rank=shape.rank + 2), "full", seed + 1)
    expected = F.project_matrix(x, Z.to_matrix().expand(*batch, -1, -1))
    torch.testing.assert_close(F.project_weight(x, Z), expected, rtol=0, atol=1e-10)
    generator = torch.Generator().manual_seed(seed)
    i, j = (torch.randint(size, (17,), generator=generator) for size in (shape.d_out, shape.d_in))
    values = normal(seed, *batch, 17)
    sparse = torch.zeros(*batch, shape.numel, dtype=torch.float64)
    sparse = sparse.index_add(-1, i * shape.d_in + j, values)
    expected = F.project_matrix(x, sparse.unflatten(-1, (shape.d_out, shape.d_in)))
    torch.testing.assert_close(F.project_entries(x, i, j, values), expected, rtol=0, atol=1e-10)


def test_many_entries_are_added_in_parts(monkeypatch) -> None:
    F = FixedTTRankManifold(TTShape((3, 4, 2), (2, 5, 3), rank=4))
    x = point(F, 0)
    i, j = torch.randint(24, (50,)), torch.randint(30, (50,))
    values = normal(0, 50)
    expected = F.project_entries(x, i, j, values)
    for kind in (torch.uint8, torch.uint16, torch.int8, torch.uint64):
        found = F.project_entries(x, i.to(kind), j.to(kind), values)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = F.project_entries(x, i - F.shape.d_out, j - F.shape.d_in, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    monkeypatch.setattr(interfaces, "_CHUNK", 7 * 16)
    torch.testing.assert_close(F.project_entries(x, i, j, values), expected)


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_gradient_is_the_projected_euclidean_gradient(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    x = point(F, seed, batch)
    target = normal(seed + 1, shape.d_out, shape.d_in)
    leaf = x.clone().requires_grad_()
    cost = (F.unpack(leaf).to_matrix() - target).pow(4).sum() / 4
    (e,) = torch.autograd.grad(cost, leaf)
    expected = F.project_matrix(x, (F.to_matrix(x) - target).pow(3))
    tolerance = 1e-10 * (1 + float(expected.abs().max())) / min(1.0, _least(F, x))
    torch.testing.assert_close(F.egrad2rgrad(x, e), expected, rtol=0, atol=tolerance)


def _least(F: FixedTTRankManifold, x: Tensor) -> float:
    flat = x.reshape(-1, x.shape[-1])
    return min(least_singular_value(F, one) for one in flat)


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds)
def test_tangent_vectors_as_trains(shape, kind, seed) -> None:
    F = manifold(shape, kind)
    x = point(F, seed)
    u = tangent(F, x, seed + 1)
    tt = F.tangent_weight(x, u)
    assert float(tt.orthonormality_error()) < 1e-12
    torch.testing.assert_close(tt.to_matrix(), F.ambient_vector(x, u), rtol=0, atol=1e-11)


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_component_inner_scales_to_a_tangent_vector(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    x = point(F, seed, batch)
    u, v = tangent(F, x, seed + 1), tangent(F, x, seed + 2)
    parts = F.component_inner(x, u, v)
    assert F.check_vector_on_tangent(x, u * (1 + parts.square()), atol=1e-9, rtol=1e-9)
    # Each entry of a core holds the sum over it: averaging undoes the spreading.
    sizes = [
        slice(start, start + d * r)
        for start, (d, r) in zip(F.total_space._starts, shape.merged.frame_shapes, strict=True)
    ]
    total = sum(parts[..., part].mean(-1) for part in sizes)
    total = total + parts[..., F.total_space.spectrum_slice].mean(-1)
    torch.testing.assert_close(total, F.inner(x, u, v), rtol=0, atol=1e-11)


# -- moving -------------------------------------------------------------------------------------


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds)
def test_orders_of_the_retractions(shape, kind, seed) -> None:
    """What a step misses falls as t^2; its tangential part by TT-SVD as t^3."""
    for name, order in (("svd", 3), ("qr", 2)):
        F = manifold(shape, kind, retraction=name)
        x = point(F, seed)
        radius = least_singular_value(F, x)
        assume(radius > 1e-3)
        u = tangent(F, x, seed + 1) * radius
        W, A = F.to_matrix(x), F.ambient_vector(x, u)
        rounding = 1e-14 * (1 + float(W.norm()) / radius)
        misses, along = [], []
        for t in (4e-2, 4e-3):
            y = F.retr(x, t * u)
            assert F.check_point_on_manifold(y, atol=1e-10, rtol=1e-10)
            miss = F.to_matrix(y) - W - t * A
            misses.append(float(miss.norm()) / radius)
            along.append(float(F.norm(x, F.project_matrix(x, miss))) / radius)
        assert misses[1] < max(misses[0] / 50, rounding), name
        assert along[1] < max(along[0] / (50 if order == 2 else 500), rounding), name
        assert torch.equal(F.retr_transp(x, u, u)[0], F.retr(x, u))


def test_solvers_get_the_second_order_and_training_the_first() -> None:
    shape = TTShape((3, 4, 2), (2, 5, 3), rank=4)
    F, svd, qr = (manifold(shape, "full", retraction=name) for name in (None, "svd", "qr"))
    x = point(F, 0)
    u = tangent(F, x, 1)
    assert torch.equal(F.retr(x, u), svd.retr(x, u))
    assert torch.equal(F.with_retraction("qr").retr(x, u), qr.retr(x, u))
    assert not F.same_weight(svd.retr(x, u), qr.retr(x, u))
    trained = {M.retraction: M.random_parameter().manifold.retraction for M in (svd, qr)}
    assert trained == {"svd": "svd", "qr": "qr"}
    assert F.random_parameter().manifold.retraction == "qr"


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_transport_is_the_projection_at_the_new_point(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    x, y = point(F, seed, batch), point(F, seed + 7, batch)
    v = tangent(F, x, seed + 1)
    expected = F.project_matrix(y, F.ambient_vector(x, v))
    torch.testing.assert_close(F.transp(x, y, v), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(F.transp(x, x, v), v, rtol=0, atol=1e-11)
    z, w = F.retr_transp(x, 0.01 * v, v)
    torch.testing.assert_close(w, F.transp(x, z, v), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        F.transp_follow_retr(x, 0.01 * v, v), F.transp(x, F.retr(x, 0.01 * v), v)
    )


# -- second order -------------------------------------------------------------------------------


@given(shape=shapes(max_modes=3), kind=kinds, seed=seeds)
def test_hessian_is_symmetric_and_the_second_derivative_along_geodesics(shape, kind, seed) -> None:
    """By finite differences along the second-order retraction; the cost reads the spectrum too."""
    F = manifold(shape, kind)
    x = point(F, seed)
    radius = least_singular_value(F, x)
    assume(radius > 2e-2)
    cost, _ = quartic(F, seed + 3)
    u, v = tangent(F, x, seed + 1), tangent(F, x, seed + 2)
    Hu, Hv = F.hessian(cost, x, u), F.hessian(cost, x, v)
    assert F.check_vector_on_tangent(x, Hu)
    size = 1 + float(F.norm(x, Hu)) + float(F.norm(x, Hv))
    assert abs(float(F.inner(x, Hu, v) - F.inner(x, u, Hv))) < 1e-11 * size
    torch.testing.assert_close(F.hessian(cost, x, u - 3 * v), Hu - 3 * Hv, rtol=0, atol=1e-9 * size)
    t = 2e-2 * radius
    f = [float(cost(F.unpack(F.retr(x, k * t * u)))) for k in (-2, -1, 0, 1, 2)]
    second = (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * t * t)
    rounding = 64 * torch.finfo(torch.float64).eps * abs(f[2]) / t**2
    assert abs(second - float(F.inner(x, Hu, u))) < 1e-3 * size / min(1.0, radius) + rounding


def test_hessian_matches_a_dense_calculation_at_coinciding_singular_values() -> None:
    """One mode a side: P D^2f P and the curvature terms of fixed rank, at S orthogonal.

    Vandereycken 2013, Prop. 2.3: ``Hess f[xi] = P D^2f[xi] + P_U^perp Z V_p S^-T V^T + mirror``,
    ``Z`` the Euclidean gradient; transposed where ``S`` is no diagonal.
    """
    shape = TTShape.svd(7, 6, rank=3)
    F = FixedTTRankManifold(shape)
    x = point(FixedTTRankManifold(shape, "identity"), 0)
    target, mask = normal(1, 7, 6), (normal(2, 7, 6) > 0).double()

    def cost(tt):
        return (mask * (tt.to_matrix() - target)).square().sum() / 2

    u = tangent(F, x, 3)
    tt, A = F.unpack(x), F.ambient_vector(x, u)
    (U, V), S = tt.frames(), tt.spectrum
    Z = mask * (tt.to_matrix() - target)
    Up = (A @ V) - U @ (U.mT @ A @ V)
    Vp = (A.mT @ U) - V @ (V.mT @ A.mT @ U)
    left, right = (torch.eye(n, dtype=Z.dtype) - Q @ Q.mT for n, Q in ((7, U), (6, V)))
    expected = F.ambient_vector(x, F.project_matrix(x, mask * A))
    expected = expected + left @ Z @ Vp @ S.inverse().mT @ V.mT
    expected = expected + U @ S.inverse().mT @ Up.mT @ Z @ right
    torch.testing.assert_close(F.ambient_vector(x, F.hessian(cost, x, u)), expected)


def test_hessian_of_a_cost_without_curvature_or_dependence() -> None:
    shape = TTShape.for_matrix(12, 10, rank=3)
    F = FixedTTRankManifold(shape)
    x = point(F, 0)
    u = tangent(F, x, 1)
    assert not F.hessian(lambda tt: torch.zeros((), dtype=torch.float64), x, u).any()
    # A linear cost is curved by the manifold alone.
    Z = normal(2, 12, 10)
    curved = F.hessian(lambda tt: (tt.to_matrix() * Z).sum(), x, u)
    assert float(F.norm(x, curved)) > 1e-3
    flat = FixedTTRankManifold(TTShape.svd(4, 3, rank=3))
    y = point(flat, 0)
    e = flat.hessian(lambda tt: (tt.to_matrix() * normal(2, 4, 3)).sum(), y, tangent(flat, y, 1))
    assert F.dim == shape.dim("full")
    assert flat.dim == 12
    assert float(e.norm()) < 1e-12


# -- representation -----------------------------------------------------------------------------


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds)
def test_nothing_depends_on_the_gauge(shape, kind, seed) -> None:
    F = manifold(shape, kind)
    x = point(F, seed)
    tt = F.unpack(x)
    torch.manual_seed(seed)
    left, right = (
        [random_rotation(c.shape[-1], dtype=torch.float64) for c in cores[:-1]]
        for cores in (tt.left, tt.right)
    )
    turned = rotate(tt, left, right)
    a, b = (random_rotation(shape.rank, dtype=torch.float64) for _ in range(2))
    inner = (b.mT @ turned.right[0].flatten(-2)).unflatten(-1, turned.right[0].shape[-2:])
    turned = SpectralTT(
        (*turned.left[:-1], turned.left[-1] @ a),
        a.mT @ turned.spectrum @ b,
        (inner, *turned.right[1:]),
        tt.shape,
    )
    y = F.pack(turned)
    assert F.same_weight(x, y)
    Z = normal(seed + 1, shape.d_out, shape.d_in)
    u, v = F.project_matrix(x, Z), F.project_matrix(y, Z)
    equal = torch.testing.assert_close
    scale = 1e-9 * (1 + float(Z.norm())) / min(1.0, least_singular_value(F, x))
    equal(F.ambient_vector(x, u), F.ambient_vector(y, v), rtol=0, atol=scale)
    equal(F.transp(x, y, u), v, rtol=0, atol=scale)
    step = 0.1 * least_singular_value(F, x) / float(F.norm(x, u).clamp_min(1e-9))
    assert F.unpack(F.retr(x, step * u)).allclose(F.unpack(F.retr(y, step * v)), rtol=1e-7)
    qr = manifold(shape, kind, retraction="qr")
    # The Q factor of a rotated frame is no rotated Q factor: equal to first order only.
    misses = [float(qr.weight_dist(qr.retr(x, t * u), qr.retr(y, t * v))) for t in (step, step / 8)]
    assert misses[1] < max(misses[0] / 32, 1e-13 * float(tt.norm()))
    cost, _ = quartic(F, seed)
    equal(
        F.ambient_vector(x, F.hessian(cost, x, u)),
        F.ambient_vector(y, F.hessian(cost, y, v)),
        rtol=0,
        atol=1e2 * scale * (1 + float(F.norm(x, F.hessian(cost, x, u)))),
    )


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds)
def test_a_batch_is_each_by_itself(shape, kind, seed) -> None:
    F = manifold(shape, kind)
    x = point(F, seed, (3,))
    u = tangent(F, x, seed + 1) * 0.1
    y = point(F, seed + 5, (3,))
    i, j = torch.tensor([0, shape.d_out - 1]), torch.tensor([shape.d_in - 1, 0])
    values = normal(seed, 3, 2)
    calls = {
        "proju": lambda k: F.proju(x[k], y[k]),
        "egrad2rgrad": lambda k: F.egrad2rgrad(x[k], y[k]),
        "retr": lambda k: F.to_matrix(F.retr(x[k], u[k])),
        "retr_transp": lambda k: F.to_matrix(F.retr_transp(x[k], u[k], u[k])[0]),
        "transp": lambda k: F.transp(x[k], y[k], u[k]),
        "ambient_vector": lambda k: F.ambient_vector(x[k], u[k]),
        "project_entries": lambda k: F.project_entries(x[k], i, j, values[k]),
        "velocities": lambda k: F.velocities(x[k], u[k]),
        "inner": lambda k: F.inner(x[k], u[k]),
    }
    for name, call in calls.items():
        many = call(slice(None))
        for k in range(3):
            torch.testing.assert_close(
                many[k], call(k), rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
    # One point with many vectors.
    for k in range(3):
        torch.testing.assert_close(F.proju(x[0], y)[k], F.proju(x[0], y[k]))


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds)
def test_projx_keeps_the_weight(shape, kind, seed) -> None:
    F = manifold(shape, kind)
    x = point(F, seed)
    drifted = x + 0.05 * normal(seed + 1, F.n_elements)
    back = F.projx(drifted)
    assert F.check_point_on_manifold(back, atol=1e-10, rtol=1e-10)
    if kind == "full":
        torch.testing.assert_close(F.to_matrix(back), F.to_matrix(drifted))
    assert F.same_weight(F.projx(x), x)


@given(shape=shapes(max_modes=4), kind=kinds, seed=seeds, batch=batches)
def test_random_points_and_counts(shape, kind, seed, batch) -> None:
    F = manifold(shape, kind)
    generator = torch.Generator().manual_seed(seed)
    x = F.random(*batch, F.n_elements, dtype=torch.float64, generator=generator)
    assert isinstance(x, geoopt.ManifoldTensor)
    assert x.shape == (*batch, F.n_elements)
    assert F.check_point_on_manifold(x)
    lost = {"full": 0, "identity": shape.rank * (shape.rank + 1) // 2}
    if kind in lost:
        assert F.dim == shape.dim("full") - lost[kind] == shape.dim(kind)
    s = F.unpack(x).singular_values()
    if kind == "identity":
        torch.testing.assert_close(s, torch.ones_like(s))
    if kind == "given":
        wanted = torch.tensor(sorted(F.spectrum, reverse=True), dtype=torch.float64)
        torch.testing.assert_close(s, wanted.expand_as(s))


def test_origin_is_one_point_and_of_full_rank() -> None:
    F = FixedTTRankManifold(TTShape((3, 4, 2), (2, 5, 3), rank=4))
    x = F.origin(dtype=torch.float64)
    assert torch.equal(x, F.origin(dtype=torch.float64))
    assert not torch.equal(x, F.origin(dtype=torch.float64, seed=1))
    assert F.origin(2, F.n_elements).shape == (2, F.n_elements)
    assert F.check_point_on_manifold(x)
    assert least_singular_value(F, x.as_subclass(Tensor)) > 1e-2


@pytest.mark.parametrize("kind", ["full", "identity", "given"])
def test_float32_keeps_its_precision(kind) -> None:
    F = manifold(TTShape.for_conv((32, 16, 3, 3), rank=6), kind)
    x = point(F, 0).float()
    Z = normal(1, F.shape.d_out, F.shape.d_in)
    u, exact = F.project_matrix(x, Z.float()), F.project_matrix(x.double(), Z)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.double(), exact, rtol=0, atol=1e-4)
    y = F.retr(x, 1e-2 * u)
    assert y.dtype == torch.float32
    assert F.check_point_on_manifold(y)
    expected = F.to_matrix(F.retr(x.double(), 1e-2 * exact))
    torch.testing.assert_close(F.to_matrix(y).double(), expected, rtol=0, atol=1e-4)

    def cost(tt):
        return (tt.to_matrix() - Z.to(tt.dtype)).square().sum() / 2

    H = F.hessian(cost, x, u)
    torch.testing.assert_close(H.double(), F.hessian(cost, x.double(), exact), rtol=1e-3, atol=1e-3)


def test_copies_pickles_and_prints() -> None:
    F = FixedTTRankManifold(TTShape((4,), (3,), rank=2), [2.0, 1.0], retraction="qr", damping=1e-6)
    for G in (copy.deepcopy(F), pickle.loads(pickle.dumps(F))):
        assert repr(G) == repr(F)
        assert G.dim == F.dim
    assert "spectrum=(2.0, 1.0)" in repr(F)
    assert "damping=1e-06" in repr(F)
    parameter = F.random_parameter(2)
    assert isinstance(parameter, geoopt.ManifoldParameter)
    assert copy.deepcopy(parameter).manifold.spectrum == (2.0, 1.0)


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "identity", "given"])
@pytest.mark.parametrize("retraction", ["qr", "svd"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (RiemannianAdam, {"lr": 0.03}),
        (RiemannianAdam, {"lr": 0.03, "amsgrad": True, "weight_decay": 1e-4}),
        (RiemannianSGD, {"lr": 0.05, "momentum": 0.9}),
        (geoopt.optim.RiemannianAdam, {"lr": 0.03}),
        (geoopt.optim.RiemannianSGD, {"lr": 0.05, "momentum": 0.9}),
    ],
)
def test_optimizers_of_geoopt_and_ours_train_on_it(kind, retraction, optimizer, options) -> None:
    F = manifold(TTShape.for_matrix(12, 10, rank=3), kind, retraction=retraction)
    target = F.to_matrix(point(F, 0))
    x = geoopt.ManifoldParameter(geoopt.ManifoldTensor(point(F, 1), manifold=F), requires_grad=True)
    opt = optimizer([x], **options)
    losses = []
    for _ in range(80):
        opt.zero_grad()
        loss = (F.unpack(x).to_matrix() - target).square().sum()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert F.check_point_on_manifold(x, atol=1e-8, rtol=1e-8)
    assert losses[-1] < 0.7 * losses[0]


# -- damping ------------------------------------------------------------------------------------


def test_damping_bounds_what_small_singular_values_blow_up() -> None:
    shape = TTShape.svd(8, 7, rank=3)
    tt = weight(shape, "free", 0)
    near = SpectralTT(tt.left, tt.spectrum * torch.tensor([1.0, 1.0, 1e-9]).double(), tt.right)
    exact, damped = FixedTTRankManifold(shape), FixedTTRankManifold(shape, damping=1e-3)
    x = exact.pack(near)
    u = tangent(exact, x, 1)
    assert float(exact.velocities(x, u).norm()) > 1e7
    assert float(damped.velocities(x, u).norm()) < 1e4
    # Far from lower rank it changes next to nothing.
    y = exact.pack(weight(shape, "free", 0))
    v = tangent(exact, y, 1)
    tiny = FixedTTRankManifold(shape, damping=1e-8)
    torch.testing.assert_close(tiny.velocities(y, v), exact.velocities(y, v))
    e = normal(5, exact.n_elements)
    torch.testing.assert_close(tiny.egrad2rgrad(y, e), exact.egrad2rgrad(y, e))


# -- what is refused ----------------------------------------------------------------------------

SHAPE = TTShape((3, 4), (2, 5), rank=3)


def low_rank() -> SpectralTT:
    tt = weight(SHAPE, "free", 0)
    s = tt.spectrum.clone()
    s[-1] = 0
    return SpectralTT(tt.left, s, tt.right, SHAPE)


def singular_point() -> tuple[FixedTTRankManifold, Tensor]:
    F = FixedTTRankManifold(SHAPE)
    return F, F.total_space.pack(low_rank())


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ManifoldError, "'svd'", lambda: FixedTTRankManifold(SHAPE, retraction="polar")),
        (ManifoldError, "damping=1e-8", lambda: FixedTTRankManifold(SHAPE, damping=-1.0)),
        (ManifoldError, "damping", lambda: FixedTTRankManifold(SHAPE, damping=1.0)),
        (SpectrumError, "spectrum=\\[3.0", lambda: FixedTTRankManifold(SHAPE, "free")),
        (SpectrumError, "3 singular values, got 2", lambda: FixedTTRankManifold(SHAPE, [1, 2])),
        (SpectrumError, "lower the rank", lambda: FixedTTRankManifold(SHAPE, [1, 2, 0])),
        (SpectrumError, "finite", lambda: FixedTTRankManifold(SHAPE, [1, 2, float("inf")])),
        (
            SpectrumError,
            "project=True",
            lambda: FixedTTRankManifold(SHAPE, "identity").pack(weight(SHAPE, "free", 0)),
        ),
        (ManifoldError, "truncate", lambda: FixedTTRankManifold(SHAPE).pack(low_rank())),
        (
            ShapeError,
            "tt_svd|from_matrix",
            lambda: FixedTTRankManifold(SHAPE).pack(truncate(weight(SHAPE, "free", 0), rank=2)),
        ),
        (ShapeError, "n_elements", lambda: FixedTTRankManifold(SHAPE).random(3)),
        (ShapeError, "flat point", lambda: FixedTTRankManifold(SHAPE).unpack(torch.ones(3))),
        (
            ShapeError,
            "12, 10",
            lambda: FixedTTRankManifold(SHAPE).project_matrix(
                FixedTTRankManifold(SHAPE).origin(), torch.ones(3, 3)
            ),
        ),
        (
            ShapeError,
            "project_matrix",
            lambda: FixedTTRankManifold(SHAPE).project_weight(
                FixedTTRankManifold(SHAPE).origin(dtype=torch.float64),
                weight(TTShape.svd(12, 10, rank=3), "free", 0),
            ),
        ),
        (
            ShapeError,
            "one value for each of 2 places",
            lambda: FixedTTRankManifold(SHAPE).project_entries(
                FixedTTRankManifold(SHAPE).origin(),
                torch.tensor([0, 1]),
                torch.tensor([0, 1]),
                torch.ones(3),
            ),
        ),
        (
            ShapeError,
            "outside",
            lambda: FixedTTRankManifold(SHAPE).project_entries(
                FixedTTRankManifold(SHAPE).origin(),
                torch.tensor([12]),
                torch.tensor([0]),
                torch.ones(1),
            ),
        ),
        (
            ManifoldError,
            "damping=1e-8",
            lambda: singular_point()[0].velocities(
                singular_point()[1], torch.ones_like(singular_point()[1])
            ),
        ),
        (
            ManifoldError,
            "scalar",
            lambda: FixedTTRankManifold(SHAPE).hessian(
                lambda tt: tt.spectrum,
                FixedTTRankManifold(SHAPE).origin(),
                torch.ones(FixedTTRankManifold(SHAPE).n_elements),
            ),
        ),
        (
            NotImplementedError,
            "second order",
            lambda: FixedTTRankManifold(SHAPE).expmap(torch.ones(1), torch.ones(1)),
        ),
    ],
)
def test_bad_calls_say_what_to_do(error, match, call) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("kind", "spoil", "match"),
    [
        ("full", lambda x: x[:-1], "shape"),
        ("full", lambda x: x * 1.1, "projx"),
        ("identity", lambda x: torch.cat((x[:-9], 1.1 * x[-9:])), "missed"),
        ("full", lambda x: torch.cat((x[:-9], torch.zeros(9).double())), "lower rank"),
    ],
)
def test_points_off_the_manifold_are_told_why(kind, spoil, match) -> None:
    F = manifold(SHAPE, kind)
    ok, reason = F.check_point_on_manifold(spoil(point(F, 0)), explain=True)
    assert not ok
    assert match in reason


def test_vectors_off_the_tangent_space_are_told_why() -> None:
    F = FixedTTRankManifold(SHAPE)
    x = point(F, 0)
    ok, reason = F.check_vector_on_tangent(x, normal(1, F.n_elements), explain=True)
    assert not ok
    assert "proju" in reason
    ok, reason = F.check_vector_on_tangent(x, torch.ones(3).double(), explain=True)
    assert not ok


def test_from_matrix() -> None:
    F = FixedTTRankManifold(SHAPE)
    W = normal(0, 2, 12, 10)
    torch.testing.assert_close(F.to_matrix(F.from_matrix(W)), tt_svd(W, SHAPE).to_matrix())
    with pytest.raises(ManifoldError, match="truncate"):
        F.from_matrix(torch.outer(torch.ones(12), torch.ones(10)).double())
