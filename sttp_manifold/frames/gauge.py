r"""The gauge of spectral tensor trains: the :math:`O(R_k)` action and a canonical representative.

For orthogonal :math:`Q_k` the change :math:`C_k \leftarrow Q_{k-1}^\top C_k Q_k` of every core
leaves ``W`` as it is ([STTP] Prop. 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames.householder import reduced_reflectors
from sttp_manifold.tt.contract import left_frame, mirror, mirrored_frame
from sttp_manifold.tt.precision import is_half, widened
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["canonical_gauge", "haar_frame", "random_rotation", "rotate"]


@explained
def random_rotation(
    r: int,
    *batch: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthogonal matrices from the Haar measure, ``(*batch, r, r)``; see :func:`haar_frame`.

    Args:
        r: their size.
        batch: batch dimensions.
        dtype: floating dtype, torch's default if absent.
        device: device of the result.
        generator: source of randomness.
    """
    return haar_frame(r, r, *batch, dtype=dtype, device=device, generator=generator)


@explained
def haar_frame(
    d: int,
    r: int,
    *batch: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frames from the uniform measure on the Stiefel manifold, ``(*batch, d, r)``.

    QR of a Gaussian matrix with the signs fixed so that ``R`` has a positive diagonal; without
    them the measure is not uniform (Mezzadri 2007).

    Args:
        d: rows of a frame.
        r: its columns, ``r <= d``.
        batch: batch dimensions.
        dtype: floating dtype, torch's default if absent.
        device: device of the result.
        generator: source of randomness.

    Raises:
        ShapeError: more columns than rows, or none.
    """
    if not 1 <= r <= d:
        raise ShapeError(f"a frame has at most as many columns as rows, got d={d} and r={r}")
    normal = torch.randn(*batch, d, r, dtype=dtype, device=device, generator=generator)
    q, triangle = torch.linalg.qr(widened(normal))
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).to(normal.dtype)


@explained
def rotate(tt: SpectralTT, left: Sequence[Tensor] = (), right: Sequence[Tensor] = ()) -> SpectralTT:
    """Act with the gauge group: the same weight with other cores.

    Args:
        tt: the value.
        left: ``Q_1, ..., Q_{D-1}`` for the bonds inside ``U``, outermost first.
        right: one matrix for each bond inside ``V``, from the centre outwards.

    Shape:
        - left, right: each ``(*b, R_k, R_k)``, orthogonal

    Raises:
        ShapeError: a wrong number of rotations, or one that does not fit its bond.
    """
    wanted = (len(tt.left) - 1, len(tt.right) - 1)
    if (len(left), len(right)) != wanted:
        raise ShapeError(
            f"a train of {len(tt.left)} and {len(tt.right)} cores takes {wanted[0]} left and "
            f"{wanted[1]} right rotations, got {len(left)} and {len(right)}"
        )

    sides = []
    for cores, rotations in ((list(tt.left), left), (list(tt.right), right)):
        for k, rotation in enumerate(rotations):
            size = (*tt.batch_shape, cores[k].shape[-1], cores[k].shape[-1])
            if tuple(rotation.shape) not in (size, size[-2:]):
                raise ShapeError(
                    f"the rotation of this bond is {size}, got {tuple(rotation.shape)}"
                )
            push_rotation(cores, k, rotation)
        sides.append(tuple(cores))
    return SpectralTT(sides[0], tt.spectrum, sides[1], tt.shape)


@explained
def canonical_gauge(tt: SpectralTT) -> SpectralTT:
    """A representative of the weight that depends on the weight alone, where it is generic.

    The spectrum becomes a vector, non-negative and descending. The common sign of each pair of
    singular vectors is fixed by making the largest entry in each column of the innermost left
    frame positive. Every other frame gets an upper triangular top block with a non-positive
    diagonal, as in the reduced Householder chart. Unique for distinct singular values and
    invertible top blocks. Half precision is computed in float32.
    """
    if is_half(tt.dtype):
        return canonical_gauge(tt.to(torch.float32)).to(tt.dtype)
    tt = tt.merged()
    left, right = list(tt.left), list(mirror(tt.right))
    for cores, frame_of in ((left, left_frame), (right, mirrored_frame)):
        for k in range(len(cores) - 1):
            push_rotation(cores, k, reduced_reflectors(frame_of(cores[k]))[1])
    a, s, bt = torch.linalg.svd(tt.bond)
    left[-1], right[-1] = left[-1] @ a.unsqueeze(-3), right[-1] @ bt.mT.unsqueeze(-3)
    frame = left_frame(left[-1])
    pivots = frame.gather(-2, frame.abs().argmax(-2, keepdim=True))
    signs = torch.where(pivots < 0, -1.0, 1.0).to(tt.dtype).unsqueeze(-2)
    return SpectralTT(
        (*left[:-1], left[-1] * signs), s, mirror([*right[:-1], right[-1] * signs]), tt.shape
    )


def push_rotation(cores: list[Tensor], k: int, rotation: Tensor) -> None:
    """Rotate the frame of left core ``k`` and undo it in core ``k + 1``, in place."""
    cores[k] = cores[k] @ rotation.unsqueeze(-3)
    inner = cores[k + 1]
    cores[k + 1] = (rotation.mT @ inner.flatten(-2)).unflatten(-1, inner.shape[-2:])
