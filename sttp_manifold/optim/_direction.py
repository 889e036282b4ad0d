r"""Steepest descent on orthonormal frames in the spectral norm, in closed form.

Sought: among the tangent vectors ``D`` at a frame ``X``, :math:`X^T D + D^T X = 0`, with
:math:`|D|_2 \le 1`, one that makes :math:`\langle G, D \rangle` the largest. It is

.. math:: D = \operatorname{msign}(\Omega) X, \qquad \Omega = G X^T - X G^T,

where msign replaces every singular value that is not zero by one: for the skew matrix
:math:`\Omega` it is skew.

Why. In an orthonormal basis that begins with the columns of ``X`` a tangent vector is
:math:`D = (A, B)` with ``A`` skew. By Parrott's theorem a block column and block row of norms up to
one are completed to a matrix of norm up to one; the skew part of the completion of :math:`(A, B)`
and :math:`(A, -B^T)` has the same first column. So the tangent vectors of norm up to one are what
the skew matrices ``K`` of norm up to one make of ``X``, as ``K X``. Of these,
:math:`\langle G, K X \rangle = \tfrac12 \langle \Omega, K \rangle` is the largest, half the
nuclear norm of :math:`\Omega`, for :math:`K = \operatorname{msign}(\Omega)`.

The symmetric part of :math:`X^T G` cancels in :math:`\Omega`: it need not be projected first.

The iteration. For a skew matrix an odd polynomial of the singular values is
:math:`a \Omega - b \Omega^3 + c \Omega^5`, products only. :math:`\Omega` has rank ``2 r`` at most.
Frames of up to ``2 r`` rows are worked on with the ``d x d`` matrix itself; of taller ones,
:math:`\Omega (X, N) = (X, N) M` with :math:`X^T G = A + \text{symmetric}`,
:math:`N = G - X X^T G` and the ``2 r x 2 r`` matrix
:math:`M = \begin{pmatrix} 2A & -N^T N \\ I & 0 \end{pmatrix}`: polynomials of :math:`\Omega` are
taken as those of ``M``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POLYNOMIALS", "steepest_direction"]

# Each is the odd polynomial (x, x^3, x^5) that differs least from one over the interval which those
# before it leave of [5e-3, 1] (Amsel et al. 2025, "The Polar Express"); what is left is 3.6e-4.
# Smaller singular values grow by up to 425.
POLYNOMIALS = (
    (8.298703491437522, -24.430498148217666, 18.090304193078694),
    (3.9152209604606223, -2.921130232183528, 0.5592232598130896),
    (3.174603657055768, -2.3804328338954397, 0.49782639351990915),
    (2.1894628397935554, -1.5672206834558338, 0.4078871579955811),
    (1.8822792080941129, -1.2580644433142685, 0.375807355230765),
)


def steepest_direction(X: Tensor, G: Tensor) -> Tensor:
    r"""The tangent vector of spectral norm one along which ``G`` ascends most.

    Singular values of :math:`G X^T - X G^T` below 5e-3 of the largest count in part, those that are
    rounding errors as nothing. All scales of ``G`` are alike, unless sums of them overflow.

    Args:
        X: frames in float32 or float64; rows of zeros may follow.
        G: any directions.

    Returns:
        The tangent vectors; zero where the tangent part of ``G`` is.

    Shape:
        - X, G, output: ``(n, d, r)``
    """
    d, r = X.shape[-2:]
    # First to numbers whose fourth powers are in range.
    G = G / _positive(G.abs().amax((-2, -1), keepdim=True))
    if d <= 2 * r:
        half = torch.bmm(G, X.mT)
        return _msign_times(half - half.mT, X)
    XtG = torch.bmm(X.mT, G)
    N = torch.baddbmm(G, X, XtG, alpha=-1)
    M = X.new_zeros(len(X), 2 * r, 2 * r)
    torch.sub(XtG, XtG.mT, out=M[:, :r, :r])
    torch.bmm(N.mT, N, out=M[:, :r, r:]).neg_()
    M[:, r:, :r].diagonal(dim1=-2, dim2=-1).fill_(1)
    first = torch.eye(2 * r, r, dtype=X.dtype, device=X.device).expand(len(X), -1, -1)
    A, B = _msign_times(M, first).split(r, 1)
    return torch.baddbmm(torch.bmm(X, A), N, B)


def _msign_times(M: Tensor, V: Tensor) -> Tensor:
    """``msign(M) V`` for matrices that are skew in some basis, with singular values in pairs."""
    square = torch.bmm(M, M)
    # Each singular value twice: the sum of their fourth powers is twice the largest at least.
    fourth = (square * square.mT).sum((-2, -1), keepdim=True)
    scale = _positive(fourth.div(2).clamp_(min=0).sqrt_().sqrt_())
    M, square = M / scale, square / scale.square()
    *others, last = POLYNOMIALS
    for a, b, c in others:
        factor = torch.baddbmm(square, square, square, beta=-b, alpha=c)
        M = torch.baddbmm(M, M, factor, beta=a)
        square = torch.bmm(M, M)
    a, b, c = last
    SV = torch.bmm(square, V)
    return torch.bmm(M, torch.baddbmm(a * V - b * SV, square, SV, alpha=c))


def _positive(scale: Tensor) -> Tensor:
    """The scales, and something to divide zeros by."""
    return torch.where(scale == 0, 1, scale)
