"""RiemannianAdam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import adam as torch_adam

from sttp_manifold._geoopt import geoopt
from sttp_manifold.frames.retractions import Retraction
from sttp_manifold.optim._base import FrameOptimizer, detached
from sttp_manifold.optim._blocks import (
    decay_gradient,
    number,
    project_,
    scalars_shape,
    shortened,
)
from sttp_manifold.optim._fused_rules import Rule, adam_rule
from sttp_manifold.optim._generic import Points, adam_step
from sttp_manifold.optim._gradients import Gradients
from sttp_manifold.optim._moments import (
    accumulate,
    betas,
    complete_state,
    correction,
    elementwise,
    framewise,
    is_bounded,
    is_decoupled,
    is_elementwise,
    refuse_kind,
    weight,
)
from sttp_manifold.optim._reach import keep_within, reach_of
from sttp_manifold.optim._settings import check_settings
from sttp_manifold.optim._stacks import Block, Stacks

__all__ = ["RiemannianAdam"]


class RiemannianAdam(FrameOptimizer, geoopt.optim.RiemannianAdam):
    r"""Adam for any mixture of plain and manifold parameters.

    Plain parameters get exactly :class:`torch.optim.Adam`. The mathematics for manifold parameters
    is that of Becigneul & Ganea 2019, "Riemannian Adaptive Optimization Methods", with a second
    moment for each entry of a frame, which trains networks better; ``second_moment="frame"`` has
    one for each frame, as in geoopt, and wants three to ten times the rate. On an accelerator a
    step never waits for the device, unless for a manifold that geoopt's own operations move. With
    a second moment a frame no frame moves farther in a step than
    ``lr (1 - beta1) / sqrt((1 - beta2) (1 - beta1**2 / beta2))``, 7.3 ``lr`` by default; where that
    is 0.7 at most, no factorization stands by, from the second step on.

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
        fused: for plain parameters as in torch. For manifold parameters one kernel makes the whole
            step of all frames of a width, where Triton is there and the parameters are on CUDA, in
            float32 or half precision, of at most 128 columns, on manifolds of this package or
            ``EuclideanStiefel``, retracted by ``"newton_schulz"``, without ``stabilize``. None:
            there alone, unless ``foreach`` is given. True: an error elsewhere.
        decoupled_weight_decay: decay outside of the moments, as AdamW does.
        second_moment: what a second moment is of, in frames. ``"elementwise"``: of each entry, as
            Adam has it, and the quotient is projected onto the tangent space: a step depends on
            the basis, as in Adam on a chart. ``"frame"``: of the norm of the gradient of each
            frame, as in geoopt: a step is along the momentum, the same in every basis, and the
            state half as large. None: of each entry, unless the retraction takes directions that
            are not tangent, as ``"pogo"``, for which the quotient of entries has no meaning.
            Spectra are stepped entry by entry in both; other manifolds have their own. A state
            that is loaded brings its kind along; one that does not say, as geoopt's, is of frames.

    Raises:
        OptimizerError: for settings out of range (also a ``ValueError``), for ``differentiable``
            or ``fused`` with manifold parameters, for ``capturable`` with those of other manifolds
            or with ``stabilize``, for an unknown retraction, for second moments of entries with
            one that takes directions that are not tangent, and for sparse gradients.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = RiemannianAdam(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(3)).sum().backward()
        >>> opt.step()
    """

    _momentum_key: ClassVar[str] = "exp_avg"
    _second_moment: str | None = None  # lost by pickling, as the others

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
        second_moment: str | None = None,
    ) -> None:
        self._retraction, self._second_moment = retraction, second_moment
        # torch 2.6 does not know this flag, and needs not when it is off.
        decoupled = {"decoupled_weight_decay": True} if decoupled_weight_decay else {}
        settings: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings |= dict(amsgrad=amsgrad, stabilize=stabilize, maximize=maximize, foreach=foreach)
        settings |= dict(capturable=capturable, differentiable=differentiable, fused=fused)
        kind = {} if second_moment is None else {"second_moment": second_moment}
        more = {**settings, **kind, "decoupled_weight_decay": decoupled_weight_decay}
        check_settings(type(self).__name__, more)
        super().__init__(params, **settings, **decoupled)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, and raise for what its parameters cannot honour."""
        if param_group.setdefault("second_moment", self._second_moment) is None:
            tangent = self._retraction_in({"retraction": self._retraction, **param_group}).tangent
            param_group["second_moment"] = "elementwise" if tangent else "frame"
        super().add_param_group(param_group)

    def _refuse(self, group: dict[str, Any], *, look: bool = True) -> None:
        super()._refuse(group, look=look)
        refuse_kind(type(self).__name__, group, tangent=self._retraction_in(group).tangent)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._second_moment = self.param_groups[0]["second_moment"]

    def _complete(self, group: dict[str, Any]) -> dict[str, Any]:
        group.setdefault("second_moment", "frame")  # geoopt's, and ours of when there was no other
        return super()._complete(group)

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
        decoupled = {"decoupled_weight_decay": True} if is_decoupled(group) else {}
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
        decay, decoupled = float(group["weight_decay"]), is_decoupled(group)
        lr = number(group["lr"], look=not capturable)
        gradients = Gradients(
            stacks, maximize=group["maximize"], weight_decay=0.0 if decoupled else decay
        )
        bounded = is_bounded(*betas(group))
        reach = reach_of(stacks, retraction, betas(group), lr, elementwise=is_elementwise(group))
        penalties: list[list[Tensor]] = []
        if decay and decoupled:
            penalties = stacks.take([decay_gradient(p) for p in stacks.params])
        for k, block in enumerate(stacks.blocks):
            X = block.fetch(stacks.points[k])
            points, coordinates = block.views(X)
            self._update_moments(group, block, points, gradients.of(block, k), retraction)
            directions, rest, scales, last = self._steps_of_block(
                group, block, points, stacks.step, lr
            )
            if reach is not None:
                scales = keep_within(block, directions, scales, reach)
            moved = []
            moments = block.kept("exp_avg")[0]
            for x, u, m, scale in zip(points, directions, moments, scales, strict=True):
                if not bounded:
                    scale = shortened(u, scale)
                y = retraction.step(x, u, scale, look=False if capturable else None, reach=reach)
                if retraction.tangent:
                    project_(y, m)
                moved.append(y)
            if block.coordinates:
                if penalties:
                    penalty = block.views(block.fetch(penalties[k]))[1]
                    coordinates.sub_(penalty * lr, alpha=decay)
                if isinstance(last, Tensor):
                    coordinates.addcmul_(rest, last)
                else:
                    coordinates.add_(rest, alpha=last)
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
        beta1, beta2 = betas(group)
        gradients, coordinates = block.views(gradient)
        norms, magnitudes = block.norm_views
        per_frame = not is_elementwise(group)
        for x, g, norm in zip(points, gradients, norms, strict=True):
            if retraction.tangent:
                # Its norm is not taken from |G|^2 - |sym X^T G|^2, which loses all digits near a
                # minimum where G is normal.
                project_(x, g)
            if per_frame:
                torch.linalg.vector_norm(g, dim=(1, 2), out=norm)
        block.arrays["exp_avg"].lerp_(gradient, weight(beta1, gradient))
        if not per_frame:
            accumulate(block.arrays["exp_avg_sq"], gradient, beta2)
            return
        if block.coordinates:
            torch.abs(coordinates, out=magnitudes)
        accumulate(block.scalars["exp_avg_sq"], block.norms, beta2)

    def _steps_of_block(
        self,
        group: dict[str, Any],
        block: Block,
        points: list[Tensor],
        taken: float,
        lr: float | Tensor,
    ) -> tuple[list[Tensor], Tensor, list[Any], Any]:
        """Directions of frames and of coordinates, and what to multiply each with."""
        steps = block.scalars.pop("step") if group["capturable"] else taken + 1
        if not is_elementwise(group):
            directions, rest = block.kept("exp_avg")
            return directions, rest, *block.parts(framewise(group, block, steps, lr))
        beta1, beta2 = betas(group)
        flat, factor = elementwise(
            block,
            steps,
            beta2,
            group["eps"],
            peak=group["amsgrad"],
            bounded=is_bounded(beta1, beta2),
        )
        directions, rest = block.views(flat)
        for x, u in zip(points, directions, strict=True):
            project_(x, u)
        scale = -lr * factor / correction(beta1, steps)
        if not isinstance(steps, Tensor):
            return directions, rest, [scale] * len(directions), scale
        assert isinstance(scale, Tensor)
        return directions, rest, *block.parts(scale.to(flat.dtype))

    def _fits(self, group: dict[str, Any], stacks: Stacks) -> bool:
        if stacks.stays:
            return True
        return ("exp_avg_sq" in stacks.blocks[0].arrays) == is_elementwise(group)

    def _fused_rule(self, group: dict[str, Any], state: dict[str, Any]) -> Rule:
        return adam_rule(group)

    def _stays(self, group: dict[str, Any], p: Tensor) -> bool:
        return bool(group["capturable"])

    def _steps_of(self, group: dict[str, Any], p: Tensor) -> float:
        if group["capturable"]:
            return 0.0  # each frame has a count of its own, on its device
        return float(self.state[p]["step"]) if self.state[p] else 0.0

    def _lend(self, group: dict[str, Any], stacks: Stacks) -> None:
        per_frame = not is_elementwise(group)
        states = [
            self._state_of(group, p, scalars_shape(p) if per_frame else tuple(p.shape))
            for p in stacks.params
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
            stacks.lend(name, [state[name] for state in states], scalars=per_frame)
        if stacks.stays:
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, 1)
            repeated = [
                count.expand(scalars_shape(p))
                for count, p in zip(counts, stacks.params, strict=True)
            ]
            stacks.lend("step", repeated, scalars=True)
            for block in stacks.blocks:
                block.scalars["step"] = block.scalars["step"].to(stacks.dtype)

    def _unstack(self, stacks: Stacks) -> None:
        if not stacks.stays:
            for p in stacks.params:
                self.__dict__["state"][p]["step"] = torch.tensor(stacks.step)
        super()._unstack(stacks)

    def _step_generic(self, group: dict[str, Any], points: Points) -> None:
        states = [self._state_of(group, p, tuple(p.shape)) for p in points.params]
        for state in states:
            state["step"] += 1
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        kept = {name: points.take([state[name] for state in states]) for name in names}
        adam_step(points, kept, float(states[0]["step"]), group)
        for name, array in kept.items():
            points.give(array, [state[name] for state in states])

    def _state_of(self, group: dict[str, Any], p: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        complete_state(state, p, shape, capturable=group["capturable"], peak=group["amsgrad"])
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
