"""What a task is: data, model, loss and metric; or a problem; or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sttp_manifold.experiments.data import Splits
from sttp_manifold.tt import SpectralTT

__all__ = [
    "ACCURACY",
    "RELATIVE_ERROR",
    "SEED_DRAWS",
    "Budget",
    "Metric",
    "Problem",
    "Task",
    "accuracy",
    "relative_error",
    "relative_square",
]


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


@dataclass(frozen=True)
class Budget:
    """What a solver is to reach, and when it has to give up.

    Attributes:
        target: relative residual on the observed entries.
        evaluations: calls of the cost function, the one unit that all solvers share, and as many
            Hessian products at most. Iterations are no such unit, and seconds would make the
            numbers depend on the machine.
    """

    target: float = 1e-10
    evaluations: int = 2000


@dataclass(frozen=True)
class Problem:
    """Find a weight from some of its entries.

    Attributes:
        start: where every solver starts, on the plan of the weights to search.
        splits: places ``(n, 2)`` and values: observed, for validation, for the test.
        digest: stands for the start.
    """

    start: SpectralTT
    splits: Splits
    digest: str


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
        seeds: seeds to compare by default.
        epochs: epochs to train by default; None where there is nothing to train.
        batch_size: examples in one step; None takes the whole training split.
        repeats: passes over the training split in one epoch.
        dtype: ``float32`` or ``float64``, by default.
        lrs: the one grid from which every method's learning rate is chosen.
        problem: makes the problem of a rank and a seed; None where there is nothing to solve.
        kind: ``sttp`` or ``svdp``: the set of weights that solvers search.
        budget: what solvers are to reach, and with how much.
        seed_draws: what differs between seeds, in words.
        gan: defaults of a GAN's training, fields of
            :class:`~sttp_manifold.experiments.gan.setting.GanSetting`; None where there are no
            images to generate.
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
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "float32"
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    problem: Callable[[Task, int, int], Problem] | None = None
    kind: str = "sttp"
    budget: Budget | None = None
    seed_draws: str = SEED_DRAWS
    gan: Mapping[str, str | int | float | bool | None] | None = None
