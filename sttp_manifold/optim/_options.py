"""The options of each method of `minimize`, checked by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch import Tensor

from sttp_manifold.errors import ManifoldError

__all__ = [
    "ConjugateGradientOptions",
    "LBFGSOptions",
    "Preconditioner",
    "PymanoptOptions",
    "SteepestDescentOptions",
    "TrustRegionOptions",
    "read_options",
]

Preconditioner = Callable[[Tensor, Tensor], Tensor]
"""``(x, u) -> v``: a symmetric positive definite map of the tangent space at ``x``, near the
inverse of the Hessian."""


@dataclass(frozen=True)
class Options:
    """Common to all methods.

    Args:
        preconditioner: ``(x, u) -> v``, symmetric and positive definite on each tangent space.
        return_all: keep every iterate, as ``result.allvecs``.
    """

    preconditioner: Preconditioner | None = None
    return_all: bool = False

    def precondition(self, x: Tensor, u: Tensor) -> Tensor:
        """The preconditioned vector; the vector itself without a preconditioner."""
        if self.preconditioner is None:
            return u
        v: Any = self.preconditioner(x, u)  # a user's function may return anything
        if not isinstance(v, Tensor) or v.shape != u.shape:
            what = f"{tuple(v.shape)}" if isinstance(v, Tensor) else f"{type(v).__name__}"
            raise ManifoldError(
                f"a preconditioner (x, u) -> v gives a tangent vector at x, of shape "
                f"{tuple(u.shape)}; this one gave {what}"
            )
        return v

    def check_definite(self, product: float) -> None:
        """Refuse a preconditioner that turns a gradient uphill.

        Args:
            product: inner product of a gradient other than zero with the preconditioned one.

        Raises:
            ManifoldError: a product that is negative, of a preconditioner.
        """
        if self.preconditioner is not None and product < 0:
            raise ManifoldError(
                f"a preconditioner is positive definite on each tangent space, but <u, P u> = "
                f"{product:.3g} at a gradient u; its negative may be"
            )


@dataclass(frozen=True)
class SteepestDescentOptions(Options):
    """Along the negative (preconditioned) gradient.

    Args:
        decrease: ``c_1`` of the Wolfe conditions.
        curvature: ``c_2``, above ``c_1`` and below one.
        max_trials: trials of one line search.
        first_step: the first trial step from the second search on: ``"slopes"``, the last
            accepted one times the ratio of the slopes, or ``"decrease"``, that of a parabola with
            the decrease of the last iteration (Nocedal & Wright 2006, eq. 3.60).
        initial_step: length of the very first trial step.

    Raises:
        ManifoldError: a value out of its range, or none of the names.
    """

    decrease: float = 1e-4
    curvature: float = 0.1
    max_trials: int = 25
    first_step: str = "slopes"
    initial_step: float = 1.0

    def __post_init__(self) -> None:
        _within(self, "curvature", 0, 1)
        _within(self, "decrease", 0, self.curvature)
        _within(self, "curvature", self.decrease, 1)
        _within(self, "max_trials", 0, math.inf)
        _within(self, "initial_step", 0, math.inf)
        _one_of(self, "first_step", ("slopes", "decrease"))


@dataclass(frozen=True)
class ConjugateGradientOptions(SteepestDescentOptions):
    r"""Nonlinear conjugate gradients.

    Args:
        beta_rule: ``"polak_ribiere_plus"`` or ``"hestenes_stiefel"``, both cut off at zero.
        restart: back to the gradient where consecutive gradients are not nearly orthogonal,
            :math:`|\langle g_{k+1}, T g_k\rangle| \ge \nu \langle g_{k+1}, g_{k+1}\rangle`
            (Powell 1977), with this :math:`\nu`; infinite for never. Without it, low-rank
            completion may crawl for hundreds of iterations where a restart ends it in tens.
        restart_every: back to the gradient after so many iterations at the latest.

    Raises:
        ManifoldError: a value out of its range, or none of the names.
    """

    beta_rule: str = "hestenes_stiefel"
    restart: float = 0.1
    restart_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "beta_rule", ("polak_ribiere_plus", "hestenes_stiefel"))
        _within(self, "restart", 0, math.inf)
        _within(self, "restart_every", 0, math.inf)


@dataclass(frozen=True)
class LBFGSOptions(SteepestDescentOptions):
    r"""Limited-memory BFGS with transported pairs (Huang, Gallivan & Absil 2015).

    Args:
        memory: pairs kept.
        cautious: a pair is kept only if
            :math:`\langle y, s\rangle \ge \epsilon \langle s, s\rangle |g|_{rel}`, with this
            :math:`\epsilon` and the gradient norm relative to the first one.

    Raises:
        ManifoldError: a value out of its range, or none of the names.
    """

    curvature: float = 0.9
    memory: int = 10
    cautious: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self, "memory", 0, math.inf)
        _within(self, "cautious", -1, math.inf)


@dataclass(frozen=True)
class TrustRegionOptions(Options):
    r"""Trust regions with Steihaug-Toint conjugate gradients (Absil, Baker & Gallivan 2007).

    Args:
        initial_radius: the first radius. If absent, an eighth of the manifold's length scale at
            the start, ``manifold.typical_dist(x0)``, or where it has none, of the root of the
            number of coordinates or the length of ``x0``, whichever is larger.
        max_radius: the largest; if absent, ten times that scale or length, or that root, at the
            start or at the last iterate, whichever is larger.
        accept: a step is taken if the cost falls by more than this part of the prediction.
        kappa: the inner iteration ends when its residual is below ``kappa`` times the gradient
        theta: or, near the end, below the gradient norm to the power ``1 + theta``, relative to
            the first gradient norm: convergence of order ``1 + theta``. Quadratic with one, but
            fewer Hessian products in all with a half, where the Hessian is singular along a
            gauge; never below what rounding or ``gradient_tolerance`` make of no use.
        max_inner: Hessian products of one inner iteration; the number of coordinates if absent.
        rho_regularization: where a step promises a decrease below so many units of rounding of
            the cost, it is judged by the slopes at its ends instead of by the values.

    Raises:
        ManifoldError: a value out of its range, or none of the names.
    """

    initial_radius: float | None = None
    max_radius: float | None = None
    accept: float = 0.1
    kappa: float = 0.1
    theta: float = 0.5
    max_inner: int | None = None
    rho_regularization: float = 1e3

    def __post_init__(self) -> None:
        _within(self, "initial_radius", 0, math.inf)
        _within(self, "max_radius", 0, math.inf)
        _within(self, "accept", -1e-300, 0.25)
        _within(self, "kappa", 0, 1)
        _within(self, "theta", -1e-300, math.inf)
        _within(self, "max_inner", 0, math.inf)
        _within(self, "rho_regularization", -1e-300, math.inf)


@dataclass(frozen=True)
class PymanoptOptions(Options):
    """Pymanopt's solvers.

    Args:
        solver: arguments of the solver's constructor, as ``{"beta_rule": "PolakRibiere"}``; limits
            are those of ``minimize``.
        run: arguments of its ``run``, as ``{"maxinner": 50}``.
    """

    solver: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(kind: type[OptionsT], given: Mapping[str, Any], method: str) -> OptionsT:
    """Options of a method from a user's mapping.

    Raises:
        ManifoldError: a name that the method does not know, or a value out of range.
    """
    if not isinstance(given, Mapping):
        raise ManifoldError(
            f"options are a mapping of names to values, as options={{'return_all': True}}, but "
            f"{type(given).__name__} came"
        )
    known = [entry.name for entry in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ManifoldError(
            f"method={method!r} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known)}"
        )
    return kind(**given)


def _within(options: Options, name: str, low: float, high: float) -> None:
    value: Any = getattr(options, name)
    if value is None and next(f.default for f in fields(options) if f.name == name) is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low < value <= high:
        raise ManifoldError(
            f"option {name}={value!r} lies outside of its range, ({low:g}, {high:g}]"
        )


def _one_of(options: Options, name: str, known: tuple[str, ...]) -> None:
    value = getattr(options, name)
    if value not in known:
        raise ManifoldError(f"option {name}={value!r} is none of {', '.join(map(repr, known))}")
