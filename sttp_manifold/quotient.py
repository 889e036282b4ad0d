r"""Points and tangent vectors carried between the three ways to hold a weight, without loss.

The three are the Householder chart, the product manifold (the total space) and the manifold of
fixed TT rank, which is its quotient by the gauge. A point goes by its weight; a tangent vector by
the velocity of the weight that it stands for. Going to the product, a tangent vector becomes its
*horizontal lift*, the only one of its velocity that has no part along the gauge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ManifoldError, ShapeError
from sttp_manifold.manifolds import FixedTTRankManifold, SpectralTTManifold
from sttp_manifold.manifolds.bond_sets import skew_pair
from sttp_manifold.manifolds.fixed_tt_geometry import Vector, derivative_chain
from sttp_manifold.tt.contract import left_frame, mirror, right_frame
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["Holder", "transfer", "transfer_vector"]

Holder: TypeAlias = HouseholderChart | SpectralTTManifold | FixedTTRankManifold
"""A way to hold a weight."""
Held: TypeAlias = Tensor | ChartPoint
"""A flat point of a manifold, or the coordinates of a chart."""


@explained
def transfer(x: Held, source: Holder, target: Holder, *, project: bool = False) -> Held:
    """The point of ``target`` that stands for the same weight as ``x`` in ``source``.

    Args:
        x: a flat point of a manifold, or the coordinates of a chart.
        source: where ``x`` is from.
        target: where it goes; on the same plan.
        project: take the nearest weight that the spectrum of ``target`` can hold.

    Shape:
        - x, output: ``(*b, n_elements)`` of a manifold, :class:`ChartPoint` of a chart

    Raises:
        ShapeError: different plans.
        SpectrumError: a weight that the spectrum of ``target`` cannot hold, unless ``project``.
        ManifoldError: a weight of lower TT rank, which fixed TT rank has none of.

    Example:
        >>> from sttp_manifold import TTShape
        >>> shape = TTShape.for_matrix(12, 10, rank=3)
        >>> M, F = SpectralTTManifold(shape), FixedTTRankManifold(shape)
        >>> x = M.random(dtype=torch.float64)
        >>> bool(F.unpack(transfer(x, M, F)).allclose(M.unpack(x)))
        True
    """
    _same_plan(source, target)
    with torch.no_grad():
        weight = _unpack(x, source)
        if isinstance(target, HouseholderChart):
            return target.encode(weight, project=project)
        return target.pack(weight, project=project)


@explained
def transfer_vector(
    x: Held, u: Held, source: Holder, target: Holder, *, project: bool = False
) -> tuple[Held, Held]:
    r"""Carry a point and a tangent vector: the same weight, moving with the same velocity.

    Args:
        x: a point, as for :func:`transfer`.
        u: a tangent vector there; of a chart, directions of its frames and spectrum.
        source: where they are from.
        target: where they go.
        project: drop what is not tangent to the set of ``target``.

    Returns:
        The point of ``target``, and the vector there: horizontal on a product, gauged on fixed
        TT rank, directions of the coordinates of a chart.

    Shape:
        - x, u, outputs: as for :func:`transfer`

    Raises:
        ShapeError: different plans.
        SpectrumError: a weight that the spectrum of ``target`` cannot hold, unless ``project``.
        ManifoldError: a velocity that is not tangent to the set of ``target``, unless
            ``project``; or, where ``target`` holds singular values one by one, a weight of which
            some coincide: their velocities are not defined there, and ``"full"`` is the spectrum
            that is regular.

    Example:
        >>> from sttp_manifold import TTShape
        >>> shape = TTShape.for_matrix(12, 10, rank=3)
        >>> M, F = SpectralTTManifold(shape), FixedTTRankManifold(shape)
        >>> x = M.random(dtype=torch.float64)
        >>> u = M.horizontal(x, M.proju(x, torch.randn_like(x)))
        >>> y, v = transfer_vector(x, u, M, F)
        >>> back, lift = transfer_vector(y, v, F, M)
        >>> bool(torch.allclose(F.norm(y, v), F.norm(*transfer_vector(back, lift, M, F))))
        True
    """
    _same_plan(source, target)
    weight, velocity = _moving(x, u, source)
    chain = derivative_chain(_cores(weight), velocity)
    if isinstance(target, FixedTTRankManifold):
        y = target.pack(weight, project=project)
        free = FixedTTRankManifold(target.shape)
        xi = free.project_chain(y, chain)
        v = target.proju(y, xi)
        _assert_kept(xi, v, project)
        return y, v
    product = _product(target)
    y = product.pack(weight, project=project)
    v = _lift(product, y, chain, project)
    if isinstance(target, HouseholderChart):
        return _encode_moving(target, product, y, v)
    return y, v


def _lift(product: SpectralTTManifold, y: Tensor, chain: Vector, project: bool) -> Tensor:
    """Horizontal vector at ``y`` whose weight moves as a chain says."""
    weight = product.unpack(y)
    fixed = FixedTTRankManifold(product.shape)
    point = fixed.total_space.pack(weight)
    xi = fixed.project_chain(point, chain)
    left, bond, right = fixed.total_space.cores(fixed.velocities(point, xi), lambda s: s)
    coordinates = bond.flatten(-2)
    if product.spectrum != "full":
        s = weight.spectrum
        turn, other = _turns(s, bond, product)
        left = (*left[:-1], left[-1] + weight.left[-1] @ turn.unsqueeze(-3))
        # W = U diag(s) V^T moves by -B V^T where V moves by V B.
        inner = (other @ weight.right[0].flatten(-2)).unflatten(-1, right[0].shape[-2:])
        right = (right[0] - inner, *right[1:])
        ds = bond.diagonal(dim1=-2, dim2=-1)
        held = product.spectrum != "bounded"
        (coordinates,) = _derivative(lambda t: (product.map.inverse(t, project=held),), (s,), (ds,))
    frames = [*map(left_frame, left), *map(right_frame, right)]
    v = product.horizontal(y, product.join(frames, coordinates))
    _, velocity = _moving(y, v, product)
    moved = derivative_chain(_cores(weight), velocity)
    _assert_kept(xi, fixed.project_chain(point, moved), project)
    return v


def _turns(s: Tensor, vector: Tensor, product: SpectralTTManifold) -> tuple[Tensor, Tensor]:
    """Skew ``A``, ``B`` with ``vector = A diag(s) - diag(s) B`` off the diagonal."""
    if product.spectrum == "identity":
        return (vector - vector.mT) / 2, torch.zeros_like(vector)
    equal = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    if product.spectrum == "fixed":  # where they coincide, they do so for good
        equal = s.unsqueeze(-1) == s.unsqueeze(-2)
    gaps = (s.abs().unsqueeze(-1) - s.abs().unsqueeze(-2)).abs().masked_fill(equal, torch.inf)
    least = gaps.amin((-2, -1)) / s.abs().amax(-1)
    if not bool((least > 64 * torch.finfo(s.dtype).eps).all()):
        raise ManifoldError(
            "singular values coincide at this weight, where they and their vectors have no "
            "velocities of their own; spectrum='full' has them"
        )
    return skew_pair(s, vector, equal)


def _assert_kept(wanted: Tensor, got: Tensor, project: bool) -> None:
    if project:
        return
    lost = torch.linalg.vector_norm(wanted - got, dim=-1)
    size = torch.linalg.vector_norm(wanted, dim=-1)
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5
    if not bool((lost <= tolerance * size).all()):
        raise ManifoldError(
            f"the velocity is not tangent to the set of the target: {float(lost.max()):.2g} of "
            f"{float(size.max()):.2g} would be lost; pass project=True to drop it, or take a "
            "target with spectrum='full'"
        )


def _same_plan(source: Holder, target: Holder) -> None:
    if source.shape.merged != target.shape.merged:
        raise ShapeError(
            f"source and target are on different plans, {source.shape!r} and {target.shape!r}; "
            "truncate(tt, rank=...) or tt_svd(tt.to_matrix(), shape) change the plan of a weight"
        )


def _product(holder: HouseholderChart | SpectralTTManifold) -> SpectralTTManifold:
    """The product with the spectrum of a chart, or the product itself."""
    if isinstance(holder, SpectralTTManifold):
        return holder
    return SpectralTTManifold(holder.shape, holder.spectrum, holder.bound, holder.values)


def _unpack(x: Held, source: Holder) -> SpectralTT:
    if isinstance(source, HouseholderChart):
        if not isinstance(x, ChartPoint):
            raise ManifoldError(
                "a point of a chart is a ChartPoint; chart.unflatten(z) makes one of a vector"
            )
        return source.decode(x)
    if isinstance(x, ChartPoint):
        raise ManifoldError("a point of a manifold is a flat tensor, got a ChartPoint")
    return source.unpack(x)


def _moving(x: Held, u: Held, source: Holder) -> tuple[SpectralTT, Vector]:
    """The weight of a point, and the velocities of its cores along a tangent vector."""
    if isinstance(source, FixedTTRankManifold):
        assert isinstance(x, Tensor)
        assert isinstance(u, Tensor)
        return _moving(x, source.velocities(x, u), source.total_space)
    weight = _unpack(x, source)
    sizes = len(weight.left), len(weight.right)

    def cores(*arrays: Tensor) -> tuple[Tensor, ...]:
        point = (
            ChartPoint(arrays[:-1], arrays[-1], x.signs) if isinstance(x, ChartPoint) else arrays[0]
        )
        left, bond, right = _cores(_unpack(point, source))
        return (*left, bond, *right)

    moved = _derivative(cores, _arrays(x), _arrays(u))
    return weight, Vector(moved[: sizes[0]], moved[sizes[0]], moved[sizes[0] + 1 :])


def _encode_moving(
    chart: HouseholderChart, product: SpectralTTManifold, y: Tensor, v: Tensor
) -> tuple[ChartPoint, ChartPoint]:
    """Coordinates of a point of the product, and of a vector there."""
    point = chart.encode(product.unpack(y))
    moved = _derivative(lambda p: _arrays(chart.encode(product.unpack(p))), (y,), (v,))
    return point, ChartPoint(moved[:-1], moved[-1], torch.zeros_like(point.signs))


def _arrays(x: Held) -> tuple[Tensor, ...]:
    """What moves: constant signs that ride along with coordinates do not."""
    return (*x.frames, x.spectrum) if isinstance(x, ChartPoint) else (x,)


def _cores(tt: SpectralTT) -> Vector:
    return Vector(tt.left, tt.bond, mirror(tt.right))


def _derivative(
    function: Callable[..., tuple[Tensor, ...]], x: tuple[Tensor, ...], u: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Derivative of arrays along others, by two backward passes."""
    _, moved = torch.autograd.functional.jvp(function, x, u)
    return tuple(moved)
