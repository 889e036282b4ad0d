"""Our manifolds, and geoopt's, as pymanopt's: flat numpy points, exact gradients and Hessians.

pymanopt is an optional extra and is imported when first needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.contract import HasHessian, HasLength, LinearMap, dimension_of
from sttp_manifold.manifolds.cost import Evaluation, ManifoldCost
from sttp_manifold.manifolds.geometry import Geometry, geometry_of, is_embedded, plain

__all__ = ["pymanopt_problem", "to_pymanopt"]

Array = Any


@explained
def to_pymanopt(
    manifold: Any,
    *,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Any:
    r"""A manifold of pymanopt that computes with one of ours, or of geoopt.

    Points and tangent vectors are numpy arrays of the shape of the torch ones, for the manifolds
    of this package flat ones. All that pymanopt's solvers ask for is there: ``inner_product``,
    ``norm``, ``projection``, ``retraction``, ``transport``, ``random_point``,
    ``random_tangent_vector``, ``zero_vector``, ``typical_dist`` and ``dim`` (of the manifold that
    is moved on: ``total_dim`` where there is a gauge); ``dist``, ``exp`` and ``log`` where the
    manifold has them. With a backend of pymanopt's own, ``euclidean_to_riemannian_gradient`` is
    ``egrad2rgrad``, and ``euclidean_to_riemannian_hessian`` its derivative on submanifolds of a
    Euclidean space. :func:`pymanopt_problem` brings a cost along.

    Args:
        manifold: any that has geoopt's ``inner``, ``proju``, ``egrad2rgrad``, ``retr``, ``transp``.
        size: shape of a point, or of a batch, which is one point of a product; needed where the
            manifold does not know it (``n_elements``).
        dtype: what is computed in.
        device: where.

    Raises:
        ImportError: without pymanopt.
        ManifoldError: without a size where one is needed, or with one that no point has.

    Example:
        >>> from sttp_manifold import SpectralTTManifold, TTShape
        >>> M = to_pymanopt(SpectralTTManifold(TTShape.svd(6, 5, rank=2)))
        >>> x = M.random_point()
        >>> M.dim, x.shape
        (18, (24,))
    """
    if size is None:
        base = geometry_of(manifold).base
        if not isinstance(base, HasLength):
            raise ManifoldError(
                f"{type(manifold).__name__} does not know the shape of its points; call "
                "to_pymanopt(manifold, size=(5, 3))"
            )
        size = (int(base.n_elements),)
    return _adapter()(manifold, _checked(manifold, size), dtype, torch.device(device))


def _checked(manifold: Any, size: Any) -> tuple[int, ...]:
    """A size that points of the manifold can have."""
    try:
        shape = tuple(map(int, size))
        fits = len(shape) >= manifold.ndim and all(n > 0 for n in shape)
        fits = fits and manifold._check_shape(shape, "x")[0]
    except (TypeError, ValueError):
        shape, fits = size, False
    if not fits:
        raise ManifoldError(
            f"size={size!r} is the shape of no point of {type(manifold).__name__}, nor of a batch "
            f"of them: it ends in the {manifold.ndim} dimensions of a point, as M.random(*size)"
        )
    return shape


@explained
def pymanopt_problem(
    manifold: Any,
    cost: Callable[..., Tensor] | ManifoldCost,
    *,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    preconditioner: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Any:
    """A ``pymanopt.Problem`` with the exact gradient and Hessian of a cost of ours.

    Each point is evaluated once: gradients and Hessians at the point evaluated last take the same
    forward pass.

    Args:
        manifold: as for :func:`to_pymanopt`.
        cost: as for :func:`~sttp_manifold.minimize`; or a ``ManifoldCost``, which then counts.
        size: as for :func:`to_pymanopt`.
        dtype: what is computed in.
        device: where.
        preconditioner: ``(x, u) -> v`` on torch tensors.

    Raises:
        ImportError: without pymanopt.
        ManifoldError: as :func:`to_pymanopt`; a Hessian that is not known, when it is asked for.

    Example:
        >>> from pymanopt.optimizers import TrustRegions
        >>> from sttp_manifold import SpectralTTManifold, TTShape
        >>> M = SpectralTTManifold(TTShape.svd(4, 3, rank=2), "full")
        >>> target = torch.eye(4, 3, dtype=torch.float64)
        >>> problem = pymanopt_problem(M, lambda tt: (tt.to_matrix() - target).square().sum())
        >>> round(TrustRegions(verbosity=0).run(problem).cost, 6)
        1.0
    """
    theirs = to_pymanopt(manifold, size=size, dtype=dtype, device=device)
    counted = cost if isinstance(cost, ManifoldCost) else ManifoldCost(manifold, cost)
    return make_problem(theirs, PointCache(theirs, counted), preconditioner)


class PointCache:
    """The evaluation at the last point, so that no point is evaluated twice in a row.

    Args:
        theirs: the adapter, which converts arrays.
        cost: what is evaluated.
        curvature: keep what Hessians need with every evaluation.
    """

    def __init__(self, theirs: Any, cost: ManifoldCost, *, curvature: bool = False) -> None:
        self.theirs = theirs
        self.cost = cost
        self.curvature = curvature
        self._point: Array | None = None
        self._evaluation: Evaluation | None = None
        self._hessian: LinearMap | None = None

    def at(self, point: Array) -> Evaluation:
        """The evaluation at a point."""
        if self._point is None or not np.array_equal(self._point, point):
            evaluation = self.cost.at(self.theirs.tensor(point), curvature=self.curvature)
            self.hold(point, evaluation)
            return evaluation
        assert self._evaluation is not None
        return self._evaluation

    def gradient_at(self, point: Array) -> Tensor:
        """The gradient at a point."""
        return self.at(point).gradient()

    def hold(self, point: Array, evaluation: Evaluation) -> None:
        """Take an evaluation that was made elsewhere."""
        self._point, self._evaluation, self._hessian = point.copy(), evaluation, None

    def hessian(self, point: Array) -> LinearMap:
        """The Hessian at a point."""
        evaluation = self.at(point)
        if self._hessian is None:
            self._hessian = evaluation.hessian()
        return self._hessian


def make_problem(
    theirs: Any,
    cache: PointCache,
    preconditioner: Callable[[Tensor, Tensor], Tensor] | None,
) -> Any:
    """The problem whose cost, gradient and Hessian come from ``cache``."""
    pymanopt = _pymanopt()
    tensor, array = theirs.tensor, theirs.array

    def cost(point: Array) -> float:
        return float(cache.at(point).value)

    def gradient(point: Array) -> Array:
        return array(cache.gradient_at(point))

    def hessian(point: Array, vector: Array) -> Array:
        return array(cache.hessian(point)(tensor(vector)))

    apply = None
    if preconditioner is not None:
        given = preconditioner

        def apply(point: Array, vector: Array) -> Array:
            return array(given(tensor(point), tensor(vector)))

    function = pymanopt.function.numpy(theirs)
    return pymanopt.Problem(
        theirs,
        function(cost),
        riemannian_gradient=function(gradient),
        riemannian_hessian=function(hessian),
        preconditioner=apply,
    )


def _pymanopt() -> Any:
    try:
        import pymanopt
    except ImportError as error:
        raise ImportError(
            "pymanopt is not installed; pip install 'sttp-manifold[pymanopt]'"
        ) from error
    return pymanopt


class _Operations:
    """The operations of a manifold of torch tensors, on numpy arrays.

    Args:
        manifold: as for :func:`to_pymanopt`.
        size: shape of a point, or of a batch of them.
        dtype: what is computed in.
        device: where.
    """

    dim: int

    def __init__(
        self, manifold: Any, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.manifold = manifold
        self.geometry = geometry_of(manifold)
        self.size = size
        self.dtype = dtype
        self.device = device
        # That of pymanopt's class, which comes next.
        super().__init__(  # type: ignore[call-arg]
            f"{manifold!r} by torch", _dimension(self.geometry, size, dtype, device)
        )

    def tensor(self, array: Array) -> Tensor:
        return torch.as_tensor(np.array(array), dtype=self.dtype, device=self.device)

    def array(self, tensor: Tensor) -> Array:
        return plain(tensor).cpu().numpy().copy()

    @property
    def typical_dist(self) -> float:
        return math.sqrt(self.dim)

    def inner_product(self, point: Array, u: Array, v: Array) -> float:
        with torch.no_grad():
            x, u, v = self.tensor(point), self.tensor(u), self.tensor(v)
            return float(self.geometry.inner(x, u, v))

    def norm(self, point: Array, u: Array) -> float:
        return math.sqrt(max(self.inner_product(point, u, u), 0.0))

    def projection(self, point: Array, vector: Array) -> Array:
        return self._map(self.geometry.proju, point, vector)

    def to_tangent_space(self, point: Array, vector: Array) -> Array:
        return self.projection(point, vector)

    def random_point(self) -> Array:
        try:
            x = _random(self.manifold, self.size, self.dtype, self.device)
        except (NotImplementedError, KeyError) as error:
            raise ManifoldError(
                f"{type(self.manifold).__name__} draws no random points; give a solver one, as "
                "in optimizer.run(problem, initial_point=x)"
            ) from error
        return self.array(x)

    def random_tangent_vector(self, point: Array) -> Array:
        noise = torch.randn(self.size, dtype=self.dtype, device=self.device)
        u = self._map(self.geometry.proju, point, self.array(noise))
        return u / self.norm(point, u)

    def zero_vector(self, point: Array) -> Array:
        return np.zeros_like(point)

    def retraction(self, point: Array, u: Array) -> Array:
        return self._map(self.geometry.retr, point, u)

    def exp(self, point: Array, u: Array) -> Array:
        return self._map(self.geometry.expmap, point, u)

    def log(self, point_a: Array, point_b: Array) -> Array:
        return self._map(self.geometry.logmap, point_a, point_b)

    def transport(self, point_a: Array, point_b: Array, u: Array) -> Array:
        return self._map(self.geometry.transp, point_a, point_b, u)

    def dist(self, point_a: Array, point_b: Array) -> float:
        with torch.no_grad():
            return float(self.geometry.dist(self.tensor(point_a), self.tensor(point_b)))

    def euclidean_to_riemannian_gradient(self, point: Array, gradient: Array) -> Array:
        return self._map(self.geometry.gradient, point, gradient)

    def euclidean_to_riemannian_hessian(
        self, point: Array, gradient: Array, hessian: Array, u: Array
    ) -> Array:
        if not is_embedded_flat(self.manifold):
            raise NotImplementedError(
                f"{type(self.manifold).__name__} is no submanifold of the space of its "
                "arrays; pymanopt_problem(manifold, cost) has its Hessian"
            )
        # The derivative of the gradient field along u, the Euclidean gradient moving by the
        # Euclidean Hessian (Absil, Mahony & Sepulchre 2008, Prop. 5.3.2).
        _, moved = torch.autograd.functional.jvp(
            self.manifold.egrad2rgrad,
            (self.tensor(point), self.tensor(gradient)),
            (self.tensor(u), self.tensor(hessian)),
        )
        return self.projection(point, self.array(moved))

    def _map(self, function: Callable[..., Tensor], *arrays: Array) -> Array:
        with torch.no_grad():
            return self.array(function(*map(self.tensor, arrays)))


@functools.cache
def _adapter() -> Any:
    base = _pymanopt().manifolds.manifold.Manifold
    return type("TorchManifold", (_Operations, base), {})


def is_embedded_flat(manifold: Any) -> bool:
    """Whether the projected derivative of the gradient field is the Hessian."""
    return is_embedded(manifold) and not isinstance(manifold, HasHessian)


def _random(
    manifold: Any, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    # geoopt passes sizes on to torch, which wants the size of a scalar as one argument.
    return manifold.random(*(size or ((),)), dtype=dtype, device=device)


def _dimension(
    geometry: Geometry, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Dimension of a batch of points: the manifold's own word, or the rank of its projection."""
    manifold = geometry.manifold
    single, batch = size[len(size) - manifold.ndim :], size[: len(size) - manifold.ndim]
    stated = dimension_of(geometry.base)
    if stated is not None:
        return math.prod(batch) * stated
    try:
        x = _random(manifold, single, dtype, device)
    except (NotImplementedError, KeyError):  # the second from geoopt's Scaled(Lorentz())
        x = geometry.projx(torch.ones(single, dtype=dtype, device=device).cumsum(-1))
    x = plain(x)
    eye = torch.eye(x.numel(), dtype=dtype, device=device)
    with torch.no_grad():
        rows = torch.stack([geometry.proju(x, e.view(single)).reshape(-1) for e in eye])
    return math.prod(batch) * int(torch.linalg.matrix_rank(rows, rtol=1e-4))
