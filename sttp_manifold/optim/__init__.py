"""Optimizers on the product manifold, the check that catches a Euclidean one, and `minimize`."""

from sttp_manifold.optim._options import (
    ConjugateGradientOptions,
    LBFGSOptions,
    PymanoptOptions,
    SteepestDescentOptions,
    TrustRegionOptions,
)
from sttp_manifold.optim.averaging import check_points, get_manifold_multi_avg_fn
from sttp_manifold.optim.check import check_optimizer
from sttp_manifold.optim.clip import clip_grad_norm_, gradient_noise_scale
from sttp_manifold.optim.decay import decay_weights
from sttp_manifold.optim.follow import follow
from sttp_manifold.optim.groups import param_groups
from sttp_manifold.optim.minimize import MinimizeResult, minimize
from sttp_manifold.optim.riemannian import RiemannianAdam, RiemannianMuon, RiemannianSGD

__all__ = [
    "ConjugateGradientOptions",
    "LBFGSOptions",
    "MinimizeResult",
    "PymanoptOptions",
    "RiemannianAdam",
    "RiemannianMuon",
    "RiemannianSGD",
    "SteepestDescentOptions",
    "TrustRegionOptions",
    "check_optimizer",
    "check_points",
    "clip_grad_norm_",
    "decay_weights",
    "follow",
    "get_manifold_multi_avg_fn",
    "gradient_noise_scale",
    "minimize",
    "param_groups",
]
