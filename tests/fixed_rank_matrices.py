"""The matrices of fixed rank, for tests: points with a gauge, which every retraction changes.

The geometry of Vandereycken (2013) in the coordinates ``(U, S, V)`` of Psenka & Boumal (2020), one
mode on each side, written apart from the package and by way of the dense matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold import SpectralTT
from sttp_manifold._geoopt import Manifold


class FixedRankMatrices(Manifold):
    """Points and vectors are flat ``(U, S, V)``; a vector is ``dU V' + U dS V' + U dV'``."""

    name = "FixedRankMatrices"
    ndim = 1

    def __init__(self, m: int, n: int, r: int, retraction: str = "svd") -> None:
        super().__init__()
        self.m, self.n, self.r, self.retraction = m, n, r, retraction
        self.dim = r * (m + n - r)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, n, r = self.m, self.n, self.r
        U, S, V = x.split([m * r, r * r, n * r], -1)
        return U.unflatten(-1, (m, r)), S.unflatten(-1, (r, r)), V.unflatten(-1, (n, r))

    def join(self, *parts: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(p.shape[:-2] for p in parts))
        return torch.cat([p.expand(*batch, *p.shape[-2:]).flatten(-2) for p in parts], -1)

    def unpack(self, x: Tensor) -> SpectralTT:
        U, S, V = self.split(x)
        return SpectralTT((U.unsqueeze(-3),), S, (V.mT.unsqueeze(-1),))

    def from_dense(self, W: Tensor) -> Tensor:
        U, s, Vt = torch.linalg.svd(W, full_matrices=False)
        r = self.r
        return self.join(U[..., :r], torch.diag_embed(s[..., :r]), Vt[..., :r, :].mT)

    def ambient_vector(self, x: Tensor, u: Tensor) -> Tensor:
        (U, _, V), (dU, dS, dV) = self.split(x), self.split(u)
        return dU @ V.mT + U @ dS @ V.mT + U @ dV.mT

    def project_matrix(self, x: Tensor, Z: Tensor) -> Tensor:
        U, _, V = self.split(x)
        A, B, S = Z @ V, Z.mT @ U, U.mT @ Z @ V
        return self.join(A - U @ S, S, B - V @ S.mT)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        (U, _, V), (dU, dS, dV) = self.split(x), self.split(u)
        return self.join(dU - U @ (U.mT @ dU), dS, dV - V @ (V.mT @ dV))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        (_, S, _), (dU, dS, dV) = self.split(x), self.split(u)
        inverse = torch.linalg.inv(S)
        return self.proju(x, self.join(dU @ inverse.mT, dS, dV @ inverse))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        if self.retraction == "svd":
            return self.from_dense(self.unpack(x).to_matrix() + self.ambient_vector(x, u))
        (U, S, V), (dU, dS, dV) = self.split(x), self.split(u)
        inverse = torch.linalg.inv(S)
        Q, R = torch.linalg.qr(U + dU @ inverse)
        P, T = torch.linalg.qr(V + dV @ inverse.mT)
        return self.join(Q, R @ (S + dS) @ T.mT, P)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.project_matrix(y, self.ambient_vector(x, v))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim=False) -> Tensor:
        x, u, v = torch.broadcast_tensors(x, u, u if v is None else v)
        return (u * v).sum(-1, keepdim=keepdim)

    def projx(self, x: Tensor) -> Tensor:
        return self.from_dense(self.unpack(x).to_matrix())

    def random(self, *size, dtype=None, device=None) -> Tensor:
        def frame(d: int) -> Tensor:
            return torch.linalg.qr(torch.randn(d, self.r, dtype=dtype, device=device))[0]

        S = torch.eye(self.r, dtype=dtype, device=device)
        S = S + 0.3 * torch.randn(self.r, self.r, dtype=dtype, device=device)
        return self.join(frame(self.m), S, frame(self.n))

    def hessian_operator(self, cost, x: Tensor):
        """Psenka & Boumal (2020): the gradient is held constant in a lifted cost."""
        U, S, V = self.split(x)
        inverse = torch.linalg.inv(S)

        def weight(d: Tensor) -> SpectralTT:
            dU, dS, dV = self.split(d)
            return self.unpack(self.join(U + dU @ inverse, S + dS, V + dV @ inverse.mT))

        zero = torch.zeros_like(x).requires_grad_()
        with torch.enable_grad():
            value = cost(weight(zero))
            (gradient,) = torch.autograd.grad(value, zero, create_graph=True)
            eta = self.ambient_vector(x, self.proju(x, gradient)).detach()
            held = (eta * weight(zero).to_matrix()).sum()
            (constant,) = torch.autograd.grad(held, zero, create_graph=True)
            field = gradient - constant

        def apply(u: Tensor) -> Tensor:
            (moved,) = torch.autograd.grad(field, zero, u, retain_graph=True)
            return self.proju(x, moved)

        return apply

    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        U, _, V = self.split(x)
        eye = torch.eye(self.r, dtype=x.dtype, device=x.device)
        gaps = [(Q.mT @ Q - eye).abs().max() for Q in (U, V)]
        return max(gaps) <= atol, "frames are not orthonormal"

    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        return (self.proju(x, u) - u).abs().max() <= atol, "not in the gauge of tangent vectors"
