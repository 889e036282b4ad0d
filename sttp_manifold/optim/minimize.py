r"""`minimize`: a cost on a manifold, by line search, trust regions, or pymanopt's solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import Manifold
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.geometry import plain
from sttp_manifold.optim._conjugate_gradient import conjugate_gradient, steepest_descent
from sttp_manifold.optim._lbfgs import lbfgs
from sttp_manifold.optim._objective import Iterate, Limits, Objective, Stopped
from sttp_manifold.optim._options import (
    ConjugateGradientOptions,
    LBFGSOptions,
    PymanoptOptions,
    SteepestDescentOptions,
    TrustRegionOptions,
    read_options,
)
from sttp_manifold.optim._progress import Progress
from sttp_manifold.optim._pymanopt import run_pymanopt
from sttp_manifold.optim._result import MinimizeResult, make_result
from sttp_manifold.optim._resume import go_on
from sttp_manifold.optim._trust_regions import trust_regions

__all__ = ["METHODS", "MinimizeResult", "minimize"]


class _Method(NamedTuple):
    options: type[Any]
    run: Callable[..., None]
    curvature: bool = False
    resumes: bool = True


_METHODS: dict[str, _Method] = {
    "steepest_descent": _Method(SteepestDescentOptions, steepest_descent),
    "conjugate_gradient": _Method(ConjugateGradientOptions, conjugate_gradient),
    "trust_regions": _Method(TrustRegionOptions, trust_regions, curvature=True),
    "lbfgs": _Method(LBFGSOptions, lbfgs),
    "pymanopt:steepest_descent": _Method(
        PymanoptOptions, run_pymanopt("SteepestDescent"), resumes=False
    ),
    "pymanopt:conjugate_gradient": _Method(
        PymanoptOptions, run_pymanopt("ConjugateGradient"), resumes=False
    ),
    "pymanopt:trust_regions": _Method(
        PymanoptOptions, run_pymanopt("TrustRegions"), curvature=True, resumes=False
    ),
}

METHODS = tuple(_METHODS)
"""What :func:`minimize` takes as ``method``."""


@explained
def minimize(
    manifold: Manifold,
    cost: Callable[..., Tensor],
    x0: Tensor,
    method: str = "trust_regions",
    *,
    gradient_tolerance: float = 1e-6,
    cost_tolerance: float | None = None,
    step_tolerance: float | None = None,
    max_iterations: int | None = 1000,
    max_time: float | None = None,
    max_evaluations: int | None = None,
    max_products: int | None = None,
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    options: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> MinimizeResult:
    r"""Minimize a cost over a manifold, on torch tensors, on the device of ``x0``.

    ====================== =========================================================================
    method                 what it does
    ====================== =========================================================================
    ``trust_regions``      Steihaug-Toint conjugate gradients on the exact Hessian; ends
                           superlinearly
    ``conjugate_gradient`` Hestenes-Stiefel or Polak-Ribiere+, with a Wolfe line search
    ``lbfgs``              transported pairs, with a Wolfe line search
    ``steepest_descent``   along the gradient
    ``pymanopt:...``       pymanopt's ``steepest_descent``, ``conjugate_gradient``,
                           ``trust_regions``, on the CPU, with gradients and Hessians from here
    ====================== =========================================================================

    The options of each are those of ``SteepestDescentOptions``, ``ConjugateGradientOptions``,
    ``LBFGSOptions``, ``TrustRegionOptions`` and ``PymanoptOptions`` in
    :mod:`sttp_manifold.optim`; an unknown name raises an error that lists them.

    Args:
        manifold: a geoopt manifold, or one of this package. If ``x0`` is a batch of points, they
            are minimized over together, as one point of a product.
        cost: a function that returns a scalar tensor: of a
            :class:`~sttp_manifold.SpectralTT` where the manifold has ``unpack``, of the point
            elsewhere.
        x0: where to start.
        method: one of :data:`METHODS`.
        gradient_tolerance: stop when the norm of the Riemannian gradient is at or below.
        cost_tolerance: stop when the cost is at or below.
        step_tolerance: give up when the length of a step is at or below.
        max_iterations: give up after so many.
        max_time: give up after so many seconds.
        max_evaluations: give up rather than call the cost more often than this.
        max_products: give up rather than compute more Hessian-vector products than this.
        callback: called with each iterate, ``x0`` included: an ``OptimizeResult`` with ``x``,
            ``fun``, ``jac``, ``grad_norm``, ``nit``, ``nfev``, ``njev``, ``nhev``. Stops the run
            by raising ``StopIteration``.
        progress: show a line that follows the run.
        options: of the method, by name.
        state: ``state`` of an earlier result for the same cost, method and options: the run goes
            on from where that one stopped, on a CPU bit for bit as if it had not. Limits count
            from its first start, and ``x0`` says no more than shape, dtype and device.

    Shape:
        - x0, and ``x`` and ``jac`` of the result: ``(*b, n)`` on a flat manifold, of any shape
          elsewhere; the dtype and device of ``x0`` throughout

    Raises:
        ManifoldError: an unknown method or option, a limit that is no number; a start that is not
            on the manifold, or where the cost is not finite; a cost that is not scalar, or does not
            depend on the point as far as autograd can see; a method that needs a Hessian, or
            transport, on a manifold that has none; a state of another method, or of pymanopt's,
            whose solvers cannot be taken up again.

    Example:
        >>> from sttp_manifold._geoopt import geoopt
        >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        >>> x0 = torch.full((5,), 5**-0.5, dtype=torch.float64)
        >>> result = minimize(geoopt.Sphere(), lambda x: x @ A @ x, x0)
        >>> result.success, round(result.fun, 9)
        (True, 1.0)
    """
    if method not in METHODS:
        raise ManifoldError(f"method={method!r} is none of {', '.join(map(repr, METHODS))}")
    chosen = _METHODS[method]
    read = read_options(chosen.options, options or {}, method)
    limits = Limits(
        gradient_tolerance,
        cost_tolerance,
        step_tolerance,
        max_iterations,
        max_evaluations,
        max_products,
        max_time,
    )
    limits.check()
    for name, function in (("cost", cost), ("callback", callback)):
        if not callable(function) and (name == "cost" or function is not None):
            raise ManifoldError(f"{name} is a function, but {type(function).__name__} came")
    title = method.replace("_", " ")
    # Inference mode would take the gradients away from the cost.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        Progress(title, quiet=not progress) as line,
    ):
        x0 = _start(manifold, x0)
        objective = Objective(manifold, cost, limits, callback, line, read.return_all)
        if chosen.curvature:
            objective.cost.check_curvature()
        try:
            start = _first(objective, x0, method, state)
            chosen.run(objective, start, read)
            raise AssertionError("a method runs until it is stopped")
        except Stopped as stopped:
            if objective.last is None:
                raise ManifoldError(
                    f"{stopped.message} before the cost at x0 was known; allow at least one "
                    "evaluation, and more than no time"
                ) from None
            line.finish(stopped.message)
            return make_result(objective, stopped, method if chosen.resumes else None)


def _first(
    objective: Objective, x0: Tensor, method: str, state: Mapping[str, Any] | None
) -> Iterate:
    """Where the method begins, on record."""
    chosen = _METHODS[method]
    if state is not None:
        if not chosen.resumes:
            raise ManifoldError(
                f"method={method!r} cannot go on from a state: pymanopt keeps none between its "
                "iterations; start anew from x0, without state"
            )
        return go_on(objective, state, method, x0, curvature=chosen.curvature)
    start = objective.start(x0, curvature=chosen.curvature)
    _check_finite(start)
    objective.record(start, 0.0)
    return start


def _start(manifold: Any, x0: Any) -> Tensor:
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64):
        kind = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        if isinstance(x0, Tensor) and x0.is_complex():
            raise ManifoldError(
                f"x0 is a point of real numbers, but {kind} came: points of "
                f"{type(manifold).__name__} are complex, and no method here moves those"
            )
        raise ManifoldError(
            f"x0 is a point, a tensor of a floating dtype, float32 or float64, but {kind} came; "
            "minimize(M, cost, M.random()) starts at random"
        )
    x0 = plain(x0).clone()
    check = getattr(manifold, "check_point_on_manifold", None)
    if check is not None:
        tolerance = max(1e-5, 100 * torch.finfo(x0.dtype).eps)
        lies, why = check(x0, explain=True, atol=tolerance, rtol=tolerance)
        if not lies:
            raise ManifoldError(
                f"x0 is not on {type(manifold).__name__}: {why}; start from manifold.projx(x0)"
            )
    return x0


def _check_finite(start: Iterate) -> None:
    value, grad_norm = start.value, start.grad_norm
    if not math.isfinite(value) or not math.isfinite(grad_norm):
        what = f"cost is {value}" if not math.isfinite(value) else f"gradient norm is {grad_norm}"
        dtype = start.x.dtype
        raise ManifoldError(
            f"the {what} at x0, which is not finite; start where both are finite, and mind that "
            f"{dtype} ends at {torch.finfo(dtype).max:.1e}"
        )
