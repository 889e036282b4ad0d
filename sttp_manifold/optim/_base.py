"""What the two optimizers share: sorting parameters, refusing flags, the closure, stabilizing."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from sttp_manifold._geoopt import ManifoldTensor
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.retractions import polar, project_tangent
from sttp_manifold.optim._blocks import (
    check_dense,
    frame_views,
    full_precision,
    is_framed,
    is_riemannian,
)

__all__ = ["FrameOptimizer"]

_WHY_NOT = {
    "capturable": "which factorization is accurate is decided on the host, from the data",
    "differentiable": "the point is replaced in place by its retraction",
    "fused": "there is no fused kernel that stays on a manifold",
}


class FrameOptimizer:
    """Mixed into a torch optimizer: the step over plain, framed and generic parameters."""

    _momentum_key: ClassVar[str]
    # Lost by pickling, which keeps defaults, state and groups only.
    _stabilize: int | None = None
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        Raises:
            OptimizerError: if the group has a flag that its manifold parameters cannot honour.
        """
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            self._refuse_flags(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch, but never share memory with the optimizer it came from.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        # torch keeps the arrays it is given: two optimizers would write to one momentum.
        super().load_state_dict(copy.deepcopy(state_dict))  # type: ignore[misc]

    def _refuse_flags(self, group: dict[str, Any]) -> None:
        flags = [flag for flag in _WHY_NOT if group.get(flag)]
        if flags and any(is_riemannian(p) for p in group["params"]):
            name, flag = type(self).__name__, flags[0]
            raise OptimizerError(
                f"{name} cannot honour {flag}=True for manifold parameters: {_WHY_NOT[flag]}; call "
                f"{name}(params, lr=...) without it, or {name}([dict(params=plain, {flag}=True), "
                f"dict(params=manifold)], lr=...) to keep it for the plain parameters"
            )

    # Dynamo takes a subclass of Adam for Adam, and would trace the Euclidean step without a word.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything that can be refused is refused before anything has moved.
        for group in self.param_groups:
            self._refuse_flags(group)
            check_dense(group["params"], type(self).__name__)
        for group in self.param_groups:
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
                if framed:
                    self._step_framed(group, framed)
                for p in generic:
                    self._step_generic(group, p)
                if self._count_step(group, framed + generic):
                    self.stabilize_group(group)
        return loss

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
                    X.copy_(polar(X, torch.zeros_like(X)))
                if momentum is not None:
                    for X, M in zip(frame_views(p, x), frame_views(p, momentum), strict=True):
                        M.copy_(project_tangent(X, M))
            else:
                x.copy_(p.manifold.projx(x))
                if momentum is not None:
                    momentum.copy_(p.manifold.proju(x, momentum))

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_framed(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_generic(self, group: dict[str, Any], p: Tensor) -> None:
        raise NotImplementedError

    def _count_step(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Whether the step just taken is one to stabilize after."""
        raise NotImplementedError


def detached(params: list[Tensor]) -> list[Tensor]:
    """Parameters of a Euclidean manifold as torch's own tensors, on which it takes fast paths."""
    return [p.detach() if isinstance(p, ManifoldTensor) else p for p in params]
