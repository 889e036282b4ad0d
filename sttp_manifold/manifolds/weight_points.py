"""What every manifold of weights does with its points: make them, read them, compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sttp_manifold._arguments import explained_class
from sttp_manifold._geoopt import ManifoldParameter, ManifoldTensor
from sttp_manifold.errors import ShapeError
from sttp_manifold.tt.decompose import tt_svd

if TYPE_CHECKING:
    from sttp_manifold.tt.shape import TTShape
    from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["WeightPoints", "broadcast_vectors"]


def broadcast_vectors(n_elements: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Points and tangent vectors with their batch dimensions made equal.

    The last dimension is theirs, and does not broadcast: a vector of one number is no vector.

    Shape:
        - tensors, outputs: ``(*b, n_elements)``

    Raises:
        ShapeError: a tensor of another length or of other than real floating-point numbers, or
            batch dimensions that do not go together.
    """
    shapes = [tuple(t.shape) for t in tensors]
    for t in tensors:
        if not t.is_floating_point():
            raise ShapeError(f"points and tangent vectors hold real numbers, got {t.dtype}")
    try:
        if any(shape[-1:] != (n_elements,) for shape in shapes):
            raise ShapeError(
                f"points and tangent vectors have shape (*b, {n_elements}), got "
                f"{', '.join(map(str, shapes))}"
            )
        return tuple(torch.broadcast_tensors(*tensors))
    except RuntimeError as error:
        raise ShapeError(
            f"batch dimensions do not go together: {', '.join(map(str, shapes))}; give one point "
            "for each vector, or one for all of them"
        ) from error


@explained_class
class WeightPoints:
    """Mixed into a geoopt manifold whose flat points stand for weights."""

    shape: TTShape
    n_elements: int

    def unpack(self, x: Tensor) -> SpectralTT:
        """The weight of a point."""
        raise NotImplementedError

    def pack(self, tt: SpectralTT, *, project: bool = False) -> Tensor:
        """Point of a weight."""
        raise NotImplementedError

    def random(self, *size: Any, **options: Any) -> ManifoldTensor:
        """Random point."""
        raise NotImplementedError

    def to_matrix(self, x: Tensor) -> Tensor:
        """The dense weight of a point, ``(*b, d_out, d_in)``."""
        return self.unpack(x).to_matrix()

    def from_matrix(self, W: Tensor, *, project: bool = False) -> ManifoldTensor:
        """Point whose weight is the TT-SVD of a matrix.

        Shape:
            - W: ``(*b, d_out, d_in)``
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: a matrix of another size, or not finite.
            SpectrumError: a matrix that the spectrum cannot hold, unless ``project``.
            ManifoldError: a matrix of lower TT rank, where the manifold has none such.
        """
        return ManifoldTensor(self.pack(tt_svd(W, self.shape), project=project), manifold=self)

    def random_parameter(
        self,
        *batch: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> ManifoldParameter:
        """Random point as a trainable ``geoopt.ManifoldParameter``, ``(*batch, n_elements)``."""
        point = self.random(
            *batch, self.n_elements, dtype=dtype, device=device, generator=generator
        )
        return ManifoldParameter(point.as_subclass(Tensor), manifold=self.for_training())

    def for_training(self) -> Any:
        """The manifold that trainable parameters lie on: this one, unless it says otherwise."""
        return self

    def weight_dist(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Gauge-invariant distance of points: :math:`\|W(x) - W(y)\|_F`, ``(*b,)``."""
        return self.unpack(x).distance(self.unpack(y))

    def same_weight(
        self, x: Tensor, y: Tensor, rtol: float | None = None, atol: float = 0.0
    ) -> bool:
        """Whether points differ by a gauge only; see :meth:`SpectralTT.allclose`."""
        return self.unpack(x).allclose(self.unpack(y), rtol=rtol, atol=atol)

    def _batch_of(self, size: tuple[int | tuple[int, ...], ...], name: str) -> tuple[int, ...]:
        flat: list[int] = []
        for entry in size:
            flat.extend([entry] if isinstance(entry, int) else entry)
        if size and (not flat or flat[-1] != self.n_elements):
            raise ShapeError(
                f"{name}(*size) takes a shape ending in n_elements = {self.n_elements}, got "
                f"{tuple(flat)}; M.{name}() gives one point, "
                f"M.{name}(8, {self.n_elements}) a batch of eight"
            )
        return tuple(flat[:-1])

    def _assert_length(self, x: Tensor, call: str) -> None:
        if x.ndim < 1 or x.shape[-1] != self.n_elements:
            raise ShapeError(
                f"{call} takes a flat point (*b, {self.n_elements}), got {tuple(x.shape)}"
            )
