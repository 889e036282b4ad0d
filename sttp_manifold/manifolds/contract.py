r"""What a manifold may offer beside geoopt's contract, and what each offer is for.

Everything here that works on a manifold asks for geoopt's ``retr``, ``proju``, ``egrad2rgrad``,
``inner`` and ``transp``. The protocols below are more than that, one capability each; a manifold
has one by having its members, without inheriting from anything, and ``isinstance(M, OfWeights)``
says whether it does:

====================== ============================================= ==============================
protocol               what to implement                             what for
====================== ============================================= ==============================
:class:`OfWeights`     ``unpack(x)``                                 costs are functions of a weight
:class:`HasLength`     ``n_elements``                                random points without a shape
:class:`HasFrames`     ``frame_groups``, ``spectrum_slice``          steps on stacks of equal frames
:class:`HasDecay`      ``weight_decay_grad(x)``                      weight decay of the weight
:class:`HasHessian`    ``hessian_operator(cost, x)``                 trust regions, check_hessian
:class:`HasScale`      ``typical_dist(x)``                           the first trust region
:class:`HasSteepest`   ``steepest(x, u)``                            Muon's step, of the weight
:class:`HasAmbient`    ``unpack(x)``, ``ambient_vector(x, u)``       checks of points with a gauge
:class:`HasProjection` ``project_matrix(x, Z)``                      the same, faster
``dimension_of``       ``dim``, ``total_dim`` where there is a gauge check_manifold, pymanopt
====================== ============================================= ==============================

A geoopt manifold whose metric is that of the space of its tensors needs no Hessian of its own:
autograd has it (Absil, Mahony & Sepulchre 2008, Prop. 5.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

from sttp_manifold.tt.spectral import SpectralTT

__all__ = [
    "FrameGroup",
    "HasAmbient",
    "HasDecay",
    "HasFrames",
    "HasHessian",
    "HasLength",
    "HasProjection",
    "HasScale",
    "HasSteepest",
    "LinearMap",
    "OfWeights",
    "dimension_of",
    "flat_metric",
]

LinearMap: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of tangent vectors at one point."""

InnerT = TypeVar("InnerT", bound=Callable[..., Any])


def dimension_of(manifold: Any) -> int | None:
    """The dimension that a manifold states, of the space that it moves in: with a gauge, if any."""
    for name in ("total_dim", "dim"):
        value = getattr(manifold, name, None)
        if isinstance(value, int):
            return value
    return None


def flat_metric(inner: InnerT) -> InnerT:
    """Mark an ``inner`` that is the sum of the products of the entries of two vectors.

    Solvers then take that sum themselves, in double precision.
    """
    inner.is_flat = True  # type: ignore[attr-defined]
    return inner


class FrameGroup(NamedTuple):
    """Frames of equal shape, adjacent in the flat vector.

    Attributes:
        span: where they lie: ``x[..., span].unflatten(-1, (copies, d, r))`` is their batch.
        copies: how many frames.
        d: rows of each.
        r: columns of each.
    """

    span: slice
    copies: int
    d: int
    r: int


@runtime_checkable
class OfWeights(Protocol):
    """Points stand for weights: a cost on the manifold is a function of the weight."""

    def unpack(self, x: Tensor) -> SpectralTT:
        """The weight of a point, differentiable.

        Shape:
            - x: a point of the manifold
        """
        ...


@runtime_checkable
class HasLength(Protocol):
    """Points are flat vectors of a known length, so that none has to be given to draw one.

    Attributes:
        n_elements: the length.
    """

    n_elements: int


@runtime_checkable
class HasFrames(Protocol):
    """Flat points that consist of orthonormal frames and coordinates in the Euclidean metric.

    The optimizers move such frames themselves, all of one shape as one batch, instead of calling
    ``retr``.

    Attributes:
        frame_groups: where the frames lie; equal ones next to each other.
        spectrum_slice: where the coordinates lie that are no frames; empty if there are none.
    """

    frame_groups: Sequence[FrameGroup]
    spectrum_slice: slice


@runtime_checkable
class HasDecay(Protocol):
    """Knows the norm that weight decay is to shrink: that of the weight, not of coordinates."""

    def weight_decay_grad(self, x: Tensor) -> Tensor:
        r"""Derivatives of :math:`\tfrac12 \|W(x)\|_F^2` in the entries of ``x``; docs/math.

        Shape:
            - x, output: a point of the manifold
        """
        ...


@runtime_checkable
class HasHessian(Protocol):
    """Has exact Riemannian Hessians of costs, where projecting the Euclidean one is not enough."""

    def hessian_operator(self, cost: Callable[..., Tensor], x: Tensor) -> LinearMap:
        """The Hessian of a cost at a point, as a map of tangent vectors; the cost is called once.

        Shape:
            - x: a point of the manifold, or a batch over which the cost sums
        """
        ...


@runtime_checkable
class HasScale(Protocol):
    """Knows how long a step is that changes all of a point."""

    def typical_dist(self, x: Tensor) -> Tensor:
        """The length scale of steps at a point, ``(*b,)``.

        Shape:
            - x: a point of the manifold
        """
        ...


@runtime_checkable
class HasSteepest(Protocol):
    """Knows a direction of steep ascent whose size is that of its largest singular value."""

    def steepest(self, x: Tensor, u: Tensor) -> Tensor:
        """A tangent vector of spectral norm one along which ``u`` ascends.

        Shape:
            - x, u: a point of the manifold and a tangent vector
        """
        ...


@runtime_checkable
class HasAmbient(OfWeights, Protocol):
    """A submanifold of the dense matrices whose points are coordinates up to a gauge."""

    def ambient_vector(self, x: Tensor, u: Tensor) -> Tensor:
        """The velocity of the dense weight along a tangent vector, ``(*b, d_out, d_in)``.

        Shape:
            - x, u: a point of the manifold and a tangent vector
        """
        ...


@runtime_checkable
class HasProjection(Protocol):
    """Projects dense matrices onto its tangent spaces."""

    def project_matrix(self, x: Tensor, Z: Tensor) -> Tensor:
        """The nearest tangent vector to a matrix.

        Shape:
            - x: a point of the manifold
            - Z: ``(*b, d_out, d_in)``
        """
        ...
