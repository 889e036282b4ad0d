"""Costs with known minima, for the solvers and for pymanopt."""

from __future__ import annotations

import torch
from strategies import normal

from sttp_manifold import SpectralTTManifold, TTShape

COMPLETION = TTShape((3, 4, 2), (2, 5, 3), ranks=(1, 3, 4, 4, 4, 3, 1))


class Counted:
    """A cost that counts its calls."""

    def __init__(self, cost) -> None:
        self.cost = cost
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.cost(x)


def completion(seed, spectrum="full", observed=0.8, dtype=torch.float64, shape=COMPLETION):
    """Manifold, cost and start: some entries of a weight of the set, from a random point."""
    generator = torch.Generator().manual_seed(seed)
    M = SpectralTTManifold(shape, spectrum)
    truth = M.unpack(M.random(dtype=torch.float64, generator=generator)).to_matrix()
    mask = torch.rand(shape.d_out, shape.d_in, generator=generator) < observed
    i, j = mask.nonzero(as_tuple=True)
    entries = truth[i, j].as_subclass(torch.Tensor).to(dtype)

    def cost(tt):
        return (tt.entries(i, j) - entries).square().sum() / 2

    return M, cost, M.random(dtype=dtype, generator=generator)


def brockett(seed, n=12, p=3, dtype=torch.float64):
    """Matrix, weights, cost on St(n, p) and start: the minimum holds the top eigenvectors."""
    B = normal(seed, n, n)
    A = (B + B.mT) / 2
    weights = torch.arange(p, 0, -1, dtype=torch.float64)
    A_, weights_ = A.to(dtype), weights.to(dtype)

    def cost(x):
        return -(weights_ * (x * (A_ @ x)).sum(-2)).sum() / 2

    return A, weights, cost, torch.linalg.qr(normal(seed + 1, n, p))[0].to(dtype)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
