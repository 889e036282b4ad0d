"""RiemannianSGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import sgd as torch_sgd

from sttp_manifold._geoopt import geoopt
from sttp_manifold.optim._base import FrameOptimizer, detached, retract_
from sttp_manifold.optim._blocks import effective_gradient, number, project_
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

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: weight of the L2 penalty, as in :class:`RiemannianAdam`.
        nesterov: use Nesterov momentum.
        stabilize: put points back on their manifolds every that many steps.
        retraction: as in :class:`RiemannianAdam`; ``"pogo"`` is the published method with the base
            optimizer SGD.
        maximize: ascend.
        foreach: as in :class:`RiemannianAdam`.
        differentiable: plain parameters only.
        fused: plain parameters only.

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
        retraction: str = "newton_schulz",
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
        lr, decay = number(group["lr"]), float(group["weight_decay"])
        retraction, started = group["retraction"], stacks.step > 0
        gradients = stacks.take_apart(
            [
                effective_gradient(p, maximize=group["maximize"], weight_decay=decay)
                for p in stacks.params
            ]
        )
        if group["momentum"] and not stacks.arrays:
            # Zeros, with the whole first gradient added: torch's first step.
            zeros = [torch.zeros_like(p.detach()) for p in stacks.params]
            stacks.arrays["momentum_buffer"] = stacks.stack(zeros)
            started = False
        momenta = stacks.arrays.get("momentum_buffer", [])
        for k in stacks.frames:
            X, grad = stacks.points(k), stacks.join(gradients[k], k)
            if retraction != "pogo":
                project_(X, grad)
            buffer = momenta[k] if group["momentum"] else None
            direction = _sgd_direction(buffer, grad, group, started)
            X = retract_(retraction, X, direction, -lr, look=None)
            if buffer is not None and retraction != "pogo":
                project_(X, buffer)
            stacks.put_points(k, X)
        c = stacks.coordinates
        if c is not None:
            buffer = momenta[c] if group["momentum"] else None
            direction = _sgd_direction(buffer, stacks.join(gradients[c], c), group, started)
            x = stacks.points(c)
            if isinstance(lr, Tensor):
                x.sub_(direction * lr)
            else:
                x.sub_(direction, alpha=lr)
            stacks.put_points(c, x)

    def _stays(self, group: dict[str, Any], p: Tensor) -> bool:
        # torch's SGD has no flag that would tell: it is captured as it is.
        return p.device.type != "cpu"

    def _steps_of(self, group: dict[str, Any], p: Tensor) -> float:
        # Only whether there is momentum already matters.
        return float("momentum_buffer" in self.state[p])

    def _lend(self, group: dict[str, Any], stacks: Stacks) -> None:
        states = [self.state[p] for p in stacks.params]
        if "momentum_buffer" in states[0]:
            buffers = [state["momentum_buffer"] for state in states]
            stacks.arrays["momentum_buffer"] = stacks.stack(buffers)

    def _step_generic(self, group: dict[str, Any], p: Tensor) -> None:
        manifold, x, lr = p.manifold, p.detach(), number(group["lr"])  # type: ignore[attr-defined]
        grad = effective_gradient(
            p, maximize=group["maximize"], weight_decay=float(group["weight_decay"])
        )
        grad = manifold.egrad2rgrad(x, grad)
        if not group["momentum"]:
            x.copy_(manifold.retr(x, -lr * grad))
            return
        started = "momentum_buffer" in self.state[p]
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(x))
        direction = _sgd_direction(buffer, grad, group, started)
        point, transported = manifold.retr_transp(x, -lr * direction, buffer)
        x.copy_(point)
        buffer.copy_(transported)

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
