"""What RiemannianMuon refuses: settings of Adam's, and of torch's Muon where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim._settings import SettingError, check_settings

torch_muon: Callable[..., None] | None
try:
    from torch.optim._muon import muon as torch_muon
except ImportError:  # torch before 2.9
    torch_muon = None

__all__ = ["check_muon_settings", "torch_muon"]


def check_muon_settings(name: str, group: dict[str, Any], *, look: bool) -> None:
    """Refuse what is Adam's only, and what Muon takes less of."""
    check_settings(name, group, look=look)
    for key in ("betas", "eps"):
        if key in group:
            raise SettingError(
                f"{name} got {key}={group[key]!r}; what moves by Adam has settings of its own, as "
                f"in {name}(params, lr=..., adam_{key}={group[key]!r})"
            )
    for flag, only in (
        ("amsgrad", False),
        ("differentiable", False),
        ("decoupled_weight_decay", True),
        ("second_moment", "frame"),
    ):
        if group.get(flag, only) not in (only, bool(only)):
            raise SettingError(
                f"{name} got {flag}={group[flag]!r}, which it has not; call {name}(params, "
                f"lr=...) without it, or give those parameters to RiemannianAdam(params, lr=..., "
                f"{flag}={group[flag]!r})"
            )
    if group.get("fused") and group.get("foreach"):
        raise SettingError(
            f"{name} got fused=True and foreach=True, which are two ways to take a step; call "
            f"{name}(params, lr=..., fused=True)"
        )
    lr, momentum = group["lr"], group["momentum"]
    if look and (not isinstance(lr, Tensor) or lr.device.type == "cpu") and lr > math.pi / 2:
        raise SettingError(
            f"Invalid learning rate: {name} got lr={lr!r}; it is the angle of a step in radians, "
            f"up to pi/2, as in {name}(params, lr=3e-2)"
        )
    if momentum >= 1:
        raise SettingError(
            f"Invalid momentum value: {name} got momentum={momentum!r}; it takes a number in "
            f"[0, 1), as in {name}(params, lr=..., momentum=0.95)"
        )
    if group["plain_matrices"] == "muon":
        if torch_muon is None:
            raise OptimizerError(
                f"{name} got plain_matrices='muon', which is torch.optim.Muon, but torch "
                f"{torch.__version__} has none; install torch>=2.9, or call {name}(params, "
                f"lr=...), which moves plain matrices by Adam"
            )
        for flag, why in (
            ("capturable", "torch.optim.Muon reads its learning rate on the host"),
            ("fused", "torch.optim.Muon has no fused kernel"),
        ):
            if group.get(flag):
                raise OptimizerError(
                    f"{name} cannot honour {flag}=True together with plain_matrices='muon': {why}; "
                    f"call {name}(params, lr=..., {flag}=True), which moves plain matrices by Adam"
                )
