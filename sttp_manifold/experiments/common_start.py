"""Where runs start: one weight for all methods of one task, rank and seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.specs import derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.tt import TTShape, tt_svd

__all__ = ["common_start", "layer_shape"]


def layer_shape(layer: nn.Module, rank: int, kind: str = "sttp") -> TTShape:
    """The plan of a stock layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return TTShape.for_weight(weight.shape, rank, kind=kind)


@torch.no_grad()
def common_start(task: Task, rank: int, seed: int) -> nn.Module:
    """The stock model that every method starts from at one rank and seed, in float64.

    Each weight is torch's own draw, projected on the STTP set of that rank by TT-SVD and scaled
    back to the norm of the draw. The STTP set lies within the SVDP set, which lies within the
    dense one, so each method represents these weights exactly. Without the scaling a low rank
    would start with a fraction of the signal that torch's initialization means to pass on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("init", task.name, seed))
        assert task.model is not None
        model = task.model().double()
    for layer in weights(model).values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        drawn = weight.flatten(1)
        start = tt_svd(drawn, layer_shape(layer, rank)).to_matrix()
        weight.copy_((start * (drawn.norm() / start.norm())).view_as(weight))
    return model
