r"""The leading singular vectors of a matrix: exact where that is quick, by random projections else.

A full SVD of a 4096 x 4096 matrix takes minutes to give rank 64. Subspace iteration from a random
start gives the same subspace to an accuracy that is watched while it runs.

References:
    Halko, Martinsson & Tropp, *Finding structure with randomness*, 2011 (Alg. 4.4, Sec. 5.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_svd"]

# Below this smaller side a full SVD takes a second or two.
_SMALL = 1024
# Subspace iteration pays where it keeps at most this part of the smaller side.
_PART = 1 / 4
# Relative excess of the squared error over that of the best approximation at which it ends.
_EXCESS = 1e-3
_MOST_ITERATIONS = 24


def leading_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Truncated SVD of a matrix or a batch of them.

    Exact to rounding where the smaller side is at most 1024 or ``rank`` over a quarter of it.
    Beyond that by subspace iteration from a fixed random start (torch's generators are not
    touched) until an iteration takes less than ``1e-3`` of the squared error away, at most 24: the
    squared error is then within about that fraction of the best one at this rank.

    Shape:
        - W: ``(*b, d_out, d_in)``, in float32 or float64
        - result: ``(*b, d_out, rank)``, ``(*b, rank)`` descending, ``(*b, rank, d_in)``
    """
    small = min(W.shape[-2:])
    if small <= _SMALL or rank > _PART * small or W.is_meta:
        u, s, vt = torch.linalg.svd(W, full_matrices=False)
        return u[..., :rank], s[..., :rank], vt[..., :rank, :]
    if W.shape[-2] < W.shape[-1]:
        u, s, vt = leading_svd(W.mT, rank)
        return vt.mT, s, u.mT
    scale = _scale(W)
    W = W / scale
    more = rank + max(16, rank // 4)
    random = torch.Generator().manual_seed(0)
    start = torch.randn(W.shape[-1], more, generator=random, dtype=W.dtype).to(W.device)
    whole = W.square().sum((-2, -1))
    q = torch.linalg.qr(W @ start).Q
    kept = torch.zeros_like(whole)
    for _ in range(_MOST_ITERATIONS):
        right = torch.linalg.qr(W.mT @ q).Q
        q, small_r = torch.linalg.qr(W @ right)
        before, kept = kept, torch.linalg.svdvals(small_r)[..., :rank].square().sum(-1)
        rest = (whole - kept).clamp_min(torch.finfo(W.dtype).eps * whole)
        if bool((kept - before <= _EXCESS / 4 * rest).all()):
            break
    a, s, bt = torch.linalg.svd(small_r, full_matrices=False)
    u, vt = q @ a, bt @ right.mT
    return u[..., :rank], s[..., :rank] * scale.squeeze(-1), vt[..., :rank, :]


def _scale(W: Tensor) -> Tensor:
    """A power of two near the largest entry of each matrix, whose squares would overflow.

    Shape:
        - W: ``(*b, m, n)``
        - output: ``(*b, 1, 1)``
    """
    top = W.abs().amax((-2, -1), keepdim=True)
    exponent = torch.frexp(top).exponent.clamp(-100, 100)
    return torch.where(top > 0, torch.exp2(exponent.to(W.dtype)), 1.0)
