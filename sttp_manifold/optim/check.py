"""Catch an optimizer that would take manifold parameters off their manifold."""

from __future__ import annotations

import torch

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim._blocks import is_riemannian

__all__ = ["check_optimizer"]


@explained
def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None) -> None:
    """Raise if a plain torch optimizer holds manifold parameters.

    Such an optimizer leaves the manifold at its first step without a word, and often at a lower
    loss: what it trains is no longer the parameterization that was asked for.

    Args:
        optimizer: any optimizer; geoopt's and this package's are accepted.
        model: names the parameter in the message, if given.

    Raises:
        OptimizerError: if the optimizer is Euclidean and a parameter is not.

    Example:
        >>> import torch
        >>> check_optimizer(torch.optim.Adam(torch.nn.Linear(3, 2).parameters()))
    """
    if isinstance(optimizer, geoopt.optim.mixin.OptimMixin):
        return
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if not is_riemannian(p):
                continue
            where = f"parameter {i} of group {g}"
            if id(p) in names:
                where = f"{names[id(p)]!r}"
            kind = type(optimizer)
            ours = "RiemannianSGD" if issubclass(kind, torch.optim.SGD) else "RiemannianAdam"
            raise OptimizerError(
                f"{kind.__module__.split('.')[0]}'s {kind.__name__} holds {where}, of shape "
                f"{tuple(p.shape)}, which lives on the manifold {type(p.manifold).__name__}: a "
                f"Euclidean step would leave it. Call "
                f"sm.optim.{ours}(model.parameters(), lr=...) instead; it moves plain parameters "
                f"exactly as torch's does"
            )
