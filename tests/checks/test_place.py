"""Yardsticks of the checks: norms and inner products of vectors whose squares no dtype holds."""

from __future__ import annotations

import pytest
import torch

import sttp_manifold as sm
from sttp_manifold._geoopt import geoopt
from sttp_manifold.checks.place import norm

F32, F64 = torch.float32, torch.float64
SCALES = [(F32, 1e-25), (F32, 1e25), (F64, 1e-200), (F64, 1e200)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_norms_neither_underflow_nor_overflow(dtype, scale) -> None:
    u = torch.tensor([3.0, 4.0], dtype=dtype) * scale
    assert norm(u) == pytest.approx(5 * scale, rel=1e-6)
    assert norm(0 * u) == 0
    assert norm(u[:0]) == 0
    assert norm(u * torch.inf) == torch.inf


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_checks_of_costs_in_any_units(dtype, scale) -> None:
    A = torch.diag(torch.arange(1.0, 6.0, dtype=dtype))

    def cost(x):
        return scale * (x @ A @ x)

    def wrong(x):
        return 1.1 * geoopt.Sphere().proju(x, 2 * scale * (A @ x))

    of = {"size": (5,), "dtype": dtype}
    assert sm.check_gradient(geoopt.Sphere(), cost, **of, raises=True)
    assert sm.check_hessian(geoopt.Sphere(), cost, **of, raises=True)
    assert not sm.check_gradient(geoopt.Sphere(), cost, gradient=wrong, **of)
