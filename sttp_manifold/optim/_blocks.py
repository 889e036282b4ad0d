"""Parameters sorted by the way they move, and views of what they consist of.

A parameter is *plain* (torch moves it), *framed* (a :class:`SpectralTTManifold` point or a
Euclidean Stiefel frame, moved here in batches), or *generic* (any other geoopt manifold, moved by
that manifold's own methods, one parameter at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ManifoldTensor
from sttp_manifold.errors import OptimizerError

__all__ = [
    "SparseGradientError",
    "check_dense",
    "compress_scalars",
    "decay_gradient",
    "effective_gradient",
    "frame_views",
    "full_precision",
    "is_framed",
    "is_riemannian",
    "number",
    "project_",
    "scalars_shape",
    "spectrum_slice",
]


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
    return type(manifold) is EuclideanStiefel or hasattr(manifold, "frame_groups")


def check_dense(params: Iterable[Tensor], name: str) -> None:
    """Refuse sparse gradients before anything has moved.

    Raises:
        SparseGradientError: on the first sparse gradient.
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
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


@contextmanager
def full_precision(params: Sequence[Tensor]) -> Iterator[None]:
    """Lift autocast, under which the products of a step would be rounded to half precision."""
    with ExitStack() as stack:
        for kind in {p.device.type for p in params}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def effective_gradient(p: Tensor, *, maximize: bool, weight_decay: float) -> Tensor:
    r"""Euclidean gradient of what is minimized: sign and L2 penalty applied, ``p.grad`` untouched.

    The penalty is :math:`\frac12 |W|_F^2` where the manifold knows its ``W``
    (``weight_decay_grad``), and half the squared norm of the coordinates elsewhere.

    Args:
        p: a parameter with a gradient.
        maximize: whether the objective is to grow.
        weight_decay: weight of the penalty.
    """
    assert p.grad is not None
    grad = -p.grad if maximize else p.grad
    # A frame has a constant norm: what its penalty adds, the projection takes away.
    if weight_decay != 0 and type(p.manifold) is not EuclideanStiefel:  # type: ignore[attr-defined]
        grad = torch.add(grad, decay_gradient(p), alpha=weight_decay)
    return grad


def decay_gradient(p: Tensor) -> Tensor:
    """Euclidean gradient of the L2 penalty at a manifold parameter."""
    x = p.detach()
    manifold = p.manifold  # type: ignore[attr-defined]
    if hasattr(manifold, "weight_decay_grad"):
        decay: Tensor = manifold.weight_decay_grad(x)
        return decay
    return x


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


def spectrum_slice(p: Tensor) -> slice | None:
    """Slice of the coordinates of ``p`` that are no frames, if it has any."""
    part: slice | None = getattr(p.manifold, "spectrum_slice", None)  # type: ignore[attr-defined]
    return part if part is not None and part.stop > part.start else None


def scalars_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of an array with one entry a frame and one a spectrum coordinate of ``p``."""
    manifold = p.manifold  # type: ignore[attr-defined]
    if type(manifold) is EuclideanStiefel:
        return tuple(p.shape[:-2])
    part = spectrum_slice(p)
    frames = sum(count for _, count, _, _ in manifold.frame_groups)
    return (*p.shape[:-1], frames + (part.stop - part.start if part else 0))


def compress_scalars(p: Tensor, full: Tensor) -> Tensor:
    """Second moments as geoopt keeps them, repeated over each frame, to one entry a frame.

    Shape:
        - full: as ``p``
        - Output: :func:`scalars_shape`
    """
    parts = [view[..., 0, 0] for view in frame_views(p, full)]
    part = spectrum_slice(p)
    if isinstance(part, slice):
        parts.append(full[..., part])
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts, -1)


# --- Frames of one batch; these run in every step, and trust their arguments. ---


def project_(X: Tensor, G: Tensor) -> None:
    """Tangent projection of ``(n, d, r)`` at frames of that shape, in place."""
    XtG = torch.bmm(X.mT, G)
    G.baddbmm_(X, XtG + XtG.mT, alpha=-0.5)
