"""Optimizers on the product manifold, the check that catches a Euclidean one, and `minimize`."""

from sttp_manifold.optim.check import check_optimizer
from sttp_manifold.optim.riemannian import RiemannianAdam, RiemannianSGD
from sttp_manifold.optim.solve import MinimizeResult, minimize

__all__ = ["MinimizeResult", "RiemannianAdam", "RiemannianSGD", "check_optimizer", "minimize"]
