"""What the two optimizers share: sorting parameters, refusing flags, stacks, stabilizing.

Where the state of framed parameters is: between steps in :class:`~._stacks.Stacks`. Whoever reads
``optimizer.state`` (``state_dict``, ``pickle``, a test, a user) finds it per parameter as torch has
it, and may change it there: the read gives up the stacks, and the next step makes new ones. So
nothing is held twice, and nobody sees a number that is not the current one.

Where a graph of kernels may be captured, a replay knows nothing of reads. There the state is per
parameter at all times, at one address, and is copied into stacks for a step.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import ManifoldTensor
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.orthonormal import polar_factor
from sttp_manifold.frames.retractions import Retraction, project_tangent
from sttp_manifold.manifolds import FixedTTRankManifold
from sttp_manifold.optim._blocks import (
    check_dense,
    frame_views,
    full_precision,
    is_framed,
    is_riemannian,
    scalars_shape,
    working_dtype,
)
from sttp_manifold.optim._carried import carried_state
from sttp_manifold.optim._fused_steps import FusedSteps
from sttp_manifold.optim._generic import Points, batched
from sttp_manifold.optim._settings import SettingError, check_settings, retraction_of
from sttp_manifold.optim._stacks import Stacks
from sttp_manifold.optim.successors import replace_parameters

__all__ = ["FrameOptimizer", "detached"]

_NOT_DIFFERENTIABLE = "the point is replaced in place by its retraction"


class FrameOptimizer(FusedSteps):
    """Mixed into a torch optimizer: the step over plain, framed and generic parameters."""

    _momentum_key: ClassVar[str]
    # Lost by pickling, which keeps defaults, state and groups only.
    _stabilize: int | None = None
    _retraction: str | Retraction = "newton_schulz"
    _stacks: dict[Any, Stacks] | None = None
    _stepping: bool = False
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a ``GradScaler`` may leave unscaling and skipping to the step.

        torch's fused kernels do both. Where any other parameter moves as well, the scaler has to,
        whatever flags the optimizer was made with.
        """
        return all(
            group["fused"] and not any(map(is_riemannian, group["params"]))
            for group in self.param_groups
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Set by torch from the flag of the optimizer, when the groups are not known yet."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State of every parameter, laid out as it is."""
        if self._stacks and not self._stepping:
            for stacks in self._stacks.values():
                self._unstack(stacks)
            self._stacks = None
        kept: defaultdict[Tensor, Any] = self.__dict__["state"]
        return kept

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._stacks = self._fused = None
        self.__dict__["state"] = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._stacks = self._fused = None
        super().__setstate__(state)  # type: ignore[misc]
        for group in self.param_groups:
            self._complete(group)
        self._retraction = self.param_groups[0]["retraction"]

    def _complete(self, group: dict[str, Any]) -> dict[str, Any]:
        """What a state of geoopt's, which has one retraction, or of torch's does not say."""
        group.setdefault("retraction", "qr")
        group.setdefault("stabilize", self._stabilize)
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        Raises:
            OptimizerError: if the group has a setting that no step can use, a flag that its
                manifold parameters cannot honour, or an unknown retraction.
        """
        param_group.setdefault("retraction", self._retraction)
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            self._refuse(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch, but never share memory with the optimizer it came from.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            OptimizerError: if it brings a setting that no step can use, or that the parameters
                here cannot honour; nothing is loaded then.
        """
        saved = state_dict["param_groups"]
        for group, new in zip(self.param_groups, saved, strict=False):
            merged = {**self.defaults, **new, "params": group["params"]}
            self._refuse(self._complete(merged))
        # torch keeps the arrays it is given: two optimizers would write to one momentum.
        super().load_state_dict(copy.deepcopy(state_dict))  # type: ignore[misc]
        for group, new in zip(self.param_groups, saved, strict=True):
            for p, key in zip(group["params"], new["params"], strict=True):
                if is_riemannian(p) and p.dtype != working_dtype(p):
                    # torch has rounded them to the dtype of the parameter.
                    self._restore(self.state[p], state_dict["state"].get(key, {}), p)

    @explained
    def follow(self, model: torch.nn.Module) -> None:
        """Go on with a model whose ranks have changed; see :func:`sttp_manifold.optim.follow`.

        Args:
            model: after ``truncate_``, ``grow_`` or ``switch``.

        Raises:
            OptimizerError: as there; nothing has changed then.
        """
        replace_parameters(self, model, self._carried)

    def _carried(
        self, group: dict[str, Any], old: Tensor, new: Tensor, state: dict[str, Any]
    ) -> dict[str, Any] | None:
        tangent = self._retraction_in(group).tangent
        return carried_state(old, new, state, momentum=self._momentum_key, tangent=tangent)

    @staticmethod
    def _restore(state: dict[str, Any], saved: dict[str, Any], p: Tensor) -> None:
        """Moments as they were saved, for a parameter in half precision."""
        for name, value in saved.items():
            if name != "step" and isinstance(value, Tensor):
                state[name] = value.to(p.device, working_dtype(p), copy=True)

    def _refuse(self, group: dict[str, Any], *, look: bool = True) -> None:
        """Refuse what a group asks for and a step cannot do."""
        name = type(self).__name__
        check_settings(name, group, look=look)
        for key in ("adam_lr", "adam_betas", "adam_eps", "plain_matrices"):
            if key in group and key not in self.defaults:
                raise SettingError(
                    f"{name} got {key}={group[key]!r}, a setting of RiemannianMuon; {name} moves "
                    f"all of a parameter at one rate, as in {name}(params, lr=...)"
                )
        retraction_of(name, group["retraction"])
        asked = [flag for flag in ("capturable", "differentiable", "fused") if group.get(flag)]
        manifold = [p for p in group["params"] if is_riemannian(p)] if asked else []
        if manifold and group.get("capturable"):
            self._refuse_capture(group, manifold)
        why = {"differentiable": _NOT_DIFFERENTIABLE if group.get("differentiable") else None}
        if manifold and group.get("fused"):
            why["fused"] = self._why_not_fused(group, manifold)
        for flag, reason in why.items():
            if manifold and reason is not None:
                raise OptimizerError(
                    f"{name} cannot honour {flag}=True for manifold parameters: {reason}; call "
                    f"{name}(params, lr=...) without it, or {name}([dict(params=plain, "
                    f"{flag}=True), dict(params=manifold)], lr=...) to keep it for the plain "
                    f"parameters"
                )

    def _refuse_capture(self, group: dict[str, Any], params: list[Tensor]) -> None:
        name = type(self).__name__
        kinds = sorted({type(p.manifold).__name__ for p in params if not is_framed(p)})  # type: ignore[attr-defined]
        if kinds:
            raise OptimizerError(
                f"{name} cannot honour capturable=True for parameters on {', '.join(kinds)}: they "
                f"are moved by geoopt's own operations, which may wait for the device; give them "
                f"an optimizer of their own, {name}(those, lr=...), and step it outside of the "
                f"graph"
            )
        if group["stabilize"] is not None:
            raise OptimizerError(
                f"{name} cannot honour stabilize={group['stabilize']} together with "
                f"capturable=True: the host counts the steps, and a captured graph does not ask "
                f"it; call {name}(params, lr=..., capturable=True) without it, and "
                f"optimizer.stabilize() between replays where needed"
            )

    def _run(self, closure: Callable[[], Any] | None) -> Any:
        # Dynamo takes a subclass of Adam for Adam, and would trace the Euclidean step without a
        # word. Outside of it, what keeps it out takes longer than a small network's bookkeeping.
        if torch.compiler.is_compiling():
            return self._step_unseen(closure)
        return self._step_groups(closure)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_unseen(self, closure: Callable[[], Any] | None) -> Any:
        return self._step_groups(closure)

    def _step_groups(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything that can be refused is refused before anything has moved.
        for group in self.param_groups:
            self._refuse(group, look=False)
            check_dense(group["params"], type(self).__name__)
        for group in self.param_groups:
            self._stepping = True
            try:
                stabilize = self._step_group(group)
            finally:
                self._stepping = False
            if stabilize:
                self.stabilize_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> bool:
        """Step one group; whether it is to be stabilized now."""
        plain: list[Tensor] = []
        framed: list[Tensor] = []
        generic: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            kind = plain if not is_riemannian(p) else framed if is_framed(p) else generic
            kind.append(p)
        if plain:
            self._step_plain(group, plain)
        with full_precision(framed + generic):
            if self._takes_fused(group, framed):
                if self._stacks:
                    self._give_up_stacks(group, {id(p) for p in framed})
                self._step_fused(group, framed, self.__dict__["state"])
                framed = []
            stacks = self._stacks_of(group, framed)
            for stack in stacks:
                if stack.stays:
                    self._lend(group, stack)
                self._step_framed(group, stack)
                stack.count_step()
                if stack.stays:
                    self._give_back(stack)
            together = group["foreach"] is not False
            for points in batched(generic, partial(self._steps_of, group), together=together):
                self._step_generic(group, points)
            return self._count_step(group, stacks, generic)

    def _stacks_of(self, group: dict[str, Any], params: list[Tensor]) -> list[Stacks]:
        """Stacks of the framed parameters of a group: those of the last step where they fit."""
        if not params:
            return []
        if self._stacks is None:
            self._stacks = {}
        together = group["foreach"] is not False
        kept = [stacks for key, stacks in self._stacks.items() if key[0] == id(group)]
        held = [p for stacks in kept for p in stacks.params]
        wanted = {id(p) for p in params}
        if (
            (together or len(kept) == len(params))
            and len(held) == len(params)
            and {id(p) for p in held} == wanted
            and all(stacks.is_current() and self._fits(group, stacks) for stacks in kept)
            and all(stacks.stays == self._stays(group, stacks.params[0]) for stacks in kept)
        ):
            return kept
        self._give_up_stacks(group, wanted)
        # Parameters of different step counts move apart: their bias corrections differ.
        sorted_: dict[Any, list[Tensor]] = {}
        for i, p in enumerate(params):
            steps = self._steps_of(group, p)
            own = (steps, p.dtype, p.device, None if together else i)
            sorted_.setdefault(own, []).append(p)
        for own, members in sorted_.items():
            stays = self._stays(group, members[0])
            self._stacks[id(group), own] = stacks = Stacks(members, own[0], stays=stays)
            if not stays:
                self._lend(group, stacks)
                # What is in stacks is not kept a second time.
                for p in members:
                    for name in (*stacks.blocks[0].arrays, *stacks.blocks[0].scalars):
                        self.state[p].pop(name, None)
        return [self._stacks[id(group), own] for own in sorted_]

    def _give_up_stacks(self, group: dict[str, Any], wanted: set[int]) -> None:
        """Unstack a group; also where it has replaced another with the same parameters."""
        for key, stacks in list((self._stacks or {}).items()):
            if key[0] == id(group) or any(id(p) in wanted for p in stacks.params):
                self._unstack(self._stacks.pop(key))  # type: ignore[union-attr]

    def _stays(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether the state of a framed parameter is to stay with it: where graphs are captured."""
        raise NotImplementedError

    def _fits(self, group: dict[str, Any], stacks: Stacks) -> bool:
        """Whether stacks keep the state as the settings of their group ask for it."""
        return True

    def _steps_of(self, group: dict[str, Any], p: Tensor) -> float:
        """How many steps a framed parameter has taken, as far as the host has to know."""
        raise NotImplementedError

    def _lend(self, group: dict[str, Any], stacks: Stacks) -> None:
        """Copy the state of parameters into their stacks, or start it."""
        raise NotImplementedError

    def _give_back(self, stacks: Stacks) -> None:
        """Copy the state of parameters from their blocks to where it is, and empty the blocks."""
        kept: Any = self.__dict__["state"]
        for name in (*stacks.blocks[0].arrays, *stacks.blocks[0].scalars):
            for p in stacks.params:
                if name not in kept[p]:
                    per_frame = name in stacks.blocks[0].scalars
                    shape = scalars_shape(p) if per_frame else p.shape
                    kept[p][name] = torch.empty(shape, dtype=stacks.dtype, device=p.device)
            stacks.give_back(name, [kept[p][name] for p in stacks.params])
        for block in stacks.blocks:
            block.clear()

    def _unstack(self, stacks: Stacks) -> None:
        """Move the state of parameters out of their stacks."""
        if not stacks.stays:  # else there is nothing, unless of a step that failed
            self._give_back(stacks)

    @torch.no_grad()
    def stabilize_group(self, group: dict[str, Any]) -> None:
        """Put the points of a group back on their manifolds, and momentum on the tangent spaces.

        Frames go to the nearest frame (their polar factor), without a singular value
        decomposition unless they are far off.
        """
        for p in group["params"]:
            if not is_riemannian(p):
                continue
            x, momentum = p.detach(), self.state.get(p, {}).get(self._momentum_key)
            if is_framed(p):
                for X in frame_views(p, x):
                    X.copy_(polar_factor(X))
                if momentum is not None and self._retraction_in(group).tangent:
                    for X, M in zip(frame_views(p, x), frame_views(p, momentum), strict=True):
                        M.copy_(project_tangent(X.to(M.dtype), M))
            else:
                before = x.to(working_dtype(p))
                after = p.manifold.projx(before)
                if momentum is not None:
                    # The vector of a point with a gauge is of no use at another one of its weight.
                    gauged = isinstance(p.manifold, FixedTTRankManifold)
                    momentum = momentum.copy_(
                        p.manifold.transp(before, after, momentum)
                        if gauged
                        else p.manifold.proju(after.to(x.dtype).to(momentum.dtype), momentum)
                    )
                x.copy_(after)

    def _retraction_in(self, group: dict[str, Any]) -> Retraction:
        return retraction_of(type(self).__name__, group["retraction"])

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_framed(self, group: dict[str, Any], stacks: Stacks) -> None:
        raise NotImplementedError

    def _step_generic(self, group: dict[str, Any], points: Points) -> None:
        raise NotImplementedError

    def _count_step(
        self, group: dict[str, Any], stacks: list[Stacks], generic: list[Tensor]
    ) -> bool:
        """Whether the step just taken is one to stabilize after."""
        raise NotImplementedError


def detached(params: list[Tensor]) -> list[Tensor]:
    """Parameters of a Euclidean manifold as torch's own tensors, on which it takes fast paths."""
    return [p.detach() if isinstance(p, ManifoldTensor) else p for p in params]
