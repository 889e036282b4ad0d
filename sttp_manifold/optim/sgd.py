"""RiemannianSGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import sgd as torch_sgd

from sttp_manifold._geoopt import geoopt
from sttp_manifold.frames.retractions import Retraction
from sttp_manifold.optim._base import FrameOptimizer, detached
from sttp_manifold.optim._blocks import (
    number,
    project_,
    shortened,
)
from sttp_manifold.optim._fused_rules import Rule, sgd_rule
from sttp_manifold.optim._generic import Points
from sttp_manifold.optim._gradients import Gradients
from sttp_manifold.optim._settings import check_settings
from sttp_manifold.optim._stacks import Stacks

__all__ = ["RiemannianSGD"]


class RiemannianSGD(FrameOptimizer, geoopt.optim.RiemannianSGD, torch.optim.SGD):
    r"""Stochastic gradient descent for any mixture of plain and manifold parameters.

    Plain parameters get exactly :class:`torch.optim.SGD`. On a manifold the momentum buffer is a
    tangent vector: it starts as the first Riemannian gradient, as torch's starts as the first
    gradient, and is carried to each new point by projection; Nesterov's step is torch's formula in
    the tangent space. On an accelerator a step never waits for the device, unless for a manifold
    that geoopt's own operations move, and can be captured, like torch's, after a first one.

    A frame moves by 1,000 at most, which is as far as any step can turn it. Momentum of manifold
    parameters in half precision is kept in float32.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: weight of the L2 penalty, as in :class:`RiemannianAdam`.
        nesterov: use Nesterov momentum.
        stabilize: put points back on their manifolds every that many steps.
        retraction: as in :class:`RiemannianAdam`.
        maximize: ascend.
        foreach: as in :class:`RiemannianAdam`.
        differentiable: plain parameters only.
        fused: for plain parameters as in torch. For manifold parameters one kernel makes the whole
            step of all frames of a width, where Triton is there and the parameters are on CUDA, in
            float32 or half precision, of at most 128 columns, on manifolds of this package or
            ``EuclideanStiefel``, retracted by ``"newton_schulz"``, without ``stabilize``. None:
            there alone, unless ``foreach`` is given. True: an error elsewhere.

    Raises:
        OptimizerError: for settings out of range (also a ``ValueError``), for ``differentiable``
            or ``fused`` with manifold parameters, and for sparse gradients.
    """

    _momentum_key: ClassVar[str] = "momentum_buffer"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        stabilize: int | None = None,
        retraction: str | Retraction = "newton_schulz",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._retraction = retraction
        settings: dict[str, Any] = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            stabilize=stabilize,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        check_settings(type(self).__name__, settings)
        # Past geoopt's own __init__, which would drop the flags that it does not know.
        init: Any = super(geoopt.optim.RiemannianSGD, self).__init__
        init(params, **settings)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's kernel leaves the buffers of a first step that it skips as it found the memory.
        momentum = any(group["momentum"] for group in self.param_groups)
        return not momentum and super()._step_supports_amp_scaling

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """As there."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss again, with gradients enabled, and returns it.

        Returns:
            What the closure returned, or None.

        Raises:
            OptimizerError: for sparse gradients, or a flag that cannot be honoured; no parameter
                has moved then.
        """
        return self._run(closure)

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        points: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        init_group: Any = self._init_group
        init_group({**group, "params": params}, points, grads, buffers)
        sgd: Any = torch_sgd.sgd
        with torch.set_grad_enabled(group["differentiable"]):
            sgd(
                points if group["differentiable"] else detached(points),
                grads,
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                foreach=group["foreach"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
        if group["momentum"] != 0:
            for p, buffer in zip(points, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _step_framed(self, group: dict[str, Any], stacks: Stacks) -> None:
        lr, retraction = number(group["lr"]), self._retraction_in(group)
        started = stacks.step > 0
        gradients = Gradients(
            stacks, maximize=group["maximize"], weight_decay=float(group["weight_decay"])
        )
        for k, block in enumerate(stacks.blocks):
            X, gradient = block.fetch(stacks.points[k]), gradients.of(block, k)
            points, coordinates = block.views(X)
            if retraction.tangent:
                for x, g in zip(points, block.views(gradient)[0], strict=True):
                    project_(x, g)
            buffer = None
            if group["momentum"]:
                if "momentum_buffer" not in block.arrays:
                    # Zeros, with the whole first gradient added: torch's first step.
                    block.arrays["momentum_buffer"] = torch.zeros_like(gradient)
                    started = False
                buffer = block.arrays["momentum_buffer"]
            direction = _sgd_direction(buffer, gradient, group, started)
            moved = []
            directions, rest = block.views(direction)
            for n, (x, u) in enumerate(zip(points, directions, strict=True)):
                y = retraction.step(x, u, shortened(u, -lr))
                if buffer is not None and retraction.tangent:
                    project_(y, block.kept("momentum_buffer")[0][n])
                moved.append(y)
            if block.coordinates:
                if isinstance(lr, Tensor):
                    coordinates.sub_(rest * lr)
                else:
                    coordinates.sub_(rest, alpha=lr)
            block.put(block.join(moved, coordinates), stacks.points[k])

    def _fused_rule(self, group: dict[str, Any], state: dict[str, Any]) -> Rule:
        # Without dampening the first momentum is as the later ones.
        return sgd_rule(group, started="momentum_buffer" in state or not group["dampening"])

    def _stays(self, group: dict[str, Any], p: Tensor) -> bool:
        # torch's SGD has no flag that would tell: it is captured as it is.
        return p.device.type != "cpu"

    def _steps_of(self, group: dict[str, Any], p: Tensor) -> float:
        # Only whether there is momentum already matters.
        return float("momentum_buffer" in self.state[p])

    def _lend(self, group: dict[str, Any], stacks: Stacks) -> None:
        states = [self.state[p] for p in stacks.params]
        if "momentum_buffer" in states[0]:
            stacks.lend("momentum_buffer", [state["momentum_buffer"] for state in states])

    def _step_generic(self, group: dict[str, Any], points: Points) -> None:
        lr, decay = number(group["lr"]), float(group["weight_decay"])
        grad = points.gradient(maximize=group["maximize"], weight_decay=decay)
        if not group["momentum"]:
            points.move(-lr * grad, None)
            return
        states = [self.state[p] for p in points.params]
        started = "momentum_buffer" in states[0]
        for p, state in zip(points.params, states, strict=True):
            if not started:
                state["momentum_buffer"] = torch.zeros_like(p.detach(), dtype=grad.dtype)
            state["momentum_buffer"] = state["momentum_buffer"].to(grad.dtype)
        buffers = [state["momentum_buffer"] for state in states]
        buffer = points.take(buffers)
        direction = _sgd_direction(buffer, grad, group, started)
        points.move(-lr * direction, buffer)
        points.give(buffer, buffers)

    def _count_step(
        self, group: dict[str, Any], stacks: list[Stacks], generic: list[Tensor]
    ) -> bool:
        group["step"] = group.get("step", 0) + 1
        every = group["stabilize"]
        return every is not None and bool(stacks or generic) and group["step"] % every == 0


def _sgd_direction(
    buffer: Tensor | None, grad: Tensor, group: dict[str, Any], started: bool
) -> Tensor:
    """Update the momentum buffer; the direction to go against."""
    if buffer is None:
        return grad
    momentum = float(group["momentum"])
    buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"] if started else 1)
    return torch.add(grad, buffer, alpha=momentum) if group["nesterov"] else buffer
