r"""What a solver sees: a cost on a manifold, within a budget, and the record of its iterates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import IntEnum
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.contract import LinearMap
from sttp_manifold.manifolds.cost import Evaluation, ManifoldCost
from sttp_manifold.optim._progress import Progress

__all__ = ["Iterate", "Limits", "Objective", "Status", "Stopped"]

# Beyond 10 to plus or minus this, the entries of a first gradient are brought to the size of one.
_DECADES = {torch.float32: 12, torch.float64: 100}

# Iterates in a row that lower neither the cost nor the gradient before a run counts as stalled.
_MOST_IDLE = 20


class Status(IntEnum):
    """Why a solver stopped; what lies below `STEP` is a success."""

    GRADIENT = 0
    COST = 1
    STEP = 2
    ITERATIONS = 3
    EVALUATIONS = 4
    TIME = 5
    CALLBACK = 6
    STALLED = 7
    PRODUCTS = 8


class Stopped(Exception):  # noqa: N818 (it is how a run ends, not what went wrong)
    """Leaves a solver, from as deep as it may be, with the reason."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Limits(NamedTuple):
    """When to stop; None for never."""

    gradient: float
    cost: float | None
    step: float | None
    iterations: int | None
    evaluations: int | None
    products: int | None
    seconds: float | None

    def check(self) -> None:
        """Refuse what is no limit.

        Raises:
            ManifoldError: something that is no number, or not a number; a count below zero.
        """
        for field, name in _ARGUMENTS.items():
            value = getattr(self, field)
            if value is None and field != "gradient":
                continue
            counts = field in ("iterations", "evaluations", "products")
            kind = "an integer" if counts else "a number"
            number = isinstance(value, Integral if counts else Real)
            if not number or isinstance(value, bool) or math.isnan(value):
                never = "" if field == "gradient" else ", or None for no limit"
                raise ManifoldError(f"{name} is {kind}{never}, got {value!r}")
            if value < 0 and field != "cost":
                raise ManifoldError(f"{name} is not below zero, got {value!r}")


_ARGUMENTS = {
    "gradient": "gradient_tolerance",
    "cost": "cost_tolerance",
    "step": "step_tolerance",
    "iterations": "max_iterations",
    "evaluations": "max_evaluations",
    "products": "max_products",
    "seconds": "max_time",
}


class Iterate(NamedTuple):
    """A point that a solver accepted, with what it knows there."""

    evaluation: Evaluation
    value: float
    gradient: Tensor
    grad_norm: float

    @property
    def x(self) -> Tensor:
        """The point."""
        return self.evaluation.x


class _BudgetedCost(ManifoldCost):
    """A cost whose products with the Hessian are allowed one by one."""

    def __init__(
        self, manifold: Any, cost: Callable[..., Tensor], allow: Callable[[], None]
    ) -> None:
        super().__init__(manifold, cost)
        self._allow = allow

    def _counted(self, apply: LinearMap) -> LinearMap:
        counted = super()._counted(apply)

        def allowed(u: Tensor) -> Tensor:
            self._allow()
            return counted(u)

        return allowed


class Objective:
    r"""Cost and geometry, the budget, and the history.

    Every call of the user's function passes through here and is counted; when the budget is spent
    the next one raises :class:`Stopped` instead.

    Args:
        manifold: a geoopt manifold, or one of this package.
        cost: the user's function.
        limits: when to stop.
        callback: told each iterate.
        progress: the line on the screen.
        keep_points: record every iterate.

    Values, gradients and slopes in here are those of the cost times ``cost.unit``, a power of two
    that is one unless the first gradient is so small or large that its dtype could hardly hold what
    solvers make of it. What leaves (the record, the callback, the result) is in the user's units.

    Attributes:
        cost: the cost that counts.
        geometry: the operations of the manifold.
        own: what the method goes on with after the last iterate, beside that; nothing at the start.
        counts: calls, gradients and Hessian products when the last iterate was recorded.
        noise: the relative error that the cost is taken to carry. Differences of the cost below
            ``resolution(value)`` say nothing; slopes are asked instead.
    """

    def __init__(
        self,
        manifold: Any,
        cost: Callable[..., Tensor],
        limits: Limits,
        callback: Callable[[Any], Any] | None,
        progress: Progress,
        keep_points: bool,
    ) -> None:
        self.manifold = manifold
        self.limits = limits
        self.noise = 0.0
        self.last: Iterate | None = None
        self.nit = -1
        self.own: dict[str, Any] = {}
        self.counts = (0, 0, 0)
        self.history: dict[str, list[Any]] = {
            name: [] for name in ("cost", "grad_norm", "step", "nfev", "seconds")
        }
        self.allvecs: list[Tensor] | None = [] if keep_points else None
        self._callback = callback
        self._progress = progress
        # Earlier, where a run goes on: what it took before counts as well.
        self.began = time.perf_counter()
        self.initial = 0.0
        self.best_norm = self.best_value = math.inf
        self.idle = 0

        def budgeted(argument: Any) -> Tensor:
            self._check_budget()
            return cost(argument)

        self.cost = _BudgetedCost(manifold, budgeted, self._check_products)
        self.geometry = self.cost.geometry

    # -- counts -----------------------------------------------------------------------------------

    @property
    def nfev(self) -> int:
        """Calls of the user's function so far."""
        return self.cost.evaluations

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.began

    def _check_budget(self) -> None:
        # ManifoldCost counts before it calls, so that this call is counted already.
        most = self.limits.evaluations
        try:
            self._check_time()
            if most is not None and self.cost.evaluations > most:
                raise Stopped(
                    Status.EVALUATIONS, f"max_evaluations = {most} calls of the cost made"
                )
        except Stopped:
            self.cost.evaluations -= 1
            raise

    def _check_products(self) -> None:
        most = self.limits.products
        if most is not None and self.cost.products >= most:
            raise Stopped(Status.PRODUCTS, f"max_products = {most} Hessian products computed")
        self._check_time()

    def _check_time(self) -> None:
        seconds = self.limits.seconds
        if seconds is not None and self.seconds >= seconds:
            raise Stopped(Status.TIME, f"max_time = {seconds:g} seconds spent")

    # -- geometry ---------------------------------------------------------------------------------

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product as a scalar: over all points, where ``x`` is a batch of them."""
        return self.geometry.inner(x, u, v)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction, as a plain tensor."""
        return self.geometry.retr(x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport of one vector or of a stack of them."""
        return self.geometry.transp(x, y, v)

    # -- evaluations ------------------------------------------------------------------------------

    def start(self, x: Tensor, *, curvature: bool) -> Iterate:
        """The first iterate, and the unit in which all are computed."""
        at = self.iterate(self.cost.at(x, curvature=curvature))
        self.cost.unit = _unit(at)
        if self.cost.unit != 1.0:
            at = self.iterate(self.cost.at(x, curvature=curvature))
        return at

    def shown(self, at: Iterate) -> Iterate:
        """An iterate in the user's units."""
        unit = self.cost.unit
        if unit == 1.0:
            return at
        return Iterate(at.evaluation, at.value / unit, at.gradient / unit, at.grad_norm / unit)

    @property
    def gradient_tolerance(self) -> float:
        """That of the limits, in the units of the iterates."""
        return self.limits.gradient * self.cost.unit

    def iterate(self, evaluation: Evaluation) -> Iterate:
        """What is known at a point that a solver is about to accept."""
        gradient = evaluation.gradient()
        square = self.inner(evaluation.x, gradient, gradient)
        value, square_ = torch.stack([evaluation.value.to(square), square]).tolist()
        return Iterate(evaluation, value, gradient, max(square_, 0.0) ** 0.5)

    def hessian(self, at: Iterate) -> LinearMap:
        """The Riemannian Hessian at an iterate."""
        return at.evaluation.hessian()

    def resolution(self, value: float) -> float:
        """What differences of the cost near ``value`` may be nothing but rounding."""
        return self.noise * max(abs(value), abs(self.initial))

    # -- record -----------------------------------------------------------------------------------

    def record(self, at: Iterate, step: float, **own: Any) -> None:
        """Note an iterate; tell whoever listens.

        Args:
            at: the iterate.
            step: length of the step that led there.
            own: numbers, tensors and lists of these that the method goes on with, by name.

        Raises:
            Stopped: when a limit is reached or the callback says so.
        """
        if self.last is None:
            self.initial = at.value
            self.noise = 100 * torch.finfo(at.x.dtype).eps
        self.last, self.own = at, own
        self.counts = (self.nfev, self.cost.gradients, self.cost.products)
        self.nit += 1
        shown = self.shown(at)
        row = (shown.value, shown.grad_norm, step, self.nfev, self.seconds)
        for column, entry in zip(self.history.values(), row, strict=True):
            column.append(entry)
        if self.allvecs is not None:
            self.allvecs.append(at.x)
        self._progress.show(self.nit, shown.value, shown.grad_norm, self.nfev)
        self._tell(shown)
        self.check(shown, step)
        self._check_idle(at)

    def _tell(self, at: Iterate) -> None:
        if self._callback is None:
            return
        told = OptimizeResult(
            x=at.x.clone(),
            fun=at.value,
            jac=at.gradient.clone(),
            grad_norm=at.grad_norm,
            nit=self.nit,
            nfev=self.nfev,
            njev=self.cost.gradients,
            nhev=self.cost.products,
        )
        try:
            self._callback(told)
        except StopIteration:
            raise Stopped(Status.CALLBACK, "the callback raised StopIteration") from None

    def check(self, at: Iterate, step: float) -> None:
        """Whether an iterate, in the user's units, meets a limit.

        Raises:
            Stopped: it does.
        """
        limits = self.limits
        if at.grad_norm <= limits.gradient:
            raise Stopped(
                Status.GRADIENT,
                f"gradient norm {at.grad_norm:.3g} <= gradient_tolerance = {limits.gradient:g}",
            )
        if limits.cost is not None and at.value <= limits.cost:
            raise Stopped(Status.COST, f"cost {at.value:.3g} <= cost_tolerance = {limits.cost:g}")
        if limits.step is not None and self.nit > 0 and step <= limits.step:
            raise Stopped(Status.STEP, f"step {step:.3g} <= step_tolerance = {limits.step:g}")
        if limits.iterations is not None and self.nit >= limits.iterations:
            raise Stopped(Status.ITERATIONS, f"max_iterations = {limits.iterations} made")

    def _check_idle(self, at: Iterate) -> None:
        # Against the best so far: where the cost is noise, new bests become rare by themselves. In
        # units of the value there, for sums of squares near zero are exact far below their start.
        better = at.value < self.best_value - self.noise / 100 * abs(at.value)
        if better or at.grad_norm < self.best_norm:
            self.idle = 0
        else:
            self.idle += 1
        self.best_value = min(self.best_value, at.value)
        self.best_norm = min(self.best_norm, at.grad_norm)
        if self.idle == _MOST_IDLE:
            raise self.stalled(at, f"nothing gained in {_MOST_IDLE} iterations")

    def stalled(self, at: Iterate, why: str) -> Stopped:
        """The end of a run that can go no further."""
        return Stopped(
            Status.STALLED,
            f"{why}: the cost cannot be lowered further in {at.x.dtype} (gradient norm "
            f"{self.shown(at).grad_norm:.3g} > gradient_tolerance = {self.limits.gradient:g})",
        )


def _unit(at: Iterate) -> float:
    """The power of two that brings a gradient to the size of one, if it is far from that."""
    info = torch.finfo(at.x.dtype)
    decades = _DECADES.get(at.x.dtype, 4)
    if at.gradient.numel() == 0:
        return 1.0
    largest = float(torch.linalg.vector_norm(at.gradient, torch.inf))
    if largest == 0.0 or math.isnan(largest) or not math.isfinite(at.value):
        return 1.0
    if 10.0**-decades <= largest <= 10.0**decades:
        return 1.0
    # Infinite entries stand for what the backward pass cannot hold in the units of the user.
    unit = math.sqrt(float(info.tiny)) if math.isinf(largest) else 1 / largest
    # The value has to fit as well.
    unit = min(unit, 1e-6 * float(info.max) / max(abs(at.value), float(info.tiny)))
    unit = min(max(unit, float(info.tiny)), 1e-2 * float(info.max))
    return float(2.0 ** math.floor(math.log2(unit)))
