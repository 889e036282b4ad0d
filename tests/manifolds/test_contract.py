"""What a manifold may offer: ours say what they have, and who changes a metric is believed."""

from __future__ import annotations

import pytest
import torch

import sttp_manifold as sm
from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ProductManifold, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds import contract
from sttp_manifold.manifolds.contract import dimension_of
from sttp_manifold.manifolds.geometry import geometry_of, is_embedded

D = torch.float64
SHAPE = sm.TTShape.for_matrix(6, 4, rank=2)
OFFERS = [
    contract.OfWeights,
    contract.HasLength,
    contract.HasFrames,
    contract.HasDecay,
    contract.HasHessian,
    contract.HasScale,
    contract.HasAmbient,
    contract.HasProjection,
]


@pytest.mark.parametrize(
    ("M", "offers"),
    [
        (sm.SpectralTTManifold(SHAPE), {"OfWeights", "HasLength", "HasFrames", "HasDecay"}),
        (
            sm.FixedTTRankManifold(SHAPE),
            {offer.__name__ for offer in OFFERS} - {"HasFrames"},
        ),
        (geoopt.Sphere(), set()),
        (ProductManifold((geoopt.Sphere(), 3)), {"HasLength"}),
    ],
)
def test_offers_of_each_manifold(M, offers) -> None:
    assert {offer.__name__ for offer in OFFERS if isinstance(M, offer)} == offers


def test_stated_dimensions() -> None:
    shape = sm.TTShape.for_matrix(12, 10, rank=3)
    M, F = sm.SpectralTTManifold(shape), sm.FixedTTRankManifold(shape)
    assert dimension_of(M) == M.total_dim > M.dim
    assert dimension_of(F) == F.dim
    assert dimension_of(geoopt.Sphere()) is None


W = torch.tensor([1.0, 10.0, 100.0], dtype=D)


class Weighted(Euclidean):
    """The metric sum w u v, whose gradient is divided by w."""

    def inner(self, x, u, v=None, *, keepdim=False):
        return (W * u * (u if v is None else v)).sum(-1, keepdim=keepdim)

    def egrad2rgrad(self, x, u):
        return u / W


class WeightedProduct(ProductManifold):
    """The same of a product, as whose subclass it would pass for a submanifold."""

    def inner(self, x, u, v=None, *, keepdim=False):
        return (W * u * (u if v is None else v)).sum(-1, keepdim=keepdim)

    def egrad2rgrad(self, x, u):
        return u / W


@pytest.mark.parametrize("M", [Weighted(ndim=1), WeightedProduct((Euclidean(ndim=1), 3))])
def test_a_metric_of_ones_own_is_believed(M) -> None:
    """In it the Hessian of the cost is the identity: one step of steepest descent."""
    x = torch.tensor([3.0, -1.0, 2.0], dtype=D)
    assert not is_embedded(M)
    u = torch.ones(3, dtype=D)
    assert float(geometry_of(M).inner(x, u, u)) == pytest.approx(111.0)
    with pytest.raises(ManifoldError, match="Hessian"):
        sm.minimize(M, lambda y: (W * y.square()).sum() / 2, x)
    result = sm.minimize(M, lambda y: (W * y.square()).sum() / 2, x, "steepest_descent")
    assert result.success
    assert result.nit <= 2
    assert sm.check_gradient(M, lambda y: (W * y.square()).sum() / 2, x)


def test_products_as_they_are_lie_in_the_space_around() -> None:
    for M in (
        sm.SpectralTTManifold(SHAPE),
        ProductManifold((geoopt.Sphere(), 3), (EuclideanStiefel(), (3, 2))),
    ):
        assert is_embedded(M)
    assert not is_embedded(ProductManifold((geoopt.Stiefel(), (3, 2))))


def test_something_that_is_no_manifold_is_named() -> None:
    for thing in (3, None, torch.ones(2), geoopt.Sphere):
        with pytest.raises(ManifoldError, match=r"a manifold has geoopt's|Sphere\(...\) is one"):
            geometry_of(thing)
