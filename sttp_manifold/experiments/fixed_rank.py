"""Methods that train weights of fixed TT rank in the metric of the weights themselves."""

from __future__ import annotations

import math

from torch import nn

from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.experiments.trainers import Trainer
from sttp_manifold.manifolds import FixedTTRankManifold
from sttp_manifold.nn import RiemannianWeight

__all__ = ["FIXED_RANK", "FixedRankTrainer"]


class FixedRankTrainer(Trainer):
    """A :class:`Trainer` whose points are those of :class:`FixedTTRankManifold`.

    They are laid out as points of the product with a full bond; what differs is the geometry.
    """

    extra = True

    def convert(self, model: nn.Module, rank: int) -> None:
        """See :meth:`Trainer.convert`."""
        riemannian = Trainer(**{**vars(self), "parameterization": "riemannian"})
        riemannian.convert(model, rank)
        for weight in model.modules():
            if isinstance(weight, RiemannianWeight):
                manifold = FixedTTRankManifold(weight.shape).for_training()
                weight.point = ManifoldParameter(weight.point.detach(), manifold=manifold)


_SETS = {"svdp": "weights of fixed rank", "sttp": "weights of fixed TT rank"}
_HOW = {
    "adam": ("Riemannian Adam, a second moment a core", 1e-2, math.inf),
    "muon": ("Riemannian Muon in the metric of the weights", 3e-2, math.pi / 2),
}

FIXED_RANK = tuple(
    FixedRankTrainer(
        f"{kind}-fixed-rank-{optimizer}",
        f"{words}, {how}",
        kind,
        "fixed-rank",
        optimizer,
        untuned_lr,
        "full",
        largest_lr,
    )
    for kind, words in _SETS.items()
    for optimizer, (how, untuned_lr, largest_lr) in _HOW.items()
)
