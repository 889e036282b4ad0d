r"""Retractions of orthonormal frames, batched: from ``X`` along ``U`` to a new frame.

Set: the Stiefel manifold :math:`St(d, r)` of ``d x r`` matrices with orthonormal columns.
Metric: the Euclidean one, for which the tangent projection is
:math:`G - X\,\mathrm{sym}(X^T G)` (Absil, Mahony & Sepulchre 2008, Sec. 3.6.1).

Two retractions, both of first order along tangent vectors (ibid., Sec. 4.1.1):

- the Q factor of ``X + U``, with the signs that make the diagonal of R positive. :func:`qr` takes
  it from LAPACK; :func:`cholesky_qr` reaches the same point through the Gram matrix, which costs
  a few batched products instead of a Householder sweep per frame;
- the polar factor of ``X + U``, :func:`polar`, the nearest frame to it.

Why Cholesky is safe here: for a tangent ``U``, :math:`(X+U)^T(X+U) = I + U^T U`, so the Gram matrix
of a short step is close to the identity and loses nothing. What is not a short step is noticed on
the Gram matrix itself, which makes no assumption about ``U``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold.errors import ShapeError

__all__ = ["cholesky_qr", "orthonormalize", "polar", "project_tangent", "qr"]

# A Gram matrix within 1/2 of the identity (Frobenius) has eigenvalues in [1/2, 3/2]: condition
# number 3 at most, so that one Cholesky pass is orthonormal to a few roundings.
_NEAR_IDENTITY = 0.5
# The error of the Gram matrix goes e -> (3 e^2 + e^3)/4: from 1/2, six steps end below 1e-16.
_NEWTON_SCHULZ_STEPS = 6


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
    return _householder_qr(X + U)


def cholesky_qr(X: Tensor, U: Tensor) -> Tensor:
    """Retract to the same point as :func:`qr`, by Cholesky factorization of the Gram matrix.

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
    _check(X, U, "cholesky_qr")
    return orthonormalize(X + U)


def polar(X: Tensor, U: Tensor) -> Tensor:
    """Retract by the polar factor of ``X + U``: the frame nearest to it.

    Newton-Schulz iterations, which are products only, where the Gram matrix is near the
    identity; a singular value decomposition elsewhere.

    Args:
        X: frames, or matrices near frames.
        U: directions; zero puts a frame that has drifted back.

    Returns:
        The new frames; all NaN where ``X + U`` is not finite.

    Shape:
        - X: ``(*b, d, r)``, U: ``(*b, d, r)``
        - Output: ``(*b, d, r)``

    Raises:
        ShapeError: if ``X`` is wide or the shapes differ.
    """
    _check(X, U, "polar")
    Z = X + U
    if Z.numel() == 0:
        return Z
    if _deviation(Z.mT @ Z) <= _NEAR_IDENTITY:
        for _ in range(_NEWTON_SCHULZ_STEPS):
            Z = 1.5 * Z - 0.5 * Z @ (Z.mT @ Z)
        return Z
    Z, bad = _without_bad_frames(Z)
    left, _, right = torch.linalg.svd(Z, full_matrices=False)
    return _with_nan(left @ right, bad)


def orthonormalize(Z: Tensor) -> Tensor:
    r"""Q factor of ``Z``, the diagonal of R positive, at the least cost that keeps it accurate.

    One Cholesky pass :math:`Z R^{-1}`, :math:`R^T R = Z^T Z`, where the Gram matrix is near the
    identity. Elsewhere a second pass over the result of the first (CholeskyQR2: Yamamoto et al.
    2015), which is as orthonormal as LAPACK's provided that the first came out near a frame; that
    is checked, and where it did not, LAPACK's QR factorization is taken.

    Args:
        Z: matrices of full column rank.

    Returns:
        The orthonormal factors; all NaN where ``Z`` is not finite.

    Shape:
        - Z: ``(*b, d, r)``, ``d >= r``
        - Output: ``(*b, d, r)``
    """
    if Z.numel() == 0:
        return Z
    gram = Z.mT @ Z
    if _deviation(gram) <= _NEAR_IDENTITY:
        return _divide_by_cholesky(Z, gram)
    Q = _divide_by_cholesky(Z, gram)
    gram = Q.mT @ Q
    # A failed first pass leaves something that is not a frame, or not finite: false for NaN.
    if _deviation(gram) <= _NEAR_IDENTITY:
        return _divide_by_cholesky(Q, gram)
    return _householder_qr(Z)


def _deviation(gram: Tensor) -> float:
    """Largest Frobenius distance of a Gram matrix from the identity; NaN if there is a NaN."""
    with torch.no_grad():
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return float(torch.linalg.vector_norm(gram - eye, dim=(-2, -1)).amax())


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
