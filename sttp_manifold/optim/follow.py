"""`follow`: an optimizer goes on with the parameters that took the place of its own."""

from __future__ import annotations

import torch

from sttp_manifold._arguments import explained
from sttp_manifold.optim._base import FrameOptimizer
from sttp_manifold.optim.successors import replace_parameters

__all__ = ["follow"]


@explained
def follow(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    r"""Let an optimizer go on after ``truncate_``, ``grow_`` or ``switch`` changed its model.

    They make new parameters, which an optimizer made before does not know. Here the new ones take
    the places of the old ones in its groups. Groups stay the same objects, so schedulers go on as
    well, and rates, decays and flags stay. What is known of the new parameters depends:

    ============================== ===================== =========================================
    optimizer                      weights               state
    ============================== ===================== =========================================
    ours                           ``"riemannian"``      carried; see below
    ours                           switched, charts      starts anew
    any other                      all                   starts anew
    all                            that stayed           stays
    ============================== ===================== =========================================

    Carried means: directions that were truncated are dropped from the momentum, those that were
    grown have none, and the rest is projected onto the tangent space at the new point; second
    moments go along, and counts of steps. Coordinates of a chart of another rank have nothing in
    common with those before, so what was known of them is of no use.

    Args:
        optimizer: any of torch's kind, but for L-BFGS. Ours have it as a method,
            ``optimizer.follow(model)``.
        model: after the change.

    Raises:
        OptimizerError: what is no optimizer, or L-BFGS; or parameters that cannot be followed, as
            after ``compress``. Nothing has changed then.

    Example:
        >>> import torch, sttp_manifold as sm
        >>> model = sm.nn.compress(torch.nn.Sequential(torch.nn.Linear(64, 32)), rank=8)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> model = sm.nn.truncate_(model, rank=4)
        >>> follow(optimizer, model)
        >>> sm.optim.check_optimizer(optimizer, model)
    """
    if isinstance(optimizer, FrameOptimizer):
        optimizer.follow(model)
    else:
        replace_parameters(optimizer, model, None)
