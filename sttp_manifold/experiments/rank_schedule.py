"""Methods whose ranks change in training: more at first, fewer by energy, the rank at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sttp_manifold.experiments.trainers import TRAINERS, Trainer
from sttp_manifold.nn import SpectralWeight, grow_, make_weight, truncate_
from sttp_manifold.tt import TTShape

__all__ = ["ADAPTIVE", "AdaptiveTrainer", "RankSchedule", "plans_of", "with_plans"]


@dataclass(frozen=True)
class RankSchedule:
    """When ranks change, between epochs.

    Attributes:
        times: the ranks at the start, in ranks of the comparison.
        energy: the part of its squared norm that each weight keeps after a third of the epochs.
    """

    times: int = 2
    energy: float = 0.99

    @property
    def in_words(self) -> str:
        """For specifications."""
        return (
            f"{self.times} times the rank; energy {self.energy:g} after 1/3 of the epochs; "
            "the rank after 2/3"
        )

    def grow(self, model: nn.Module, rank: int, seed: int) -> nn.Module:
        """Raise the ranks before the first step; weights stay what they are."""
        return grow_(model, self.times * rank, generator=torch.Generator().manual_seed(seed))

    def stage(self, epoch: int, epochs: int) -> int:
        """How many changes are due when so many epochs are done."""
        return sum(epoch >= math.floor(k * epochs / 3) for k in (1, 2))

    def lower(self, model: nn.Module, rank: int, stage: int) -> nn.Module:
        """The change that leads to a stage, 1 or 2."""
        return truncate_(model, self.energy) if stage == 1 else truncate_(model, rank=rank)


@dataclass(frozen=True)
class AdaptiveTrainer(Trainer):
    """A :class:`Trainer` on the manifold whose ranks change, its optimizer following.

    Attributes:
        ranks: when they change.
    """

    ranks: RankSchedule = field(default_factory=RankSchedule)

    run = "adapt"
    extra = True


def plans_of(model: nn.Module) -> dict[str, list[list[int]]]:
    """Modes and ranks of every weight of a model, by its name."""
    return {
        name: [list(w.shape.out_modes), list(w.shape.in_modes), list(w.shape.ranks)]
        for name, w in model.named_modules()
        if isinstance(w, SpectralWeight)
    }


def with_plans(model: nn.Module, plans: Mapping[str, list[list[int]]]) -> None:
    """Give the weights of a model other plans, in place; whatever they hold is to be loaded."""
    for name, (out_modes, in_modes, ranks) in plans.items():
        weight = model.get_submodule(name)
        assert isinstance(weight, SpectralWeight)
        shape = TTShape(out_modes, in_modes, ranks=ranks)
        if shape != weight.shape:
            new = make_weight(
                weight.method, shape, weight.spectrum, dtype=weight.dtype, device=weight.device
            )
            model.set_submodule(name, new)


def _adaptive(trainer: Trainer) -> AdaptiveTrainer:
    return AdaptiveTrainer(
        f"{trainer.name}-adaptive",
        f"{trainer.summary}; ranks twice as high, lowered by energy, then to the rank",
        trainer.kind,
        trainer.parameterization,
        f"{trainer.optimizer}-adaptive",
        trainer.untuned_lr,
        trainer.spectrum,
        trainer.largest_lr,
    )


ADAPTIVE = tuple(
    _adaptive(trainer) for trainer in TRAINERS if trainer.name.endswith("-riemannian-muon")
)
