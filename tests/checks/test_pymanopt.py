"""Verdicts of our checks against those of pymanopt's, on the same manifolds and costs.

pymanopt 2.2 stores the residual of ``numpy.polyfit``, an array of one element, as a number, which
NumPy 2 refuses. It gets the number here; everything else is its own. Its check of a retraction is
left out: it takes the logarithm of errors that are zero, and fits ``nan``.
"""

from __future__ import annotations

import numpy as np
import pymanopt
import pytest
import torch
from pymanopt.tools import diagnostics

import sttp_manifold as sm
from sttp_manifold._geoopt import EuclideanStiefel, geoopt

A = np.random.default_rng(0).normal(size=(6, 6))
A = A @ A.T


class _Numpy:
    """NumPy, with the residual of a fit as a number."""

    def __getattr__(self, name: str):
        return getattr(np, name)

    @staticmethod
    def polyfit(*args, **kwargs):
        fitted = np.polyfit(*args, **kwargs)
        return (fitted[0], fitted[1].sum(), *fitted[2:]) if kwargs.get("full") else fitted


@pytest.fixture(autouse=True)
def _number(monkeypatch) -> None:
    np.random.seed(0)  # noqa: NPY002  pymanopt draws from the global generator
    monkeypatch.setattr(diagnostics, "np", _Numpy())


def cost(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * (torch.as_tensor(A) @ x)).sum()


def theirs(manifold, scale: float, *, second: bool) -> float:
    """The slope that pymanopt reads off, with derivatives that are wrong by a factor."""
    wrapped = pymanopt.function.pytorch(manifold)(cost)
    problem = pymanopt.Problem(manifold, wrapped)
    if second:
        hessian = problem.riemannian_hessian
        problem._riemannian_hessian = lambda x, u: scale * hessian(x, u)
    else:
        gradient = problem.riemannian_gradient
        problem._riemannian_gradient = lambda x: scale * gradient(x)
    _, _, _, poly = diagnostics.check_directional_derivative(problem, use_quadratic_model=second)
    return float(poly[0])


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize(
    ("ours", "size", "pymanopts"),
    [
        (geoopt.Sphere(), (6,), pymanopt.manifolds.Sphere(6)),
        (EuclideanStiefel(), (6, 2), pymanopt.manifolds.Stiefel(6, 2)),
    ],
    ids=["sphere", "stiefel"],
)
def test_verdicts_on_derivatives_agree(ours, size, pymanopts, scale) -> None:
    f = sm.manifolds.cost.ManifoldCost(ours, cost)
    gradient = sm.check_gradient(ours, cost, size=size, gradient=lambda x: scale * f.gradient(x)[1])
    assert gradient.passed == (theirs(pymanopts, scale, second=False) > 1.8) == (scale == 1)
    hessian = sm.check_hessian(ours, cost, size=size, hessian=lambda x, u: scale * f.hessian(x)(u))
    assert hessian.passed == (theirs(pymanopts, scale, second=True) > 2.8) == (scale == 1)
