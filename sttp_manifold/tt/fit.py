r"""`tt_fit`: the spectral tensor train closest to a matrix in the metric of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ShapeError
from sttp_manifold.tt.chain_fit import fit_chain, svd_chain
from sttp_manifold.tt.contract import left_matrix, mirror
from sttp_manifold.tt.decompose import qr_sweep, tt_svd
from sttp_manifold.tt.leading import leading_svd
from sttp_manifold.tt.metric import Metric, check_moment
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT
from sttp_manifold.tt.validate import check_finite

__all__ = ["tt_fit"]


@explained
@torch.no_grad()
def tt_fit(
    W: Tensor,
    shape: TTShape,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    max_sweeps: int = 30,
    tol: float = 1e-3,
) -> SpectralTT:
    r"""Spectral tensor train close to a matrix in a metric of its rows and columns.

    .. math:: \min_{\hat W} |A^{1/2} (W - \hat W) C^{1/2}|_F

    With ``C`` the second moment of a layer's inputs (and ``A`` absent) that is the error of its
    outputs on them. With one mode a side (SVDP) the result is the best there is, from the SVD of
    :math:`A^{1/2} W C^{1/2}`. With several it starts from that SVD or from :func:`tt_svd`,
    whichever is closer, and alternates over the cores: the error falls at every sweep, so that it
    is never over that of :func:`tt_svd`.

    Args:
        W: the matrix, in float32 or float64; the metric is best held in float64.
        shape: the plan; ranks are taken from it.
        left: ``A``, a positive semi-definite matrix or the diagonal of one; None is the identity.
        right: ``C``, likewise. Eigenvalues under ``1e-12`` of the largest are lifted to that.
        max_sweeps: how often to alternate at most.
        tol: stop where a sweep takes less than this fraction of the squared error away.

    Shape:
        - W: ``(d_out, d_in)``
        - left: ``(d_out, d_out)`` or ``(d_out,)``
        - right: ``(d_in, d_in)`` or ``(d_in,)``

    Raises:
        ShapeError: sizes or dtypes that do not fit, numbers that are not finite, a negative square
            in a metric, or a ``max_sweeps`` or ``tol`` below zero.

    References:
        Holtz, Rohwedder & Schneider, *The alternating linear scheme for tensor optimization in the
        tensor train format*, 2012; Wang et al., *SVD-LLM*, 2024 (whitened SVD of weights).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> W, x = torch.randn(12, 30).double(), torch.randn(500, 30).double() * torch.rand(30)
        >>> shape = TTShape.svd(12, 30, rank=4)
        >>> error = lambda tt: (x @ (W - tt.to_matrix()).mT).norm()
        >>> bool(error(tt_fit(W, shape, right=x.mT @ x)) < error(tt_svd(W, shape)))
        True
    """
    _check(W, shape, left, right, max_sweeps, tol)
    plan = shape.merged
    # The right side is a chain from its outer end, in which the digits of an index are reversed.
    order = torch.arange(plan.d_in, device=W.device).view(plan.in_modes)
    order = order.permute(*range(order.ndim - 1, -1, -1)).flatten()
    if right is not None:
        right = right[order] if right.ndim == 1 else right[order][:, order]
    problem = _Problem(W[:, order], Metric.of(left), Metric.of(right))
    ends = (plan.out_modes, plan.ranks[: len(plan.out_modes) + 1])
    starts = (plan.in_modes[::-1], plan.ranks[len(plan.out_modes) :][::-1])
    state = problem.whitened(ends, starts)
    if len(plan.out_modes) == len(plan.in_modes) == 1:
        return state.value(shape)
    error = problem.error(state)
    plain = _State.of(tt_svd(W, shape))
    if (other := problem.error(plain)) < error:
        state, error = plain, other
    for _ in range(max_sweeps):
        state = problem.improved(state)
        before, error = error, problem.error(state)
        if before - error <= tol * error or error <= problem.rounding:
            break
    return state.value(shape)


def _check(
    W: Tensor,
    shape: TTShape,
    left: Tensor | None,
    right: Tensor | None,
    max_sweeps: int,
    tol: float,
) -> None:
    if W.ndim != 2 or tuple(W.shape) != (shape.d_out, shape.d_in):
        raise ShapeError(
            f"tt_fit of {shape!r} takes a matrix ({shape.d_out}, {shape.d_in}), got "
            f"{tuple(W.shape)}; a convolution kernel goes in as kernel.flatten(1)"
        )
    if W.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"tt_fit needs float32 or float64, got {W.dtype}; call it with W.float()")
    check_finite([W], "W")
    check_moment(left, shape.d_out, "left", W)
    check_moment(right, shape.d_in, "right", W)
    if max_sweeps < 0 or not tol >= 0:
        raise ShapeError(
            f"max_sweeps counts from 0 and tol is a fraction from 0 on, as in max_sweeps=30, "
            f"tol=1e-3; got {max_sweeps!r} and {tol!r}"
        )


@dataclass(frozen=True)
class _State:
    """Two chains of orthonormal cores, outermost first, and the bond between them."""

    left: Sequence[Tensor]
    bond: Tensor
    right: Sequence[Tensor]

    @classmethod
    def of(cls, tt: SpectralTT) -> _State:
        return cls(tt.left, torch.diag(tt.spectrum), mirror(tt.right))

    def value(self, shape: TTShape) -> SpectralTT:
        a, s, bt = torch.linalg.svd(self.bond)
        left = (*self.left[:-1], self.left[-1] @ a)
        right = (*self.right[:-1], self.right[-1] @ bt.mT)
        return SpectralTT(left, s, mirror(right), shape)

    def turned(self) -> _State:
        """The transpose."""
        return _State(self.right, self.bond.mT, self.left)


class _Problem:
    """A matrix between two metrics."""

    def __init__(self, W: Tensor, left: Metric, right: Metric) -> None:
        self.W, self.left, self.right = W, left, right
        self.whole = right.times(left.times(W).mT).mT  # A W C
        self.rounding = float((W * self.whole).sum()) * torch.finfo(W.dtype).eps ** 2

    def error(self, state: _State) -> float:
        """The squared error, from the difference itself."""
        gap = self.W - left_matrix(state.left) @ state.bond @ left_matrix(state.right).mT
        return float(self.right.whitened(self.left.whitened(gap).mT).square().sum())

    def whitened(
        self,
        out: tuple[Sequence[int], Sequence[int]],
        into: tuple[Sequence[int], Sequence[int]],
    ) -> _State:
        """The SVD of the whitened matrix, cut into chains."""
        white = self.right.whitened(self.left.whitened(self.W).mT).mT
        u, s, vt = leading_svd(white, out[1][-1])
        left, a = qr_sweep(svd_chain(self.left.unwhitened(u * s), *out))
        right, b = qr_sweep(svd_chain(self.right.unwhitened(vt.mT), *into))
        return _State(left, a @ b.mT, right)

    def improved(self, state: _State) -> _State:
        """One sweep over the cores of the left side, then of the right."""
        state = self._left_fitted(state)
        turned = _Problem.__new__(_Problem)
        turned.W, turned.left, turned.right = self.W.mT, self.right, self.left
        turned.whole = self.whole.mT
        return turned._left_fitted(state.turned()).turned()

    def _left_fitted(self, state: _State) -> _State:
        v = left_matrix(state.right)
        k = torch.linalg.cholesky(v.mT @ self.right.times(v))
        # With V' = V K^{-T} orthonormal in the metric, the target is W C V'.
        target = torch.linalg.solve_triangular(
            k, self.right.times(v).mT @ self.W.mT, upper=False
        ).mT
        start = [*state.left[:-1], state.left[-1] @ (state.bond @ k)]
        cores, rest = qr_sweep(fit_chain(start, target, self.left))
        bond = torch.linalg.solve_triangular(k, rest, upper=False, left=False)
        return _State(cores, bond, state.right)
