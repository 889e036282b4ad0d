"""geoopt's product of Stiefel factors and a Euclidean one, with equal frames as one batch.

``geoopt.ProductManifold`` loops over its factors in Python and never batches equal shapes. Here
frames of equal shape lie next to each other in the flat vector, so that each group is a batch
without a copy. The results are those of geoopt's product of ``EuclideanStiefel`` factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sttp_manifold._arguments import explained_class
from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ProductManifold
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames.retractions import cholesky_qr, polar, project_tangent
from sttp_manifold.manifolds.contract import FrameGroup, flat_metric
from sttp_manifold.manifolds.weight_points import broadcast_vectors

__all__ = ["GroupedProduct"]

BatchMap = Callable[..., Tensor]


@explained_class
class GroupedProduct(ProductManifold):
    r"""Product of Stiefel manifolds and one Euclidean factor, in the Euclidean metric.

    Args:
        frames: shapes ``(d, r)`` of the frames, in the caller's order.
        coordinates: shape of the Euclidean factor, which comes last; absent if it has no element.

    Shape:
        - points and vectors: ``(*b, n_elements)``
    """

    def __init__(self, frames: Sequence[tuple[int, int]], coordinates: tuple[int, ...]) -> None:
        kinds = list(dict.fromkeys(frames))
        order = sorted(range(len(frames)), key=lambda k: kinds.index(frames[k]))
        stiefel = EuclideanStiefel()
        factors: list[tuple[object, tuple[int, ...]]] = [(stiefel, frames[k]) for k in order]
        size = math.prod(coordinates)
        if size:
            factors.append((Euclidean(ndim=len(coordinates)), coordinates))
        super().__init__(*factors)
        self.frame_groups: list[FrameGroup] = []
        self._order = order
        self._starts = [0] * len(frames)
        position = 0
        for d, r in kinds:
            members = [k for k in order if frames[k] == (d, r)]
            for offset, k in enumerate(members):
                self._starts[k] = position + offset * d * r
            span = slice(position, position + len(members) * d * r)
            self.frame_groups.append(FrameGroup(span, len(members), d, r))
            position = span.stop
        self.spectrum_slice = slice(position, position + size)

    def join(self, frames: Sequence[Tensor], coordinates: Tensor) -> Tensor:
        """Flat vector of frames in the caller's order and flat coordinates.

        Raises:
            ShapeError: another number of frames.
        """
        if len(frames) != len(self._order):
            raise ShapeError(
                f"join(frames, coordinates) takes {len(self._order)} frames, got {len(frames)}"
            )
        return torch.cat([*(frames[k].flatten(-2) for k in self._order), coordinates], -1)

    def _on_factors(self, on_frames: BatchMap, on_spectrum: BatchMap, *tensors: Tensor) -> Tensor:
        """Apply maps to the batches of equal frames and to the spectrum, and join the results."""
        tensors = broadcast_vectors(self.n_elements, *tensors)
        parts = []
        for span, copies, d, r in self.frame_groups:
            batches = (t[..., span].unflatten(-1, (copies, d, r)) for t in tensors)
            parts.append(on_frames(*batches).flatten(-3))
        parts.append(on_spectrum(*(t[..., self.spectrum_slice] for t in tensors)))
        return torch.cat(parts, -1)

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: the polar factor of every frame; the spectrum stays."""
        return self._on_factors(
            lambda frame: polar(frame, torch.zeros_like(frame)), lambda theta: theta, x
        )

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection onto the tangent space of the product."""
        return self._on_factors(project_tangent, _second, x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient of a Euclidean one: the tangent projection."""
        return self.proju(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction by the Q factor of ``x + u`` in every frame, first order."""
        return self._on_factors(cholesky_qr, torch.add, x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map of the product, by matrix exponentials of size ``2r``."""
        return self._on_factors(EuclideanStiefel().expmap, torch.add, x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport to ``y`` by tangent projection."""
        _, y, v = broadcast_vectors(self.n_elements, x, y, v)
        return self.proju(y, v)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction of ``u`` and transport of ``v`` to the new point."""
        y = self.retr(x, u)
        return y, self.proju(y, v)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` along the retraction of ``u``."""
        return self.retr_transp(x, u, v)[1]

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map of ``u`` and transport of ``v`` to the new point."""
        y = self.expmap(x, u)
        return y, self.proju(y, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` along the exponential map of ``u``."""
        return self.expmap_transp(x, u, v)[1]

    @flat_metric
    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Euclidean inner product of tangent vectors, ``(*b,)``."""
        x, u, v = broadcast_vectors(self.n_elements, x, u, u if v is None else v)
        return (u * v).sum(-1, keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner products factor by factor, spread over the elements of each frame."""
        return self._on_factors(
            lambda a, b: (a * b).sum((-2, -1), keepdim=True).expand_as(a),
            torch.mul,
            *broadcast_vectors(self.n_elements, u, u if v is None else v, x)[:2],
        )


def _second(_: Tensor, u: Tensor) -> Tensor:
    return u
