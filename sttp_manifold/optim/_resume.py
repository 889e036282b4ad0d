"""Where a run of `minimize` is between two iterations, as plain values, and how it goes on.

Whoever repeats the arithmetic bit for bit, as a CPU does on one thread, gets the iterates that the
run would have had without the cut.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sttp_manifold.errors import ManifoldError
from sttp_manifold.optim._objective import Iterate, Objective

__all__ = ["go_on", "state_of"]

_PLAIN = ("noise", "initial", "best_norm", "best_value", "idle", "nit")


def state_of(objective: Objective, method: str) -> dict[str, Any]:
    """Tensors, numbers, texts, and lists and dictionaries of these: all that a run goes on from.

    Args:
        objective: with an iterate on record.
        method: of ``minimize``.
    """
    last = objective.last
    assert last is not None
    return {
        "method": method,
        "x": last.x.clone(),
        "gradient": last.gradient.clone(),
        "value": last.value,
        "grad_norm": last.grad_norm,
        "unit": objective.cost.unit,
        "own": _copied(objective.own),
        "counts": list(objective.counts),
        "history": {name: list(column) for name, column in objective.history.items()},
        "allvecs": None if objective.allvecs is None else list(objective.allvecs),
        **{name: getattr(objective, name) for name in _PLAIN},
    }


def go_on(
    objective: Objective, state: Mapping[str, Any], method: str, x0: Tensor, *, curvature: bool
) -> Iterate:
    """The iterate at which a run was cut; the objective is as it was then.

    The cost is called there once, which is not counted: the run has counted it before.

    Args:
        objective: of a run that has not begun.
        state: of :func:`state_of`.
        method: of ``minimize``.
        x0: a point of the run.
        curvature: whether the method asks for Hessians.

    Raises:
        ManifoldError: a state that is none, or one of another method or of other points.
        Stopped: a limit is met there.
    """
    _check(state, method, x0)
    x, cost = state["x"].to(x0.device), objective.cost
    cost.unit = state["unit"]
    evaluation = cost.at(x, curvature=curvature)
    if curvature:
        evaluation.gradient()
    cost.evaluations, cost.gradients, cost.products = state["counts"]
    gradient = state["gradient"].to(x0.device)
    at = Iterate(evaluation, state["value"], gradient, state["grad_norm"])
    for name in _PLAIN:
        setattr(objective, name, state[name])
    # What the run changes is its own: a state may be gone on from twice.
    objective.own = _copied(state["own"])
    objective.history = {name: list(column) for name, column in state["history"].items()}
    if objective.allvecs is not None:
        objective.allvecs = list(state["allvecs"] or [])
    objective.last, objective.counts = at, tuple(state["counts"])
    objective.began = time.perf_counter() - state["history"]["seconds"][-1]
    objective.check(objective.shown(at), state["history"]["step"][-1])
    return at


def _copied(own: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of their own memory: views of a stack would be kept with all of it."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(entry) for entry in value]
        return value.clone() if isinstance(value, Tensor) else value

    return {name: copied(value) for name, value in own.items()}


def _check(state: Any, method: str, x0: Tensor) -> None:
    if not isinstance(state, Mapping) or "method" not in state:
        raise ManifoldError(
            f"state is what a result holds, as in minimize(..., state=result.state), but "
            f"{type(state).__name__} came"
        )
    if state["method"] != method:
        raise ManifoldError(
            f"the state is of method={state['method']!r}, and only that goes on from it, but "
            f"method={method!r} came"
        )
    x = state["x"]
    if x.shape != x0.shape or x.dtype != x0.dtype:
        raise ManifoldError(
            f"the state is of a run with points {tuple(x.shape)} of {x.dtype}, but x0 is "
            f"{tuple(x0.shape)} of {x0.dtype}; give the x0 of that run"
        )
