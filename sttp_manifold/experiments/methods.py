"""The methods, and the one place where a new one is registered.

A method that trains is a set of weights (dense, SVDP, STTP), a way to hold one (as it is, by
Householder charts, as a point of a manifold) and an optimizer. To add one::

    METHODS.add(Method("svdp-chart-sgd", "SVDP by Householder chart, SGD", "svdp", "householder",
                       "sgd", untuned_lr=0.1))

A method that solves is a :class:`~sttp_manifold.experiments.solvers.Solver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.method import Method
from sttp_manifold.experiments.registry import Registry
from sttp_manifold.experiments.runs.solve import Solver
from sttp_manifold.experiments.solvers import SOLVERS
from sttp_manifold.experiments.task import Task

__all__ = ["METHODS", "AnyMethod", "Method", "left_out", "methods_for"]

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
