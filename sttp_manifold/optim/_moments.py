"""Moving averages of gradients and of their squares, as Adam has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim._blocks import (
    compress_scalars,
    is_framed,
    number,
    scalars_shape,
    spread_scalars,
    working_dtype,
)
from sttp_manifold.optim._settings import SettingError
from sttp_manifold.optim._stacks import Block

__all__ = [
    "accumulate",
    "betas",
    "complete_state",
    "correction",
    "elementwise",
    "fitted",
    "framewise",
    "is_bounded",
    "is_decoupled",
    "is_elementwise",
    "refuse_kind",
    "weight",
]


def betas(group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    """Decays of both moments, as numbers where that does not wait."""
    beta1, beta2 = group["betas"]
    return number(beta1), number(beta2)


def is_bounded(beta1: float | Tensor, beta2: float | Tensor) -> bool:
    """Whether steps are bounded by the rate: the second moment forgets no sooner than the first."""
    if isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return False
    return beta1 * beta1 <= beta2


def weight(beta: float | Tensor, like: Tensor) -> float | Tensor:
    """Weight of what is new in a moving average."""
    return 1 - beta.to(like) if isinstance(beta, Tensor) else 1 - beta


def accumulate(second: Tensor, values: Tensor, beta: float | Tensor) -> None:
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


def correction(beta: float | Tensor, steps: float | Tensor) -> float | Tensor:
    """How much of the weights of a moving average has been given out: ``1 - beta^steps``.

    As ``expm1`` where the steps are counted on the device, since ``1 - beta^steps`` of float32
    begins with four digits.
    """
    if not isinstance(steps, Tensor):
        return 1 - beta**steps
    if isinstance(beta, Tensor):
        return steps.mul(beta.log()).expm1_().neg_()
    return steps.mul(math.log(beta) if beta else -math.inf).expm1_().neg_()


def elementwise(
    block: Block,
    steps: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    *,
    peak: bool,
    bounded: bool,
) -> tuple[Tensor, float]:
    """Momentum over the root of a second moment for each element, Adam's own, without the rate.

    Args:
        block: holds ``exp_avg`` and ``exp_avg_sq`` for every element.
        steps: how many have been taken, or as many numbers as the block has scalars.
        beta2: decay of the second moment.
        eps: added to the root.
        peak: whether to take the largest second moment so far.
        bounded: whether the quotients are; others are cut where their squares would overflow.

    Returns:
        A flat vector of the layout of the block, and a number that it is to be multiplied with.
    """
    second = block.arrays["exp_avg_sq"]
    if peak:
        if "max_exp_avg_sq" not in block.arrays:
            block.arrays["max_exp_avg_sq"] = torch.zeros_like(second)
        highest = block.arrays["max_exp_avg_sq"]
        second = torch.maximum(highest, second, out=highest)
    weights, factor = correction(beta2, steps), 1.0
    if isinstance(weights, Tensor):
        if isinstance(steps, Tensor):
            weights = block.spread(weights)
        root = second.div(weights).to(second.dtype).sqrt_()
    else:
        # The root of the weights is taken out: one division of all elements less.
        factor = math.sqrt(weights)
        root, eps = second.sqrt(), eps * factor
    root.add_(eps)
    if eps < torch.finfo(root.dtype).tiny:
        root.clamp_(min=torch.finfo(root.dtype).tiny)  # for rows of zeros
    flat = torch.div(block.arrays["exp_avg"], root, out=root)
    if not bounded:
        # After a spike that the second moment has forgotten; squares still have a finite sum.
        far = math.sqrt(torch.finfo(flat.dtype).max) / 2**13
        flat.clamp_(-far, far)
    return flat, factor


def framewise(
    group: dict[str, Any], block: Block, steps: float | Tensor, lr: float | Tensor
) -> Tensor:
    """What the momentum of each frame and coordinate is to be multiplied with.

    Args:
        group: settings.
        block: holds ``exp_avg_sq`` for every frame and coordinate.
        steps: how many have been taken, or as many numbers as the block has scalars.
        lr: learning rate.

    Returns:
        As many numbers as the block has scalars.
    """
    beta1, beta2 = betas(group)
    second = block.scalars["exp_avg_sq"]
    if group["amsgrad"]:
        if "max_exp_avg_sq" not in block.scalars:
            block.scalars["max_exp_avg_sq"] = torch.zeros_like(second)
        peak = block.scalars["max_exp_avg_sq"]
        second = torch.maximum(peak, second, out=peak)
    scale = second.div(correction(beta2, steps)).sqrt_().add_(group["eps"]).reciprocal_()
    if isinstance(lr, Tensor) or isinstance(steps, Tensor):
        scale.mul_(lr).div_(correction(beta1, steps)).neg_()
        return scale.to(second.dtype)
    return scale.mul_(-lr / correction(beta1, steps))


def fitted(p: Tensor, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A moment as steps of ``p`` work on it, from whatever a state brought.

    From when it was kept in half precision, or before the parameter changed; from geoopt, which
    repeats second moments over frames; or from the other kind of second moment.

    Raises:
        OptimizerError: for one of another parameter.
    """
    if value.dtype != working_dtype(p):
        value = value.to(working_dtype(p))
    if value.shape == shape:
        return value
    if is_framed(p) and value.shape == p.shape:
        return compress_scalars(p, value)
    if is_framed(p) and value.shape == scalars_shape(p):
        return spread_scalars(p, value)
    raise OptimizerError(
        f"the optimizer state {key!r} has shape {tuple(value.shape)}, but a parameter of shape "
        f"{tuple(p.shape)} needs {shape}; load_state_dict() takes the state of an optimizer over "
        f"the same parameters in the same order"
    )


def is_decoupled(group: dict[str, Any]) -> bool:
    """Whether weight decay stays out of the moments."""
    return bool(group.get("decoupled_weight_decay", False))


def is_elementwise(group: dict[str, Any]) -> bool:
    """Whether second moments of frames are of their entries."""
    return bool(group["second_moment"] == "elementwise")


def refuse_kind(name: str, group: dict[str, Any], *, tangent: bool) -> None:
    """Refuse second moments of entries where directions are not projected.

    There the gradient at a minimum is normal to the frames, and its quotient is not: frames would
    leave the minimum again.

    Args:
        name: of the optimizer, for the message.
        group: its settings.
        tangent: whether its retraction moves along tangent vectors.
    """
    if is_elementwise(group) and not tangent:
        retraction = group["retraction"]
        raise SettingError(
            f"{name} got second_moment='elementwise' with retraction={retraction!r}, whose "
            f"directions are not projected: the quotient of the gradient at a minimum would move a "
            f"frame away from it; call {name}(params, lr=..., retraction={retraction!r}, "
            f"second_moment='frame'), or take a retraction along tangent vectors, as "
            f"'newton_schulz'"
        )


def complete_state(
    state: dict[str, Any], p: Tensor, shape: tuple[int, ...], *, capturable: bool, peak: bool
) -> None:
    """Start what a parameter's state lacks, and bring what it has into shape.

    Args:
        state: the state.
        p: the parameter.
        shape: of the second moment.
        capturable: whether the count of steps lies with the parameter.
        peak: whether the second moment never falls.

    Raises:
        OptimizerError: for the state of another parameter.
    """
    if not state:
        # On the host unless capturable, as torch has it: reading it there is free.
        state["step"] = torch.zeros((), device=p.device if capturable else "cpu")
        state["exp_avg"] = torch.zeros_like(p.detach(), dtype=working_dtype(p))
        state["exp_avg_sq"] = torch.zeros(shape, dtype=working_dtype(p), device=p.device)
    if capturable and state["step"].device != p.device:
        state["step"] = state["step"].to(p.device)
    if peak and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
    for key, wanted in (("exp_avg", p.shape), ("exp_avg_sq", shape), ("max_exp_avg_sq", shape)):
        if key in state:
            state[key] = fitted(p, key, state[key], tuple(wanted))
