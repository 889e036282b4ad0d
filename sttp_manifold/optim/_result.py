"""What `minimize` returns."""

from __future__ import annotations

from html import escape
from typing import Any

from scipy.optimize import OptimizeResult
from torch import Tensor

from sttp_manifold.display import box_html, descent_svg, table_html
from sttp_manifold.optim._objective import Objective, Status, Stopped
from sttp_manifold.optim._resume import state_of

__all__ = ["MinimizeResult", "make_result"]


class MinimizeResult(OptimizeResult):
    """The outcome of :func:`minimize`: a ``scipy.optimize.OptimizeResult`` on torch tensors.

    Attributes:
        x (Tensor): the last iterate, a plain tensor on the device of ``x0``.
        fun (float): the cost there.
        jac (Tensor): the Riemannian gradient there.
        grad_norm (float): its norm.
        nit (int): iterations.
        nfev (int): calls of the cost function, also those that gradients and Hessians made.
        njev (int): gradients computed.
        nhev (int): Hessian-vector products computed.
        time (float): seconds.
        success (bool): whether the gradient or the cost went below its tolerance.
        status (int): 0 gradient, 1 cost, 2 step, 3 iterations, 4 evaluations, 5 time, 6 callback,
            7 no further decrease in this precision, 8 Hessian products.
        message (str): the same in words.
        history (dict): lists with one entry for each iterate from ``x0`` on: ``cost``,
            ``grad_norm``, ``step``, ``nfev`` (so far), ``seconds`` (so far).
        state (dict): what ``minimize(..., state=result.state)`` goes on from: tensors, numbers,
            lists, as ``torch.save`` keeps them; None from pymanopt's solvers.
        allvecs (list): the iterates, with ``options={"return_all": True}``.
    """

    def __repr__(self) -> str:
        shown = self._shown()
        width = max(map(len, shown), default=0)
        return "\n".join(f"{name:>{width}}: {shown[name]}" for name in shown)

    def _repr_html_(self) -> str:
        """For notebooks: why it stopped, the counts in a table, and how the gradient fell."""
        shown = self._shown()
        title = f"<b>{escape(type(self).__name__)}</b> {escape(str(shown.pop('message', '')))}"
        rows = [
            (name, f"{value:.6g}" if isinstance(value, float) else str(value))
            for name, value in shown.items()
        ]
        parts = [title, table_html(("", ""), rows)]
        drawing = descent_svg(self.get("history", {}).get("grad_norm", ()), "gradient norm")
        return box_html(*parts, *([drawing] if drawing else []))

    def _shown(self) -> dict[str, Any]:
        """What is shown of each entry, in the order in which it is."""
        shown = {k: v for k, v in self.items() if k not in _LONG}
        for name in ("x", "jac"):
            if name in self:
                shown[name] = _brief(self[name])
        for name in ("history", "allvecs"):
            if name in self:
                entries = self[name]["cost"] if name == "history" else self[name]
                shown[name] = f"{len(entries)} iterates"
        order = {name: k for k, name in enumerate(_ORDER)}
        return {k: shown[k] for k in sorted(shown, key=lambda name: order.get(name, len(order)))}


_LONG = ("x", "jac", "history", "state", "allvecs")
_ORDER = (
    "message", "success", "status", "fun", "grad_norm", "nit", "nfev", "njev", "nhev", "time",
    "x", "jac", "history", "allvecs",
)  # fmt: skip


def _brief(t: Tensor) -> str:
    kind = f"{str(t.dtype).removeprefix('torch.')}, {t.device}"
    if t.numel() <= 8:
        return f"{t.tolist()} ({kind})"
    return f"{tuple(t.shape)} ({kind})"


def make_result(objective: Objective, stopped: Stopped, method: str | None) -> MinimizeResult:
    """The result of a run that has ended.

    Args:
        objective: with an iterate on record.
        stopped: why.
        method: that can go on from there; None where it cannot.
    """
    assert objective.last is not None
    last = objective.shown(objective.last)
    result = MinimizeResult(
        x=last.x,
        fun=last.value,
        jac=last.gradient,
        grad_norm=last.grad_norm,
        nit=objective.nit,
        nfev=objective.nfev,
        njev=objective.cost.gradients,
        nhev=objective.cost.products,
        time=objective.seconds,
        success=stopped.status < Status.STEP,
        status=int(stopped.status),
        message=stopped.message,
        history=objective.history,
        state=None if method is None else state_of(objective, method),
    )
    if objective.allvecs is not None:
        result.allvecs = objective.allvecs
    return result
