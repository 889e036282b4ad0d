"""Parameters sorted by the way they move, and views of what they consist of.

A parameter is *plain* (torch moves it), *framed* (a :class:`SpectralTTManifold` point or a
Euclidean Stiefel frame, moved here in batches), or *generic* (any other geoopt manifold, moved by
that manifold's own methods, one parameter at a time).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ManifoldTensor
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.orthonormal import HALF
from sttp_manifold.manifolds.contract import HasDecay, HasFrames
from sttp_manifold.tt.precision import autocast_is_on

__all__ = [
    "SparseGradientError",
    "check_dense",
    "compress_scalars",
    "decay_gradient",
    "frame_shapes",
    "frame_views",
    "full_precision",
    "is_framed",
    "is_riemannian",
    "number",
    "project_",
    "scalars_shape",
    "shortened",
    "spectrum_slice",
    "spread_scalars",
    "working_dtype",
]

# Answers of is_framed by class: to ask a protocol takes longer than a call of torch, in every step.
_FRAMED: dict[type, bool] = {}
_DEVICE = attrgetter("device")
# Longest step of a frame: far beyond any that descends.
_LONGEST = 1e3


class SparseGradientError(OptimizerError, RuntimeError):
    """A sparse gradient. Also a ``RuntimeError``, which is what torch and geoopt raise here."""


def is_riemannian(p: Tensor) -> bool:
    """Whether ``p`` lives on a manifold that a Euclidean step would leave."""
    return isinstance(p, ManifoldTensor) and type(p.manifold) is not Euclidean


def is_framed(p: Tensor) -> bool:
    """Whether the frames of ``p`` can be batched.

    The exact type for geoopt's own: a subclass may retract another way.
    """
    manifold = getattr(p, "manifold", None)
    if manifold is None:
        return False
    kind = type(manifold)
    framed = _FRAMED.get(kind)
    if framed is None:
        framed = _FRAMED[kind] = kind is EuclideanStiefel or isinstance(manifold, HasFrames)
    return framed


def check_dense(params: Iterable[Tensor], name: str) -> None:
    """Refuse sparse gradients before anything has moved.

    Raises:
        SparseGradientError: on the first sparse gradient.
    """
    for p in params:
        grad = p.grad
        if grad is not None and grad.is_sparse:
            raise SparseGradientError(
                f"{name} takes dense gradients, but a parameter of shape {tuple(p.shape)} has a "
                f"sparse one; build its embedding with sparse=False, or give that parameter to "
                f"torch.optim.SparseAdam"
            )


def number(value: float | Tensor, *, look: bool = True) -> float | Tensor:
    """A setting of a group as a number, or as a tensor without dimensions where that would wait.

    Args:
        value: a number or a tensor of one element.
        look: whether a tensor on the CPU may be read.
    """
    if not isinstance(value, Tensor):
        return float(value)
    if look and value.device.type == "cpu":
        return float(value)
    return value.detach().reshape(())


def working_dtype(p: Tensor) -> torch.dtype:
    """What steps of ``p`` are computed in, and its moments kept in: float32 for half precision.

    The square of a gradient of 256 is infinite in float16.
    """
    return torch.float32 if p.dtype in HALF else p.dtype


def full_precision(params: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Lift autocast, under which the products of a step would be rounded to half precision."""
    devices = set(map(_DEVICE, params))
    kinds = [kind for kind in {device.type for device in devices} if autocast_is_on(kind)]
    if not kinds:
        return nullcontext()
    lifted = ExitStack()
    for kind in kinds:
        lifted.enter_context(torch.autocast(kind, enabled=False))
    return lifted


def decay_gradient(p: Tensor) -> Tensor:
    r"""Euclidean gradient of the L2 penalty at a manifold parameter.

    The penalty is :math:`\frac12 |W|_F^2` where the manifold knows its ``W``, and half the squared
    norm of the coordinates elsewhere. That of a single frame is constant.
    """
    x = p.detach()
    manifold = p.manifold  # type: ignore[attr-defined]
    if isinstance(manifold, HasDecay):
        return manifold.weight_decay_grad(x)
    return torch.zeros_like(x) if type(manifold) is EuclideanStiefel else x


# --- Views of one framed parameter, and of every array laid out as it is. ---


def frame_views(p: Tensor, flat: Tensor) -> list[Tensor]:
    """View an array laid out as ``p`` as its stacks of equal frames, one view a group.

    Shape:
        - flat: as ``p``
        - Output: each ``(*b, count, d, r)`` (``(*b, d, r)`` for a Stiefel parameter)
    """
    manifold = p.manifold  # type: ignore[attr-defined]
    if type(manifold) is EuclideanStiefel:
        return [flat]
    return [
        flat[..., part].unflatten(-1, (count, d, r)) for part, count, d, r in manifold.frame_groups
    ]


def frame_shapes(p: Tensor) -> tuple[int, list[tuple[int, int, int]]]:
    """How many points ``p`` holds, and the frames ``(count, d, r)`` of each, as they lie there."""
    manifold = p.manifold  # type: ignore[attr-defined]
    if type(manifold) is EuclideanStiefel:
        d, r = p.shape[-2:]
        return 1, [(p.numel() // (d * r), d, r)]
    groups = [(count, d, r) for _, count, d, r in manifold.frame_groups]
    return p.numel() // p.shape[-1], groups


def spectrum_slice(p: Tensor) -> slice | None:
    """Slice of the coordinates of ``p`` that are no frames, if it has any."""
    manifold = p.manifold  # type: ignore[attr-defined]
    if type(manifold) is EuclideanStiefel:
        return None
    part: slice = manifold.spectrum_slice
    return part if part.stop > part.start else None


def scalars_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of an array with one entry a frame and one a spectrum coordinate of ``p``."""
    if type(p.manifold) is EuclideanStiefel:  # type: ignore[attr-defined]
        return tuple(p.shape[:-2])
    part = spectrum_slice(p)
    frames = sum(count for count, _, _ in frame_shapes(p)[1])
    return (*p.shape[:-1], frames + (part.stop - part.start if part else 0))


def compress_scalars(p: Tensor, full: Tensor) -> Tensor:
    """Second moments of entries to those of frames.

    Those that are repeated over each frame, as geoopt keeps them, are of the frame already; others
    are summed, as squared norms are.

    Shape:
        - full: as ``p``
        - Output: :func:`scalars_shape`
    """
    parts = []
    for view in frame_views(p, full):
        first = view[..., :1, :1]
        repeated = (view == first).all(-1).all(-1)
        parts.append(torch.where(repeated, first[..., 0, 0], view.sum((-2, -1))))
    part = spectrum_slice(p)
    if isinstance(part, slice):
        parts.append(full[..., part])
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts, -1)


def spread_scalars(p: Tensor, scalars: Tensor) -> Tensor:
    """Second moments of frames to those of entries, which share them evenly.

    Shape:
        - scalars: :func:`scalars_shape`
        - Output: as ``p``
    """
    full = torch.empty(p.shape, dtype=scalars.dtype, device=scalars.device)
    views = frame_views(p, full)
    if type(p.manifold) is EuclideanStiefel:  # type: ignore[attr-defined]
        return full.copy_(scalars[..., None, None].expand(p.shape) / math.prod(p.shape[-2:]))
    start = 0
    for view in views:
        mine = scalars[..., start : start + view.shape[-3]]
        view.copy_(mine[..., None, None].expand(view.shape) / math.prod(view.shape[-2:]))
        start += view.shape[-3]
    part = spectrum_slice(p)
    if part is not None:
        full[..., part] = scalars[..., start:]
    return full


# --- Frames of one batch; these run in every step, and trust their arguments. ---


def project_(X: Tensor, G: Tensor) -> None:
    """Tangent projection of ``(n, d, r)`` at frames of that shape, in place."""
    XtG = torch.bmm(X.transpose(1, 2), G)
    G.baddbmm_(X, XtG + XtG.transpose(1, 2), alpha=-0.5)


def shortened(direction: Tensor, scale: float | Tensor) -> Tensor:
    """What to multiply the directions of frames with, so that no step is longer than it can be.

    A step of length ``t`` turns a frame by ``arctan t`` at most: from :data:`_LONGEST` on it is the
    same to three digits, while squares of what is much longer overflow.

    Shape:
        - direction: ``(n, d, r)``, scale: ``()`` or ``(n,)``
        - Output: ``(n,)``
    """
    lengths = torch.linalg.vector_norm(direction, dim=(1, 2))
    # What has overflowed is taken for the largest number, which a rate of zero makes zero.
    lengths.clamp_(max=torch.finfo(lengths.dtype).max).mul_(abs(scale))
    return lengths.reciprocal_().mul_(_LONGEST).clamp_(max=1).mul_(scale)
