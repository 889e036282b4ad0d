r"""Retractions of orthonormal frames, batched: from ``X`` along ``U`` to a new frame.

Set: the Stiefel manifold :math:`St(d, r)` of ``d x r`` matrices with orthonormal columns.
Metric: the Euclidean one, for which the tangent projection is
:math:`G - X\,\mathrm{sym}(X^T G)` (Absil, Mahony & Sepulchre 2008, Sec. 3.6.1).

Three families, all of first order along tangent vectors (ibid., Sec. 4.1.1):

- the Q factor of ``X + U``, with the signs that make the diagonal of R positive. :func:`qr` takes
  it from LAPACK; :func:`cholesky_qr` reaches the same point through the Gram matrix, which costs
  a few batched products instead of a Householder sweep per frame;
- the polar factor of ``X + U``, the nearest frame to it, of second order (Absil & Malick 2012):
  :func:`polar` at any length, by a singular value decomposition where it must;
  :func:`newton_schulz` by products only, and the Q factor for steps too long for them;
- :func:`cayley`, along the Cayley transform of a skew matrix, of second order in the canonical
  metric but not in this one.

:func:`pogo` is no retraction: it steps along the landing field and makes up for what is lost of
orthonormality to leading order.

Why the Gram matrix is safe here: for a tangent ``U``, :math:`(X+U)^T(X+U) = I + U^T U`, which for a
short step is close to the identity and loses nothing. What is not a short step is noticed on the
Gram matrix itself, which makes no assumption about ``U``.

Which operations a step needs is decided by its values where looking at them is free, on the CPU.
Elsewhere the host would have to wait for the device, so every frame goes all ways and takes the
result of one, by the same thresholds: the same point to rounding, no synchronization, and a fixed
sequence of kernels. Frames are orthonormal to 2e-6 in float32 for tangent ``U`` of a norm up to
3e3; beyond, digits are lost, and what breaks down is NaN (``frames/_branch_free.py``).
``look=False`` asks for that on the CPU too, ``look=True`` for the other everywhere. :func:`qr`
calls ``torch.linalg.qr``, and waits where that does.

In half precision, retractions (:func:`pogo` is none) are computed in float32, and rounded at the
end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.errors import ShapeError
from sttp_manifold.frames._branch_free import near_factors
from sttp_manifold.frames.orthonormal import HALF, orthonormalize, polar_factor, polish, q_factor

__all__ = [
    "RETRACTIONS",
    "Retraction",
    "cayley",
    "cholesky_qr",
    "newton_schulz",
    "pogo",
    "polar",
    "project_tangent",
    "qr",
]


def _check(X: Tensor, U: Tensor, name: str) -> None:
    if X.ndim < 2 or X.shape[-2] < X.shape[-1]:
        raise ShapeError(
            f"a frame has shape (*b, d, r) with d >= r, but X has shape {tuple(X.shape)}; "
            f"for orthonormal rows call {name}(X.mT, U.mT).mT"
        )
    if U.shape != X.shape:
        raise ShapeError(
            f"{name}(X, U) takes two arrays of one shape, "
            f"but X has shape {tuple(X.shape)} and U has shape {tuple(U.shape)}"
        )


def project_tangent(X: Tensor, G: Tensor) -> Tensor:
    r"""Project ``G`` onto the tangent space of the frames at ``X``: ``G - X sym(X^T G)``.

    Args:
        X: frames.
        G: any directions, for instance Euclidean gradients.

    Returns:
        The nearest tangent vectors: :math:`X^T U + U^T X = 0`.

    Shape:
        - X: ``(*b, d, r)``, G: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, G, "project_tangent")
    XtG = X.mT @ G
    return G - X @ (0.5 * (XtG + XtG.mT))


def qr(X: Tensor, U: Tensor) -> Tensor:
    """Retract by the Q factor of ``X + U``, the diagonal of R positive, from LAPACK.

    Args:
        X: frames.
        U: directions, tangent or not.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "qr")
    if X.dtype in HALF:
        return qr(X.float(), U.float()).to(X.dtype)
    return q_factor(X + U)


def cholesky_qr(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    """Retract to the same point as :func:`qr`, by Cholesky factorization of the Gram matrix.

    Args:
        X: frames.
        U: directions, tangent or not.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "cholesky_qr")
    if X.dtype in HALF:
        return cholesky_qr(X.float(), U.float(), look=look).to(X.dtype)
    return orthonormalize(X + U, look=look)


def polar(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    """Retract by the polar factor of ``X + U``: the frame nearest to it.

    Newton-Schulz iterations, which are products only, where the Gram matrix is near the
    identity; a singular value decomposition elsewhere, or Newton's iteration where values may not
    be looked at or a gradient is wanted.

    Args:
        X: frames, or matrices near frames.
        U: directions; zero puts a frame that has drifted back.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "polar")
    if X.dtype in HALF:
        return polar(X.float(), U.float(), look=look).to(X.dtype)
    return polar_factor(X + U, look=look)


def newton_schulz(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    r"""Retract by the polar factor of ``X + U``, by products only; by its Q factor if it is far.

    See :func:`~sttp_manifold.frames.orthonormal.polish`, which does the work.

    Args:
        X: frames.
        U: directions, tangent or not.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "newton_schulz")
    if X.dtype in HALF:
        return newton_schulz(X.float(), U.float(), look=look).to(X.dtype)
    return polish(X + U, look=look)


def cayley(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    r"""Retract along the Cayley transform of a skew matrix (Wen & Yin 2013, Sec. 3.1).

    :math:`(I - W/2)^{-1} (I + W/2) X` with :math:`W = P U X^T - X U^T P`, :math:`P = I - XX^T/2`,
    which is ``U`` at ``X`` for tangent ``U``. Since :math:`W = A B^T` has rank ``2 r``, by Woodbury
    it is :math:`X + A (I - B^T A / 2)^{-1} B^T X`: one solve of size ``2 r``. What rounding adds to
    the frame, step by step, is taken off at the end as in :func:`newton_schulz`.

    Args:
        X: frames.
        U: directions; of one that is not tangent, the tangent part counts.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "cayley")
    if X.dtype in HALF:
        return cayley(X.float(), U.float(), look=look).to(X.dtype)
    XtU = X.mT @ U
    U = U - X @ ((XtU + XtU.mT) / 2)
    # P U = U - X (X^T U) / 2, where X^T U is skew by now.
    PU = U - X @ ((XtU - XtU.mT) / 4)
    A, B = torch.cat((PU, X), -1), torch.cat((X, -PU), -1)
    eye = torch.eye(A.shape[-1], dtype=X.dtype, device=X.device)
    solved, _ = torch.linalg.solve_ex(eye - (B.mT @ A) / 2, B.mT @ X)
    return polish(X + A @ solved, look=look)


def pogo(X: Tensor, U: Tensor) -> Tensor:
    r"""Step without a retraction (Javaloy & Vergari 2026, arXiv 2602.14656).

    :math:`M = X + \mathrm{skew}(U X^T) X`, then :math:`M + \frac12 (M - M M^T M)`, which leaves a
    deviation of the order of the step to the fourth, and nothing else that would stop it from
    growing: for small steps only. ``U`` is a Euclidean direction; its skew part is what counts, and
    for a tangent one that lies outside of the span of ``X`` that is one half of it.

    Args:
        X: frames, or matrices near frames.
        U: directions.

    Returns:
        The new matrices; NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "pogo")
    M = _landing(X, U)
    return 1.5 * M - 0.5 * (M @ (M.mT @ M))


def _landing(X: Tensor, U: Tensor) -> Tensor:
    return X + (U @ (X.mT @ X) - X @ (U.mT @ X)) / 2


class Retraction(NamedTuple):
    r"""A way to move frames, as the optimizers take it: by its name, or as such an object.

    Attributes:
        name: by which a group of an optimizer knows it.
        along: ``along(X, U, look=None)`` moves frames ``(n, d, r)`` along ``U``, of that shape, to
            new memory; rows of zeros, which frames of one stack may be padded with, stay zero.
        of_sum: ``of_sum(Z, look=None)``, if all that counts is ``Z = X + U``.
        tangent: whether it moves along tangent vectors, so that gradients are projected and
            momentum is carried along by projection; else along Euclidean directions.
        of_near: ``of_near(Z, within)``, the same as ``of_sum`` where the Gram matrix of ``Z`` is
            known to be within so much of the identity, and nothing has to be looked at.

    Example:
        >>> import torch
        >>> def along(X, U, look=None):
        ...     return torch.linalg.qr(X + U).Q
        >>> Retraction("mine", along).tangent
        True
    """

    name: str
    along: Callable[..., Tensor]
    of_sum: Callable[..., Tensor] | None = None
    tangent: bool = True
    of_near: Callable[..., Tensor] | None = None

    def step(
        self,
        X: Tensor,
        direction: Tensor,
        scale: Tensor | float,
        *,
        look: bool | None = None,
        reach: float | None = None,
    ) -> Tensor:
        """Move frames along ``scale * direction``.

        Args:
            X: the frames; what is in their memory afterwards is of no use.
            direction: where to.
            scale: how far: one number, or one for each frame.
            look: whether values may decide what is done; None: on the CPU only.
            reach: what the length of no step exceeds, where that is known of tangent ones.

        Returns:
            The frames that were arrived at.

        Shape:
            - X, direction: ``(n, d, r)``, scale: ``()`` or ``(n,)``
            - Output: ``(n, d, r)``
        """
        factor = scale.view(-1, 1, 1) if isinstance(scale, Tensor) and scale.ndim else scale
        if self.of_sum is None:
            return self.along(X, direction * factor, look=look)
        if isinstance(factor, Tensor):
            X.addcmul_(direction, factor)
        else:
            X.add_(direction, alpha=factor)
        if reach is not None and self.of_near is not None:
            return self.of_near(X, reach * reach)
        return self.of_sum(X, look=look)


def _pogo_kept(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    """The step of :func:`pogo`, with as many terms of its correction as the length asks for."""
    return polish(_landing(X, U), look=look)


RETRACTIONS = {
    retraction.name: retraction
    for retraction in (
        Retraction("newton_schulz", newton_schulz, of_sum=polish, of_near=near_factors),
        Retraction("qr", cholesky_qr, of_sum=orthonormalize),
        Retraction("polar", polar, of_sum=polar_factor, of_near=near_factors),
        Retraction("cayley", cayley),
        Retraction("pogo", _pogo_kept, tangent=False),
    )
}
"""The retractions that the optimizers know by name.

``"pogo"`` there is the step of :func:`pogo` with its correction of one term, which is a step of
Newton and Schulz, for short steps, and more terms for longer ones. With one term at any length
frames are lost: by 7e-3 at steps of 0.3 in float32.
"""
