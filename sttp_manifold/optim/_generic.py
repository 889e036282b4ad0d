"""One parameter on any manifold of geoopt's, moved by that manifold's own methods."""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold.optim._blocks import decay_gradient, working_dtype

__all__ = ["move", "riemannian_gradient", "squared"]

# Longest step, in lengths of the point.
_LONGEST = 1e3


def riemannian_gradient(p: Tensor, *, maximize: bool, weight_decay: float) -> Tensor:
    """Riemannian gradient of what is minimized, in the dtype that steps work in.

    ``p.grad`` stays as it is. A gradient that overflows on the way counts for nothing.

    Args:
        p: a parameter with a gradient.
        maximize: whether the objective is to grow.
        weight_decay: weight of the L2 penalty that is added.
    """
    assert p.grad is not None
    x, grad = p.detach().to(working_dtype(p)), p.grad.to(working_dtype(p))
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad.add(decay_gradient(p), alpha=weight_decay)
    # Some manifolds of geoopt's write to their argument.
    result = p.manifold.egrad2rgrad(x, grad.clone())  # type: ignore[attr-defined]
    return _finite_or(result, torch.zeros_like(grad), grad)


def squared(p: Tensor, grad: Tensor) -> Tensor:
    """Squared norm of a tangent vector, by components where the manifold has some.

    Infinite where it overflows, also where differences of what is infinite made it NaN.
    """
    result = p.manifold.component_inner(p.detach().to(grad.dtype), grad)  # type: ignore[attr-defined]
    return _finite_or(result, torch.full_like(result, torch.inf), grad)


def move(p: Tensor, u: Tensor, momentum: Tensor | None) -> None:
    """Move a point along a tangent vector by its manifold's own retraction, and its momentum.

    A step is no longer than a thousand times the point, or one if that is more: squares of what is
    longer overflow. Where the manifold's own formulas still do, the point rests.

    Args:
        p: the parameter.
        u: the tangent vector.
        momentum: a tangent vector to carry along, replaced in place.
    """
    manifold, x = p.manifold, p.detach()  # type: ignore[attr-defined]
    start = x.to(u.dtype)
    limit = _LONGEST * start.abs().amax().clamp(min=1)
    u = u * (limit / u.abs().amax()).clamp(max=1)
    if momentum is None:
        point = manifold.retr(start, u)
    else:
        point, transported = manifold.retr_transp(start, u, momentum)
        momentum.copy_(_finite_or(transported, torch.zeros_like(momentum), momentum))
    x.copy_(_finite_or(point, start, u))


def _finite_or(result: Tensor, instead: Tensor, given: Tensor) -> Tensor:
    """A result, or something instead where it is not finite although what was given is."""
    overflown = result.isfinite().all().logical_not() & given.isfinite().all()
    return torch.where(overflown, instead, result)
