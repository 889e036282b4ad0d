"""Settings of a parameter group: what each may be, checked before anything moves.

torch checks what its constructors are given, in part, and nothing of what a group, a loaded state
or a later assignment brings. Here one table serves all of these.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.retractions import RETRACTIONS, Retraction

__all__ = ["SettingError", "check_settings", "retraction_of"]


class SettingError(OptimizerError, ValueError):
    """A setting that no step can use. Also a ``ValueError``, which is what torch raises here."""


def _is_number(value: Any, look: bool, *, least: float = 0.0, below: float = math.inf) -> bool:
    """Whether a number, or a tensor of one, lies in ``[least, below)``."""
    if type(value) is float or type(value) is int:  # as in nearly all steps
        return least <= value < below  # false for NaN
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return False
        # What lies on an accelerator is not waited for.
        return not look or value.device.type != "cpu" or least <= float(value) < below
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return least <= float(value) < below


def _is_rate(value: Any, look: bool) -> bool:
    # Schedules may end a rounding below zero, where torch steps on.
    return _is_number(value, look, least=0.0 if look else -sys.float_info.max)


def _is_rate_or_none(value: Any, look: bool) -> bool:
    return value is None or _is_rate(value, look)


def _is_rule(value: Any, look: bool) -> bool:
    return value in ("adam", "muon")


def _is_betas(value: Any, look: bool) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(_is_number(beta, look, below=1.0) for beta in value)


def _is_period(value: Any, look: bool) -> bool:
    integral = isinstance(value, Integral) and not isinstance(value, bool)
    return value is None or (integral and int(value) >= 1)


def _is_second_moment(value: Any, look: bool) -> bool:
    return isinstance(value, str) and value in ("frame", "elementwise")


def _is_flag(value: Any, look: bool) -> bool:
    return isinstance(value, bool)


def _is_choice(value: Any, look: bool) -> bool:
    return value is None or isinstance(value, bool)


class _Setting(NamedTuple):
    """What a setting may be.

    Attributes:
        called: torch's name for it in such a message.
        accepts: whether a value can be used; the second argument tells to look into tensors.
        expected: the same in words.
        example: one that can.
    """

    called: str
    accepts: Callable[[Any, bool], bool]
    expected: str
    example: str


_FLAG = _Setting("flag", _is_flag, "True or False", "True")
_CHOICE = _Setting("flag", _is_choice, "True, False or None", "True")
_NUMBER = "a finite number >= 0"
_SETTINGS = {
    "lr": _Setting("learning rate", _is_rate, f"{_NUMBER}, or a tensor of one", "1e-3"),
    "adam_lr": _Setting(
        "learning rate", _is_rate_or_none, f"None, {_NUMBER}, or a tensor of one", "1e-3"
    ),
    "adam_eps": _Setting("epsilon value", _is_number, _NUMBER, "1e-8"),
    "adam_betas": _Setting("beta parameters", _is_betas, "two numbers in [0, 1)", "(0.9, 0.999)"),
    "second_moment": _Setting(
        "second moment", _is_second_moment, "'frame' or 'elementwise'", "'elementwise'"
    ),
    "plain_matrices": _Setting("rule", _is_rule, "'adam' or 'muon'", "'adam'"),
    "eps": _Setting("epsilon value", _is_number, _NUMBER, "1e-8"),
    "weight_decay": _Setting("weight_decay value", _is_number, _NUMBER, "1e-4"),
    "momentum": _Setting("momentum value", _is_number, _NUMBER, "0.9"),
    "dampening": _Setting("dampening value", _is_number, _NUMBER, "0.1"),
    "betas": _Setting("beta parameters", _is_betas, "two numbers in [0, 1)", "(0.9, 0.999)"),
    "stabilize": _Setting("stabilize value", _is_period, "None or a whole number >= 1", "100"),
    **dict.fromkeys(("amsgrad", "nesterov", "maximize", "capturable", "differentiable"), _FLAG),
    "decoupled_weight_decay": _FLAG,
    **dict.fromkeys(("foreach", "fused"), _CHOICE),
}


def check_settings(name: str, group: Mapping[str, Any], *, look: bool = True) -> None:
    """Refuse settings that no step can use.

    Args:
        name: of the optimizer, for the message.
        group: settings by name; others than those known here are passed over.
        look: whether to read tensors of the CPU; a step does not, and takes any finite rate.

    Raises:
        SettingError: on the first that is of the wrong type, not finite or out of range, and for
            Nesterov's step without momentum or with dampening.
    """
    for key, setting in _SETTINGS.items():
        if key in group and not setting.accepts(group[key], look):
            rate = "" if key == "lr" else "lr=..., "
            raise SettingError(
                f"Invalid {setting.called}: {name} got {key}={group[key]!r}; it takes "
                f"{setting.expected}, as in {name}(params, {rate}{key}={setting.example})"
            )
    if group.get("nesterov") and (not group.get("momentum") or group.get("dampening")):
        raise SettingError(
            f"Nesterov momentum requires a momentum and zero dampening, but {name} got "
            f"momentum={group.get('momentum')!r} and dampening={group.get('dampening')!r}; call "
            f"{name}(params, lr=..., momentum=0.9, nesterov=True)"
        )


def retraction_of(name: str, retraction: Any) -> Retraction:
    """A retraction that was asked for by its name or as an object."""
    if isinstance(retraction, Retraction):
        return retraction
    if isinstance(retraction, str) and retraction in RETRACTIONS:
        return RETRACTIONS[retraction]
    raise SettingError(
        f"{name} got retraction={retraction!r}; it takes one of "
        f"{', '.join(map(repr, RETRACTIONS))}, as in {name}(params, lr=..., "
        f"retraction='newton_schulz'), or a sttp_manifold.frames.retractions.Retraction"
    )
