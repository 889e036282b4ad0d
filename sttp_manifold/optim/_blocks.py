"""Parameters sorted by the way they move, and their frames laid together into batches.

A parameter is *plain* (torch moves it), *framed* (a :class:`SpectralTTManifold` point or a
Euclidean Stiefel frame, moved here in batches), or *generic* (any other geoopt manifold, moved by
that manifold's own methods, one parameter at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ManifoldTensor
from sttp_manifold.errors import OptimizerError

__all__ = [
    "Batch",
    "Layout",
    "SparseGradientError",
    "check_dense",
    "compress_scalars",
    "decay_gradient",
    "effective_gradient",
    "frame_views",
    "full_precision",
    "is_framed",
    "is_riemannian",
    "project",
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


@contextmanager
def full_precision(params: Sequence[Tensor]) -> Iterator[None]:
    """Lift autocast, under which the products of a step would be rounded to half precision."""
    with ExitStack() as stack:
        for kind in {p.device.type for p in params}:
            if torch.is_autocast_enabled(kind):
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


# --- Batches over parameters. ---


class Batch:
    """Equal items (frames, or single coordinates) of many parameters, to be moved together.

    Args:
        item: shape of one item, ``(d, r)`` or ``()``.
    """

    def __init__(self, item: tuple[int, ...]) -> None:
        self._item = item
        self._pieces: dict[str, list[Tensor]] = {}
        self._scalars: set[str] = set()

    def add(self, role: str, piece: Tensor, *, scalar: bool = False) -> None:
        """Add what one parameter has of a role (point, gradient, momentum ...).

        Args:
            role: its name.
            piece: any shape that holds a number of whole items in order.
            scalar: whether it holds one number an item instead.
        """
        self._pieces.setdefault(role, []).append(piece)
        if scalar:
            self._scalars.add(role)

    def gather(self) -> dict[str, Tensor]:
        """All items of each role; the memory of the parameter itself where it is alone.

        Shape:
            - Output: each ``(items, *item)``, or ``(items,)`` for scalars
        """
        work = {}
        for role, pieces in self._pieces.items():
            item = () if role in self._scalars else self._item
            if len(pieces) == 1:
                work[role] = pieces[0].reshape(-1, *item)
            else:
                work[role] = torch.cat([_flat(piece) for piece in pieces]).view(-1, *item)
        return work

    def scatter(self, work: dict[str, Tensor], *roles: str) -> None:
        """Write items back to where :meth:`gather` found them."""
        for role in roles:
            if role not in work:
                continue
            pieces, items = self._pieces[role], work[role]
            if len(pieces) > 1:
                parts = items.view(-1).split([piece.numel() for piece in pieces])
                torch._foreach_copy_(
                    pieces,
                    [
                        part if piece.ndim == 1 else part.view(piece.shape)
                        for part, piece in zip(parts, pieces, strict=True)
                    ],
                )
            elif pieces[0].data_ptr() != items.data_ptr():
                pieces[0].copy_(items.view(pieces[0].shape))


def _flat(piece: Tensor) -> Tensor:
    return piece if piece.ndim == 1 else piece.reshape(-1)


class Layout:
    """Frames and coordinates of many parameters, sorted into batches.

    Args:
        together: whether to batch over parameters, or keep each by itself.
    """

    def __init__(self, *, together: bool) -> None:
        self._together = together
        self._frames: dict[Any, Batch] = {}
        self._coordinates: dict[Any, Batch] = {}
        self._count = 0

    def add(
        self,
        p: Tensor,
        key: Any,
        *,
        arrays: dict[str, Tensor],
        scalars: dict[str, Tensor] | None = None,
        coordinates: dict[str, Tensor] | None = None,
    ) -> None:
        """Add one parameter.

        Args:
            p: a framed parameter.
            key: parameters of different keys move apart (their step counts differ).
            arrays: by role, laid out as ``p``.
            scalars: by role, of shape :func:`scalars_shape`.
            coordinates: by role, laid out as ``p``, of which only the spectrum matters.
        """
        own = (key, None if self._together else self._count, p.dtype, p.device)
        self._count += 1
        manifold = p.manifold  # type: ignore[attr-defined]
        scalars = scalars or {}
        if type(manifold) is EuclideanStiefel:
            batch = self._batch(own, tuple(p.shape[-2:]))
            for role, array in arrays.items():
                batch.add(role, array)
            for role, array in scalars.items():
                batch.add(role, array, scalar=True)
            return
        groups, part = manifold.frame_groups, spectrum_slice(p)
        batches = [self._batch(own, (d, r)) for _, _, d, r in groups]
        sizes = [count * d * r for _, count, d, r in groups]
        counts = [count for _, count, _, _ in groups]
        if part is not None:
            batches.append(self._coordinates.setdefault(own, Batch(())))
            sizes.append(part.stop - part.start)
            counts.append(part.stop - part.start)
            for role, array in (coordinates or {}).items():
                batches[-1].add(role, array[..., part])
        # One split an array: views are most of what a small step costs.
        for role, array in arrays.items():
            for batch, piece in zip(batches, array.split(sizes, -1), strict=True):
                batch.add(role, piece)
        for role, array in scalars.items():
            for batch, piece in zip(batches, array.split(counts, -1), strict=True):
                batch.add(role, piece, scalar=True)

    def _batch(self, own: Any, item: tuple[int, ...]) -> Batch:
        return self._frames.setdefault((own, item), Batch(item))

    def frames(self) -> Iterator[tuple[Any, Batch]]:
        """Batches of frames of one shape, with the key of their parameters."""
        return ((own[0], batch) for (own, _), batch in self._frames.items())

    def coordinates(self) -> Iterator[tuple[Any, Batch]]:
        """Batches of spectrum coordinates, with the key of their parameters."""
        return ((own[0], batch) for own, batch in self._coordinates.items())


# --- Frames of one batch; these run in every step, and trust their arguments. ---


def project(X: Tensor, G: Tensor) -> Tensor:
    """Tangent projection of ``(n, d, r)`` at frames of that shape."""
    return torch.baddbmm(G, X, _symmetric_part_twice(X, G), alpha=-0.5)


def project_(X: Tensor, G: Tensor) -> None:
    """Tangent projection in place."""
    G.baddbmm_(X, _symmetric_part_twice(X, G), alpha=-0.5)


def _symmetric_part_twice(X: Tensor, G: Tensor) -> Tensor:
    XtG = torch.bmm(X.mT, G)
    return XtG + XtG.mT
