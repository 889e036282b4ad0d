"""Catch an optimizer that would take manifold parameters off their manifold, or move others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim._blocks import is_riemannian

__all__ = ["check_optimizer"]

# Under which names wrappers hold the optimizer that they delegate to: ZeroRedundancyOptimizer has
# `optim`, accelerate and most lookaheads `optimizer`.
_INNER = ("optimizer", "optim", "base_optimizer", "_optimizer")


@explained
def check_optimizer(optimizer: Any, model: torch.nn.Module | None = None) -> None:
    """Raise if a plain torch optimizer holds manifold parameters, or any holds those of before.

    Such an optimizer leaves the manifold at its first step without a word, and often at a lower
    loss: what it trains is no longer the parameterization that was asked for. And ``compress``,
    ``decompress`` and ``switch`` make new parameters, which an optimizer made before does not know.

    Args:
        optimizer: any optimizer; geoopt's and this package's are accepted, and wrappers that
            delegate to one, as ``ZeroRedundancyOptimizer`` or a lookahead.
        model: names the parameter in the message, if given; and tells whether the optimizer holds
            parameters that are in no module of it, while others of it are in no group.

    Raises:
        OptimizerError: if the optimizer is Euclidean and a parameter is not, if the optimizer is
            older than the parameters of ``model``, and for what is no optimizer.

    Example:
        >>> import torch
        >>> check_optimizer(torch.optim.Adam(torch.nn.Linear(3, 2).parameters()))
    """
    layers = list(_unwrapped(optimizer))
    if not any(_parameters(layer) for layer in layers):
        raise OptimizerError(
            f"check_optimizer takes an optimizer, but got {type(optimizer).__name__}, which has no "
            f"parameter groups; call check_optimizer(torch.optim.Adam(model.parameters()), model)"
        )
    if model is not None:
        _check_age(layers, model)
    if not any(isinstance(layer, geoopt.optim.mixin.OptimMixin) for layer in layers):
        for layer in layers:
            _check_parameters(layer, type(layers[-1]), model)


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """An optimizer, what it delegates to, and so on."""
    seen: set[int] = set()
    found = [optimizer]
    while found:
        layer = found.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, torch.optim.lr_scheduler.LRScheduler) or hasattr(layer, "get_last_lr"):
            raise OptimizerError(
                f"check_optimizer takes an optimizer, but got the scheduler "
                f"{type(layer).__name__}; call check_optimizer(scheduler.optimizer, model)"
            )
        yield layer
        held = vars(layer) if hasattr(layer, "__dict__") else {}
        found += [held[name] for name in _INNER if hasattr(held.get(name), "step")]


def _parameters(optimizer: Any) -> list[tuple[str, Tensor]]:
    """Parameters of an optimizer, and where they are."""
    return [
        (f"parameter {i} of group {g}", p)
        for g, group in enumerate(getattr(optimizer, "param_groups", ()))
        for i, p in enumerate(group["params"])
    ]


def _check_age(layers: list[Any], model: torch.nn.Module) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    held = [pair for layer in layers for pair in _parameters(layer)]
    ids = {id(p) for _, p in held}
    strangers = [(where, p) for where, p in held if id(p) not in names]
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    # Either alone may be meant: a loss with parameters of its own, a part that is not trained.
    if strangers and left_out:
        where, p = strangers[0]
        raise OptimizerError(
            f"{type(layers[0]).__name__} holds {where}, of shape {tuple(p.shape)}, which is in no "
            f"module of this {type(model).__name__}, and does not hold {left_out[0]!r}, which is: "
            f"it was made before compress, decompress or switch replaced the parameters. Make it "
            f"anew after them, {type(layers[0]).__name__}(model.parameters(), lr=...)"
        )


def _check_parameters(optimizer: Any, kind: type, model: torch.nn.Module | None) -> None:
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    for where, p in _parameters(optimizer):
        if not is_riemannian(p):
            continue
        if id(p) in names:
            where = f"{names[id(p)]!r}"
        ours = "RiemannianSGD" if issubclass(kind, torch.optim.SGD) else "RiemannianAdam"
        manifold = type(p.manifold).__name__  # type: ignore[attr-defined]
        raise OptimizerError(
            f"{kind.__module__.split('.')[0]}'s {kind.__name__} holds {where}, of shape "
            f"{tuple(p.shape)}, which lives on the manifold {manifold}: a "
            f"Euclidean step would leave it. Call "
            f"sm.optim.{ours}(model.parameters(), lr=...) instead; it moves plain parameters "
            f"exactly as torch's does"
        )
