r"""How far a step of Adam can take a frame, where the rate alone says it.

With :math:`m = (1 - \beta_1) \sum_k \beta_1^k g_k` and
:math:`v = (1 - \beta_2) \sum_k \beta_2^k |g_k|^2`, by Cauchy and Schwarz

.. math::
    |\hat m| \le \frac{1 - \beta_1}{\sqrt{(1 - \beta_2)(1 - \beta_1^2 / \beta_2)}}\, \sqrt{\hat v}

at every step, bias corrections included: 7.3 for the usual decays. A single gradient after none
makes a step of :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}`, which is 3.2. Momentum that is carried
along by projection is shorter still, and so is the step with AMSGrad or ``eps``. With a second
moment for each entry, it is the bound of each entry, and :math:`\sqrt{d r}` as much for a frame.

Where this is short, the Gram matrix of ``X + U`` is near the identity: the host need not look at
it, nor Cholesky QR stand by. A momentum that is longer, of a state from elsewhere or from other
decays, is cut to the bound, so that nothing rests on where a state came from. A point that is not
as the last step has left it, since somebody has written to it, may be no frame, and goes the
careful way once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.frames._branch_free import NEAR_IDENTITY
from sttp_manifold.frames.retractions import Retraction
from sttp_manifold.optim._stacks import Block, Stacks

__all__ = ["keep_within", "longest_step", "looks_for_free", "reach_of"]


def longest_step(beta1: float, beta2: float) -> float:
    """The longest step of Adam, over the rate; infinite where it has no bound."""
    if beta1 == 0:
        return 1 / math.sqrt(1 - beta2)
    if beta1 * beta1 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


def looks_for_free(device: torch.device) -> bool:
    """Whether the host reads a value without waiting for the device."""
    return device.type == "cpu"


def reach_of(
    stacks: Stacks,
    retraction: Retraction,
    decays: tuple[float | Tensor, float | Tensor],
    lr: float | Tensor,
    *,
    elementwise: bool,
) -> float | None:
    """A bound on the steps of all frames that spares a retraction its looks; None for none.

    Args:
        stacks: what is to be stepped.
        retraction: how.
        decays: of both moments.
        lr: the rate.
        elementwise: whether second moments are of entries.
    """
    beta1, beta2 = decays
    if isinstance(lr, Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return None
    near = retraction.of_near is not None and retraction.tangent
    # In half precision points are rounded when they are written, and no frames to speak of.
    rounded = stacks.dtype != stacks.params[0].dtype
    if not near or stacks.stays or rounded or looks_for_free(stacks.params[0].device):
        return None
    if not stacks.untouched():
        return None
    reach = lr * longest_step(beta1, beta2)
    if elementwise:
        reach *= math.sqrt(max(d * r for block in stacks.blocks for _, d, r in block.shapes))
    return reach if reach * reach <= NEAR_IDENTITY else None


def keep_within(
    block: Block, directions: Sequence[Tensor], scales: Sequence[Any], reach: float
) -> list[Tensor]:
    """Scales of the directions of frames, cut where they would make a step longer than it can be.

    Args:
        block: what is stepped; its memory for norms is overwritten.
        directions: of its frames.
        scales: what to multiply each with, not positive.
        reach: the longest step.

    Shape:
        - directions: ``(n, d, r)`` each, scales: ``(n,)`` or a number each
        - output: ``(n,)`` each
    """
    lengths, coordinates = block.norm_views
    for u, length in zip(directions, lengths, strict=True):
        torch.linalg.vector_norm(u, dim=(1, 2), out=length)
    if block.coordinates:
        coordinates.zero_()
    least = block.parts(block.norms.reciprocal_().mul_(-reach))[0]
    return [torch.clamp(most, min=scale) for scale, most in zip(scales, least, strict=True)]
