"""Optimizers on the product manifold, and the check that catches a Euclidean one."""

from sttp_manifold.optim.check import check_optimizer
from sttp_manifold.optim.riemannian import RiemannianAdam, RiemannianSGD

__all__ = ["RiemannianAdam", "RiemannianSGD", "check_optimizer"]
