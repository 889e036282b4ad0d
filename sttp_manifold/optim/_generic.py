"""Parameters on any manifold of geoopt's, moved by that manifold's own methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.manifolds import FixedTTRankManifold
from sttp_manifold.optim._blocks import decay_gradient, number, working_dtype
from sttp_manifold.optim._moments import betas, is_decoupled

__all__ = ["Points", "adam_step", "batched"]

# Longest step, in lengths of the point.
_LONGEST = 1e3


def batched(
    params: Sequence[Tensor], steps: Callable[[Tensor], Any], *, together: bool
) -> list[Points]:
    """Parameters that move as one batch: those of fixed TT rank on one plan, others one by one.

    Args:
        params: on manifolds.
        steps: what else has to agree, as how many steps a parameter has taken.
        together: whether batches are wanted.
    """
    alike: dict[Any, list[Tensor]] = {}
    for p in params:
        M = p.manifold  # type: ignore[attr-defined]
        key: Any = id(p)
        if together and type(M) is FixedTTRankManifold:
            kind = (M.shape, M.spectrum, M.retraction, M.damping)
            key = (*kind, p.shape, p.dtype, p.device, steps(p))
        alike.setdefault(key, []).append(p)
    return [Points(members) for members in alike.values()]


class Points:
    """Parameters on one manifold, and what steps do with all of them at once.

    Args:
        params: of one shape, dtype and device where there are several.

    Attributes:
        params: the same.
        manifold: the one they are on.
        x: the points in the dtype that steps work in, several as one batch.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.manifold = self.params[0].manifold  # type: ignore[attr-defined]
        self._dtype = working_dtype(self.params[0])
        self.x = self.take([p.detach() for p in self.params])

    def take(self, arrays: Sequence[Tensor]) -> Tensor:
        """One array a parameter as one; a single one is itself where its dtype is right."""
        if len(arrays) == 1:
            return arrays[0].to(self._dtype)
        return torch.stack([array.as_subclass(Tensor).to(self._dtype) for array in arrays])

    def give(self, array: Tensor, arrays: Sequence[Tensor]) -> None:
        """Undo :meth:`take`, into arrays that are there."""
        if len(arrays) > 1:
            plain = [held.as_subclass(Tensor) for held in arrays]
            torch._foreach_copy_(plain, list(array.unbind()))
        elif array is not arrays[0]:
            arrays[0].copy_(array)

    def gradient(self, *, maximize: bool, weight_decay: float) -> Tensor:
        """Riemannian gradient of what is minimized; ``p.grad`` stays as it is.

        A gradient that overflows on the way counts for nothing.

        Args:
            maximize: whether the objective is to grow.
            weight_decay: weight of the L2 penalty that is added.
        """
        grad = self.take([p.grad for p in self.params])  # type: ignore[misc]
        grad = -grad if maximize else grad
        if weight_decay:
            grad = grad.add(self.penalty(), alpha=weight_decay)
        # Some manifolds of geoopt's write to their argument.
        result = self.manifold.egrad2rgrad(self.x, grad.clone())
        return self._finite_or(result, torch.zeros_like(grad), grad)

    def penalty(self) -> Tensor:
        """Euclidean gradient of the L2 penalty."""
        return self.take([decay_gradient(p) for p in self.params])

    def decay(self, weight: float) -> Tensor:
        """Riemannian gradient of the L2 penalty of a weight."""
        found: Tensor = self.manifold.egrad2rgrad(self.x, weight * self.penalty())
        return found

    def squared(self, grad: Tensor) -> Tensor:
        """Squared norm of a tangent vector, by components where the manifold has some.

        Infinite where it overflows, also where differences of what is infinite made it NaN.
        """
        result = self.manifold.component_inner(self.x, grad)
        return self._finite_or(result, torch.full_like(result, torch.inf), grad)

    def move(self, u: Tensor, momentum: Tensor | None) -> None:
        """Move along a tangent vector by the manifold's own retraction, and the momentum.

        A step is no longer than a thousand times the point, or one if that is more: squares of what
        is longer overflow. Where the manifold's own formulas still do, the point rests.

        Args:
            u: the tangent vector.
            momentum: a tangent vector to carry along, replaced in place.
        """
        limit = _LONGEST * self._of_each(self.x.abs(), torch.amax).clamp(min=1)
        u = u * (limit / self._of_each(u.abs(), torch.amax)).clamp(max=1)
        if momentum is None:
            y = self.manifold.retr(self.x, u)
        else:
            y, carried = self.manifold.retr_transp(self.x, u, momentum)
            momentum.copy_(self._finite_or(carried, torch.zeros_like(momentum), momentum))
        self.give(self._finite_or(y, self.x, u), [p.detach() for p in self.params])

    def _of_each(self, array: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        if len(self.params) == 1:
            return reduce(array)
        return reduce(array, tuple(range(1, array.ndim)), keepdim=True)

    def _finite_or(self, result: Tensor, instead: Tensor, given: Tensor) -> Tensor:
        """A result, or something instead where it is not finite although what was given is."""
        finite = [self._of_each(t.isfinite(), torch.all) for t in (result, given)]
        return torch.where(finite[0].logical_not() & finite[1], instead, result)


def adam_step(points: Points, kept: dict[str, Tensor], step: float, group: dict[str, Any]) -> None:
    """A step of Adam, by second moments of the components that the manifold has.

    Args:
        points: what moves.
        kept: momentum and second moments, changed in place.
        step: the number of this one.
        group: the settings.
    """
    lr, decay, (beta1, beta2) = number(group["lr"]), float(group["weight_decay"]), betas(group)
    coupled = 0.0 if is_decoupled(group) else decay
    grad = points.gradient(maximize=group["maximize"], weight_decay=coupled)
    momentum, second = kept["exp_avg"], kept["exp_avg_sq"]
    momentum.mul_(beta1).add_((1 - beta1) * grad)
    second.mul_(beta2).add_((1 - beta2) * points.squared(grad))
    if "max_exp_avg_sq" in kept:
        second = torch.maximum(kept["max_exp_avg_sq"], second, out=kept["max_exp_avg_sq"])
    denominator = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
    direction = momentum.div(1 - beta1**step) / denominator
    if decay and is_decoupled(group):
        direction = direction + points.decay(decay)
    points.move(-lr * direction, momentum)
