r"""A cost on a manifold: value, Riemannian gradient and Hessian by automatic differentiation.

A cost is a function that returns a scalar tensor. On a manifold of weights (one that has
``unpack``) it takes a :class:`~sttp_manifold.SpectralTT`; on any other geoopt manifold it takes the
point itself. Checks, solvers and pymanopt all see a cost through :class:`ManifoldCost`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ProductManifold, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.contract import HasHessian, LinearMap, OfWeights

__all__ = ["Evaluation", "ManifoldCost", "plain"]


def plain(x: Tensor) -> Tensor:
    """The numbers of a point, outside of the graph and without geoopt's subclass.

    Shape:
        - x, output: any
    """
    return x.detach().as_subclass(Tensor)


class ManifoldCost:
    r"""Value, gradient and Hessian of a cost, and how often each was asked for.

    The gradient is ``manifold.egrad2rgrad`` of the Euclidean one. The Hessian is
    ``manifold.hessian_operator`` where there is one; for Riemannian submanifolds of a Euclidean
    space (geoopt's ``Euclidean``, ``EuclideanStiefel``, ``Sphere``, their products, and
    :class:`~sttp_manifold.SpectralTTManifold`) it is the projected derivative of the gradient
    field, :math:`\operatorname{Hess} f[u] = P_x\, D(\operatorname{grad} f)(x)[u]` (Absil, Mahony &
    Sepulchre 2008, Prop. 5.3.2), evaluated by one more backward pass, since it is symmetric.

    Args:
        manifold: a geoopt manifold, or one of this package.
        cost: the function.

    Attributes:
        evaluations: how often the cost function was called.
        gradients: how many gradients were computed; each calls the function once.
        products: how many Hessian-vector products were computed.

    Example:
        >>> from sttp_manifold._geoopt import EuclideanStiefel
        >>> A = torch.diag(torch.arange(3.0))
        >>> f = ManifoldCost(EuclideanStiefel(), lambda x: (x * (A @ x)).sum() / 2)
        >>> value, gradient = f.gradient(torch.eye(3, 2))
        >>> float(value), float(gradient.norm())
        (0.5, 0.0)
    """

    def __init__(self, manifold: Any, cost: Callable[..., Tensor]) -> None:
        self.manifold = manifold
        self.cost = cost
        self.evaluations = 0
        self.gradients = 0
        self.products = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The cost at a point, differentiable.

        Raises:
            ManifoldError: if the function does not return a scalar tensor.
        """
        return self.of(self.manifold.unpack(x) if isinstance(self.manifold, OfWeights) else x)

    def of(self, argument: Any) -> Tensor:
        """The cost of what the function takes: a weight, or a point of a manifold without any.

        Raises:
            ManifoldError: if the function does not return a scalar tensor.
        """
        self.evaluations += 1
        value: Any = self.cost(argument)  # a user's function may return anything
        if not isinstance(value, Tensor) or value.ndim:
            what = f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value)}"
            raise ManifoldError(
                f"a cost returns a scalar tensor, as (tt.entries(i, j) - b).square().sum() does; "
                f"this one returned {what}"
            )
        return value

    def value(self, x: Tensor) -> Tensor:
        """The cost at a point, outside of the graph.

        Shape:
            - x: one of the manifold's points
            - output: ``()``
        """
        with torch.no_grad():
            return self(plain(x))

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cost and its Riemannian gradient.

        Shape:
            - x, gradient: the manifold's points and tangent vectors
            - value: ``()``
        """
        evaluation = self.at(x)
        return evaluation.value, evaluation.gradient()

    def at(self, x: Tensor, *, curvature: bool = False) -> Evaluation:
        """The cost at a point, once: its gradient can be had later without a second call.

        Args:
            x: the point.
            curvature: keep what :meth:`Evaluation.hessian` needs.

        Shape:
            - x: a point of the manifold
        """
        return Evaluation(self, plain(x), curvature=curvature)

    def hessian(self, x: Tensor) -> LinearMap:
        """The Riemannian Hessian at a point, as a map of tangent vectors.

        The cost is evaluated once, here; each product after that is one backward pass.

        Shape:
            - x, and what the map takes and gives: the manifold's points and tangent vectors

        Raises:
            ManifoldError: a manifold whose Hessian is not known here.
        """
        x = plain(x)
        if isinstance(self.manifold, HasHessian):
            return self._counted(self.manifold.hessian_operator(self.of, x))
        self.check_curvature()
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            euclidean = _gradient(self(leaf), leaf, create_graph=True)
        return self._counted(self._embedded_hessian(x, leaf, euclidean))

    def check_curvature(self) -> None:
        """Refuse a manifold on which the Hessian cannot be had, before anything is computed.

        Raises:
            ManifoldError: such a manifold.
        """
        if not isinstance(self.manifold, HasHessian) and not is_embedded(self.manifold):
            raise ManifoldError(
                f"the Hessian on {type(self.manifold).__name__} is not known here: it is no "
                "Riemannian submanifold of a Euclidean space, and has no hessian_operator(cost, "
                "x); use EuclideanStiefel() for Stiefel(), or a method of first order, as in "
                "minimize(..., method='conjugate_gradient')"
            )

    def _embedded_hessian(self, x: Tensor, leaf: Tensor, euclidean: Tensor) -> LinearMap:
        with torch.enable_grad():
            field = self.manifold.egrad2rgrad(leaf, euclidean)

        def apply(u: Tensor) -> Tensor:
            if not field.requires_grad:
                return torch.zeros_like(u)
            (moved,) = torch.autograd.grad(field, leaf, u, retain_graph=True)
            with torch.no_grad():
                return self.manifold.proju(x, moved)

        return apply

    def _counted(self, apply: LinearMap) -> LinearMap:
        def counted(u: Tensor) -> Tensor:
            self.products += 1
            return apply(plain(u))

        return counted


class Evaluation:
    """The cost at one point, called once; gradient and Hessian come from the same forward pass.

    Made by :meth:`ManifoldCost.at`. Holds the graph of the cost until the gradient is asked for,
    and beyond if ``curvature``.

    Attributes:
        x: the point, a plain tensor.
        value: the cost there, ``()``, outside of the graph.
    """

    def __init__(self, cost: ManifoldCost, x: Tensor, *, curvature: bool = False) -> None:
        self.x = x
        self._cost = cost
        # An operator of the manifold makes a graph of its own.
        self._curvature = curvature and not isinstance(cost.manifold, HasHessian)
        self._leaf: Tensor = x.clone().requires_grad_()
        with torch.enable_grad():
            self._output: Tensor | None = cost(self._leaf)
        self.value = self._output.detach()
        self._euclidean: Tensor | None = None
        self._gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """The Riemannian gradient; computed, and counted, the first time only.

        Shape:
            - output: a tangent vector of the manifold
        """
        if self._gradient is None:
            assert self._output is not None
            self._cost.gradients += 1
            with torch.enable_grad():
                euclidean = _gradient(self._output, self._leaf, create_graph=self._curvature)
            if self._curvature:
                self._euclidean = euclidean
            self._output = None
            with torch.no_grad():
                self._gradient = self._cost.manifold.egrad2rgrad(self.x, euclidean.detach())
        return self._gradient

    def hessian(self) -> LinearMap:
        """The Riemannian Hessian, as :meth:`ManifoldCost.hessian`.

        Without another call of the cost if made with ``curvature``, save for a manifold with a
        ``hessian_operator`` of its own, which calls the cost along its own coordinates.

        Raises:
            ManifoldError: a manifold whose Hessian is not known here.
        """
        if not self._curvature:
            return self._cost.hessian(self.x)
        self._cost.check_curvature()
        self.gradient()
        assert self._euclidean is not None
        return self._cost._counted(
            self._cost._embedded_hessian(self.x, self._leaf, self._euclidean)
        )


def _gradient(value: Tensor, leaf: Tensor, *, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(
        value, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return gradient


def is_embedded(manifold: Any) -> bool:
    """Whether a manifold is known to carry the metric of the Euclidean space that its points fill.

    By the exact type for geoopt's own, whose subclasses may change the metric.
    """
    if isinstance(manifold, ProductManifold):
        return all(is_embedded(factor) for factor in manifold.manifolds)
    known = {Euclidean, EuclideanStiefel, geoopt.EuclideanStiefelExact, geoopt.Sphere}
    return type(manifold) in known | {geoopt.SphereExact}
