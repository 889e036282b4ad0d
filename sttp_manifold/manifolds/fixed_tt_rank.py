r"""`FixedTTRankManifold`: the weights of fixed TT rank themselves, centred at their bond.

Set: the weights :math:`W = U S V^\top` whose unfolding at every bond ``k`` has rank exactly
:math:`R_k`; with ``spectrum="identity"`` those whose singular values are all one, with
``spectrum=values`` those of given ones. It is an embedded submanifold of the matrices with the
Frobenius metric, of dimension ``shape.dim("full")`` less what the spectrum takes away; nothing is
redundant in it, and nothing happens where singular values meet.

Representation: the flat vector of the total space ``SpectralTTManifold(shape, "full")``, cores of
``U`` and ``V`` with orthonormal unfoldings and the bond ``S``. A weight has many such vectors,
which differ by a gauge; every operation gives the same weights and tangent vectors whichever it is
given, but for the QR retraction, whose step depends on it to second order.

Tangent space: :math:`(\delta U_k, \delta S, \delta V_k)` with :math:`U_k^\top \delta U_k = 0`, laid
out like a point, standing for

.. math::
    \xi = \sum_k U_{<k}\, \delta U_k\, Q_{>k} V^\top + U\, \delta S\, V^\top + \text{mirror}

with interfaces ``Q`` as in :mod:`sttp_manifold.manifolds.interfaces`.

Metric: that of the matrices. In these coordinates it is the plain Euclidean inner product, since
the terms are orthogonal to each other.

References:
    Holtz, Rohwedder & Schneider, *On manifolds of tensors of fixed TT-rank*, 2012; Steinlechner,
    *Riemannian optimization for high-dimensional tensor completion*, 2016; Vandereycken,
    *Low-rank matrix completion by Riemannian optimization*, 2013 (one mode on each side); Psenka &
    Boumal, *Second-order optimization for tensors with fixed tensor-train rank*, 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold._arguments import explained_class
from sttp_manifold.errors import ShapeError
from sttp_manifold.manifolds import fixed_tt_geometry as geometry
from sttp_manifold.manifolds.contract import LinearMap, flat_metric
from sttp_manifold.manifolds.cost import ManifoldCost, derivative
from sttp_manifold.manifolds.fixed_tt_geometry import Point, Vector
from sttp_manifold.manifolds.fixed_tt_points import FixedTTPoints
from sttp_manifold.manifolds.geometry import plain
from sttp_manifold.tt.contract import left_matrix, mirror, regroup_cores, right_matrix
from sttp_manifold.tt.decompose import orthogonalize
from sttp_manifold.tt.spectral import SpectralTT
from sttp_manifold.tt.validate import check_places

__all__ = ["FixedTTRankManifold"]


@explained_class
class FixedTTRankManifold(FixedTTPoints):
    r"""Weights of fixed TT rank with the metric of the matrices around them.

    Args:
        shape: the plan; its merged chain is what points hold.
        spectrum: ``"full"`` (any singular values), ``"identity"`` (all of them one), or a sequence
            of ``r`` positive singular values that every point keeps.
        retraction: ``"svd"``, TT-SVD of the point moved in the space of matrices, a retraction of
            second order; ``"qr"``, QR of every core moved along its velocity, of first order and
            cheaper. If None, the manifold takes ``"svd"``, as solvers want it, and
            :meth:`for_training`, on which :meth:`random_parameter` lies, ``"qr"``.
        damping: where a core's velocity is divided by the singular values of an interface, they
            are raised to about this fraction of the largest one. Zero is the geometry; more bounds
            the gradient, the QR retraction and the Hessian near weights of lower rank, at the cost
            of exactness there.

    Shape:
        - points and vectors: ``(*b, n_elements)``, float32 or float64

    Raises:
        SpectrumError: an unknown spectrum, or given values that are not ``r`` positive numbers.
        ManifoldError: an unknown retraction, or a damping that is negative or not below one.

    Note:
        ``expmap``, ``logmap`` and ``dist`` raise ``NotImplementedError``: no closed form is known.

    Example:
        >>> from sttp_manifold import TTShape
        >>> F = FixedTTRankManifold(TTShape.for_matrix(12, 10, rank=3))
        >>> x = F.random(dtype=torch.float64)
        >>> u = F.project_matrix(x, torch.randn(12, 10, dtype=torch.float64))
        >>> y = F.retr(x, u)
        >>> F.unpack(y).shape.ranks == F.shape.ranks
        True
    """

    # -- tangent vectors ------------------------------------------------------------------------

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Nearest tangent coordinates, orthogonally in the metric."""
        x, u = self._fit(x, u)
        return self._flat(geometry.tangent_part(self._point(x), self._cores(u), self.centre))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Riemannian gradient, from derivatives ``u`` in the entries of ``x``.

        :math:`\delta U_k = \Pi_k(g_k G_k^{-\top})` and :math:`\delta S = \partial f/\partial S`,
        for a cost of the weight that autograd has differentiated through :meth:`unpack`.
        """
        x, u = self._fit(x, u)
        point, gradient = self._point(x), self._cores(u)
        return self._flat(
            Vector(
                tuple(point.left.gradient(gradient.left)),
                self.centre.project(point.bond, gradient.bond),
                tuple(point.right.gradient(gradient.right)),
            )
        )

    @flat_metric
    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Frobenius inner product of two tangent vectors, ``(*b,)``."""
        x, u, v = self._fit(x, u, u if v is None else v)
        return (u * v).sum(-1, keepdim=keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Frobenius norm of a tangent vector, ``(*b,)``."""
        x, u = self._fit(x, u)
        return torch.linalg.vector_norm(u, dim=-1, keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner products core by core, spread over the elements of each.

        An adaptive optimizer scales by them: a number for each core keeps a vector tangent.
        """
        product = self._cores(torch.mul(*self._fit(u, u if v is None else v, x)[:2]))

        def spread(part: Tensor, dims: tuple[int, ...]) -> Tensor:
            return part.sum(dims, keepdim=True).expand_as(part)

        return self._flat(
            Vector(
                tuple(spread(core, (-3, -2, -1)) for core in product.left),
                spread(product.bond, (-2, -1)),
                tuple(spread(core, (-3, -2, -1)) for core in product.right),
            )
        )

    def steepest(self, x: Tensor, u: Tensor) -> Tensor:
        r"""A tangent vector of spectral norm one along which ``u`` ascends steeply.

        The polar factor of ``u`` as a matrix, projected and scaled, as in Riemannion (Bogachev et
        al. 2025). It ascends: its product with ``u`` is the nuclear norm of ``u``, but for scale.

        Shape:
            - x, u, output: ``(*b, n_elements)``
        """
        x, u = self._fit(x, u)
        return self._flat(geometry.polar_part(self._point(x), self._cores(u), self.centre))

    def project_matrix(self, x: Tensor, Z: Tensor) -> Tensor:
        """Projection of a dense matrix onto the tangent space.

        Shape:
            - x: ``(*b, n_elements)``
            - Z: ``(*b, d_out, d_in)``
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: a matrix of another size.
        """
        if Z.ndim < 2 or tuple(Z.shape[-2:]) != (self.shape.d_out, self.shape.d_in):
            raise ShapeError(
                f"project_matrix takes a matrix (*b, {self.shape.d_out}, {self.shape.d_in}), got "
                f"{tuple(Z.shape)}"
            )
        batch = torch.broadcast_shapes(x.shape[:-1], Z.shape[:-2])
        self._assert_length(x, "project_matrix(x, Z)")
        point = self._point(x.expand(*batch, x.shape[-1]))
        return self._tangent(point, geometry.project_matrix(point, Z))

    def project_weight(self, x: Tensor, tt: SpectralTT) -> Tensor:
        """Projection of a low-rank matrix, given as a train of any ranks on the same modes.

        Nothing is formed; the cores of ``tt`` need not be orthonormal.

        Shape:
            - x: ``(*b, n_elements)``
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: a train on other modes.
        """
        plan = self.shape.merged
        if (tt.shape.out_modes, tt.shape.in_modes) != (self.shape.out_modes, self.shape.in_modes):
            raise ShapeError(
                f"a train on modes {tt.shape.out_modes} and {tt.shape.in_modes} cannot be "
                f"projected core by core on {self.shape!r}; F.project_matrix(x, tt.to_matrix()) can"
            )
        # Its merged chain follows its own ranks, and may be coarser or finer than ours.
        chain = Vector(
            regroup_cores(tt.left, plan.out_modes),
            tt.bond,
            mirror(regroup_cores(tt.right, plan.in_modes)),
        )
        return self.project_chain(x, chain)

    def project_chain(self, x: Tensor, chain: Vector) -> Tensor:
        """As :meth:`project_weight`, of raw cores on the modes of ``shape.merged``."""
        batch = torch.broadcast_shapes(x.shape[:-1], chain.bond.shape[:-2])
        self._assert_length(x, "project_chain(x, chain)")
        point = self._point(x.expand(*batch, x.shape[-1]))
        return self._tangent(point, geometry.project_chain(point, chain))

    def project_entries(self, x: Tensor, i: Tensor, j: Tensor, values: Tensor) -> Tensor:
        r"""Projection of a sparse matrix with ``values`` at places ``(i, j)``.

        :math:`O(P (D + E) r^2)` for ``P`` entries; repeated places add up.

        Shape:
            - x: ``(*b, n_elements)``
            - i, j: ``(*P)`` integers of any dtype; negative ones count from the end
            - values: ``(*b, *P)``
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: places that are not integers or not of one shape, or values that are not
                one for each.
            PlaceError: places outside of the matrix.
        """
        i, j = check_places(i, j, self.shape.d_out, self.shape.d_in, x.device)
        lead = values.ndim - i.ndim
        if lead < 0 or values.shape[lead:] != i.shape:
            raise ShapeError(
                "project_entries(x, i, j, values) takes one value for each of "
                f"{i.numel()} places {tuple(i.shape)}, got values of shape {tuple(values.shape)}"
            )
        batch = torch.broadcast_shapes(x.shape[:-1], values.shape[:lead])
        self._assert_length(x, "project_entries(x, i, j, values)")
        point = self._point(x.expand(*batch, x.shape[-1]))
        values = values.reshape(*values.shape[:lead], i.numel()).expand(*batch, i.numel())
        projected = geometry.project_entries(point, i.flatten(), j.flatten(), values)
        return self._tangent(point, projected)

    def ambient_vector(self, x: Tensor, u: Tensor) -> Tensor:
        """The dense matrix that a tangent vector stands for, ``(*b, d_out, d_in)``."""
        x, u = self._fit(x, u)
        point = self._point(x)
        chain = geometry.tangent_chain(point, self._cores(u))
        return left_matrix(chain.left) @ chain.bond @ right_matrix(mirror(chain.right))

    def tangent_weight(self, x: Tensor, u: Tensor) -> SpectralTT:
        """The matrix that a tangent vector stands for, as a spectral tensor train.

        Its ranks are twice those of the plan, or what the modes can carry.
        """
        x, u = self._fit(x, u)
        chain = geometry.tangent_chain(self._point(x), self._cores(u))
        return orthogonalize(chain.left, chain.bond, mirror(chain.right))

    def velocities(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Velocities of the cores along a tangent vector, laid out like a point.

        :math:`\delta U_k G_k^{-1}`: a vector of the total space that moves the weight as ``u``
        says. Its horizontal part, ``total_space.horizontal(x, ...)``, is the horizontal lift.

        Shape:
            - x, u, output: ``(*b, n_elements)``
        """
        x, u = self._fit(x, u)
        point, vector = self._point(x), self._cores(u)
        return self._flat(
            Vector(
                tuple(point.left.velocities(vector.left)),
                vector.bond,
                tuple(point.right.velocities(vector.right)),
            )
        )

    # -- moving ---------------------------------------------------------------------------------

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction, by TT-SVD (second order) or core-wise QR (first), as :attr:`retraction` says.

        Shape:
            - x, u: ``(*b, n_elements)``
            - output: ``(*b, n_elements)``
        """
        x, u = self._fit(x, u)
        return self._retract(self._point(x), self._cores(u))

    def _retract(self, point: Point, vector: Vector) -> Tensor:
        if self.retraction == "qr":
            return self._flat(geometry.core_wise_qr(point, vector, self.centre))
        chain = geometry.tangent_chain(point, vector, moved=True)
        return self._flat(geometry.round_chain(chain, point, self.centre))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` from ``x`` to ``y``: projection of its chain of ranks ``2R``."""
        x, y, v = self._fit(x, y, v)
        chain = geometry.tangent_chain(self._point(x), self._cores(v))
        return self.project_chain(y, chain)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction of ``u``, and transport of ``v`` to the new point."""
        x, u, v = self._fit(x, u, v)
        point = self._point(x)  # its interfaces serve both
        y = self._retract(point, self._cores(u))
        return y, self.project_chain(y, geometry.tangent_chain(point, self._cores(v)))

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` along the retraction of ``u``."""
        return self.transp(x, self.retr(x, u), v)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Not known in closed form; :meth:`retr` agrees with it to second order.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "geodesics of fixed TT rank have no closed form; F.retr(x, u) follows them to second "
            "order"
        )

    def typical_dist(self, x: Tensor) -> Tensor:
        """The length scale of steps at ``x``: the Frobenius norm of the weight, ``(*b,)``.

        A step as long as this changes all of the weight; a trust region starts well below it.
        """
        return self.unpack(x).norm()

    # -- second order ---------------------------------------------------------------------------

    def hessian(self, cost: Callable[[SpectralTT], Tensor], x: Tensor, u: Tensor) -> Tensor:
        """Riemannian Hessian of a cost along a tangent vector, exact; see :meth:`hessian_operator`.

        Args:
            cost: a function of the weight that returns a scalar tensor.
            x: a point, or a batch of them, over which the cost sums.
            u: a tangent vector.

        Shape:
            - x, u, output: ``(*b, n_elements)``

        Raises:
            ManifoldError: a cost that returns something else.
        """
        return ManifoldCost(self, cost, constant=True).hessian(x)(u)

    def hessian_operator(self, cost: Callable[[SpectralTT], Tensor], x: Tensor) -> LinearMap:
        r"""Riemannian Hessian at ``x``, as a map of tangent vectors: one backward pass for each.

        Let :math:`\varphi(d)` be a curve in the manifold for each tangent ``d``, right to second
        order, and :math:`\eta` the Riemannian gradient, held constant. Then
        :math:`h(d) = f(\varphi(d)) - \langle \eta, \varphi(d) \rangle` has the normal part of the
        Euclidean gradient as its gradient in the space of matrices, so that its second derivative
        at zero has the curvature of the manifold in it, and
        :math:`\operatorname{Hess} f[u] = \nabla^2 h(0)\, u`. No Weingarten map is needed.

        Shape:
            - x: ``(*b, n_elements)``; the cost is one of all points of a batch
        """
        x = plain(x)
        point = self._point(x)
        d = torch.zeros_like(x, requires_grad=True)
        with torch.enable_grad():
            tangent = geometry.tangent_part(point, self._cores(d), self.centre)
            moved = geometry.curve(point, tangent, self.centre)
            weight = SpectralTT(moved.left, moved.bond, mirror(moved.right), self.shape)
            slope = derivative(cost(weight), d, create_graph=True)
            if slope is None:
                return torch.zeros_like
            # The derivative of a curve's cost in its velocity is the gradient itself.
            eta = geometry.tangent_chain(point, self._cores(slope.detach()))
            linear = geometry.chain_inner(eta, moved).sum()
            (along,) = torch.autograd.grad(linear, d, create_graph=True)
            field = slope - along

        def apply(u: Tensor) -> Tensor:
            (curved,) = torch.autograd.grad(field, d, u, retain_graph=True)
            with torch.no_grad():
                return self.proju(x, curved)

        return apply

    def weight_decay_grad(self, x: Tensor) -> Tensor:
        r"""Derivatives of :math:`\tfrac12 \|W(x)\|_F^2` in the entries of ``x``."""
        return self.total_space.weight_decay_grad(x)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if u.ndim < 1 or u.shape[-1] != self.n_elements:
            return False, f"a vector has shape (*b, {self.n_elements}), not {tuple(u.shape)}"
        x, u = plain(x), plain(u)
        error = float((u - self.proju(x, u)).abs().amax())
        if not error <= atol + rtol * float(u.abs().amax()):
            return False, f"the vector is off the tangent space by {error:.2g}; F.proju(x, u)"
        return True, None

    def _tangent(self, point: Point, vector: Vector) -> Tensor:
        return self._flat(vector._replace(bond=self.centre.project(point.bond, vector.bond)))
