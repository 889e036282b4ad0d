"""RiemannianMuon."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.frames.retractions import Retraction
from sttp_manifold.manifolds.contract import HasSteepest
from sttp_manifold.optim._base import detached
from sttp_manifold.optim._blocks import decay_gradient, number, project_, working_dtype
from sttp_manifold.optim._direction import steepest_direction
from sttp_manifold.optim._fused_rules import Rule, muon_rule
from sttp_manifold.optim._generic import Points
from sttp_manifold.optim._gradients import Gradients
from sttp_manifold.optim._moments import accumulate, correction
from sttp_manifold.optim._muon_settings import check_muon_settings, torch_muon
from sttp_manifold.optim._settings import SettingError
from sttp_manifold.optim._stacks import Block, Stacks
from sttp_manifold.optim.adam import RiemannianAdam

__all__ = ["RiemannianMuon"]

# What a projection onto the tangent space leaves of a normal gradient, in roundings.
_ROUNDINGS = 8.0
# torch.optim.Muon's own defaults, which its function has not.
_TORCH_MUON: dict[str, Any] = dict(
    ns_coefficients=(3.4445, -4.775, 2.0315), ns_steps=5, eps=1e-7, adjust_lr_fn=None
)


class RiemannianMuon(RiemannianAdam):
    r"""Muon on the manifold: steepest descent of frames in the spectral norm, all else by Adam.

    Muon (Jordan et al. 2024) moves a matrix along the polar factor of its momentum, the steepest
    direction in the spectral norm. Here the direction is the steepest among the tangent vectors at
    a frame ``X``, for which there is a formula: with momentum ``M``, projected and carried along as
    in :class:`RiemannianAdam`, it is :math:`D = \operatorname{msign}(M X^T - X M^T) X`, by matrix
    products only. A step turns ``X`` by the angle ``lr``, the same for every column unless ``d`` or
    the rank of ``M`` is too small, and for frames of every shape: a rate that is right for one
    layer is right for the others. No principal angle between the old span and the new is larger.
    The size of a gradient does not matter; where it is zero, or normal to the manifold but for
    rounding errors, the frame rests.

    Warning:
        However small the gradient, a step turns the frame by the angle ``lr``. At a fixed rate the
        iterates end in circles of about that angle around a minimum and come no closer. Problems
        that have an exact solution (completion to a residual of 1e-10) need a rate that decays to
        zero, as by :class:`torch.optim.lr_scheduler.CosineAnnealingLR`, or another method, as
        :func:`minimize` or :class:`RiemannianAdam`.

    Points of :class:`sttp_manifold.FixedTTRankManifold` are weights rather than frames. Their step
    is the polar factor of the momentum as a matrix, projected onto the tangent space (Riemannion,
    Bogachev et al. 2025, arXiv 2507.12142, of tensor trains), and ``lr`` is its spectral norm: how
    much ``W`` changes. ``weight_decay`` is of ``W`` there as well.

    Whatever is neither moves by Adam: spectra, biases, plain parameters, and points of other
    manifolds, these by :class:`RiemannianAdam`.

    Args:
        params: parameters or groups of them.
        lr: the angle of a step in radians, a number up to :math:`\pi/2` or a tensor of one element.
        momentum: decay of the momentum, in [0, 1).
        nesterov: look ahead by one step of the momentum.
        adam_lr: learning rate of what moves by Adam, at the ``lr`` that its group began with:
            whoever changes ``lr``, as schedulers do, changes it in proportion. None for ``lr``.
        adam_betas: decays of Adam's moments.
        adam_eps: added to Adam's denominator.
        weight_decay: decoupled, as in AdamW: each step takes ``weight_decay`` times its learning
            rate off a plain parameter. Of a spectral tensor train it is the weight ``W`` that
            decays, through its spectrum: frames have no size that could.
        plain_matrices: ``"adam"``; or ``"muon"``, by which plain real parameters of two dimensions
            move as by :class:`torch.optim.Muon`, with ``lr``, ``momentum``, ``nesterov`` and
            ``weight_decay`` of their group. Embeddings and last layers belong in a group without.
        stabilize: put points back on their manifolds every that many steps; not needed for frames.
        retraction: as in :class:`RiemannianAdam`, but ``"pogo"``. By Cayley transforms ``lr`` is
            the angle to second order; by the others it is the angle.
        maximize: ascend.
        foreach: as in :class:`RiemannianAdam`.
        capturable: as in :class:`RiemannianAdam`.
        fused: as in :class:`RiemannianAdam`; the direction is computed in the kernel as well, of
            frames of all shapes by polynomials of matrices of order ``2 r``, and equals that of the
            CPU to 1e-4. Not with ``plain_matrices="muon"``, of which torch has no fused kernel.

    Raises:
        OptimizerError: for settings out of range (also a ``ValueError``), for ``capturable`` or
            ``fused`` where :class:`RiemannianAdam` has none or with ``plain_matrices="muon"``, for
            ``fused`` with ``foreach``, for ``plain_matrices="muon"`` before torch 2.9, for
            ``"pogo"``, and for sparse gradients.

    Example:
        >>> import torch, sttp_manifold as sm
        >>> layer = sm.nn.SpectralLinear(12, 10, rank=3, method="riemannian")
        >>> opt = RiemannianMuon(layer.parameters(), lr=3e-2, adam_lr=1e-3)
        >>> layer(torch.ones(12)).square().sum().backward()
        >>> opt.step()
    """

    _second_moment = "frame"  # none of its entries: only spectra have one

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-2,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        adam_lr: float | Tensor | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        plain_matrices: str = "adam",
        stabilize: int | None = None,
        retraction: str | Retraction = "newton_schulz",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._retraction, self._stabilize = retraction, stabilize
        settings: dict[str, Any] = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            adam_lr=adam_lr,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            weight_decay=weight_decay,
            plain_matrices=plain_matrices,
            stabilize=stabilize,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        check_muon_settings(type(self).__name__, settings, look=True)
        # Those of Adam that a state of torch's brings in any case.
        fixed = dict(amsgrad=False, differentiable=False, decoupled_weight_decay=True)
        # Past the __init__ of Adam, which has other settings.
        torch.optim.Optimizer.__init__(self, params, {**settings, **fixed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        Raises:
            OptimizerError: as at construction.
        """
        super().add_param_group(param_group)
        self._complete(self.param_groups[-1])

    def _complete(self, group: dict[str, Any]) -> dict[str, Any]:
        lr = group["lr"]
        group.setdefault("starting_lr", lr.clone() if isinstance(lr, Tensor) else lr)
        return super()._complete(group)

    def _refuse(self, group: dict[str, Any], *, look: bool = True) -> None:
        name = type(self).__name__
        check_muon_settings(name, group, look=look)
        super()._refuse(group, look=look)
        if not self._retraction_in(group).tangent:
            raise SettingError(
                f"{name} got retraction={group['retraction']!r}, which moves along Euclidean "
                f"directions, while its own are tangent; call {name}(params, lr=...) for "
                f"retraction='newton_schulz'"
            )

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        matrices = []
        if group["plain_matrices"] == "muon":
            matrices = [p for p in params if p.ndim == 2 and not p.is_complex()]
        if matrices:
            self._step_matrices(group, matrices)
        chosen = set(map(id, matrices))
        others = [p for p in params if id(p) not in chosen]
        if not others:
            return
        for p in others:
            if "momentum_buffer" in self.state[p]:
                self.state[p].clear()  # from before the rule of its group was changed
        adam = self._adam_group(group)
        decay = adam.pop("weight_decay")
        if decay:
            # By hand: Adam of torch 2.6 has no decoupled decay.
            kept = 1 - adam["lr"] * decay
            torch._foreach_mul_(detached(others), kept)
        super()._step_plain({**adam, "weight_decay": 0, "decoupled_weight_decay": False}, others)

    def _step_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        gradients = [-p.grad if group["maximize"] else p.grad for p in params]  # type: ignore[operator]
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state.clear()
                # Adam's loading asks for a count.
                state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p.detach()))
            state["step"] += 1
            buffers.append(state["momentum_buffer"])
        assert torch_muon is not None
        torch_muon(
            detached(params),
            gradients,
            buffers,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            has_complex=False,
            **_TORCH_MUON,
        )

    def _step_framed(self, group: dict[str, Any], stacks: Stacks) -> None:
        look = False if group["capturable"] else None
        lr, momentum = number(group["lr"], look=look is None), float(group["momentum"])
        retraction = self._retraction_in(group)
        gradients = Gradients(stacks, maximize=group["maximize"])
        penalties: list[list[Tensor]] = []
        if group["weight_decay"]:
            penalties = stacks.take([decay_gradient(p) for p in stacks.params])
        for k, block in enumerate(stacks.blocks):
            X, gradient = block.fetch(stacks.points[k]), gradients.of(block, k)
            points, coordinates = block.views(X)
            moments, _ = block.kept("exp_avg")
            moved = []
            for x, grad, m in zip(points, block.views(gradient)[0], moments, strict=True):
                rests = _project_at_rest(x, grad)
                m.lerp_(grad, 1 - momentum)
                ahead = grad.lerp_(m, momentum) if group["nesterov"] else m
                D = steepest_direction(x, ahead).masked_fill_(rests, 0)
                y = _turned(retraction, x, D, lr, look=look)
                project_(y, m)
                moved.append(y)
            if block.coordinates:
                grad = block.views(gradient)[1]
                penalty = block.views(block.fetch(penalties[k]))[1] if penalties else None
                adam = self._adam_group(group)
                self._step_coordinates(adam, block, coordinates, grad, penalty, stacks.step + 1)
            block.scalars.pop("step", None)
            block.put(block.join(moved, coordinates), stacks.points[k])

    def _step_coordinates(
        self,
        adam: dict[str, Any],
        block: Block,
        x: Tensor,
        grad: Tensor,
        penalty: Tensor | None,
        steps: float | Tensor,
    ) -> None:
        """Adam for what is no frame, in place."""
        beta1, beta2 = map(number, adam["betas"])
        lr = number(adam["lr"], look=not adam["capturable"])
        first, second = block.kept("exp_avg")[1], block.parts(block.scalars["exp_avg_sq"])[1]
        if penalty is not None:
            x.sub_(penalty.mul_(lr), alpha=adam["weight_decay"])
        first.mul_(beta1).add_(grad.mul(1 - beta1))
        accumulate(second, grad, beta2)
        if adam["capturable"]:
            steps = block.parts(block.scalars["step"])[1]
        scale = second.div(correction(beta2, steps)).sqrt_().add_(adam["eps"]).reciprocal_()
        scale = scale.mul_(lr).div_(correction(beta1, steps))
        x.sub_(first * scale.to(first.dtype))

    def _step_generic(self, group: dict[str, Any], points: Points) -> None:
        if not isinstance(points.manifold, HasSteepest):
            super()._step_generic(self._adam_group(group), points)
            return
        lr, momentum = number(group["lr"]), float(group["momentum"])
        states = [self.state[p] for p in points.params]
        for p, state in zip(points.params, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(p.detach(), dtype=working_dtype(p))
            state["step"] += 1
        kept = [state["exp_avg"] for state in states]
        m = points.take(kept)
        grad = points.gradient(maximize=group["maximize"], weight_decay=0.0)
        m.lerp_(grad, 1 - momentum)
        ahead = grad.lerp(m, momentum) if group["nesterov"] else m
        direction = points.manifold.steepest(points.x, ahead)
        if group["weight_decay"]:
            direction = direction + points.decay(float(group["weight_decay"]))
        points.move(-lr * direction, m)
        points.give(m, kept)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Plain parameters decay before torch's kernel, which would leave the step out.
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """As there."""

    def _fused_rule(self, group: dict[str, Any], state: dict[str, Any]) -> Rule:
        return muon_rule(group)

    def _fused_rates(self, group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        return group["lr"], self._adam_group(group)["lr"]

    def _adam_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of a group for what moves by Adam, under Adam's names."""
        lr: Any = number(group["lr"], look=False)
        if group["adam_lr"] is not None:
            start = number(group["starting_lr"], look=False)
            if isinstance(start, Tensor):
                scheduled: Any = torch.where(start == 0, 1.0, lr / start)
            else:
                scheduled = lr / start if start else 1.0
            lr = number(group["adam_lr"], look=False) * scheduled
        return {**group, "lr": lr, "betas": group["adam_betas"], "eps": group["adam_eps"]}


def _project_at_rest(X: Tensor, G: Tensor) -> Tensor:
    """Project gradients in place; where nothing is left, or rounding errors only.

    Of all sizes alike, these must not become a step. Sums of what is nearly infinite do not
    overflow.

    Shape:
        - X, G: ``(n, d, r)``
        - Output: ``(n, 1, 1)``
    """
    number = torch.finfo(G.dtype)
    size = G.abs().amax((1, 2), keepdim=True)
    G.div_(torch.where(size == 0, 1, size))
    project_(X, G)
    rests = G.abs().amax((1, 2), keepdim=True) <= _ROUNDINGS * number.eps
    G.mul_(size.clamp_(max=number.max / (8 * G.shape[1])))
    return rests


def _turned(
    retraction: Retraction, X: Tensor, D: Tensor, angle: float | Tensor, *, look: bool | None
) -> Tensor:
    """Turn frames by an angle against ``D``; what is in their memory is of no use afterwards."""
    functions: Any = torch if isinstance(angle, Tensor) else math
    if retraction.of_sum is None:
        return retraction.step(X, D, -2 * functions.tan(angle / 2), look=look)
    # These reach the same point from any multiple; this one is a frame but for roundings.
    cos, sin = functions.cos(angle), functions.sin(angle)
    return retraction.step(X.mul_(cos), D, -sin, look=look)
