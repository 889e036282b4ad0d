r"""Orthonormal factors of a matrix, batched: its Q factor, and its polar factor.

The Q factor, with the signs that make the diagonal of R positive, from LAPACK or through the Gram
matrix (:func:`orthonormalize`); the polar factor, the nearest frame, at any distance
(:func:`polar_factor`), or by products only where it is near, and the Q factor elsewhere
(:func:`polish`).

Which operations are needed is decided by the values where looking at them is free, on the CPU, and
by none elsewhere (:mod:`~sttp_manifold.frames.retractions` says more). Half precision is computed
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold.frames._branch_free import NEAR_IDENTITY, factors, polar_factors, series

__all__ = ["HALF", "orthonormalize", "polar_factor", "polish", "q_factor"]

# Factorizations refuse these, and products of them would lose what is to be restored.
HALF = (torch.bfloat16, torch.float16)
# With m terms of the series of (1 + x)^(-1/2) the Gram matrix I + D becomes I + O(D^(m + 1)), with
# the m-th of these factors.
_LEFT = (0.75, 0.625, 0.546875)


def _may_look(Z: Tensor, look: bool | None) -> bool:
    """Whether values of ``Z`` may decide what is done: unless told, where that is free."""
    return Z.device.type == "cpu" if look is None else look


def polar_factor(Z: Tensor, *, look: bool | None = None) -> Tensor:
    """Polar factor of ``Z``: the frame nearest to it.

    Newton-Schulz iterations, which are products only, where the Gram matrix is near the
    identity; a singular value decomposition elsewhere, frame by frame, or Newton's iteration where
    values may not be looked at or a gradient is wanted.

    Args:
        Z: matrices.
        look: whether values may decide what is done; None: on the CPU only.

    Returns:
        The frames; all NaN where ``Z`` is not finite.

    Shape:
        - Z: ``(*b, d, r)``, ``d >= r``
        - Output: ``(*b, d, r)``
    """
    if Z.numel() == 0:
        return Z
    if Z.dtype in HALF:
        return polar_factor(Z.float(), look=look).to(Z.dtype)
    if not _may_look(Z, look):
        return polar_factors(Z)
    D = _excess(Z)
    worst = _largest(D)
    if worst <= NEAR_IDENTITY:
        return _iterate(Z, D, worst)
    if torch.is_grad_enabled() and Z.requires_grad:
        # The derivative of the decomposition divides by differences of singular values, which come
        # in equal pairs for a square frame and a tangent direction.
        return polar_factors(Z)
    near = _sizes(D) <= NEAR_IDENTITY  # false for NaN
    if not bool(near.any()):
        return _by_svd(Z)
    # A frame does not depend on those beside it, and the series is the more accurate way.
    Q = torch.empty_like(Z)
    Q[near], Q[~near] = polar_factor(Z[near], look=True), _by_svd(Z[~near])
    return Q


def _by_svd(Z: Tensor) -> Tensor:
    Z, bad = _without_bad_frames(Z)
    left, _, right = torch.linalg.svd(Z, full_matrices=False)
    return _with_nan(left @ right, bad)


def polish(Z: Tensor, out: Tensor | None = None, *, look: bool | None = None) -> Tensor:
    r"""Orthonormal factors of ``Z``: polar where the Gram matrix is near the identity, else Q.

    With :math:`Z^T Z = I + D`, the polar factor is :math:`Z (I + D)^{-1/2}` (Higham 2008, 8.1);
    the series of the inverse root is cut at the power that the size of ``D`` and the dtype ask for.
    Cut after the first it is a step of Newton and Schulz, which one of the usual length in float32
    needs; a longer step costs products of ``r x r`` matrices more. Where ``D`` is not below 1/2 in
    the Frobenius norm, :func:`orthonormalize` is taken, frame by frame.

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
    if Z.dtype in HALF:
        Q = polish(Z.float(), look=look).to(Z.dtype)
        return Q if out is None else out.copy_(Q)
    if not _may_look(Z, look):
        return factors(Z, polar=True, out=out)
    D = _excess(Z)
    worst = _largest(D)
    if worst <= NEAR_IDENTITY:
        return _iterate(Z, D, worst, out)
    near = _sizes(D) <= NEAR_IDENTITY  # false for NaN
    Q = torch.empty_like(Z) if out is None else out
    for chosen, factor in ((near, polish), (~near, orthonormalize)):
        if bool(chosen.any()):
            Q[chosen] = factor(Z[chosen])
    return Q


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
    if Z.dtype in HALF:
        return orthonormalize(Z.float(), look=look).to(Z.dtype)
    if not _may_look(Z, look):
        return factors(Z, polar=False)
    gram = _product(Z.mT, Z)
    if _deviation(gram) <= NEAR_IDENTITY:
        return _divide_by_cholesky(Z, gram)
    Q = _divide_by_cholesky(Z, gram)
    gram = _product(Q.mT, Q)
    # A failed first pass leaves something that is not a frame, or not finite: false for NaN.
    if _deviation(gram) <= NEAR_IDENTITY:
        return _divide_by_cholesky(Q, gram)
    return q_factor(Z)


def _product(A: Tensor, B: Tensor) -> Tensor:
    """``A B``; of stacks in one call, where ``matmul`` makes eight."""
    return torch.bmm(A, B) if A.ndim == 3 and B.ndim == 3 else A @ B


def _excess(Z: Tensor) -> Tensor:
    """``Z^T Z - I``."""
    D = _product(Z.mT, Z)
    D.diagonal(dim1=-2, dim2=-1).sub_(1)
    return D


def _sizes(D: Tensor) -> Tensor:
    """Frobenius norms, to decide by, not to differentiate."""
    return torch.linalg.vector_norm(D.detach(), dim=(-2, -1))


def _largest(D: Tensor) -> float:
    """The largest Frobenius norm of a stack; that of all of it where that is as good."""
    together = float(torch.linalg.vector_norm(D.detach() if D.requires_grad else D))
    if _terms(together, torch.finfo(D.dtype).eps) == 1:
        return together
    return float(_sizes(D).amax())


def _terms(size: float, eps: float) -> int:
    """How many terms leave a rounding of an excess of that size, or the most that are taken."""
    if _LEFT[0] * size * size <= eps:
        return 1
    return 2 if _LEFT[1] * size**3 <= eps else 3


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
        terms = _terms(size, eps)
        # Z (1 + alpha R); the usual short step has one term, and no copy of D.
        alpha, R = -0.5, D
        if terms > 1:
            alpha, R = 1.0, series(D.reshape(-1, *D.shape[-2:]), terms).view(D.shape)
        size = _LEFT[terms - 1] * size ** (terms + 1)
        if size <= eps:
            return _add_product(Z, R, alpha, out)
        Z = _add_product(Z, R, alpha)
        D = _excess(Z)


def _add_product(Z: Tensor, R: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """``Z + alpha Z R``."""
    if out is not None:
        return torch.baddbmm(Z, Z, R, alpha=alpha, out=out)
    if Z.ndim == 3:
        return torch.baddbmm(Z, Z, R, alpha=alpha)
    return torch.add(Z, Z @ R, alpha=alpha)


def _divide_by_cholesky(Z: Tensor, gram: Tensor) -> Tensor:
    R, _ = torch.linalg.cholesky_ex(gram, upper=True)
    Q: Tensor = torch.linalg.solve_triangular(R, Z, upper=True, left=False)
    return Q


def q_factor(Z: Tensor) -> Tensor:
    """Q factor of ``Z`` from LAPACK, the diagonal of R positive; all NaN where not finite.

    Shape:
        - Z: ``(*b, d, r)``, ``d >= r``
        - Output: ``(*b, d, r)``
    """
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
