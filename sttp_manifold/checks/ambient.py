r"""A manifold seen from the space around it: points, velocities, tangential parts.

Most manifolds lie in the space of their tensors. A manifold whose points are cores with a gauge
does not: what it is a manifold of are weights, and a retraction may return other cores of a weight
nearby. Such a manifold says so by ``ambient_vector(x, u)``, the velocity of the weight along ``u``;
its ambient space is that of the dense matrices ``unpack(x).to_matrix()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.manifolds.contract import HasAmbient, HasProjection
from sttp_manifold.manifolds.cost import derivative
from sttp_manifold.manifolds.geometry import plain

__all__ = ["Ambient", "euclidean_gradient"]


def euclidean_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of a scalar function of the numbers of a point, as they are stored."""
    leaf = plain(x).clone().requires_grad_()
    with torch.enable_grad():
        gradient = derivative(function(leaf), leaf)
    return torch.zeros_like(leaf) if gradient is None else gradient


class Ambient:
    """The ambient space of a manifold.

    Args:
        manifold: a geoopt manifold, or one of this package.

    Attributes:
        dense: whether it is the space of dense weights, rather than of the stored numbers.
    """

    def __init__(self, manifold: Any) -> None:
        self.manifold = manifold
        self.dense = isinstance(manifold, HasAmbient)

    def point(self, x: Tensor) -> Tensor:
        """Where a point lies; differentiable."""
        return self.manifold.unpack(x).to_matrix() if self.dense else x

    def velocity(self, x: Tensor, u: Tensor) -> Tensor:
        """The ambient vector of a tangent vector."""
        return plain(self.manifold.ambient_vector(x, u)) if self.dense else u

    def tangential(self, x: Tensor, Z: Tensor) -> Tensor:
        """Orthogonal projection of an ambient vector onto the tangent space.

        A Riemannian submanifold without ``project_matrix`` gives it as the gradient of the linear
        cost ``<Z, .>``.
        """
        if not self.dense:
            return self.manifold.proju(x, Z)
        if isinstance(self.manifold, HasProjection):
            return plain(self.manifold.project_matrix(x, Z))
        return self.gradient_of_linear(x, Z)

    def gradient_of_linear(self, x: Tensor, Z: Tensor) -> Tensor:
        """Riemannian gradient of the cost ``<Z, .>`` of the ambient space."""
        derivative = euclidean_gradient(lambda y: (self.point(y) * Z).sum(), x)
        return plain(self.manifold.egrad2rgrad(x, derivative))
