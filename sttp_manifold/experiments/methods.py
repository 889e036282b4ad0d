"""The methods, and the one place where a new one is registered.

A method that trains is a set of weights (dense, SVDP, STTP), a way to hold one (as it is, by
Householder charts, as a point of a manifold) and an optimizer. To add one::

    METHODS.add(Trainer("svdp-chart-sgd", "SVDP by Householder chart, SGD", "svdp", "householder",
                        "sgd", untuned_lr=0.1))

with :class:`~sttp_manifold.experiments.trainers.Trainer`. A method that solves is a
:class:`~sttp_manifold.experiments.runs.solve.Solver`; one that generates images is a
:class:`~sttp_manifold.experiments.gan.entrants.GanEntrant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.fixed_rank import FIXED_RANK
from sttp_manifold.experiments.gan.entrants import GAN_ENTRANTS
from sttp_manifold.experiments.method import Method
from sttp_manifold.experiments.rank_schedule import ADAPTIVE
from sttp_manifold.experiments.registry import Registry
from sttp_manifold.experiments.solvers import SOLVERS
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.trainers import TRAINERS

__all__ = ["METHODS", "Method", "left_out", "methods_for"]

METHODS: Registry[Method] = Registry("method")


def methods_for(task: Task, patterns: Sequence[str]) -> list[str]:
    """The names that the patterns stand for on a task, in the order asked for.

    A wildcard, or ``all``, stands for the methods that apply to the task and are installed; ``all``
    leaves out those that say ``extra``, which take a wildcard or their name.

    Raises:
        ConfigError: a pattern stands for nothing, or a method is named that does not apply.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        hits = [
            name
            for name in METHODS.select([pattern])
            if pattern != "all" or not getattr(METHODS[name], "extra", False)
        ]
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


def left_out(task: Task, patterns: Sequence[str]) -> list[Method]:
    """Methods that the patterns stand for on a task, but whose package is not installed."""
    return [
        method
        for method in METHODS
        if method.applies_to(task)
        and not method.is_available
        and any(fnmatchcase(method.name, "*" if p == "all" else p) for p in patterns)
    ]


for _trainer in (*TRAINERS, *ADAPTIVE, *FIXED_RANK):
    METHODS.add(_trainer)
for _solver in SOLVERS:
    METHODS.add(_solver)
for _entrant in GAN_ENTRANTS:
    METHODS.add(_entrant)
