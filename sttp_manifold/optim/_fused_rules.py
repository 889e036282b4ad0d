"""What an optimizer's rule is to a fused kernel, and which parameters a kernel can step by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sttp_manifold._geoopt import EuclideanStiefel
from sttp_manifold.frames._triton import has_triton, runs_on
from sttp_manifold.frames.retractions import RETRACTIONS
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim._blocks import frame_shapes, spectrum_slice

__all__ = ["Rule", "adam_rule", "muon_rule", "settings_of", "sgd_rule", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 128


@dataclass(frozen=True)
class Rule:
    """An optimizer's rule as the kernels take it.

    Attributes:
        arrays: kinds of state with one number for each element of a parameter.
        scalars: kinds with one for each frame and each coordinate.
        counted: whether the steps of each parameter are counted.
        numbers: arguments of the kernels that are numbers.
        flags: those that a kernel is compiled for.
        of_coordinates: further numbers of the kernel of coordinates.
        of_turns: what the kernel that turns frames by an angle takes; None where frames are stepped
            as coordinates are.
    """

    arrays: tuple[str, ...]
    scalars: tuple[str, ...]
    counted: bool
    numbers: Mapping[str, float]
    flags: Mapping[str, Any]
    of_coordinates: Mapping[str, float]
    of_turns: Mapping[str, Any] | None = None


def adam_rule(group: Mapping[str, Any]) -> Rule:
    """That of :class:`RiemannianAdam`."""
    (beta1, beta2), per_entry = group["betas"], group["second_moment"] == "elementwise"
    seconds = ("exp_avg_sq", "max_exp_avg_sq")[: 2 if group["amsgrad"] else 1]
    apart = bool(group.get("decoupled_weight_decay", False))
    decay = float(group["weight_decay"])
    return Rule(
        ("exp_avg", *(seconds if per_entry else ())),
        () if per_entry else seconds,
        True,
        dict(
            sign=-1.0 if group["maximize"] else 1.0,
            w1=1 - beta1,
            w2=1 - beta2,
            eps=float(group["eps"]),
            log1=math.log(beta1) if beta1 else -math.inf,
            log2=math.log(beta2) if beta2 else -math.inf,
            keep=0.0,
            fresh=0.0,
        ),
        dict(
            RULE=0,
            AMSGRAD=bool(group["amsgrad"]),
            MOMENTUM=True,
            NESTEROV=False,
            ELEMENTWISE=per_entry,
            SHORTEN=beta1 * beta1 > beta2,
        ),
        dict(decay=0.0 if apart else decay, apart=decay if apart else 0.0),
    )


def sgd_rule(group: Mapping[str, Any], started: bool) -> Rule:
    """That of :class:`RiemannianSGD`; torch's first momentum is the whole gradient."""
    momentum = float(group["momentum"])
    return Rule(
        ("momentum_buffer",) if momentum else (),
        (),
        False,
        dict(
            sign=-1.0 if group["maximize"] else 1.0,
            w1=0.0,
            w2=0.0,
            eps=0.0,
            log1=0.0,
            log2=0.0,
            keep=momentum,
            fresh=1.0 - float(group["dampening"]) if started else 1.0,
        ),
        dict(
            RULE=1,
            AMSGRAD=False,
            MOMENTUM=bool(momentum),
            NESTEROV=bool(group["nesterov"]),
            ELEMENTWISE=False,
            SHORTEN=True,
        ),
        dict(decay=float(group["weight_decay"]), apart=0.0),
    )


def muon_rule(group: Mapping[str, Any]) -> Rule:
    """That of :class:`RiemannianMuon`; what is no frame moves by Adam."""
    adam = {**group, "betas": group["adam_betas"], "eps": group["adam_eps"]}
    adam |= dict(second_moment="frame", amsgrad=False, decoupled_weight_decay=True)
    return replace(
        adam_rule(adam),
        of_turns=dict(
            sign=-1.0 if group["maximize"] else 1.0,
            keep=float(group["momentum"]),
            NESTEROV=bool(group["nesterov"]),
        ),
    )


def _decays(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return *group.get("betas", ()), *group.get("adam_betas", ())


def _rates(group: Mapping[str, Any]) -> list[Any]:
    return [group["lr"], group.get("adam_lr")]


def why_not(group: Mapping[str, Any], params: Sequence[Tensor]) -> str | None:
    """Why a fused kernel cannot step manifold parameters of a group; None where it can.

    Args:
        group: settings of an optimizer.
        params: those of its parameters that are on manifolds.
    """
    if not has_triton():
        return "Triton is not installed, which comes with torch for CUDA, or by the extra 'fused'"
    if group["retraction"] not in ("newton_schulz", RETRACTIONS["newton_schulz"]):
        return "the kernel retracts by 'newton_schulz'"
    if any(isinstance(beta, Tensor) for beta in _decays(group)):
        return "the kernel takes betas that are numbers"
    if group["stabilize"] is not None:
        return (
            f"the host counts the steps of stabilize={group['stabilize']}, and the kernel its own"
        )
    for p in params:
        manifold = p.manifold  # type: ignore[attr-defined]
        own = isinstance(manifold, SpectralTTManifold)
        if not own and type(manifold) is not EuclideanStiefel:
            return f"the kernel knows no {type(manifold).__name__}"
        if isinstance(p.detach(), FakeTensor):
            return "a fake tensor has no memory"
        if not runs_on(p.device):
            return f"the kernel runs on CUDA, and a parameter is on {p.device.type}"
        if p.dtype not in _DTYPES:
            return f"the kernel computes in float32, and a parameter is {p.dtype}"
        if not p.is_contiguous():
            return "a parameter is not contiguous"
        for rate in _rates(group):
            if isinstance(rate, Tensor) and rate.device not in (p.device, torch.device("cpu")):
                return f"lr is on {rate.device}, and a parameter on {p.device}"
        decays = own and group["weight_decay"] and spectrum_slice(p) is not None
        if decays and manifold.spectrum not in ("free", "full"):
            return f"the kernel has no weight decay of spectrum={manifold.spectrum!r}"
        widest = max((r for _, _, r in frame_shapes(p)[1]), default=0)
        if widest > _WIDEST:
            return f"the kernel takes frames of up to {_WIDEST} columns, and one has {widest}"
    return None


def settings_of(group: Mapping[str, Any]) -> object:
    """What decides, beside the parameters, whether kernels can step a group."""
    return (
        group["retraction"],
        [rate.device if isinstance(rate, Tensor) else None for rate in _rates(group)],
        any(isinstance(beta, Tensor) for beta in _decays(group)),
        bool(group["weight_decay"]),
        group["stabilize"],
    )
