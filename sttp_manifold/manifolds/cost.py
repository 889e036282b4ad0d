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

from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.contract import HasHessian, LinearMap, OfWeights
from sttp_manifold.manifolds.geometry import geometry_of, is_embedded, plain

__all__ = ["Evaluation", "ManifoldCost", "derivative"]


class ManifoldCost:
    r"""Value, gradient and Hessian of a cost, and how often each was asked for.

    The gradient is ``manifold.egrad2rgrad`` of the Euclidean one, with what
    :mod:`~sttp_manifold.manifolds.geometry` mends. The Hessian is
    ``manifold.hessian_operator`` where there is one; for Riemannian submanifolds of a Euclidean
    space (geoopt's ``Euclidean``, ``EuclideanStiefel``, ``Sphere``, their products, and
    :class:`~sttp_manifold.SpectralTTManifold`) it is the projected derivative of the gradient
    field, :math:`\operatorname{Hess} f[u] = P_x\, D(\operatorname{grad} f)(x)[u]` (Absil, Mahony &
    Sepulchre 2008, Prop. 5.3.2), evaluated by one more backward pass, since it is symmetric.

    Args:
        manifold: a geoopt manifold, or one of this package.
        cost: the function.
        constant: accept a cost that does not depend on the point, as far as autograd can see; its
            gradient is zero.

    Attributes:
        evaluations: how often the cost function was called.
        gradients: how many gradients were computed; each calls the function once.
        products: how many Hessian-vector products were computed.
        geometry: the operations of the manifold.
        unit: what the cost is multiplied by, with its gradients and Hessians; for costs whose
            numbers their dtype can hardly hold.

    Example:
        >>> from sttp_manifold._geoopt import EuclideanStiefel
        >>> A = torch.diag(torch.arange(3.0))
        >>> f = ManifoldCost(EuclideanStiefel(), lambda x: (x * (A @ x)).sum() / 2)
        >>> value, gradient = f.gradient(torch.eye(3, 2))
        >>> float(value), float(gradient.norm())
        (0.5, 0.0)
    """

    def __init__(
        self, manifold: Any, cost: Callable[..., Tensor], *, constant: bool = False
    ) -> None:
        self.manifold = manifold
        self.constant = constant
        self.geometry = geometry_of(manifold)
        self.cost = cost
        self.unit = 1.0
        self.evaluations = 0
        self.gradients = 0
        self.products = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The cost at a point, differentiable.

        Raises:
            ManifoldError: if the function does not return a scalar tensor.
        """
        base = self.geometry.base
        return self.of(base.unpack(x) if isinstance(base, OfWeights) else x)

    def of(self, argument: Any) -> Tensor:
        """The cost of what the function takes: a weight, or a point of a manifold without any.

        Raises:
            ManifoldError: if the function does not return a scalar tensor.
        """
        self.evaluations += 1
        value: Any = self.cost(argument)  # a user's function may return anything
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            what = f"{type(value)}"
            if isinstance(value, Tensor):
                what = f"{tuple(value.shape)} of {value.dtype}"
            raise ManifoldError(
                "a cost returns a scalar tensor of real numbers, as "
                f"(tt.entries(i, j) - b).square().sum() does; this one returned {what}"
            )
        return value if self.unit == 1.0 else value * self.unit

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

        Raises:
            ManifoldError: a cost that does not depend on the point, unless ``constant``.
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
            ManifoldError: a manifold whose Hessian is not known here; a cost that does not depend
                on the point, unless ``constant``.
        """
        x = plain(x)
        base = self.geometry.base
        if isinstance(base, HasHessian):
            return self._counted(base.hessian_operator(self.of, x))
        self.check_curvature()
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            euclidean = self._derivative(self(leaf), leaf, create_graph=True)
        return self._counted(self._embedded_hessian(x, leaf, euclidean))

    def check_curvature(self) -> None:
        """Refuse a manifold on which the Hessian cannot be had, before anything is computed.

        Raises:
            ManifoldError: such a manifold.
        """
        base = self.geometry.base
        if not isinstance(base, HasHessian) and not is_embedded(base):
            raise ManifoldError(
                f"the Hessian on {type(base).__name__} is not known here: it is no "
                "Riemannian submanifold of a Euclidean space, and has no hessian_operator(cost, "
                "x); use EuclideanStiefel() for Stiefel(), or a method of first order, as in "
                "minimize(..., method='conjugate_gradient')"
            )

    def _embedded_hessian(self, x: Tensor, leaf: Tensor, euclidean: Tensor) -> LinearMap:
        with torch.enable_grad():
            field = self.geometry.base.egrad2rgrad(leaf, euclidean)

        def apply(u: Tensor) -> Tensor:
            if not field.requires_grad:
                return torch.zeros_like(u)
            (moved,) = torch.autograd.grad(field, leaf, u, retain_graph=True)
            with torch.no_grad():
                return self.geometry.proju(x, moved)

        return apply

    def _derivative(self, value: Tensor, leaf: Tensor, *, create_graph: bool = False) -> Tensor:
        gradient = derivative(value, leaf, create_graph=create_graph)
        if gradient is not None:
            return gradient
        if self.constant:
            return torch.zeros_like(leaf)
        raise ManifoldError(
            "the cost does not depend on the point: autograd finds no way from the value that it "
            "returned back to its argument. Compute it from the argument by torch operations, as "
            "(tt.entries(i, j) - b).square().sum(), without .detach(), .data, .item(), numpy or "
            "torch.no_grad() on the way"
        )

    def _counted(self, apply: LinearMap) -> LinearMap:
        scale = self.geometry.scale

        def counted(u: Tensor) -> Tensor:
            self.products += 1
            product = apply(plain(u))
            # A vector on a scaled manifold stands for a velocity that is shorter by the scale.
            return product if scale == 1.0 else product / scale**2

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
        self._curvature = curvature and not isinstance(cost.geometry.base, HasHessian)
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

        Raises:
            ManifoldError: a cost that does not depend on the point, unless ``constant``.
        """
        if self._gradient is None:
            assert self._output is not None
            self._cost.gradients += 1
            with torch.enable_grad():
                euclidean = self._cost._derivative(
                    self._output, self._leaf, create_graph=self._curvature
                )
            if self._curvature:
                self._euclidean = euclidean
            self._output = None
            with torch.no_grad():
                self._gradient = self._cost.geometry.gradient(self.x, euclidean.detach())
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


def derivative(value: Tensor, leaf: Tensor, *, create_graph: bool = False) -> Tensor | None:
    """Derivative of a cost in the numbers of a point; none where autograd sees no dependence.

    Args:
        value: what the cost returned.
        leaf: the point that it was given.
        create_graph: so that it can be differentiated again.

    Shape:
        - value: ``()``
        - leaf, output: any
    """
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)[0]
