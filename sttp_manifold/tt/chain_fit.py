r"""One side of a weight fitted to a target: a chain of cores, by sweeps over them.

A chain of left cores ``(R_{k-1}, n_k, R_k)`` is a matrix ``(n_1 ... n_D, R_D)``. Fitted is

.. math:: \min |A^{1/2} (T - \text{chain})|_F

over one core at a time, the others orthonormal around it. Without a metric ``A`` the best core is a
projection of ``T``; the innermost one solves a small system with it; others take steps of conjugate
gradients. No step makes it worse.

References:
    Holtz, Rohwedder & Schneider, *The alternating linear scheme for tensor optimization in the
    tensor train format*, 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sttp_manifold.tt.contract import left_matrix
from sttp_manifold.tt.metric import Metric

__all__ = ["fit_chain", "svd_chain"]

# Steps of conjugate gradients for one core: more sweeps do better than more steps.
_STEPS = 8
_ENOUGH = 1e-6  # of the first gradient


def svd_chain(target: Tensor, modes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """The chain of a matrix by truncated SVDs from the outside, whose last core holds the rest.

    Shape:
        - target: ``(n_1 ... n_D, R_D)``
    """
    cores, rest = [], target
    for k, mode in enumerate(modes[:-1]):
        unfolded = rest.reshape(ranks[k] * mode, -1)
        q, s, vt = torch.linalg.svd(unfolded, full_matrices=False)
        rank = ranks[k + 1]
        cores.append(q[:, :rank].reshape(ranks[k], mode, rank))
        rest = s[:rank, None] * vt[:rank]
    return [*cores, rest.reshape(ranks[-2], modes[-1], ranks[-1])]


def fit_chain(
    cores: Sequence[Tensor], target: Tensor, metric: Metric, sweeps: int = 1
) -> list[Tensor]:
    """A chain no worse than the one given, with all cores but the last orthonormal.

    Args:
        cores: where to start; all but the last orthonormal.
        target: the matrix to come close to.
        metric: in which metric.
        sweeps: how often to go out and back.

    Shape:
        - cores: each ``(R_{k-1}, n_k, R_k)``
        - target: ``(n_1 ... n_D, R_D)``
    """
    cores = list(cores)
    last = len(cores) - 1
    if not last:
        return [target.reshape(cores[0].shape)]
    for _ in range(sweeps):
        for k, to in (*_pairs(range(last, -1, -1)), *_pairs(range(last + 1))):
            cores[k] = _best_core(cores, k, target, metric)
            cores = _moved(cores, k, to)
    cores[last] = _best_core(cores, last, target, metric)
    return cores


def _pairs(places: range) -> list[tuple[int, int]]:
    """Each place with the next one."""
    return list(pairwise(places))


def _moved(cores: list[Tensor], k: int, to: int) -> list[Tensor]:
    """The same chain, with the core that is not orthonormal at another place."""
    cores = list(cores)
    if to > k:
        q, r = torch.linalg.qr(cores[k].flatten(0, 1))
        cores[k] = q.reshape(*cores[k].shape[:2], -1)
        cores[to] = (r @ cores[to].flatten(1)).reshape(-1, *cores[to].shape[1:])
    else:
        q, r = torch.linalg.qr(cores[k].flatten(1).mT)
        cores[k] = q.mT.reshape(-1, *cores[k].shape[1:])
        cores[to] = (cores[to].flatten(0, 1) @ r.mT).reshape(*cores[to].shape[:2], -1)
    return cores


def _best_core(cores: list[Tensor], k: int, target: Tensor, metric: Metric) -> Tensor:
    """Core ``k`` of the chain, given the others; better, if not best, where that takes steps."""
    a, n, b = cores[k].shape
    r = target.shape[1]
    outer = left_matrix(cores[:k]) if k else target.new_ones(1, 1)
    inner = _inner(cores[k + 1 :], target)

    def spread(core: Tensor) -> Tensor:
        rows = (outer @ core.reshape(a, n * b)).reshape(-1, b)
        return (rows @ inner).reshape(-1, r)

    def gathered(matrix: Tensor) -> Tensor:
        rows = matrix.reshape(-1, inner.shape[1]) @ inner.mT
        return (outer.mT @ rows.reshape(-1, n * b)).reshape(a, n, b)

    if metric.matrix is None:
        return gathered(target)
    if k == len(cores) - 1:
        return _solved(outer, n, target, metric).reshape(a, n, b)
    gradient = gathered(metric.times(target - spread(cores[k])))
    return _conjugate(cores[k], gradient, lambda core: gathered(metric.times(spread(core))))


def _inner(cores: list[Tensor], target: Tensor) -> Tensor:
    """Cores further in as one matrix ``(R_k, n_{k+1} ... n_D r)``."""
    if not cores:
        return torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
    product = cores[-1].flatten(1)
    for core in reversed(cores[:-1]):
        product = (core.flatten(0, 1) @ product).reshape(core.shape[0], -1)
    return product


def _solved(outer: Tensor, n: int, target: Tensor, metric: Metric) -> Tensor:
    """The innermost core: a system of its rows, with the columns of the target."""
    unit = torch.eye(n, dtype=outer.dtype, device=outer.device)
    basis = torch.einsum("ia,nm->inam", outer, unit).reshape(-1, outer.shape[1] * n)
    weighted = metric.times(basis)
    return torch.linalg.solve(basis.mT @ weighted, weighted.mT @ target)


def _conjugate(x: Tensor, residual: Tensor, times: Callable[[Tensor], Tensor]) -> Tensor:
    """Some steps of conjugate gradients, none of which is uphill."""
    direction, square = residual, residual.square().sum()
    enough = _ENOUGH**2 * square
    for _ in range(_STEPS):
        if not bool(square > enough):
            break
        image = times(direction)
        step = square / (direction * image).sum()
        x = x + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return x
