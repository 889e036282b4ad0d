"""The methods, and the one place where a new one is registered.

A method that trains is a set of weights (dense, SVDP, STTP), a way to hold one (as it is, by
Householder charts, as a point of a manifold) and an optimizer. To add one::

    METHODS.add(Method("svdp-chart-sgd", "SVDP by Householder chart, SGD", "svdp", "householder",
                       "sgd", untuned_lr=0.1))

A method that solves is a :class:`~sttp_manifold.experiments.solvers.Solver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.registry import Registry
from sttp_manifold.experiments.solvers import SOLVERS, Solver
from sttp_manifold.experiments.tasks import Task
from sttp_manifold.nn import SpectralConv2d, SpectralLinear
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD

__all__ = ["METHODS", "AnyMethod", "Method", "left_out", "methods_for"]

MOMENTUM = 0.9

Factory = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]


def _sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM)


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def _riemannian_sgd(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianSGD(parameters, lr=lr, momentum=MOMENTUM)


def _riemannian_adam(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    return RiemannianAdam(parameters, lr=lr)


# Chosen by (whether parameters live on a manifold, the optimizer's name).
_OPTIMIZERS: dict[tuple[bool, str], Factory] = {
    (False, "adam"): _adam,
    (False, "sgd"): _sgd,
    (True, "adam"): _riemannian_adam,
    (True, "sgd"): _riemannian_sgd,
}


@dataclass(frozen=True)
class Method:
    """A set of weights, a way to hold one, and an optimizer.

    Attributes:
        name: what a user types.
        summary: one line for people.
        kind: ``dense``, ``svdp`` or ``sttp``.
        parameterization: ``dense``, ``householder`` or ``riemannian``.
        optimizer: ``adam`` or ``sgd`` (with momentum 0.9).
        untuned_lr: the learning rate where a task has none tuned for this method.
        spectrum: how singular values are held.
    """

    name: str
    summary: str
    kind: str
    parameterization: str
    optimizer: str
    untuned_lr: float
    spectrum: str = "free"

    trains = True
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
        """Momentum of SGD; None for Adam."""
        return MOMENTUM if self.optimizer == "sgd" else None

    def convert(self, model: nn.Module, rank: int) -> None:
        """Hold every weight of a stock model this method's way, in place; the weights stay.

        Each weight must be representable: :func:`common_start` makes models whose weights are.
        """
        if self.is_dense:
            return
        for name, layer in weights(model).items():
            model.set_submodule(name, self._hold(layer, rank))

    def _hold(self, layer: nn.Module, rank: int) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return SpectralLinear.from_layer(
                layer, rank, kind=self.kind, method=self.parameterization, spectrum=self.spectrum
            )
        assert isinstance(layer, nn.Conv2d)
        return SpectralConv2d.from_layer(
            layer, rank, kind=self.kind, method=self.parameterization, spectrum=self.spectrum
        )

    def make_optimizer(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimizer of this method.

        Args:
            parameters: those of a model that :meth:`convert` has changed.
            lr: learning rate.

        Shape:
            - parameters: any, as the model has them
        """
        return _OPTIMIZERS[self.parameterization == "riemannian", self.optimizer](parameters, lr)


AnyMethod: TypeAlias = Method | Solver

METHODS: Registry[AnyMethod] = Registry("method")


def methods_for(task: Task, patterns: Sequence[str]) -> list[str]:
    """The names that the patterns stand for on a task, in the order asked for.

    A wildcard, or ``all``, stands for the methods that apply to the task and are installed.

    Raises:
        ConfigError: a pattern stands for nothing, or a method is named that does not apply.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        hits = METHODS.select([pattern])
        fits = [name for name in hits if METHODS[name].applies_to(task)]
        if not fits:
            here = ", ".join(method.name for method in METHODS if method.applies_to(task))
            raise ConfigError(
                f"method {pattern!r} does not apply to the task {task.name!r}. Those that do are: "
                f"{here}"
            )
        there = [name for name in fits if METHODS[name].is_available]
        if not there:
            package = METHODS[fits[0]].requires
            raise ConfigError(
                f"method {pattern!r} needs {package}, which is not installed: "
                f"pip install 'sttp-manifold[{package}]'"
            )
        chosen.update(dict.fromkeys(there))
    return list(chosen)


def left_out(task: Task, patterns: Sequence[str]) -> list[AnyMethod]:
    """Methods that the patterns stand for on a task, but whose package is not installed."""
    return [
        method
        for method in METHODS
        if method.applies_to(task)
        and not method.is_available
        and any(fnmatchcase(method.name, "*" if p == "all" else p) for p in patterns)
    ]


_KINDS = {"svdp": "U diag(s) V^T", "sttp": "U diag(s) V^T with U, V as tensor trains"}
_HELD = {
    "chart": ("householder", "Householder charts"),
    "riemannian": ("riemannian", "points on the manifold"),
}
_NAMES = {"adam": "Adam", "sgd": "SGD with momentum"}
_UNTUNED = {"adam": 1e-2, "sgd": 1e-1}

for _optimizer, _name in _NAMES.items():
    METHODS.add(
        Method(
            f"dense-{_optimizer}",
            f"the weight as it is, {_name}",
            "dense",
            "dense",
            _optimizer,
            untuned_lr=_UNTUNED[_optimizer] / 10,
        )
    )
for _kind, _what in _KINDS.items():
    for _how, (_parameterization, _words) in _HELD.items():
        for _optimizer, _name in _NAMES.items():
            _prefix = "Riemannian " if _how == "riemannian" else ""
            METHODS.add(
                Method(
                    f"{_kind}-{_how}-{_optimizer}",
                    f"{_what}, held as {_words}, {_prefix}{_name}",
                    _kind,
                    _parameterization,
                    _optimizer,
                    untuned_lr=_UNTUNED[_optimizer],
                )
            )

for _solver in SOLVERS:
    METHODS.add(_solver)
