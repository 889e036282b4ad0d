"""The tasks, and the one place where a new one is registered.

A task is data with fixed splits, a model, a loss and a metric, for the methods that train; or a
problem, for those that solve; or both. To add one::

    TASKS.add(Task(
        name="my-task", summary="…", data=1, load=my_splits, model=my_model,
        loss=nn.functional.cross_entropy, metric=ACCURACY, score=accuracy,
        ranks=(4, 8), epochs=20, batch_size=64,
    ))
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sttp_manifold.experiments import models
from sttp_manifold.experiments.data import Splits, completion, digits, fashion_mnist
from sttp_manifold.experiments.problems import (
    Budget,
    Problem,
    matrix_problem,
    network_problem,
    tensor_problem,
)
from sttp_manifold.experiments.registry import Registry

__all__ = ["SEED_DRAWS", "TASKS", "Metric", "Task", "accuracy", "relative_error", "relative_square"]


@dataclass(frozen=True)
class Metric:
    """What a task is judged by.

    Attributes:
        name: for tables and axes.
        unit: for axes, empty for a plain number.
        higher: whether more is better.
        log: whether it belongs on a logarithmic axis.
        spec: how one value is printed.
    """

    name: str
    unit: str
    higher: bool
    log: bool
    spec: str

    def show(self, value: float) -> str:
        """A value as text, without its unit."""
        return format(value, self.spec)

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` beats ``b``."""
        return a > b if self.higher else a < b


ACCURACY = Metric("accuracy", "%", higher=True, log=False, spec=".2f")
RELATIVE_ERROR = Metric("relative error", "", higher=False, log=True, spec=".2e")


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Percentage of rows whose largest output is at the target.

    Shape:
        - outputs: ``(n, classes)``
        - targets: ``(n,)``
    """
    return 100.0 * (outputs.argmax(dim=-1) == targets).double().mean().item()


def relative_error(outputs: Tensor, targets: Tensor) -> float:
    """Euclidean norm of the error over that of the targets.

    Shape:
        - outputs, targets: ``(n,)``
    """
    return ((outputs - targets).double().norm() / targets.double().norm()).item()


def relative_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean square of the error over that of the targets, a scalar.

    Shape:
        - outputs, targets: ``(n,)``
    """
    return nn.functional.mse_loss(outputs, targets) / targets.square().mean()


SEED_DRAWS = (
    "initial weights and the order of data; the data and its splits are the same throughout"
)
_PROBLEM_DRAWS = "the weight to find, the places that are seen and the start"


@dataclass(frozen=True)
class Task:
    """Data, model, loss and metric, with the defaults of a comparison.

    Attributes:
        name: what a user types.
        summary: one line for people.
        data: version of data, splits and model; raise it when they change, and old records and
            learning rates no longer pass for new ones.
        load: gives the splits, from a folder where the task reads one; None where a problem
            brings its own.
        model: makes the stock model, with torch's own initialization; None where there is nothing
            to train.
        loss: mean loss of outputs and targets.
        metric: what the task is judged by.
        score: the metric of outputs and targets.
        ranks: ranks to compare by default.
        epochs: epochs to train by default; None where there is nothing to train.
        batch_size: examples in one step; None takes the whole training split.
        repeats: passes over the training split in one epoch.
        dtype: ``float32`` or ``float64``, by default.
        lrs: the one grid from which every method's learning rate is chosen.
        problem: makes the problem of a rank and a seed; None where there is nothing to solve.
        kind: ``sttp`` or ``svdp``: the set of weights that solvers search.
        budget: what solvers are to reach, and with how much.
        seed_draws: what differs between seeds, in words.
    """

    name: str
    summary: str
    data: int
    load: Callable[[Path | None], Splits] | None
    model: Callable[[], nn.Module] | None
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    score: Callable[[Tensor, Tensor], float]
    ranks: tuple[int, ...]
    epochs: int | None
    batch_size: int | None
    repeats: int = 1
    dtype: str = "float32"
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    problem: Callable[[Task, int, int], Problem] | None = None
    kind: str = "sttp"
    budget: Budget | None = None
    seed_draws: str = SEED_DRAWS


TASKS: Registry[Task] = Registry("task")

TASKS.add(
    Task(
        name="digits",
        summary="1,797 images of digits, 8 x 8 (scikit-learn); a 64-128-64-10 network",
        data=1,
        load=digits,
        model=models.digits_mlp,
        loss=nn.functional.cross_entropy,
        metric=ACCURACY,
        score=accuracy,
        ranks=(4, 8),
        epochs=20,
        batch_size=64,
    )
)

TASKS.add(
    Task(
        name="fashion-mnist",
        summary="70,000 images of clothes, 28 x 28 (IDX files); two convolutions, two linear",
        data=1,
        load=fashion_mnist,
        model=models.fashion_convnet,
        loss=nn.functional.cross_entropy,
        metric=ACCURACY,
        score=accuracy,
        ranks=(4, 8),
        epochs=3,
        batch_size=128,
    )
)

TASKS.add(
    Task(
        name="completion",
        summary="a 64 x 60 matrix of TT rank 4, recovered from a quarter of its entries",
        data=1,
        load=completion,
        model=functools.partial(models.EntryModel, 64, 60),
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(4, 6),
        epochs=40,
        batch_size=None,
        repeats=20,
        dtype="float64",
        lrs=(1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0),
        problem=network_problem,
        budget=Budget(),
    )
)

TASKS.add(
    Task(
        name="completion-tensor",
        summary="a tensor of nine modes of 4, recovered from a tenth of its entries",
        data=1,
        load=None,
        model=None,
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(4, 7, 10),
        epochs=None,
        batch_size=None,
        dtype="float64",
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        problem=tensor_problem,
        budget=Budget(),
        seed_draws=_PROBLEM_DRAWS,
    )
)

TASKS.add(
    Task(
        name="completion-matrix",
        summary="a 1000 x 1000 matrix, recovered from five times as many entries as dimensions",
        data=1,
        load=None,
        model=None,
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(5, 10),
        epochs=None,
        batch_size=None,
        dtype="float64",
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        problem=matrix_problem,
        kind="svdp",
        budget=Budget(),
        seed_draws=_PROBLEM_DRAWS,
    )
)
