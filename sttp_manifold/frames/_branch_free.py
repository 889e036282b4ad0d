r"""Orthonormal factors by a sequence of operations that is the same whatever the values are.

For devices on which the host would have to wait for a value to decide by it. Every frame goes both
ways, and takes the result of one of them, by ``torch.where``:

- near the identity (its Gram matrix within :data:`NEAR_IDENTITY`), two passes of the series of
  :math:`(I + D)^{-1/2}`, cut where what is left of any size up to that bound is below a rounding;
- elsewhere, Cholesky QR twice (Yamamoto et al. 2015), the first time with a shift that keeps the
  factorization from breaking down, and that the Q factor does not depend on (Fukaya et al. 2020).

Both ways are a product of ``(d, r)`` by ``(r, r)``, twice, and differ in the second operand.

How long a step may be: with orthonormal ``X`` and tangent ``U`` no singular value of ``X + U`` is
below one, and the first pass leaves a condition number of about ``1 + sqrt(r eps) |U|``. Frames are
orthonormal to 2e-6 in float32 up to ``|U| = 3e3`` where all of ``U`` is along one direction, the
worst case, and up to 1e9 where it is spread over all. Beyond the former, digits are lost one by
one: an error of 2e-5 at 1e5. In float64 it is 1e-14 up to 1e7. What breaks down, or is not finite,
or overflows in its fourth power, is NaN. Matrices that are no such sum are taken up to the same
condition numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NEAR_IDENTITY", "TERMS", "factors", "near_factors", "polar_factors", "series"]

# A Gram matrix within 1/2 of the identity (Frobenius) has eigenvalues in [1/2, 3/2]: condition
# number 3 at most, so that one Cholesky pass is orthonormal to a few roundings.
NEAR_IDENTITY = 0.5
# Terms of the series in the first and in the second pass: of any excess up to 1/2 they leave
# 8e-8 and 1e-17.
TERMS = {torch.float32: (3, 4), torch.float64: (6, 6)}
# The shift of the diagonal relative to itself, in roundings, for each column: like the Cholesky
# factorization it does not mind the scales of columns.
_SHIFT = 2.0
# Newton steps to a polar factor: for condition numbers up to one over a rounding.
_NEWTON = 10


def factors(Z: Tensor, *, polar: bool, out: Tensor | None = None) -> Tensor:
    """Polar factors of frames near the identity if ``polar``, Q factors of all others.

    Args:
        Z: the frames, not an empty batch.
        polar: what to do near the identity.
        out: where to write, as a stack ``(n, d, r)``; without gradient.

    Shape:
        - Z: ``(*b, d, r)``
        - Output: ``(*b, d, r)``
    """
    stack = Z.reshape(-1, *Z.shape[-2:])
    eye = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    gram = torch.bmm(stack.mT, stack)
    size = _norm((gram - eye).detach())
    # The same frames in both passes: what is a Q factor is not to become a polar one.
    near = size <= NEAR_IDENTITY if polar else None  # false for NaN
    first, second = TERMS[Z.dtype]
    shift = _SHIFT * torch.finfo(Z.dtype).eps * len(eye)
    inverse, failed = _inverse_factor(torch.addcmul(gram, gram, eye, value=shift), eye)
    W = _multiply(stack, gram, inverse, eye, near, first)
    gram = torch.bmm(W.mT, W)
    inverse, failed_later = _inverse_factor(gram, eye)
    broken = (failed + failed_later != 0).view(-1, 1, 1)
    bad = (size < math.inf).logical_not().logical_or(broken)
    Q = _multiply(W, gram, inverse.masked_fill(bad, torch.nan), eye, near, second, out)
    return Q.view(Z.shape)


def near_factors(Z: Tensor, within: float) -> Tensor:
    """Polar factors of frames whose Gram matrices are known to be near the identity.

    By the series alone: two products beyond the Gram matrix at most for each power it needs, and
    nothing to choose from.

    Args:
        Z: the frames, not an empty batch.
        within: bound on the Frobenius norms of ``Z^T Z - I``, at most :data:`NEAR_IDENTITY`.

    Shape:
        - Z: ``(n, d, r)``
        - Output: ``(n, d, r)``
    """
    eye = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    for terms in _passes(within, torch.finfo(Z.dtype).eps) or TERMS[Z.dtype]:
        D = torch.baddbmm(eye, Z.mT, Z, beta=-1)
        if terms == 1:
            Z = torch.baddbmm(Z, Z, D, alpha=-0.5)
        else:
            Z = torch.baddbmm(Z, Z, series(D, terms))
    return Z


def _passes(within: float, eps: float) -> tuple[int] | None:
    """Terms of one pass after which no excess is left of one up to that size, if few do."""
    coefficient = 0.5
    for terms in range(1, 5):
        # The next coefficient of (1 + x)^(-1/2), twice, and the next power.
        coefficient *= (2 * terms + 1) / (2 * terms + 2)
        if 2 * coefficient * within ** (terms + 1) <= eps:
            return (terms,)
    return None


def polar_factors(Z: Tensor) -> Tensor:
    """Polar factors of all frames: by :func:`factors`, and Newton's iteration on ``R`` of ``Q R``.

    Scaled by Frobenius norms (Higham 2008, Sec. 8.6), for a fixed number of steps.

    Shape:
        - Z: ``(*b, d, r)``, not empty
        - Output: ``(*b, d, r)``
    """
    stack = Z.reshape(-1, *Z.shape[-2:])
    eye = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    near = _norm((torch.bmm(stack.mT, stack) - eye).detach()) <= NEAR_IDENTITY
    Q = factors(stack, polar=True)
    # An identity where the factor is there already: whatever else would be iterated to no end.
    X = torch.where(near, eye, torch.bmm(Q.mT, stack))
    for _ in range(_NEWTON):
        inverse = torch.linalg.inv_ex(X)[0].mT
        scale = (_norm(inverse) / _norm(X)).sqrt()
        X = (scale * X + inverse / scale) / 2
    return torch.where(near, Q, torch.bmm(Q, X)).view(Z.shape)


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)


def _inverse_factor(gram: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of upper Cholesky factors, and which factorizations broke down: not zero."""
    R, failed = torch.linalg.cholesky_ex(gram, upper=True)
    # From the right, which takes row-major operands without a copy.
    return torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True, left=False), failed


def _multiply(
    Z: Tensor,
    gram: Tensor,
    inverse: Tensor,
    eye: Tensor,
    near: Tensor | None,
    terms: int,
    out: Tensor | None = None,
) -> Tensor:
    """``Z + Z S`` with the cut series ``S`` where that is near, ``Z`` times ``inverse`` elsewhere.

    A sum, since to round ``I + S`` would cost a digit of a short step.
    """
    if near is None:
        return torch.bmm(Z, inverse) if out is None else torch.bmm(Z, inverse, out=out)
    if gram.requires_grad:
        # A gradient comes back through both ways, and infinity times zero would be its end.
        gram = torch.where(near, gram, eye)
    operand = torch.where(near, series(gram - eye, terms), inverse)
    kept = Z * near if out is None else torch.mul(Z, near, out=out)
    return torch.baddbmm(kept, Z, operand) if kept.requires_grad else kept.baddbmm_(Z, operand)


def series(D: Tensor, terms: int) -> Tensor:
    """``(I + D)^(-1/2) - I`` up to that power of ``D``, which is at least the second."""
    coefficients = [1.0]
    for k in range(1, terms + 1):
        coefficients.append(coefficients[-1] * (0.5 / k - 1))
    S = D
    for k in range(terms - 1, 0, -1):
        top = coefficients[k + 1] if S is D else 1.0
        S = torch.baddbmm(D, D, S, beta=coefficients[k], alpha=top)
    return S
