"""Chart, product and fixed TT rank: points and tangent vectors in all six directions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, bound_of, normal, seeds, shapes, spectra, weight

from sttp_manifold import FixedTTRankManifold, SpectralTT, SpectralTTManifold, TTShape
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ManifoldError, ShapeError, SpectrumError
from sttp_manifold.quotient import transfer, transfer_vector

NAMES = ("chart", "product", "fixed")


def holders(shape: TTShape, spectrum: str) -> dict[str, object]:
    product = SpectralTTManifold(shape, spectrum, bound_of(spectrum))
    bonds = {"identity": "identity", "fixed": product.values}.get(spectrum, "full")
    return {
        "chart": HouseholderChart(shape, spectrum, bound_of(spectrum)),
        "product": product,
        "fixed": FixedTTRankManifold(shape, bonds),
    }


def start(holder, spectrum: str, seed: int, batch=()):
    """A point and a tangent vector, horizontal where there is a gauge."""
    tt = weight(holder.shape, spectrum, seed, batch)
    if isinstance(holder, HouseholderChart):
        point = holder.encode(tt)
        vector = holder.unflatten(normal(seed + 1, *batch, holder.n_elements))
        if spectrum == "normalized":
            vector = vector._replace(spectrum=off_the_scale(point.spectrum, vector.spectrum))
        return point, vector
    x = holder.pack(tt)
    u = holder.proju(x, normal(seed + 1, *batch, holder.n_elements))
    if isinstance(holder, SpectralTTManifold):
        u = holder.horizontal(x, u)
    elif spectrum in ("normalized",):
        # Velocities of the set with a largest singular value of one.
        M = SpectralTTManifold(holder.shape, spectrum)
        y = M.pack(tt)
        v = M.horizontal(y, M.proju(y, normal(seed + 1, *batch, M.n_elements)))
        return transfer_vector(y, v, M, holder)
    return x, u


def off_the_scale(theta, direction):
    scale = (theta * direction).sum(-1, True) / theta.square().sum(-1, True)
    return direction - scale * theta


def moved(x, u, holder, t: float):
    """The dense weight a little further along, by the holder's own means."""
    if isinstance(holder, HouseholderChart):
        frames = tuple(a + t * b for a, b in zip(x.frames, u.frames, strict=True))
        return holder.decode(ChartPoint(frames, x.spectrum + t * u.spectrum, x.signs)).to_matrix()
    return holder.unpack(holder.retr(x, t * u)).to_matrix()


def velocity(x, u, holder):
    """Central difference of the dense weight."""
    return (moved(x, u, holder, 1e-5) - moved(x, u, holder, -1e-5)) / 2e-5


@given(
    shape=shapes(max_modes=3),
    spectrum=spectra,
    seed=seeds,
    batch=batches,
    way=st.sampled_from(list(itertools.permutations(NAMES, 2))),
)
def test_there_and_back(shape, spectrum, seed, batch, way) -> None:
    """The same weight moves with the same velocity, and nothing is lost on the way back."""
    source, target = (holders(shape, spectrum)[name] for name in way)
    x, u = start(source, spectrum, seed, batch)
    y, v = transfer_vector(x, u, source, target)
    W = moved(x, u, source, 0.0)
    torch.testing.assert_close(moved(y, v, target, 0.0), W, rtol=0, atol=1e-9)
    z, w = transfer_vector(y, v, target, source)
    torch.testing.assert_close(moved(z, w, source, 0.0), W, rtol=0, atol=1e-9)
    # Carried on to fixed TT rank, where equal means equal.
    F = FixedTTRankManifold(shape)
    dense = [
        F.ambient_vector(*transfer_vector(p, q, h, F))
        for p, q, h in ((x, u, source), (y, v, target), (z, w, source))
    ]
    tolerance = 1e-7 * (1 + float(dense[0].abs().max()))
    torch.testing.assert_close(dense[1], dense[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(dense[2], dense[0], rtol=0, atol=tolerance)
    if isinstance(target, SpectralTTManifold):
        assert target.check_vector_on_tangent(y, v, atol=1e-7)
        torch.testing.assert_close(target.horizontal(y, v), v, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spectrum", ["identity", "free", "normalized", "bounded", "full", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_is_that_of_the_weight(spectrum, name) -> None:
    """By finite differences in each holder: no two of them could be wrong together."""
    shape = TTShape((3, 4, 2), (2, 5, 3), rank=4)
    F = FixedTTRankManifold(shape)
    holder = holders(shape, spectrum)[name]
    x, u = start(holder, spectrum, 0)
    y, v = transfer_vector(x, u, holder, F)
    difference = velocity(x, u, holder)
    torch.testing.assert_close(F.ambient_vector(y, v), difference, rtol=0, atol=1e-5)


@given(shape=shapes(), spectrum=spectra, seed=seeds)
def test_the_lift_is_the_shortest_vector_over_a_velocity(shape, spectrum, seed) -> None:
    M, F = SpectralTTManifold(shape, spectrum), FixedTTRankManifold(shape)
    x = M.pack(weight(shape, spectrum, seed)) if spectrum != "bounded" else None
    if x is None:
        return
    u = M.proju(x, normal(seed + 1, M.n_elements))
    y, v = transfer_vector(x, u, M, F)
    # Back on the product: the same velocity without the part of u along the gauge.
    _z, lift = transfer_vector(y, v, F, M)
    along = M.horizontal(x, u)
    torch.testing.assert_close(lift.norm(), along.norm(), rtol=1e-6, atol=1e-8)
    assert float(lift.norm()) <= float(u.norm()) * (1 + 1e-7) + 1e-9


SHAPE = TTShape((3, 4), (2, 5), rank=3)
FREE, FULL = SpectralTTManifold(SHAPE), FixedTTRankManifold(SHAPE)
IDENTITY = SpectralTTManifold(SHAPE, "identity")


def equal_pair() -> torch.Tensor:
    tt = weight(SHAPE, "free", 0)
    s = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    return FULL.pack(SpectralTT(tt.left, s, tt.right, SHAPE))


def identity_point() -> torch.Tensor:
    return FULL.pack(weight(SHAPE, "identity", 0))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ShapeError,
            "different plans",
            lambda: transfer(FULL.origin(), FULL, SpectralTTManifold(TTShape.svd(12, 10, 3))),
        ),
        (
            SpectrumError,
            "project=True",
            lambda: transfer(FULL.origin(dtype=torch.float64), FULL, IDENTITY),
        ),
        (
            ManifoldError,
            "spectrum='full'",
            lambda: transfer_vector(equal_pair(), torch.ones_like(equal_pair()), FULL, FREE),
        ),
        (
            ManifoldError,
            "would be lost",
            lambda: transfer_vector(
                identity_point(),
                FULL.project_matrix(identity_point(), normal(1, 12, 10)),
                FULL,
                IDENTITY,
            ),
        ),
        (
            ManifoldError,
            "would be lost",
            lambda: transfer_vector(
                identity_point(),
                FULL.project_matrix(identity_point(), normal(1, 12, 10)),
                FULL,
                FixedTTRankManifold(SHAPE, "identity"),
            ),
        ),
        (
            ManifoldError,
            "unflatten",
            lambda: transfer(torch.ones(3), HouseholderChart(SHAPE), FULL),
        ),
        (
            ManifoldError,
            "flat tensor",
            lambda: transfer(HouseholderChart(SHAPE).encode(weight(SHAPE, "free", 0)), FULL, FREE),
        ),
        (ShapeError, "coordinates", lambda: HouseholderChart(SHAPE).unflatten(torch.ones(3))),
    ],
)
def test_bad_calls_say_what_to_do(error, match, call) -> None:
    with pytest.raises(error, match=match):
        call()


def test_projecting_drops_what_the_target_cannot_hold() -> None:
    x = identity_point()
    u = FULL.project_matrix(x, normal(1, 12, 10))
    y, v = transfer_vector(x, u, FULL, IDENTITY, project=True)
    F = FixedTTRankManifold(SHAPE, "identity")
    kept = F.ambient_vector(x, F.proju(x, u))
    torch.testing.assert_close(FULL.ambient_vector(*transfer_vector(y, v, IDENTITY, FULL)), kept)
    z = transfer(FULL.origin(dtype=torch.float64), FULL, IDENTITY, project=True)
    assert IDENTITY.check_point_on_manifold(z)


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_flat_coordinates_of_a_chart(shape, spectrum, seed, batch) -> None:
    chart = HouseholderChart(shape, spectrum, bound_of(spectrum))
    point = chart.encode(weight(shape, spectrum, seed, batch))
    z = chart.flatten(point)
    assert z.shape == (*batch, chart.n_elements)
    assert chart.n_elements == shape.num_parameters(spectrum)
    back = chart.unflatten(z, point.signs)
    torch.testing.assert_close(chart.decode(back).to_matrix(), chart.decode(point).to_matrix())
