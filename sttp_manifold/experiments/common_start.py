"""Where runs start: one weight for all methods of one task, rank and seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.specs import derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.tt import TTShape, tt_svd

__all__ = ["common_start", "drawn_model", "layer_shape", "project_"]


def layer_shape(layer: nn.Module, rank: int, kind: str = "sttp") -> TTShape:
    """The plan of a stock layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return TTShape.for_weight(weight.shape, rank, kind=kind)


def drawn_model(task: Task, seed: int) -> nn.Module:
    """The stock model of a task by its own initialization, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("init", task.name, seed))
        assert task.model is not None
        return task.model().double()


@torch.no_grad()
def project_(model: nn.Module, rank: int, kind: str = "sttp", *, keep_norm: bool) -> nn.Module:
    """Project the weights of a stock model on a set of weights, in place.

    Args:
        model: in float64.
        rank: of the set.
        kind: ``sttp`` or ``svdp``: which set.
        keep_norm: scale each projected weight back to the norm that it had. Without it a drawn
            weight would pass on a fraction of the signal that its initialization means to.
    """
    for layer in weights(model).values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        drawn = weight.flatten(1)
        start = tt_svd(drawn, layer_shape(layer, rank, kind)).to_matrix()
        scale = drawn.norm() / start.norm() if keep_norm else 1.0
        weight.copy_((start * scale).view_as(weight))
    return model


def common_start(task: Task, rank: int, seed: int) -> nn.Module:
    """The stock model that every method starts from at one rank and seed, in float64.

    Each weight is torch's own draw, projected on the STTP set of that rank by TT-SVD and scaled
    back to the norm of the draw. The STTP set lies within the SVDP set, which lies within the
    dense one, so each method represents these weights exactly.
    """
    return project_(drawn_model(task, seed), rank, keep_norm=True)
