"""Numerical checks of any manifold, retraction, transport, gradient and Hessian."""

from sttp_manifold.checks.costs import check_gradient, check_hessian
from sttp_manifold.checks.public import check_manifold, check_retraction, check_vector_transport
from sttp_manifold.checks.result import CheckResult, Law
from sttp_manifold.checks.slopes import Slope

__all__ = [
    "CheckResult",
    "Law",
    "Slope",
    "check_gradient",
    "check_hessian",
    "check_manifold",
    "check_retraction",
    "check_vector_transport",
]
