"""Second moments as metrics of matrices: what they multiply, and their square roots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sttp_manifold.errors import ShapeError

__all__ = ["Metric", "check_moment"]

# Least eigenvalue, relative to the largest: directions that were never seen weigh next to nothing.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Metric:
    """A positive definite matrix on one side of a weight; the identity if it has none.

    Args:
        matrix: ``(d, d)``, or a diagonal one as ``(d,)``; None is the identity.
        root: a factor ``L`` with ``matrix = L @ L.mT``, of the same kind.
        inverse: the inverse of ``root``.
    """

    matrix: Tensor | None = None
    root: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, moment: Tensor | None) -> Metric:
        """The metric of a second moment, with eigenvalues from ``1e-12`` of the largest on.

        Shape:
            - moment: ``(d, d)`` symmetric, or ``(d,)``
        """
        if moment is None:
            return cls()
        if moment.ndim == 1:
            values = _lifted(moment)
            return cls(values, values.sqrt(), values.rsqrt())
        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        values = _lifted(values)
        root = vectors * values.sqrt()
        return cls(root @ root.mT, root, values.rsqrt().unsqueeze(-1) * vectors.mT)

    def times(self, x: Tensor) -> Tensor:
        """``matrix @ x``."""
        return _times(self.matrix, x)

    def whitened(self, x: Tensor) -> Tensor:
        """``root.mT @ x``: its Frobenius norm is the norm of ``x`` in this metric."""
        return _times(self.root if self.root is None or self.root.ndim == 1 else self.root.mT, x)

    def unwhitened(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`whitened`."""
        inverse = self.inverse
        return _times(inverse if inverse is None or inverse.ndim == 1 else inverse.mT, x)


def _times(matrix: Tensor | None, x: Tensor) -> Tensor:
    if matrix is None:
        return x
    return matrix.unsqueeze(-1) * x if matrix.ndim == 1 else matrix @ x


def _lifted(values: Tensor) -> Tensor:
    top = values.amax().clamp_min(torch.finfo(values.dtype).tiny ** 0.5)
    return values.clamp_min(_FLOOR * top)


def check_moment(moment: Tensor | None, size: int, name: str, like: Tensor) -> None:
    """Refuse what is no second moment of vectors of a size.

    Shape:
        - moment: ``(size, size)`` or ``(size,)``
        - like: any, of the device and dtype that it has to have

    Raises:
        ShapeError: another size, dtype or device, or numbers that are not finite or negative on
            the diagonal.
    """
    if moment is None:
        return
    if tuple(moment.shape) not in {(size, size), (size,)}:
        raise ShapeError(
            f"{name} is the second moment x.mT @ x of vectors of size {size}, as a ({size}, "
            f"{size}) tensor or its diagonal alone, got {tuple(moment.shape)}"
        )
    if moment.dtype != like.dtype or moment.device != like.device:
        raise ShapeError(
            f"{name} is {moment.dtype} on {moment.device} and W {like.dtype} on {like.device}; "
            f"call {name}.to(W)"
        )
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if not bool(moment.isfinite().all()) or bool((diagonal < 0).any()):
        raise ShapeError(f"{name} is no second moment: it is not finite, or has a negative square")
