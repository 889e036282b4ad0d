"""RiemannianAdam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import adam as torch_adam

from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.retractions import Retraction
from sttp_manifold.optim._base import FrameOptimizer, Gradients, detached
from sttp_manifold.optim._blocks import (
    compress_scalars,
    decay_gradient,
    number,
    project_,
    scalars_shape,
    shortened,
    working_dtype,
)
from sttp_manifold.optim._generic import move, riemannian_gradient, squared
from sttp_manifold.optim._settings import check_settings
from sttp_manifold.optim._stacks import Block, Stacks

__all__ = ["RiemannianAdam"]


class RiemannianAdam(FrameOptimizer, geoopt.optim.RiemannianAdam):
    r"""Adam for any mixture of plain and manifold parameters.

    Plain parameters get exactly :class:`torch.optim.Adam`. The mathematics for manifold parameters
    is that of Becigneul & Ganea 2019, "Riemannian Adaptive Optimization Methods", as in geoopt,
    with second moments per frame: at equal ``lr`` the step is not that of Adam. On an accelerator a
    step never waits for the device, unless for a manifold that geoopt's own operations move.

    A second moment that overflows is infinite from then on, as in torch, and its frame rests.
    Moments of manifold parameters in half precision are kept in float32.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one element, which the host does not read where
            it lies on an accelerator, nor anywhere if ``capturable``.
        betas: decay of the momentum and of the second moment.
        eps: added to the denominator.
        weight_decay: weight of the L2 penalty: :math:`\frac12 |W|_F^2` for a spectral tensor
            train, which decays the spectrum and leaves the frames alone; half the squared norm of
            the coordinates, projected, on other manifolds.
        amsgrad: use the largest second moment so far.
        stabilize: put points back on their manifolds every that many steps. Not needed for the
            frames of this package, which are orthonormal after every step. Not with ``capturable``
            manifold parameters: the host counts the steps.
        maximize: ascend.
        foreach: for plain parameters as in torch; for manifold parameters ``False`` keeps each
            to itself, instead of batching equal frames over parameters.
        retraction: how frames move. ``"newton_schulz"``: to the nearest frame, by products only,
            and by Cholesky QR where the step is too long for them; ``"polar"``: to the nearest
            frame at any length; ``"qr"``: to the Q factor, which is geoopt's; ``"cayley"``: along
            a Cayley transform; ``"pogo"``: by the step of Javaloy & Vergari 2026, without
            projection or transport, moments being Euclidean, and with as many terms of its
            correction as the length of the step asks for, where the published one is lost at long
            steps. Or a :class:`~sttp_manifold.frames.retractions.Retraction`. Other manifolds have
            their own.
        capturable: as in torch, that a step can be captured as a graph of kernels: counts are kept
            on the device, and the state of every parameter at one address. For the manifolds of
            this package and ``EuclideanStiefel``, also on the CPU, where torch refuses it.
        differentiable: plain parameters only.
        fused: plain parameters only.
        decoupled_weight_decay: decay outside of the moments, as AdamW does.

    Raises:
        OptimizerError: for settings out of range (also a ``ValueError``), for ``differentiable``
            or ``fused`` with manifold parameters, for ``capturable`` with those of other manifolds
            or with ``stabilize``, for an unknown retraction, and for sparse gradients.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = RiemannianAdam(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(3)).sum().backward()
        >>> opt.step()
    """

    _momentum_key: ClassVar[str] = "exp_avg"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        stabilize: int | None = None,
        retraction: str | Retraction = "newton_schulz",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._retraction = retraction
        # torch 2.6 does not know this flag, and needs not when it is off.
        decoupled = {"decoupled_weight_decay": True} if decoupled_weight_decay else {}
        settings: dict[str, Any] = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            stabilize=stabilize,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        check_settings(
            type(self).__name__, {**settings, "decoupled_weight_decay": decoupled_weight_decay}
        )
        super().__init__(params, **settings, **decoupled)

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
        # torch asks before each of its own steps whether this one may be captured.
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(self, name):
                getattr(self, name)()
                break
        return self._run(closure)

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lists: tuple[list[Tensor], ...] = tuple([] for _ in range(6))
        has_complex = self._init_group({**group, "params": params}, *lists)
        points, *others = lists
        adam: Any = torch_adam.adam
        decoupled = {"decoupled_weight_decay": True} if _decoupled(group) else {}
        # The differentiable flag of torch asks for gradients through the step.
        with torch.set_grad_enabled(group["differentiable"]):
            adam(
                points if group["differentiable"] else detached(points),
                *others,
                amsgrad=group["amsgrad"],
                has_complex=has_complex,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=group["differentiable"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                **decoupled,
            )

    def _step_framed(self, group: dict[str, Any], stacks: Stacks) -> None:
        retraction, capturable = self._retraction_in(group), bool(group["capturable"])
        decay, decoupled = float(group["weight_decay"]), _decoupled(group)
        lr = number(group["lr"], look=not capturable)
        gradients = Gradients(
            stacks, maximize=group["maximize"], weight_decay=0.0 if decoupled else decay
        )
        bounded = _is_bounded(*_betas(group))
        penalties: list[list[Tensor]] = []
        if decay and decoupled:
            penalties = stacks.take([decay_gradient(p) for p in stacks.params])
        for k, block in enumerate(stacks.blocks):
            X = block.fetch(stacks.points[k])
            points, coordinates = block.views(X)
            self._update_moments(group, block, points, gradients.of(block, k), retraction)
            scales, last = block.parts(self._scale(group, block, stacks.step, lr))
            moments, rest = block.kept("exp_avg")
            moved = []
            for x, m, scale in zip(points, moments, scales, strict=True):
                if not bounded:
                    scale = shortened(m, scale)
                y = retraction.step(x, m, scale, look=False if capturable else None)
                if retraction.tangent:
                    project_(y, m)
                moved.append(y)
            if block.coordinates:
                if penalties:
                    penalty = block.views(block.fetch(penalties[k]))[1]
                    coordinates.sub_(penalty * lr, alpha=decay)
                coordinates.addcmul_(rest, last)
            block.put(block.join(moved, coordinates), stacks.points[k])

    def _update_moments(
        self,
        group: dict[str, Any],
        block: Block,
        points: list[Tensor],
        gradient: Tensor,
        retraction: Retraction,
    ) -> None:
        """Take a Euclidean gradient into the moments."""
        beta1, beta2 = _betas(group)
        gradients, coordinates = block.views(gradient)
        norms, magnitudes = block.norm_views
        for x, g, norm in zip(points, gradients, norms, strict=True):
            if retraction.tangent:
                # Its norm is not taken from |G|^2 - |sym X^T G|^2, which loses all digits near a
                # minimum where G is normal.
                project_(x, g)
            torch.linalg.vector_norm(g, dim=(1, 2), out=norm)
        if block.coordinates:
            torch.abs(coordinates, out=magnitudes)
        block.arrays["exp_avg"].lerp_(gradient, _weight(beta1, gradient))
        _accumulate(block.scalars["exp_avg_sq"], block.norms, beta2)

    def _scale(
        self, group: dict[str, Any], block: Block, steps_taken: float, lr: float | Tensor
    ) -> Tensor:
        """What each momentum is to be multiplied with."""
        beta1, beta2 = _betas(group)
        second = block.scalars["exp_avg_sq"]
        if group["amsgrad"]:
            if "max_exp_avg_sq" not in block.scalars:
                block.scalars["max_exp_avg_sq"] = torch.zeros_like(second)
            peak = block.scalars["max_exp_avg_sq"]
            second = torch.maximum(peak, second, out=peak)
        capturable = bool(group["capturable"])
        steps = block.scalars.pop("step") if capturable else steps_taken + 1
        scale = second.div(_correction(beta2, steps)).sqrt_().add_(group["eps"]).reciprocal_()
        if isinstance(lr, Tensor) or capturable:
            scale.mul_(lr).div_(_correction(beta1, steps)).neg_()
            return scale.to(second.dtype)
        return scale.mul_(-lr / _correction(beta1, steps))

    def _stays(self, group: dict[str, Any], p: Tensor) -> bool:
        return bool(group["capturable"])

    def _steps_of(self, group: dict[str, Any], p: Tensor) -> float:
        if group["capturable"]:
            return 0.0  # each frame has a count of its own, on its device
        return float(self.state[p]["step"]) if self.state[p] else 0.0

    def _lend(self, group: dict[str, Any], stacks: Stacks) -> None:
        shapes = [scalars_shape(p) for p in stacks.params]
        states = [
            self._state_of(group, p, shape) for p, shape in zip(stacks.params, shapes, strict=True)
        ]
        stacks.lend("exp_avg", [state["exp_avg"] for state in states])
        names = ["exp_avg_sq"]
        if any("max_exp_avg_sq" in state for state in states):
            # Some have it from when amsgrad was on, which others have not seen.
            names.append("max_exp_avg_sq")
            for state in states:
                if "max_exp_avg_sq" not in state:
                    state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        for name in names:
            stacks.lend(name, [state[name] for state in states], scalars=True)
        if stacks.stays:
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, 1)
            repeated = [count.expand(shape) for count, shape in zip(counts, shapes, strict=True)]
            stacks.lend("step", repeated, scalars=True)
            for block in stacks.blocks:
                block.scalars["step"] = block.scalars["step"].to(stacks.dtype)

    def _unstack(self, stacks: Stacks) -> None:
        if not stacks.stays:
            for p in stacks.params:
                self.__dict__["state"][p]["step"] = torch.tensor(stacks.step)
        super()._unstack(stacks)

    def _step_generic(self, group: dict[str, Any], p: Tensor) -> None:
        x, lr = p.detach().to(working_dtype(p)), number(group["lr"])
        manifold = p.manifold  # type: ignore[attr-defined]
        decay, (beta1, beta2) = float(group["weight_decay"]), _betas(group)
        state = self._state_of(group, p, tuple(p.shape))
        state["step"] += 1
        step = float(state["step"])
        coupled = 0.0 if _decoupled(group) else decay
        grad = riemannian_gradient(p, maximize=group["maximize"], weight_decay=coupled)
        momentum, second = state["exp_avg"], state["exp_avg_sq"]
        momentum.mul_(beta1).add_((1 - beta1) * grad)
        second.mul_(beta2).add_((1 - beta2) * squared(p, grad))
        if group["amsgrad"]:
            second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
        denominator = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
        direction = momentum.div(1 - beta1**step) / denominator
        if decay and _decoupled(group):
            penalty = decay_gradient(p).to(x.dtype)
            direction = direction + manifold.egrad2rgrad(x, decay * penalty)
        move(p, -lr * direction, momentum)

    def _state_of(self, group: dict[str, Any], p: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        amsgrad = group["amsgrad"]
        if not state:
            # On the host unless capturable, as torch has it: reading it there is free.
            device = p.device if group["capturable"] else torch.device("cpu")
            state["step"] = torch.zeros((), device=device)
            state["exp_avg"] = torch.zeros_like(p.detach(), dtype=working_dtype(p))
            state["exp_avg_sq"] = torch.zeros(shape, dtype=working_dtype(p), device=p.device)
        if group["capturable"] and state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in state and state[key].dtype != working_dtype(p):
                # From when moments were kept in half precision, or before the parameter changed.
                state[key] = state[key].to(working_dtype(p))
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if key in state and state[key].shape != shape:
                if state[key].shape != p.shape:
                    raise OptimizerError(
                        f"the optimizer state {key!r} has shape {tuple(state[key].shape)}, but a "
                        f"parameter of shape {tuple(p.shape)} needs {shape}; load_state_dict() "
                        f"takes the state of an optimizer over the same parameters in the same "
                        f"order"
                    )
                state[key] = compress_scalars(p, state[key])
        return state

    def _count_step(
        self, group: dict[str, Any], stacks: list[Stacks], generic: list[Tensor]
    ) -> bool:
        every = group["stabilize"]
        if every is None:
            return False
        steps = [stack.step for stack in stacks]
        steps += [float(self.state[p]["step"]) for p in generic]
        return any(step % every == 0 for step in steps)


def _decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _betas(group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    beta1, beta2 = group["betas"]
    return number(beta1), number(beta2)


def _is_bounded(beta1: float | Tensor, beta2: float | Tensor) -> bool:
    """Whether steps are bounded by the rate: the second moment forgets no sooner than the first."""
    if isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return False
    return beta1 * beta1 <= beta2


def _weight(beta: float | Tensor, like: Tensor) -> float | Tensor:
    """Weight of what is new in a moving average."""
    return 1 - beta.to(like) if isinstance(beta, Tensor) else 1 - beta


def _accumulate(second: Tensor, values: Tensor, beta: float | Tensor) -> None:
    """Moving average of the squares of ``values``, which are of no use afterwards.

    One that has overflowed is infinite from then on, as in torch, and what it belongs to rests; to
    interpolate from infinity would make it NaN.
    """
    if isinstance(beta, Tensor):
        beta = beta.to(second)
        second.mul_(beta).add_(values.square_().mul_(1 - beta))
    elif beta == 0:
        torch.mul(values, values, out=second)
    else:
        second.mul_(beta).addcmul_(values, values, value=1 - beta)


def _correction(beta: float | Tensor, steps: float | Tensor) -> float | Tensor:
    """How much of the weights of a moving average has been given out: ``1 - beta^steps``.

    As ``expm1`` where the steps are counted on the device, since ``1 - beta^steps`` of float32
    begins with four digits.
    """
    if not isinstance(steps, Tensor):
        return 1 - beta**steps
    if isinstance(beta, Tensor):
        return steps.mul(beta.log()).expm1_().neg_()
    return steps.mul(math.log(beta) if beta else -math.inf).expm1_().neg_()
