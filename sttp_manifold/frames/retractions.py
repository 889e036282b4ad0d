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

import torch
from torch import Tensor

from sttp_manifold.errors import ShapeError
from sttp_manifold.frames._branch_free import NEAR_IDENTITY, factors, polar_factors

__all__ = [
    "cayley",
    "cholesky_qr",
    "newton_schulz",
    "orthonormalize",
    "pogo",
    "polar",
    "polish",
    "project_tangent",
    "qr",
]

# Factorizations refuse these, and products of them would lose what is to be restored.
_HALF = (torch.bfloat16, torch.float16)
# Taylor coefficients of (1 + x)^(-1/2); with the first m of them the Gram matrix I + D becomes
# I + O(D^(m + 1)), with the factor below.
_SERIES = (-0.5, 0.375, -0.3125)
_LEFT = (0.75, 0.625, 0.546875)


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


def _may_look(Z: Tensor, look: bool | None) -> bool:
    """Whether values of ``Z`` may decide what is done: unless told, where that is free."""
    return Z.device.type == "cpu" if look is None else look


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
    if X.dtype in _HALF:
        return qr(X.float(), U.float()).to(X.dtype)
    return _householder_qr(X + U)


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
    if X.dtype in _HALF:
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
    if X.dtype in _HALF:
        return polar(X.float(), U.float(), look=look).to(X.dtype)
    Z = X + U
    if Z.numel() == 0:
        return Z
    if not _may_look(Z, look):
        return polar_factors(Z)
    D = _excess(Z)
    worst = float(_sizes(D).amax())
    if worst <= NEAR_IDENTITY:
        return _iterate(Z, D, worst)
    if torch.is_grad_enabled() and Z.requires_grad:
        # The derivative of the decomposition divides by differences of singular values, which come
        # in equal pairs for a square frame and a tangent direction.
        return polar_factors(Z)
    Z, bad = _without_bad_frames(Z)
    left, _, right = torch.linalg.svd(Z, full_matrices=False)
    return _with_nan(left @ right, bad)


def newton_schulz(X: Tensor, U: Tensor, *, look: bool | None = None) -> Tensor:
    r"""Retract by the polar factor of ``X + U``, by products only; by its Q factor if it is far.

    See :func:`polish`, which does the work.

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
    if X.dtype in _HALF:
        return newton_schulz(X.float(), U.float(), look=look).to(X.dtype)
    return polish(X + U, look=look)


def polish(Z: Tensor, out: Tensor | None = None, *, look: bool | None = None) -> Tensor:
    r"""Orthonormal factors of ``Z``: polar where the Gram matrix is near the identity, else Q.

    With :math:`Z^T Z = I + D`, the polar factor is :math:`Z (I + D)^{-1/2}`; the series of the
    inverse root is cut at the power that the size of ``D`` and the dtype ask for. Cut after the
    first it is a step of Newton and Schulz, which one of the usual length in float32 needs; a
    longer step costs products of ``r x r`` matrices more. Where ``D`` is not below 1/2 in the
    Frobenius norm, :func:`orthonormalize` is taken, frame by frame.

    Args:
        Z: matrices of full column rank.
        out: where to write the result, other memory than ``Z``; for stacks ``(n, d, r)`` without
            gradient.
        look: whether values may decide what is done; None: on the CPU only.

    Shape:
        - Z: ``(*b, d, r)``, ``d >= r``
        - Output: ``(*b, d, r)``
    """
    if Z.numel() == 0:
        return Z if out is None else out.copy_(Z)
    if Z.dtype in _HALF:
        Q = polish(Z.float(), look=look).to(Z.dtype)
        return Q if out is None else out.copy_(Q)
    if not _may_look(Z, look):
        return factors(Z, polar=True, out=out)
    D = _excess(Z)
    sizes = _sizes(D)
    worst = float(sizes.amax())
    if worst <= NEAR_IDENTITY:
        return _iterate(Z, D, worst, out)
    near = sizes <= NEAR_IDENTITY  # false for NaN
    Q = torch.empty_like(Z) if out is None else out
    for chosen, factor in ((near, polish), (~near, orthonormalize)):
        if bool(chosen.any()):
            Q[chosen] = factor(Z[chosen])
    return Q


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
    if X.dtype in _HALF:
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
    M = X + (U @ (X.mT @ X) - X @ (U.mT @ X)) / 2
    return 1.5 * M - 0.5 * (M @ (M.mT @ M))


def orthonormalize(Z: Tensor, *, look: bool | None = None) -> Tensor:
    r"""Q factor of ``Z``, the diagonal of R positive, at the least cost that keeps it accurate.

    One Cholesky pass :math:`Z R^{-1}`, :math:`R^T R = Z^T Z`, where the Gram matrix is near the
    identity. Elsewhere a second pass over the result of the first (CholeskyQR2: Yamamoto et al.
    2015), which is as orthonormal as LAPACK's provided that the first came out near a frame; that
    is checked, and where it did not, LAPACK's QR factorization is taken. Where values may not be
    looked at, both passes are made, the first with a shift.

    Args:
        Z: matrices of full column rank.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The orthonormal factors; all NaN where ``Z`` is not finite.

    Shape:
        - Z: ``(*b, d, r)``, ``d >= r``
        - Output: ``(*b, d, r)``
    """
    if Z.numel() == 0:
        return Z
    if Z.dtype in _HALF:
        return orthonormalize(Z.float(), look=look).to(Z.dtype)
    if not _may_look(Z, look):
        return factors(Z, polar=False)
    gram = Z.mT @ Z
    if _deviation(gram) <= NEAR_IDENTITY:
        return _divide_by_cholesky(Z, gram)
    Q = _divide_by_cholesky(Z, gram)
    gram = Q.mT @ Q
    # A failed first pass leaves something that is not a frame, or not finite: false for NaN.
    if _deviation(gram) <= NEAR_IDENTITY:
        return _divide_by_cholesky(Q, gram)
    return _householder_qr(Z)


def _excess(Z: Tensor) -> Tensor:
    """``Z^T Z - I``."""
    D = Z.mT @ Z
    D.diagonal(dim1=-2, dim2=-1).sub_(1)
    return D


def _sizes(D: Tensor) -> Tensor:
    """Frobenius norms, to decide by, not to differentiate."""
    return torch.linalg.vector_norm(D.detach(), dim=(-2, -1))


def _deviation(gram: Tensor) -> float:
    """Largest Frobenius distance of a Gram matrix from the identity; NaN if there is a NaN."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return float(_sizes(gram - eye).amax())


def _iterate(Z: Tensor, D: Tensor, size: float, out: Tensor | None = None) -> Tensor:
    """Polar factor of ``Z``, whose excess ``D`` has norms up to ``size <= 1/2``."""
    eps = torch.finfo(Z.dtype).eps
    if torch.is_grad_enabled() and Z.requires_grad:
        size = NEAR_IDENTITY  # a series that is right in value only has a wrong derivative
    while True:
        terms = next((m for m in (1, 2) if _LEFT[m - 1] * size ** (m + 1) <= eps), 3)
        # Z (1 + alpha R), by Horner; the usual short step has one term, and no copy of D.
        alpha, R = _SERIES[0], D
        if terms > 1:
            alpha, R = 1.0, _SERIES[terms - 1] * D
            for coefficient in reversed(_SERIES[: terms - 1]):
                R.diagonal(dim1=-2, dim2=-1).add_(coefficient)
                R = D @ R
        size = _LEFT[terms - 1] * size ** (terms + 1)
        if size <= eps:
            if out is not None:
                return torch.baddbmm(Z, Z, R, alpha=alpha, out=out)
            return torch.add(Z, Z @ R, alpha=alpha)
        Z = torch.add(Z, Z @ R, alpha=alpha)
        D = _excess(Z)


def _divide_by_cholesky(Z: Tensor, gram: Tensor) -> Tensor:
    R, _ = torch.linalg.cholesky_ex(gram, upper=True)
    Q: Tensor = torch.linalg.solve_triangular(R, Z, upper=True, left=False)
    return Q


def _householder_qr(Z: Tensor) -> Tensor:
    Z, bad = _without_bad_frames(Z)
    Q, R = torch.linalg.qr(Z)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Z.dtype)
    return _with_nan(Q * sign.unsqueeze(-2), bad)


def _without_bad_frames(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the frames that are not finite, on which LAPACK may raise or not return."""
    bad = ~torch.isfinite(Z).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(bad, torch.zeros_like(Z), Z), bad


def _with_nan(Q: Tensor, bad: Tensor) -> Tensor:
    return torch.where(bad, torch.full_like(Q, torch.nan), Q)
