"""Weight decay of the weight, for weights in coordinates of a chart."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sttp_manifold._arguments import explained
from sttp_manifold.errors import OptimizerError

__all__ = ["Decays", "decay_weights"]


@runtime_checkable
class Decays(Protocol):
    """A module in whose coordinates a plain optimizer cannot let its weight decay."""

    def decay_(self, amount: float | Tensor) -> Any:
        """Take a step of decay of the weight."""
        ...


@explained
def decay_weights(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, weight_decay: float
) -> RemovableHandle:
    r"""Let weights that are held in charts decay, in the steps of any optimizer of torch's.

    Weight decay of coordinates turns a weight instead of shrinking it: zero is a certain frame.
    Here each step first takes :math:`W \leftarrow (1 - \eta\lambda)\, W` for the learning rate
    :math:`\eta` of the group that holds the coordinates, by the spectrum alone, as ``AdamW`` does
    for plain weights: for the spectra ``free`` and ``full`` exactly; for the others by the step
    along the gradient of :math:`\tfrac12 |W|_F^2`, which for constant ones is none. A chart without
    a gradient is left alone. Points on manifolds decay by the Riemannian optimizers, and plain
    weights by any: give those groups their ``weight_decay``, as :func:`param_groups` does.

    Args:
        optimizer: any of torch's or this package's, with the coordinates in its groups.
        model: the network.
        weight_decay: the decay, :math:`\lambda`.

    Returns:
        The handle whose ``remove()`` ends it.

    Raises:
        OptimizerError: no chart of the model is in the optimizer, one is in a group that decays its
            coordinates, or a ``weight_decay`` that is no finite number from 0 on.

    References:
        Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, 2019.

    Example:
        >>> import sttp_manifold as sm
        >>> layer = sm.nn.SpectralLinear(12, 10, rank=3)
        >>> groups = sm.optim.param_groups(layer, weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> handle = sm.optim.decay_weights(optimizer, layer, weight_decay=0.1)
    """
    if not 0 <= weight_decay < float("inf"):
        raise OptimizerError(
            f"weight_decay is a finite number from 0 on, as in 0.01; got {weight_decay!r}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"decay_weights takes an optimizer of torch's, got {type(optimizer).__name__}; give it "
            "the one that steps, as optimizer.optimizer of a wrapper"
        )
    charts = {
        id(p): module
        for module in model.modules()
        if isinstance(module, Decays)
        for p in module.parameters(recurse=False)
    }
    held = [group for group in optimizer.param_groups if _coordinates(group, charts)]
    if not held:
        raise OptimizerError(
            f"{type(optimizer).__name__} holds no coordinates of a chart of this "
            f"{type(model).__name__}: make it after compress(model, ...), and leave this call out "
            "where weights are points of manifolds"
        )
    if any(group.get("weight_decay") for group in held):
        raise OptimizerError(
            "coordinates of a chart are in a group with a weight_decay, which turns the weight; "
            "give the optimizer sm.optim.param_groups(model, weight_decay=...), whose group of "
            "charts has none"
        )

    def decay(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for p in _coordinates(group, charts):
                if p.grad is not None:
                    charts[id(p)].decay_(group["lr"] * weight_decay)

    return optimizer.register_step_pre_hook(decay)


def _coordinates(group: dict[str, Any], charts: dict[int, Any]) -> list[Tensor]:
    return [p for p in group["params"] if id(p) in charts]
