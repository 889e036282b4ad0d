"""Framed parameters of a group, stepped by fused kernels where those serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sttp_manifold.optim._blocks import number
from sttp_manifold.optim._fused_plan import FusedStep
from sttp_manifold.optim._fused_rules import Rule, settings_of, why_not

__all__ = ["FusedSteps"]


class FusedGroup:
    """Framed parameters of one group, by dtype, device, and the rule that each is stepped by.

    Attributes:
        settings: those of the group that decide whether kernels can step it.
    """

    def __init__(self) -> None:
        self.settings: object = None
        self._steps: dict[object, FusedStep] = {}
        self._params: list[Tensor] = []

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters of the last step."""
        return len(params) == len(self._params) and all(
            p is q for p, q in zip(params, self._params, strict=True)
        )

    def step(
        self,
        params: Sequence[Tensor],
        states: Mapping[Tensor, dict[str, Any]],
        rule_of: Callable[[dict[str, Any]], Rule | None],
        rates: tuple[float | Tensor, float | Tensor],
    ) -> None:
        """Step the parameters.

        Args:
            params: parameters with gradients.
            states: the optimizer's state of each.
            rule_of: the rule by which a parameter with a state is stepped.
            rates: that of frames, and that of coordinates.
        """
        self._params = list(params)
        kinds: dict[object, tuple[Rule, list[Tensor]]] = {}
        for p in params:
            rule = rule_of(states[p])
            assert rule is not None
            key = p.dtype, p.device, rule.numbers["fresh"]
            kinds.setdefault(key, (rule, []))[1].append(p)
        for gone in set(self._steps) - set(kinds):
            del self._steps[gone]
        for kind, (rule, mine) in kinds.items():
            step = self._steps.get(kind)
            if step is None or not step.fits(mine, rule):
                step = self._steps[kind] = FusedStep(mine, rule)
            step.hold([states[p] for p in mine])
            step.step(rule, *map(number, rates))


class FusedSteps:
    """Mixed into an optimizer: which of its groups kernels step, and their steps."""

    _fused: dict[int, FusedGroup] | None = None

    def _fused_rule(self, group: dict[str, Any], state: dict[str, Any]) -> Rule | None:
        """The rule of a parameter with a state, for a fused kernel; None if there is none."""
        return None

    def _fused_rates(self, group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """The rates of frames and of coordinates."""
        return group["lr"], group["lr"]

    def _why_not_fused(self, group: dict[str, Any], params: list[Tensor]) -> str | None:
        if self._is_held(group):
            return None
        if self._fused_rule(group, {}) is None:
            return "there is no fused kernel of its rule that stays on a manifold"
        return why_not(group, params)

    def _is_held(self, group: dict[str, Any]) -> bool:
        """Whether the last step of a group was fused, under the settings that it has now."""
        held = (self._fused or {}).get(id(group))
        return held is not None and held.settings == settings_of(group)

    def _takes_fused(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Whether framed parameters of a group are stepped by a fused kernel."""
        asked = group.get("fused")
        if not params or asked is False:
            return False
        if asked is None and (group["foreach"] is not None or params[0].device.type != "cuda"):
            return False
        return self._why_not_fused(group, params) is None

    def _step_fused(
        self, group: dict[str, Any], params: list[Tensor], states: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        if self._fused is None:
            self._fused = {}
        held = self._fused.get(id(group))
        if held is None or not held.holds(params):
            held = self._fused[id(group)] = FusedGroup()
        held.settings = settings_of(group)
        held.step(params, states, partial(self._fused_rule, group), self._fused_rates(group))
