"""The methods that train: a set of weights, a way to hold one, and an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.models.layers import weights
from sttp_manifold.experiments.task import Task
from sttp_manifold.nn.stock import row_of
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

__all__ = ["MOMENTUM", "TRAINERS", "Trainer"]

MOMENTUM = 0.9
_MUON_MOMENTUM = 0.95

Factory = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]


def _sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM)


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def _riemannian_sgd(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianSGD(parameters, lr=lr, momentum=MOMENTUM)


def _riemannian_adam(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianAdam(parameters, lr=lr, second_moment="frame")


def _riemannian_adam_elementwise(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianAdam(parameters, lr=lr, second_moment="elementwise")


def _riemannian_muon(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianMuon(parameters, lr=lr, momentum=_MUON_MOMENTUM)


# Chosen by (whether parameters live on a manifold, the optimizer's name).
_OPTIMIZERS: dict[tuple[bool, str], Factory] = {
    (False, "adam"): _adam,
    (False, "sgd"): _sgd,
    (True, "adam"): _riemannian_adam,
    (True, "adam-elementwise"): _riemannian_adam_elementwise,
    (True, "muon"): _riemannian_muon,
    (True, "sgd"): _riemannian_sgd,
}


@dataclass(frozen=True)
class Trainer:
    """A set of weights, a way to hold one, and an optimizer.

    Attributes:
        name: what a user types.
        summary: one line for people.
        kind: ``dense``, ``svdp`` or ``sttp``.
        parameterization: ``dense``, ``householder`` or ``riemannian``.
        optimizer: ``adam``, ``sgd`` (with momentum 0.9); on the manifold also ``adam-elementwise``
            (a second moment for each number, where ``adam`` has one for each frame) and ``muon``
            (momentum 0.95).
        untuned_lr: the learning rate where a task has none tuned for this method.
        spectrum: how singular values are held.
        largest_lr: beyond it there is no learning rate: for Muon a rate is an angle.
    """

    name: str
    summary: str
    kind: str
    parameterization: str
    optimizer: str
    untuned_lr: float
    spectrum: str = "free"
    largest_lr: float = math.inf

    run = "train"
    requires = None
    is_available = True
    cpu_only = False

    def applies_to(self, task: Task) -> bool:
        """Whether a task has a model to train."""
        return task.model is not None

    @property
    def is_dense(self) -> bool:
        """Whether weights stay as they are."""
        return self.kind == "dense"

    @property
    def momentum(self) -> float | None:
        """Momentum of SGD and Muon; None for Adam."""
        return {"sgd": MOMENTUM, "muon": _MUON_MOMENTUM}.get(self.optimizer.split("-")[0])

    def convert(self, model: nn.Module, rank: int) -> None:
        """Hold every weight of a stock model this method's way, in place; the weights stay.

        Each weight must be representable: :func:`common_start` makes models whose weights are.
        """
        if self.is_dense:
            return
        for name, layer in weights(model).items():
            row = row_of(layer)
            assert row is not None
            assert row.spectral is not None
            held = row.spectral.from_layer(
                layer, rank, kind=self.kind, method=self.parameterization, spectrum=self.spectrum
            )
            model.set_submodule(name, held)

    def make_optimizer(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimizer of this method.

        Args:
            parameters: those of a model that :meth:`convert` has changed.
            lr: learning rate.

        Shape:
            - parameters: any, as the model has them
        """
        on_manifold = self.parameterization in ("riemannian", "fixed-rank")
        return _OPTIMIZERS[on_manifold, self.optimizer.removesuffix("-adaptive")](parameters, lr)


_KINDS = {"svdp": "U diag(s) V^T", "sttp": "U diag(s) V^T with U, V as tensor trains"}
_HELD = {
    "chart": ("householder", "Householder charts"),
    "riemannian": ("riemannian", "points on the manifold"),
}
_NAMES = {"adam": "Adam", "sgd": "SGD with momentum"}
_ON_MANIFOLDS = {
    "adam": "Adam, a second moment a frame",
    "adam-elementwise": "Adam, a second moment a number",
    "sgd": "SGD with momentum",
    "muon": "Muon, with Adam for spectra",
}
_UNTUNED = {"adam": 1e-2, "adam-elementwise": 1e-2, "sgd": 1e-1, "muon": 3e-2}


def _dense(optimizer: str) -> Trainer:
    return Trainer(
        f"dense-{optimizer}",
        f"the weight as it is, {_NAMES[optimizer]}",
        "dense",
        "dense",
        optimizer,
        untuned_lr=_UNTUNED[optimizer] / 10,
    )


def _spectral(kind: str, how: str, optimizer: str) -> Trainer:
    parameterization, words = _HELD[how]
    names = _ON_MANIFOLDS if how == "riemannian" else _NAMES
    prefix = "Riemannian " if how == "riemannian" else ""
    return Trainer(
        f"{kind}-{how}-{optimizer}",
        f"{_KINDS[kind]}, held as {words}, {prefix}{names[optimizer]}",
        kind,
        parameterization,
        optimizer,
        untuned_lr=_UNTUNED[optimizer],
        largest_lr=math.pi / 2 if optimizer == "muon" else math.inf,
    )


TRAINERS = (
    *map(_dense, _NAMES),
    *(
        _spectral(kind, how, name)
        for kind in _KINDS
        for how in _HELD
        for name in (_ON_MANIFOLDS if how == "riemannian" else _NAMES)
    ),
)
